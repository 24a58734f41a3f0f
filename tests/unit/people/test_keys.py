"""API keys: their form and checksum, what is kept of them, scopes."""

from __future__ import annotations

import hmac
import random
import stat
import string
import zlib
from pathlib import Path

import pytest

from cffa_core.people import keys
from cffa_core.people.keys import Scope
from cffa_core.settings import Settings

LETTERS = string.digits + string.ascii_uppercase + string.ascii_lowercase


def test_keys_differ_and_are_well_formed() -> None:
    made = {keys.new_key() for _ in range(200)}
    assert len(made) == 200
    assert all(key.isascii() and len(key) == 43 and keys.is_well_formed(key) for key in made)


def test_the_checksum_is_crc32_in_base_62() -> None:
    key = keys.new_key()
    value = 0
    for letter in key[-6:]:
        value = value * 62 + LETTERS.index(letter)
    assert value == zlib.crc32(key[5:-6].encode())


def test_a_post_makes_the_same_key_from_the_same_three_things_alone() -> None:
    made = keys.key_of_post(b"secret", "post key", "mark")
    number = int.from_bytes(hmac.new(b"secret", b"key of a post\0mark\0post key", "sha256").digest(), "big")
    letters = ""
    while len(letters) < 32:
        letters, number = LETTERS[number % 62] + letters, number // 62
    assert made[5:-6] == letters and keys.is_well_formed(made)
    others = [(b"secreT", "post key", "mark"), (b"secret", "post keY", "mark"), (b"secret", "post key", "marK")]
    assert len({made, *(keys.key_of_post(*other) for other in others)}) == 4


def test_every_wrong_letter_is_noticed() -> None:
    key, chance = keys.new_key(), random.Random(1)
    for place in range(len(key)):
        for letter in chance.sample(LETTERS.replace(key[place], ""), 12):
            assert not keys.is_well_formed(key[:place] + letter + key[place + 1 :]), place


def test_swapped_lost_and_added_letters_are_noticed() -> None:
    key = keys.new_key()
    for place in range(5, len(key) - 1):
        swapped = key[:place] + key[place + 1] + key[place] + key[place + 2 :]
        assert swapped == key or not keys.is_well_formed(swapped)
        assert not keys.is_well_formed(key[:place] + key[place + 1 :])
        assert not keys.is_well_formed(key[:place] + "A" + key[place:])


@pytest.mark.parametrize("text", ["", "cffa_", "x" * 43, "cffa_" + "ä" * 38, "\udc80" * 43, "cffa_" + " " * 38])
def test_other_text_is_no_key(text: str) -> None:
    assert not keys.is_well_formed(text)


def test_what_is_kept_depends_on_the_secret_and_tells_nothing() -> None:
    key = keys.new_key()
    kept = keys.digest(key, b"one secret")
    assert len(kept) == 64 and kept == keys.digest(key, b"one secret")
    assert kept != keys.digest(key, b"another secret")
    assert key[5:] not in kept and keys.shown(key)[:-3] == key[:11]


def test_scopes_cover_one_another_in_order() -> None:
    covers = [[scope.covers(needed) for needed in (Scope.VIEWER, Scope.RESEARCHER, Scope.ADMIN)] for scope in Scope]
    assert covers == [[True, False, False], [True, True, False], [True, True, True]]


def test_the_secret_is_the_given_one_or_kept_in_home(tmp_path: Path) -> None:
    assert keys.key_secret(Settings(home=tmp_path / "a", key_secret="given" * 8)) == b"given" * 8
    assert not (tmp_path / "a").exists()
    made = keys.key_secret(Settings(home=tmp_path / "b"))
    assert made == keys.key_secret(Settings(home=tmp_path / "b")) and len(made) == 32
    assert stat.S_IMODE((tmp_path / "b" / "keys.key").stat().st_mode) == 0o600
