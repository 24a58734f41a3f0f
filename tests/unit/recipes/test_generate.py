"""The generation recipe: files and their description, and that a pair does not depend on the grid."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cffa_core.errors import Cancelled, InvalidSpec, ModelUnavailable
from cffa_core.jobs.context import FolderContext
from cffa_core.jobs.spec import GenerateSettings, LoraSpec, SamplerSpec, TrainSettings
from cffa_core.methods.dual_unet import DualUnet
from cffa_core.models.base import Base
from cffa_core.models.checkpoint import folder_digest
from cffa_core.recipes.generate import generate_part, load_sampler
from cffa_core.rng import pair_seed


@pytest.fixture(scope="module")
def model(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "model"
    trained = DualUnet(base, TrainSettings(lora=LoraSpec(rank=2)), noise_rotation=-np.eye(4))
    trained.save(folder, dataset_digest="d", validation=None)
    return folder


def settings_of(**options: Any) -> GenerateSettings:
    defaults: dict[str, Any] = {"count": 7, "part_size": 4, "batch_size": 3, "resolution": 64, "seed": 3}
    return GenerateSettings(**(defaults | {"sampler": SamplerSpec(steps=2)} | options))


def generate(base: Base, model: Path, out: Path, part: int, **options: Any) -> dict[str, Any]:
    settings = settings_of(**options)
    sampler = load_sampler(settings, model, base.folder)
    return generate_part(sampler, settings, part, out, FolderContext(out / "context"))


def test_a_part_holds_its_pairs_and_describes_them(base: Base, model: Path, tmp_path: Path) -> None:
    found = generate(base, model, tmp_path, part=1)
    assert json.loads((tmp_path / "part.json").read_text()) == found
    assert [pair["index"] for pair in found["pairs"]] == [4, 5, 6]
    for pair in found["pairs"]:
        assert set(pair) == {"index", "seed", "try", "alignment", "novelty", "cf", "fa", "fa_chroma"}
        assert (pair["try"], pair["novelty"]) == (0, None)
        assert pair["seed"] == pair_seed(3, pair["index"])
        for m, mode in (("cf", "RGB"), ("fa", "L")):
            content = (tmp_path / pair[m]["name"]).read_bytes()
            assert pair[m] == {
                "name": f"{m}/{pair['index']:06d}.png",
                "size": len(content),
                "sha256": hashlib.sha256(content).hexdigest(),
            }
            with Image.open(tmp_path / pair[m]["name"]) as image:
                assert (image.size, image.mode) == ((64, 64), mode)
                assert image.text == {
                    "Software": "CFFA",
                    "Synthetic Data": "YES",
                    "Modality": m.upper(),
                    "Index": str(pair["index"]),
                    "Seed": str(pair["seed"]),
                    "Model digest": folder_digest(model),
                }
    assert len(list(tmp_path.glob("cf/*"))) == len(list(tmp_path.glob("fa/*"))) == 3


def test_a_pair_is_the_same_in_any_grid(base: Base, model: Path, tmp_path: Path) -> None:
    """Pair 5 among others, in another part, at another place of the batch, and after a larger count."""
    one = generate(base, model, tmp_path / "a", part=1)["pairs"][1]
    two = generate(base, model, tmp_path / "b", part=0, count=6, part_size=32)["pairs"][5]
    three = generate(base, model, tmp_path / "c", part=5, count=999, part_size=1)["pairs"][0]
    assert one == two == three and one["index"] == 5


def test_one_sampler_serves_all_parts_in_any_order(base: Base, model: Path, tmp_path: Path) -> None:
    settings = settings_of()
    sampler = load_sampler(settings, model, base.folder)
    context = FolderContext(tmp_path)
    backwards = [generate_part(sampler, settings, part, tmp_path / str(part), context) for part in (1, 0)]
    assert backwards[1] == generate(base, model, tmp_path / "fresh", part=0)


def test_progress_moves_every_step_and_can_stop_the_part(base: Base, model: Path, tmp_path: Path) -> None:
    settings = settings_of()
    sampler = load_sampler(settings, model, base.folder)
    seen: list[tuple[str, int, int]] = []
    generate_part(sampler, settings, 0, tmp_path, FolderContext(tmp_path, lambda *values: seen.append(values)))
    assert seen == [("sampling", done, 4) for done in (1, 2, 3, 4)]

    def stop(stage: str, current: int, total: int) -> None:
        raise Cancelled("stopped")

    with pytest.raises(Cancelled):
        generate_part(sampler, settings, 0, tmp_path / "stopped", FolderContext(tmp_path, stop))
    assert not (tmp_path / "stopped" / "part.json").exists()


def test_a_model_of_one_modality_makes_no_pairs(base: Base, tmp_path: Path) -> None:
    DualUnet(base, TrainSettings(modalities=("cf",), lora=LoraSpec(rank=2))).save(
        tmp_path / "model", dataset_digest="d", validation=None
    )
    with pytest.raises(ModelUnavailable, match="trained on cf alone"):
        load_sampler(settings_of(), tmp_path / "model", base.folder)


def test_what_the_base_cannot_take_is_refused_before_sampling(base: Base, model: Path) -> None:
    with pytest.raises(InvalidSpec, match="tokens"):
        load_sampler(settings_of(sampler=SamplerSpec(cf_prompt="x" * 200)), model, base.folder)
    with pytest.raises(ModelUnavailable, match="no base model folder"):
        load_sampler(settings_of(), model, Path("/no/such/base"))


def test_default_prompts_stand_for_those_of_the_training(base: Base, tmp_path: Path) -> None:
    settings = TrainSettings(lora=LoraSpec(rank=2), cf_prompt="a fundus", fa_prompt="an angiogram")
    DualUnet(base, settings).save(tmp_path / "model", dataset_digest="d", validation=None)
    sampler = load_sampler(settings_of(), tmp_path / "model", base.folder).sampler
    assert (sampler.cf_prompt, sampler.fa_prompt) == ("a fundus", "an angiogram")
    asked = settings_of(sampler=SamplerSpec(steps=2, fa_prompt="late phase"))
    sampler = load_sampler(asked, tmp_path / "model", base.folder).sampler
    assert (sampler.cf_prompt, sampler.fa_prompt) == ("a fundus", "late phase")
