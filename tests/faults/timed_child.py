"""A child that works for a set time and says when: ``python -m tests.faults.timed_child LOG SECONDS SIZE [local]``.

It speaks through the real channel and stores real objects of SIZE bytes, so supervisor, record and storage are the
real ones; only the numerics are missing. Each line of LOG is ``began|ended|left JOB KIND INDEX ATTEMPT PID TIME WALL``:
TIME is of the machine's monotonic clock, so that a scenario can see which units were worked on at the same time, WALL
of the clock that the child believes in.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from cffa_core.errors import CffaError
from cffa_core.jobs.state import UnitKind
from cffa_core.settings import Settings
from cffa_core.storage.open import open_store
from services.worker.channel import Channel, die_with_parent, take_over_standard_streams
from services.worker.protocol import Beat, Failed, Ready, Stopped, WorkOrder
from tests.worker.scripted_child import finish

NUMERICS = "cpu/test/torch-0/diffusers-0/fp32/threads-1/batch-1"
STEP_SECONDS = 0.05


def timed(log: Path, seconds: float, *, size: int = 0, local: bool = False) -> list[str]:
    """Command of this child; ``local`` for a cluster whose objects are in its home folder."""
    module = [sys.executable, "-m", "tests.faults.timed_child"]
    return [*module, str(log), str(seconds), str(size), *(["local"] if local else [])]


@dataclass(frozen=True)
class Line:
    """One line of the log."""

    what: str
    job_id: str
    kind: str
    index: int
    attempt: int
    pid: int
    at: float
    wall: float

    @property
    def unit(self) -> tuple[str, str, int]:
        """The unit it is about."""
        return self.job_id, self.kind, self.index


def read_log(log: Path) -> list[Line]:
    """All complete lines, in the order of time."""
    lines = []
    for text in log.read_text().splitlines() if log.exists() else ():
        what, job_id, kind, index, attempt, pid, at, wall = text.split()
        lines.append(Line(what, job_id, kind, int(index), int(attempt), int(pid), float(at), float(wall)))
    return sorted(lines, key=lambda line: line.at)


def worked_on_twice(lines: list[Line]) -> list[Line]:
    """Lines at which a unit was begun while another child was still at it."""
    busy: dict[tuple[str, str, int], int] = {}
    found = []
    for line in lines:
        if line.what == "began":
            if line.unit in busy:
                found.append(line)
            busy[line.unit] = line.pid
        elif busy.get(line.unit) == line.pid:
            del busy[line.unit]
    return found


def work(channel: Channel, order: WorkOrder, seconds: float) -> bool:
    """Make steps for ``seconds``; False if asked to stop."""
    end = time.monotonic() + seconds
    step = 0
    while time.monotonic() < end:
        step += 1
        if step % 4 == 1:
            channel.send(Beat(steps=step, stage="working", current=step, total=10_000))
        if channel.stop_requested:
            return False
        time.sleep(STEP_SECONDS)
    return True


def main() -> None:
    """Serve orders until the pipe closes."""
    log, seconds, size, *local = sys.argv[1:]
    die_with_parent()
    channel = take_over_standard_streams()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    while True:
        order = channel.next_order()

        def say(what: str, order: WorkOrder = order) -> None:
            who = f"{order.job_id} {order.kind.value} {order.index} {order.attempt} {os.getpid()}"
            os.write(descriptor, f"{what} {who} {time.monotonic()} {time.time()}\n".encode())

        settings = Settings(**(order.settings | ({"mode": "embedded"} if local else {})))
        objects = open_store(settings)
        if order.kind is not UnitKind.FINALIZE:
            channel.send(Ready(numerics_key=NUMERICS))
            if not channel.answer().accepted:
                channel.send(Stopped())
                continue
        say("began")
        if order.kind is UnitKind.FINALIZE or work(channel, order, float(seconds)):
            try:
                finish(channel, objects, order, padding=int(size))
            except CffaError as error:
                channel.send(
                    Failed(
                        code=error.code,
                        retryable=error.retryable,
                        message=error.message,
                        traceback="",
                        prepared=order.kind is not UnitKind.FINALIZE,
                    )
                )
            say("ended")
        else:
            say("left")
            channel.send(Stopped())


if __name__ == "__main__":
    main()
