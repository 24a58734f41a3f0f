"""A whole cluster on one machine without containers: ``make cluster``, ``make cluster-down``; docs/cluster.md.

``start`` brings up Redis, PostgreSQL and the S3 store (the scripts next door), sets them up, and leaves a keeper
process behind that runs one API and the workers and starts again whatever dies. ``stop`` ends exactly that and keeps
the data. Everything lies below one folder, CLUSTER_HOME (``cluster_home.py``). Nothing listens beyond loopback.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from cluster_home import (
    BACKENDS,
    SECRETS,
    ClusterError,
    ClusterHome,
    Plan,
    default_folder,
    listens,
    require_packages,
)

from cffa_core.errors import CffaError
from services.client.servers import PortInUse, Servers, require_free

READY_SECONDS = 240.0
STOP_SECONDS = 120.0
TEND_SECONDS = 5.0
FREE_SECONDS = 30.0
# Whatever proxy the environment names has no part in what this machine says to itself.
_HERE = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Cluster:
    """What can be done with the cluster in ``home``."""

    def __init__(self, home: ClusterHome) -> None:
        self.home = home

    def start(self) -> None:
        """Start what does not run yet; returns when the API is ready and all workers have registered."""
        require_packages()
        home = self.home
        home.make()
        with home.locked():
            plan, running = home.asked_plan(), home.keeper() is not None
            if running and (kept := home.plan()) != plan:
                raise ClusterError(f"it runs as {kept}, which is not what was asked for; `make cluster-down` first")
            home.make_secrets()
            home.remember(plan)
            try:
                home.servers("start", plan)
                if not running:
                    self._set_up(plan)
                    self._start_keeper()
                self._wait_ready(plan)
            except BaseException:
                if not running:
                    self._stop(plan)
                raise
        say(f"CFFA is at {plan.url} with {plan.workers} workers")
        say(f"  key      {home.key_file}")
        say(f"  use it   export CFFA_URL={plan.url} CFFA_API_KEY_FILE={home.key_file}")
        say(f"  servers  redis {plan.redis}, postgresql {plan.postgres}, s3 {plan.s3}, all on 127.0.0.1")
        say(f"  metrics  {plan.url}/metrics, workers from {plan.metrics} on")
        say(f"  data     {home.folder} (kept by `make cluster-down`)")
        say(f"  logs     {home.logs}")

    def stop(self) -> None:
        """End the keeper with its children, then the servers; does nothing to anything else."""
        if (plan := self.home.plan()) is None:
            say(f"nothing was ever started in {self.home.folder}")
            return
        with self.home.locked():
            self._stop(plan)
        say(f"stopped; the data stay in {self.home.folder}")

    def status(self) -> bool:
        """Say what runs; True if everything does."""
        if (plan := self.home.plan()) is None:
            say(f"nothing was ever started in {self.home.folder}")
            return False
        pid = self.home.keeper()
        say(f"keeper    {f'process {pid}' if pid else 'not running'}")
        up = [pid is not None]
        for name in BACKENDS:
            port = getattr(plan, name)
            up.append(listens(port))
            say(f"{name:<9} {'answers' if up[-1] else 'no answer'} on port {port}")
        workers = self._live_workers(plan)
        up.append(workers is not None and workers >= plan.workers)
        ready = "no answer" if workers is None else f"ready, {workers} of {plan.workers} workers"
        say(f"api       {ready} at {plan.url}")
        return all(up)

    def keep(self) -> None:
        """The keeper: run API and workers until SIGTERM, and start again a server that does not answer any more."""
        plan = self.home.plan() or Plan()
        threads = max(1, len(os.sched_getaffinity(0)) // plan.workers)
        own = self.home.environment(plan) | {"CFFA_THREADS": os.environ.get("CFFA_THREADS") or str(threads)}
        servers = Servers(
            self.home.work,
            port=plan.api,
            workers=plan.workers,
            mode="cluster",
            logs=self.home.logs,
            environment=own,
            worker_environment=lambda n: {"CFFA_METRICS_PORT": str(plan.metrics + n - 1)},
            on_event=lambda name, text: say(f"{_now()} {name} {text}"),
            give_up=sys.maxsize,
            grace_seconds=STOP_SECONDS / 2,
        )
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: servers.interrupt())
        _wait_free(plan.api)
        with servers:
            say(f"{_now()} started")
            while not servers.interrupted:
                servers.wait(TEND_SECONDS)
                if not servers.interrupted:
                    self._tend(plan)
            servers.check()
        say(f"{_now()} stopped")

    def _tend(self, plan: Plan) -> None:
        """Start servers again that do not answer, unless somebody starts or stops the cluster right now."""
        if all(listens(getattr(plan, name)) for name in BACKENDS):
            return
        with self.home.locked(wait=False) as mine:
            if mine:
                say(f"{_now()} a server does not answer; starting it again")
                try:
                    self.home.servers("start", plan)
                except ClusterError as error:  # the next round tries again
                    say(f"{_now()} {error.message}")

    def _set_up(self, plan: Plan) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "services.api.setup", "--timeout", "60"],
            env=self.home.environment(plan),
            capture_output=True,
            text=True,
        )
        if done.returncode != 0:
            raise ClusterError(f"the set-up failed:\n{done.stderr.strip()}")

    def _start_keeper(self) -> None:
        with (self.home.logs / "keeper.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-u", str(Path(__file__).resolve()), "keep"],
                env={**os.environ, "CLUSTER_HOME": str(self.home.folder)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                cwd=self.home.folder,
            )
        self.home.remember_keeper(process.pid)

    def _wait_ready(self, plan: Plan) -> None:
        end = time.monotonic() + READY_SECONDS
        while self.home.keeper() is not None and time.monotonic() < end:
            if (self._live_workers(plan) or 0) >= plan.workers:
                return
            time.sleep(0.3)
        logs = self.home.logs
        what = "is not ready in time" if self.home.keeper() else "did not start"
        raise ClusterError(f"the service {what}; the logs are in {logs}:\n{_tail(logs / 'keeper.log')}")

    def _live_workers(self, plan: Plan) -> int | None:
        """Workers that the API knows; None if it is not ready."""
        headers = {"Authorization": f"Bearer {self.home.key_file.read_text()}"}
        try:
            with _HERE.open(f"{plan.url}/readyz", timeout=10):
                pass
            with _HERE.open(urllib.request.Request(f"{plan.url}/v1/queue", headers=headers), timeout=10) as answer:
                return int(json.load(answer)["workers"])
        except (OSError, ValueError, KeyError):
            return None

    def _stop(self, plan: Plan) -> None:
        """Ask the keeper to end, kill it if it does not (its children end without it), then stop the servers."""
        end = time.monotonic() + STOP_SECONDS
        if (pid := self.home.keeper()) is not None:
            os.kill(pid, signal.SIGTERM)
        while (pid := self.home.keeper()) is not None:
            if time.monotonic() > end:
                say(f"the keeper does not end within {STOP_SECONDS:g} s; it is killed")
                os.kill(pid, signal.SIGKILL)
                end += STOP_SECONDS
            time.sleep(0.1)
        self.home.remember_keeper(None)
        self.home.servers("stop", plan)


def say(text: str) -> None:
    """One line for people."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _wait_free(port: int) -> None:
    """The API of a keeper that was killed ends only some seconds after it."""
    end = time.monotonic() + FREE_SECONDS
    while time.monotonic() < end:
        try:
            return require_free("127.0.0.1", port)
        except PortInUse:
            time.sleep(0.5)


