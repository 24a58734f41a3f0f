"""CFFA as a library: load a base, load pairs, train, sample, save; no service.

    import cffa_core as cffa

    base = cffa.load_base("tiny")
    pairs = cffa.load_pairs("my_pairs/", resolution=512)
    model = cffa.train(base, pairs, out="runs/first", steps=200, seed=1)
    for pair in model.sample(8, seed=1, steps=25):
        pair.save("new_pairs")

A thin front over the same recipes that the service runs; ``cffa_core`` exports these names and imports torch only when
one of them is used.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from pydantic import ValidationError

from cffa_core.data import pairs as data_pairs
from cffa_core.data.pairs import PairSet
from cffa_core.errors import InvalidSpec, Problem
from cffa_core.evaluation.pair_scores import TrainingPairs
from cffa_core.jobs.context import FolderContext
from cffa_core.jobs.spec import AttentionSettings, EditSettings, GateSpec, GenerateSettings, Spec, TrainSettings
from cffa_core.methods.method import PairMethod, read_card
from cffa_core.methods.pair_sampler import NewPair, PairSampler
from cffa_core.methods.registry import load_method
from cffa_core.models import base as models_base
from cffa_core.models.base import DTYPES, Base, Precision
from cffa_core.models.checkpoint import folder_digest
from cffa_core.recipes.attention import capture_with
from cffa_core.recipes.edit import edit_part, editor_of, sources_of
from cffa_core.recipes.generate import draw_slots, own_prompts
from cffa_core.recipes.novelty import training_pairs_beside
from cffa_core.recipes.structures import Structures, structures_for
from cffa_core.recipes.train import train_pairs

S = TypeVar("S", bound=Spec)
OnProgress = Callable[[str, int, int], None]
_PRECISION: dict[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}


def load_base(
    ref: str | Path = "tiny", *, device: str = "auto", precision: Precision = "fp32", models_dir: Path | None = None
) -> Base:
    """Load a base: ``"tiny"`` (shipped), a Stable-Diffusion-layout folder, or a hub id such as SD 1.5's.

    ``device="auto"`` takes a GPU if there is one. Raises ``ModelUnavailable``, naming what is missing.
    """
    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    return models_base.load_base(ref, device=chosen, dtype=precision, models_dir=models_dir)


def load_pairs(path: str | Path, resolution: int = 512, *, crop_to_common: bool = False) -> PairSet:
    """Load registered pairs, with all their masks, from a folder or zip in any of the accepted layouts.

    Raises ``InvalidDataset`` naming every bad file.
    """
    return data_pairs.load_pairs(Path(path), resolution, crop_to_common, masks=None)


class Model:
    """A trained model; ``card`` is its ``model.json``, ``digest`` the SHA-256 over its files.

    ``training`` are the pairs it has learnt from, where they are known: new pairs are compared with them.
    """

    def __init__(
        self,
        method: PairMethod,
        card: dict[str, Any],
        digest: str | None = None,
        training: TrainingPairs | None = None,
    ) -> None:
        self.method = method
        self.card = card
        self.digest = digest
        self.training = training

    def sample(
        self,
        count: int,
        *,
        seed: int = 42,
        batch_size: int = 4,
        resolution: int | None = None,
        structures: PairSet | Literal["procedural"] | None = None,
        gate: GateSpec | dict[str, Any] | None = None,
        only: Sequence[tuple[int, int]] | None = None,
        tokens: Sequence[str] | None = None,
        on_progress: OnProgress | None = None,
        **sampler: Any,
    ) -> Iterator[NewPair]:
        """Yield ``count`` new pairs, made in batches; pair i is the same whatever ``count`` is.

        Each pair carries its scores (``alignment``, ``novelty``). With a ``gate`` (``{"min_alignment": 0.3}``) a slot
        is tried again until a pair passes; a slot of which no try does is left out, and ``on_progress`` is told more
        steps than were expected. ``only`` draws these pairs alone, (index, try) each: ``only=[(17, 0)]`` is pair 17.
        Of a model trained with placeholder tokens, ``tokens=["disc", "vessel"]`` draws these (default: all).

        ``sampler`` takes the fields of :class:`cffa_core.jobs.spec.SamplerSpec` (``steps=25``, ``scheduler="ddim"``,
        ``initial_noise="rotated"``, ``guidance_scale=3.0``, ...); prompts default to those of the training, and
        ``resolution`` to its. A model of method ``controlnet`` draws on ``structures``: those of pairs loaded at
        ``resolution`` (pair i on structure i modulo their number), or ``"procedural"`` eyes of the seed. Equals what a
        generation job with the same settings makes. Raises ``InvalidSpec``.
        """
        settings = _checked(
            GenerateSettings,
            count=count,
            seed=seed,
            batch_size=batch_size,
            resolution=self.method.settings.resolution if resolution is None else resolution,
            structures="dataset" if isinstance(structures, PairSet) else structures,
            sampler=sampler,
            gate=gate,
            only=only,
            tokens=tokens,
        )
        given = structures if isinstance(structures, PairSet) else None
        return self._draw(settings, structures_for(settings, self.method, given), on_progress)

    def attention(self, out: str | Path, *, on_progress: OnProgress | None = None, **settings: Any) -> dict[str, Any]:
        """Draw one pair and write to ``out`` where its words and points look (docs/attention.md); returns the report.

        ``settings`` takes the fields of :class:`cffa_core.jobs.spec.AttentionSettings` (``index=3``,
        ``tokens=["vessels"]``, ``kinds=["cross", "self"]``, ``sampler={"steps": 25}``, ...). The pair is the one that
        :meth:`sample` draws with these and ``batch_size=1``. Raises ``InvalidSpec``.
        """
        defaults = {"resolution": self.method.settings.resolution, "precision": _PRECISION[self.method.base.dtype]}
        checked = _checked(AttentionSettings, **(defaults | settings))
        spec = own_prompts(checked.sampler, self.method)
        sampler = PairSampler(self.method, spec, checked.resolution, 1, model_digest=self.digest)
        return capture_with(sampler, checked, Path(out), on_progress or (lambda stage, done, total: None))

    def _draw(
        self, settings: GenerateSettings, structures: Structures | None, on_progress: OnProgress | None
    ) -> Iterator[NewPair]:
        spec = own_prompts(settings.sampler, self.method)
        sampler = PairSampler(
            self.method,
            spec,
            settings.resolution,
            settings.batch_size,
            model_digest=self.digest,
            tokens=settings.tokens,
        )
        # Without a gate every batch is yielded as it comes; with one, slots that are tried again share batches.
        settings = settings.model_copy(update={} if settings.gate else {"part_size": settings.batch_size})
        done = 0
        for part in range(settings.parts):
            slots = settings.first_tries(part)
            drawn = draw_slots(sampler, settings, slots, None, structures, self.training)
            yield from sorted((pair for pair, reasons in drawn if not reasons), key=lambda pair: pair.index)
            done += len(slots)
            if on_progress is not None:
                on_progress("sampling", done, len(settings.indices))


def train(
    base: Base,
    pairs: PairSet,
    *,
    out: str | Path,
    lpips_weights: Path | None = None,
    on_progress: OnProgress | None = None,
    **settings: Any,
) -> Model:
    """Train on ``pairs`` and return the best model; ``settings`` takes the fields of ``TrainSettings``.

    Logs, previews and checkpoints land in ``out``. Called again with the same arguments it resumes, or returns at once
    if the run had finished. ``lpips_weights`` is the file that ``loss={"lpips_lambda": ...}`` needs (docs/methods.md,
    section 2). Raises ``InvalidSpec`` for impossible settings, ``ModelUnavailable`` without that file, and ``Conflict``
    if ``out`` holds another run.
    """
    defaults = {
        "base": re.sub(r"[^A-Za-z0-9._/-]", "_", base.name),
        "precision": _PRECISION[base.dtype],
        "resolution": int(pairs[0].cf.shape[-1]),
    }
    checked = _checked(TrainSettings, **(defaults | settings))
    folder = Path(out)
    context = FolderContext(folder, on_progress)
    card = train_pairs(checked, pairs, base, folder, context, lpips_weights=lpips_weights)
    best = folder / "best_checkpoint"
    return Model(load_method(best, base), card, folder_digest(best), training_pairs_beside(best))


def edit(
    model: Model | Base, pairs: PairSet, out: str | Path, *, on_progress: OnProgress | None = None, **settings: Any
) -> list[dict[str, Any]]:
    """Edit ``pairs`` by text into ``out`` (docs/edit.md); returns what is said of each pair in ``out/part.json``.

    ``settings`` takes the fields of :class:`cffa_core.jobs.spec.EditSettings`: ``edits=[{"text": "haemorrhages"}]``,
    ``mask="union"``, ``steps=30``, ... A base edits alone, without any LoRA. Raises ``InvalidSpec`` and
    ``InvalidDataset``.
    """
    base = model.method.base if isinstance(model, Model) else model
    defaults = {"count": len(pairs), "resolution": int(pairs[0].cf.shape[-1]), "precision": _PRECISION[base.dtype]}
    checked = _checked(EditSettings, **(defaults | settings))
    editor = editor_of(model.method, checked, model.digest) if isinstance(model, Model) else editor_of(model, checked)
    folder = Path(out)
    edit_part(editor, checked, list(sources_of(pairs)), folder, FolderContext(folder, on_progress))
    described: list[dict[str, Any]] = json.loads((folder / "part.json").read_text(encoding="utf-8"))["pairs"]
    return described


def load_model(folder: str | Path, base: Base | None = None) -> Model:
    """Load what :func:`train` (its ``out``) or a training job (its model folder) left.

    Without ``base``, the base that the model names is loaded. Raises ``ModelUnavailable`` or ``CorruptArtifact``.
    """
    path = Path(folder)
    if not (path / "model.json").is_file() and (path / "best_checkpoint").is_dir():
        path = path / "best_checkpoint"
    card = read_card(path)
    method = load_method(path, base if base is not None else load_base(card["base"]["name"]))
    return Model(method, card, folder_digest(path), training_pairs_beside(path))


def _checked(kind: type[S], **fields: Any) -> S:
    try:
        return kind(**fields)
    except ValidationError as error:
        problems = tuple(
            Problem("/" + "/".join(map(str, item["loc"])), str(item["type"]), str(item["msg"]))
            for item in error.errors()
        )
        listed = "; ".join(f"{problem.pointer[1:]}: {problem.message}" for problem in problems)
        raise InvalidSpec(f"these settings are not valid: {listed}", problems=problems) from error
