"""Two LoRAs on one frozen UNet: each row of a batch says which modality's low-rank update it gets.

CF and FA rows go through ONE forward of the base, and this equals two separately fused UNets, because LoRA touches only
linear projections (METHODS 2, "Exact fast form"). peft is the exchange format and the reference in the tests; its own
mixed batches work in eval mode only, hence these layers. Knows nothing of losses, sampling or files of a run.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn
from torch.nn import functional as F

from cffa_core import rng
from cffa_core.errors import CorruptArtifact, ModelUnavailable
from cffa_core.jobs.spec import LoraSpec


@dataclass
class RowPlan:
    """Which modality each row of the current batch belongs to, as runs ``(modality, start, stop)``.

    One object is shared by all layers of a UNet. It stays set until the next batch: gradient checkpointing runs the
    forward a second time, during backward.
    """

    runs: tuple[tuple[str, int, int], ...] = ()

    @property
    def rows(self) -> int:
        """Rows that a batch must have."""
        return self.runs[-1][2] if self.runs else 0

    def set(self, modalities: Sequence[str]) -> None:
        """Plan a batch whose rows belong to ``modalities``."""
        runs, start = [], 0
        for modality, rows in groupby(modalities):
            stop = start + len(list(rows))
            runs.append((modality, start, stop))
            start = stop
        self.runs = tuple(runs)


class DualLoraLinear(nn.Module):
    """A frozen linear layer plus one low-rank update per modality: ``W x + alpha / rank * B_m A_m x``."""

    def __init__(self, base: nn.Linear, name: str, spec: LoraSpec, modalities: Sequence[str], plan: RowPlan) -> None:
        super().__init__()
        self.base = base
        self.scale = spec.alpha / spec.rank
        self._plan = plan
        self.name = name
        # The updates stay in float32 whatever the base is stored in: AdamW's steps are lost in half precision.
        down = torch.zeros(spec.rank, base.in_features, device=base.weight.device)
        up = torch.zeros(base.out_features, spec.rank, device=base.weight.device)
        self.lora_a = nn.ParameterDict({m: nn.Parameter(down.clone()) for m in modalities})
        self.lora_b = nn.ParameterDict({m: nn.Parameter(up.clone()) for m in modalities})

    def reset(self, seed: int) -> None:
        """Draw A as peft does (Kaiming uniform with a = sqrt(5): +-1/sqrt(fan_in)) and set B to zero."""
        bound = 1 / math.sqrt(self.base.in_features)
        for modality, weight in self.lora_a.items():
            generator = rng.generator(seed, modality, self.name)
            with torch.no_grad():
                weight.copy_(torch.empty(weight.shape).uniform_(-bound, bound, generator=generator))
                self.lora_b[modality].zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Project ``(R, N, C_in)`` to ``(R, N, C_out)``; R must be the number of rows of the plan."""
        if x.shape[0] != self._plan.rows:
            raise ValueError(f"{self.name}: the batch has {x.shape[0]} rows, the row plan {self._plan.rows}")
        y: torch.Tensor = self.base(x)
        updated = []
        for modality, start, stop in self._plan.runs:
            rows = y[start:stop].view(-1, y.shape[-1])
            down = F.linear(x[start:stop], self.lora_a[modality].to(x.dtype)).flatten(0, -2).to(y.dtype)
            up = self.lora_b[modality].to(y.dtype).t()
            if torch.is_grad_enabled():
                updated.append(torch.addmm(rows, down, up, alpha=self.scale))
            else:
                # The update goes into the output where it stands: the projections' memory traffic is what LoRA costs.
                rows.addmm_(down, up, alpha=self.scale)
        return torch.cat(updated).view(y.shape) if updated else y


