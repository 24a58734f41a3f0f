"""The child's end of the pipe to its supervisor, and its promise not to outlive it.

Orders arrive on a reader thread, so a stop is noticed while the child computes and the end of the pipe ends the
process at once, whatever it is doing. Nothing here knows what an order is about.
"""

from __future__ import annotations

import ctypes
import os
import queue
import signal
import sys
import threading
from pathlib import Path
from typing import BinaryIO

from cffa_core.jobs.records import Wish
from services.worker.protocol import ORDERS, Answer, Message, Stop, Wished, WorkOrder

_PR_SET_PDEATHSIG = 1


class Channel:
    """Messages to and from the supervisor; reports are sent from one thread only."""

    def __init__(self, incoming: BinaryIO, outgoing: BinaryIO) -> None:
        self._incoming = incoming
        self._outgoing = outgoing
        self._orders: queue.Queue[WorkOrder] = queue.Queue()
        self._answers: queue.Queue[Answer] = queue.Queue()
        self._stop = threading.Event()
        self._wishes: queue.SimpleQueue[Wish] = queue.SimpleQueue()
        threading.Thread(target=self._read, name="orders", daemon=True).start()

    def send(self, message: Message) -> None:
        """Report to the supervisor; ends the process if it is gone."""
        try:
            self._outgoing.write(message.line())
            self._outgoing.flush()
        except BrokenPipeError:
            os._exit(0)

    def next_order(self) -> WorkOrder:
        """Wait for work."""
        return self._orders.get()

    def answer(self) -> Answer:
        """Wait for the supervisor's reply to the report just sent."""
        return self._answers.get()

    @property
    def stop_requested(self) -> bool:
        """Whether the unit in hand is to be left."""
        return self._stop.is_set()

    def take_wishes(self) -> frozenset[Wish]:
        """What was asked for since the last time; each wish is given once."""
        taken: set[Wish] = set()
        while True:
            try:
                taken.add(self._wishes.get_nowait())
            except queue.Empty:
                return frozenset(taken)

    def _read(self) -> None:
        for line in self._incoming:
            order = ORDERS.validate_json(line)
            if isinstance(order, WorkOrder):
                self.take_wishes()
                self._stop.clear()  # here, in the order of the pipe: a stop that follows belongs to this order
                self._orders.put(order)
            elif isinstance(order, Answer):
                self._answers.put(order)
            elif isinstance(order, Stop):
                self._stop.set()
            elif isinstance(order, Wished):
                self._wishes.put(order.what)
        os._exit(0)


def take_over_standard_streams() -> Channel:
    """Make standard input and output the channel; whatever libraries print goes to standard error from now on."""
    incoming, outgoing = os.dup(sys.stdin.fileno()), os.dup(sys.stdout.fileno())
    with Path(os.devnull).open("rb") as nothing:
        os.dup2(nothing.fileno(), sys.stdin.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return Channel(os.fdopen(incoming, "rb"), os.fdopen(outgoing, "wb"))


def die_with_parent() -> None:
    """Ask the kernel to end this process when its starter dies, in case the reader thread cannot run (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
