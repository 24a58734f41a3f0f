"""Versions of a data set: pairs rejected, patients told, a split by eye locked in, pairs registered anew.

A version names the files of the data set that it was made from, apart from those that it changes; what it may be is
decided in ``cffa_core.data.versions``.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import anyio
from fastapi import APIRouter, Response

from cffa_core.data import dataset_folder, versions
from cffa_core.data.auto_registration import register_again
from cffa_core.data.captions import captions_text, counted, parse_captions
from cffa_core.data.contracts import CheckedPair, Limits
from cffa_core.data.dataset_folder import CAPTIONS
from cffa_core.data.decoding import Decoder
from cffa_core.data.eyes_and_patients import WITHOUT_PATIENT, known_anew, without_patient
from cffa_core.errors import Conflict, CorruptArtifact, InvalidSpec, Problem
from cffa_core.jobs.dataset_rows import SURVEY, WAITING
from cffa_core.jobs.records import Dataset, StoredFiles
from cffa_core.storage.manifest import fetch_files, read_verified
from services.api import taking_in
from services.api.access import Backend, DatasetId, IdempotencyKey, Owner, TheBackend
from services.api.dataset_schemas import SplitByFraction, VersionRequest
from services.api.datasets import made
from services.api.problems import documented
from services.api.schemas import DatasetView
from services.api.scratch import upload_folder
from services.api.taking_in import Wanted

MISREGISTERED = "misregistered"
router = APIRouter(tags=["data sets"])


@router.post(
    "/v1/datasets/{dataset_id}/versions",
    status_code=201,
    response_model=DatasetView,
    operation_id="createDatasetVersion",
    summary="Make a version of a data set",
    responses=documented(400, 403, 404, 409, 422, 503),
)
async def create_version(
    dataset_id: DatasetId,
    asked: VersionRequest,
    backend: TheBackend,
    owner: Owner,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """A new data set with an id and a digest of its own, which shares the images of this one: without the rejected
    pairs, with patients by a pattern on the pairs' names, with a split by eye that trainings and evaluations obey. A
    data set itself never changes."""

    def make() -> Dataset:
        parent = backend.store.get_dataset(owner, dataset_id)
        with upload_folder(backend.settings.scratch_dir) as folder:
            return _make(backend, owner, parent, asked, idempotency_key, folder / "version")

    return made(await anyio.to_thread.run_sync(make, limiter=backend.checks))


def _make(
    backend: Backend, owner: str, parent: Dataset, asked: VersionRequest, key: str | None, folder: Path
) -> Dataset:
    wanted = Wanted(asked.name or parent.name, patient_pattern=asked.patient_pattern).checked()
    index = json.loads(read_verified(backend.objects, parent.stored.files[dataset_folder.INDEX]))
    kept = versions.without(dataset_folder.pairs_of(index), asked.reject)
    warnings: list[Problem] = []
    if wanted.patient_pattern is not None:
        index, kept, warnings = _with_patients(index, kept, wanted.patient_pattern)
    split = _split(asked, parent, kept)
    chosen = _to_register(asked, parent, {name: pair.name for pair in kept for name in (pair.called, pair.name)})
    folder.mkdir()
    if chosen:
        index, refused = _registered(backend, parent, index, chosen, folder)
        kept = [pair for pair in dataset_folder.pairs_of(index) if pair.name in {known.name for known in kept}]
        warnings += refused
    files = {name for entry in index["pairs"] for name in dataset_folder.files_of(entry)}
    shared = {name: info for name, info in parent.stored.files.items() if name in files}
    captions = _captions(backend, parent, kept, folder)
    sha256 = {name: info.sha256 for name, info in shared.items()} | taking_in.digests(folder)
    made_index = versions.version_index(index, kept, split, sha256, sha256.get(CAPTIONS))
    needed = {name for entry in made_index["pairs"] for name in dataset_folder.files_of(entry)}
    (folder / dataset_folder.INDEX).write_text(json.dumps(made_index, indent=1) + "\n", encoding="utf-8")
    dataset_id = backend.store.new_id("ds") if key is None else taking_in.id_of("ds", owner, f"version {key}")
    try:
        return taking_in.publish(
            backend,
            owner,
            folder,
            shared={file: info for file, info in shared.items() if file in needed},
            dataset_id=dataset_id,
            name=wanted.name,
            digest=made_index["digest"],
            pairs=len(kept),
            report=_report(parent, made_index, warnings, captions, anew=wanted.patient_pattern is not None),
            parent_id=parent.id,
            split=split,
        )
    except Conflict:
        known = backend.store.get_dataset(owner, dataset_id)
        if (known.parent_id, known.digest, known.name) != (parent.id, made_index["digest"], wanted.name):
            raise taking_in.key_reused() from None
        return known


def _with_patients(
    index: dict[str, Any], kept: list[CheckedPair], pattern: str
) -> tuple[dict[str, Any], list[CheckedPair], list[Problem]]:
    """Index and pairs with the patients that the pattern finds in the names of the pairs that are kept, and a warning
    for those of whom none is known."""
    with Decoder(Limits()) as decoder:
        kept, problems = known_anew(kept, decoder, patient_pattern=pattern)
    if problems:
        raise InvalidSpec(problems[0].message, problems=tuple(problems))
    told = {pair.name: pair.patient for pair in kept if pair.patient is not None}
    entries = [entry | ({"patient": told[entry["name"]]} if entry["name"] in told else {}) for entry in index["pairs"]]
    return {**index, "pairs": entries}, kept, without_patient({pair.name: pair.eye for pair in kept}, told)


def _captions(backend: Backend, parent: Dataset, kept: list[CheckedPair], folder: Path) -> dict[str, int]:
    """Write the captions of the pairs that are kept below ``folder``; returns how many of what there are."""
    stored = parent.stored.files.get(CAPTIONS)
    if stored is None:
        return {}
    found, problems = parse_captions(read_verified(backend.objects, stored).decode())
    if problems:
        raise CorruptArtifact(f"the captions of data set {parent.id} are not readable: {problems[0].message}")
    names = [pair.name for pair in kept if pair.name in found]
    if not names:
        return {}
    (folder / CAPTIONS).write_text(captions_text(found, names), encoding="utf-8")
    return counted(found[name] for name in names)


def _split(asked: VersionRequest, parent: Dataset, kept: list[CheckedPair]) -> versions.Split | None:
    """The split that was asked for, else the parent's without the pairs that are gone."""
    if asked.split is None:
        names = {pair.name for pair in kept}
        if parent.split is None:
            return None
        inherited = {part: [name for name in listed if name in names] for part, listed in parent.split.items()}
        versions.require_whole_patients(kept, inherited)
        return inherited
    if isinstance(asked.split, SplitByFraction):
        shares = {part: float(getattr(asked.split, part)) for part in versions.PARTS}
        return versions.split_by_fraction(kept, shares, asked.split.seed)
    return versions.split_by_eyes(kept, {part: getattr(asked.split, part) for part in versions.PARTS})


