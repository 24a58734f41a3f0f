"""Which findings an image shows, judged by two small networks that were trained on procedural eyes.

One network per modality looks at every place of the image; the strongest places decide. Knows tensors, weights and
probabilities: neither training (recipes.findings) nor files of pairs. It has never seen a real eye: what it says of
one is no finding.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from cffa_core.errors import InvalidSpec, ModelUnavailable, NotFound, Problem
from cffa_core.models.checkpoint import verify_files

Modality = Literal["cf", "fa"]
MODALITIES: tuple[Modality, ...] = get_args(Modality)
# What can be seen in which modality: exudates hardly show in an angiogram, leakage not at all in a photograph.
SEEN: Mapping[Modality, tuple[str, ...]] = {
    "cf": ("haemorrhage", "exudate", "microaneurysm"),
    "fa": ("haemorrhage", "microaneurysm", "leakage"),
}
SHIPPED = Path(__file__).parent.parent / "assets" / "findings"
FORMAT = "cffa-findings/1"
CARD = "findings.json"
SIDE = 512  # images are brought to this side, so that a microaneurysm is always two to four pixels wide
SMALLEST = 64
CELL = 8  # pixels (at SIDE) of a place that gets a value of its own
STRONGEST = 8  # so many places decide about the image
SIZES = (512, 256, 128)  # sides for which the probabilities were calibrated


class FindingsNet(nn.Module):
    """Fully convolutional: (B, 3, H, W) in [-1, 1] to the log-odds of three findings per cell, (B, 3, H/8, W/8).

    A cell sees at most 170 px to each side. H and W must be divisible by 16.
    """

    def __init__(self, findings: int = 3) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.PixelUnshuffle(2), _conv(12, 24), _conv(24, 32, stride=2), _Block(32))
        self.fine = nn.Sequential(_conv(32, 64, stride=2), _Block(64), _Block(64))
        self.coarse = nn.Sequential(_conv(64, 80, stride=2), _Block(80), _Block(80, dilation=2))
        self.head = nn.Sequential(nn.Conv2d(144, 64, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU())
        self.last = nn.Conv2d(64, findings, 1)
        assert self.last.bias is not None
        nn.init.constant_(self.last.bias, -4.0)  # few cells hold anything

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Log-odds that a cell holds some of each finding."""
        fine = self.fine(self.stem(images))
        around = F.interpolate(self.coarse(fine), scale_factor=2.0, mode="bilinear", align_corners=False)
        places: torch.Tensor = self.last(self.head(torch.cat([fine, around], dim=1)))
        return places


