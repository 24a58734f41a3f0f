"""All faults, in the order in which they are tried."""

from __future__ import annotations

from tests.faults import (
    clock_skew,
    database_trouble,
    disk_full,
    double_delivery,
    flipped_byte,
    kill_generation,
    kill_training,
    poison_unit,
    postgres_restart,
    redis_idle,
    redis_loss,
    rolling_restart,
    s3_trouble,
    sleeping_worker,
    sqlite_kill,
)
from tests.faults.campaign import Fault

FAULTS: tuple[Fault, ...] = (
    kill_generation.FAULT,
    kill_training.FAULT,
    sleeping_worker.FAULT,
    redis_loss.FAULT,
    redis_idle.FAULT,
    double_delivery.FAULT,
    s3_trouble.FAULT,
    database_trouble.FAULT,
    postgres_restart.FAULT,
    sqlite_kill.FAULT,
    disk_full.FAULT,
    poison_unit.FAULT,
    rolling_restart.FAULT,
    clock_skew.FAULT,
    flipped_byte.FAULT,
)
