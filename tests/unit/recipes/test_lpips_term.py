"""Training with the LPIPS term on: which weights it reaches, what a run records, and that resuming changes no byte."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.numpy import save_file

from cffa_core import library, rng
from cffa_core.diffusion.perceptual import Lpips
from cffa_core.errors import Cancelled, Conflict, ModelUnavailable
from cffa_core.jobs.context import FolderContext
from cffa_core.jobs.spec import LoraSpec, LossSpec, TrainSettings
from cffa_core.methods.dual_unet import DualUnet
from cffa_core.methods.method import read_card
from cffa_core.models.base import Base
from cffa_core.recipes.train import run_training
from tests.lpips_weights import random_lpips_tensors, write_lpips_weights
from tests.pair_folder import write_pair_folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lpips_weights(tmp_path_factory.mktemp("lpips") / "weights.safetensors")


@pytest.fixture(scope="module")
def lpips(weights: Path) -> Lpips:
    return Lpips.load(weights)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pair_folder(tmp_path_factory.mktemp("data") / "pairs", n=4)


def settings_of(lpips_lambda: float, **loss: Any) -> TrainSettings:
    return TrainSettings(
        resolution=64,
        steps=2,
        learning_rate=1e-3,
        lora=LoraSpec(rank=2),
        loss=LossSpec(lpips_lambda=lpips_lambda, **loss),
        holdout=0.2,
        validate_every=2,
        checkpoint_every=1,
        preview_pairs=0,
        seed=7,
    )


def loss_of(
    base: Base, lpips_lambda: float, lpips: Lpips | None, unseen: str = ""
) -> tuple[DualUnet, torch.Tensor, dict[str, torch.Tensor]]:
    """One step's loss, without the structure term, which couples the modalities; ``unseen`` has no valid pixel."""
    model = DualUnet(base, settings_of(lpips_lambda, struct_lambda=0.0), lpips=lpips)
    generator = torch.Generator().manual_seed(4)
    x0 = {m: torch.randn(2, 4, 8, 8, generator=generator) for m in model.modalities}
    valid = {m: torch.full((2, 1, 8, 8), m != unseen) for m in model.modalities}
    text = {m: base.encode_prompts([m]) for m in model.modalities}
    return (model, *model.training_loss(x0, valid, text, rng.generator(1)))


def gradient(model: DualUnet, m: str) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for _, p in model.lora.named_parameters(m) if p.grad is not None])


def test_the_term_is_added_with_its_weight(base: Base, lpips: Lpips) -> None:
    _, without, plain = loss_of(base, 0.0, None)
    _, total, terms = loss_of(base, 0.25, lpips)
    assert set(terms) - set(plain) == {"lpips_cf", "lpips_fa"} and terms["lpips_cf"] > 0 and terms["lpips_fa"] > 0
    assert total.item() == pytest.approx((without + 0.25 * (terms["lpips_cf"] + terms["lpips_fa"])).item(), rel=1e-5)


@pytest.mark.parametrize(("own", "other"), [("cf", "fa"), ("fa", "cf")])
def test_its_gradient_reaches_the_lora_of_its_own_modality(base: Base, lpips: Lpips, own: str, other: str) -> None:
    gradients = {}
    for weight in (0.0, 1.0):
        model, loss, _ = loss_of(base, weight, lpips, unseen=other)
        loss.backward()
        assert not gradient(model, other).any()
        gradients[weight] = gradient(model, own)
    assert torch.isfinite(gradients[1.0]).all()
    assert not torch.allclose(gradients[0.0], gradients[1.0], rtol=1e-2)


def test_off_it_decodes_nothing(base: Base, lpips: Lpips, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    decode = base.vae.decode
    monkeypatch.setattr(base.vae, "decode", lambda z, *a, **k: calls.append(len(z)) or decode(z, *a, **k))
    assert LossSpec().lpips_lambda == 0
    loss_of(base, 0.0, None)
    assert calls == []
    loss_of(base, 0.1, lpips)
    assert calls == [2, 2, 2, 2]


def test_without_weights_nothing_starts(base: Base, dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    context = FolderContext(out)
    with pytest.raises(ModelUnavailable, match="CFFA_LPIPS_WEIGHTS"):
        run_training(settings_of(0.1), dataset, base.folder, out, context)
    assert context.logged == [] and not [path for path in out.rglob("*") if path.is_file()]
    with pytest.raises(ModelUnavailable, match="needs the weights of LPIPS"):
        loss_of(base, 0.1, None)


def test_the_library_hands_the_file_on(base: Base, dataset: Path, tmp_path: Path) -> None:
    pairs = library.load_pairs(dataset, 64)
    with pytest.raises(ModelUnavailable, match=r"no LPIPS weights at .*absent"):
        library.train(base, pairs, out=tmp_path, lpips_weights=tmp_path / "absent", steps=1, loss={"lpips_lambda": 0.1})


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.relative_to(folder).parts[0] != "checkpoints"
    }


class Stopping(FolderContext):
    """A job that is cancelled at the end of step 2."""

    def progress(self, stage: str, current: int, total: int) -> None:
        if (stage, current) == ("training", 2):
            raise Cancelled("stopped by the test")


def test_a_resumed_run_ends_with_the_same_bytes_and_the_card_names_the_weights(
    base: Base, dataset: Path, weights: Path, tmp_path: Path
) -> None:
    settings, whole, stopped = settings_of(0.1), tmp_path / "whole", tmp_path / "stopped"
    card = run_training(settings, dataset, base.folder, whole, FolderContext(whole), lpips_weights=weights)
    assert card["lpips"] == {"lambda": 0.1, "sha256": hashlib.sha256(weights.read_bytes()).hexdigest()}
    assert card["settings"]["loss"]["lpips_lambda"] == 0.1
    for log in ("training_log", "validation_log"):
        lines = [json.loads(line) for line in (whole / f"{log}.jsonl").read_text().splitlines()]
        assert all(line["lpips_cf"] > 0 and line["lpips_fa"] > 0 for line in lines) and lines
    with pytest.raises(Cancelled):
        run_training(settings, dataset, base.folder, stopped, Stopping(stopped), lpips_weights=weights)
    others = random_lpips_tensors()
    others["lin0.weight"] = others["lin0.weight"] * 2
    save_file(others, tmp_path / "others.safetensors")
    with pytest.raises(Conflict, match=r"\(lpips differ\)"):
        run_training(
            settings,
            dataset,
            base.folder,
            stopped,
            FolderContext(stopped),
            lpips_weights=tmp_path / "others.safetensors",
        )
    run_training(settings, dataset, base.folder, stopped, FolderContext(stopped), lpips_weights=weights)
    assert files(stopped) == files(whole)
    assert {"best_checkpoint/model.json", "latest_checkpoints/step_000002/lora_cf.safetensors"} <= set(files(whole))


def test_a_model_trained_with_it_is_used_without_the_file(base: Base, lpips: Lpips, tmp_path: Path) -> None:
    model = DualUnet(base, settings_of(0.1), lpips=lpips)
    model.save(tmp_path / "model", dataset_digest="d", validation=None)
    assert DualUnet.load(tmp_path / "model", base).lpips is None
    assert read_card(tmp_path / "model")["lpips"]["lambda"] == 0.1


def test_without_the_term_the_card_says_so(base: Base, tmp_path: Path) -> None:
    card = DualUnet(base, settings_of(0.0)).save(tmp_path / "model", dataset_digest="d", validation=None)
    assert card["lpips"] is None
