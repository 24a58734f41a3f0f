"""Turn a trained model and a list of seeds into pictures: prompts, guidance, the fixed batch shape, the FA's channel.

The arithmetic of sampling is `diffusion.sampling`; this module connects it to a model's UNet and VAE. Knows no jobs,
parts or archives.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

from cffa_core.diffusion.sampling import build_scheduler, denoise, draw_noise
from cffa_core.errors import InvalidSpec, Problem
from cffa_core.jobs.spec import NoiseMode, SamplerSpec
from cffa_core.methods.method import PairMethod, Tensors
from cffa_core.models.fixed_text import FixedText

OnStep = Callable[[int, int], None]


@dataclass(frozen=True)
class NewPair:
    """A generated pair: ``cf (H, W, 3)`` and ``fa (H, W)`` uint8; one is None if the model knows only the other.

    ``fa_chroma`` is the colour that the one-channel FA dropped: mean of |a*| and |b*| (CIELAB) of the decoded FA.
    ``attempt`` counts the tries of a slot (0 without a gate). ``alignment`` and ``novelty`` are what
    `evaluation.pair_scores` said of the pair; None where nobody asked, or where there was nothing to say. ``structure``
    names what the pair was drawn on, where it was.
    """

    index: int
    seed: int
    cf: NDArray[np.uint8] | None
    fa: NDArray[np.uint8] | None
    fa_chroma: float
    attempt: int = 0
    alignment: Mapping[str, float] | None = None
    novelty: Mapping[str, Any] | None = None
    model_digest: str | None = None
    structure: Mapping[str, Any] | None = None

    @property
    def stem(self) -> str:
        """Name of the pair's files without folder and ending."""
        return f"{self.index:06d}"

    def save(self, folder: str | Path, stem: str | None = None) -> dict[str, Any]:
        """Write ``cf/000017.png`` and ``fa/000017.png`` below ``folder``; return names, sizes, digests and scores.

        Each file says in its text chunks that it is synthetic (docs/provenance.md). ``stem`` replaces ``000017``.
        """
        entry: dict[str, Any] = {
            "index": self.index,
            "seed": self.seed,
            "try": self.attempt,
            "alignment": None if self.alignment is None else dict(self.alignment),
            "novelty": None if self.novelty is None else dict(self.novelty),
            "fa_chroma": self.fa_chroma,
            **({} if self.structure is None else {"structure": dict(self.structure)}),
        }
        for m, image in (("cf", self.cf), ("fa", self.fa)):
            if image is not None:
                marks = synthetic_marks(m, self.index, self.seed, self.model_digest)
                entry[m] = write_png(Path(folder), f"{m}/{stem or self.stem}.png", image, marks)
        return entry


@dataclass(frozen=True)
class BatchRow:
    """Whose row of the UNet's batch this is: branch, place among the pairs; and whether it is shown the prompt."""

    branch: str
    pair: int
    conditional: bool


