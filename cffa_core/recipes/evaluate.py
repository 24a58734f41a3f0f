"""Evaluate the alignment of a set of pairs: load, score, take real pairs through the VAE as the ceiling, report.

A readable script over ``evaluation``. Pairs of a trained model are generated first, by whoever asks.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch

from cffa_core.data.contracts import Bytes, PairImages
from cffa_core.data.ingest import open_pairs
from cffa_core.data.ridges import vessels
from cffa_core.errors import InvalidDataset, Problem
from cffa_core.evaluation import figure
from cffa_core.evaluation.alignment import score_set
from cffa_core.evaluation.bootstrap import Estimate, Eyes, estimate
from cffa_core.evaluation.report import AlignmentReport, Subject, VaeCeiling
from cffa_core.evaluation.scores import dice, pair_features
from cffa_core.models.base import Base, load_base
from cffa_core.rng import derive_seed

MAX_PAIRS = 256  # an interval hardly narrows beyond, and features of all scored pairs are kept in memory
NamedImages = tuple[str, str, PairImages]
OnProgress = Callable[[str, int, int], None]


def evaluate_alignment(
    pairs: Path,
    *,
    reference: Path | None = None,
    base: str | None = None,
    out: Path | None = None,
    on_progress: OnProgress | None = None,
    eye_pattern: str | None = None,
    patient_pattern: str | None = None,
    max_pairs: int = MAX_PAIRS,
    seed: int = 0,
    device: str = "cpu",
    models_dir: Path | None = None,
) -> AlignmentReport:
    """Alignment of ``pairs`` (a folder or zip in any layout, or a checked data set), scored at native resolution.

    ``reference`` are real pairs, best held-out ones: with them scores are normalised; with ``base`` they go through its
    VAE first (METHODS 8). With ``base`` alone the pairs' own round trip is measured. ``eye_pattern`` and
    ``patient_pattern`` find eyes and patients of both sets (see ``ingest.check``): intervals are over patients where
    they are known, else over eyes. Of more than ``max_pairs`` a seeded choice is scored. ``out`` gets alignment.json
    and alignment.png. Raises ``InvalidDataset``, ``NotFound`` or ``ModelUnavailable``.
    """

    def told(stage: str, total: int) -> Callable[[int], None]:
        return lambda current: on_progress(stage, current, total) if on_progress is not None else None

    patterns = Patterns(eye_pattern, patient_pattern)
    subject = choose_pairs(pairs, patterns, max_pairs, seed)
    loaded = None if base is None else load_base(base, device=device, models_dir=models_dir)
    real = None if reference is None else choose_pairs(reference, patterns, max_pairs, seed)
    report = score_alignment(subject, real, loaded, seed, told)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "alignment.json").write_text(json.dumps(report.to_dict(), indent=1) + "\n", encoding="utf-8")
        figure.draw(report).save(out / "alignment.png")
    return report


@dataclass(frozen=True)
class Patterns:
    """Regular expressions that find eyes and patients in pairs' names (see ``ingest.check``)."""

    eye: str | None = None
    patient: str | None = None


@dataclass(frozen=True)
class Chosen:
    """``count`` pairs of the ``available`` ones of a source, to be read once; ``patients`` maps eyes to known ones."""

    name: str
    digest: str
    available: int
    count: int
    pairs: Iterator[NamedImages]
    patients: Mapping[str, str]


def choose_pairs(path: Path, patterns: Patterns, max_pairs: int | None, seed: int) -> Chosen:
    """A seeded choice of at most ``max_pairs`` pairs of a folder, zip or checked data set (None: all), in its order.

    Raises ``InvalidDataset`` if there is one alone: every score compares pairs.
    """
    digest, listed, decoded = open_pairs(path, eye_pattern=patterns.eye, patient_pattern=patterns.patient)
    if len(listed) < 2:
        message = f"{path.name} has one pair; at least 2 can be measured"
        raise InvalidDataset(message, problems=(Problem(path.name, "too_few_pairs", message),))
    names = [pair.name for pair in listed]
    if max_pairs is not None and len(names) > max_pairs:
        names = random.Random(derive_seed(seed, "choose pairs")).sample(names, max_pairs)
    wanted = set(names)
    chosen = ((pair.name, pair.eye, images) for pair, images in decoded if pair.name in wanted)
    patients = {pair.eye: pair.patient for pair in listed if pair.patient is not None}
    return Chosen(path.name, digest, len(listed), len(wanted), chosen, patients)


