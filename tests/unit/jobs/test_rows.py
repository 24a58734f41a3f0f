"""Ids and page tokens."""

from __future__ import annotations

import re

import pytest

from cffa_core.errors import InvalidSpec
from cffa_core.jobs.rows import as_page, new_id, page_limits


@pytest.mark.parametrize("prefix", ["ds", "job", "mdl", "unit"])
def test_ids_have_the_form_that_specs_ask_for(prefix: str) -> None:
    ids = {new_id(prefix) for _ in range(200)}
    assert len(ids) == 200
    assert all(re.fullmatch(rf"{prefix}_[0-9a-z]{{20}}", found) for found in ids)


def test_a_page_ends_with_a_token_only_if_more_follows() -> None:
    assert as_page(["a", "b", "c"], [9, 8, 7], 2).next_token == "8"
    assert as_page(["a", "b"], [9, 8], 2).next_token is None
    assert as_page([], [], 2).items == ()


@pytest.mark.parametrize("size", [0, -1, 1001])
def test_page_sizes_have_limits(size: int) -> None:
    with pytest.raises(InvalidSpec):
        page_limits(size, None)


@pytest.mark.parametrize("token", ["", "-1", "1.5", "１２", "0x1", " 1", "9" * 19])
def test_a_token_must_be_one_that_was_given_out(token: str) -> None:
    with pytest.raises(InvalidSpec) as caught:
        page_limits(10, token)
    assert caught.value.problems[0].pointer == "/page_token"
