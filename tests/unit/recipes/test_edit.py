"""The edit recipe: parts that the archive takes, pairs read from folders, areas, refusals, cancelling, the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import cffa_core
from cffa_core.data.phantom import make_phantom, write_phantoms
from cffa_core.errors import Cancelled, InvalidDataset, InvalidSpec
from cffa_core.jobs.context import FolderContext
from cffa_core.jobs.edit_spec import EditSettings, EditSpec
from cffa_core.recipes.archive import verify_archive, write_part_archive
from cffa_core.recipes.edit import SourcePair, edit_part, load_editor, read_areas, read_sources
from services.client.cli import app

SIDE = 64


def settings(**fields: Any) -> EditSettings:
    given = {"count": 2, "edits": [{"text": "blood"}], "resolution": SIDE, "steps": 3, "skip": 0.0, **fields}
    return EditSettings.model_validate(given)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    write_phantoms(folder, 2, 7, SIDE)
    return folder


def test_a_part_is_archived_with_masks_and_sheets(base_folder: Path, pairs: Path, tmp_path: Path) -> None:
    asked = settings()
    seen: list[tuple[str, int, int]] = []
    context = FolderContext(tmp_path, lambda *progress: seen.append(progress))
    editor = load_editor(asked, None, base_folder)
    edit_part(editor, asked, list(read_sources(pairs, SIDE)), tmp_path / "part", context)

    assert seen[0] == ("editing", 1, 12)  # two pairs, three steps there and three back
    assert seen[-1] == ("editing", 12, 12)
    part = json.loads((tmp_path / "part" / "part.json").read_text())
    assert [(pair["index"], pair["source"], pair["try"]) for pair in part["pairs"]] == [
        (0, "p00000", 0),
        (1, "p00001", 0),
    ]
    assert part["exhausted"] == []
    for pair in part["pairs"]:
        assert pair["alignment_before"].keys() == pair["alignment"].keys()
        with Image.open(tmp_path / "part" / pair["mask"]["name"]) as picture:
            mask = np.asarray(picture)
        assert mask.shape == (SIDE, SIDE)
        assert round(float((mask > 0).mean()), 4) == pytest.approx(pair["mask_share"], abs=0.02)
        with Image.open(tmp_path / "part" / pair["sheet"]["name"]) as picture:
            assert picture.width > 3 * 200
    with Image.open(tmp_path / "part" / "cf" / "000001.png") as picture:
        picture.load()
        marks = picture.info
    assert (marks["Synthetic Data"], marks["Edit"]) == ("YES", "add blood")

    write_part_archive(tmp_path / "part", tmp_path / "pairs.zip", {})
    listed = verify_archive(tmp_path / "pairs.zip")["pairs"]
    assert {"cf", "fa", "mask", "sheet"} <= listed[0].keys()


def test_a_pair_does_not_depend_on_its_part(base_folder: Path, pairs: Path, tmp_path: Path) -> None:
    asked = settings()
    editor, sources = load_editor(asked, None, base_folder), list(read_sources(pairs, SIDE))
    edit_part(editor, asked, sources, tmp_path / "both", FolderContext(tmp_path))
    edit_part(load_editor(asked, None, base_folder), asked, sources[1:], tmp_path / "one", FolderContext(tmp_path))
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.png"))
    assert [str(file) for file in files] == [f"{kind}/000001.png" for kind in ("cf", "fa", "mask", "sheet")]
    assert all((tmp_path / "one" / file).read_bytes() == (tmp_path / "both" / file).read_bytes() for file in files)


def test_a_cancelled_edit_stops_at_its_step(base_folder: Path, pairs: Path, tmp_path: Path) -> None:
    def cancel(stage: str, done: int, total: int) -> None:
        if done == 2:
            raise Cancelled("the job is being cancelled")

    asked = settings()
    with pytest.raises(Cancelled):
        edit_part(
            load_editor(asked, None, base_folder),
            asked,
            list(read_sources(pairs, SIDE)),
            tmp_path / "part",
            FolderContext(tmp_path, cancel),
        )
    assert not (tmp_path / "part" / "part.json").exists()


def test_a_pair_without_its_partner_is_refused_before_anything_is_edited(base_folder: Path, tmp_path: Path) -> None:
    eye = make_phantom(1, SIDE)
    asked = settings()
    whole, half = SourcePair(0, "a", eye.cf, eye.fa), SourcePair(1, "b", eye.cf, None)  # type: ignore[arg-type]
    with pytest.raises(InvalidDataset, match="the pair has no FA"):
        edit_part(load_editor(asked, None, base_folder), asked, [whole, half], tmp_path / "x", FolderContext(tmp_path))
    assert not (tmp_path / "x").exists()
    write_phantoms(tmp_path / "half", 1, 7, SIDE)
    (tmp_path / "half" / "fa" / "p00000.png").unlink()
    with pytest.raises(InvalidDataset):
        list(read_sources(tmp_path / "half", SIDE))


def test_settings_of_another_edit_are_refused(base_folder: Path, tmp_path: Path) -> None:
    editor = load_editor(settings(), None, base_folder)
    with pytest.raises(InvalidSpec, match="load it again"):
        edit_part(editor, settings(seed=1), [], tmp_path, FolderContext(tmp_path))


def test_pairs_are_read_at_the_resolution_of_the_edit_by_name(pairs: Path) -> None:
    (source,) = read_sources(pairs, 128, names=["p00001"])
    assert (source.index, source.name, source.cf.shape, source.fa.shape) == (0, "p00001", (128, 128, 3), (128, 128))
    with pytest.raises(InvalidDataset, match="no pairs p00009"):
        list(read_sources(pairs, 128, names=["p00001", "p00009"]))


def test_areas_are_resized_with_their_pairs_or_refused(pairs: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidDataset, match="white on black"):
        read_areas(tmp_path)
    drawn = np.zeros((SIDE, SIDE), np.uint8)
    drawn[16:32, 8:24] = 255
    cv2.imwrite(str(tmp_path / "p00001.png"), drawn)
    first, second = read_sources(pairs, 2 * SIDE, areas=read_areas(tmp_path))
    assert first.where is None
    assert second.where is not None
    rows, columns = np.nonzero(second.where)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (32, 63, 16, 47)
    for bad, code in ((np.zeros((SIDE, SIDE), np.uint8), "mask_empty"), (drawn[:32], "mask_size")):
        cv2.imwrite(str(tmp_path / "p00001.png"), bad)
        with pytest.raises(InvalidDataset) as refused:
            list(read_sources(pairs, SIDE, areas=read_areas(tmp_path)))
        assert refused.value.problems[0].code == code
    (tmp_path / "p00001.png").write_bytes(b"no picture")
    with pytest.raises(InvalidDataset, match="no picture"):
        list(read_sources(pairs, SIDE, areas=read_areas(tmp_path)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"against": "source"}, "give both"),
        ({"cf_sentence": "no place"}, "pattern"),
        ({"edits": [{"text": "x", "warmup": 3}]}, "there are 3 after"),
        ({"steps": 1000}, "less than or equal to 499"),
    ],
)
def test_settings_that_cannot_be(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(**fields)


def test_a_job_s_settings_are_those_of_its_recipe() -> None:
    spec = EditSpec.model_validate({"dataset_id": "ds_" + "0" * 20, "count": 3, "cf_sentence": "eye with {}"})
    assert spec.settings().cf_sentence == "eye with {}"


def test_the_command_edits_a_folder(base_folder: Path, pairs: Path, tmp_path: Path) -> None:
    asked = ["edit", str(pairs), "--add", "blood", "--remove", "vessels", "--base", str(base_folder)]
    small = ["--resolution", str(SIDE), "--steps", "2", "--skip", "0", "--strength", "3", "--device", "cpu"]
    done = CliRunner().invoke(app, [*asked, *small, "--name", "p00001", "--out", str(tmp_path / "new")])
    assert done.exit_code == 0, done.output
    described = json.loads((tmp_path / "new" / "pairs.json").read_text())
    assert [(term["text"], term["direction"], term["strength"]) for term in described["edit"]["edits"]] == [
        ("blood", "add", 3.0),
        ("vessels", "remove", 3.0),
    ]
    assert [pair["source"] for pair in described["pairs"]] == ["p00001"]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["cf", "fa", "mask", "pairs.json", "sheet"]


def test_the_library_edits_as_the_recipe_does(base_folder: Path, pairs: Path, tmp_path: Path) -> None:
    loaded = cffa_core.load_pairs(pairs, SIDE)
    given = settings().model_dump(include={"edits", "steps", "skip"})
    entries = cffa_core.edit(cffa_core.load_base(base_folder, device="cpu"), loaded, tmp_path / "new", **given)
    edit_part(
        load_editor(settings(), None, base_folder),
        settings(),
        list(read_sources(pairs, SIDE)),
        tmp_path / "part",
        FolderContext(tmp_path),
    )
    assert [entry["source"] for entry in entries] == ["p00000", "p00001"]
    for entry in entries:
        name = entry["cf"]["name"]
        assert (tmp_path / "new" / name).read_bytes() == (tmp_path / "part" / name).read_bytes()
