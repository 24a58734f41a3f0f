"""Words of a prompt as positions in the text that a UNet is shown: a word may be several tokens, and may come twice.

The start token, the end token and the padding behind it are no words, nor is punctuation.
"""

from __future__ import annotations

import re
from typing import Any

from cffa_core.errors import InvalidSpec, Problem

# A placeholder such as <disc>, or letters and digits, joined by apostrophes and hyphens.
_WORD = re.compile(r"<[^\s<>]+>|\w+(?:['’-]\w+)*")


def words_of(prompt: str) -> list[str]:
    """The words of a prompt in lower case, in their order, each once."""
    return list(dict.fromkeys(found.group().lower() for found in _WORD.finditer(prompt)))


def word_positions(tokenizer: Any, prompt: str, word: str) -> tuple[int, ...]:
    """Positions of the tokens of ``word`` (or of several words in a row) in the encoded ``prompt``, wherever it comes.

    Position 0 is the start token. Case does not count. Raises ``InvalidSpec`` (pointer ``/tokens``) for what the prompt
    does not have, naming the words that it has.
    """
    spans = [(found.group().lower(), found.span()) for found in _WORD.finditer(prompt)]
    asked = [found.group().lower() for found in _WORD.finditer(word)]
    count = len(asked)
    places = [
        (spans[at][1][0], spans[at + count - 1][1][1])
        for at in range(len(spans) - count + 1)
        if count and [text for text, _ in spans[at : at + count]] == asked
    ]
    if not places:
        message = f"the prompt has no word {word!r}; its words are: {', '.join(words_of(prompt))}"
        raise InvalidSpec(message, problems=(Problem("/tokens", "unknown_word", message),))
    offsets = tokenizer(prompt, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    return tuple(
        position
        for position, (start, stop) in enumerate(offsets)
        if start < stop and any(first <= start and stop <= last for first, last in places)
    )
