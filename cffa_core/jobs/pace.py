"""How far a job is and when it will be done: pure functions over what the record says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from cffa_core.jobs.records import Progress
from cffa_core.jobs.spec import (
    AttentionSpec,
    CaptionedSpec,
    CaptionedTrainingSpec,
    EditSpec,
    EvaluationSpec,
    ExportSpec,
    GenerationSpec,
    JobSpec,
    PairGrid,
)
from cffa_core.jobs.state import JobState


@dataclass(frozen=True)
class UnitPace:
    """What a unit last reported. ``pace_since``/``pace_from``: when this stage began, and at which ``current``.

    ``seconds`` are those from its claim to its newest report.
    """

    index: int
    live: bool
    stage: str | None = None
    current: int = 0
    total: int = 0
    pace_from: int = 0
    pace_since: float | None = None
    reported_at: float | None = None
    seconds: float = 0.0

    @property
    def fraction(self) -> float:
        """Share of the stage that is done, 0..1."""
        return min(1.0, self.current / self.total) if self.total > 0 else 0.0

    @property
    def seconds_per_step(self) -> float | None:
        """Measured in this stage of this attempt; None until something was measured."""
        if self.pace_since is None or self.reported_at is None:
            return None
        done, seconds = self.current - self.pace_from, self.reported_at - self.pace_since
        return seconds / done if done > 0 and seconds > 0 else None


def job_progress(
    spec: JobSpec, state: JobState, settled: int, busy_seconds: float, work: Sequence[UnitPace]
) -> Progress:
    """Progress of a job from its unfinished work units (not the finalize unit).

    Generation counts pairs: committed ones plus the finished share of parts in hand. With a gate a pair counts when
    its slot is filled or given up (``settled``); the share of a part falls when pairs are refused, because it then has
    more to draw than it knew. Its rate is that of committed
    parts (``busy_seconds`` of one worker for ``settled`` pairs), before the first one that of the parts in hand,
    times the live workers. Training shows the stage its unit reports; time left is known only for the stage that
    counts the steps of the spec, since a validation or a preview says nothing about the rest. So it is with an
    evaluation, and with all that compute one report, whose stages differ: how long it takes is known from earlier ones
    (:func:`seconds_left`). An export counts parts, all alike.
    """
    if isinstance(spec, PairGrid):
        return _generation(spec, state, settled, busy_seconds, work)
    if isinstance(spec, EvaluationSpec | AttentionSpec | CaptionedSpec):
        return _evaluation(state, work)
    if isinstance(spec, ExportSpec):
        return _export(state, work)
    if state in (JobState.FINALIZING, JobState.SUCCEEDED):
        return Progress(state.value, spec.steps, spec.steps, 0.0)
    unit = work[0] if work else None
    if unit is None or unit.total <= 0:
        return Progress(state.value, 0, spec.steps, None)
    counts_steps = unit.total == spec.steps
    if not (unit.live and unit.stage):
        return Progress(state.value, unit.current if counts_steps else 0, spec.steps, None)
    step = unit.seconds_per_step
    eta = step * max(0, unit.total - unit.current) if counts_steps and step is not None else None
    return Progress(unit.stage, unit.current, unit.total, eta)


def _generation(
    spec: PairGrid, state: JobState, settled: int, busy_seconds: float, work: Sequence[UnitPace]
) -> Progress:
    count = len(spec.indices)
    if state in (JobState.FINALIZING, JobState.SUCCEEDED):
        return Progress(state.value, settled, count, 0.0)
    live = sorted((unit for unit in work if unit.live), key=lambda unit: unit.index)
    in_hand = sum(unit.fraction * len(spec.part_range(unit.index)) for unit in live)
    stage = next((unit.stage for unit in live if unit.stage), state.value)
    current = min(count, settled + int(in_hand))
    if not live:
        return Progress(stage, current, count, None)
    if settled > 0:
        per_pair: float | None = busy_seconds / settled
    else:
        rates = [
            step * unit.total / len(spec.part_range(unit.index))
            for unit in live
            if (step := unit.seconds_per_step) is not None
        ]
        per_pair = sum(rates) / len(rates) if rates else None
    left = max(0.0, count - settled - in_hand)
    return Progress(stage, current, count, per_pair * left / len(live) if per_pair is not None else None)


def _evaluation(state: JobState, work: Sequence[UnitPace]) -> Progress:
    if state in (JobState.FINALIZING, JobState.SUCCEEDED):
        return Progress(state.value, 1, 1, 0.0)
    unit = next((unit for unit in work if unit.live and unit.stage), None)
    return Progress(state.value) if unit is None else Progress(unit.stage or "", unit.current, unit.total)


def _export(state: JobState, work: Sequence[UnitPace]) -> Progress:
    shown = _evaluation(state, work)
    step = next((unit.seconds_per_step for unit in work if unit.live and unit.stage), None)
    return shown if step is None else replace(shown, eta_seconds=step * max(0, shown.total - shown.current))


def seconds_left(rate: float | None, work: Sequence[UnitPace]) -> float | None:
    """Time until an evaluation in hand is done, if those like it took ``rate`` seconds each; None if unknown.

    One that takes longer than they did says nothing instead of "now".
    """
    live = next((unit for unit in work if unit.live), None)
    if rate is None or live is None or live.seconds >= rate:
        return None
    return rate - live.seconds


@dataclass(frozen=True)
class Place:
    """Where a job with waiting units stands. Sizes are what is left: pairs, training steps, or one evaluation.

    ``position`` counts the jobs that were not begun, 1 = next (None for one that was begun). ``units`` and ``size`` are
    its own, ``units_before`` and ``size_before`` those that its owner has before it; ``others`` holds (units, size) of
    each other owner, ``in_hand`` the size of jobs whose units are all being worked on.
    """

    position: int | None
    units: int
    units_before: int
    size: float
    size_before: float
    others: tuple[tuple[int, float], ...] = ()
    in_hand: float = 0.0


def seconds_until_done(place: Place, rate: float | None, workers: int, cap: int = 0) -> float | None:
    """Estimated time until a waiting job has been worked through; None if no rate was measured or nobody works.

    ``rate`` is seconds of one worker per pair or step, ``cap`` how many units of one owner may run at a time (0: any
    number). While the owner's units up to the job's last are served, every other owner is served as many.
    """
    if rate is None or workers < 1:
        return None
    rounds = place.units_before + place.units
    theirs = sum(size * min(1.0, rounds / units) for units, size in place.others if units > 0)
    own = place.size_before + place.size
    most = min(workers, cap) if cap else workers
    # Neither faster than all workers can do it all, nor than the owner's share of them can do the owner's.
    everything = rate * (place.in_hand + own + theirs) / workers
    return max(everything, rate * own / most, rate * place.size / min(most, max(1, place.units)))


@dataclass(frozen=True)
class Measured:
    """What a job took: seconds of one worker for so many pairs, training steps or evaluations; ``spec`` as stored."""

    spec: dict[str, Any]
    seconds: float
    done: int


def measured_rate(spec: JobSpec, jobs: Sequence[Measured]) -> float | None:
    """Seconds of one worker per pair, step or whole job of ``spec``; None if nothing was measured.

    Jobs whose settings cost the same count alone, if there are any.
    """
    counted = [job for job in jobs if same_cost(spec, job.spec)] or jobs
    done = sum(job.done for job in counted)
    return sum(job.seconds for job in counted) / done if done > 0 else None


def same_cost(spec: JobSpec, other: dict[str, Any]) -> bool:
    """Whether a stored spec of the same kind costs about as much per pair, step or whole job as ``spec``."""
    if isinstance(spec, GenerationSpec):
        gate = None if spec.gate is None else spec.gate.model_dump(mode="json")
        mine = (spec.resolution, spec.sampler.steps, spec.sampler.guidance_scale > 1.0, gate)
        sampler = other["sampler"]
        return mine == (other["resolution"], sampler["steps"], sampler["guidance_scale"] > 1.0, other.get("gate"))
    if isinstance(spec, EvaluationSpec):
        own = (spec.extractor, spec.extractor_model, spec.base, spec.max_pairs, spec.train_dataset_id is None)
        settings = (other[name] for name in ("extractor", "extractor_model", "base", "max_pairs"))
        return own == (*settings, other["train_dataset_id"] is None)
    if isinstance(spec, ExportSpec):
        # What an export costs depends on how many pairs fit, which its spec alone does not say.
        return spec.form == other["form"] and spec.parts == tuple(tuple(run) for run in other["parts"])
    if isinstance(spec, EditSpec):
        edit = (spec.resolution, spec.steps, spec.skip, len(spec.edits))
        return edit == (other["resolution"], other["steps"], other["skip"], len(other["edits"]))
    if isinstance(spec, AttentionSpec):
        drawn = (spec.resolution, spec.sampler.steps, spec.sampler.guidance_scale > 1.0)
        sampler = other["sampler"]
        return drawn == (other["resolution"], sampler["steps"], sampler["guidance_scale"] > 1.0)
    if isinstance(spec, CaptionedSpec):
        images = len(other["texts"]) * other["images_per_text"]
        same = ("task", "ddim_steps", "use_diffusion", "dataset_id", "captions", "max_images")
        if any(getattr(spec, name) != other[name] for name in same):
            return False
        return bool(len(spec.texts) * spec.images_per_text == images)
    if isinstance(spec, CaptionedTrainingSpec):
        sizes = spec.sizes.model_dump(mode="json")
        return (spec.batch_size, spec.precision, sizes) == (other["batch_size"], other["precision"], other["sizes"])
    like = (spec.method.value, spec.base, spec.resolution, spec.batch_size, spec.gradient_accumulation)
    names = ("method", "base", "resolution", "batch_size", "gradient_accumulation")
    return like == tuple(other[name] for name in names)
