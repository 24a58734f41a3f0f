"""Words and marks as numbers: a word-level tokenizer learnt from captions, kept as ``tokenizer.json``.

Texts are read in small letters; a comma or a full stop is a token of its own. Knows no model and no data set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from cffa_core.errors import InvalidSpec, Problem

# CLIP's text encoder takes an end token numbered 2 for that of an old, wrong configuration: it is 3 here.
SPECIAL = ("<pad>", "<start>", "<unknown>", "<end>")
PAD, START, UNKNOWN, END = range(len(SPECIAL))
MARKS = frozenset(".,;:!?)'")
SHOWN_WORDS = 40
_NORMAL = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
_PIECES = pre_tokenizers.BertPreTokenizer()


@dataclass(frozen=True)
class Tokens:
    """Texts as numbers: ``ids`` (B, L) int64, padded with ``PAD``; ``mask`` (B, L) int64, 1 where there is a token."""

    ids: torch.Tensor
    mask: torch.Tensor

    def to(self, device: torch.device) -> Tokens:
        """The same on a device."""
        return Tokens(self.ids.to(device), self.mask.to(device))

    def rows(self, index: torch.Tensor) -> Tokens:
        """Some rows, cut to the longest of them."""
        length = int(self.mask[index].sum(dim=1).max())
        return Tokens(self.ids[index, :length], self.mask[index, :length])


def words_of(text: str) -> list[str]:
    """Words and marks of a text, in small letters, in order."""
    return [word for word, _ in _PIECES.pre_tokenize_str(_NORMAL.normalize_str(text))]


class Vocabulary:
    """The words of a model. ``len()`` counts them with the four special tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    @classmethod
    def of(cls, texts: Sequence[str]) -> Vocabulary:
        """All words of ``texts``, in order of the alphabet."""
        words = {word for text in texts for word in words_of(text)}
        return cls(_tokenizer({word: number for number, word in enumerate([*SPECIAL, *sorted(words)])}))

    @classmethod
    def load(cls, path: Path) -> Vocabulary:
        """Read what :meth:`save` wrote; whoever calls has checked the file's digest."""
        return cls(Tokenizer.from_file(str(path)))

    def save(self, path: Path) -> None:
        """Write ``tokenizer.json``; equal vocabularies give equal bytes."""
        path.write_text(self._tokenizer.to_str(pretty=True) + "\n", encoding="utf-8")

    def __len__(self) -> int:
        return int(self._tokenizer.get_vocab_size())

    @property
    def words(self) -> list[str]:
        """Words and marks, without the special tokens, in order of their numbers."""
        known = self._tokenizer.get_vocab()
        return sorted((word for word in known if word not in SPECIAL), key=known.__getitem__)

    def length(self, text: str) -> int:
        """Tokens of a text, start and end included."""
        return len(self._tokenizer.encode(text).ids)

    def unknown(self, text: str) -> list[str]:
        """Words of a text that are not in the vocabulary, each once, in order."""
        known = self._tokenizer.get_vocab()
        return list(dict.fromkeys(word for word in words_of(text) if word not in known))

    def encode(self, texts: Sequence[str]) -> Tokens:
        """Numbers of ``texts``, padded to the longest; words that are not known become ``<unknown>``."""
        rows = [self._tokenizer.encode(text).ids for text in texts]
        longest = max(len(row) for row in rows)
        ids = torch.tensor([[*row, *[PAD] * (longest - len(row))] for row in rows], dtype=torch.int64)
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], dtype=torch.int64)
        return Tokens(ids, mask)

    def check(self, texts: Sequence[str], max_tokens: int) -> None:
        """Raise ``InvalidSpec`` with a problem for every text that has no word, unknown words, or too many of them."""
        problems: list[Problem] = []
        for index, text in enumerate(texts):
            length, unknown = self.length(text), self.unknown(text)
            if length <= 2:
                problems.append(Problem(f"/texts/{index}", "no_words", f"{text!r} has no words; write a caption"))
            if length > max_tokens:
                message = f"{length - 2} words and marks; the model reads at most {max_tokens - 2}: shorten the text"
                problems.append(Problem(f"/texts/{index}", "text_too_long", message))
            if unknown:
                known = ", ".join(word for word in self.words[:SHOWN_WORDS] if word.isalpha())
                named = ", ".join(repr(word) for word in unknown[:10])
                message = f"the model never read {named}; it knows {known}{' ...' * (len(self) > SHOWN_WORDS)}"
                problems.append(Problem(f"/texts/{index}", "unknown_words", message))
        if problems:
            first = f"text {problems[0].pointer.rpartition('/')[2]}: {problems[0].message}"
            raise InvalidSpec(f"the model cannot read {len(problems)} text(s); {first}", problems=tuple(problems))

    def decode(self, ids: Sequence[int]) -> str:
        """A text from numbers: up to the first end token, special tokens left out, its first letter large."""
        text = ""
        for number in ids:
            if number == END:
                break
            word = self._tokenizer.id_to_token(int(number))
            if word is None or word in SPECIAL:
                continue
            text += word if word in MARKS or not text else f" {word}"
        return text[:1].upper() + text[1:]


def _tokenizer(vocabulary: dict[str, int]) -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL[UNKNOWN]))
    tokenizer.normalizer = _NORMAL
    tokenizer.pre_tokenizer = _PIECES
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{SPECIAL[START]} $A {SPECIAL[END]}",
        special_tokens=[(SPECIAL[START], START), (SPECIAL[END], END)],
    )
    return tokenizer
