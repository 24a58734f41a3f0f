"""The three layouts in which teams keep pairs, as folder and as zip, and which pairs belong to one eye."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from cffa_core.data.ingest import Checked, Limits, check, write
from cffa_core.errors import InvalidDataset, NotFound
from tests.raw_pairs import draw_pair, encode, pair_files, write_folder, write_zip


def codes(checked: Checked) -> list[tuple[str, str]]:
    return [(problem.pointer, problem.code) for problem in checked.problems]


def as_cases(files: dict[str, bytes]) -> dict[str, bytes]:
    """The same pairs as a folder per case."""
    which = {"cf": "01", "fa": "02"}
    cases = {}
    for name, data in files.items():
        modality, file = name.split("/")
        stem = file.removesuffix(".png")
        cases[f"{stem}/{stem}_{which[modality]}.png"] = data
    return cases


def as_csv(files: dict[str, bytes]) -> dict[str, bytes]:
    """The same pairs as a CSV of paths."""
    names = sorted({name.split("/")[1] for name in files})
    rows = ["cf_path,fa_path", *(f"cf/{name},fa/{name}" for name in names)]
    return {**files, "pairs.csv": "\n".join(rows).encode()}


@pytest.mark.parametrize("packed", [False, True], ids=["folder", "zip"])
@pytest.mark.parametrize("wrapper", ["", "study/"], ids=["flat", "wrapped"])
def test_every_layout_gives_the_same_data_set(tmp_path: Path, wrapper: str, packed: bool) -> None:
    plain = pair_files()
    digests = set()
    for layout, files in (("folders", plain), ("cases", as_cases(plain)), ("csv", as_csv(plain))):
        named = {f"{wrapper}{name}": data for name, data in files.items()}
        if packed:
            named |= {"__MACOSX/._p0.png": b"resource fork", f"{wrapper}.DS_Store": b"finder"}
        make = write_zip if packed else write_folder
        checked = check(make(tmp_path / layout, named))
        assert checked.layout == layout
        assert checked.problems == ()
        assert checked.warnings == ()
        assert [pair.name for pair in checked.pairs] == ["p0", "p1", "p2"]
        digests.add(checked.digest)
    assert len(digests) == 1


def test_digest_follows_pixels_names_and_eyes(tmp_path: Path) -> None:
    files = pair_files()
    pixels = draw_pair(0)[0]
    pixels[40, 40, 0] ^= 1
    variants = {
        "same": files,
        "pixel": {**files, "cf/p0.png": encode(pixels)},
        "name": {name.replace("p0", "q0"): data for name, data in files.items()},
        "eye": {**files, "eyes.csv": b"name,eye\np0,left\np1,left\n"},
    }
    digests = [check(write_folder(tmp_path / key, variant)).digest for key, variant in variants.items()]
    assert len(set(digests)) == len(variants)
    assert check(write_zip(tmp_path / "same.zip", files)).digest == digests[0]


def test_extra_files_of_the_layout_are_tolerated_and_others_reported(tmp_path: Path) -> None:
    extra = {
        "masks/My sketch/p0.png": b"not looked at",
        "captions.jsonl": b"\n",
        "manifest.json": b"{}",
        "readme.md": b"about",
        "cf/notes.txt": b"a note",
    }
    checked = check(write_folder(tmp_path / "set", {**pair_files(), **extra}))
    assert checked.ok
    assert [(w.pointer, w.code) for w in checked.warnings] == [("cf/notes.txt", "ignored"), ("readme.md", "ignored")]


def test_endings_may_differ(tmp_path: Path) -> None:
    files = {}
    for index, kind in enumerate(("JPEG", "TIFF")):
        cf, fa = draw_pair(index)
        files[f"cf/p{index}.img"] = encode(cf, kind)
        files[f"fa/p{index}.{kind.lower()}"] = encode(fa, kind)
    assert check(write_folder(tmp_path / "set", files)).ok


def test_eyes_come_from_the_file_then_the_pattern_then_the_name(tmp_path: Path) -> None:
    files = {}
    for index, name in enumerate(("a1-0", "a1-1", "m032", "m034", "m043")):
        cf, fa = draw_pair(index)
        files |= {f"cf/{name}.png": encode(cf), f"fa/{name}.png": encode(fa)}
    folder = write_folder(tmp_path / "set", files)
    assert [pair.eye for pair in check(folder).pairs] == ["a1-0", "a1-1", "m032", "m034", "m043"]
    checked = check(folder, eye_pattern=r"^(a\d)-|^(m03)[248]$")
    assert [pair.eye for pair in checked.pairs] == ["a1", "a1", "m03", "m03", "m043"]
    assert checked.eyes == 3
    (folder / "eyes.csv").write_text("name,eye\na1-0.png,left\nm043,left\n")
    checked = check(folder, eye_pattern=r"^(a\d)-")
    assert [pair.eye for pair in checked.pairs] == ["left", "a1", "m032", "m034", "left"]


@pytest.mark.parametrize("pattern", ["(", "(a+)+$|(p|p)+x"])
def test_an_eye_pattern_that_cannot_serve_is_a_problem(tmp_path: Path, pattern: str) -> None:
    folder = write_folder(tmp_path / "set", pair_files())
    checked = check(folder, eye_pattern=pattern)
    assert ("/eye_pattern" in dict(codes(checked))) == (pattern == "(")


def test_an_eye_pattern_that_takes_forever_is_stopped(tmp_path: Path) -> None:
    cf, fa = draw_pair(0)
    name = "a" * 40
    files = {**pair_files(2), f"cf/{name}.png": encode(cf), f"fa/{name}.png": encode(fa)}
    checked = check(write_folder(tmp_path / "set", files), Limits(decode_seconds=1), eye_pattern="(a+)+b")
    assert codes(checked) == [("/eye_pattern", "bad_eye_pattern")]


def test_csv_problems_name_the_row(tmp_path: Path) -> None:
    rows = ["cf_path,fa_path", "cf/p0.png,fa/p0.png", "cf/gone.png,fa/p1.png", "../cf/p1.png,fa/p1.png", "cf/p2.png,"]
    files = {**pair_files(), "pairs.csv": "\n".join(rows).encode()}
    assert codes(check(write_folder(tmp_path / "set", files))) == [
        ("pairs.csv:3", "bad_csv"),
        ("pairs.csv:4", "unsafe_name"),
        ("pairs.csv:5", "bad_csv"),
    ]


def test_csv_header_without_fa_is_a_problem(tmp_path: Path) -> None:
    files = {**pair_files(), "pairs.csv": b"cf_path,other\ncf/p0.png,fa/p0.png\n"}
    assert ("pairs.csv", "bad_csv") in codes(check(write_folder(tmp_path / "set", files)))


def test_csv_may_name_pairs_and_eyes_and_use_semicolons(tmp_path: Path) -> None:
    rows = "cf_path;fa_path;name;eye\ncf/p0.png;fa/p0.png;one;left\ncf/p1.png;fa/p1.png;two;left\n"
    checked = check(write_folder(tmp_path / "set", {**pair_files(2), "list.csv": rows.encode()}))
    assert [(pair.name, pair.eye) for pair in checked.pairs] == [("one", "left"), ("two", "left")]


def test_one_cf_with_two_phases_is_one_eye(tmp_path: Path) -> None:
    rows = "cf_path,fa_path\ncf/p0.png,fa/p0.png\ncf/p0.png,fa/p1.png\ncf/p2.png,fa/p2.png\n"
    files = {name: data for name, data in pair_files(3).items() if name != "cf/p1.png"}
    checked = check(write_folder(tmp_path / "set", {**files, "list.csv": rows.encode()}))
    assert checked.ok
    assert checked.eyes == 2
    assert len({pair.name for pair in checked.pairs}) == 3
    again = {**files, "list.csv": rows.replace("fa/p1", "fa/p0").encode()}
    assert codes(check(write_folder(tmp_path / "again", again)))[0] == ("list.csv:3", "duplicate_name")


def test_names_that_differ_in_case_only_stay_apart(tmp_path: Path) -> None:
    rows = "cf_path,fa_path,name\ncf/p0.png,fa/p0.png,Eye\ncf/p1.png,fa/p1.png,eye\n"
    checked = check(write_folder(tmp_path / "set", {**pair_files(2), "list.csv": rows.encode()}))
    assert len({pair.name.casefold() for pair in checked.pairs}) == 2


def test_names_become_safe_and_stay_apart(tmp_path: Path) -> None:
    files = {}
    for index, name in enumerate(("fall 1", "fall_1", "Müller")):
        cf, fa = draw_pair(index)
        files |= {f"cf/{name}.png": encode(cf), f"fa/{name}.png": encode(fa)}
    checked = check(write_folder(tmp_path / "set", files))
    names = [pair.name for pair in checked.pairs]
    assert len(set(names)) == 3
    assert "fall_1" in names
    assert all(name.isascii() and " " not in name for name in names)


def test_write_is_lossless_and_says_what_it_wrote(tmp_path: Path) -> None:
    checked = check(write_zip(tmp_path / "set.zip", pair_files(2)))
    index = write(checked, tmp_path / "out")
    assert index["format"] == "cffa-dataset/1"
    assert index["digest"] == checked.digest
    first = index["pairs"][0]
    assert first == {
        "name": "p0",
        "eye": "p0",
        "cf": "cf/p0.png",
        "fa": "fa/p0.png",
        "valid_cf": "valid_cf/p0.png",
        "valid_fa": "valid_fa/p0.png",
        "width": 96,
        "height": 96,
        "registration": "given",
        "residual_px": None,
    }
    cf, fa = draw_pair(0)
    written = cv2.imread(str(tmp_path / "out" / first["cf"]), cv2.IMREAD_COLOR)
    np.testing.assert_array_equal(written[..., ::-1], cf)
    np.testing.assert_array_equal(cv2.imread(str(tmp_path / "out" / first["fa"]), cv2.IMREAD_UNCHANGED), fa)
    assert set(np.unique(cv2.imread(str(tmp_path / "out" / first["valid_fa"]), cv2.IMREAD_UNCHANGED))) <= {0, 255}


def test_large_sets_are_decoded_again_and_a_changed_source_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cffa_core.data.ingest.KEPT_BYTES", 0)
    folder = write_folder(tmp_path / "set", pair_files(2))
    checked = check(folder)
    assert write(checked, tmp_path / "out")["digest"] == checked.digest
    (folder / "cf" / "p1.png").write_bytes(encode(draw_pair(9)[0]))
    with pytest.raises(InvalidDataset, match="changed"):
        write(checked, tmp_path / "late")
    assert not (tmp_path / "late" / "dataset.json").exists()


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        check(tmp_path / "absent")
