"""What a child is started with."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from services.worker.child_process import ChildProcess


def environment_of_a_child(threads: int) -> dict[str, str]:
    child = ChildProcess([sys.executable, "-c", "import sys; sys.stdin.read()"], "job", threads=threads)
    try:
        raw = Path(f"/proc/{child.pid}/environ").read_text().split("\0")
    finally:
        child.kill()
    return dict(entry.split("=", 1) for entry in raw if entry)


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")
def test_threads_are_as_many_as_told_and_do_not_spin_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    found = environment_of_a_child(3)
    assert (found["OMP_NUM_THREADS"], found["GOMP_SPINCOUNT"]) == ("3", "10000")
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    assert environment_of_a_child(1)["GOMP_SPINCOUNT"] == "7"
