"""Processes that work on one record at the same time, forked from one that has imported everything already.

``python -m tests.record_processes`` reads lines ``ACTION URL LOG`` and answers each with the process id of a fork that
does it. A fork appends one line to its log after each call that RETURNED, so that a test knows what was acknowledged
even if the fork is killed; its last line is ``end``.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

from cffa_core.errors import CffaError, StorageUnavailable
from cffa_core.jobs.records import Claim, Progress
from cffa_core.jobs.spec import GenerationSpec, Kind
from cffa_core.jobs.state import UnitKind, UnitState
from cffa_core.jobs.store import JobStore
from tests.record_cases import ALL_KINDS, LEASE, OTHER, OWNER, commit_part, files, generation_job

Say = Callable[[str], None]
T = TypeVar("T")


def migrate(store: JobStore, say: Say) -> None:
    """Start as the API and the worker do."""
    store.migrate()
    store.register_worker(f"w{os.getpid()}", {})
    say("migrated")


def work(store: JobStore, say: Say) -> None:
    """Claim and commit until nothing waits."""
    while (claim := store.claim(f"w{os.getpid()}", ALL_KINDS, lease_seconds=LEASE)) is not None:
        say(f"claimed {claim.unit_id} {claim.attempt} {claim.kind.value}")
        if claim.kind is UnitKind.PART:
            commit_part(store, claim)
        else:
            store.commit(claim, files(), {}, job_result={})
        say(f"committed {claim.unit_id}")


def live(store: JobStore, say: Say) -> None:
    """Create jobs and do their work, on and on; made to be killed."""
    models = {owner: store.list_models(owner).items[0].id for owner in (OWNER, OTHER)}
    for _ in range(500):
        for owner in (OWNER, OTHER):
            say(f"created {generation_job(store, models[owner], owner).id}")
        for _ in range(3):
            claim = store.claim("w", ALL_KINDS, lease_seconds=LEASE)
            if claim is not None and claim.kind is UnitKind.PART:
                commit_part(store, claim)
                say(f"committed {claim.job_id} {claim.index}")


def endure(store: JobStore, say: Say) -> None:
    """Create jobs and do their work while the database goes down and comes back; each key makes one job."""
    models = {owner: store.list_models(owner).items[0].id for owner in (OWNER, OTHER)}

    def insist(write: Callable[[], T]) -> T:
        deadline = time.monotonic() + 60.0
        while True:
            try:
                return write()
            except StorageUnavailable:
                if time.monotonic() > deadline:
                    raise
            time.sleep(0.02)

    for number in range(ENDURED_JOBS):
        spec = GenerationSpec(model_id=models[OWNER], count=4, part_size=4, seed=number)
        key = f"{os.getpid()}-{number}"
        job, _ = insist(partial(store.create_job, OWNER, spec, idempotency_key=key))
        say(f"created {job.id}")
        while (claim := insist(partial(store.claim, f"w{os.getpid()}", ALL_KINDS, lease_seconds=LEASE))) is not None:
            say(f"claimed {claim.unit_id} {claim.attempt}")
            if claim.kind is UnitKind.PART:
                insist(partial(commit_part, store, claim))
            else:
                insist(partial(store.commit, claim, files(), {}, job_result={}))
            say(f"committed {claim.unit_id}")


def quarrel(store: JobStore, say: Say) -> None:
    """Everything that locks rows, in random order, on the same few jobs as the others."""
    dice = random.Random(os.getpid())
    models = {owner: store.list_models(owner).items[0].id for owner in (OWNER, OTHER)}
    deadline = time.monotonic() + QUARREL_SECONDS
    deck: list[str] = []
    while deck or time.monotonic() < deadline:
        deck = deck or dice.sample(ACTS, len(ACTS))
        act = deck.pop()
        owner = dice.choice((OWNER, OTHER))
        jobs = [job.id for job in store.list_jobs(owner, Kind.GENERATION, page_size=4).items]
        act = dice.choice(
            ("create", "claim", "claim", "claim", "cancel", "pause", "resume", "retry", "delete", "sweep")
        )
        with contextlib.suppress(CffaError):  # what the state of the job forbids, or another process was faster at
            if act == "create":
                generation_job(store, models[owner], owner)
            elif act == "sweep":
                store.sweep()
            elif act == "claim":
                claim = store.claim(f"w{os.getpid()}", ALL_KINDS, lease_seconds=dice.choice((0.01, LEASE)))
                if claim is not None:
                    end = dice.choice((commit_part, JobStore.release, JobStore.renew, None))
                    if end is not None and claim.kind is UnitKind.PART:
                        _end(store, claim, end)
            elif jobs:
                getattr(store, f"{act}_job")(owner, dice.choice(jobs))
        say(act)


def _end(store: JobStore, claim: Claim, end: Callable[..., object]) -> None:
    if end is JobStore.renew:
        store.renew(claim, LEASE, Progress("sampling", 1, 2))
        store.add_metrics(claim, 1, {"loss": 1.0})
        store.crashed(claim, "quarrel", made_progress=True)
    else:
        end(store, claim)


def turns(store: JobStore, say: Say) -> None:
    """Try to take a turn again and again; say when it was taken."""
    deadline = time.monotonic() + TURN_SECONDS * 4
    while time.monotonic() < deadline:
        if store.take_turn("house", TURN_SECONDS):
            say(f"took {time.monotonic()}")
        time.sleep(0.005)


def capped(store: JobStore, say: Say) -> None:
    """Work under a cap on running units until nothing is left; an owner at the cap is waited for."""
    while store.load().units[Kind.GENERATION, UnitState.QUEUED]:
        claim = store.claim(f"w{os.getpid()}", ALL_KINDS, lease_seconds=LEASE)
        if claim is None:
            time.sleep(0.005)
        elif claim.kind is UnitKind.PART:
            say(f"claimed {claim.unit_id}")
            time.sleep(0.03)  # the others ask meanwhile
            commit_part(store, claim)
        else:
            store.commit(claim, files(), {}, job_result={})


ACTS = ("create", "claim", "claim", "claim", "cancel", "pause", "resume", "retry", "delete", "sweep")
ENDURED_JOBS = 6
QUARREL_SECONDS = 4.0
TURN_SECONDS = 0.5
CAP = 2
ACTIONS = {action.__name__: action for action in (migrate, work, live, endure, quarrel, turns, capped)}


def _fork(action: str, url: str, log: str) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

        def say(line: str) -> None:
            os.write(descriptor, f"{line}\n".encode())

        store = JobStore(url, owner_running_units=CAP if action == "capped" else 0)
        ACTIONS[action](store, say)
        store.close()
        os.write(descriptor, b"end\n")
        code = 0
    finally:
        os._exit(code)


class Processes:
    """The test's side: start forks, read their logs, kill them."""

    def __init__(self, pipe: subprocess.Popen[str], folder: Path) -> None:
        self._pipe = pipe
        self._folder = folder
        self._started = 0

    def start(self, action: str, url: str) -> tuple[int, Path]:
        """Fork; returns the process id and the log."""
        self._started += 1
        log = self._folder / f"{action}-{self._started}.log"
        assert self._pipe.stdin is not None
        assert self._pipe.stdout is not None
        self._pipe.stdin.write(f"{action} {url} {log}\n")
        self._pipe.stdin.flush()
        return int(self._pipe.stdout.readline()), log

    def finish(self, started: list[tuple[int, Path]], seconds: float = 120.0) -> list[list[str]]:
        """Wait until all have come to their end; returns their lines, without the last."""
        deadline = time.monotonic() + seconds
        for pid, log in started:
            while not ended(pid):
                assert time.monotonic() < deadline, f"{log.name} is not done"
                time.sleep(0.01)
        lines = [log.read_text().splitlines() for _, log in started]
        assert all(found and found[-1] == "end" for found in lines), lines
        return [found[:-1] for found in lines]

    def wait_for_lines(self, started: list[tuple[int, Path]], more: int, *, extra: float) -> None:
        """Wait until so many more lines were written (or all have come to their end), and ``extra`` seconds."""
        goal = self._lines(started) + more
        deadline = time.monotonic() + 120.0
        while self._lines(started) < goal and not all(ended(pid) for pid, _ in started):
            assert time.monotonic() < deadline, "nothing more was acknowledged"
            time.sleep(0.005)
        time.sleep(extra)

    @staticmethod
    def _lines(started: list[tuple[int, Path]]) -> int:
        return sum(log.read_bytes().count(b"\n") for _, log in started if log.exists())

    def kill_while_busy(self, started: tuple[int, Path], after_lines: int, extra: random.Random) -> list[str]:
        """SIGKILL once so many lines were acknowledged, at a random moment soon after; returns what it acknowledged."""
        pid, log = started
        deadline = time.monotonic() + 60.0
        while not log.exists() or log.read_bytes().count(b"\n") < after_lines:
            assert time.monotonic() < deadline, "nothing was acknowledged"
            time.sleep(0.001)
        time.sleep(extra.uniform(0.0, 0.02))
        os.kill(pid, signal.SIGKILL)
        while not ended(pid):
            time.sleep(0.001)
        lines = log.read_text().splitlines()
        assert "end" not in lines, "it was not killed in time"
        return lines


def ended(pid: int) -> bool:
    """Whether a fork is gone."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


@contextmanager
def processes(folder: Path) -> Iterator[Processes]:
    """Start the process that forks the others; it ends with the block."""
    pipe = subprocess.Popen(
        [sys.executable, "-m", "tests.record_processes"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with pipe:
        yield Processes(pipe, folder)


def main() -> None:
    """Fork on demand until the input ends; forks are reaped by the system."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in sys.stdin:
        sys.stdout.write(f"{_fork(*line.split())}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
