"""Weights of strangers: pickles under any name and safetensors files that lie are refused, and nothing in them runs."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from cffa_core.errors import CffaError, CorruptArtifact, ModelUnavailable
from cffa_core.models import checkpoint
from cffa_core.models.base import Base, load_base
from cffa_core.models.interchange import read_lora
from tests.micro_base import write_micro_base
from tests.security.hostile import PICKLE


def file_with(header: dict[str, object], data: bytes = b"") -> bytes:
    """A safetensors file with this header."""
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def tensor(start: int, end: int, *shape: int, kind: str = "F32") -> dict[str, object]:
    return {"dtype": kind, "shape": list(shape), "data_offsets": [start, end]}


def torch_pickle() -> bytes:
    """What torch.save writes (a zip that holds a pickle), whose pickle is ours."""
    import io
    import zipfile

    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("archive/data.pkl", PICKLE)
    return out.getvalue()


FILES: dict[str, Callable[[], bytes]] = {
    "pickle": lambda: PICKLE,
    "torch pickle": torch_pickle,
    "empty": bytes,
    "header of 8 EiB": lambda: struct.pack("<Q", 2**63 - 1) + b"{}",
    "header of 2 GiB": lambda: struct.pack("<Q", 2**31) + b"{}" + b" " * 100,
    "header of 90 MB that is not there": lambda: struct.pack("<Q", 90_000_000) + b'{"a":',
    "header that is no JSON": lambda: struct.pack("<Q", 8) + b"nonsense",
    "header of brackets": lambda: struct.pack("<Q", 1_000_000) + b"[" * 1_000_000,
    "overlapping tensors": lambda: file_with({"a": tensor(0, 64, 16), "b": tensor(32, 96, 16)}, bytes(96)),
    "tensor beyond the end": lambda: file_with({"a": tensor(0, 2**40, 2**38)}, bytes(64)),
    "tensor before the beginning": lambda: file_with({"a": tensor(64, 0, 16)}, bytes(64)),
    "shape that overflows": lambda: file_with({"a": tensor(0, 64, 2**33, 2**33)}, bytes(64)),
    "shape of another size": lambda: file_with({"a": tensor(0, 64, 1_000_000)}, bytes(64)),
    "hole between tensors": lambda: file_with({"a": tensor(0, 4, 1), "b": tensor(60, 64, 1)}, bytes(64)),
    "type that does not exist": lambda: file_with({"a": tensor(0, 64, 16, kind="OBJECT")}, bytes(64)),
    "negative offsets": lambda: file_with({"a": tensor(-64, 0, 16)}, bytes(64)),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_micro_base(tmp_path_factory.mktemp("base") / "micro")


@pytest.fixture(scope="module")
def base(folder: Path) -> Base:
    return load_base(folder)


@pytest.fixture(autouse=True)
def somewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working folder in which it would show if a pickle had been read."""
    monkeypatch.chdir(tmp_path)


def refused(read: Callable[[], object], *kinds: type[CffaError]) -> None:
    began = time.process_time()
    with pytest.raises(kinds):
        read()
    assert time.process_time() - began < 5.0
    assert not Path("unpickled").exists()


@pytest.mark.parametrize("name", FILES)
def test_as_an_imported_model(name: str, base: Base, tmp_path: Path) -> None:
    path = tmp_path / "pytorch_lora_weights.safetensors"
    path.write_bytes(FILES[name]())
    refused(lambda: read_lora(path, base.unet), CorruptArtifact, ModelUnavailable)


@pytest.mark.parametrize("name", FILES)
def test_as_a_checkpoint_whose_digests_are_right(name: str, tmp_path: Path) -> None:
    checkpoint.write_state(tmp_path, {"a": torch.zeros(2)}, {"step": 1})
    (tmp_path / checkpoint.TENSORS).write_bytes(FILES[name]())
    document = json.loads((tmp_path / checkpoint.STATE).read_text())
    (tmp_path / checkpoint.STATE).unlink()
    document["files"] = checkpoint.describe_files(tmp_path)
    (tmp_path / checkpoint.STATE).write_text(json.dumps(document))
    refused(lambda: checkpoint.read_state(tmp_path), CorruptArtifact)


@pytest.mark.parametrize("name", ["pickle", "torch pickle", "overlapping tensors", "header of 2 GiB"])
def test_as_weights_of_a_base(name: str, folder: Path, tmp_path: Path) -> None:
    import shutil

    copied = shutil.copytree(folder, tmp_path / "micro")
    weights = next((copied / "unet").glob("*.safetensors"))
    weights.write_bytes(FILES[name]())
    refused(lambda: load_base(copied), CorruptArtifact, ModelUnavailable)


def test_other_formats_are_not_looked_for(folder: Path, base: Base, tmp_path: Path) -> None:
    import shutil

    copied = shutil.copytree(folder, tmp_path / "micro")
    weights = next((copied / "unet").glob("*.safetensors"))
    weights.rename(weights.with_suffix(".bin")).write_bytes(torch_pickle())
    refused(lambda: load_base(copied), ModelUnavailable)
    for ending in (".bin", ".pt", ".ckpt", ".pkl"):
        path = tmp_path / f"lora{ending}"
        path.write_bytes(torch_pickle())
        refused(lambda path=path: read_lora(path, base.unet), ModelUnavailable)  # type: ignore[misc]


def test_a_right_file_is_read(base: Base, tmp_path: Path) -> None:
    """So that the cases above fail for the reason they are there for."""
    checkpoint.write_state(tmp_path, {"a": torch.ones(2)}, {"step": 1})
    tensors, state = checkpoint.read_state(tmp_path)
    assert torch.equal(tensors["a"], torch.ones(2)) and state == {"step": 1}
    path = tmp_path / "pytorch_lora_weights.safetensors"
    path.write_bytes(save({"x": torch.ones(1)}))
    with pytest.raises(ModelUnavailable, match="low-rank"):
        read_lora(path, base.unet)