class DualLora:
    """The adapters attached to one UNet: row plan, parameters, import and export."""

    def __init__(self, spec: LoraSpec, modalities: Sequence[str], layers: dict[str, DualLoraLinear], plan: RowPlan):
        self.spec = spec
        self.modalities = tuple(modalities)
        self._layers = layers
        self._plan = plan

    def set_rows(self, modalities: Sequence[str]) -> None:
        """Say which modality each row of the coming batches belongs to, e.g. ``("cf", "fa", "cf", "fa")``."""
        unknown = set(modalities) - set(self.modalities)
        if unknown:
            raise ValueError(f"no LoRA for {sorted(unknown)}; this UNet has {list(self.modalities)}")
        self._plan.set(modalities)

    @contextmanager
    def only(self, rows: Sequence[int]) -> Iterator[None]:
        """Let layers be shown these rows of the batch alone, in this order; afterwards the whole batch counts again."""
        whole = self._plan.runs
        modalities = [modality for modality, start, stop in whole for _ in range(start, stop)]
        self._plan.set([modalities[row] for row in rows])
        try:
            yield
        finally:
            self._plan.runs = whole

    def named_parameters(self, modality: str | None = None) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield ``("cf/down_blocks...to_q.lora_A.weight", parameter)`` in a fixed order."""
        for m in self.modalities if modality is None else (modality,):
            for name, layer in self._layers.items():
                yield f"{m}/{name}.lora_A.weight", layer.lora_a[m]
                yield f"{m}/{name}.lora_B.weight", layer.lora_b[m]

    def parameters(self) -> list[nn.Parameter]:
        """All trainable parameters, in the order of :meth:`named_parameters`."""
        return [parameter for _, parameter in self.named_parameters()]

    def parameter_count(self, modality: str) -> int:
        """Number of trainable parameters of one modality."""
        return sum(parameter.numel() for _, parameter in self.named_parameters(modality))

    def export(self, modality: str) -> bytes:
        """One modality as the bytes of a safetensors file that diffusers' ``load_lora_weights`` reads."""
        weights = {
            "unet." + name.removeprefix(f"{modality}/"): parameter.detach().float().cpu().contiguous()
            for name, parameter in self.named_parameters(modality)
        }
        adapter = {
            "unet.r": self.spec.rank,
            "unet.lora_alpha": self.spec.alpha,
            "unet.target_modules": list(self.spec.targets),
        }
        # One entry only: safetensors writes several in random order, and equal models must give equal bytes.
        content: bytes = save(weights, {"lora_adapter_metadata": json.dumps(adapter, sort_keys=True)})
        return content

    def load(self, modality: str, path: Path) -> None:
        """Load what :meth:`export` wrote; raises ``CorruptArtifact`` for weights that are absent or do not fit."""
        if not path.is_file():
            raise ModelUnavailable(f"the model folder has no {path.name}")
        try:
            with safe_open(path, "pt") as stored:
                weights = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (not a dict)
        except SafetensorError as error:
            raise CorruptArtifact(f"{path.name} is not a readable safetensors file: {error}") from error
        expected = {"unet." + name.removeprefix(f"{modality}/"): p for name, p in self.named_parameters(modality)}
        wrong = set(expected) ^ set(weights)
        wrong |= {name for name in set(expected) & set(weights) if expected[name].shape != weights[name].shape}
        if wrong:
            raise CorruptArtifact(
                f"{path.name} does not fit this UNet and LoRA: {sorted(wrong)[:3]}; use it with the base, "
                "rank and targets that it was trained with"
            )
        with torch.no_grad():
            for name, parameter in expected.items():
                parameter.copy_(weights[name])


def attach_dual_lora(unet: Any, spec: LoraSpec, modalities: Sequence[str], seed: int) -> DualLora:
    """Replace the target projections of every attention of ``unet`` (self and cross) by :class:`DualLoraLinear`.

    B starts at zero, so the UNet's output is unchanged at first. ``unet`` is changed in place; use
    :func:`share_weights` first to leave the original as it is.
    """
    plan = RowPlan()
    layers: dict[str, DualLoraLinear] = {}
    for name, module in list(unet.named_modules()):
        if isinstance(module, nn.Linear) and any(name.endswith(f".{target}") for target in spec.targets):
            layer = DualLoraLinear(module, name, spec, modalities, plan)
            if module.weight.device.type != "meta":
                layer.reset(seed)
            parent, _, child = name.rpartition(".")
            setattr(unet.get_submodule(parent), child, layer)
            layers[name] = layer
    if not layers:
        raise ModelUnavailable(f"the UNet has no attention projections named {', '.join(spec.targets)}")
    return DualLora(spec, modalities, layers, plan)


def share_weights(unet: Any) -> Any:
    """Return a copy of ``unet`` with modules of its own and the SAME weight tensors, so that adapters do not meet."""
    tensors = [*unet.parameters(), *unet.buffers()]
    return copy.deepcopy(unet, memo={id(tensor): tensor for tensor in tensors})
