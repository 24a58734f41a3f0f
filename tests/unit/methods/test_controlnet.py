"""`controlnet`: it starts as the base, trains ControlNets and LoRAs together, and draws on the given structure."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cffa_core import rng
from cffa_core.data.pairs import Pair, load_pairs, turn
from cffa_core.errors import CorruptArtifact, InvalidDataset, InvalidSpec, ModelUnavailable
from cffa_core.jobs.spec import ON_STRUCTURES, ControlNetSpec, LoraSpec, Method, SamplerSpec, TrainSettings
from cffa_core.methods.controlnet import ControlNet
from cffa_core.methods.dual_unet import DualUnet
from cffa_core.methods.pair_sampler import PairSampler
from cffa_core.methods.registry import METHODS, load_method
from cffa_core.models.base import Base, load_base
from tests.micro_base import write_micro_base
from tests.pair_folder import write_pair_folder


def settings_of(**options: Any) -> TrainSettings:
    return TrainSettings(**({"method": "controlnet", "lora": LoraSpec(rank=2), "resolution": 64} | options))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> list[Pair]:
    return list(load_pairs(write_pair_folder(tmp_path_factory.mktemp("pairs") / "set", n=3), 64))


def randomised(model: ControlNet, size: float = 0.1) -> ControlNet:
    """The model with every trained weight moved, as after training."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _, parameter in model.named_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * size)
    return model


@pytest.fixture(scope="module")
def trained(base: Base) -> ControlNet:
    return randomised(ControlNet(base, settings_of(), noise_rotation=-np.eye(4)))


def batch_of(model: ControlNet, pairs: list[Pair]) -> dict[str, torch.Tensor]:
    """Control images ``(B, 3, H, W)`` by name."""
    shown = [model.structure(pair) for pair in pairs]
    return {name: torch.stack([images[name] for images in shown]) for name in shown[0]}


def step_of(model: ControlNet, pairs: list[Pair]) -> torch.Tensor:
    """The loss of one training step."""
    generator = torch.Generator().manual_seed(4)
    x0 = {m: torch.randn(len(pairs), 4, 8, 8, generator=generator) for m in ("cf", "fa")}
    valid = {m: torch.ones(len(pairs), 1, 8, 8, dtype=torch.bool) for m in ("cf", "fa")}
    text = {m: model.base.encode_prompts([m]) for m in ("cf", "fa")}
    return model.training_loss(x0, valid, text, rng.generator(1), batch_of(model, pairs))[0]


@torch.no_grad()
def test_at_first_it_is_the_base(base: Base, pairs: list[Pair]) -> None:
    model = ControlNet(base, settings_of())
    x = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    text = base.encode_prompts(["a", "b", "c", "d"])
    t = torch.tensor([10, 300, 600, 990])
    shown = model.control_rows(batch_of(model, pairs[:2]))
    assert shown["vessels"].any() and shown["tile"].any()
    said = model.predict_noise(x, t, text, ["cf", "cf", "fa", "fa"], shown)
    assert torch.equal(said, base.unet(x, t, text).sample)


def test_the_weights_come_from_the_seed_alone(base: Base) -> None:
    torch.manual_seed(1)
    one = dict(ControlNet(base, settings_of(seed=5)).named_parameters())
    before = torch.get_rng_state()
    two = dict(ControlNet(base, settings_of(seed=5)).named_parameters())
    assert torch.equal(torch.get_rng_state(), before)
    other = dict(ControlNet(base, settings_of(seed=6)).named_parameters())
    assert list(one) == list(two) and all(torch.equal(one[name], two[name]) for name in one)
    embedding = "controlnet_{}/controlnet_cond_embedding.conv_in.weight"
    assert not torch.equal(one[embedding.format("vessels")], other[embedding.format("vessels")])
    assert not torch.equal(one[embedding.format("vessels")], one[embedding.format("tile")])


def test_both_controlnets_and_both_loras_learn(base: Base, pairs: list[Pair]) -> None:
    """At first only the zero convolutions and B have a gradient; after one step everything has."""
    model = ControlNet(base, settings_of())
    named = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(named.values(), lr=1e-2)
    kinds = ("cf/", "fa/", "controlnet_vessels/", "controlnet_tile/")
    losses = []
    for _ in range(6):
        loss = step_of(model, pairs)
        loss.backward()
        reached = {kind: {n for n, p in named.items() if n.startswith(kind) and p.grad.any()} for kind in kinds}
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    for kind in kinds:
        assert reached[kind] == {name for name in named if name.startswith(kind)}
    assert losses[-1] < losses[0]
    assert not any(parameter.requires_grad for parameter in base.unet.parameters())


