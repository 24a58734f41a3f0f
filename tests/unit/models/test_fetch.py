"""Bases that come from elsewhere: an object store of either kind, and a hub that does not answer."""

from __future__ import annotations

import hashlib
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from cffa_core.errors import Conflict, CorruptArtifact, ModelUnavailable, StorageUnavailable
from cffa_core.models import fetch
from cffa_core.models.base import load_base
from cffa_core.models.base_folder import base_digest, base_files
from cffa_core.models.fetch import SUMS, fetch_stored, find_base, models_dir_with, put_base
from cffa_core.storage.base import ObjectInfo, ObjectStore
from cffa_core.storage.local import LocalStore
from tests.s3_buckets import s3_store
from tests.servers import S3_ACCESS_KEY, S3_SECRET_KEY, Server

PREFIX = "bases/micro"


class Watched(LocalStore):
    """A local store that tells what was fetched, and breaks down before fetch number ``breaks_at``."""

    def __init__(self, root: Path, breaks_at: int | None = None) -> None:
        super().__init__(root, secret=b"s" * 32, base_url="http://127.0.0.1:8008")
        self.breaks_at = breaks_at
        self.fetched: list[str] = []

    def fetch(self, info: ObjectInfo, path: Path) -> None:
        if len(self.fetched) == self.breaks_at:
            raise StorageUnavailable("the test pulled the plug")
        self.fetched.append(info.key)
        super().fetch(info, path)


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.xdist_group("s3"))])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ObjectStore]:
    if request.param == "local":
        yield Watched(tmp_path / "objects")
    else:
        with s3_store(request.getfixturevalue("s3_server")) as opened:
            yield opened


@pytest.fixture
def local(base_folder: Path, tmp_path: Path) -> Watched:
    """A local store that holds the micro base."""
    opened = Watched(tmp_path / "objects")
    put_base(opened, base_folder, PREFIX)
    return opened


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in base_files(folder)}


def test_what_was_put_is_found_by_its_name(store: ObjectStore, base_folder: Path, tmp_path: Path) -> None:
    put_base(store, base_folder, PREFIX)
    seen: list[tuple[int, int]] = []
    found = models_dir_with(
        "micro", models_dir=None, store=store, cache=tmp_path / "cache", on_file=lambda *n: seen.append(n)
    )
    loaded = load_base("micro", models_dir=found)
    assert (loaded.name, loaded.digest) == ("micro", base_digest(base_folder))
    assert files(loaded.folder) == files(base_folder)
    assert seen[-1] == (len(seen), len(files(base_folder)))


def test_a_name_with_an_owner_is_kept(local: Watched, base_folder: Path, tmp_path: Path) -> None:
    put_base(local, base_folder, "bases/owner/name")
    found = models_dir_with("owner/name", models_dir=None, store=local, cache=tmp_path / "cache")
    assert load_base("owner/name", models_dir=found).name == "owner/name"


@pytest.mark.parametrize("ref", ["tiny", "micro", "nobody/nothing"])
def test_the_store_is_not_asked_for_what_is_here_or_nowhere(
    local: Watched, base_folder: Path, tmp_path: Path, ref: str
) -> None:
    assert models_dir_with(ref, models_dir=base_folder.parent, store=local, cache=tmp_path) == base_folder.parent
    assert local.fetched == []


@pytest.mark.xdist_group("s3")
def test_a_prefix_of_any_bucket_is_a_reference(
    s3_server: Server, base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "HOME": str(tmp_path / "home"),
        "S3_ENDPOINT": s3_server.url,
        "S3_ACCESS_KEY": S3_ACCESS_KEY,
        "S3_SECRET_KEY": S3_SECRET_KEY,
    }.items():
        monkeypatch.setenv(f"CFFA_{name}", value)
    bucket = f"models-{secrets.token_hex(6)}"
    with s3_store(s3_server, bucket=bucket) as store:
        store.ensure_bucket()
        put_base(store, base_folder, "eyes/micro")
        loaded = load_base(f"s3://{bucket}/eyes/micro")
        assert (loaded.name, loaded.digest) == ("micro", base_digest(base_folder))
        with pytest.raises(ModelUnavailable, match=r"no base under 'eyes/other'.*sha256sum"):
            find_base(f"s3://{bucket}/eyes/other")


def test_a_second_fetch_brings_nothing(local: Watched, tmp_path: Path) -> None:
    folder = fetch_stored(local, PREFIX, tmp_path / "cache")
    local.fetched.clear()
    assert fetch_stored(local, PREFIX, tmp_path / "cache") == folder
    assert local.fetched == []


def test_an_interrupted_fetch_goes_on_where_it_was(local: Watched, base_folder: Path, tmp_path: Path) -> None:
    local.breaks_at = 5
    with pytest.raises(StorageUnavailable, match="plug"):
        models_dir_with("micro", models_dir=None, store=local, cache=tmp_path / "cache")
    brought, local.breaks_at = set(local.fetched), None
    local.fetched.clear()
    folder = fetch_stored(local, PREFIX, tmp_path / "cache")
    assert len(brought) == 5 and not brought & set(local.fetched)
    assert files(folder) == files(base_folder)


def test_a_cached_file_that_changed_is_fetched_again(local: Watched, base_folder: Path, tmp_path: Path) -> None:
    folder = fetch_stored(local, PREFIX, tmp_path / "cache")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    local.fetched.clear()
    assert files(fetch_stored(local, PREFIX, tmp_path / "cache")) == files(base_folder)
    assert local.fetched == [f"{PREFIX}/unet/diffusion_pytorch_model.safetensors"]


