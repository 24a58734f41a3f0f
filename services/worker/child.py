"""The process in which units compute: ``python -m services.worker.child``, started by the supervisor only.

It takes orders from its standard input and reports on its standard output until the pipe closes. A crash here, be it
the system's memory killer or a fault inside a native library, costs one attempt and nothing else.
"""

from __future__ import annotations

import errno
import faulthandler
import traceback

from cffa_core import logs, tracing
from cffa_core.errors import Cancelled, CffaError, StorageUnavailable
from cffa_core.settings import Settings
from cffa_core.storage.open import open_store
from services.worker.channel import Channel, die_with_parent, take_over_standard_streams
from services.worker.execute import Executor
from services.worker.job_context import UnitContext
from services.worker.protocol import Failed, Stopped, WorkOrder

TRACEBACK_FRAMES = 6


def serve(channel: Channel) -> None:
    """Do one order after the other; the first one brings the settings. Untyped errors end the process."""
    order = channel.next_order()
    settings = Settings(**order.settings)
    logs.configure(settings, worker=order.facts.get("worker_id"))
    tracing.configure(settings, "cffa-child")
    objects = open_store(settings)
    executor = Executor(channel, objects, settings)
    while True:
        context = UnitContext(channel, objects, order)
        ids = {"job_id": order.job_id, "unit": f"{order.kind} {order.index}", "attempt": order.attempt}
        with logs.about(**ids), tracing.span("compute", order.facts.get("traceparent"), **ids):
            _do(order, context, channel, executor)
            context.stages.close()
        tracing.flush()
        del order, context
        order = channel.next_order()


def _do(order: WorkOrder, context: UnitContext, channel: Channel, executor: Executor) -> None:
    """Do one order and report how it ended; an untyped error is reported and raised again."""
    try:
        done = executor.run(order, context)
        context.flush()
        channel.send(done)
    except Cancelled:
        channel.send(Stopped())
    except CffaError as error:
        channel.send(_failed(error, executor, typed=error))
    except Exception as error:
        typed = StorageUnavailable(f"no space left: {error}") if _is_full(error) else None
        channel.send(_failed(error, executor, typed=typed))
        if typed is None:
            raise


def _is_full(error: Exception) -> bool:
    """Whether a disk of this machine is full: it fails no job, which waits for space or for another worker."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def _failed(error: Exception, executor: Executor, typed: CffaError | None) -> Failed:
    trace = traceback.TracebackException.from_exception(error)
    if len(trace.stack) > TRACEBACK_FRAMES:
        trace.stack[:-TRACEBACK_FRAMES] = []
    return Failed(
        code=typed.code if typed else None,
        retryable=typed.retryable if typed else True,
        message=typed.message if typed else f"{type(error).__name__}: {error}",
        problems=typed.problems if typed else (),
        traceback="".join(trace.format()),
        prepared=executor.prepared,
    )


def main() -> None:
    """Take over the standard streams and serve."""
    faulthandler.enable()
    die_with_parent()
    serve(take_over_standard_streams())


if __name__ == "__main__":
    main()