def test_gradient_checkpointing_changes_no_gradient(base: Base, pairs: list[Pair]) -> None:
    def gradients(**options: Any) -> Iterator[torch.Tensor]:
        model = randomised(ControlNet(base, settings_of(**options)))
        step_of(model, pairs).backward()
        assert all(net.is_gradient_checkpointing for net in model.nets.values()) == bool(options)
        return (parameter.grad for _, parameter in model.named_parameters())

    for plain, saved in zip(gradients(), gradients(gradient_checkpointing=True), strict=True):
        torch.testing.assert_close(plain, saved)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_keeps_what_is_trained_in_float32(base_folder: Path, pairs: list[Pair], precision: Any) -> None:
    model = ControlNet(load_base(base_folder, dtype=precision), settings_of(precision=precision))
    optimizer = torch.optim.AdamW([p for _, p in model.named_parameters()], lr=1e-2)
    for _ in range(2):
        step_of(model, pairs[:1]).backward()
        optimizer.step()
    for _, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32 and torch.isfinite(parameter).all()
    sampler = PairSampler(model, SamplerSpec(steps=2), 64, 1)
    (pair,) = sampler.draw([0], [1], None, [model.structure(pairs[0])])
    assert pair.cf is not None and pair.cf.std() > 0


def test_each_row_sees_the_vessels_and_its_own_tile(trained: ControlNet, pairs: list[Pair]) -> None:
    batch = batch_of(trained, pairs[:2])
    shown = trained.control_rows(batch)
    assert torch.equal(shown["vessels"], torch.cat([batch["vessels"], batch["vessels"]]))
    assert torch.equal(shown["tile"], torch.cat([batch["tile_cf"], batch["tile_fa"]]))
    assert all(images.dtype == torch.uint8 and images.shape == (2, 3, 64, 64) for images in batch.values())


def draw(model: ControlNet, structure: dict[str, torch.Tensor], seed: int = 7, **options: Any) -> Any:
    sampler = PairSampler(model, SamplerSpec(**({"steps": 3} | options)), 64, 2)
    return sampler.draw([0], [seed], None, [structure])[0]


@pytest.mark.parametrize("changed", ["vessels", "tile_cf", "tile_fa"])
def test_another_structure_is_another_picture(trained: ControlNet, pairs: list[Pair], changed: str) -> None:
    mine, other = trained.structure(pairs[0]), trained.structure(pairs[1])
    before, after = draw(trained, mine), draw(trained, mine | {changed: other[changed]})
    assert np.array_equal(before.cf, after.cf) == (changed == "tile_fa")
    assert np.array_equal(before.fa, after.fa) == (changed == "tile_cf")


def test_scale_weighs_the_residuals(base: Base, pairs: list[Pair]) -> None:
    """Half of the scale moves the noise prediction about half as far, for a small step away from the base."""
    moved = []
    x, text = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), base.encode_prompts(["a", "b"])
    for scale in (0.01, 0.02):
        model = ControlNet(base, settings_of(controlnet=ControlNetSpec(scale=scale)))
        with torch.no_grad():
            for net in model.nets.values():
                net.controlnet_mid_block.bias.fill_(1.0)
            shown = model.control_rows(batch_of(model, pairs[:1]))
            said = model.predict_noise(x, torch.tensor(500), text, ["cf", "fa"], shown)
            moved.append((said - base.unet(x, 500, text).sample).abs().mean().item())
    assert moved[1] == pytest.approx(2 * moved[0], rel=0.05)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_pair_is_bit_identical_in_any_company(trained: ControlNet, pairs: list[Pair], guidance: float) -> None:
    sampler = PairSampler(trained, SamplerSpec(steps=3, guidance_scale=guidance), 64, 3)
    shown = [trained.structure(pair) for pair in pairs]
    (alone,) = sampler.draw([0], [77], None, shown[:1])
    last = sampler.draw([2, 1, 0], [5, 6, 77], None, shown[::-1])[2]
    assert np.array_equal(alone.cf, last.cf) and np.array_equal(alone.fa, last.fa)