def test_processes_that_want_the_same_base_wait_for_one_another(
    local: Watched, base_folder: Path, tmp_path: Path
) -> None:
    found: list[Path] = []
    wanted = [threading.Thread(target=lambda: found.append(fetch_stored(local, PREFIX, tmp_path))) for _ in range(4)]
    for thread in wanted:
        thread.start()
    for thread in wanted:
        thread.join()
    assert len(found) == 4 and len(set(found)) == 1
    assert len(local.fetched) == len(files(base_folder))


def test_sha256sum_itself_writes_what_is_read(base_folder: Path, tmp_path: Path) -> None:
    """What a team does without this program: copy the folder with any client, and the output of sha256sum."""
    store = Watched(tmp_path / "objects")
    for path in base_folder.rglob("*"):
        if path.is_file():
            store.put_file(f"team/micro/{path.relative_to(base_folder).as_posix()}", path)
    done = subprocess.run("sha256sum $(find . -type f)", shell=True, cwd=base_folder, capture_output=True, check=True)
    store.put_bytes(f"team/micro/{SUMS}", done.stdout)
    assert files(fetch_stored(store, "team/micro/", tmp_path / "cache")) == files(base_folder)


def replaced(store: LocalStore, key: str, content: bytes | None) -> None:
    """As somebody with access to the store might do it."""
    store.delete(key)
    if content is not None:
        store.put_bytes(key, content)


@pytest.mark.parametrize(
    ("file", "content", "error", "says"),
    [
        (SUMS, None, ModelUnavailable, r"it has no SHA256SUMS.*sha256sum"),
        (SUMS, b"nonsense\n", CorruptArtifact, "a line of another kind: 'nonsense'"),
        (SUMS, b"%s  unet/config.json\n" % (b"0" * 64), ModelUnavailable, "lacks tokenizer, text_encoder, vae, unet"),
        ("vae/config.json", None, ModelUnavailable, r"lacks bases/micro/vae/config\.json.*store it again"),
        ("vae/config.json", b"{}", CorruptArtifact, "not the file that SHA256SUMS describes"),
    ],
)
def test_a_base_that_is_not_whole_is_refused(
    local: Watched, tmp_path: Path, file: str, content: bytes | None, error: type[Exception], says: str
) -> None:
    replaced(local, f"{PREFIX}/{file}", content)
    with pytest.raises(error, match=says):
        models_dir_with("micro", models_dir=None, store=local, cache=tmp_path / "cache")


def test_a_hostile_listing_names_no_file_outside(local: Watched, tmp_path: Path) -> None:
    listing = local.get_bytes(f"{PREFIX}/{SUMS}")
    evil = hashlib.sha256(b"evil").hexdigest().encode()
    hostile = b"".join(b"%s  %s\n" % (evil, name) for name in (b"../evil", b"unet/../../evil", b"/evil", b"evil"))
    replaced(local, f"{PREFIX}/{SUMS}", listing + hostile.replace(b"  /evil", b"  ./evil"))
    fetch_stored(local, PREFIX, tmp_path / "cache")
    assert not any("evil" in key for key in local.fetched)
    assert not list(tmp_path.glob("**/evil"))


def test_another_base_does_not_replace_one(local: Watched, base_folder: Path, tmp_path: Path) -> None:
    put_base(local, base_folder, PREFIX)  # the same again is no harm
    other = tmp_path / "other"
    for path in base_files(base_folder):
        target = other / path.relative_to(base_folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(Conflict, match="other bytes"):
        put_base(local, other, PREFIX)


@pytest.mark.parametrize("ref", ["s3://", "s3://bucket", "s3://bucket/", "s3:///prefix"])
def test_a_reference_without_bucket_or_prefix_is_none(ref: str) -> None:
    with pytest.raises(ModelUnavailable, match="s3://bucket/prefix"):
        find_base(ref)


def test_without_a_server_in_the_settings_it_says_which_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CFFA_S3_ENDPOINT", raising=False)
    with pytest.raises(ModelUnavailable, match="CFFA_S3_ENDPOINT"):
        find_base("s3://bucket/prefix")


def test_an_object_store_that_is_away_is_said_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with _port(listening=False) as port:
        for name, value in {"ENDPOINT": f"http://127.0.0.1:{port}", "ACCESS_KEY": "a", "SECRET_KEY": "b" * 16}.items():
            monkeypatch.setenv(f"CFFA_S3_{name}", value)
        monkeypatch.setenv("CFFA_HOME", str(tmp_path))
        with pytest.raises(StorageUnavailable):
            find_base("s3://bucket/prefix")


@contextmanager
def _port(*, listening: bool) -> Iterator[int]:
    """A port of this machine on which nobody listens, or somebody who never answers."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        if listening:
            held.listen(8)
        yield held.getsockname()[1]


@pytest.mark.parametrize("hub", ["refuses", "is silent", "is switched off"])
def test_without_a_hub_there_is_an_error_soon(hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with _port(listening=hub == "is silent") as port:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{port}")
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", hub == "is switched off")
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr(fetch, "HUB_SECONDS", 0.5)
        began = time.monotonic()
        with pytest.raises(ModelUnavailable, match=r"cannot be reached; download it .* CFFA_MODELS_DIR") as caught:
            find_base("owner/name")
    assert time.monotonic() - began < 10
    cause: Any = caught.value.__cause__
    assert type(cause).__name__ == {
        "refuses": "ConnectError", "is silent": "ReadTimeout", "is switched off": "OfflineModeIsEnabled"
    }[hub]  # fmt: skip


def test_finding_a_base_needs_no_torch() -> None:
    code = "import sys; import cffa_core.models.fetch; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
