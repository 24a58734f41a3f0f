"""The disk is full, or a write is cut short: a typed error, no false success, and no orphans once there is room again.

``full``: everything on a small file system of its own. ``objects``: only the objects. ``short``: the child may not
write files beyond a limit, so that a write stops in the middle. The small file system lives in a mount namespace of a
process of its own (``unshare``), so that nothing is left mounted; where that is not allowed, only ``short`` runs.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

from cffa_core.jobs import sweep
from cffa_core.jobs.state import JobState
from cffa_core.storage.local import LocalStore
from cffa_core.storage.manifest import read_verified
from tests.faults.campaign import Facts, Fault
from tests.faults.place import LEASE, RENEW, Place
from tests.faults.timed_child import timed
from tests.faults.worlds import ROOT, FaultWorld
from tests.worker.world import OWNER

DISK_BYTES = 16 << 20
SIZE = 256 << 10
PARTS = 6
VARIANTS = ("full", "objects", "short")


def scenario(seed: int, place: Place) -> Facts:
    """One job that runs out of space at a random point."""
    variant = VARIANTS[seed % len(VARIANTS)] if namespaces() else "short"
    folder = place.new_folder()
    command = [sys.executable, "-m", "tests.faults.disk_full", variant, str(seed), str(folder), str(place.models_dir)]
    if variant != "short":
        command = [*namespaces(), *command]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=200)
    shutil.rmtree(folder, ignore_errors=True)
    assert done.returncode == 0, done.stderr
    facts: Facts = json.loads(done.stdout.splitlines()[-1])
    return facts


@cache
def namespaces() -> tuple[str, ...]:
    """The command that gives a process mounts of its own; empty where that is not allowed."""
    unshare = shutil.which("unshare")
    if unshare is None:
        return ()
    command = (unshare, "--mount") if os.geteuid() == 0 else (unshare, "--mount", "--map-root-user")
    probe = [*command, "mount", "-t", "tmpfs", "none", "/mnt"]
    return command if subprocess.run(probe, capture_output=True, timeout=20).returncode == 0 else ()


def inside(variant: str, seed: int, folder: Path, models_dir: Path) -> Facts:
    """The scenario itself, in a process that may mount."""
    dice = random.Random(seed)
    home, disk = folder / "home", folder / "disk"
    home.mkdir()
    disk.mkdir()
    if variant != "short":
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "none", str(disk)], check=True)
    if variant == "full":
        home = disk / "home"
        home.mkdir()
    elif variant == "objects":
        (home / "objects").symlink_to(disk)
    world = FaultWorld(home, models_dir, lease_seconds=3 * LEASE, renew_seconds=RENEW)
    try:
        return _run_out_of_space(world, variant, dice, disk)
    finally:
        world.close()


def _run_out_of_space(world: FaultWorld, variant: str, dice: random.Random, disk: Path) -> Facts:
    log = world.settings.home.parent / "child.log"
    job = world.generation(world.adopt_model(), count=PARTS, part_size=1)
    child = timed(log, 0.1, size=SIZE)
    ballast = disk / "ballast"
    if variant == "short":
        blocks = dice.randint(1, SIZE // 1024 - 1)
        child = ["bash", "-c", f'ulimit -f {blocks}; exec "$@"', "bash", *child]
    else:
        usage = os.statvfs(disk)
        free = usage.f_bavail * usage.f_frsize
        with ballast.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, free - dice.randrange(64 << 10, 6 * SIZE))
    worker = world.start_worker(child)
    if variant == "full":
        world.wait(lambda: _says_full(world) or worker.poll() is not None, 60, "the disk to be full")
    else:
        world.wait(lambda: world.events(job.id, "released"), 60, "a unit to be given back")
        (first, *_) = world.events(job.id, "released")
        assert str(first["reason"]).startswith("storage_unavailable"), first
        assert world.events(job.id, "crashed") == []
    assert worker.poll() is None, world.logs()
    assert world.job(job.id).state is not JobState.SUCCEEDED
    before = _readable(world, job.id)
    ballast.unlink(missing_ok=True)
    world.start_worker(timed(log, 0.1, size=SIZE))
    ended = world.wait_terminal(job.id)
    assert ended.state is JobState.SUCCEEDED, (ended.error, world.logs())
    after = _readable(world, job.id)
    assert before <= after
    orphans = sweep.orphans(world.store, world.objects)
    assert set(world.objects.list(f"jobs/{job.id}/")) == after
    assert isinstance(world.objects, LocalStore)
    world.objects.remove_abandoned(0.0)
    assert list((world.settings.objects_dir / ".incoming").glob("*")) == []
    return {"variant": variant, "parts_before": len(before), "orphans": orphans}


def _readable(world: FaultWorld, job_id: str) -> set[str]:
    """Keys that the record points to, each read and verified, in memory: the disk may have no room for a copy."""
    keys = set()
    for part in world.store.parts(OWNER, job_id):
        for info in part.stored.files.values():
            read_verified(world.objects, info)
            keys.add(info.key)
    return keys


def _says_full(world: FaultWorld) -> bool:
    said = world.logs()
    return "full" in said or "No space left" in said


FAULT = Fault("disk_full", "disk full, short write", 60, scenario, quick=(1, 2))


if __name__ == "__main__":
    name, number, where, models = sys.argv[1:]
    sys.stdout.write(json.dumps(inside(name, int(number), Path(where), Path(models))) + "\n")
