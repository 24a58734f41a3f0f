"""``python -m services.api.setup``: make a cluster's servers ready, once, before its API and workers start.

Waits for the database and the object store, migrates the record and makes the bucket. It may run any number of times,
also at the same moment (the migration is done under a lock). Serves nothing and starts nothing.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Callable, Sequence

from cffa_core import logs
from cffa_core.errors import CffaError, InvalidSettings, StorageUnavailable
from cffa_core.jobs.store import JobStore
from cffa_core.settings import Settings, read_settings
from cffa_core.storage.open import open_s3

PAUSE_SECONDS = 1.0
_log = logging.getLogger("cffa.setup")


def set_up(settings: Settings, *, timeout: float) -> None:
    """Migrate the record and make the bucket of ``settings``; raises :class:`StorageUnavailable` after ``timeout`` s.

    An embedded service needs none of this: that raises :class:`InvalidSettings`.
    """
    if settings.mode != "cluster":
        raise InvalidSettings("set-up is for a cluster (CFFA_MODE=cluster); the embedded service does it by itself")
    objects = open_s3(settings)
    end = time.monotonic() + timeout
    store = JobStore(settings.record_url)
    try:
        _until(end, "the record", store.migrate)
    finally:
        store.close()
    try:
        _until(end, "the object store", objects.ensure_bucket)
    finally:
        objects.close()


def _until(end: float, what: str, action: Callable[[], object]) -> None:
    """Repeat ``action`` until it works or the time is over; the last error says why it did not."""
    said = ""
    while True:
        try:
            action()
        except CffaError as error:
            if not error.retryable or time.monotonic() + PAUSE_SECONDS > end:
                raise
            if error.message != said:
                _log.warning("waiting for %s: %s", what, error.message)
            said = error.message
            time.sleep(PAUSE_SECONDS)
        else:
            _log.info("%s is ready", what)
            return


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when everything is ready, 1 if a server did not answer in time, 2 if the settings are not valid."""
    parser = argparse.ArgumentParser(prog="python -m services.api.setup", description=__doc__)
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds to wait for the servers (default 120)")
    timeout = parser.parse_args(arguments).timeout
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    try:
        settings = read_settings()
        logs.configure(settings)
        set_up(settings, timeout=timeout)
    except CffaError as error:
        _log.error("%s", error.message)
        for problem in error.problems:
            _log.error("%s: %s", problem.pointer, problem.message)
        return 1 if isinstance(error, StorageUnavailable) else 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
