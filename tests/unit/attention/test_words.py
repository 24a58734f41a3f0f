"""Words are found where the tokeniser puts them, however many tokens they are."""

from __future__ import annotations

import pytest

from cffa_core.attention.words import word_positions, words_of
from cffa_core.errors import InvalidSpec
from cffa_core.models.base import Base, load_base

PROMPT = "A photo of the optic  disc, the Macula and <lesion>, ill-defined"


@pytest.fixture(scope="module")
def tiny() -> Base:
    return load_base("tiny")


def said(base: Base, prompt: str, positions: tuple[int, ...]) -> str:
    """The tokens at these positions, as text, by the tokeniser's own decoding."""
    ids = base.tokenizer(prompt).input_ids
    return str(base.tokenizer.decode([ids[position] for position in positions])).replace(" ", "")


def test_words_stand_once_in_lower_case_and_without_punctuation() -> None:
    assert words_of(PROMPT) == ["a", "photo", "of", "the", "optic", "disc", "macula", "and", "<lesion>", "ill-defined"]


@pytest.mark.parametrize("word", ["photo", "MACULA", "disc", "ill-defined", "<lesion>", "microaneurysms", "café"])
def test_positions_decode_to_the_word(tiny: Base, base: Base, word: str) -> None:
    prompt = f"{PROMPT} microaneurysms café"
    for found in (tiny, base):  # whole words, and single bytes
        positions = word_positions(found.tokenizer, prompt, word)
        assert said(found, prompt, positions) == word.lower()
        assert 0 not in positions and max(positions) < len(found.tokenizer(prompt).input_ids) - 1


def test_a_word_that_comes_twice_has_both_places(tiny: Base) -> None:
    assert len(word_positions(tiny.tokenizer, PROMPT, "the")) == 2


def test_words_in_a_row_are_one_but_only_in_a_row(tiny: Base) -> None:
    positions = word_positions(tiny.tokenizer, PROMPT, "optic disc")
    assert said(tiny, PROMPT, positions) == "opticdisc"
    with pytest.raises(InvalidSpec):
        word_positions(tiny.tokenizer, PROMPT, "disc optic")


@pytest.mark.parametrize("word", ["vessels", "dis", ",", " "])
def test_unknown_words_are_refused_with_the_words_there_are(tiny: Base, word: str) -> None:
    with pytest.raises(InvalidSpec, match="its words are: a, photo, of, the, optic, disc, macula") as caught:
        word_positions(tiny.tokenizer, PROMPT, word)
    assert caught.value.problems[0].pointer == "/tokens"


def test_a_placeholder_that_is_one_token_is_one_position() -> None:
    own = load_base("tiny").tokenizer
    own.add_tokens(["<lesion>"])
    assert word_positions(own, "a photo of <lesion>, <disc>", "<lesion>") == (4,)
