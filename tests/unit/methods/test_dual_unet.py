"""The dual UNet: how a training step draws, what it trains, and the model folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cffa_core import rng
from cffa_core.diffusion.losses import NoiseSchedule
from cffa_core.errors import CorruptArtifact, ModelUnavailable
from cffa_core.jobs.spec import LoraSpec, LossSpec, TrainSettings
from cffa_core.methods.dual_unet import DualUnet
from cffa_core.methods.method import read_card
from cffa_core.models.base import Base, load_base
from tests.micro_base import write_micro_base


def settings_of(**options: Any) -> TrainSettings:
    return TrainSettings(**({"lora": LoraSpec(rank=4)} | options))


def batch_of(model: DualUnet, size: int = 2) -> tuple[dict[str, torch.Tensor], ...]:
    generator = torch.Generator().manual_seed(4)
    x0 = {m: torch.randn(size, 4, 8, 8, generator=generator) for m in model.modalities}
    valid = {m: torch.ones(size, 1, 8, 8, dtype=torch.bool) for m in model.modalities}
    return x0, valid, {m: model.base.encode_prompts([m]) for m in model.modalities}


def drawn(base: Base, monkeypatch: pytest.MonkeyPatch, size: int = 2, **options: Any) -> tuple[dict[str, Any], ...]:
    """The timesteps and noise of one training step."""
    model = DualUnet(base, settings_of(**options))
    seen: list[Any] = []
    monkeypatch.setattr(model, "loss_at", lambda x0, valid, text, t, noise: seen.extend((t, noise)))
    model.training_loss(*batch_of(model, size), rng.generator(1, "step", 1))
    return tuple(seen)


def test_noise_is_independent_per_modality(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    _, noise = drawn(base, monkeypatch, 64)
    assert abs(np.corrcoef(noise["cf"].flatten(), noise["fa"].flatten())[0, 1]) < 0.05


def test_timesteps_are_independent_or_shared(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    t, _ = drawn(base, monkeypatch, 64)
    assert not torch.equal(t["cf"], t["fa"]) and t["cf"].max() > 900 and t["cf"].min() < 100
    t, _ = drawn(base, monkeypatch, 64, timesteps="shared")
    assert torch.equal(t["cf"], t["fa"])


def test_offset_noise_moves_whole_channels(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean of a channel of 64 cells has variance 1/64, and 0.1^2 more with offset noise."""
    _, plain = drawn(base, monkeypatch, 2000, loss=LossSpec(offset_noise=0.0))
    _, moved = drawn(base, monkeypatch, 2000)
    assert plain["cf"].mean((2, 3)).var().item() == pytest.approx(1 / 64, rel=0.06)
    assert moved["cf"].mean((2, 3)).var().item() == pytest.approx(1 / 64 + 0.01, rel=0.06)


