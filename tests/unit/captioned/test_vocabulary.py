"""Words as numbers and back, and what is said of texts that the model cannot read."""

from __future__ import annotations

from pathlib import Path

import pytest

from cffa_core.captioned.vocabulary import END, PAD, START, UNKNOWN, Vocabulary
from cffa_core.errors import InvalidSpec
from tests.unit.captioned.conftest import CAPTIONS


def test_texts_come_back(vocabulary: Vocabulary) -> None:
    tokens = vocabulary.encode(CAPTIONS)
    assert [vocabulary.decode(row) for row in tokens.ids.tolist()] == list(CAPTIONS)
    assert tokens.mask.sum(dim=1).tolist() == [9, 4, 7, 4]
    assert (tokens.ids[:, 0] == START).all() and (tokens.ids == PAD).equal(tokens.mask == 0)
    assert [row[count - 1] for row, count in zip(tokens.ids.tolist(), (9, 4, 7, 4), strict=True)] == [END] * 4


def test_words_are_those_of_the_captions(vocabulary: Vocabulary) -> None:
    assert vocabulary.words == [",", "a", "exudates", "haemorrhages", "photograph", "with"]
    assert len(vocabulary) == 10


def test_capitals_and_spaces_do_not_count(vocabulary: Vocabulary) -> None:
    plain, odd = (
        vocabulary.encode([text]).ids for text in ("A photograph, with exudates", "a  PHOTOGRAPH ,with Exudates")
    )
    assert plain.equal(odd)


def test_rows_are_cut_to_the_longest(vocabulary: Vocabulary) -> None:
    import torch

    tokens = vocabulary.encode(CAPTIONS).rows(torch.tensor([1, 2]))
    assert tokens.ids.shape == tokens.mask.shape == (2, 7)


def test_a_file_has_the_same_words_and_bytes(vocabulary: Vocabulary, tmp_path: Path) -> None:
    vocabulary.save(tmp_path / "a.json")
    again = Vocabulary.load(tmp_path / "a.json")
    again.save(tmp_path / "b.json")
    assert again.encode(CAPTIONS).ids.equal(vocabulary.encode(CAPTIONS).ids)
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_what_cannot_be_read_is_named(vocabulary: Vocabulary) -> None:
    texts = ["A photograph", "a photograph with drusen, drusen and scars", "a photograph, " * 5, "  "]
    with pytest.raises(
        InvalidSpec, match=r"3 text\(s\); text 1: the model never read 'drusen', 'and', 'scars'"
    ) as found:
        vocabulary.check(texts, max_tokens=12)
    assert [(problem.pointer, problem.code) for problem in found.value.problems] == [
        ("/texts/1", "unknown_words"),
        ("/texts/2", "text_too_long"),
        ("/texts/3", "no_words"),
    ]
    assert "15 words and marks; the model reads at most 10" in found.value.problems[1].message
    assert "haemorrhages" in found.value.problems[0].message


def test_unknown_words_of_held_out_captions_have_a_number(vocabulary: Vocabulary) -> None:
    assert vocabulary.encode(["a drusen"]).ids.tolist()[0][2] == UNKNOWN
    assert vocabulary.decode([4, 99, END, 5]) == ",", "numbers that are no word are left out, nothing follows the end"
