"""Log lines carry the ids of what they are about, in either form, and no secret."""

from __future__ import annotations

import json
import logging
import sys
import threading
from contextvars import copy_context
from pathlib import Path

import pytest

from cffa_core import logs
from cffa_core.settings import Settings

PASSWORD = "pass%word-of-the-record"
SECRET = "key/of/the+store-0123"


def settings_of(tmp_path: Path, form: str) -> Settings:
    return Settings(
        home=tmp_path,
        log_format=form,
        s3_secret_key=SECRET,
        database_url=f"postgresql+psycopg://cffa:{PASSWORD}@h/cffa",
    )


def line(form: logging.Formatter, message: str, *, failed: bool = False, **extra: object) -> str:
    """What a handler with this formatter writes for one record that is logged here."""
    info = None
    if failed:
        try:
            raise RuntimeError(f"with {SECRET}")
        except RuntimeError:
            info = sys.exc_info()
    record = logging.LogRecord("cffa.worker", logging.WARNING, __file__, 1, message, (), info)
    vars(record).update(extra)
    return form.format(record)


def test_json_lines_are_objects_with_the_ids_of_what_they_are_about(tmp_path: Path) -> None:
    form = logs.formatter(settings_of(tmp_path, "json"), worker="host-1")
    with logs.about(job_id="job_a", attempt=2), logs.about(unit="part 3"):
        inside = json.loads(line(form, 'said "so"\nand more'))
    outside = json.loads(line(form, "then", fields={"event": "request", "status": 200}))
    assert inside.pop("at").endswith("+00:00")
    ids = {"worker": "host-1", "job_id": "job_a", "attempt": 2, "unit": "part 3"}
    assert inside == {"level": "warning", "logger": "cffa.worker", **ids, "message": 'said "so"\nand more'}
    del outside["at"]
    assert outside == {
        "level": "warning",
        "logger": "cffa.worker",
        "worker": "host-1",
        "event": "request",
        "status": 200,
    }


def test_text_lines_put_the_ids_before_the_message(tmp_path: Path) -> None:
    form = logs.formatter(settings_of(tmp_path, "text"))
    assert line(form, "100% done").endswith(" WARNING cffa.worker 100% done")
    with logs.about(job_id="job_a", attempt=2):
        assert line(form, "100% done").endswith(" WARNING cffa.worker [job_id=job_a attempt=2] 100% done")


def test_ids_follow_the_context_and_end_with_it(tmp_path: Path) -> None:
    seen: list[object] = []

    def look() -> None:
        seen.append(logs.bound("request_id"))

    with logs.about(request_id="r1"):
        context = copy_context()
        with pytest.raises(RuntimeError), logs.about(request_id="r2"):
            raise RuntimeError
        look()
        bare = threading.Thread(target=look)
        carried = threading.Thread(target=context.run, args=(look,))
        for thread in (bare, carried):
            thread.start()
            thread.join()
    look()
    assert seen == ["r1", None, "r1", None]


@pytest.mark.parametrize("form", ["text", "json"])
def test_no_secret_leaves_in_a_line(tmp_path: Path, form: str) -> None:
    settings = settings_of(tmp_path, form)
    written = line(logs.formatter(settings), f"cannot reach {settings.record_url} as {SECRET}", failed=True)
    assert "***" in written and "cannot reach" in written and "RuntimeError" in written
    for secret in (PASSWORD, SECRET, "key%2Fof%2Fthe%2Bstore-0123"):
        assert secret not in written
