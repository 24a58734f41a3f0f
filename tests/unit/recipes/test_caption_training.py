"""Training with captions: each pair's own words are its prompt, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from cffa_core.data.captions import Caption, read_captions
from cffa_core.errors import InvalidDataset
from cffa_core.jobs.context import FolderContext
from cffa_core.jobs.spec import LoraSpec, TrainSettings
from cffa_core.methods.dual_unet import DualUnet
from cffa_core.methods.side_by_side import SideBySide
from cffa_core.models.base import Base
from cffa_core.recipes.caption_text import PairText
from cffa_core.recipes.train import run_training
from tests.pair_folder import write_pair_folder


def settings_of(**options: Any) -> TrainSettings:
    defaults = {"resolution": 64, "steps": 2, "lora": LoraSpec(rank=2), "preview_pairs": 0, "holdout": 0.2, "seed": 3}
    return TrainSettings(**(defaults | {"captions": True} | options))


@pytest.fixture
def captioned(tmp_path: Path) -> Path:
    """Five pairs of which all but one have a caption."""
    folder = write_pair_folder(tmp_path / "pairs", n=5)
    names = sorted(path.stem for path in (folder / "cf").iterdir())
    lines = [{"name": name, "cf": f"a photograph, {place} lesions", "fa": None} for place, name in enumerate(names[1:])]
    (folder / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_each_pair_has_its_own_text_or_the_fixed_one(base: Base) -> None:
    settings = settings_of(cf_prompt="fixed cf", fa_prompt="fixed fa")
    captions = {"a": Caption("a", "red", None, ()), "b": Caption("b", "blue", "bright", ())}
    text = PairText(DualUnet(base, settings), settings, captions).of(["b", "a", "unknown"])
    assert torch.equal(text["cf"], torch.cat([base.encode_prompts([said]) for said in ("blue", "red", "fixed cf")]))
    assert torch.equal(text["fa"], base.encode_prompts(["bright", "fixed fa", "fixed fa"]))
    fixed = PairText(DualUnet(base, settings), settings, {}).of(["b", "a"])
    assert torch.equal(fixed["cf"], base.encode_prompts(["fixed cf"]))


def test_the_canvas_has_both_captions(base: Base) -> None:
    settings = settings_of(method="side_by_side", cf_prompt="x", fa_prompt="y")
    model = SideBySide(base, settings)
    text = PairText(model, settings, {"a": Caption("a", "red", "bright", ())}).of(["a"])
    assert torch.equal(text["pair"], base.encode_prompts([model.prompts("red", "bright")["pair"]]))


def test_captions_change_what_is_learnt(captioned: Path, base_folder: Path, tmp_path: Path) -> None:
    def weights(name: str, data: Path, **options: Any) -> bytes:
        out = tmp_path / name
        run_training(settings_of(**options), data, base_folder, out, FolderContext(out / "checkpoints"))
        return (out / "best_checkpoint" / "lora_cf.safetensors").read_bytes()

    own = weights("own", captioned)
    plain = weights("plain", captioned, captions=False)
    assert own != plain
    fixed = TrainSettings().cf_prompt
    said = [{**json.loads(line), "cf": fixed} for line in (captioned / "captions.jsonl").read_text().splitlines()]
    assert set(read_captions(captioned)) == {line["name"] for line in said}
    (captioned / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in said))
    assert weights("same words", captioned) == plain


def test_refuses_a_data_set_without_captions(captioned: Path, base_folder: Path, tmp_path: Path) -> None:
    (captioned / "captions.jsonl").unlink()
    with pytest.raises(InvalidDataset, match="no pair has a caption") as refused:
        run_training(settings_of(), captioned, base_folder, tmp_path / "out", FolderContext(tmp_path / "checkpoints"))
    assert refused.value.problems[0].code == "no_captions"


def test_tokens_and_captions_exclude_each_other() -> None:
    with pytest.raises(ValidationError, match="leave captions out"):
        settings_of(steps=800, tokens={"tokens": [{"name": "disc"}]})
