"""What is wrong with models and numbers is said as a typed error that tells what to do, and spoils nothing."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cffa_core.data.pairs import load_pairs
from cffa_core.errors import CorruptArtifact, ModelUnavailable, TrainingDiverged
from cffa_core.jobs.context import FolderContext
from cffa_core.jobs.spec import GenerateSettings, LoraSpec, SamplerSpec, TrainSettings
from cffa_core.models.base import Base
from cffa_core.models.checkpoint import read_state
from cffa_core.models.lora import attach_dual_lora, share_weights
from cffa_core.models.sd15 import UNET
from cffa_core.recipes.generate import load_sampler
from cffa_core.recipes.train import run_training
from cffa_core.recipes.training_run import TrainingRun
from tests.pair_folder import write_pair_folder


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pair_folder(tmp_path_factory.mktemp("data") / "pairs", n=4)


def settings_of(**options: Any) -> TrainSettings:
    defaults: dict[str, Any] = {
        "resolution": 64,
        "steps": 4,
        "lora": LoraSpec(rank=2),
        "holdout": 0.25,
        "validate_every": 2,
        "checkpoint_every": 2,
        "preview_pairs": 0,
        "seed": 7,
    }
    return TrainSettings(**(defaults | options))


@pytest.fixture
def two_steps(base: Base, dataset: Path, tmp_path: Path) -> TrainingRun:
    """A run of four steps that has done two of them and has kept a checkpoint."""
    out = tmp_path / "out"
    run = TrainingRun(settings_of(), load_pairs(dataset, 64), base, out, FolderContext(out))
    run.start()
    run.train_step()
    run.train_step()
    run.validate()
    run.checkpoint()
    return run


def names_of_step_3(run: TrainingRun) -> list[str]:
    from cffa_core import rng

    return run._batch(2, rng.generator(run.settings.seed, "step", 3)).names


def spoil_a_weight(run: TrainingRun) -> None:
    with torch.no_grad():
        run.weights[0][0, 0] = float("nan")


def spoil_a_picture(run: TrainingRun) -> None:
    """One NaN among the latents of the pair that comes next, as a broken decoder would leave it."""
    (name,) = names_of_step_3(run)
    encode = run.train_latents._encode

    def broken(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, logvar = encode(images)
        mean[0, 0, mean.shape[2] // 2, mean.shape[3] // 2] = float("nan")
        return mean, logvar

    assert name in {pair.name for pair in run.train}
    run.train_latents._known.clear()
    run.train_latents._encode = broken


def spoil_a_gradient(run: TrainingRun) -> None:
    """The loss is a number, the way back overflows."""
    run.weights[0].register_hook(lambda gradient: gradient * float("inf"))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (spoil_a_weight, r"the loss at step 3 \(pairs NAMES\) is nan"),
        (spoil_a_picture, r"the loss at step 3 \(pairs NAMES\) is nan"),
        (spoil_a_gradient, r"the gradient at step 3 \(pairs NAMES\) is (inf|nan)"),
    ],
)
def test_no_number_stops_at_once_and_the_last_good_checkpoint_is_kept(
    two_steps: TrainingRun, base: Base, dataset: Path, spoil: Any, says: str
) -> None:
    run, out = two_steps, two_steps.files.folder
    names = ", ".join(names_of_step_3(run))
    before = [weight.detach().clone() for weight in run.weights]
    spoil(run)
    with pytest.raises(TrainingDiverged, match=says.replace("NAMES", names) + ".*last good checkpoint.*learning_rate"):
        run.train_step()
    after = [weight.detach() for weight in run.weights]
    changed = sum(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert changed == (1 if spoil is spoil_a_weight else 0)  # what the test itself spoiled, and nothing else
    (checkpoint,) = (out / "checkpoints").iterdir()
    tensors, state = read_state(checkpoint)
    assert state["step"] == 2 and all(tensor.isfinite().all() for tensor in tensors.values())
    # It can be gone on from: the causes of this test are not part of it.
    card = run_training(settings_of(), dataset, base.folder, out, FolderContext(out))
    assert card["step"] in (2, 4)


def test_a_validation_that_is_no_number_names_its_pairs(two_steps: TrainingRun) -> None:
    spoil_a_weight(two_steps)
    (held_out,) = two_steps.held_out
    with pytest.raises(TrainingDiverged, match=rf"validation loss at step 2 \(pairs {held_out.name}\)"):
        two_steps.validate()
    assert two_steps.best is not None and two_steps.best["loss"] < 1e6


def test_a_flipped_byte_in_a_checkpoint_is_not_resumed_from(two_steps: TrainingRun, base: Base, dataset: Path) -> None:
    out = two_steps.files.folder
    (checkpoint,) = (out / "checkpoints").iterdir()
    weights = checkpoint / "state.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CorruptArtifact, match=r"state\.safetensors is not the file .*copy it again, or take an older"):
        run_training(settings_of(), dataset, base.folder, out, FolderContext(out))


def test_a_model_of_another_base_is_not_sampled(two_steps: TrainingRun, base: Base, tmp_path: Path) -> None:
    model = two_steps.files.best
    other = shutil.copytree(base.folder, tmp_path / "other")
    path = other / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["conv_in.bias"] += 1
    save_file(weights, path, {"format": "pt"})
    settings = GenerateSettings(count=1, resolution=64, batch_size=1, sampler=SamplerSpec(steps=1))
    with pytest.raises(ModelUnavailable, match="with other weights than 'other' has here"):
        load_sampler(settings, model, other)


def test_a_lora_of_another_architecture_is_refused(base: Base, tmp_path: Path) -> None:
    """SD 1.5's, one row wide in all its 96 projections, for a base of two blocks."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNET)
    foreign = attach_dual_lora(unet, LoraSpec(rank=1), ("cf",), seed=0)
    stored = {name: torch.zeros(weight.shape) for name, weight in foreign.named_parameters("cf")}
    path = tmp_path / "lora_cf.safetensors"
    save_file({f"unet.{name.removeprefix('cf/')}": weight for name, weight in stored.items()}, path)
    own = attach_dual_lora(share_weights(base.unet), LoraSpec(rank=1), ("cf",), seed=0)
    with pytest.raises(CorruptArtifact, match=r"does not fit this UNet and LoRA.*use it with the base"):
        own.load("cf", path)
