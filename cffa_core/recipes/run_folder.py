"""The files a training run leaves: logs, previews, best and latest models; saved with a checkpoint, put back on resume.

A checkpoint carries all of them, so that a run resumed on another machine ends with the same bytes as an uninterrupted
one, logs included. Knows no model.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

LOGS = ("training_log", "validation_log")
BEST, LATEST = "best_checkpoint", "latest_checkpoints"
KEPT = 3


class RunFolder:
    """The output folder of one run. Only the run's own names in it are touched; a folder may hold other things."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def best(self) -> Path:
        """Model folder of the best validation so far."""
        return self.folder / BEST

    def latest(self, step: int) -> Path:
        """Model folder of a step."""
        return self.folder / LATEST / f"step_{step:06d}"

    def previews(self, step: int) -> Path:
        """Folder of the preview pairs of a step."""
        return self.folder / f"step_{step:06d}_random_pairs"

    def log(self, name: str, step: int, values: Mapping[str, float]) -> None:
        """Append one line to ``name.txt`` and ``name.jsonl``; no clock times, so that equal runs log equal bytes."""
        line = "  ".join(f"{key} {value:.6g}" for key, value in values.items())
        self._append(f"{name}.txt", f"step {step:6d}  {line}\n")
        self._append(f"{name}.jsonl", json.dumps({"step": step, **values}) + "\n")

    def note(self, name: str, step: int, text: str) -> None:
        """Append a remark to a log."""
        self._append(f"{name}.txt", f"step {step:6d}  {text}\n")
        self._append(f"{name}.jsonl", json.dumps({"step": step, "note": text}) + "\n")

    def prune(self) -> None:
        """Keep the latest three models."""
        for old in sorted((self.folder / LATEST).glob("step_*"))[:-KEPT]:
            shutil.rmtree(old)

    def clear(self) -> None:
        """Remove all files of a run (those of an earlier one, or those written after the checkpoint)."""
        for path in self._own():
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()

    def copy_into(self, checkpoint: Path) -> None:
        """Put the run's files into a checkpoint; as hard links where the disk allows, since they do not change."""
        for path in self._own():
            if path.is_dir():
                shutil.copytree(path, checkpoint / path.name, copy_function=_link)
            else:
                shutil.copy2(path, checkpoint / path.name)

    def restore(self, checkpoint: Path) -> None:
        """Make the run's files those of the checkpoint: later logs, previews and models are gone."""
        self.clear()
        for path in RunFolder(checkpoint)._own():
            if path.is_dir():
                shutil.copytree(path, self.folder / path.name)
            else:
                shutil.copy2(path, self.folder / path.name)

    def _own(self) -> list[Path]:
        logs = [self.folder / f"{name}.{kind}" for name in LOGS for kind in ("txt", "jsonl")]
        previews = sorted(self.folder.glob("step_*_random_pairs"))
        return [path for path in [*logs, self.folder / BEST, self.folder / LATEST, *previews] if path.exists()]

    def _append(self, name: str, text: str) -> None:
        with (self.folder / name).open("a", encoding="utf-8") as stream:
            stream.write(text)


def _link(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
    return target
