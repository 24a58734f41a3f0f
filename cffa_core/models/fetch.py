"""From the name of a base to a folder on this machine: shipped, local, in an object store, or on a model hub.

What is fetched is verified and complete before anyone is given it, and what an interrupted fetch has brought is kept.
In an object store a base is the files of its folder and a ``SHA256SUMS``, as the program `sha256sum` writes it. Loads
no weights and no numeric library.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from cffa_core.errors import CorruptArtifact, InvalidSettings, ModelUnavailable, NotFound
from cffa_core.models.base_folder import PARTS, base_files, check_complete, file_digest, is_read
from cffa_core.settings import read_settings
from cffa_core.storage.base import ObjectInfo, ObjectStore, key_segments
from cffa_core.storage.open import open_s3

SHIPPED = Path(__file__).resolve().parent.parent / "assets"
HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
# A hub that does not answer within this time counts as one that cannot be reached.
HUB_SECONDS = 10.0
# Where a store's own bases are: bases/sd15/unet/config.json ...
STORED = "bases"
SUMS = "SHA256SUMS"
_SUM = re.compile(r"(?P<sha256>[0-9a-f]{64}) [ *](?:\./)?(?P<name>[^\s/].*)")

OnFile = Callable[[int, int], None]


def find_base(ref: str | Path, *, models_dir: Path | None = None) -> tuple[Path, str]:
    """Return the folder of a base (fetched if it is elsewhere) and the name to call it by.

    ``ref`` is ``"tiny"``, the name of a folder in ``models_dir``, a path, ``s3://BUCKET/PREFIX`` (on the server that
    the settings name), or a hub id. A bare name never means a folder of the current directory: names arrive in requests
    of other people. Raises ``ModelUnavailable`` that says what to do.
    """
    if isinstance(ref, Path) or ref.startswith(("/", "./", "../", "~")):
        folder = Path(ref).expanduser()
        if not folder.is_dir():
            raise ModelUnavailable(f"there is no base model folder at {folder}")
        return folder, folder.resolve().name
    if ref == "tiny":
        if not (SHIPPED / ref).is_dir():
            raise ModelUnavailable("the shipped base `tiny` is missing from this installation: install it again")
        return SHIPPED / ref, ref
    if models_dir is not None and (inside := _inside(models_dir, ref)) is not None:
        return inside, ref
    if ref.startswith("s3://"):
        return _fetch_s3(ref)
    if not HUB_ID.fullmatch(ref):
        raise ModelUnavailable(
            f"no base model {ref!r}: not `tiny`, not in CFFA_MODELS_DIR, not a hub id such as owner/name "
            "(a folder is given with its path, e.g. ./folder, an object-store prefix as s3://bucket/prefix)"
        )
    return _download(ref), ref


def models_dir_with(
    ref: str, *, models_dir: Path | None, store: ObjectStore, cache: Path, on_file: OnFile | None = None
) -> Path | None:
    """The folder in which :func:`find_base` finds ``ref`` by name: ``models_dir``, or one below ``cache``.

    The latter if only the store has such a base, below ``bases/NAME/``; then it is fetched. Raises as
    :func:`fetch_stored` does.
    """
    if ref == "tiny" or (models_dir is not None and _inside(models_dir, ref) is not None):
        return models_dir
    prefix = f"{STORED}/{ref}"
    if next(iter(store.list(f"{prefix}/")), None) is None:
        return models_dir
    folder = fetch_stored(store, prefix, cache, name=ref, on_file=on_file)
    return folder.parents[ref.count("/")]


def fetch_stored(
    store: ObjectStore, prefix: str, cache: Path, *, name: str | None = None, on_file: OnFile | None = None
) -> Path:
    """Fetch the base below ``prefix`` into ``cache/DIGEST/NAME`` and return that folder, complete and verified.

    Files that are there with the right digest are not fetched again, so an interrupted fetch goes on, and one that a
    disk damaged is replaced. Processes that want the same base wait for one another. ``name`` is by default the last
    segment of ``prefix``. Raises ``ModelUnavailable`` if the store has no complete base there, ``CorruptArtifact`` if a
    file is not what SHA256SUMS says, ``StorageUnavailable`` if the store cannot be reached.
    """
    prefix = prefix.strip("/")
    listing = _sums(store, prefix)
    wanted = {file: sha256 for file, sha256 in _parse(listing, prefix).items() if is_read(file)}
    check_complete(wanted, f"{SUMS} of the base {prefix!r} in the object store")
    folder = cache / hashlib.sha256(listing).hexdigest()[:16] / (name or prefix.rpartition("/")[2])
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(cache / folder.relative_to(cache).parts[0] / ".lock"):
        for done, (file, sha256) in enumerate(sorted(wanted.items()), start=1):
            path = folder / file
            if not path.is_file() or file_digest(path) != sha256:
                _fetch_file(store, f"{prefix}/{file}", sha256, path)
            if on_file is not None:
                on_file(done, len(wanted))
    return folder


def put_base(store: ObjectStore, folder: Path, prefix: str) -> None:
    """Store a base's files below ``prefix``, SHA256SUMS last: until then there is no base for anybody.

    May be repeated after a failure. Raises ``ModelUnavailable`` for an incomplete folder, ``Conflict`` if there is
    another base.
    """
    lines = []
    for path in base_files(folder):
        name = path.relative_to(folder).as_posix()
        lines.append(f"{store.put_file(f'{prefix}/{name}', path).sha256}  {name}\n")
    store.put_bytes(f"{prefix}/{SUMS}", "".join(sorted(lines)).encode())


def stored_bases(store: ObjectStore) -> Iterator[ObjectInfo]:
    """Every file that the bases below ``bases/`` are loaded from, each base's SHA256SUMS after its files.

    Raises ``CorruptArtifact`` for a base that lacks a file which its SHA256SUMS names, or whose SHA256SUMS is none.
    """
    for key in store.list(f"{STORED}/"):
        prefix, _, name = key.rpartition("/")
        if name != SUMS:
            continue
        listing = _sums(store, prefix)
        for file, sha256 in sorted(_parse(listing, prefix).items()):
            if is_read(file):
                try:
                    yield ObjectInfo(f"{prefix}/{file}", store.size(f"{prefix}/{file}"), sha256)
                except NotFound as error:
                    message = f"the object store lacks {prefix}/{file}, which {SUMS} names: store it again"
                    raise CorruptArtifact(f"{message}, or remove {key}") from error
        yield ObjectInfo(key, len(listing), hashlib.sha256(listing).hexdigest())


def _inside(models_dir: Path, ref: str) -> Path | None:
    """The folder ``ref`` of ``models_dir``, if there is one and it is really inside."""
    top = models_dir.resolve()
    inside = (top / ref).resolve()
    return inside if inside != top and inside.is_relative_to(top) and inside.is_dir() else None


def _fetch_s3(ref: str) -> tuple[Path, str]:
    """Fetch ``s3://BUCKET/PREFIX`` from the server of the settings."""
    parts = urlsplit(ref)
    prefix = parts.path.strip("/")
    if not parts.netloc or not prefix:
        raise ModelUnavailable(f"{ref!r} is no object-store prefix; it should read s3://bucket/prefix")
    settings = read_settings()
    if not settings.s3_endpoint:
        raise ModelUnavailable(
            f"base {ref!r}: no object store is set; name it with CFFA_S3_ENDPOINT, CFFA_S3_ACCESS_KEY and "
            "CFFA_S3_SECRET_KEY"
        )
    try:
        key_segments(prefix)
        with closing(open_s3(settings.model_copy(update={"s3_bucket": parts.netloc}))) as store:
            folder = fetch_stored(store, prefix, settings.scratch_dir / STORED)
    except (InvalidSettings, NotFound) as error:
        raise ModelUnavailable(f"base {ref!r}: {error.message}") from error
    return folder, folder.name