def test_structures_are_needed_and_nowhere_else_taken(base: Base, trained: ControlNet, pairs: list[Pair]) -> None:
    with pytest.raises(InvalidSpec, match="needs the structures"):
        PairSampler(trained, SamplerSpec(steps=1), 64, 1).draw([0], [1])
    plain = PairSampler(DualUnet(base, TrainSettings(lora=LoraSpec(rank=2))), SamplerSpec(steps=1), 64, 1)
    with pytest.raises(InvalidSpec, match="takes no structures") as caught:
        plain.draw([0], [1], None, [trained.structure(pairs[0])])
    assert [problem.pointer for problem in caught.value.problems] == ["/structures"]


def test_the_spec_and_the_methods_agree_on_who_takes_structures() -> None:
    assert {method for method, kind in METHODS.items() if kind.takes_structure} == set(ON_STRUCTURES)


def test_without_the_tile_there_is_one_controlnet(base: Base, pairs: list[Pair], tmp_path: Path) -> None:
    model = randomised(ControlNet(base, settings_of(controlnet=ControlNetSpec(tile=False))))
    assert set(model.structure(pairs[0])) == {"vessels"}
    draw(model, model.structure(pairs[0]))
    card = model.save(tmp_path / "model", dataset_digest="d", validation=None)
    assert set(card["parameters"]) == {"cf", "fa", "controlnet_vessels"}
    assert "controlnet_tile.safetensors" not in card["files"]


def test_vessels_from_masks(base: Base, pairs: list[Pair]) -> None:
    model = ControlNet(base, settings_of(controlnet=ControlNetSpec(vessels="masks")))
    with pytest.raises(InvalidDataset, match=r"add masks/vessel/pair000\.png"):
        model.structure(pairs[0])
    mask = torch.zeros(64, 64, dtype=torch.bool)
    mask[10:20] = True
    marked = Pair(**{**vars(pairs[0]), "masks": {"vessel": mask}})
    shown = model.structure(marked)["vessels"]
    assert shown[:, 15].eq(255).all() and shown[:, 40].eq(0).all()
    assert torch.equal(turn(shown, 1)[0, :, 15], torch.full((64,), 255, dtype=torch.uint8))


def test_saved_and_loaded_it_draws_the_same(trained: ControlNet, pairs: list[Pair], tmp_path: Path) -> None:
    card = trained.save(tmp_path / "model", dataset_digest="d", validation=None)
    assert {"controlnet_vessels.safetensors", "controlnet_tile.safetensors"} <= set(card["files"])
    assert card["method"] == Method.CONTROLNET and card["parameters"]["controlnet_tile"] > 10_000
    again = load_method(tmp_path / "model", trained.base)
    assert isinstance(again, ControlNet)
    shown = trained.structure(pairs[0])
    before, after = draw(trained, shown), draw(again, again.structure(pairs[0]))
    assert np.array_equal(before.cf, after.cf) and np.array_equal(before.fa, after.fa)


def test_weights_that_do_not_fit_are_refused(trained: ControlNet, tmp_path: Path) -> None:
    trained.write_weights(tmp_path)
    path = tmp_path / "controlnet_tile.safetensors"
    weights = load_file(path)
    save_file({name: weight for name, weight in weights.items() if name != "conv_in.bias"}, path)
    with pytest.raises(CorruptArtifact, match=r"controlnet_tile\.safetensors does not fit.*conv_in\.bias"):
        trained.read_weights(tmp_path)
    path.write_bytes(b"no weights")
    with pytest.raises(CorruptArtifact, match="not a readable safetensors file"):
        trained.read_weights(tmp_path)
    path.unlink()
    with pytest.raises(ModelUnavailable, match="has no controlnet_tile"):
        trained.read_weights(tmp_path)


def test_another_architecture_is_refused(trained: ControlNet, tmp_path: Path) -> None:
    trained.save(tmp_path / "model", dataset_digest="d", validation=None)
    other = load_base(write_micro_base(tmp_path / "other", seed=1))
    with pytest.raises(ModelUnavailable, match="trained on base"):
        ControlNet.load(tmp_path / "model", other)