class _Block(nn.Module):
    """Two convolutions around a shortcut (He et al. 2016)."""

    def __init__(self, channels: int, dilation: int = 1) -> None:
        super().__init__()
        self.first = _conv(channels, channels, dilation=dilation)
        self.second = nn.Conv2d(channels, channels, 3, padding=dilation, dilation=dilation, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Same shape as ``x``."""
        return F.relu(x + self.norm(self.second(self.first(x))))


def _conv(before: int, after: int, *, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    kernel = nn.Conv2d(before, after, 3, stride, padding=dilation, dilation=dilation, bias=False)
    return nn.Sequential(kernel, nn.BatchNorm2d(after), nn.ReLU())


def at_side(images: torch.Tensor) -> torch.Tensor:
    """Bring (B, 3, H, H) to (B, 3, SIDE, SIDE): larger images are area-averaged, smaller ones interpolated."""
    side = images.shape[-1]
    if side == SIDE:
        return images
    if side > SIDE:
        return F.interpolate(images, size=(SIDE, SIDE), mode="area")
    return F.interpolate(images, size=(SIDE, SIDE), mode="bilinear", align_corners=False)


def strongest(places: torch.Tensor) -> torch.Tensor:
    """Mean log-odds of the :data:`STRONGEST` cells of each finding: (B, F, h, w) to (B, F)."""
    flat = places.flatten(2)
    return flat.topk(min(STRONGEST, flat.shape[-1]), dim=-1).values.mean(dim=-1)


@dataclass(frozen=True)
class Calibration:
    """From the strength of the strongest places to a probability: ``sigmoid(slope * strength + offset)`` (Platt)."""

    slope: float
    offset: float


@dataclass(frozen=True)
class FindingsClassifier:
    """Two trained networks with their calibration by modality, finding and side; ``card`` is what is known of them."""

    nets: Mapping[Modality, FindingsNet]
    calibration: Mapping[Modality, Mapping[str, Mapping[int, Calibration]]]
    card: Mapping[str, Any]

    @classmethod
    def load(cls, folder: Path | None = None, *, device: str | torch.device = "cpu") -> FindingsClassifier:
        """Read a folder that :func:`save` wrote; None: the weights shipped with CFFA.

        Raises ``NotFound`` where there is no classifier, ``CorruptArtifact`` where its files are not those that were
        written, ``ModelUnavailable`` for another format.
        """
        folder = folder or SHIPPED
        if not (folder / CARD).is_file():
            raise NotFound(f"{folder} holds no classifier of findings ({CARD}); make one with `cffa findings-train`")
        try:
            card = json.loads((folder / CARD).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ModelUnavailable(f"{folder.name}/{CARD} is not JSON: {error}") from error
        if not isinstance(card, dict) or card.get("format") != FORMAT:
            raise ModelUnavailable(f"{folder.name}/{CARD} is not {FORMAT}; train the classifier anew")
        verify_files(folder, card["files"])
        nets: dict[Modality, FindingsNet] = {}
        calibration: dict[Modality, dict[str, dict[int, Calibration]]] = {}
        for modality in MODALITIES:
            net = FindingsNet(len(SEEN[modality]))
            try:
                net.load_state_dict(load_file(folder / f"{modality}.safetensors"))
            except (OSError, SafetensorError, RuntimeError) as error:
                raise ModelUnavailable(f"{folder.name}/{modality}.safetensors does not fit: {error}") from error
            nets[modality] = net.to(device).eval()
            calibration[modality] = {
                finding: {int(side): Calibration(**fit) for side, fit in sides.items()}
                for finding, sides in card["calibration"][modality].items()
            }
        return cls(nets, calibration, card)

    def predict(self, modality: Modality, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Probability of each finding that this modality can show, (B,) float32 on the CPU; 0.5 is the threshold.

        ``images`` (B, 3, H, H) in [-1, 1], an FA repeated to three channels; any square from 64 px up. The calibration
        is that of the nearest of :data:`SIZES`. Each image is judged alone, so its neighbours change nothing. Raises
        ``InvalidSpec`` for another modality, shape or range.
        """
        strength = self.strength(modality, images)
        side = min(SIZES, key=lambda known: abs(math.log(known / images.shape[-1])))
        found = {}
        for place, finding in enumerate(SEEN[modality]):
            fit = self.calibration[modality][finding][side]
            found[finding] = torch.sigmoid(fit.slope * strength[:, place] + fit.offset)
        return found

    @torch.no_grad()
    def strength(self, modality: Modality, images: torch.Tensor) -> torch.Tensor:
        """How strong each finding of ``SEEN[modality]`` is, (B, 3) on the CPU; any number, not yet a probability."""
        check_images(modality, images)
        net = self.nets[modality]
        device = next(net.parameters()).device
        if modality == "fa":  # an angiogram has no colour, whatever a decoder makes of it
            images = images.mean(dim=1, keepdim=True).expand(-1, 3, -1, -1)
        return torch.cat([strongest(net(at_side(one[None].float().to(device)))).cpu() for one in images])

    def seen(self, modality: Modality, images: torch.Tensor) -> list[tuple[str, ...]]:
        """The findings of each image whose probability is at least 0.5."""
        found = self.predict(modality, images)
        return [tuple(name for name, values in found.items() if values[row] >= 0.5) for row in range(len(images))]


def check_images(modality: str, images: torch.Tensor) -> None:
    """Raise ``InvalidSpec`` unless ``images`` is (B, 3, H, H), B >= 1, H >= 64, in [-1, 1] of modality cf or fa."""
    if modality not in MODALITIES:
        raise _refused("modality", f"{modality!r} is no modality; choose cf or fa")
    if images.ndim != 4 or images.shape[1] != 3 or len(images) == 0:
        raise _refused("shape", f"images are {tuple(images.shape)}; give (B, 3, H, H), an FA repeated three times")
    if images.shape[2] != images.shape[3]:
        raise _refused("shape", f"images are {images.shape[3]} x {images.shape[2]} px; pad them to a square first")
    if images.shape[3] < SMALLEST:
        raise _refused("shape", f"images are {images.shape[3]} px wide; findings need at least {SMALLEST} px")
    low, high = (float(end) for end in images.aminmax())
    if not (low >= -1.001 and high <= 1.001):  # also refuses what is not a number
        raise _refused("range", f"values run from {low:.3g} to {high:.3g}; scale them to -1..1 (bytes / 127.5 - 1)")


def _refused(what: str, message: str) -> InvalidSpec:
    return InvalidSpec(message, problems=(Problem(f"/{what}", f"bad_{what}", message),))


def save_net(path: Path, net: FindingsNet) -> None:
    """Write one network as safetensors, its numbers in fp16."""
    save_file({name: _stored(value) for name, value in net.state_dict().items()}, path)


def _stored(value: torch.Tensor) -> torch.Tensor:
    value = value.detach().cpu().contiguous()
    return value.half() if value.is_floating_point() else value
