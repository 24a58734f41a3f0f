"""How near captions are to those that are known: intervals over patients where they are known, else over eyes."""

from __future__ import annotations

import numpy as np
import pytest

from cffa_core.data.contracts import CheckedPair
from cffa_core.recipes.captioned_report import against_known

RIGHT = [True, False, True, True, False, True, False, True, True, False]  # one of ten patients each, all its pictures


def pairs(*, patients: bool) -> list[CheckedPair]:
    """Ten patients of two eyes with two pictures each."""
    return [
        CheckedPair(f"p{i:02d}", f"eye {i // 2}", 224, 224, "given", None, patient=f"{i // 4}" if patients else None)
        for i in range(40)
    ]


def said(*, right: list[bool]) -> dict[str, str]:
    return {f"p{i:02d}": "a scar" if right[i // 4] else "drusen" for i in range(40)}


KNOWN = {f"p{i:02d}": "a scar" for i in range(40)}


@pytest.mark.parametrize("score", ["token_f1", "exact"])
def test_intervals_are_as_wide_as_what_is_drawn_whole(score: str) -> None:
    """Normal theory: the standard error of a mean of ten, or twenty, independent zeros and ones."""
    deviation = np.std(RIGHT)
    for patients, independent in ((True, 10), (False, 20)):
        made = against_known(said(right=RIGHT), KNOWN, pairs(patients=patients))
        assert made is not None
        found = made[score]
        assert (found["value"], found["n"], found["eyes"]) == (0.6, 40, 20)
        assert found.get("patients") == (10 if patients else None)
        width = found["high"] - found["low"]
        assert width == pytest.approx(2 * 1.96 * deviation / np.sqrt(independent), rel=0.2)


def test_pairs_without_a_known_caption_do_not_count() -> None:
    some = {name: text for name, text in KNOWN.items() if name < "p08"}
    made = against_known(said(right=RIGHT), some, pairs(patients=True))
    assert made is not None and made["exact"] == {
        "value": 0.5, "low": None, "high": None, "n": 8, "eyes": 4, "patients": 2
    }  # fmt: skip
    assert against_known(said(right=RIGHT), {}, pairs(patients=True)) is None
