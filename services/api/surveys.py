"""Looking into data sets after they were taken in: one at a time per process, in a child process of its own.

What waits is written in the record, so that a restart forgets none; ``take_turn`` keeps two processes from one data
set. What is looked for is the matter of ``cffa_core.evaluation.dataset_survey``.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import sys
import time
from pathlib import Path

from starlette.concurrency import run_in_threadpool

from cffa_core.errors import CffaError, CorruptArtifact, NotFound
from cffa_core.jobs.records import Dataset
from cffa_core.storage.base import ObjectInfo, dataset_key
from cffa_core.storage.manifest import fetch_files
from services.api.access import Backend
from services.api.scratch import upload_folder

PAUSE_SECONDS = 2.0
REQUEST, FINDINGS, SHEET = "request.json", "findings.json", "flagged.png"
LOOK_SECONDS = 600.0
"""How often the record is asked what waits although nobody said so: reports are large, and a killed process is rare."""
LONGEST_SECONDS = 3600.0
_log = logging.getLogger("cffa.api")


async def survey_forever(backend: Backend) -> None:
    """Look into every data set that waits for it, oldest first, until cancelled."""
    due = 0.0
    while True:
        await asyncio.sleep(PAUSE_SECONDS)
        if not backend.unsurveyed.is_set() and time.monotonic() < due:
            continue
        backend.unsurveyed.clear()
        due = time.monotonic() + LOOK_SECONDS
        try:
            await run_in_threadpool(backend.store.require_schema)  # a cluster may not be set up yet
            for dataset in await run_in_threadpool(backend.store.unsurveyed_datasets):
                turn = f"survey {dataset.id}"
                if await run_in_threadpool(backend.store.take_turn, turn, LONGEST_SECONDS):
                    backend.unsurveyed.set()  # there may be more of them than one answer holds
                    await survey(backend, dataset)
        except CffaError as error:
            backend.unsurveyed.set()
            _log.error("data sets could not be looked into, they will be: %s", error.message)


async def survey(backend: Backend, dataset: Dataset) -> None:
    """Look into one data set and add what was found to its report; a failure is written there too."""
    held = contextlib.ExitStack()
    scratch = await run_in_threadpool(held.enter_context, upload_folder(backend.settings.scratch_dir))
    try:
        await run_in_threadpool(_fetch, backend, dataset, scratch)
        problem = await _run_child(scratch / REQUEST)
        if problem is None:
            await run_in_threadpool(_add, backend, dataset, scratch)
        else:
            failed = {"state": "failed", "message": problem}
            await run_in_threadpool(backend.store.add_survey, dataset.owner, dataset.id, failed)
    except NotFound:
        _log.info("data set %s was deleted before it was looked into", dataset.id)
    except CorruptArtifact as error:
        _log.error("data set %s cannot be looked into: %s", dataset.id, error.message)
        failed = {"state": "failed", "message": "its files are damaged"}
        await run_in_threadpool(backend.store.add_survey, dataset.owner, dataset.id, failed)
    finally:
        held.close()


def _fetch(backend: Backend, dataset: Dataset, scratch: Path) -> None:
    folder = scratch / "dataset"
    fetch_files(backend.objects, dataset.stored, folder)
    notes = {pair["name"]: pair.get("notes", []) for pair in dataset.report.get("pairs", [])}
    places = {"folder": str(folder), "findings": str(scratch / FINDINGS), "sheet": str(scratch / SHEET)}
    asked = {**places, "notes": notes, "split": dataset.split or {}}
    (scratch / REQUEST).write_text(json.dumps(asked), encoding="utf-8")


async def _run_child(request: Path) -> str | None:
    """Run the child; why it failed, or None. It dies with this task."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("CFFA_")}
    environment |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "cffa_core.evaluation.survey_child",
        str(request),
        env=environment,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        _, said = await asyncio.wait_for(child.communicate(), LONGEST_SECONDS)
    except TimeoutError:
        return "it took more than an hour"
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()
    if child.returncode == 0:
        return None
    _log.error("a survey failed (exit %s): %s", child.returncode, said.decode(errors="replace")[-2000:])
    return "the process that looks into data sets failed; the server's log says why"


def _add(backend: Backend, dataset: Dataset, scratch: Path) -> None:
    found = json.loads((scratch / FINDINGS).read_text(encoding="utf-8"))
    pictures: dict[str, ObjectInfo] = {}
    if (scratch / SHEET).is_file():
        key = dataset_key(backend.store.new_id("ds"), f"report/{SHEET}")
        pictures[f"report/{SHEET}"] = backend.objects.put_file(key, scratch / SHEET)
    added = False
    try:
        added = backend.store.add_survey(dataset.owner, dataset.id, found, pictures)
    finally:
        if not added:
            for info in pictures.values():
                backend.objects.delete(info.key)
