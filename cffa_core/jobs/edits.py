"""What an edit job is posted on: pairs of a data set, or of a succeeded job that made pairs, and a model that can edit.

How many they are is written into the spec when the job is posted. Which they are follows from the spec and the record,
since neither a data set nor a succeeded job ever changes; a worker asks again for each part, so that a spec of 100,000
pairs holds no list of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import sqlalchemy as sa

from cffa_core.errors import InvalidSpec, NotFound, Problem
from cffa_core.jobs.catalog import get_dataset, get_model
from cffa_core.jobs.model_inputs import unfit_family
from cffa_core.jobs.records import StoredFiles
from cffa_core.jobs.schema import jobs, units
from cffa_core.jobs.spec import EditSpec, GenerationSpec, Kind, Method, PairGrid, parse_spec
from cffa_core.jobs.state import JobState, UnitKind, UnitState

MAKE_PAIRS = (Kind.GENERATION, Kind.EDIT)
"""Kinds whose product are pairs."""
CAN_EDIT = (Method.DUAL_UNET, Method.SHARED_ATTENTION)
"""Methods whose model takes CF and FA as rows of one forward, each with its own prompt (`editing.denoiser`)."""
MODALITIES = ("cf", "fa")
NAMED = 5


def with_count(connection: sa.Connection, owner: str, spec: EditSpec) -> EditSpec:
    """The spec with the number of its pairs.

    Raises :class:`InvalidSpec` with every problem at once: ids that are not there or not the owner's, a model that
    makes no pairs, a job that is not over or makes none, pairs that are not in it, a ``count`` that is another.
    """
    problems = _unfit_model(connection, owner, spec)
    found: int | None
    if spec.dataset_id is not None:
        found, wrong = _of_dataset(connection, owner, spec)
    else:
        found, wrong = _of_job(connection, owner, spec)
    problems += wrong
    if found is not None and spec.count not in (0, found):
        message = f"there are {found} pairs to edit, not {spec.count}; leave count out"
        problems.append(Problem("/count", "count", message))
    if problems:
        raise InvalidSpec("the edit names something that it cannot use", problems=tuple(problems))
    return spec.model_copy(update={"count": found})


def names_in(stored: StoredFiles) -> list[str]:
    """Names of the pairs of a data set, sorted: the order in which an edit of all of them counts."""
    found = (name.removeprefix("cf/").removesuffix(".png") for name in stored.files if name.startswith("cf/"))
    return sorted(found)


def _unfit_model(connection: sa.Connection, owner: str, spec: EditSpec) -> list[Problem]:
    if spec.model_id is None:
        return []  # the base alone; whether a worker has it, only the worker knows
    try:
        card = get_model(connection, owner, spec.model_id).card
    except NotFound as error:
        return [Problem("/model_id", "not_found", f"{error.message}; name one of your own")]
    if problems := unfit_family(connection, owner, spec.model_id, captioned=False):
        return problems
    method = card.get("method")
    trained = card.get("settings", {}).get("modalities", MODALITIES)
    # A card that does not say its method is an old one; the worker reads the model itself.
    if method in (None, *CAN_EDIT) and len(trained) == len(MODALITIES):
        return []
    message = (
        f"model {spec.model_id}, of method {method} and trained on {', '.join(trained)}, cannot edit; name one of "
        f"method {' or '.join(CAN_EDIT)} that was trained on both images, or leave model_id out: the base edits alone"
    )
    return [Problem("/model_id", "cannot_edit", message)]


def _of_dataset(connection: sa.Connection, owner: str, spec: EditSpec) -> tuple[int | None, list[Problem]]:
    """Number of pairs of a data set that are edited, and what is wrong; None where the number is not known."""
    assert spec.dataset_id is not None
    try:
        stored = get_dataset(connection, owner, spec.dataset_id).stored
    except NotFound as error:
        return None, [Problem("/dataset_id", "not_found", f"{error.message}; name one of your own")]
    there = names_in(stored)
    if not there:
        return None, [Problem("/dataset_id", "no_pairs", f"data set {spec.dataset_id} has no pairs to edit")]
    if missing := sorted(set(spec.names or ()) - set(there)):
        message = f"data set {spec.dataset_id} has no pair {_listed(missing)}; its report lists what it has"
        return None, [Problem("/names", "no_such_pair", message)]
    chosen = spec.names or there
    masks = f"masks/{spec.area}"
    if spec.area is not None and (bare := [name for name in chosen if f"{masks}/{name}.png" not in stored.files]):
        message = f"no mask {spec.area} came with {_listed(bare)}; upload {masks}/NAME.png with each pair"
        return None, [Problem("/area", "missing_mask", message)]
    return len(chosen), []


def _of_job(connection: sa.Connection, owner: str, spec: EditSpec) -> tuple[int | None, list[Problem]]:
    """Number of pairs of a job that are edited, and what is wrong; None where the number is not known."""
    pointer, job_id = "/generation_job_id", spec.generation_job_id
    row = connection.execute(
        sa.select(jobs.c.kind, jobs.c.state, jobs.c.spec).where(jobs.c.id == job_id, jobs.c.owner == owner)
    ).one_or_none()
    if row is None:
        return None, [Problem(pointer, "not_found", f"no job {job_id}; name one of your own")]
    if row.kind not in MAKE_PAIRS:
        message = f"job {job_id} is a {row.kind} job; name one that makes pairs, of kind generation or edit"
        return None, [Problem(pointer, "not_a_generation_job", message)]
    if row.state == JobState.EXPIRED.value:
        message = f"the pairs of job {job_id} were removed by retention; make them again"
        return None, [Problem(pointer, "expired", message)]
    if row.state != JobState.SUCCEEDED.value:
        message = f"job {job_id} is {row.state}; post this again when it has succeeded"
        return None, [Problem(pointer, "not_succeeded", message)]
    made = _made(connection, str(job_id), row.spec)
    if not made:
        return None, [Problem(pointer, "no_pairs", f"the gate of job {job_id} has let no pair through")]
    if spec.pair_indices is None:
        return len(made), []
    if missing := sorted(index for index in spec.pair_indices if index not in made):
        message = f"job {job_id} has made no pair {_listed(missing)}; GET /v1/jobs/{job_id}/pairs lists what it has"
        return None, [Problem("/pair_indices", "no_such_pair", message)]
    return len(spec.pair_indices), []


def _made(connection: sa.Connection, job_id: str, stored_spec: dict[str, Any]) -> Sequence[int] | frozenset[int]:
    """Indices of the pairs of a succeeded job; with a gate some of its slots may have stayed empty."""
    spec = parse_spec(stored_spec)
    assert isinstance(spec, PairGrid)
    if not isinstance(spec, GenerationSpec) or spec.gate is None:
        return spec.indices
    infos = connection.scalars(
        sa.select(units.c.info).where(
            units.c.job_id == job_id, units.c.kind == UnitKind.PART.value, units.c.state == UnitState.DONE.value
        )
    )
    return frozenset(int(index) for info in infos for index in info["pairs"])


def _listed(names: Iterable[object]) -> str:
    known = [str(name) for name in names]
    more = f" and {len(known) - NAMED} more" if len(known) > NAMED else ""
    return ", ".join(known[:NAMED]) + more
