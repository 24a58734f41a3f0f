"""Progress and time left, against numbers worked out by hand."""

from __future__ import annotations

import pytest

from cffa_core.jobs.pace import (
    Measured,
    Place,
    UnitPace,
    job_progress,
    measured_rate,
    same_cost,
    seconds_left,
    seconds_until_done,
)
from cffa_core.jobs.records import Progress
from cffa_core.jobs.spec import (
    AttentionSpec,
    CaptionedSpec,
    CaptionedTrainingSpec,
    EvaluationSpec,
    GenerationSpec,
    TrainingSpec,
)
from cffa_core.jobs.state import JobState

TRAINING = TrainingSpec(dataset_id="ds_" + "0" * 20, steps=100)
GENERATION = GenerationSpec(model_id="mdl_" + "0" * 20, count=20, part_size=8)  # parts of 8, 8 and 4 pairs

ATTENTION = AttentionSpec(model_id="mdl_" + "0" * 20)
CAPTIONED_TRAINING = CaptionedTrainingSpec(dataset_id="ds_" + "0" * 20, steps=100)
DRAWN = CaptionedSpec(model_id="mdl_" + "0" * 20, task="text_to_image", texts=("a", "b"), images_per_text=3)
EVALUATION = EvaluationSpec(pairs_dataset_id="ds_" + "0" * 20, reference_dataset_id="ds_" + "1" * 20)


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


def test_an_evaluation_shows_its_stage() -> None:
    unit = pace(stage="reference", current=4, total=12)
    assert job_progress(EVALUATION, JobState.RUNNING, 0, 0.0, [unit]) == Progress("reference", 4, 12, None)
    assert job_progress(EVALUATION, JobState.QUEUED, 0, 0.0, []) == Progress("queued", 0, 0, None)
    assert job_progress(EVALUATION, JobState.SUCCEEDED, 0, 9.0, []) == Progress("succeeded", 1, 1, 0.0)


@pytest.mark.parametrize("spec", [ATTENTION, DRAWN])
def test_a_report_in_the_making_shows_its_stage(spec: AttentionSpec | CaptionedSpec) -> None:
    unit = pace(stage="sampling", current=3, total=50, pace_from=0, pace_since=1000.0, reported_at=1060.0)
    assert job_progress(spec, JobState.RUNNING, 0, 0.0, [unit]) == Progress("sampling", 3, 50, None)
    assert job_progress(spec, JobState.SUCCEEDED, 0, 0.0, []) == Progress("succeeded", 1, 1, 0.0)


def test_a_captioned_training_counts_its_steps() -> None:
    unit = pace(stage="training", current=40, total=100, pace_from=10, pace_since=1000.0, reported_at=1060.0)
    assert job_progress(CAPTIONED_TRAINING, JobState.RUNNING, 0, 0.0, [unit]) == Progress("training", 40, 100, 120.0)


def test_time_left_of_an_evaluation_follows_from_those_before_it() -> None:
    assert seconds_left(100.0, [pace(seconds=30.0)]) == 70.0
    assert seconds_left(None, [pace(seconds=30.0)]) is None
    assert seconds_left(100.0, [pace(seconds=130.0)]) is None
    assert seconds_left(100.0, [pace(live=False, seconds=30.0)]) is None


def test_without_a_rate_or_a_worker_nothing_is_promised() -> None:
    place = Place(position=1, units=2, units_before=0, size=8.0, size_before=0.0)
    assert seconds_until_done(place, None, 3) is None
    assert seconds_until_done(place, 2.0, 0) is None


def test_an_owner_alone_waits_for_what_stands_before() -> None:
    # 12 pairs of its own jobs before, 8 of this one, 4 in hand: 24 pairs at 2 s on 3 workers.
    place = Place(position=2, units=2, units_before=3, size=8.0, size_before=12.0, in_hand=4.0)
    assert seconds_until_done(place, 2.0, 3) == pytest.approx(16.0)


def test_other_owners_are_served_as_often_as_this_one() -> None:
    # Its two units are done when 2 of the other's 10 units are (8 of 40 pairs), and all 4 pairs of the third.
    others = ((10, 40.0), (1, 4.0))
    place = Place(position=1, units=2, units_before=0, size=8.0, size_before=0.0, others=others)
    assert seconds_until_done(place, 3.0, 1) == pytest.approx(3.0 * (8 + 8 + 4))


def test_a_job_is_not_faster_than_its_units_or_its_owners_cap_allow() -> None:
    one_unit = Place(position=1, units=1, units_before=0, size=10.0, size_before=0.0)
    assert seconds_until_done(one_unit, 1.0, 5) == pytest.approx(10.0)
    many = Place(position=1, units=10, units_before=0, size=10.0, size_before=10.0)
    assert seconds_until_done(many, 1.0, 5) == pytest.approx(4.0)
    assert seconds_until_done(many, 1.0, 5, cap=2) == pytest.approx(10.0)


def test_like_settings_cost_the_same() -> None:
    stored = GENERATION.model_dump(mode="json")
    assert same_cost(GENERATION.model_copy(update={"seed": 7, "count": 9}), stored)
    assert not same_cost(GENERATION.model_copy(update={"resolution": 256}), stored)
    assert not same_cost(GENERATION, stored | {"sampler": stored["sampler"] | {"steps": 7}})
    trained = TRAINING.model_dump(mode="json")
    assert same_cost(TRAINING.model_copy(update={"steps": 9}), trained)
    assert not same_cost(TRAINING.model_copy(update={"batch_size": 9}), trained)
    evaluated = EVALUATION.model_dump(mode="json")
    assert same_cost(EVALUATION.model_copy(update={"seed": 7}), evaluated)
    assert not same_cost(EVALUATION.model_copy(update={"max_pairs": 9}), evaluated)
    assert not same_cost(EVALUATION.model_copy(update={"train_dataset_id": "ds_" + "2" * 20}), evaluated)
    looked = ATTENTION.model_dump(mode="json")
    assert same_cost(ATTENTION.model_copy(update={"seed": 7, "tokens": ("eye",)}), looked)
    assert not same_cost(ATTENTION.model_copy(update={"resolution": 256}), looked)
    drawn = DRAWN.model_dump(mode="json")
    assert same_cost(DRAWN.model_copy(update={"texts": ("c",), "images_per_text": 6}), drawn)
    assert not same_cost(DRAWN.model_copy(update={"images_per_text": 6}), drawn)
    assert not same_cost(DRAWN.model_copy(update={"use_diffusion": False}), drawn)
    learnt = CAPTIONED_TRAINING.model_dump(mode="json")
    assert same_cost(CAPTIONED_TRAINING.model_copy(update={"steps": 9}), learnt)
    assert not same_cost(CAPTIONED_TRAINING.model_copy(update={"batch_size": 9}), learnt)


def test_a_rate_comes_from_like_jobs_or_else_from_all() -> None:
    stored = GENERATION.model_dump(mode="json")
    large = stored | {"resolution": 1024}
    assert measured_rate(GENERATION, []) is None
    assert measured_rate(GENERATION, [Measured(large, 90.0, 10), Measured(large, 30.0, 2)]) == pytest.approx(10.0)
    assert measured_rate(GENERATION, [Measured(large, 90.0, 10), Measured(stored, 30.0, 10)]) == pytest.approx(3.0)