def score_alignment(
    pairs: Chosen,
    reference: Chosen | None,
    base: Base | None,
    seed: int,
    told: Callable[[str, int], Callable[[int], None]],
) -> AlignmentReport:
    """Score the pairs and, as their ceiling, the reference after a round trip through the VAE of ``base``.

    With a base but no reference the pairs' own round trip is measured. ``told(stage, total)`` gives what to call with
    the number of pairs done.
    """
    kept: list[tuple[str, float, float]] = []
    opened: Iterable[NamedImages] = pairs.pairs
    if base is not None and reference is None:
        opened = _measured(opened, base, kept)
    scored = score_set(opened, seed=seed, patients=pairs.patients, on_progress=told("pairs", pairs.count))
    subject = Subject(pairs.name, pairs.digest, pairs.available, scored)
    ceiling = None
    if reference is not None:
        real = reference.pairs if base is None else through_vae(reference.pairs, base, kept)
        real_scored = score_set(
            real,
            seed=derive_seed(seed, "reference"),
            patients=reference.patients,
            on_progress=told("reference", reference.count),
        )
        ceiling = Subject(reference.name, reference.digest, reference.available, real_scored)
    measured = pairs if reference is None else reference
    return AlignmentReport(
        subject, ceiling, None if base is None else _vae_ceiling(base, kept, measured.patients, seed)
    )


def through_vae(
    pairs: Iterable[NamedImages], base: Base, kept: list[tuple[str, float, float]] | None = None
) -> Iterator[NamedImages]:
    """Each pair encoded and decoded by the VAE (posterior mean), with its valid masks as they were.

    ``kept`` collects (eye, vessel Dice of CF, of FA) before against after the round trip.
    """
    for name, eye, images in pairs:
        cf = round_trip(images.cf, base)
        fa = cv2.cvtColor(round_trip(np.repeat(images.fa[..., None], 3, axis=2), base), cv2.COLOR_RGB2GRAY)
        after = PairImages(cf, np.asarray(fa), images.valid_cf, images.valid_fa)
        if kept is not None:
            kept.append((eye, *_kept_vessels(images, after)))
        yield name, eye, after


def _measured(pairs: Iterable[NamedImages], base: Base, kept: list[tuple[str, float, float]]) -> Iterator[NamedImages]:
    """The pairs as they are, their round trips measured on the way."""
    for pair in pairs:
        list(through_vae([pair], base, kept))
        yield pair


def round_trip(image: Bytes, base: Base) -> Bytes:
    """One image (H, W, 3) u8 through the VAE; its rim is mirrored up to a multiple of the latent stride."""
    height, width = image.shape[:2]
    stride = base.latent_stride
    padded = cv2.copyMakeBorder(image, 0, -height % stride, 0, -width % stride, cv2.BORDER_REFLECT_101)
    tensor = torch.from_numpy(padded).permute(2, 0, 1)[None].to(torch.float32) / 127.5 - 1.0
    mean, _ = base.encode_images(tensor)
    decoded = base.decode(mean)[0].permute(1, 2, 0)[:height, :width]
    return np.asarray(((decoded + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu().numpy())


def _kept_vessels(before: PairImages, after: PairImages) -> tuple[float, float]:
    """Dice of the vessels of CF and of FA before against after, each inside its own field of view."""
    found = zip(pair_features(before), pair_features(after), strict=True)
    scores = [
        dice(vessels(a.ridges.astype(np.float32), a.field), vessels(b.ridges.astype(np.float32), a.field))
        for a, b in found
    ]
    return scores[0], scores[1]


def _vae_ceiling(
    base: Base, kept: list[tuple[str, float, float]], patients: Mapping[str, str], seed: int
) -> VaeCeiling:
    eyes = Eyes(tuple(eye for eye, _, _ in kept), patients)

    def of(values: list[float], label: str) -> Estimate:
        return estimate(np.array(values), eyes, seed=seed, label=label)

    cf, fa = of([cf for _, cf, _ in kept], "vae cf"), of([fa for _, _, fa in kept], "vae fa")
    return VaeCeiling(base.name, base.digest, cf, fa)
