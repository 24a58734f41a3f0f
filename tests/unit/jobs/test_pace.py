"""Progress, time left and queue positions, against numbers worked out by hand."""

from __future__ import annotations

import pytest

from cffa_core.jobs.pace import UnitPace, Waiting, job_progress, queue_positions
from cffa_core.jobs.records import Progress
from cffa_core.jobs.spec import GenerationSpec, TrainingSpec
from cffa_core.jobs.state import JobState

TRAINING = TrainingSpec(dataset_id="ds_" + "0" * 20, steps=100)
GENERATION = GenerationSpec(model_id="mdl_" + "0" * 20, count=20, part_size=8)  # parts of 8, 8 and 4 pairs


def pace(index: int = 0, **changes: object) -> UnitPace:
    return UnitPace(**({"index": index, "live": True} | changes))  # type: ignore[arg-type]


def test_training_shows_its_stage_and_extrapolates_it() -> None:
    # 30 steps in 60 s since the stage was entered at step 10: 2 s a step, 60 steps left.
    unit = pace(stage="training", current=40, total=100, pace_from=10, pace_since=1000.0, reported_at=1060.0)
    assert job_progress(TRAINING, JobState.RUNNING, 0, 0.0, [unit]) == Progress("training", 40, 100, 120.0)


@pytest.mark.parametrize(
    "unit",
    [
        pace(stage="training", current=40, total=100),
        pace(stage="training", current=40, total=100, pace_from=40, pace_since=1000.0, reported_at=1060.0),
        pace(stage="training", current=40, total=100, pace_from=10, pace_since=1000.0, reported_at=1000.0),
    ],
)
def test_no_time_is_promised_before_a_rate_was_measured(unit: UnitPace) -> None:
    assert job_progress(TRAINING, JobState.RUNNING, 0, 0.0, [unit]).eta_seconds is None


def test_a_stage_beside_training_is_shown_without_a_time_for_the_whole() -> None:
    unit = pace(stage="validation", current=4, total=12, pace_from=0, pace_since=1000.0, reported_at=1060.0)
    assert job_progress(TRAINING, JobState.RUNNING, 0, 0.0, [unit]) == Progress("validation", 4, 12, None)
    waiting = pace(live=False, stage="validation", current=4, total=12)
    assert job_progress(TRAINING, JobState.PAUSED, 0, 0.0, [waiting]) == Progress("paused", 0, 100, None)


def test_training_that_waits_again_keeps_how_far_it_got() -> None:
    unit = pace(live=False, stage="training", current=40, total=100, pace_since=1.0, reported_at=2.0)
    assert job_progress(TRAINING, JobState.PAUSED, 0, 0.0, [unit]) == Progress("paused", 40, 100, None)


def test_training_not_yet_reported_stands_at_zero_of_its_steps() -> None:
    assert job_progress(TRAINING, JobState.QUEUED, 0, 0.0, []) == Progress("queued", 0, 100, None)


@pytest.mark.parametrize("state", [JobState.FINALIZING, JobState.SUCCEEDED])
def test_finished_work_is_complete(state: JobState) -> None:
    assert job_progress(TRAINING, state, 0, 0.0, []) == Progress(state.value, 100, 100, 0.0)
    assert job_progress(GENERATION, state, 20, 50.0, []) == Progress(state.value, 20, 20, 0.0)


def test_generation_adds_the_finished_share_of_parts_in_hand() -> None:
    # 8 committed in 40 s: 5 s a pair. In hand: half of 8, a quarter of 4. Left 20 - 8 - 5 = 7 pairs on 2 workers.
    units = [pace(2, stage="sampling", current=10, total=40), pace(1, stage="sampling", current=20, total=40)]
    found = job_progress(GENERATION, JobState.RUNNING, 8, 40.0, units)
    assert found == Progress("sampling", 13, 20, 17.5)


def test_before_the_first_part_the_parts_in_hand_give_the_rate() -> None:
    # 10 of 40 steps of an 8-pair part in 20 s: 80 s a part, 10 s a pair; 18 pairs left on one worker.
    unit = pace(0, stage="sampling", current=10, total=40, pace_from=0, pace_since=100.0, reported_at=120.0)
    assert job_progress(GENERATION, JobState.RUNNING, 0, 0.0, [unit]) == Progress("sampling", 2, 20, 180.0)


def test_generation_without_a_worker_promises_nothing() -> None:
    assert job_progress(GENERATION, JobState.RUNNING, 8, 40.0, []) == Progress("running", 8, 20, None)


def test_a_stage_past_its_total_counts_once() -> None:
    assert pace(current=90, total=40).fraction == 1.0


def test_positions_are_those_of_a_round_robin() -> None:
    # b was served longest ago, then a, then c. Rounds: b1 a1 c1 | b2 a2 | a3
    waiting = [
        Waiting("a1", "a", 5, 0, 1),
        Waiting("a2", "a", 5, 0, 2),
        Waiting("a3", "a", 5, -1, 0),
        Waiting("b2", "b", 2, 0, 9),
        Waiting("b1", "b", 2, 7, 10),
        Waiting("c1", "c", 8, 99, 3),
    ]
    assert queue_positions(waiting) == {"b1": 1, "a1": 2, "c1": 3, "b2": 4, "a2": 5, "a3": 6}


def test_owners_with_equal_turns_go_by_name() -> None:
    assert queue_positions([Waiting("x", "b", 0, 0, 1), Waiting("y", "a", 0, 0, 2)]) == {"y": 1, "x": 2}
