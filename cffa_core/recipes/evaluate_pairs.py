"""Evaluate a set of pairs in full: alignment, fidelity, diversity and memorisation, and write the report.

A readable script over ``evaluation``: every set is read once, and what the measures need of a pair is taken as it
comes by. Pairs of a trained model are generated first, by whoever asks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from cffa_core.evaluation import figure, pictures
from cffa_core.evaluation.diversity import diversity
from cffa_core.evaluation.evaluation_report import EvaluationReport, TrainingSet
from cffa_core.evaluation.features import DEFAULT, Collector, load_extractor
from cffa_core.evaluation.fidelity import fidelity
from cffa_core.evaluation.memorisation import Thumbnails, memorisation, thumbnail
from cffa_core.evaluation.pictures import Preview, preview
from cffa_core.evaluation.report import Subject
from cffa_core.models.base import load_base
from cffa_core.recipes.evaluate import (
    MAX_PAIRS,
    Chosen,
    NamedImages,
    OnProgress,
    Patterns,
    choose_pairs,
    score_alignment,
)


@dataclass
class Seen:
    """What is kept of each pair of a set while it is read: features, thumbnails, previews, as far as needed."""

    features: Collector | None = None
    keep_thumbnails: bool = True
    keep_previews: bool = True
    names: list[str] = field(default_factory=list)
    thumbnails: list[Thumbnails] = field(default_factory=list)
    previews: list[Preview] = field(default_factory=list)

    def watch(self, pairs: Iterator[NamedImages]) -> Iterator[NamedImages]:
        """The pairs as they are."""
        for name, eye, images in pairs:
            self.names.append(name)
            if self.features is not None:
                self.features.add(eye, images)
            if self.keep_thumbnails:
                self.thumbnails.append(thumbnail(images))
            if self.keep_previews:
                self.previews.append(preview(images))
            yield name, eye, images


def evaluate_pairs(
    pairs: Path,
    *,
    reference: Path,
    train: Path | None = None,
    base: str | None = "tiny",
    extractor: str = DEFAULT,
    extractor_folder: Path | None = None,
    out: Path | None = None,
    on_progress: OnProgress | None = None,
    eye_pattern: str | None = None,
    patient_pattern: str | None = None,
    max_pairs: int = MAX_PAIRS,
    seed: int = 0,
    device: str = "cpu",
    models_dir: Path | None = None,
) -> EvaluationReport:
    """Measure ``pairs`` against held-out real pairs (``reference``) and against the training pairs (``train``).

    All three are folders or zips in any layout, or checked data sets. Alignment is normalised by the reference, which
    goes through the VAE of ``base`` for this; fidelity and diversity take it as it is, with ``extractor`` (``filters``,
    or ``vit`` from ``extractor_folder``). Of more than ``max_pairs`` pairs or reference pairs a seeded choice is
    measured; all training pairs are searched. ``eye_pattern`` and ``patient_pattern`` find eyes and patients of all
    sets (see ``ingest.check``); intervals are over patients where they are known, else over eyes. ``out`` gets
    report.json, report.md and the pictures. Raises ``InvalidDataset``, ``InvalidSpec``, ``NotFound`` or
    ``ModelUnavailable``; a score with too few pairs behind it is refused in the report instead.
    """

    def told(stage: str, total: int) -> Callable[[int], None]:
        return lambda current: on_progress(stage, current, total) if on_progress is not None else None

    def counted(stage: str) -> Callable[[int, int], None]:
        return lambda current, total: on_progress(stage, current, total) if on_progress is not None else None

    extract = load_extractor(extractor, folder=extractor_folder, device=device)
    loaded = None if base is None else load_base(base, device=device, models_dir=models_dir)
    patterns = Patterns(eye_pattern, patient_pattern)
    subject = choose_pairs(pairs, patterns, max_pairs, seed)
    others = choose_pairs(reference, patterns, max_pairs, seed)
    learnt = None if train is None else choose_pairs(train, patterns, None, seed)
    ours, real = Collector(extract, subject.patients), Collector(extract, others.patients)
    seen = Seen(ours, keep_thumbnails=train is not None, keep_previews=out is not None)
    held_out = Seen(real, keep_thumbnails=train is not None, keep_previews=False)
    alignment = score_alignment(
        replace(subject, pairs=seen.watch(subject.pairs)),
        replace(others, pairs=held_out.watch(others.pairs)),
        loaded,
        seed,
        told,
    )
    assert alignment.ceiling is not None
    training, found = None, None
    known = Seen(keep_previews=out is not None)
    if learnt is not None:
        _read(learnt, known, told)
        training = TrainingSet(learnt.name, learnt.digest, tuple(known.names))
        found = memorisation(
            np.stack(seen.thumbnails),
            alignment.pairs.scored.whose,
            np.stack(held_out.thumbnails),
            np.stack(known.thumbnails),
            seed=seed,
            on_progress=counted("neighbours"),
        )
    ours_found, real_found = ours.result(), real.result()
    report = EvaluationReport(
        alignment=alignment,
        reference=Subject(others.name, others.digest, others.available, alignment.ceiling.scored),
        extractor={
            "name": extract.name,
            "sha256": extract.sha256,
            "cf": ours_found.cf.shape[1],
            "fa": ours_found.fa.shape[1],
        },
        fidelity=fidelity(ours_found, real_found, seed=seed, on_measure=counted("fidelity")),
        diversity=diversity(ours_found, real_found, seed=seed, on_measure=counted("diversity")),
        train=training,
        memorisation=found,
    )
    if out is not None:
        write_report(report, seen, known, out)
    return report


def _read(chosen: Chosen, seen: Seen, told: Callable[[str, int], Callable[[int], None]]) -> None:
    on_pair = told("training pairs", chosen.count)
    for number, _ in enumerate(seen.watch(chosen.pairs)):
        on_pair(number + 1)


def write_report(report: EvaluationReport, seen: Seen, known: Seen, out: Path) -> None:
    """Write report.json, report.md and the pictures into ``out``; report.json last, so that it marks a whole report."""
    out.mkdir(parents=True, exist_ok=True)
    scored = report.alignment.pairs.scored
    figure.draw(report.alignment).save(out / "alignment.png")
    drawn = {"alignment": "alignment.png"}
    if pictures.draw_pairs(scored, seen.previews, out / "pairs.png") is not None:
        drawn["pairs"] = "pairs.png"
    found = report.memorisation
    if found is not None:
        pictures.draw_distances(found, out / "memorisation.png")
        pictures.draw_neighbours(found, seen.names, seen.previews, known.names, known.previews, out / "neighbours.png")
        drawn |= {"memorisation": "memorisation.png", "neighbours": "neighbours.png"}
    (out / "report.md").write_text(report.markdown(drawn), encoding="utf-8")
    (out / "report.json").write_text(json.dumps(report.to_dict(), indent=1) + "\n", encoding="utf-8")