def _sums(store: ObjectStore, prefix: str) -> bytes:
    try:
        return store.get_bytes(f"{prefix}/{SUMS}")
    except NotFound as error:
        raise ModelUnavailable(
            f"there is no base under {prefix!r} in the object store: it has no {SUMS}. Write it in the base's folder "
            f"(sha256sum */* > {SUMS}) and store it after all other files"
        ) from error


def _parse(listing: bytes, prefix: str) -> dict[str, str]:
    """Name -> SHA-256 (hex) of a SHA256SUMS."""
    sums = {}
    for line in listing.decode("utf-8", "replace").splitlines():
        found = _SUM.fullmatch(line)
        if found is None:
            raise CorruptArtifact(f"{SUMS} of the base {prefix!r} has a line of another kind: {line[:80]!r}")
        sums[found["name"]] = found["sha256"]
    return sums


def _fetch_file(store: ObjectStore, key: str, sha256: str, path: Path) -> None:
    try:
        store.fetch(ObjectInfo(key, store.size(key), sha256), path)
    except NotFound as error:
        raise ModelUnavailable(f"the object store lacks {key}, which {SUMS} names: store it again") from error
    except CorruptArtifact as error:
        raise CorruptArtifact(f"{key} is not the file that {SUMS} describes; store the right one") from error


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Wait until no other process holds ``lock``, then hold it; the cache's age counts from its last use."""
    with lock.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        os.utime(lock.parent)
        yield


def _download(ref: str) -> Path:
    """Download a hub id's files, or find them in the hub's cache on this machine."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )
    from huggingface_hub.errors import HTTPError as TransportError  # type: ignore[attr-defined]

    patterns = [f"{part}/{pattern}" for part, names in PARTS.items() for pattern in names]
    ignored = ["*.fp16*.safetensors", "*.non_ema*.safetensors"]
    unreachable = None
    try:
        HfApi().model_info(ref, timeout=HUB_SECONDS)  # snapshot_download would wait for a silent hub for ever
    except GatedRepoError as error:
        raise ModelUnavailable(f"the hub gives base {ref!r} only to who accepted its terms: log in there") from error
    except RepositoryNotFoundError as error:
        raise ModelUnavailable(f"the hub has no base {ref!r}, or not for all: check the name, or log in") from error
    except (HfHubHTTPError, TransportError, OfflineModeIsEnabled) as error:
        unreachable = error
    try:
        offline = unreachable is not None
        return Path(snapshot_download(ref, allow_patterns=patterns, ignore_patterns=ignored, local_files_only=offline))
    except LocalEntryNotFoundError as error:
        raise ModelUnavailable(
            f"base {ref!r} is not in the local cache and the hub cannot be reached; download it on a machine with "
            "access, or put its folder into CFFA_MODELS_DIR"
        ) from (unreachable or error)
    except (TransportError, OSError) as error:
        raise ModelUnavailable(
            f"base {ref!r} could not be downloaded: {error}; try again, it goes on where it was"
        ) from error
