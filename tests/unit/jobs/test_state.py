"""The transitions of jobs, against a table written down by hand from the design."""

from __future__ import annotations

import pytest

from cffa_core.jobs.state import TERMINAL, JobState, UnitKind, UnitState, derive, may_follow

J, U = JobState, UnitState
PART, FINALIZE = UnitKind.PART, UnitKind.FINALIZE


@pytest.mark.parametrize(
    ("job", "parts", "finalize", "expected"),
    [
        (J.QUEUED, [U.QUEUED, U.QUEUED], None, J.QUEUED),
        (J.QUEUED, [U.RUNNING, U.QUEUED], None, J.RUNNING),
        (J.RUNNING, [U.DONE, U.QUEUED], None, J.RUNNING),
        (J.RUNNING, [U.QUEUED, U.QUEUED], None, J.QUEUED),
        (J.RUNNING, [U.DONE, U.DONE], U.QUEUED, J.FINALIZING),
        (J.FINALIZING, [U.DONE], U.RUNNING, J.FINALIZING),
        (J.FINALIZING, [U.DONE], U.DONE, J.SUCCEEDED),
        (J.RUNNING, [U.DONE, U.FAILED, U.RUNNING], None, J.FAILED),
        (J.FINALIZING, [U.DONE], U.FAILED, J.FAILED),
        (J.CANCELING, [U.RUNNING, U.DONE], None, J.CANCELING),
        (J.CANCELING, [U.QUEUED, U.DONE], None, J.CANCELED),
        (J.CANCELING, [U.FAILED], None, J.CANCELED),
        (J.CANCELING, [U.DONE], U.RUNNING, J.CANCELING),
        (J.PAUSING, [U.RUNNING, U.QUEUED], None, J.PAUSING),
        (J.PAUSING, [U.DONE, U.QUEUED], None, J.PAUSED),
        (J.PAUSING, [U.DONE], U.QUEUED, J.FINALIZING),
        (J.PAUSED, [U.DONE, U.QUEUED], None, J.PAUSED),
        (J.QUEUED, [U.DONE, U.QUEUED], None, J.RUNNING),
    ],
)
def test_a_job_follows_its_units(job: J, parts: list[U], finalize: U | None, expected: J) -> None:
    units = [(PART, state) for state in parts] + ([(FINALIZE, finalize)] if finalize else [])
    assert derive(job, units) is expected
    assert expected is job or may_follow(job, expected)


@pytest.mark.parametrize("state", sorted(TERMINAL))
def test_nothing_moves_a_job_that_is_over(state: J) -> None:
    assert derive(state, [(PART, U.RUNNING), (FINALIZE, U.DONE)]) is state


def test_only_retry_and_expiry_lead_out_of_the_end() -> None:
    ways = {(before, after) for before in TERMINAL for after in J if may_follow(before, after)}
    assert ways == {
        (J.SUCCEEDED, J.EXPIRED),
        (J.FAILED, J.EXPIRED),
        (J.FAILED, J.QUEUED),
        (J.CANCELED, J.EXPIRED),
        (J.CANCELED, J.QUEUED),
    }
