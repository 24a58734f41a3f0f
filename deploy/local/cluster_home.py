"""The folder of a cluster on one machine: its ports, its secrets, its servers, and the process that keeps it.

Everything that ``cluster.py`` starts is found again here, by files of that folder. This module starts and stops servers
by the scripts next door; it knows neither jobs nor HTTP.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import shutil
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from cffa_core.errors import CffaError

HERE = Path(__file__).resolve().parent
BACKENDS = ("redis", "postgres", "s3")
# A program of each server, and the Debian packages that bring it.
NEEDS = {
    "redis": ("redis-server", "redis-server"),
    "postgres": ("/usr/lib/postgresql", "postgresql"),
    "s3": ("radosgw", "ceph-mon ceph-osd radosgw ceph-common"),
}
SECRETS = {
    "cffa_bootstrap_key": 24,
    "cffa_key_secret": 32,
    "cffa_database_password": 24,
    "cffa_s3_access_key": 10,
    "cffa_s3_secret_key": 24,
}


class ClusterError(CffaError):
    """The cluster cannot be started or stopped as asked; the message says what to do."""

    code = "cluster"


@dataclass(frozen=True)
class Plan:
    """What runs: a port per server (the workers' metrics from ``metrics`` on) and the number of workers."""

    api: int = 8018
    redis: int = 16379
    postgres: int = 15432
    s3: int = 19000
    metrics: int = 19464
    workers: int = 2

    @property
    def url(self) -> str:
        """Address of the API."""
        return f"http://127.0.0.1:{self.api}"


class ClusterHome:
    """The cluster in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.secrets = folder / "secrets"
        self.logs = folder / "logs"
        self.work = folder / "work"
        self.key_file = self.secrets / "cffa_bootstrap_key"
        self._plan_file = folder / "cluster.json"
        self._keeper_file = folder / "keeper.json"

    def asked_plan(self) -> Plan:
        """Variables CLUSTER_API_PORT, CLUSTER_WORKERS, ... over what the last start used, over the defaults."""
        values = asdict(Plan())
        if self._plan_file.exists():
            values |= json.loads(self._plan_file.read_text())
        for name in values:
            variable = "CLUSTER_WORKERS" if name == "workers" else f"CLUSTER_{name.upper()}_PORT"
            if text := os.environ.get(variable, ""):
                if not text.isdecimal() or not 0 < int(text) < 65536:
                    raise ClusterError(f"{variable} must be a number, not {text!r}")
                values[name] = int(text)
        return Plan(**values)

    def plan(self) -> Plan | None:
        """What the last start used; None if there was none."""
        return Plan(**json.loads(self._plan_file.read_text())) if self._plan_file.exists() else None

    def remember(self, plan: Plan) -> None:
        """Make ``plan`` the one that runs."""
        self._plan_file.write_text(json.dumps(asdict(plan)))

    def environment(self, plan: Plan) -> dict[str, str]:
        """Settings of the service's processes; those that name this cluster's servers beat the caller's."""
        return {
            **os.environ,
            "CFFA_MODE": "cluster",
            "CFFA_HOME": str(self.work),
            "CFFA_HOST": "127.0.0.1",
            "CFFA_PORT": str(plan.api),
            "CFFA_PUBLIC_URL": "",
            "CFFA_SECRETS_DIR": str(self.secrets),
            "CFFA_DATABASE_URL": f"postgresql+psycopg://cffa@127.0.0.1:{plan.postgres}/cffa",
            "CFFA_BROKER_URL": f"redis://127.0.0.1:{plan.redis}/0",
            "CFFA_BROKER_PASSWORD": "",
            "CFFA_S3_ENDPOINT": f"http://127.0.0.1:{plan.s3}",
            "CFFA_S3_PUBLIC_ENDPOINT": "",
            "CFFA_S3_BUCKET": "cffa",
        }

    def keeper(self) -> int | None:
        """Process id of the living keeper; None if there is none, also when its number is another process's by now."""
        with contextlib.suppress(FileNotFoundError, ValueError, KeyError):
            known = json.loads(self._keeper_file.read_text())
            if known["birth"] is not None and _birth(known["pid"]) == known["birth"]:
                return int(known["pid"])
        return None

    def remember_keeper(self, pid: int | None) -> None:
        """Note the process that keeps API and workers running; None once it has ended."""
        self._keeper_file.unlink(missing_ok=True)
        if pid is not None:
            self._keeper_file.write_text(json.dumps({"pid": pid, "birth": _birth(pid)}))

    def make(self) -> None:
        """Closed to others, except that PostgreSQL, which never runs as root, must get through to its folder."""
        root = os.geteuid() == 0
        if not self.folder.exists():
            self.folder.mkdir(parents=True)
            self.folder.chmod(0o711 if root else 0o700)
        closed = [path for path in (self.folder, *self.folder.parents) if root and not path.stat().st_mode & 0o001]
        if closed:
            raise ClusterError(
                f"PostgreSQL will run as the user postgres, who may not pass through {closed[-1]}: name another folder "
                f"with CLUSTER_HOME=..., run this as an ordinary user, or `chmod o+x {closed[-1]}`"
            )
        for folder in (self.secrets, self.logs, self.work):
            folder.mkdir(mode=0o700, exist_ok=True)

    def make_secrets(self) -> None:
        for name, length in SECRETS.items():
            path = self.secrets / name
            if path.exists():
                continue
            new = path.with_name(f".{name}.new")
            new.unlink(missing_ok=True)
            with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(secrets.token_hex(length))
            new.rename(path)

    def servers(self, action: str, plan: Plan) -> None:
        """Run the script of each server with ``action``, all at once; raises :class:`ClusterError`."""
        given = {
            "S3_ACCESS_KEY": "cffa_s3_access_key",
            "S3_SECRET_KEY": "cffa_s3_secret_key",
            "POSTGRES_PASSWORD": "cffa_database_password",
        }
        environment = {**os.environ, **{name: (self.secrets / file).read_text() for name, file in given.items()}}
        running = {
            name: subprocess.Popen(
                [str(HERE / f"{name}.sh"), action, str(self.folder / name), str(getattr(plan, name))],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            for name in BACKENDS
        }
        failed = []
        for name, process in running.items():
            _, words = process.communicate()
            if process.returncode != 0:
                failed.append(f"{name}: {words.strip() or f'exit code {process.returncode}'}")
        if failed:
            raise ClusterError(f"{action} failed for " + "\n".join(failed))

    @contextlib.contextmanager
    def locked(self, *, wait: bool = True) -> Iterator[bool]:
        """One start or stop at a time; yields whether it is ours."""
        with (self.folder / "lock").open("ab") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
            else:
                yield True


def default_folder() -> Path:
    """CLUSTER_HOME, or a folder that this user may write and, for root, the user postgres may pass through."""
    if given := os.environ.get("CLUSTER_HOME", ""):
        return Path(given).expanduser().resolve()
    if os.geteuid() == 0:
        return Path("/var/lib/cffa-cluster")
    data = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    return Path(data).expanduser() / "cffa-cluster"


def require_packages() -> None:
    missing = [
        packages for program, packages in NEEDS.values() if not (shutil.which(program) or Path(program).is_dir())
    ]
    if missing:
        raise ClusterError(
            "servers are missing; on Debian or Ubuntu:\n  "
            f"apt-get install -y --no-install-recommends {' '.join(missing)}\n"
            "(switch off the services that these packages start by themselves, if you do not want them)"
        )


def listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    except OSError:
        return False
    return True


def _birth(pid: int) -> str | None:
    """When a process was started (clock ticks since boot, proc(5) field 22), None if it is gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else fields[19]
