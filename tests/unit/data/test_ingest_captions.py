"""captions.jsonl on its way through the check of a data set: into the digest and the folder, and out again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cffa_core.data.captions import Caption, read_captions
from cffa_core.data.export import ExportFormat, export_pairs
from cffa_core.data.ingest import Limits, check, write
from tests.raw_pairs import pair_files, write_folder, write_zip


def lines(*rows: dict[str, object]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


P0 = {"name": "p0", "cf": "a fundus", "fa": None, "findings": ["exudate"]}
P1 = {"name": "p1.png", "cf": "another", "fa": "late phase"}


def test_captions_belong_to_the_digest_in_whatever_order_and_form_they_come(tmp_path: Path) -> None:
    files = pair_files(2)
    plain = check(write_folder(tmp_path / "plain", files))
    said = check(write_folder(tmp_path / "said", {**files, "captions.jsonl": lines(P0, P1)}))
    turned = check(
        write_zip(
            tmp_path / "set.zip",
            {"set/" + k: v for k, v in files.items()}
            | {
                "set/captions.jsonl": b"\xef\xbb\xbf"
                + lines(P1 | {"phase": "late", "findings": []}, P0).replace(b"\n", b"\r\n")
            },
        )
    )
    other = check(write_folder(tmp_path / "other", {**files, "captions.jsonl": lines(P0 | {"cf": "A fundus"}, P1)}))
    assert plain.ok and said.ok and turned.ok and other.ok
    assert said.digest == turned.digest
    assert len({plain.digest, said.digest, other.digest}) == 3
    assert said.report()["captions"] == {"pairs": 2, "cf": 2, "fa": 1}
    assert "captions" not in plain.report()


def test_they_are_written_with_the_pairs_and_read_with_safe_names(tmp_path: Path) -> None:
    files = {name.replace("p0", "eye one"): data for name, data in pair_files(2).items()}
    files["captions.jsonl"] = lines(P0 | {"name": "eye one"}, P1)
    checked = check(write_folder(tmp_path / "raw", files))
    index = write(checked, tmp_path / "checked")
    found = read_captions(tmp_path / "checked")
    assert list(found) == [pair["name"] for pair in index["pairs"]]
    assert found["p1"] == Caption("p1", "another", "late phase", ())
    assert read_captions(tmp_path / "raw") == found


def test_a_set_too_large_to_be_kept_decoded_has_the_same_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cffa_core.data.ingest.KEPT_BYTES", 0)
    checked = check(write_folder(tmp_path / "raw", {**pair_files(2), "captions.jsonl": lines(P0, P1)}))
    write(checked, tmp_path / "checked")
    assert len(read_captions(tmp_path / "checked")) == 2


def test_every_bad_line_is_a_problem_of_the_data_set(tmp_path: Path) -> None:
    bad = lines(P0, P0, {"name": "p7", "cf": "of no pair"}) + b"{\n"
    checked = check(write_folder(tmp_path / "set", {**pair_files(2), "captions.jsonl": bad}))
    assert [(problem.pointer, problem.code) for problem in checked.problems] == [
        (f"captions.jsonl:{line}", "bad_captions") for line in (2, 3, 4)
    ]


@pytest.mark.parametrize(
    ("data", "limits", "code"),
    [(b"\xff\xfe", Limits(), "bad_captions"), (lines(P0), Limits(max_captions_bytes=20), "too_large")],
)
def test_a_file_that_is_no_text_or_too_large_is_not_parsed(
    tmp_path: Path, data: bytes, limits: Limits, code: str
) -> None:
    checked = check(write_folder(tmp_path / "set", {**pair_files(2), "captions.jsonl": data}), limits)
    assert [(problem.pointer, problem.code) for problem in checked.problems] == [("captions.jsonl", code)]


def test_pairs_of_which_nothing_is_said_are_named(tmp_path: Path) -> None:
    checked = check(write_folder(tmp_path / "set", {**pair_files(3), "captions.jsonl": lines(P0)}))
    (warning,) = checked.warnings
    assert checked.ok and warning.code == "without_caption" and "2 of 3 pairs" in warning.message


@pytest.mark.parametrize("form", ["folder", "zip"])
def test_an_export_keeps_them(tmp_path: Path, form: ExportFormat) -> None:
    raw = write_folder(tmp_path / "raw", {**pair_files(2), "captions.jsonl": lines(P0, P1)})
    digest = check(raw).digest
    export_pairs(raw, tmp_path / "out", form)
    assert check(tmp_path / "out").digest == digest
    if form == "folder":
        assert read_captions(tmp_path / "out") == read_captions(raw)
