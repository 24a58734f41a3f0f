"""Writers of one SQLite record are killed with SIGKILL at random moments, several at a time.

What a call had acknowledged before the kill must be there, a job whole or not at all, and the file sound. Every second
seed kills the API itself while clients post jobs: each one that was answered with 202 must be there.
"""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import threading
import time
from pathlib import Path
from typing import Any

import httpx

from cffa_core.jobs.spec import GenerationSpec
from tests.faults.campaign import Facts, Fault
from tests.faults.place import Place
from tests.faults.worlds import FaultWorld
from tests.record_cases import OTHER, OWNER, memory_folder, sqlite_store, trained_model
from tests.record_processes import Processes, ended, processes
from tests.servers import _free_port

ROUNDS = 5
WRITERS = 3
API_KILLS = 3
CLIENTS = 4


def scenario(seed: int, place: Place) -> Facts:
    """Fifteen writers killed in fives, or the API three times."""
    dice = random.Random(seed)
    if seed % 2 == 0:
        with place.world() as world:
            return _kill_the_api(world, dice)
    with memory_folder() as folder, processes(folder) as forks:
        return _kill_writers(folder, forks, dice)


def _kill_writers(folder: Path, forks: Processes, dice: random.Random) -> Facts:
    store = sqlite_store(folder)
    for owner in (OWNER, OTHER):
        trained_model(store, owner)
    acknowledged: list[str] = []
    for _ in range(ROUNDS):
        started = [forks.start("live", f"sqlite:///{folder / 'record.sqlite'}") for _ in range(WRITERS)]
        _wait(lambda logs=[log for _, log in started]: all(log.exists() and log.read_bytes() for log in logs))
        time.sleep(dice.uniform(0.0, 0.1))
        for pid, _ in dice.sample(started, WRITERS):
            os.kill(pid, signal.SIGKILL)
            time.sleep(dice.choice([0.0, dice.uniform(0.0, 0.02)]))
        for pid, log in started:
            _wait(lambda pid=pid: ended(pid))
            acknowledged += log.read_text().splitlines()
        assert "end" not in acknowledged, "a writer was not killed in time"
        jobs, units = _sound(folder / "record.sqlite")
        for line in acknowledged:
            what, rest = line.split(" ", 1)
            assert rest in jobs if what == "created" else units[rest] == "done", line
        assert len(units) == 2 * (len(jobs) - 2), "a job is there without its units"
    store.close()
    return {"points": ROUNDS * WRITERS, "acknowledged": len(acknowledged)}


def _kill_the_api(world: FaultWorld, dice: random.Random) -> Facts:
    spec = GenerationSpec(model_id=world.adopt_model(), count=4, part_size=2)
    body = spec.model_dump(mode="json", exclude={"kind"})
    accepted: list[str] = []
    for _ in range(API_KILLS):
        port = _free_port()
        api = world.start(["-m", "services.api"], {"CFFA_PORT": str(port)})
        url = f"http://127.0.0.1:{port}"
        world.wait(lambda url=url: _ready(url), 60, "the API")
        before = len(accepted)
        clients = [threading.Thread(target=_post_until_dead, args=(url, body, accepted)) for _ in range(CLIENTS)]
        for client in clients:
            client.start()
        world.wait(lambda before=before: len(accepted) > before, 30, "an accepted job")
        time.sleep(dice.uniform(0.0, 0.5))
        api.kill()
        api.wait()
        for client in clients:
            client.join()
        jobs, units = _sound(world.settings.home / "record.sqlite")
        assert set(accepted) <= jobs, "a job that was answered with 202 is gone"
        assert len(units) == 2 * (len(jobs) - 1), "a job is there without its units"
    return {"points": API_KILLS, "acknowledged": len(accepted)}


def _post_until_dead(url: str, body: dict[str, Any], accepted: list[str]) -> None:
    with httpx.Client(base_url=url, timeout=10.0) as client:
        while True:
            try:
                answer = client.post("/v1/generation-jobs", json=body)
            except httpx.TransportError:
                return
            if answer.status_code == 202:
                accepted.append(answer.json()["id"])


def _ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz", timeout=5.0).status_code == 200
    except httpx.TransportError:
        return False


def _sound(path: Path) -> tuple[set[str], dict[str, str]]:
    """Check the file; returns the ids of all jobs and the state of each part by ``JOB INDEX``."""
    with sqlite3.connect(path, timeout=30.0) as raw:
        assert raw.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert raw.execute("PRAGMA foreign_key_check").fetchall() == []
        units = dict(raw.execute("SELECT job_id || ' ' || idx, state FROM units WHERE kind = 'part'"))
        jobs = {found for (found,) in raw.execute("SELECT id FROM jobs")}
    raw.close()
    return jobs, units


def _wait(what: Any, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.002)


FAULT = Fault("sqlite_kill", "SIGKILL of SQLite writers and of the API", 500, scenario, quick=(1,))
