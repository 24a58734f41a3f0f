"""A backup through each kind of object store, and back into it."""

from __future__ import annotations

from pathlib import Path

import pytest

from cffa_core.errors import Conflict
from cffa_core.jobs.records import StoredFiles
from cffa_core.jobs.store import JobStore
from cffa_core.operations.backup import back_up
from cffa_core.operations.inventory import verify_store
from cffa_core.operations.restore import restore
from cffa_core.storage.base import ObjectStore, dataset_key
from tests.record_cases import OWNER, sqlite_store

SIZES = {"cf/large.png": 3_000_000, "empty.json": 0}


def test_objects_come_back_byte_for_byte(objects: ObjectStore, folder: Path) -> None:
    (folder / "home").mkdir()
    store = sqlite_store(folder / "home")
    dataset_id = store.new_id("ds")
    keys = {name: dataset_key(dataset_id, name) for name in SIZES}
    stored = StoredFiles({name: objects.put_bytes(key, b"\x07" * SIZES[name]) for name, key in keys.items()})
    added = store.add_dataset(
        OWNER, dataset_id=dataset_id, name="A", digest="0" * 64, pairs=1, report={}, stored=stored
    )
    store.close()
    made = back_up(f"sqlite:///{folder / 'home' / 'record.sqlite'}", objects, folder / "backup")
    assert (made.objects, made.bytes) == (2, sum(SIZES.values()))
    for key in keys.values():
        objects.delete(key)

    restored = f"sqlite:///{folder / 'restored' / 'record.sqlite'}"
    restore(folder / "backup", restored, objects)
    assert verify_store(restored, objects, deep=True).problems == ()
    again = JobStore(restored)
    assert again.get_dataset(OWNER, dataset_id) == added
    again.close()

    objects.put_bytes("jobs/job_other/parts/00000/a1/pairs.zip", b"x")
    with pytest.raises(Conflict, match="job_other"):
        restore(folder / "backup", f"{restored}.new", objects)
