"""Checkpoints on disk: safetensors and JSON, written whole or not at all, verified when read.

Knows folders, digests and named tensors; not what they mean. No pickle, ever.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from cffa_core.disk_files import flush, sha256_of
from cffa_core.errors import CorruptArtifact, ModelUnavailable

STATE_FORMAT = "cffa-training-state/1"
TENSORS, STATE = "state.safetensors", "state.json"


@contextmanager
def publish(folder: Path) -> Iterator[Path]:
    """Yield an empty staging folder that replaces ``folder`` when the block ends well, and vanishes when it does not.

    Files are flushed to disk before the rename, so after a power cut there is the old folder, the new one or none.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        yield staging
        for path in [*staging.rglob("*"), staging]:
            flush(path)
        shutil.rmtree(folder, ignore_errors=True)
        staging.rename(folder)
        flush(folder.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def write_state(folder: Path, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]) -> None:
    """Write named tensors and JSON values into ``folder``, with the digests of ALL files that lie in it by then."""
    content = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    (folder / TENSORS).write_bytes(save(content))
    document = {"format": STATE_FORMAT, "state": dict(state), "files": describe_files(folder)}
    (folder / STATE).write_text(json.dumps(document, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_state(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read what :func:`write_state` wrote; raises ``CorruptArtifact`` if any file of the folder is not as written."""
    try:
        document = json.loads((folder / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CorruptArtifact(f"the checkpoint has no readable {STATE}: {error}") from error
    if not isinstance(document, dict) or document.get("format") != STATE_FORMAT:
        raise CorruptArtifact(f"{STATE} of the checkpoint is not {STATE_FORMAT}")
    verify_files(folder, document["files"])
    try:
        return load_file(folder / TENSORS), document["state"]
    except (OSError, SafetensorError) as error:
        raise CorruptArtifact(f"{TENSORS} of the checkpoint is not readable: {error}") from error


def read_tensors(path: Path, expected: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a model's safetensors file, which must have the names and shapes of ``expected``.

    Raises ``ModelUnavailable`` if the file is absent, ``CorruptArtifact`` if it is not readable or does not fit.
    """
    if not path.is_file():
        raise ModelUnavailable(f"the model folder has no {path.name}")
    try:
        found: dict[str, torch.Tensor] = load_file(path)
    except SafetensorError as error:
        raise CorruptArtifact(f"{path.name} is not a readable safetensors file: {error}") from error
    wrong = set(expected) ^ set(found)
    wrong |= {name for name in set(expected) & set(found) if expected[name].shape != found[name].shape}
    if wrong:
        raise CorruptArtifact(f"{path.name} does not fit this base and these settings: {sorted(wrong)[:3]}")
    return found


def describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file below ``folder``, by relative name, in order."""
    return {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def folder_digest(folder: Path) -> str:
    """SHA-256 (hex) over names and digests of all files below ``folder``: the digest of a model, wherever it lies."""
    listing = "".join(f"{name}\0{entry['sha256']}\n" for name, entry in sorted(describe_files(folder).items()))
    return hashlib.sha256(listing.encode()).hexdigest()


def verify_files(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise ``CorruptArtifact`` naming the first file that is absent or does not match its size and digest."""
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            raise CorruptArtifact(f"{folder.name} lacks {name}")
        if path.stat().st_size != expected["size"] or sha256_of(path) != expected["sha256"]:
            raise CorruptArtifact(
                f"{folder.name}/{name} is not the file that was written (size or SHA-256 differ); "
                "fetch or copy it again, or take an older checkpoint"
            )
