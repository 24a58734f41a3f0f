"""All faults, in the order in which they are tried."""

from __future__ import annotations

from tests.faults import (
    flipped_byte,
    kill_generation,
    kill_training,
    poison_unit,
    rolling_restart,
    sleeping_worker,
    sqlite_kill,
)
from tests.faults.campaign import Fault

FAULTS: tuple[Fault, ...] = (
    kill_generation.FAULT,
    kill_training.FAULT,
    sleeping_worker.FAULT,
    sqlite_kill.FAULT,
    poison_unit.FAULT,
    rolling_restart.FAULT,
    flipped_byte.FAULT,
)
