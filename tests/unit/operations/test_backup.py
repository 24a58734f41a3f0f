"""A record that is dumped and restored with its objects gives the same answers, on each database, and goes on."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from cffa_core.errors import Conflict, CorruptArtifact, InvalidSettings, LeaseLost, StorageUnavailable, VersionTooOld
from cffa_core.jobs.records import Claim, NewModel, Progress, StoredFiles
from cffa_core.jobs.spec import TrainingSpec
from cffa_core.jobs.state import JobState
from cffa_core.jobs.store import JobStore
from cffa_core.jobs.sweep import orphans
from cffa_core.operations.backup import back_up
from cffa_core.operations.inventory import verify_store
from cffa_core.operations.restore import restore
from cffa_core.storage.base import ObjectInfo, checkpoint_key, dataset_key, part_key, result_key
from cffa_core.storage.local import LocalStore
from tests.record_cases import LEASE, OTHER, OWNER, claimed, generation_job, memory_folder
from tests.record_servers import Records, SqliteRecords


@pytest.fixture
def folder() -> Iterator[Path]:
    with memory_folder() as made:
        yield made


def local(folder: Path) -> LocalStore:
    return LocalStore(folder, secret=b"k" * 32, base_url="http://x")


class Clinic:
    """A record and its objects with something of everything; ``held`` is a claim of a worker that lives on."""

    def __init__(self, url: str, folder: Path) -> None:
        self.url = url
        self.store = JobStore(url)
        self.objects = local(folder)
        dataset_id = self.store.new_id("ds")
        stored = self.put(dataset_key(dataset_id, "cf/a.png"), dataset_key(dataset_id, "dataset.json"))
        self.store.add_dataset(
            OWNER, dataset_id=dataset_id, name="A", digest="0" * 64, pairs=4, report={"ä": 1}, stored=stored
        )
        job, _ = self.store.create_job(OWNER, TrainingSpec(dataset_id=dataset_id, steps=9), idempotency_key="k")
        claim = claimed(self.store)
        self.checkpoint(claim, 3)
        self.store.add_metrics(claim, 3, {"loss": 0.5, "grad_norm": float("nan")})
        model = self.put(result_key(job.id, "train", 1, "model/model.json"))
        self.store.commit(claim, model, {})
        made = NewModel("1" * 64, {"base": "tiny"}, model)
        done = self.store.commit(claimed(self.store), StoredFiles({}), {}, job_result={}, model=made)
        assert done.result is not None
        self.model_id = done.result["model_id"]
        self.running = generation_job(self.store, self.model_id, parts=2)
        self.part(claimed(self.store))
        self.held = claimed(self.store)
        self.queued = generation_job(self.store, self.model_id, parts=1)
        paused = generation_job(self.store, self.model_id, parts=1)
        self.store.pause_job(OWNER, paused.id)
        self.store.register_worker("w", {"host": "h"})

    def put(self, *keys: str) -> StoredFiles:
        found = {key.rsplit("/", 1)[-1]: self.objects.put_bytes(key, key.encode() * 3) for key in keys}
        return StoredFiles(found)

    def part(self, claim: Claim) -> None:
        keys = [part_key(claim.job_id, claim.index, claim.attempt, name) for name in ("pairs.zip", "part.json")]
        self.store.commit(claim, self.put(*keys), {"pairs": [1, 2]})

    def checkpoint(self, claim: Claim, step: int) -> tuple[str, ...]:
        return self.store.add_checkpoint(claim, step, self.put(checkpoint_key(claim.job_id, step, claim.attempt, "s")))

    def back_up(self, target: Path) -> None:
        back_up(self.url, self.objects, target)


@pytest.fixture
def clinic(record_url: str, folder: Path) -> Iterator[Clinic]:
    made = Clinic(record_url, folder / "objects")
    yield made
    made.store.close()


def answers(store: JobStore, objects: LocalStore) -> dict[str, Any]:
    """What owners can ask, apart from jobs that were being worked on; with the bytes of everything stored."""
    found: dict[str, Any] = {}
    stored: list[StoredFiles] = []
    for job in store.list_jobs(OWNER).items:
        parts, saved = store.parts(OWNER, job.id), store.checkpoints(OWNER, job.id)
        events = [event for event in store.events(OWNER, job.id) if event.type != "restored"]
        metrics = json.dumps(store.metrics(OWNER, job.id))  # not-a-number is not itself
        job = replace(job, progress=replace(job.progress, eta_seconds=None))  # depends on live workers
        if job.state is JobState.RUNNING:
            job = replace(job, version=0, progress=Progress(), queue_position=None)
        found[job.id] = (job, events, metrics, parts, saved)
        stored += [part.stored for part in parts] + [one.stored for one in saved]
    found["models"], found["datasets"] = store.list_models(OWNER).items, store.list_datasets(OWNER).items
    stored += [one.stored for one in (*found["models"], *found["datasets"])]
    found["bytes"] = {info.key: objects.get_bytes(info.key) for files in stored for info in files.files.values()}
    assert store.list_jobs(OTHER).items == ()
    return found


def test_dump_and_objects_give_the_same_answers_and_go_on(clinic: Clinic, records: Records, folder: Path) -> None:
    before = answers(clinic.store, clinic.objects)
    assert len(before["bytes"]) == 6
    clinic.back_up(folder / "backup")
    url, objects = records.bare(), local(folder / "restored")
    restore(folder / "backup", url, objects)
    if isinstance(records, SqliteRecords):
        assert [path.name for path in Path(str(sa.make_url(url).database)).parent.iterdir()] == ["record.sqlite"]
    store = JobStore(url)
    store.require_schema()
    assert answers(store, objects) == before
    assert store.list_workers() == [] and store.load().units
    again, created = store.create_job(
        OWNER, store.get_job(OWNER, store.get_model(OWNER, clinic.model_id).job_id).spec, idempotency_key="k"
    )
    assert (again.id, created) == (store.get_model(OWNER, clinic.model_id).job_id, False)
    # A worker of the old installation cannot write; a new one takes its unit, under keys that nobody ever used.
    with pytest.raises(LeaseLost):
        store.renew(clinic.held, LEASE)
    taken = claimed(store)
    assert (taken.unit_id, taken.attempt) == (clinic.held.unit_id, clinic.held.attempt + 1001)
    assert store.sweep() == 0 and orphans(store, objects) == 0
    assert verify_store(url, objects, deep=True).problems == ()
    store.close()


def test_objects_that_vanish_meanwhile_are_those_of_the_next_dump(clinic: Clinic, folder: Path) -> None:
    clinic.store.cancel_job(OWNER, clinic.queued.id)
    clinic.part(clinic.held)

    class Busy(LocalStore):
        """A store whose service deletes a job as soon as its record was dumped."""

        def fetch(self, info: ObjectInfo, path: Path) -> None:
            if deletable and clinic.store.get_job(OWNER, clinic.running.id).state in deletable:
                for key in clinic.store.delete_job(OWNER, clinic.running.id):
                    self.delete(key)
                deletable.clear()
            super().fetch(info, path)

    clinic.store.commit(claimed(clinic.store), StoredFiles({}), {}, job_result={})
    deletable = {JobState.SUCCEEDED}
    made = back_up(clinic.url, Busy(clinic.objects.root, secret=b"k", base_url="http://x"), folder / "backup")
    assert not deletable
    kept = {path.relative_to(folder / "backup" / "objects").as_posix() for path in (folder / "backup").rglob("a1/**/*")}
    assert made.objects == 4 and not any(clinic.running.id in key for key in kept)


def test_what_is_no_whole_backup_is_refused(clinic: Clinic, records: Records, folder: Path) -> None:
    source, url = folder / "backup", f"sqlite:///{folder / 'new' / 'record.sqlite'}"
    clinic.back_up(source)
    if not isinstance(records, SqliteRecords):
        with pytest.raises(InvalidSettings, match="another database"):
            restore(source, url, local(folder / "restored"))
        return
    with pytest.raises(Conflict, match="not empty"):
        clinic.back_up(source)
    with pytest.raises(Conflict, match="exists"):
        restore(source, clinic.url, local(folder / "restored"))
    (folder / "occupied").mkdir()
    occupied = local(folder / "occupied")
    occupied.put_bytes("jobs/job_x/train/a1/log", b"x")
    with pytest.raises(Conflict, match="jobs/job_x"):
        restore(source, url, occupied)
    victim = next(path for path in (source / "objects").rglob("pairs.zip"))
    whole = victim.read_bytes()
    victim.write_bytes(whole[:-1] + b"!")
    with pytest.raises(CorruptArtifact, match=r"pairs\.zip"):
        restore(source, url, local(folder / "half"))
    assert not (folder / "new" / "record.sqlite").exists(), "the record comes last"
    victim.write_bytes(whole)
    restore(source, url, local(folder / "half"))  # goes on where it stopped
    for name in ("record.sqlite", "objects.jsonl"):
        data = (source / name).read_bytes()
        (source / name).write_bytes(data + b" ")
        with pytest.raises(CorruptArtifact, match=name):
            restore(source, f"{url}.other", local(folder / "other"))
        (source / name).write_bytes(data)
    manifest = json.loads((source / "manifest.json").read_text())
    (source / "manifest.json").write_text(json.dumps({**manifest, "schema": "9999"}))
    with pytest.raises(VersionTooOld, match="9999"):
        restore(source, f"{url}.other", local(folder / "other"))
    (source / "manifest.json").unlink()
    with pytest.raises(CorruptArtifact, match="no whole backup"):
        restore(source, f"{url}.other", local(folder / "other"))


def test_verify_names_what_is_missing_and_what_is_damaged(clinic: Clinic, folder: Path) -> None:
    known = verify_store(clinic.url, clinic.objects, deep=True)
    assert (known.objects, known.problems) == (6, ()) and known.bytes > 0
    keys = sorted(clinic.objects.list("jobs/"))
    clinic.objects.delete(keys[0])
    path = clinic.objects.root / keys[1]
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    (clinic.objects.root / keys[2]).write_bytes((clinic.objects.root / keys[2]).read_bytes()[:-1] + b"!")
    quick = {problem.pointer: problem.code for problem in verify_store(clinic.url, clinic.objects).problems}
    deep = {problem.pointer: problem.code for problem in verify_store(clinic.url, clinic.objects, deep=True).problems}
    assert quick == {keys[0]: "missing", keys[1]: "wrong_size"}
    assert deep == quick | {keys[2]: "wrong_bytes"}
    with pytest.raises(CorruptArtifact) as refused:
        clinic.back_up(folder / "backup")
    assert {problem.pointer for problem in refused.value.problems} == {keys[1], keys[2]}
    assert not (folder / "backup" / "manifest.json").exists()


def test_no_password_stands_in_an_argument(clinic: Clinic, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    password = sa.make_url(clinic.url).password
    if password is None:
        return  # SQLite has none
    real, seen = subprocess.run, []

    def watched(command: list[str], **options: Any) -> Any:
        seen.append((command, options["env"].get("PGPASSWORD")))
        return real(command, **options)

    monkeypatch.setattr(subprocess, "run", watched)
    clinic.back_up(folder / "backup")
    assert seen and all(password not in " ".join(command) and given == password for command, given in seen)


def test_a_record_that_is_not_there_is_named_and_not_made(folder: Path) -> None:
    url = f"sqlite:///{folder / 'nobody' / 'record.sqlite'}"
    (folder / "nobody").mkdir()
    with pytest.raises(StorageUnavailable, match="there is no record at"):
        verify_store(url, local(folder / "other"))
    with pytest.raises(StorageUnavailable, match="there is no record at"):
        back_up(url, local(folder / "other"), folder / "backup")
    assert list((folder / "nobody").iterdir()) == [] and not (folder / "backup").exists()
