"""What an export job is posted on: a job of the same owner that makes pairs, and those of its parts that are finished.

The parts are written into the spec when the job is posted, so that the same spec gives the same archives while the
job still runs. Which pairs fit a selection by score is found out by the worker, who reads them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import sqlalchemy as sa

from cffa_core.errors import Conflict, Expired, InvalidSpec, NotFound, Problem
from cffa_core.jobs.schema import jobs, units
from cffa_core.jobs.spec import EditSpec, ExportSpec, GenerationSpec, Kind, PairGrid, SelectionSpec, parse_spec
from cffa_core.jobs.state import JobState, UnitKind, UnitState

NAMED = 5


def with_finished_parts(connection: sa.Connection, owner: str, spec: ExportSpec) -> ExportSpec:
    """The spec with the finished parts that its selection touches.

    Raises ``NotFound`` for another owner's job, ``Conflict`` for one that makes no pairs or has none finished,
    ``Expired`` for one whose products were removed, and ``InvalidSpec`` for a selection that no finished pair can meet.
    """
    job_id = spec.generation_job_id
    row = connection.execute(
        sa.select(jobs.c.kind, jobs.c.state, jobs.c.spec).where(jobs.c.id == job_id, jobs.c.owner == owner)
    ).one_or_none()
    if row is None:
        raise NotFound(f"no job {job_id}")
    grid = parse_spec(row.spec)
    if not isinstance(grid, PairGrid):
        raise Conflict(
            f"job {job_id} is a {row.kind} job; only the pairs of a generation job or an edit can be exported"
        )
    if spec.form == "dicom" and isinstance(grid, EditSpec):
        _require_synthetic(connection, owner, grid)
    if row.state == JobState.EXPIRED.value:
        raise Expired(f"the products of job {job_id} were removed by retention")
    finished = connection.scalars(
        sa.select(units.c.idx)
        .where(units.c.job_id == job_id, units.c.kind == UnitKind.PART.value, units.c.state == UnitState.DONE.value)
        .order_by(units.c.idx)
    ).all()
    if not finished:
        raise Conflict(f"job {job_id} is {row.state} and has no finished part; post this again when it has one")
    _refuse_unmet(grid, spec.selection, set(finished))
    touched = [part for part in finished if _touches(grid, spec.selection, part)]
    if not touched:
        message = "no finished pair is in this range; name pairs of finished parts"
        raise InvalidSpec(message, problems=(Problem("/selection", "nothing_selected", message),))
    return spec.model_copy(update={"parts": tuple(runs(touched))})


def _require_synthetic(connection: sa.Connection, owner: str, edit: EditSpec) -> None:
    """Raise ``InvalidSpec`` for edits of a data set or of other edits, which may show a patient.

    The worker, who reads the manifest, has the last word: the edited job may be gone.
    """
    kind = connection.scalar(sa.select(jobs.c.kind).where(jobs.c.id == edit.generation_job_id, jobs.c.owner == owner))
    if edit.dataset_id is not None or kind == Kind.EDIT.value:
        message = "edits of a data set, or of earlier edits, may show a patient; take form zip or webdataset"
        raise InvalidSpec(message, problems=(Problem("/form", "not_synthetic", message),))


def runs(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Rising numbers as runs, first and last inclusive: ``0 1 2 5`` is ``(0, 2) (5, 5)``."""
    begin = None
    for before, number in zip([None, *numbers], numbers, strict=False):
        if begin is None or before is None:
            begin = number
        elif number != before + 1:
            yield begin, before
            begin = number
    if begin is not None:
        yield begin, numbers[-1]


def numbers_of(parts: Iterable[tuple[int, int]]) -> list[int]:
    """Inverse of :func:`runs`."""
    return [number for first, last in parts for number in range(first, last + 1)]


def _touches(grid: PairGrid, selection: SelectionSpec, part: int) -> bool:
    indices = grid.part_range(part)
    if selection.indices is not None:
        return any(selection.spans(index) for index in indices)
    begin, end = selection.first or 0, selection.last
    return indices[-1] >= begin and (end is None or indices[0] <= end)


def _refuse_unmet(grid: PairGrid, selection: SelectionSpec, finished: set[int]) -> None:
    """Raise ``InvalidSpec`` for pairs by name that are not there (yet), and for a gate that the job has not."""
    problems: list[Problem] = []
    named = selection.indices or ()
    parts = {index: grid.part_of(index) for index in named}
    if beyond := [index for index, part in parts.items() if part is None]:
        message = f"the job does not make the pairs {_listed(beyond)}; it has {len(grid.indices)} pairs"
        problems.append(Problem("/selection/indices", "out_of_range", message))
    elif missing := [index for index, part in parts.items() if part not in finished]:
        message = f"these pairs are not made yet: {_listed(missing)}; leave them out, or post this again later"
        problems.append(Problem("/selection/indices", "not_made", message))
    if selection.first is not None and selection.first > grid.indices[-1]:
        message = f"the last pair of the job is {grid.indices[-1]}"
        problems.append(Problem("/selection/first", "out_of_range", message))
    if selection.accepted_only and not (isinstance(grid, GenerationSpec) and grid.gate is not None):
        message = "the job has no gate, so none of its pairs was accepted or rejected; select by min_alignment"
        problems.append(Problem("/selection/accepted_only", "no_gate", message))
    if problems:
        raise InvalidSpec("the selection names pairs that are not there", problems=tuple(problems))


def _listed(indices: Sequence[int]) -> str:
    more = f" and {len(indices) - NAMED} more" if len(indices) > NAMED else ""
    return ", ".join(map(str, indices[:NAMED])) + more
