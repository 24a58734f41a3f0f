"""One running API with the limits of a real installation, watched: memory, CPU time and children of its process."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from services.client.servers import Servers

MAX_RSS = 512 << 20
TICK = os.sysconf("SC_CLK_TCK")


@dataclass
class Watched:
    """The API under attack. ``decoder_peak`` is the largest resident size that any child of it has had, in bytes."""

    url: str
    pid: int
    home: Path
    decoder_peak: int = 0
    _stop: threading.Event = field(default_factory=threading.Event)

    def api_peak(self) -> int:
        """Largest resident size of the API process so far, in bytes."""
        return _peak(self.pid)

    def cpu_seconds(self) -> float:
        """CPU time of the API and of its children that have ended: not how long others kept it waiting."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, fields[11:15])) / TICK

    def watch_children(self) -> None:
        while not self._stop.wait(0.01):
            for task in Path(f"/proc/{self.pid}/task").glob("*/children"):
                try:
                    children = task.read_text().split()
                except (FileNotFoundError, ProcessLookupError):
                    continue
                self.decoder_peak = max([self.decoder_peak, *(_peak(int(child)) for child in children)])

    def stop(self) -> None:
        self._stop.set()


def _peak(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM")), 0)


@pytest.fixture(scope="package")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    home = tmp_path_factory.mktemp("attacked")
    with Servers(home / "home", workers=0, logs=home / "logs") as servers:
        servers.wait_ready()
        process = servers.children[0].process
        assert process is not None
        watched = Watched(servers.url, process.pid, home / "home")
        thread = threading.Thread(target=watched.watch_children, daemon=True)
        thread.start()
        yield watched
        watched.stop()
        thread.join()


@pytest.fixture(scope="package")
def http(api: Watched) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=api.url, timeout=120.0) as client:
        yield client
