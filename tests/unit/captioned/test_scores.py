"""Words in common, by hand; retrieval where captions repeat."""

from __future__ import annotations

import pytest
import torch

from cffa_core.captioned.losses import same_text
from cffa_core.captioned.scores import named, same_words, token_f1
from cffa_core.recipes.captioned_run import retrieval


def test_token_f1_by_hand() -> None:
    assert token_f1("a photograph, with exudates", "A photograph") == pytest.approx(2 * 2 / (5 + 2))
    assert token_f1("a a a", "a") == pytest.approx(2 / 4), "a word counts as often as both have it"
    assert token_f1("drusen", "scar") == 0 and token_f1("A scar.", "a scar .") == 1


def test_the_same_words_whatever_their_spaces() -> None:
    assert same_words("A scar , LARGE", "a scar, large") and not same_words("a scar", "a scar,")


def test_named_words() -> None:
    assert named("With haemorrhages, exudates", ("haemorrhages", "microaneurysms")) == {"haemorrhages"}


def test_retrieval_counts_equal_captions_as_right() -> None:
    """Texts a, b, a; the second picture lies near a, the third near the first picture's place."""
    text = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    image = torch.tensor([[1.0, 0.1], [0.9, 0.0], [1.0, 0.05]])
    found = retrieval(text, image, same_text(torch.tensor([[4], [5], [4]])))
    assert found["image_to_text"].tolist() == [True, False, True]
    assert found["text_to_image"].tolist() == [False, False, False], (
        "the nearest picture to a is that of b; to b, one of a"
    )
