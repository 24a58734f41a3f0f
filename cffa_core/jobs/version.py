"""Whether a database's schema is one that this version of the code can work with.

A cluster's schema is migrated once, by its set-up, before the new code starts; while that happens, old processes still
run. So a schema that is newer than the code knows is fine (migrations only add), an older one is not.
"""

from __future__ import annotations

from functools import cache

import sqlalchemy as sa
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory

from cffa_core.errors import RecordOutdated
from cffa_core.jobs.database import MIGRATIONS

SET_UP = "python -m services.api.setup"


def require_schema(connection: sa.Connection) -> None:
    """Raise :class:`RecordOutdated` unless the schema is at least the newest that this code knows."""
    found = MigrationContext.configure(connection).get_current_revision()
    head, older = _known()
    if found is None:
        raise RecordOutdated(f"the record is empty; run `{SET_UP}` first")
    if found in older:
        raise RecordOutdated(f"the record's schema is {found}, this version needs {head}; run `{SET_UP}` first")


def knows(revision: str | None) -> bool:
    """Whether this code can work with a schema, or bring it to its own."""
    head, older = _known()
    return revision == head or revision in older


@cache
def _known() -> tuple[str | None, frozenset[str]]:
    """The newest revision and all before it."""
    config = Config()
    config.set_main_option("script_location", MIGRATIONS.as_posix().replace("%", "%%"))
    scripts = ScriptDirectory.from_config(config)
    head = scripts.get_current_head()
    return head, frozenset(script.revision for script in scripts.walk_revisions()) - {head or ""}
