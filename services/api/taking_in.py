"""From files in whichever place to a data set: one check, one write, one way of becoming visible.

The zip, the upload file by file and the prefix of the object store all end here. Nothing here knows routes or bodies.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cffa_core.data import ingest
from cffa_core.data.sources import Place
from cffa_core.errors import CffaError, Conflict, InvalidSpec, NotFound, Problem
from cffa_core.jobs.dataset_rows import SURVEY, WAITING
from cffa_core.jobs.records import Dataset, StoredFiles
from cffa_core.settings import Settings
from cffa_core.storage.base import ObjectInfo, dataset_key
from services.api.access import Backend

PUTS_AT_ONCE = 4
MAX_NAME = 200
MAX_PATTERN = 200
_ALPHABET = "0123456789abcdefghijklmnopqrstuvwxyz"
_log = logging.getLogger("cffa.api")


@dataclass(frozen=True)
class Wanted:
    """How files are to become a data set. ``key``: the same one never makes a second data set."""

    name: str
    eye_pattern: str | None = None
    patient_pattern: str | None = None
    auto_register: bool = False
    key: str | None = None

    @property
    def options(self) -> dict[str, Any]:
        """What the check is told, as it is kept with an upload: what an older process does not know only if it is asked
        for."""
        options: dict[str, Any] = {"eye_pattern": self.eye_pattern, "auto_register": self.auto_register}
        return options | ({} if self.patient_pattern is None else {"patient_pattern": self.patient_pattern})

    def checked(self) -> Wanted:
        """This with its name stripped and no empty pattern; raises ``InvalidSpec`` naming each bad one."""
        patterns: dict[str, Any] = {
            "eye_pattern": self.eye_pattern or None,
            "patient_pattern": self.patient_pattern or None,
        }
        problems = _name_problems(self.name.strip())
        for field, pattern in patterns.items():
            if pattern is not None and len(pattern) > MAX_PATTERN:
                problems.append(Problem(f"/{field}", "too_long", f"a pattern has at most {MAX_PATTERN} characters"))
            elif pattern is not None and not pattern.isprintable():
                problems.append(Problem(f"/{field}", "bad_pattern", "a pattern has printable characters only"))
        _refuse(problems)
        return replace(self, name=self.name.strip(), **patterns)


def _name_problems(name: str) -> list[Problem]:
    if 1 <= len(name) <= MAX_NAME and name.isprintable():
        return []
    return [Problem("/name", "bad_name", f"give a name of 1 to {MAX_NAME} printable characters")]


def _refuse(problems: list[Problem]) -> None:
    if problems:
        raise InvalidSpec("the upload form is not valid; see errors", problems=tuple(problems))


def limits_of(settings: Settings) -> ingest.Limits:
    """Caps of the check."""
    return ingest.Limits(
        max_members=settings.max_archive_members,
        max_total_bytes=settings.max_unpacked_bytes,
        max_ratio=settings.max_archive_ratio,
        max_pixels=settings.max_image_pixels,
    )


def take_in(backend: Backend, owner: str, source: Path | Place, wanted: Wanted, folder: Path) -> Dataset:
    """Check, write below ``folder``, store, and only then make it visible. A failed attempt leaves nothing stored.

    Raises ``InvalidDataset`` with every problem of every file.
    """
    checked = ingest.check(
        source,
        limits_of(backend.settings),
        eye_pattern=wanted.eye_pattern,
        patient_pattern=wanted.patient_pattern,
        auto_register=wanted.auto_register,
    )
    index = ingest.write(checked, folder)
    dataset_id = backend.store.new_id("ds") if wanted.key is None else id_of("ds", owner, wanted.key)
    replayed = wanted.key and _replayed(backend, owner, dataset_id, checked.digest, wanted.name)
    if replayed:
        return replayed
    report = checked.report() | {SURVEY: {"state": WAITING}}
    if checked.registered:
        from cffa_core.evaluation.survey_sheet import registration_sheet  # few uploads need it

        registration_sheet(checked.registered, folder / "report" / "registration.png")
    try:
        return publish(
            backend,
            owner,
            folder,
            dataset_id=dataset_id,
            name=wanted.name,
            digest=checked.digest,
            pairs=len(index["pairs"]),
            report=report,
        )
    except Conflict:
        # The same upload, sent twice at once: the other one was first.
        if made := _replayed(backend, owner, dataset_id, checked.digest, wanted.name):
            return made
        raise


def publish(
    backend: Backend,
    owner: str,
    folder: Path,
    *,
    dataset_id: str,
    shared: dict[str, ObjectInfo] | None = None,
    report: dict[str, Any],
    **columns: Any,
) -> Dataset:
    """Store the files of ``folder``, and make the data set of them (and of those ``shared``) visible.

    They lie under an id of their own, so that two tries never mix; a failed one takes its files back.
    """
    prefix = backend.store.new_id("ds")
    files = {path.relative_to(folder).as_posix(): path for path in _files(folder)}
    pictures = {name: files.pop(name) for name in list(files) if name.startswith("report/")}
    try:
        stored = _store(backend, prefix, files)
        shown = _store(backend, prefix, pictures)
        listed = {name: {"key": info.key, "size": info.size, "sha256": info.sha256} for name, info in shown.items()}
        made = backend.store.add_dataset(
            owner,
            dataset_id=dataset_id,
            report=report | ({"pictures": listed} if listed else {}),
            stored=StoredFiles({**(shared or {}), **stored}),
            **columns,
        )
    except BaseException:
        remove(backend, [dataset_key(prefix, name) for name in (*files, *pictures)])
        raise
    backend.unsurveyed.set()
    return made


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 (hex) of every file below ``folder`` by its name there."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in _files(folder)
    }


def _store(backend: Backend, prefix: str, files: dict[str, Path]) -> dict[str, ObjectInfo]:
    """Put ``files`` (name -> path) below ``prefix``, a few at a time: most of a small put is waiting for the store."""
    pool = ThreadPoolExecutor(PUTS_AT_ONCE, thread_name_prefix="put")
    try:
        puts = {name: pool.submit(backend.objects.put_file, dataset_key(prefix, name), files[name]) for name in files}
        return {name: put.result() for name, put in puts.items()}
    finally:
        pool.shutdown(cancel_futures=True)  # after an error, those not begun; waits for the others


def remove(backend: Backend, keys: list[str]) -> None:
    """Delete objects that nothing points to; what cannot be deleted now is named in the log, and no error hides."""
    for number, key in enumerate(keys):
        try:
            backend.objects.delete(key)
        except CffaError:
            _log.exception("%d objects that nothing points to are still stored: %s ...", len(keys) - number, key)
            return


def id_of(prefix: str, owner: str, key: str) -> str:
    """The id of what an idempotency key makes."""
    number = int.from_bytes(hashlib.sha256(json.dumps([owner, key]).encode()).digest(), "big")
    digits = [_ALPHABET[(number // 36**place) % 36] for place in range(20)]
    return f"{prefix}_{''.join(digits)}"


def key_reused() -> Conflict:
    """The error of an idempotency key that belongs to another body."""
    problem = Problem("header:idempotency-key", "idempotency_key_reused", "use a new key for another upload")
    return Conflict("this Idempotency-Key was used for another upload", problems=(problem,))


def _replayed(backend: Backend, owner: str, dataset_id: str, digest: str, name: str) -> Dataset | None:
    """What this key made before, or None; raises ``Conflict`` if that was from another upload."""
    try:
        made = backend.store.get_dataset(owner, dataset_id)
    except NotFound:
        return None
    if (made.digest, made.name) != (digest, name):
        raise key_reused()
    return made


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())
