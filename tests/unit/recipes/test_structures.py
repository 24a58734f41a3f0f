"""Structures of a generation: whose they are, that they depend on nothing but their index, and who may have them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cffa_core.data import vessel_map
from cffa_core.data.pairs import PairSet, load_pairs
from cffa_core.data.phantom import make_phantom, write_phantoms
from cffa_core.errors import InvalidDataset, InvalidSpec
from cffa_core.jobs.context import FolderContext
from cffa_core.jobs.spec import ControlNetSpec, GenerateSettings, LoraSpec, SamplerSpec, TrainSettings
from cffa_core.methods.controlnet import ControlNet
from cffa_core.methods.dual_unet import DualUnet
from cffa_core.models.base import Base
from cffa_core.recipes.generate import generate_part, load_sampler
from cffa_core.recipes.structures import structures_for
from tests.pair_folder import write_pair_folder


def settings_of(**options: Any) -> GenerateSettings:
    defaults: dict[str, Any] = {"count": 5, "part_size": 3, "batch_size": 2, "resolution": 64, "seed": 3}
    return GenerateSettings(**(defaults | {"sampler": SamplerSpec(steps=2), "structures": "procedural"} | options))


def model_of(base: Base, **controlnet: Any) -> ControlNet:
    settings = TrainSettings(method="controlnet", lora=LoraSpec(rank=2), controlnet=ControlNetSpec(**controlnet))
    model = ControlNet(base, settings, noise_rotation=-np.eye(4))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _, parameter in model.named_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


@pytest.fixture(scope="module")
def model(base: Base) -> ControlNet:
    return model_of(base)


@pytest.fixture(scope="module")
def model_folder(model: ControlNet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "model"
    model.save(folder, dataset_digest="d", validation=None)
    return folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pair_folder(tmp_path_factory.mktemp("pairs") / "set", n=3)


def test_procedural_eyes_have_exact_vessels_and_their_own_tiles(model: ControlNet) -> None:
    found = structures_for(settings_of(), model)
    assert found is not None
    structure = found.of(4)
    eye = make_phantom(structure.source["procedural_seed"], 64)
    assert np.array_equal(structure.images["vessels"][0].numpy(), vessel_map.scribble(eye.masks["vessel"]))
    assert np.array_equal(structure.images["tile_cf"].permute(1, 2, 0).numpy(), vessel_map.tile(eye.cf, 32))
    assert np.array_equal(structure.images["tile_fa"][0].numpy(), vessel_map.tile(eye.fa, 32))
    other = structures_for(settings_of(seed=4), model)
    assert other is not None
    seeds = {source.of(i).source["procedural_seed"] for source in (found, other) for i in range(3)}
    assert len(seeds) == 6
    assert found.of(4).source == structure.source


def test_pairs_of_a_data_set_come_round_again(model: ControlNet, pairs: Path) -> None:
    found = structures_for(settings_of(structures="dataset"), model, pairs)
    assert found is not None
    assert [found.of(i).source["pair"] for i in range(5)] == ["pair000", "pair001", "pair002", "pair000", "pair001"]
    loaded = load_pairs(pairs, 64)
    images, own = found.of(4).images, model.structure(loaded[1])
    assert list(images) == list(own) and all(torch.equal(images[name], own[name]) for name in own)
    given = structures_for(settings_of(structures="dataset"), model, loaded)
    assert given is not None and torch.equal(given.of(4).images["vessels"], found.of(4).images["vessels"])


def test_a_model_trained_on_masks_draws_on_masks(base: Base, pairs: Path, tmp_path: Path) -> None:
    model = model_of(base, vessels="masks")
    bare = structures_for(settings_of(structures="dataset"), model, pairs)
    assert bare is not None
    with pytest.raises(InvalidDataset, match=r"pair000.*has no vessel mask"):
        bare.of(0)
    write_phantoms(tmp_path / "set", 2, seed=1, resolution=64, processes=1)
    found = structures_for(settings_of(structures="dataset"), model, tmp_path / "set")
    assert found is not None
    mask = load_pairs(tmp_path / "set", 64)[0].masks["vessel"].numpy()
    assert np.array_equal(found.of(0).images["vessels"][0].numpy(), vessel_map.scribble(mask))


@pytest.mark.parametrize("structures", ["procedural", "dataset"])
def test_a_pair_is_the_same_in_any_grid(
    base: Base, model_folder: Path, pairs: Path, tmp_path: Path, structures: Any
) -> None:
    """Pair 4 in the second part; alone in a part of its own; among others in one large part."""
    entries = []
    for number, (part, changes) in enumerate(
        ((1, {}), (4, {"part_size": 1, "count": 9}), (0, {"part_size": 8, "count": 6}))
    ):
        settings = settings_of(structures=structures, **changes)
        sampler = load_sampler(settings, model_folder, base.folder)
        shown = structures_for(settings, sampler.model, pairs if structures == "dataset" else None)
        context = FolderContext(tmp_path / f"context{number}")
        found = generate_part(sampler, settings, part, tmp_path / f"part{number}", context, shown)
        entries.append(next(pair for pair in found["pairs"] if pair["index"] == 4))
    assert entries[0] == entries[1] == entries[2]
    assert set(entries[0]["structure"]) == {"pair" if structures == "dataset" else "procedural_seed"}


def test_what_does_not_fit_is_refused(base: Base, model: ControlNet, model_folder: Path, tmp_path: Path) -> None:
    plain = DualUnet(base, TrainSettings(lora=LoraSpec(rank=2)))
    plain.save(tmp_path / "plain", dataset_digest="d", validation=None)
    asked, unasked = settings_of(), settings_of(structures=None)
    for settings, folder in ((unasked, model_folder), (asked, tmp_path / "plain")):
        with pytest.raises(InvalidSpec, match="structures") as caught:
            load_sampler(settings, folder, base.folder)
        assert [problem.pointer for problem in caught.value.problems] == ["/structures"]
    assert structures_for(unasked, plain) is None
    on_dataset = settings_of(structures="dataset")
    with pytest.raises(InvalidSpec, match="needs the data set"):
        structures_for(on_dataset, model)
    with pytest.raises(InvalidSpec, match="loaded at 64 pixels"):
        structures_for(on_dataset, model, PairSet([], "d"))
