"""How near a caption is to the one that a person wrote: words in common, and word for word the same.

Works on texts; how pictures are judged is the business of ``evaluation``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

from cffa_core.captioned.vocabulary import words_of


def token_f1(said: str, known: str) -> float:
    """F1 of the words and marks of two texts, each counted as often as it occurs (Rajpurkar et al. 2016); 0..1."""
    mine, theirs = Counter(words_of(said)), Counter(words_of(known))
    shared = (mine & theirs).total()
    return 2 * shared / (mine.total() + theirs.total()) if shared else 0.0


def same_words(said: str, known: str) -> bool:
    """Whether two texts are the same word for word, whatever their spaces and capitals."""
    return words_of(said) == words_of(known)


def named(text: str, words: Collection[str]) -> frozenset[str]:
    """Which of ``words`` a text names."""
    return frozenset(words) & frozenset(words_of(text))
