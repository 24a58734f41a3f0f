"""Log lines of every process: text for people or one JSON object each, with the ids of what they are about.

Ids are bound where a request or a unit begins (:func:`about`) and follow the work into threads that inherit its
context. Values of secret settings are blotted out of every line, wherever they came from. Nothing here decides what
is logged.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote, urlsplit

from pydantic import SecretStr

from cffa_core.settings import Settings

SHORTEST_BLOTTED = 6
"""A secret of fewer characters is part of too many words."""
_ids: ContextVar[dict[str, Any]] = ContextVar("cffa_log_ids", default={})  # noqa: B039  # never changed in place


@contextmanager
def about(**ids: Any) -> Iterator[None]:
    """Bind ids to every line that is logged inside; those bound outside stay."""
    token = _ids.set({**_ids.get(), **ids})
    try:
        yield
    finally:
        _ids.reset(token)


def bound(name: str) -> Any:
    """The id of this name that lines carry here, or None."""
    return _ids.get().get(name)


def configure(settings: Settings, **of_process: Any) -> None:
    """Log to standard error as the settings say; ``of_process`` are ids that every line of this process carries."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter(settings, **of_process))
    root = logging.getLogger()
    for old in root.handlers[:]:
        if type(old) is logging.StreamHandler:
            root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(settings.log_level.upper())
    # They tell what every statement or probe does.
    for noisy in ("alembic", "celery.worker.strategy", "celery.app.trace", "urllib3", "httpx"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def formatter(settings: Settings, **of_process: Any) -> logging.Formatter:
    """How these settings want a line to look."""
    kind = JsonLines if settings.log_format == "json" else TextLines
    return kind(of_process, secrets_of(settings))


def secrets_of(settings: Settings) -> tuple[str, ...]:
    """Every secret value of the settings, also as it stands in a URL; the longest first."""
    found: set[str] = set()
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        if isinstance(value, SecretStr):
            found |= {value.get_secret_value(), quote(value.get_secret_value(), safe="")}
    for url in (settings.database_url, settings.broker_url):
        found.add(urlsplit(url).password or "")
    return tuple(sorted((secret for secret in found if len(secret) >= SHORTEST_BLOTTED), key=len, reverse=True))


class _Lines(logging.Formatter):
    def __init__(self, of_process: dict[str, Any], secrets: tuple[str, ...]) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s %(ids)s%(message)s")
        self._of_process = of_process
        self._secrets = secrets

    def ids(self) -> dict[str, Any]:
        """Ids of the line that is formatted now: a handler formats on the thread that logs."""
        return {**self._of_process, **_ids.get()}

    def blotted(self, text: str) -> str:
        """``text`` without the values of secrets."""
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text


class TextLines(_Lines):
    """``2026-11-21 12:00:00,000 INFO cffa.worker [job_id=job_... attempt=2] message``."""

    def format(self, record: logging.LogRecord) -> str:
        ids = " ".join(f"{name}={value}" for name, value in self.ids().items())
        record.ids = f"[{ids}] " if ids else ""
        return self.blotted(super().format(record))


class JsonLines(_Lines):
    """``{"at": ..., "level": ..., "logger": ..., "message": ..., ids ..., "exception": ...}``, times in UTC.

    A record that was logged with ``extra={"fields": {...}}`` shows these instead of its message.
    """

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line = {"at": at, "level": record.levelname.lower(), "logger": record.name, **self.ids()}
        fields = getattr(record, "fields", None)
        line |= fields if isinstance(fields, dict) else {"message": record.getMessage()}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return self.blotted(json.dumps(line, ensure_ascii=False, default=str))