def _to_register(asked: VersionRequest, parent: Dataset, kept: dict[str, str]) -> list[str]:
    """Names of the pairs to register; ``kept`` knows them by their original names too."""
    if asked.auto_register == "flagged":
        survey = parent.report.get(SURVEY, {})
        if survey.get("state") != "done":
            raise Conflict("the pairs of this data set were not looked at yet; ask for its report, then try again")
        flagged = [pair["name"] for pair in survey["pairs"] if MISREGISTERED in pair["flags"]]
        return [name for name in flagged if name in kept]
    problems = [
        Problem(f"/auto_register/{number}", "unknown_pair", f"no pair that is kept is named {name!r}")
        for number, name in enumerate(asked.auto_register)
        if name not in kept
    ]
    if problems:
        raise InvalidSpec("these pairs cannot be registered; see errors", problems=tuple(problems))
    return list(dict.fromkeys(kept[name] for name in asked.auto_register))


def _registered(
    backend: Backend, parent: Dataset, index: dict[str, Any], chosen: list[str], folder: Path
) -> tuple[dict[str, Any], list[Problem]]:
    """The index with ``chosen`` pairs registered anew, their new files below ``folder``; those refused stay as they
    were, and are named."""
    entries = {entry["name"]: entry for entry in index["pairs"]}
    needed = {name for pair in chosen for name in dataset_folder.files_of(entries[pair])}
    source = folder.with_name("parent")
    fetch_files(backend.objects, StoredFiles({name: parent.stored.files[name] for name in needed}), source)
    pairs = [pair for pair in dataset_folder.pairs_of(index) if pair.name in set(chosen)]
    changed, refused = register_again(source, pairs, folder)
    shutil.rmtree(source)
    return {**index, "pairs": [{**entry, **changed.get(entry["name"], {})} for entry in index["pairs"]]}, refused


def _report(
    parent: Dataset, index: dict[str, Any], found: list[Problem], captions: dict[str, int], *, anew: bool
) -> dict[str, Any]:
    """The parent's report for the pairs that are left; what is in them is looked at anew. ``found`` are the version's
    own warnings; with ``anew`` what the parent's say of patients holds no more."""
    kept = dataset_folder.pairs_of(index)
    now = {pair.name: {"registration": pair.registration, "patient": pair.patient} for pair in kept}
    listed = [{**pair, **now[pair["name"]]} for pair in parent.report.get("pairs", []) if pair["name"] in now]
    still = [item for item in parent.report.get("warnings", []) if not (anew and item["code"] == WITHOUT_PATIENT)]
    warnings = [*still, *(vars(problem) for problem in found)]
    counts = {"pairs": len(kept), "eyes": len({pair.eye for pair in kept}), "problems": 0, "warnings": len(warnings)}
    patients = len({pair.patient for pair in kept if pair.patient is not None})
    counts |= {"patients": patients} if patients else {}
    base = {name: value for name, value in parent.report.items() if name not in ("pictures", "captions", SURVEY)}
    base |= {"captions": captions} if captions else {}
    base |= {"digest": index["digest"], "counts": counts}
    return {**base, "pairs": listed, "warnings": warnings, SURVEY: {"state": WAITING}}
