"""Starts a compose service's own command line, with its own environment, as a process of this machine.

What a container would give it is put in its place: host names become loopback, ports free ones, /run/secrets a folder
with the files that the service is given, volumes folders. Nothing else of the configuration is changed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.deploy import tools
from tests.servers import _free_port as free_port

PATIENCE = 240.0


@dataclass
class Stage:
    """Where the services run: a folder, all secrets, and the addresses that stand for the containers' names."""

    folder: Path
    secrets: Path
    addresses: dict[str, str]
    settings: dict[str, str] = field(default_factory=dict)
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    ports: dict[tuple[str, int], int] = field(default_factory=dict)

    def port(self, service: str, inside: int) -> int:
        """The port of this machine that stands for a port of the service's container."""
        return self.ports.setdefault((service, inside), free_port())

    def environment(self, service: str) -> dict[str, str]:
        """The service's environment, and of this machine's only where programs are found."""
        given: dict[str, str] = dict(tools.services()[service]["environment"])
        folder = self.folder / service
        folder.mkdir(exist_ok=True)
        if "CFFA_SECRETS_DIR" in given:
            own = self.folder / f"{service}-secrets"
            own.mkdir(exist_ok=True)
            for item in tools.services()[service].get("secrets", []):
                if not (own / item["source"]).exists():
                    shutil.copy(self.secrets / item["source"], own)
            given["CFFA_SECRETS_DIR"] = str(own)
        for name, value in given.items():
            for inside, here in self.addresses.items():
                value = value.replace(inside, here)
            given[name] = value
        places = {"CFFA_HOME": str(folder), "CFFA_MODELS_DIR": str(folder), "CFFA_HOST": "127.0.0.1"}
        ports = {name: str(self.port(service, int(given[name]))) for name in PORTS if name in given}
        given |= {name: value for name, value in places.items() if name in given} | ports | self.settings
        machine = {"PATH": os.environ["PATH"], "PYTHONPATH": str(tools.ROOT), "PYTHONUNBUFFERED": "1"}
        return machine | {"OMP_NUM_THREADS": "1", "HOME": str(folder)} | given

    def start(self, service: str) -> subprocess.Popen[bytes]:
        """Start the service's command; its output goes to ``SERVICE.log``."""
        with (self.folder / f"{service}.log").open("wb") as log:
            process = subprocess.Popen(
                self._local(service, tools.services()[service]["command"]),
                env=self.environment(service),
                cwd=self.folder,
                stdout=log,
                stderr=log,
            )
        self.processes[service] = process
        return process

    def run(self, service: str, command: list[str] | None = None) -> subprocess.CompletedProcess[str]:
        """Run a command to its end as the service: its own one, or another program of its image."""
        return subprocess.run(
            self._local(service, command or tools.services()[service]["command"]),
            env=self.environment(service),
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )

    def healthy(self, service: str) -> bool:
        """What the container's health check says."""
        test = tools.services()[service]["healthcheck"]["test"]
        assert test[0] == "CMD"
        return self.run(service, test[1:]).returncode == 0

    def wait_healthy(self, service: str) -> None:
        """Return when the health check succeeds; the log is in the failure if it never does."""
        end = time.monotonic() + PATIENCE
        while not self.healthy(service):
            code = self.processes[service].poll()
            assert code is None, f"{service} ended with {code}\n{self.log(service)}"
            assert time.monotonic() < end, f"{service} is not healthy\n{self.log(service)}"
            time.sleep(0.2)

    def log(self, service: str) -> str:
        """The end of what the service wrote."""
        return (self.folder / f"{service}.log").read_text(errors="replace")[-4000:]

    def close(self) -> None:
        """Kill what still runs."""
        for process in self.processes.values():
            process.kill()
            process.wait()

    def _local(self, service: str, command: list[str]) -> list[str]:
        program = {"python": sys.executable, "celery": str(Path(sys.executable).with_name("celery"))}[command[0]]
        arguments = [argument.replace("--address=0.0.0.0", "--address=127.0.0.1") for argument in command[1:]]
        for inside in INSIDE.get(service, ()):
            here = str(self.port(service, inside))
            arguments = [argument.replace(f":{inside}/", f":{here}/") for argument in arguments]
            arguments = [argument.replace(f"--port={inside}", f"--port={here}") for argument in arguments]
        return [program, *arguments]


PORTS = ("CFFA_PORT", "CFFA_METRICS_PORT")
INSIDE: dict[str, tuple[int, ...]] = {"api": (8008,), "worker-cpu": (9464,), "worker-gpu": (9464,), "flower": (5555,)}


def shown(process: subprocess.Popen[bytes]) -> str:
    """What anybody on the machine can see of a process: its command line; and what its user can: its environment."""
    entries: list[Any] = [Path(f"/proc/{process.pid}/{name}").read_bytes() for name in ("cmdline", "environ")]
    return b"\0".join(entries).decode(errors="replace")
