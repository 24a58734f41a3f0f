"""Which files make a base model: the Stable-Diffusion layout, what may be missing, and the digest of it all.

Knows names and bytes, not what the weights mean; no numeric library is imported here.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path

from cffa_core.disk_files import sha256_of
from cffa_core.errors import ModelUnavailable

_MODEL_FILES = ("config.json", "diffusion_pytorch_model*.safetensors", "diffusion_pytorch_model.safetensors.index.json")
# Part -> the files that decide its numbers; variants (fp16, non_ema) and pickles are neither read nor downloaded.
PARTS: dict[str, tuple[str, ...]] = {
    "tokenizer": ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    "text_encoder": ("config.json", "model*.safetensors", "model.safetensors.index.json"),
    "vae": _MODEL_FILES,
    "unet": _MODEL_FILES,
    "scheduler": ("scheduler_config.json",),
}
_PLAIN_WEIGHTS = re.compile(r"(diffusion_pytorch_model|model)(-\d{5}-of-\d{5})?\.safetensors")


def is_read(name: str) -> bool:
    """Is this file, e.g. ``unet/config.json``, one of those that a base is loaded from?"""
    part, _, file = name.partition("/")
    return any(fnmatchcase(file, pattern) for pattern in PARTS.get(part, ())) and (
        not file.endswith(".safetensors") or _PLAIN_WEIGHTS.fullmatch(file) is not None
    )


def check_complete(names: Collection[str], where: str) -> None:
    """Raise ``ModelUnavailable`` naming every part that the files ``names`` of the base ``where`` do not make whole."""
    missing = []
    for part in PARTS:
        files = {name.partition("/")[2] for name in names if name.startswith(f"{part}/") and is_read(name)}
        if part == "tokenizer":
            complete = "tokenizer.json" in files or {"vocab.json", "merges.txt"} <= files
        elif part == "scheduler":
            complete = bool(files)
        else:
            complete = "config.json" in files and any(file.endswith(".safetensors") for file in files)
        if not complete:
            missing.append(part)
    if missing:
        raise ModelUnavailable(
            f"{where} lacks {', '.join(missing)} (each part needs its configuration, and weights as safetensors): copy "
            "what is missing from where the base came from, or take another base"
        )


def base_files(folder: Path) -> list[Path]:
    """The files of a base that are read; raises ``ModelUnavailable`` naming every missing part."""
    found = {f"{part}/{path.name}": path for part in PARTS for path in sorted((folder / part).glob("*"))}
    kept = {name: path for name, path in found.items() if is_read(name) and path.is_file()}
    check_complete(kept, f"the base model folder {folder.name!r}")
    return list(kept.values())


def base_digest(folder: Path) -> str:
    """SHA-256 (hex) over names and digests of the files that ``load_base`` reads from ``folder``."""
    return digest_of(folder, base_files(folder))


def digest_of(folder: Path, files: Sequence[Path]) -> str:
    """As :func:`base_digest`, for the files of :func:`base_files`."""
    lines = [f"{path.relative_to(folder).as_posix()} {file_digest(path)}\n" for path in files]
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 (hex) of a file, remembered while its size and time stay: SD 1.5 is 4 GB and is loaded once per job."""
    status = path.stat()
    return _hash(str(path.resolve()), status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=256)
def _hash(path: str, size: int, mtime_ns: int) -> str:
    return sha256_of(Path(path))
