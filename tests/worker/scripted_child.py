"""A child that does what the seed of its job says, without numeric libraries: ``scripted_child.py NUMERICS_KEY``.

It speaks through the real channel and stores real objects, so supervisor, record and storage are the real ones. With
a second argument ``local`` it stores them in the home folder even in cluster mode, so that no S3 server is needed.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from enum import IntEnum

from cffa_core.jobs.records import NewModel, StoredFiles
from cffa_core.jobs.spec import ExportSpec, Kind
from cffa_core.jobs.state import UnitKind
from cffa_core.settings import Settings
from cffa_core.storage.base import ObjectStore, checkpoint_key, part_key, result_key
from cffa_core.storage.open import open_store
from services.worker.channel import Channel, take_over_standard_streams
from services.worker.protocol import Beat, CheckpointSaved, Done, Failed, Ready, Stopped, WorkOrder


class Act(IntEnum):
    """What a job's child does; posted as the job's seed."""

    FINISH = 1
    SEGFAULT = 2
    DIE_UNPREPARED_ONCE = 3
    IGNORE_STOP = 4
    STALL_ONCE = 5
    FAIL_TYPED = 6
    FAIL_RETRYABLE = 7
    FAIL_UNTYPED_ONCE = 8
    WAIT_FOR_STOP = 9
    SLOW_FIRST_ATTEMPT = 10
    SPEAK_GARBAGE_ONCE = 11
    CHECKPOINT_THEN_SEGFAULT = 12
    ABORT = 13
    KILLED_FOR_MEMORY = 14
    OUT_OF_MEMORY = 15


def finish(channel: Channel, objects: ObjectStore, order: WorkOrder, *, padding: int = 0) -> None:
    """Store something, attempt and process id and so many bytes more, and report it."""

    def key(name: str) -> str:
        if order.kind is UnitKind.PART:
            return part_key(order.job_id, order.index, order.attempt, name)
        return result_key(order.job_id, order.kind, order.attempt, name)

    names = ["pairs.zip", "part.json"] if order.kind is UnitKind.PART else ["product.bin"]
    files = StoredFiles(
        {name: objects.put_bytes(key(name), f"{order.attempt} {os.getpid()}".ljust(padding).encode()) for name in names}
    )
    model = None
    if order.spec.kind is Kind.TRAINING and order.kind is UnitKind.FINALIZE:
        model = NewModel(digest="0" * 64, card={}, stored=files)
    channel.send(Beat(steps=1_000_000, stage="done", current=1, total=1, metrics=((1, {"loss": 0.5}),)))
    channel.send(Done(stored=files, info={"pairs": [order.index]}, job_result={}, model=model))


def failed(channel: Channel, code: str | None, retryable: bool) -> None:
    """Report an error."""
    channel.send(Failed(code=code, retryable=retryable, message="as told", traceback="line 1\nline 2", prepared=True))


def perform(channel: Channel, objects: ObjectStore, order: WorkOrder, numerics_key: str) -> None:
    """Do one order."""
    assert not isinstance(order.spec, ExportSpec), "an export has no seed to say what its child does"
    act, first = Act(order.spec.seed), order.attempt == 1
    if order.kind is UnitKind.FINALIZE:
        return finish(channel, objects, order)
    if act is Act.DIE_UNPREPARED_ONCE and first:
        os._exit(3)
    channel.send(Ready(numerics_key=numerics_key))
    if not channel.answer().accepted:
        return channel.send(Stopped())
    if act is Act.SEGFAULT:
        os.kill(os.getpid(), signal.SIGSEGV)
    if act is Act.ABORT:
        os.abort()
    if act is Act.KILLED_FOR_MEMORY:
        os.kill(os.getpid(), signal.SIGKILL)
    if act is Act.OUT_OF_MEMORY:
        resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
        bytearray(2 << 30)
    if act is Act.CHECKPOINT_THEN_SEGFAULT and order.attempt < 6:
        # The first of the two is carried by a renewal, the second would have to wait for the next one.
        for steps, metrics in ((1, ()), (2, ((order.attempt, {"loss": float(order.attempt)}),))):
            channel.send(Beat(steps=steps, stage="working", current=steps, total=2, metrics=metrics))
        info = objects.put_bytes(checkpoint_key(order.job_id, order.attempt, order.attempt, "state"), b"state")
        channel.send(CheckpointSaved(step=order.attempt, stored=StoredFiles({"state": info})))
        channel.answer()
        os.kill(os.getpid(), signal.SIGSEGV)
    if act is Act.STALL_ONCE and first:
        time.sleep(600)
    if act is Act.SPEAK_GARBAGE_ONCE and first:
        channel._outgoing.write(b"hello\n")
        channel._outgoing.flush()
        time.sleep(600)
    if act is Act.FAIL_TYPED:
        return failed(channel, "invalid_dataset", False)
    if act is Act.FAIL_RETRYABLE:
        return failed(channel, "storage_unavailable", True)
    if act is Act.FAIL_UNTYPED_ONCE and first:
        failed(channel, None, True)
        sys.exit(1)
    if act in (Act.IGNORE_STOP, Act.WAIT_FOR_STOP) or (act is Act.SLOW_FIRST_ATTEMPT and first):
        for step in range(1, 10_000):
            channel.send(Beat(steps=step, stage="waiting", current=step, total=10_000))
            if channel.stop_requested and act is not Act.IGNORE_STOP:
                return channel.send(Stopped())
            time.sleep(0.05)
            if act is Act.SLOW_FIRST_ATTEMPT and step == 40:
                break
    return finish(channel, objects, order)


def main() -> None:
    """Serve orders until the pipe closes."""
    channel = take_over_standard_streams()
    while True:
        order = channel.next_order()
        local = {"mode": "embedded"} if sys.argv[2:] == ["local"] else {}
        perform(channel, open_store(Settings(**(order.settings | local))), order, sys.argv[1])


if __name__ == "__main__":
    main()