def test_both_branches_go_through_one_forward(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    model = DualUnet(base, settings_of())
    calls: list[int] = []
    forward = model.unet.forward
    monkeypatch.setattr(model.unet, "forward", lambda x, *a, **k: calls.append(len(x)) or forward(x, *a, **k))
    model.training_loss(*batch_of(model, 3), rng.generator(1))
    assert calls == [6]


def test_the_forward_gets_what_the_schedule_says(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """x_t, t and prompt of each row belong together: recomputed with diffusers' add_noise."""
    from diffusers import DDPMScheduler

    model = DualUnet(base, settings_of())
    x0, valid, text = batch_of(model)
    t = {"cf": torch.tensor([10, 900]), "fa": torch.tensor([500, 30])}
    noise = {m: torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(i)) for i, m in enumerate(t)}
    seen: list[Any] = []
    predict = model.predict_noise
    monkeypatch.setattr(model, "predict_noise", lambda *a: seen.extend(a) or predict(*a))
    model.loss_at(x0, valid, text, t, noise)
    reference = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    expected = torch.cat([reference.add_noise(x0[m], noise[m], t[m]) for m in ("cf", "fa")])
    torch.testing.assert_close(seen[0], expected, rtol=1e-3, atol=1e-4)
    assert seen[1].tolist() == [10, 900, 500, 30]
    assert torch.equal(seen[2], torch.cat([text["cf"], text["cf"], text["fa"], text["fa"]]))
    assert list(seen[3]) == ["cf", "cf", "fa", "fa"]


def test_without_the_structure_term_each_loss_trains_its_own_lora(base: Base) -> None:
    model = DualUnet(base, settings_of(loss=LossSpec(struct_lambda=0.0)))
    x0, valid, text = batch_of(model)
    valid["cf"] = torch.zeros_like(valid["cf"])
    loss, _ = model.training_loss(x0, valid, text, rng.generator(1))
    loss.backward()
    assert not any(p.grad is not None and p.grad.any() for _, p in model.lora.named_parameters("cf"))
    assert any(p.grad is not None and p.grad.any() for _, p in model.lora.named_parameters("fa"))


def test_the_structure_term_reaches_both(base: Base) -> None:
    gradients = {}
    for weight in (0.0, 0.3):
        model = DualUnet(base, settings_of(loss=LossSpec(struct_lambda=weight)))
        model.training_loss(*batch_of(model), rng.generator(1))[0].backward()
        gradients[weight] = {
            m: torch.cat([p.grad.flatten() for _, p in model.lora.named_parameters(m)]) for m in ("cf", "fa")
        }
    for m in ("cf", "fa"):
        assert not torch.allclose(gradients[0.0][m], gradients[0.3][m])


def test_a_few_steps_lower_the_loss(base: Base) -> None:
    model = DualUnet(base, settings_of())
    optimizer = torch.optim.AdamW(model.lora.parameters(), lr=1e-2)
    x0, valid, text = batch_of(model)
    losses = []
    for _ in range(15):
        loss, _ = model.training_loss(x0, valid, text, rng.generator("the same draw"))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_the_float32_lora(base_folder: Path, precision: Any) -> None:
    half = load_base(base_folder, dtype=precision)
    model, plain = DualUnet(half, settings_of()), DualUnet(load_base(base_folder), settings_of())
    loss, _ = model.training_loss(*batch_of(model), rng.generator(1))
    reference, _ = plain.training_loss(*batch_of(plain), rng.generator(1))
    loss.backward()
    assert loss.item() == pytest.approx(reference.item(), rel=0.05)
    assert all(p.dtype == torch.float32 and p.grad.dtype == torch.float32 for p in model.lora.parameters())


def test_one_modality_alone(base: Base, tmp_path: Path) -> None:
    model = DualUnet(base, settings_of(modalities=("fa",)))
    loss, terms = model.training_loss(*batch_of(model), rng.generator(1))
    loss.backward()
    assert set(terms) == {"eps_fa", "hf_fa"}
    model.save(tmp_path / "model", dataset_digest="d", validation=None)
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["lora_fa.safetensors", "model.json"]
    assert DualUnet.load(tmp_path / "model", base).modalities == ("fa",)


def test_the_schedule_is_the_base_s(base: Base) -> None:
    assert torch.equal(
        DualUnet(base, settings_of()).schedule.alpha_bar, NoiseSchedule.from_config(base.scheduler_config).alpha_bar
    )


@pytest.fixture
def saved(base: Base, tmp_path: Path) -> Path:
    model = DualUnet(base, settings_of(seed=5), noise_rotation=-np.eye(4), step=12)
    model.band_rotations = np.stack([np.eye(4)] * 3 + [-np.eye(4)] * 3)
    with torch.no_grad():
        for parameter in model.lora.parameters():
            parameter.add_(0.01)
    model.save(tmp_path / "model", dataset_digest="abc", validation={"step": 12, "loss": 0.5})
    return tmp_path / "model"


def test_save_and_load_round_trip(base: Base, saved: Path, tmp_path: Path) -> None:
    card = read_card(saved)
    assert (card["step"], card["dataset_digest"], card["validation"]["loss"]) == (12, "abc", 0.5)
    assert card["base"] == {"name": base.name, "digest": base.digest}
    assert card["settings"] == settings_of(seed=5).model_dump(mode="json")
    model = DualUnet.load(saved, base)
    assert np.array_equal(model.noise_rotation, -np.eye(4))
    assert np.array_equal(model.band_rotations, np.stack([np.eye(4)] * 3 + [-np.eye(4)] * 3))
    model.save(tmp_path / "again", dataset_digest="abc", validation=card["validation"])
    for path in saved.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_another_base_is_refused(saved: Path, tmp_path: Path) -> None:
    other = load_base(write_micro_base(tmp_path / "other", seed=1))
    with pytest.raises(ModelUnavailable, match="trained on base 'micro'"):
        DualUnet.load(saved, other)


def test_damage_is_noticed(base: Base, saved: Path) -> None:
    weights = saved / "lora_fa.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CorruptArtifact, match=r"lora_fa\.safetensors is not the file"):
        DualUnet.load(saved, base)
    weights.unlink()
    with pytest.raises(CorruptArtifact, match=r"lacks lora_fa"):
        DualUnet.load(saved, base)


def test_what_is_no_model_folder(base: Base, saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailable, match="it has no model"):
        DualUnet.load(tmp_path, base)
    other = shutil.copytree(saved, tmp_path / "other")
    (other / "model.json").write_text(json.dumps({"format": "something/9"}))
    with pytest.raises(ModelUnavailable, match="is not a cffa-model/1"):
        DualUnet.load(other, base)
    (other / "model.json").write_text("{")
    with pytest.raises(CorruptArtifact, match="not JSON"):
        DualUnet.load(other, base)
