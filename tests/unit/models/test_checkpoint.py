"""Checkpoints on disk: whole or not at all, and verified when read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cffa_core.errors import CorruptArtifact
from cffa_core.models.checkpoint import publish, read_state, write_state

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "step": torch.tensor(3.0), "half": torch.ones(2, dtype=torch.bfloat16)}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    with publish(folder) as staging:
        (staging / "log.txt").write_text("step 1\n")
        write_state(staging, TENSORS, {"step": 3, "best": None})
    return folder


def test_round_trip(checkpoint: Path) -> None:
    tensors, state = read_state(checkpoint)
    assert state == {"step": 3, "best": None}
    assert set(tensors) == set(TENSORS)
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)


@pytest.mark.parametrize("name", ["state.safetensors", "log.txt"])
def test_any_changed_file_is_noticed(checkpoint: Path, name: str) -> None:
    path = checkpoint / name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorruptArtifact, match=name):
        read_state(checkpoint)


@pytest.mark.parametrize("content", ["", "[]", '{"format": "other"}'])
def test_a_broken_index_is_noticed(checkpoint: Path, content: str) -> None:
    (checkpoint / "state.json").write_text(content)
    with pytest.raises(CorruptArtifact, match=r"state\.json"):
        read_state(checkpoint)


def test_a_failed_write_leaves_the_old_folder(checkpoint: Path) -> None:
    before = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    with pytest.raises(RuntimeError, match="killed"), publish(checkpoint) as staging:
        (staging / "half.txt").write_text("written")
        raise RuntimeError("killed")
    assert {path.name: path.read_bytes() for path in checkpoint.iterdir()} == before
    assert [path.name for path in checkpoint.parent.iterdir()] == ["checkpoint"]


def test_publishing_replaces_the_whole_folder(checkpoint: Path) -> None:
    with publish(checkpoint) as staging:
        (staging / "new.txt").write_text("new")
    assert [path.name for path in checkpoint.iterdir()] == ["new.txt"]
