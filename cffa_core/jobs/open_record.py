"""An open record: its connections, its schema, and the settings that its statements need.

The methods for each subject are next door, one class a file on top of this one: ``dataset_store``, ``owner_store`` and
``unit_store``. ``store`` puts them together; nothing else makes one of these alone.
"""

from __future__ import annotations

import sqlalchemy as sa

from cffa_core.jobs import rows, schema, version
from cffa_core.jobs.database import Database
from cffa_core.people.quotas import Limits


class OpenRecord:
    """The record at ``url``; what the settings mean is said by :class:`cffa_core.jobs.store.JobStore`."""

    def __init__(
        self,
        url: str,
        *,
        max_crashes: int = 3,
        max_expiries: int = 10,
        owner_running_units: int = 0,
        retention_seconds: float = 0.0,
        limits: Limits | None = None,
        application: str = "cffa",
    ) -> None:
        self._db = Database(url, application=application)
        self._limits = limits or Limits()
        self._max_crashes = max_crashes
        self._max_expiries = max_expiries
        self._cap = owner_running_units
        self._retention = retention_seconds

    def migrate(self) -> None:
        """Bring the schema to its newest version; safe when several processes start at the same moment."""
        self._db.migrate()

    def ping(self) -> None:
        """Ask the database one question; raises :class:`StorageUnavailable` when it does not answer."""
        self._db.read(lambda connection: connection.scalar(sa.select(schema.jobs.c.id).limit(1)))

    def require_schema(self) -> None:
        """Raise :class:`RecordOutdated` if the schema is older than this code needs; a newer one is fine."""
        self._db.read(version.require_schema)

    def close(self) -> None:
        """Give back all connections."""
        self._db.close()

    @property
    def database(self) -> Database:
        """The record's transactions, for tables that belong to no job: people, web hooks."""
        return self._db

    @staticmethod
    def new_id(prefix: str) -> str:
        """Mint an id, e.g. ``ds_`` + 20 characters of ``[0-9a-z]``; prefixes are ds, job, mdl, unit."""
        return rows.new_id(prefix)
