"""``python -m tests.api.sending_process RECORD_URL LEASE_SECONDS``: the sender of one API process, and nothing else."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from cffa_core.jobs.store import JobStore
from cffa_core.webhooks.store import Webhooks
from services.api.webhook_sender import Sender
from tests.webhook_receivers import loopback_settings


def main(url: str, lease_seconds: float) -> None:
    settings = loopback_settings(Path("unused"))
    store = JobStore(url)
    sender = Sender(Webhooks.of(store.database, settings), settings, lease_seconds=lease_seconds)
    asyncio.run(sender.run(store))


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