class PairSampler:
    """A model ready to draw pairs with one sampler setting; prompts are encoded once.

    Every forward has ``batch_size`` pairs; a shorter batch is padded, so that bits do not depend on the company.
    ``model_digest`` is what the pairs' files call the model they come from. ``tokens`` are the placeholder tokens that
    are drawn (None: all that the model has); ``prompts`` are the prompts by branch, with them.
    """

    def __init__(
        self,
        model: PairMethod,
        sampler: SamplerSpec,
        resolution: int,
        batch_size: int,
        *,
        model_digest: str | None = None,
        tokens: Sequence[str] | None = None,
    ) -> None:
        self.model = model
        self.model_digest = model_digest
        self.sampler = sampler
        self.batch_size = batch_size
        self.shape = model.noise_shape(resolution)
        self.initial_noise: NoiseMode = sampler.initial_noise or model.default_noise
        self.step_noise: NoiseMode = sampler.step_noise or self.initial_noise
        self.prompts = model.with_tokens(model.prompts(sampler.cf_prompt, sampler.fa_prompt), tokens)
        self._text = {b: model.base.encode_prompts([self.prompts[b]]) for b in model.branches}
        self.fixed_text = FixedText(model.unet)
        self._negative = model.base.encode_prompts([sampler.negative_prompt]) if sampler.guidance_scale > 1 else None

    @torch.no_grad()
    def draw(
        self,
        indices: Sequence[int],
        seeds: Sequence[int],
        on_step: OnStep | None = None,
        structures: Sequence[Tensors] = (),
    ) -> list[NewPair]:
        """Draw at most ``batch_size`` pairs; pair i has ``indices[i]`` as its name and ``seeds[i]`` as its only chance.

        A pair depends on (model, seed, sampler, resolution, batch_size), not on its neighbours or its place.
        ``structures[i]`` are the control images of pair i, ``(3, H, W)`` uint8 by name; raises ``InvalidSpec`` if the
        model needs them and there are none, or takes none and there are.
        """
        if not 0 < len(seeds) <= self.batch_size or len(indices) != len(seeds):
            raise ValueError(f"a batch takes 1 to {self.batch_size} seeds and as many indices")
        if len(structures) != (len(seeds) if self.model.takes_structure else 0):
            needed = "needs the structures to draw on" if self.model.takes_structure else "takes no structures"
            message = f"a model of method {self.model.method.value} {needed}"
            raise InvalidSpec(message, problems=(Problem("/structures", "structures", message),))
        missing = self.batch_size - len(seeds)
        padded = [*seeds, *[seeds[-1]] * missing]
        shown = [*structures, *list(structures[-1:]) * missing]
        names = shown[0] if shown else ()
        rows = self.latents(padded, on_step, {name: torch.stack([images[name] for images in shown]) for name in names})
        return [
            self._pair(index, seed, self.model.decode(rows, i, self.batch_size))
            for i, (index, seed) in enumerate(zip(indices, seeds, strict=True))
        ]

    def batch_rows(self, pairs: int) -> list[BatchRow]:
        """The rows of every forward for ``pairs`` pairs; with guidance those without the prompt come first."""
        shown = (True,) if self._negative is None else (False, True)
        return [BatchRow(b, i, told) for told in shown for b in self.model.branches for i in range(pairs)]

    @torch.no_grad()
    def latents(
        self, seeds: Sequence[int], on_step: OnStep | None = None, structure: Tensors | None = None
    ) -> torch.Tensor:
        """Final latents ``(len(branches) * B, C, h, w)``: all rows of the first branch, then of the second.

        ``structure[name] (B, 3, H, W)`` are the control images of the pairs.
        """
        model, spec = self.model, self.sampler
        device = model.base.device
        rows = [b for b in model.branches for _ in seeds]
        text = torch.cat([self._text[b].expand(len(seeds), -1, -1) for b in model.branches])
        shown = model.control_rows({name: images.to(device) for name, images in (structure or {}).items()})

        def noise(label: str, mode: NoiseMode) -> torch.Tensor:
            drawn = draw_noise(
                seeds, self.shape, model.modalities, mode, model.noise_rotation, label, model.band_rotations
            )
            return model.join(drawn).to(device)

        def predict(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            if self._negative is None:
                return model.predict_noise(x, t, text, rows, *((shown,) if shown else ()))
            both = torch.cat([self._negative.expand(len(rows), -1, -1), text])
            twice = {name: torch.cat([images, images]) for name, images in shown.items()}
            said = model.predict_noise(torch.cat([x, x]), t, both, rows * 2, *((twice,) if twice else ()))
            unconditional, conditional = said.chunk(2)
            return unconditional + spec.guidance_scale * (conditional - unconditional)

        with self.fixed_text.during_a_run():
            return denoise(
                predict,
                build_scheduler(spec.scheduler, model.base.scheduler_config, spec.steps),
                noise("z0", self.initial_noise),
                lambda i: noise(f"step {i}", self.step_noise),
                on_step,
            )

    def _pair(self, index: int, seed: int, decoded: Tensors) -> NewPair:
        images = {m: to_uint8(image) for m, image in decoded.items()}
        fa = images.get("fa")
        return NewPair(
            index=index,
            seed=seed,
            cf=images.get("cf"),
            fa=None if fa is None else np.asarray(cv2.cvtColor(fa, cv2.COLOR_RGB2GRAY), dtype=np.uint8),
            fa_chroma=0.0 if fa is None else chroma(fa),
            model_digest=self.model_digest,
        )


def to_uint8(image: torch.Tensor) -> NDArray[np.uint8]:
    """``(3, H, W)`` in [-1, 1] -> ``(H, W, 3)`` uint8."""
    scaled = ((image.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    pixels: NDArray[np.uint8] = scaled.permute(1, 2, 0).contiguous().cpu().numpy()
    return pixels


def chroma(image: NDArray[np.uint8]) -> float:
    """Mean of |a*| and |b*| of ``(H, W, 3)`` RGB in CIELAB units; 0 for a grey image."""
    lab = cv2.cvtColor(image.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
    return round(float(np.abs(lab[..., 1:]).mean(dtype=np.float64)), 4)


def synthetic_marks(modality: str, index: int, seed: int, model_digest: str | None) -> dict[str, str]:
    """Text chunks of a generated image; no ids, times or paths: a pair has the same bytes wherever it is made."""
    marks = {
        "Software": "CFFA",
        "Synthetic Data": "YES",
        "Modality": modality.upper(),
        "Index": str(index),
        "Seed": str(seed),
    }
    return marks | ({"Model digest": model_digest} if model_digest is not None else {})


def write_png(
    folder: Path, name: str, image: NDArray[np.uint8], marks: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Write a PNG whose bytes depend on the pixels and ``marks`` (tEXt chunks) alone; return name, size and SHA-256."""
    text = PngImagePlugin.PngInfo()
    for key, value in (marks or {}).items():
        text.add_text(key, value)
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", compress_level=6, optimize=False, pnginfo=text)
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(buffer.getvalue())
    return {"name": name, "size": path.stat().st_size, "sha256": hashlib.sha256(buffer.getvalue()).hexdigest()}
