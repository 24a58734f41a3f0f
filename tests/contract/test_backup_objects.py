"""A backup through each kind of object store, and back into it."""

from __future__ import annotations

from pathlib import Path

import pytest

from cffa_core.errors import Conflict, CorruptArtifact
from cffa_core.jobs.records import StoredFiles
from cffa_core.jobs.store import JobStore
from cffa_core.models.base_folder import base_digest
from cffa_core.models.fetch import SUMS, fetch_stored, put_base
from cffa_core.operations.backup import back_up
from cffa_core.operations.inventory import verify_store
from cffa_core.operations.restore import restore
from cffa_core.storage.base import ObjectStore, dataset_key
from tests.record_cases import OWNER, sqlite_store

PARTS = ("tokenizer/tokenizer.json", "scheduler/scheduler_config.json")
MODELS = {"text_encoder": "model", "vae": "diffusion_pytorch_model", "unet": "diffusion_pytorch_model"}
SIZES = {"cf/large.png": 3_000_000, "empty.json": 0}


def small_base(folder: Path) -> Path:
    """A folder with the files of a base, none of which is one."""
    names = [
        *PARTS,
        *(f"{part}/{file}" for part, stem in MODELS.items() for file in ("config.json", f"{stem}.safetensors")),
    ]
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode() * 1000)
    return folder


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
    base = small_base(folder / "models" / "small")
    put_base(objects, base, "bases/owner/small")
    objects.put_bytes("bases/unfinished/unet/config.json", b"{}")
    files = list(objects.list("bases/owner/"))
    made = back_up(f"sqlite:///{folder / 'home' / 'record.sqlite'}", objects, folder / "backup")
    sizes = [objects.size(key) for key in files]
    assert (made.objects, made.bytes) == (2 + len(files), sum(SIZES.values()) + sum(sizes))
    for key in (*keys.values(), *objects.list("bases/")):
        objects.delete(key)

    restored = f"sqlite:///{folder / 'restored' / 'record.sqlite'}"
    restore(folder / "backup", restored, objects)
    assert verify_store(restored, objects, deep=True).problems == ()
    again = JobStore(restored)
    assert again.get_dataset(OWNER, dataset_id) == added
    again.close()
    assert list(objects.list("bases/")) == files, "and nothing of the base without sums"
    fetched = fetch_stored(objects, "bases/owner/small", folder / "cache")
    assert base_digest(fetched) == base_digest(base)

    objects.put_bytes("jobs/job_other/parts/00000/a1/pairs.zip", b"x")
    with pytest.raises(Conflict, match="job_other"):
        restore(folder / "backup", f"{restored}.new", objects)


def test_a_base_comes_back_with_its_sums_last_and_a_damaged_one_is_named(objects: ObjectStore, folder: Path) -> None:
    (folder / "home").mkdir()
    sqlite_store(folder / "home").close()
    url = f"sqlite:///{folder / 'home' / 'record.sqlite'}"
    put_base(objects, small_base(folder / "small"), "bases/small")
    back_up(url, objects, folder / "backup")
    lines = (folder / "backup" / "objects.jsonl").read_text().splitlines()
    assert len(lines) == 9 and [SUMS in line for line in lines] == [False] * 8 + [True]

    restored = f"sqlite:///{folder / 'restored' / 'record.sqlite'}"
    restore(folder / "backup", restored, objects)  # the same base is there already
    objects.delete("bases/small/vae/config.json")
    with pytest.raises(CorruptArtifact, match=r"lacks bases/small/vae/config\.json.*SHA256SUMS"):
        back_up(url, objects, folder / "lacking")
    objects.put_bytes("bases/small/vae/config.json", b"other bytes")
    with pytest.raises(CorruptArtifact) as refused:
        back_up(url, objects, folder / "damaged")
    assert [problem.pointer for problem in refused.value.problems] == ["bases/small/vae/config.json"]
    with pytest.raises(Conflict, match=r"bases/small/vae/config\.json"):
        restore(folder / "backup", f"{restored}.new", objects)