def _tail(path: Path) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-20:]) if path.exists() else ""


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")


def _demo(home: ClusterHome, arguments: Sequence[str]) -> int:
    """The demo against the running cluster; its last line is the demo's own."""
    environment = {**os.environ, "CFFA_API_KEY_FILE": str(home.key_file), "CFFA_API_KEY": ""}
    command = [sys.executable, "-m", "services.client.cli", "demo", "--url", home.asked_plan().url, *arguments]
    os.execve(sys.executable, command, environment)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1 after an error, 3 if ``status`` found something missing."""
    parser = argparse.ArgumentParser(prog="cluster.py", description=__doc__)
    parser.add_argument("action", choices=("start", "stop", "status", "demo", "keep"))
    asked, rest = parser.parse_known_args(arguments)
    if rest and asked.action != "demo":
        parser.error(f"{asked.action} takes no arguments")
    for name in [name for name in os.environ if name.lower() in SECRETS]:
        del os.environ[name]  # this cluster has secrets of its own, in files, which the environment would beat
    cluster = Cluster(ClusterHome(default_folder()))
    try:
        if asked.action == "demo":
            return _demo(cluster.home, rest)
        if asked.action == "status":
            return 0 if cluster.status() else 3
        getattr(cluster, asked.action)()
    except CffaError as error:
        sys.stderr.write(f"error: {error.message}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
