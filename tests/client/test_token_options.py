"""What --token and --tokens of the command line become in a specification."""

from __future__ import annotations

import pytest

from cffa_core.errors import InvalidSpec
from services.client.cli import specification


def test_tokens_of_a_training() -> None:
    given = ["disc", "vessel=frangi", "red=haemorrhage,microaneurysm"]
    settings = specification.train_settings(None, ["tokens.attention_lambda=0.5"], tokens=given, token_steps=7, steps=9)
    assert settings.tokens is not None and settings.tokens.phase1_steps == 7
    assert settings.tokens.attention_lambda == 0.5
    assert [token.mask_names for token in settings.tokens.tokens] == [("disc",), (), ("haemorrhage", "microaneurysm")]
    assert specification.train_settings(None, None).tokens is None


@pytest.mark.parametrize("token", ["Disc", "disc=", "<disc>"])
def test_a_bad_token_is_refused_with_its_place(token: str) -> None:
    with pytest.raises(InvalidSpec) as caught:
        specification.train_settings(None, None, tokens=["vessel", token])
    assert caught.value.problems[0].pointer.startswith("/tokens/tokens/1/")


def test_tokens_of_a_generation() -> None:
    assert specification.generate_settings(None, None, count=1, tokens="disc,vessel").tokens == ("disc", "vessel")
    assert specification.generate_settings(None, None, count=1).tokens is None
    with pytest.raises(InvalidSpec, match="not valid"):
        specification.generate_settings(None, None, count=1, tokens="disc,disc")
