"""How far a job is, when it will be done, and how many go before it: pure functions over rows of the record."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cffa_core.jobs.records import Progress
from cffa_core.jobs.spec import GenerationSpec, JobSpec
from cffa_core.jobs.state import JobState


@dataclass(frozen=True)
class UnitPace:
    """What a unit last reported. ``pace_since``/``pace_from``: when this stage began, and at which ``current``."""

    index: int
    live: bool
    stage: str | None = None
    current: int = 0
    total: int = 0
    pace_from: int = 0
    pace_since: float | None = None
    reported_at: float | None = None

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
    spec: JobSpec, state: JobState, generated: int, busy_seconds: float, work: Sequence[UnitPace]
) -> Progress:
    """Progress of a job from its unfinished work units (not the finalize unit).

    Generation counts pairs: committed ones plus the finished share of parts in hand; its rate is that of committed
    parts (``busy_seconds`` of one worker for ``generated`` pairs), before the first one that of the parts in hand,
    times the live workers. Training shows the stage its unit reports; time left is known only for the stage that
    counts the steps of the spec, since a validation or a preview says nothing about the rest.
    """
    if isinstance(spec, GenerationSpec):
        return _generation(spec, state, generated, busy_seconds, work)
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
    spec: GenerationSpec, state: JobState, generated: int, busy_seconds: float, work: Sequence[UnitPace]
) -> Progress:
    if state in (JobState.FINALIZING, JobState.SUCCEEDED):
        return Progress(state.value, generated, spec.count, 0.0)
    live = sorted((unit for unit in work if unit.live), key=lambda unit: unit.index)
    in_hand = sum(unit.fraction * len(spec.part_range(unit.index)) for unit in live)
    stage = next((unit.stage for unit in live if unit.stage), state.value)
    current = min(spec.count, generated + int(in_hand))
    if not live:
        return Progress(stage, current, spec.count, None)
    if generated > 0:
        per_pair: float | None = busy_seconds / generated
    else:
        rates = [
            step * unit.total / len(spec.part_range(unit.index))
            for unit in live
            if (step := unit.seconds_per_step) is not None
        ]
        per_pair = sum(rates) / len(rates) if rates else None
    left = max(0.0, spec.count - generated - in_hand)
    return Progress(stage, current, spec.count, per_pair * left / len(live) if per_pair is not None else None)


@dataclass(frozen=True)
class Waiting:
    """A queued job in the order of service: ``turn`` is when its owner was last served."""

    job_id: str
    owner: str
    turn: int
    priority: int
    number: int


def queue_positions(waiting: Iterable[Waiting]) -> dict[str, int]:
    """Position of every queued job of one kind, 1 = next, under round robin between owners.

    Owners take turns, the least recently served first; an owner's own jobs go by priority, then age.
    """
    by_owner: dict[tuple[int, str], list[Waiting]] = defaultdict(list)
    for job in waiting:
        by_owner[job.turn, job.owner].append(job)
    positions: dict[str, int] = {}
    lengths = {owner: len(jobs) for owner, jobs in by_owner.items()}
    for owner, jobs in by_owner.items():
        for round_, job in enumerate(sorted(jobs, key=lambda job: (-job.priority, job.number))):
            ahead = sum(min(length, round_ + (other < owner)) for other, length in lengths.items() if other != owner)
            positions[job.job_id] = ahead + round_ + 1
    return positions
