"""A whole cluster on one machine without containers: ``make cluster``, ``make cluster-down``; docs/cluster.md.

``start`` brings up Redis, PostgreSQL and the S3 store (the scripts next door), sets them up, and leaves a keeper
process behind that runs one API and the workers and starts again whatever dies. ``stop`` ends exactly that and keeps
the data. Everything lies below one folder, CLUSTER_HOME; ports, secrets and logs too. Nothing listens beyond loopback.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from cffa_core.errors import CffaError
from services.client.servers import Servers

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
    "cffa_database_password": 24,
    "cffa_s3_access_key": 10,
    "cffa_s3_secret_key": 24,
}
READY_SECONDS = 240.0
STOP_SECONDS = 120.0
TEND_SECONDS = 5.0


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


class Cluster:
    """The cluster whose folder is ``home``."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.secrets = home / "secrets"
        self.logs = home / "logs"
        self.key_file = self.secrets / "cffa_bootstrap_key"
        self._plan_file = home / "cluster.json"
        self._keeper_file = home / "keeper.json"

    # --- what it is ---------------------------------------------------------------------------------------------------

    def plan(self) -> Plan:
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

    def environment(self, plan: Plan) -> dict[str, str]:
        """Settings of the service's processes; those that name this cluster's servers beat the caller's."""
        return {
            **os.environ,
            "CFFA_MODE": "cluster",
            "CFFA_HOME": str(self.home / "work"),
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

    # --- start and stop -----------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start what does not run yet; returns when the API is ready and all workers have registered."""
        _require_packages()
        self._make_home()
        with self._locked():
            plan, running = self.plan(), self.keeper() is not None
            if running and (kept := self._running_plan()) != plan:
                raise ClusterError(f"it runs as {kept}, which is not what was asked for; `make cluster-down` first")
            self._make_secrets()
            self._plan_file.write_text(json.dumps(asdict(plan)))
            try:
                self._servers("start", plan)
                if not running:
                    self._set_up(plan)
                    self._start_keeper()
                self._wait_ready(plan)
            except BaseException:
                if not running:
                    self._stop(plan)
                raise
        say(f"CFFA is at {plan.url} with {plan.workers} workers")
        say(f"  key      {self.key_file}")
        say(f"  use it   export CFFA_URL={plan.url} CFFA_API_KEY_FILE={self.key_file}")
        say(f"  servers  redis {plan.redis}, postgresql {plan.postgres}, s3 {plan.s3}, all on 127.0.0.1")
        say(f"  metrics  {plan.url}/metrics, workers from {plan.metrics} on")
        say(f"  data     {self.home} (kept by `make cluster-down`)")
        say(f"  logs     {self.logs}")

    def stop(self) -> None:
        """End the keeper with its children, then the servers; does nothing to anything else."""
        if not self._plan_file.exists():
            say(f"nothing was ever started in {self.home}")
            return
        with self._locked():
            self._stop(self._running_plan())
        say(f"stopped; the data stay in {self.home}")

    def status(self) -> bool:
        """Say what runs; True if everything does."""
        if not self._plan_file.exists():
            say(f"nothing was ever started in {self.home}")
            return False
        plan, pid = self._running_plan(), self.keeper()
        say(f"keeper    {f'process {pid}' if pid else 'not running'}")
        up = [pid is not None]
        for name in BACKENDS:
            port = getattr(plan, name)
            up.append(_listens(port))
            say(f"{name:<9} {'answers' if up[-1] else 'no answer'} on port {port}")
        workers = self._live_workers(plan)
        up.append(workers is not None and workers >= plan.workers)
        ready = "no answer" if workers is None else f"ready, {workers} of {plan.workers} workers"
        say(f"api       {ready} at {plan.url}")
        return all(up)

    def keep(self) -> None:
        """The keeper: run API and workers until SIGTERM, and start again a server that does not answer any more."""
        plan = self._running_plan()
        threads = max(1, len(os.sched_getaffinity(0)) // plan.workers)
        own = self.environment(plan) | {"CFFA_THREADS": os.environ.get("CFFA_THREADS") or str(threads)}
        servers = Servers(
            self.home / "work",
            port=plan.api,
            workers=plan.workers,
            mode="cluster",
            logs=self.logs,
            environment=own,
            worker_environment=lambda n: {"CFFA_METRICS_PORT": str(plan.metrics + n - 1)},
            on_event=lambda name, text: say(f"{_now()} {name} {text}"),
            give_up=sys.maxsize,
            grace_seconds=STOP_SECONDS / 2,
        )
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: servers.interrupt())
        with servers:
            say(f"{_now()} started")
            while not servers.interrupted:
                servers.wait(TEND_SECONDS)
                if not servers.interrupted and not all(_listens(getattr(plan, name)) for name in BACKENDS):
                    say(f"{_now()} a server does not answer; starting it again")
                    with contextlib.suppress(ClusterError):  # its own words are in the log; the next round tries again
                        self._servers("start", plan)
            servers.check()
        say(f"{_now()} stopped")

    def keeper(self) -> int | None:
        """Process id of the living keeper; None if there is none, also when its number is another process's by now."""
        with contextlib.suppress(FileNotFoundError, ValueError, KeyError):
            known = json.loads(self._keeper_file.read_text())
            if known["birth"] is not None and _birth(known["pid"]) == known["birth"]:
                return int(known["pid"])
        return None

    # --- parts of it --------------------------------------------------------------------------------------------------

    def _make_home(self) -> None:
        """Closed to others, except that PostgreSQL, which never runs as root, must get through to its folder."""
        root = os.geteuid() == 0
        if not self.home.exists():
            self.home.mkdir(parents=True)
            self.home.chmod(0o711 if root else 0o700)
        closed = [path for path in (self.home, *self.home.parents) if root and not path.stat().st_mode & 0o001]
        if closed:
            raise ClusterError(
                f"PostgreSQL will run as the user postgres, who may not pass through {closed[-1]}: name another folder "
                f"with CLUSTER_HOME=..., run this as an ordinary user, or `chmod o+x {closed[-1]}`"
            )
        for folder in (self.secrets, self.logs, self.home / "work"):
            folder.mkdir(mode=0o700, exist_ok=True)

    def _make_secrets(self) -> None:
        for name, length in SECRETS.items():
            path = self.secrets / name
            if path.exists():
                continue
            new = path.with_name(f".{name}.new")
            new.unlink(missing_ok=True)
            with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(secrets.token_hex(length))
            new.rename(path)

    def _servers(self, action: str, plan: Plan) -> None:
        """Run the script of each server with ``action``, all at once; raises :class:`ClusterError`."""
        given = {
            "S3_ACCESS_KEY": "cffa_s3_access_key",
            "S3_SECRET_KEY": "cffa_s3_secret_key",
            "POSTGRES_PASSWORD": "cffa_database_password",
        }
        environment = {**os.environ, **{name: (self.secrets / file).read_text() for name, file in given.items()}}
        running = {
            name: subprocess.Popen(
                [str(HERE / f"{name}.sh"), action, str(self.home / name), str(getattr(plan, name))],
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

    def _set_up(self, plan: Plan) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "services.api.setup", "--timeout", "60"],
            env=self.environment(plan),
            capture_output=True,
            text=True,
        )
        if done.returncode != 0:
            raise ClusterError(f"the set-up failed:\n{done.stderr.strip()}")

    def _start_keeper(self) -> None:
        with (self.logs / "keeper.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-u", str(Path(__file__).resolve()), "keep"],
                env={**os.environ, "CLUSTER_HOME": str(self.home)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                cwd=self.home,
            )
        self._keeper_file.write_text(json.dumps({"pid": process.pid, "birth": _birth(process.pid)}))

    def _wait_ready(self, plan: Plan) -> None:
        end = time.monotonic() + READY_SECONDS
        while self.keeper() is not None and time.monotonic() < end:
            if (self._live_workers(plan) or 0) >= plan.workers:
                return
            time.sleep(0.3)
        what = "is not ready in time" if self.keeper() else "did not start"
        raise ClusterError(f"the service {what}; the logs are in {self.logs}:\n{_tail(self.logs / 'keeper.log')}")

    def _live_workers(self, plan: Plan) -> int | None:
        """Workers that the API knows; None if it is not ready."""
        headers = {"Authorization": f"Bearer {self.key_file.read_text()}"}
        try:
            with urllib.request.urlopen(f"{plan.url}/readyz", timeout=10):
                pass
            asked = urllib.request.Request(f"{plan.url}/v1/queue", headers=headers)
            with urllib.request.urlopen(asked, timeout=10) as answer:
                return int(json.load(answer)["workers"])
        except (OSError, ValueError, KeyError):
            return None

    def _stop(self, plan: Plan) -> None:
        """Ask the keeper to end, kill it if it does not (its children end without it), then stop the servers."""
        end = time.monotonic() + STOP_SECONDS
        if (pid := self.keeper()) is not None:
            os.kill(pid, signal.SIGTERM)
        while (pid := self.keeper()) is not None:
            if time.monotonic() > end:
                say(f"the keeper does not end within {STOP_SECONDS:g} s; it is killed")
                os.kill(pid, signal.SIGKILL)
                end += STOP_SECONDS
            time.sleep(0.1)
        self._keeper_file.unlink(missing_ok=True)
        self._servers("stop", plan)

    def _running_plan(self) -> Plan:
        return Plan(**json.loads(self._plan_file.read_text()))

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """One start or stop at a time."""
        with (self.home / "lock").open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def default_home() -> Path:
    """CLUSTER_HOME, or a folder that this user may write and, for root, the user postgres may pass through."""
    if given := os.environ.get("CLUSTER_HOME", ""):
        return Path(given).expanduser().resolve()
    if os.geteuid() == 0:
        return Path("/var/lib/cffa-cluster")
    data = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    return Path(data).expanduser() / "cffa-cluster"


def say(text: str) -> None:
    """One line for people."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _require_packages() -> None:
    missing = [
        packages for program, packages in NEEDS.values() if not (shutil.which(program) or Path(program).is_dir())
    ]
    if missing:
        raise ClusterError(
            "servers are missing; on Debian or Ubuntu:\n  "
            f"apt-get install -y --no-install-recommends {' '.join(missing)}\n"
            "(switch off the services that these packages start by themselves, if you do not want them)"
        )


def _listens(port: int) -> bool:
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


def _tail(path: Path) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-20:]) if path.exists() else ""


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")


def _demo(cluster: Cluster, arguments: Sequence[str]) -> int:
    """The demo against the running cluster; its last line is the demo's own."""
    environment: Mapping[str, str] = {**os.environ, "CFFA_API_KEY_FILE": str(cluster.key_file), "CFFA_API_KEY": ""}
    command = [sys.executable, "-m", "services.client.cli", "demo", "--url", cluster.plan().url, *arguments]
    os.execve(sys.executable, command, dict(environment))


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1 after an error, 3 if ``status`` found something missing."""
    parser = argparse.ArgumentParser(prog="cluster.py", description=__doc__)
    parser.add_argument("action", choices=("start", "stop", "status", "demo", "keep"))
    asked, rest = parser.parse_known_args(arguments)
    if rest and asked.action != "demo":
        parser.error(f"{asked.action} takes no arguments")
    for name in [name for name in os.environ if name.lower() in SECRETS]:
        del os.environ[name]  # this cluster has secrets of its own, in files, which the environment would beat
    cluster = Cluster(default_home())
    try:
        if asked.action == "demo":
            return _demo(cluster, rest)
        if asked.action == "status":
            return 0 if cluster.status() else 3
        getattr(cluster, asked.action)()
    except CffaError as error:
        sys.stderr.write(f"error: {error.message}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
