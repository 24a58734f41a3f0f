"""The training loop of the pretraining stages: AdamW, cosine, EMA, wall-clock cap, and checkpoints without pickle.

Knows nothing of what is trained: a stage hands over modules and a loss per step. Each step's randomness is derived from
(seed, stage, step), so a checkpoint needs no generator state.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

Progress = Callable[[str, int, int, float], None]
StepLoss = Callable[[int, int], torch.Tensor]  # (step, shard) -> mean loss of that shard


@dataclass(frozen=True)
class Budget:
    """How long one stage trains: at most ``steps``, and at most ``minutes`` of wall clock where given.

    The learning rate follows whichever limit is nearer. With ``minutes`` set, two runs need not end alike. A batch is
    split into ``shards`` that run in threads of their own: on a busy CPU two threads with one core each finish sooner
    than one operation spread over two cores.
    """

    steps: int
    batch: int
    lr: float
    minutes: float | None = None
    shards: int = 2

    @property
    def per_shard(self) -> int:
        """Images per shard."""
        return self.batch // self.shards


def learning_rate(budget: Budget, step: int, seconds: float) -> float:
    """Linear warm-up over 100 steps (or a tenth of the budget), then cosine down to 2 % of ``lr``."""
    warm = min(1.0, (step + 1) / min(100, max(1, budget.steps // 10)))
    return budget.lr * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * fraction(budget, step, seconds))))


def fraction(budget: Budget, step: int, seconds: float) -> float:
    """Share of the budget that is used up, 0..1."""
    by_clock = seconds / (60 * budget.minutes) if budget.minutes else 0.0
    return min(1.0, max(step / budget.steps, by_clock))


def train_stage(
    name: str,
    work: Path,
    modules: Mapping[str, nn.Module],
    loss: StepLoss,
    budget: Budget,
    *,
    resume: bool,
    every: int,
    ema: float | None,
    progress: Progress,
) -> dict[str, float]:
    """Train ``modules`` in place to the end of ``budget``; return ``{"steps", "seconds", "loss"}``.

    Every ``every`` steps a checkpoint goes to ``work/name``; with ``resume`` the last one is continued, and a finished
    stage is only loaded. With ``ema`` the modules end as the exponential moving average of their weights.
    """
    place = work / name
    final = place / "final.safetensors"
    if resume and final.exists():
        _unflatten(modules, load_file(final))
        finished: dict[str, float] = json.loads((place / "final.json").read_text(encoding="utf-8"))
        return finished
    parameters = [p for module in modules.values() for p in module.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=budget.lr, betas=(0.9, 0.99), weight_decay=0.01)
    shadow = [p.detach().clone() for p in parameters] if ema else []
    step, seconds, smooth = 0, 0.0, float("nan")
    pointer = place / "latest.json"
    if resume and pointer.exists():
        step, seconds, smooth = _load(place / json.loads(pointer.read_text())["folder"], modules, optimiser, shadow)
    for module in modules.values():
        module.train()
    clock = time.monotonic() - seconds
    with ThreadPoolExecutor(budget.shards) as pool:
        while fraction(budget, step, seconds) < 1.0:
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(budget, step, seconds)
            current = _backward(pool, loss, step, budget.shards, parameters)
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
            step += 1
            if ema:
                decay = min(ema, (1 + step) / (10 + step))
                torch._foreach_lerp_(shadow, [p.detach() for p in parameters], 1 - decay)
            seconds = time.monotonic() - clock
            smooth = current if math.isnan(smooth) else 0.98 * smooth + 0.02 * current
            progress(name, step, budget.steps, smooth)
            if step % every == 0:
                _save(place, step, seconds, smooth, modules, optimiser, shadow)
    with torch.no_grad():
        for parameter, average in zip(parameters, shadow, strict=False):
            parameter.copy_(average)
    place.mkdir(parents=True, exist_ok=True)
    summary = {"steps": float(step), "seconds": seconds, "loss": smooth}
    (place / "final.json").write_text(json.dumps(summary), encoding="utf-8")
    write_tensors(final, _flatten(modules))
    return summary


def _backward(
    pool: ThreadPoolExecutor, loss: StepLoss, step: int, shards: int, parameters: list[nn.Parameter]
) -> float:
    """Set each parameter's gradient to the mean over the shards; return the mean loss. Sums in a fixed order."""

    def one(shard: int) -> tuple[float, tuple[torch.Tensor | None, ...]]:
        value = loss(step, shard)
        return float(value.detach()), torch.autograd.grad(value, parameters, allow_unused=True)

    results = list(pool.map(one, range(shards)))
    for index, parameter in enumerate(parameters):
        gradients = [gradient for _, found in results if (gradient := found[index]) is not None]
        parameter.grad = torch.stack(gradients).mean(0).to(parameter.dtype) if gradients else None
    return sum(value for value, _ in results) / shards


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write safetensors so that the file is either whole or absent."""
    partial = path.with_suffix(".partial")
    save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, partial)
    partial.replace(path)


def _flatten(modules: Mapping[str, nn.Module]) -> dict[str, torch.Tensor]:
    return {f"{name}/{key}": value for name, module in modules.items() for key, value in module.state_dict().items()}


def _unflatten(modules: Mapping[str, nn.Module], tensors: Mapping[str, torch.Tensor]) -> None:
    for name, module in modules.items():
        prefix = f"{name}/"
        module.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})


def _save(
    place: Path,
    step: int,
    seconds: float,
    loss: float,
    modules: Mapping[str, nn.Module],
    optimiser: torch.optim.Optimizer,
    shadow: list[torch.Tensor],
) -> None:
    """Write a checkpoint, point ``latest.json`` at it, then drop the older ones."""
    folder = place / f"step_{step:06d}"
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / "weights.safetensors", _flatten(modules))
    moments = {
        f"{index}/{key}": value
        for index, entry in optimiser.state_dict()["state"].items()
        for key, value in entry.items()
    }
    write_tensors(folder / "optimiser.safetensors", moments)
    if shadow:
        write_tensors(folder / "ema.safetensors", {str(index): value for index, value in enumerate(shadow)})
    state = {"step": step, "seconds": seconds, "loss": loss}
    (folder / "state.json").write_text(json.dumps(state), encoding="utf-8")
    partial = place / "latest.partial"
    partial.write_text(json.dumps({"folder": folder.name}), encoding="utf-8")
    partial.replace(place / "latest.json")
    for old in place.glob("step_*"):
        if old.name != folder.name:
            shutil.rmtree(old)


def _load(
    folder: Path, modules: Mapping[str, nn.Module], optimiser: torch.optim.Optimizer, shadow: list[torch.Tensor]
) -> tuple[int, float, float]:
    """Restore a checkpoint into the given objects; ``(step, seconds, smoothed loss)``."""
    _unflatten(modules, load_file(folder / "weights.safetensors"))
    entries: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in load_file(folder / "optimiser.safetensors").items():
        index, key = name.split("/")
        entries.setdefault(int(index), {})[key] = value
    optimiser.load_state_dict({"state": entries, "param_groups": optimiser.state_dict()["param_groups"]})
    if shadow:
        saved = load_file(folder / "ema.safetensors")
        for index, tensor in enumerate(shadow):
            tensor.copy_(saved[str(index)])
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    return int(state["step"]), float(state["seconds"]), float(state["loss"])
