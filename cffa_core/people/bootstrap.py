"""The first admin key, made on the server by whoever may read its settings: no key is needed to make it."""

from __future__ import annotations

from cffa_core.errors import Conflict, InvalidSettings
from cffa_core.jobs.store import JobStore
from cffa_core.people.accounts import Accounts
from cffa_core.people.audit import AuditLog
from cffa_core.people.keys import Scope, key_secret
from cffa_core.people.rows import ADMIN, ApiKey
from cffa_core.settings import Settings


def bootstrap(settings: Settings, *, name: str = "bootstrap", force: bool = False) -> tuple[ApiKey, str]:
    """Make a key of scope admin for the account ``admin``; returns what is known of it, and the key.

    Writes to the record itself. Raises :class:`Conflict` if there is a good admin key already, unless ``force`` is
    given, and :class:`InvalidSettings` for a cluster's settings without ``key_secret``.
    """
    if settings.mode == "cluster" and not settings.key_secret.get_secret_value():
        raise InvalidSettings("keys are kept under the secret of the API: give CFFA_KEY_SECRET, or CFFA_SECRETS_DIR")
    store = JobStore(settings.record_url)
    try:
        if settings.mode == "embedded":
            store.migrate()
        store.require_schema()
        people = Accounts(store.database, key_secret(settings))
        if people.has_admin() and not force:
            raise Conflict(
                "there is an admin key already; make others with it (cffa admin key add), or, if nobody has it any "
                "more, repeat this with --force"
            )
        known, key = people.create_key(ADMIN, name=name, scope=Scope.ADMIN)
        AuditLog(store.database).append(ADMIN, "bootstrap", key_id=known.id, target=known.id, data={"force": force})
        return known, key
    finally:
        store.close()
