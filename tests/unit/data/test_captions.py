"""captions.jsonl: what is read, and the line and fault that each bad one is refused with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cffa_core.data.captions import Caption, captions_text, counted, parse_captions, read_captions
from cffa_core.data.phantom.folder import write_phantoms
from cffa_core.errors import InvalidDataset

GOOD = {"name": "m001", "cf": "a fundus", "fa": None, "findings": ["exudate"], "phase": "late"}


def test_a_folder_of_procedural_eyes_is_read_whole(tmp_path: Path) -> None:
    write_phantoms(tmp_path, 2, seed=1, resolution=64)
    found = read_captions(tmp_path)
    stored = [json.loads(line) for line in (tmp_path / "captions.jsonl").read_text().splitlines()]
    assert [(said.name, said.cf, said.fa, list(said.findings)) for said in found.values()] == [
        (row["name"], row["cf"], row["fa"], row["findings"]) for row in stored
    ]


def test_a_folder_without_captions_has_none(tmp_path: Path) -> None:
    assert read_captions(tmp_path) == {}


def test_what_is_written_is_read_again_in_the_order_asked_for() -> None:
    said = {"b": Caption("b", "Ödem, “soft”", None, ("exudate",)), "a": Caption("a", None, "late phase", ())}
    text = captions_text(said, ["a", "b", "c"])
    again, problems = parse_captions(text)
    assert not problems and again == said and list(again) == ["a", "b"]
    assert counted(said.values()) == {"pairs": 2, "cf": 1, "fa": 1}


def test_a_name_may_have_its_files_ending() -> None:
    found, problems = parse_captions(json.dumps(GOOD | {"name": "m001.png"}), {"m001"})
    assert not problems and list(found) == ["m001"]


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("{", "not a JSON object"),
        ("[" * 60_000, "not a JSON object"),
        ("[1]", "not a JSON object"),
        (json.dumps(GOOD | {"cf": "x" * 64 * 1024}), "a line has at most"),
        (json.dumps(GOOD | {"name": None}), "name is missing"),
        (json.dumps(GOOD | {"name": "m999"}), "no pair is named 'm999'"),
        (json.dumps(GOOD | {"cf": None}), "neither cf nor fa"),
        (json.dumps(GOOD | {"cf": ""}), "cf must have 1 to 1000 characters"),
        (json.dumps(GOOD | {"cf": "x" * 1001}), "cf must have 1 to 1000 characters"),
        (json.dumps(GOOD | {"fa": 7}), "fa must be a text"),
        (json.dumps(GOOD | {"fa": "two\nlines"}), "fa must be one line"),
        (json.dumps(GOOD | {"fa": "half \ud800"}), "fa must be one line"),
        (json.dumps(GOOD | {"findings": "exudate"}), "findings must be a list"),
        (json.dumps(GOOD | {"findings": [["exudate"]]}), "findings holds a word that must be a text"),
        (json.dumps(GOOD | {"findings": ["a", "a"]}), "findings names something twice"),
        (json.dumps(GOOD), "has a caption already"),
    ],
)
def test_a_bad_line_is_named_with_its_fault(line: str, fault: str) -> None:
    found, problems = parse_captions(json.dumps(GOOD) + "\n\n" + line, {"m001", "m002"}, "captions.jsonl")
    assert list(found) == ["m001"]
    (problem,) = problems
    assert problem.pointer == "captions.jsonl:3" and problem.code == "bad_captions"
    assert fault in problem.message


def test_reading_a_folder_with_bad_lines_names_them_all(tmp_path: Path) -> None:
    (tmp_path / "captions.jsonl").write_text(json.dumps(GOOD) + "\n{\n[]\n")
    with pytest.raises(InvalidDataset) as caught:
        read_captions(tmp_path)
    assert [problem.pointer for problem in caught.value.problems] == ["captions.jsonl:2", "captions.jsonl:3"]
    assert "captions.jsonl:2" in caught.value.message


def test_more_lines_than_pairs_can_be_are_not_parsed() -> None:
    found, (problem,) = parse_captions("\n" * 20_002)
    assert not found and problem.code == "too_large"
