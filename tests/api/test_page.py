"""The page in a real browser: it asks for the key of a cluster, remembers it in its tab, and asks nobody else."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn

from cffa_core.settings import Settings
from services.api.app import create_app
from tests.api.browser import Browser
from tests.api.conftest import fresh_home
from tests.api.test_keys import KEY, NOWHERE

ASKS = "document.getElementById('key-dialog')?.open === true"
GIVE = "document.getElementById('key').value = '{}'; document.querySelector('#key-dialog button').click()"


@contextlib.contextmanager
def served(settings: Settings) -> Iterator[str]:
    """The application on a free port of its own, by the same server as in earnest."""
    server = uvicorn.Server(uvicorn.Config(create_app(settings), port=0, log_config=None, access_log=False))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.02)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    with Browser(tmp_path / "profile") as opened:
        yield opened


def test_the_page_of_a_cluster_asks_for_the_key(browser: Browser, tmp_path: Path) -> None:
    with served(Settings(home=tmp_path / "home", bootstrap_key=KEY, **NOWHERE)) as url:
        browser.open(url)
        browser.until(ASKS)
        browser.value(GIVE.format("x" * 40))
        browser.until(f"{ASKS} && document.getElementById('key-hint').textContent.includes('not accepted')")
        browser.value(GIVE.format(KEY))
        # Its servers do not answer: the key was taken, and the page says what is wrong.
        browser.until("document.getElementById('queue').textContent.startsWith('no answer: the record')")
        assert browser.value(ASKS) is False
        browser.open(f"{url}/?again")
        browser.until("document.getElementById('queue')?.textContent.startsWith('no answer: the record')")
        assert browser.value(ASKS) is False
        assert browser.value("localStorage.length + document.cookie.length") == 0
        assert browser.value("document.getElementById('key').value") == ""
    assert browser.errors == []


def test_the_embedded_page_does_not_ask(browser: Browser, tmp_path: Path, migrated: Path) -> None:
    with served(fresh_home(tmp_path, migrated)) as url:
        browser.open(url)
        browser.until("document.getElementById('queue')?.textContent === '0 waiting, 0 running, 0 workers'")
        assert browser.value(ASKS) is False
    assert browser.errors == []
