"""The page in a real browser: the key of a cluster, which it asks for and keeps in its tab, and reports."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn

from cffa_core.jobs.records import StoredFiles
from cffa_core.jobs.spec import (
    AttentionSpec,
    CaptionedSpec,
    CaptionedTrainingSpec,
    EvaluationSpec,
    Kind,
    TrainingSpec,
)
from cffa_core.jobs.store import JobStore
from cffa_core.settings import Settings
from cffa_core.storage.base import result_key
from cffa_core.storage.open import open_store
from services.api.app import create_app
from tests.api.browser import Browser
from tests.api.conftest import fresh_home
from tests.api.driving import Worker, png
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


REPORT = """# Evaluation of `pairs`

Two lines that are
one paragraph with <b>no</b> HTML.

| score | N | A |
|---|---|---|
| ridge \\| Dice | 5 | 0.31<br>[0.2, 0.4] |

![Worst pairs](pairs.png)

- KID: too few pairs
- FID: too few pairs
"""


def measured(settings: Settings) -> str:
    """An evaluation that was done in this home; returns its id."""
    store, objects = JobStore(settings.record_url), open_store(settings)
    ids = [store.new_id("ds") for _ in range(2)]
    for dataset_id in ids:
        store.add_dataset(
            "local", dataset_id=dataset_id, name="A", digest="0" * 64, pairs=2, report={}, stored=StoredFiles()
        )
    spec = EvaluationSpec(pairs_dataset_id=ids[0], reference_dataset_id=ids[1])
    job, _ = store.create_job("local", spec)
    for files in ({"report.md": REPORT.encode(), "report.json": b"{}", "pairs.png": png(1)}, {}):
        claim = store.claim("w", [Kind.EVALUATION], lease_seconds=60)
        assert claim is not None
        stored = {
            name: objects.put_bytes(result_key(job.id, claim.kind, claim.attempt, name), data)
            for name, data in files.items()
        }
        store.commit(claim, StoredFiles(stored), {}, job_result=None if files else {})
    store.close()
    return job.id


def test_the_page_shows_a_report_with_its_table_and_picture(browser: Browser, tmp_path: Path, migrated: Path) -> None:
    settings = fresh_home(tmp_path, migrated)
    job_id = measured(settings)
    with served(settings) as url:
        browser.open(url)
        browser.until("document.querySelector('#jobs button')?.textContent === 'View report'")
        browser.value("document.querySelector('#jobs button').click()")
        browser.until("document.querySelector('#report img')?.naturalWidth === 48")
        assert browser.value("location.hash") == f"#{job_id}"
        cells = "[...document.querySelectorAll('#report {}')].map((cell) => cell.textContent)"
        assert browser.value(cells.format("th")) == ["score", "N", "A"]
        assert browser.value(cells.format("td")) == ["ridge | Dice", "5", "0.31[0.2, 0.4]"]
        assert browser.value("document.querySelectorAll('#report td br').length") == 1
        assert browser.value(cells.format("p")) == ["Two lines that are one paragraph with <b>no</b> HTML."]
        assert browser.value(cells.format("h3 code")) == ["pairs"]
        assert browser.value(cells.format(".bullets li")) == ["KID: too few pairs", "FID: too few pairs"]
        links = "[...document.querySelectorAll('#report-files a')].map((link) => link.textContent.split(' ')[0])"
        assert browser.value(links) == ["pairs.png", "report.json", "report.md"]
        # Its address shows it again.
        browser.open(f"{url}/?again#{job_id}")
        browser.until("document.querySelector('#report h3')?.textContent === 'Evaluation of pairs'")
    assert browser.errors == []


def captured(settings: Settings, folder: Path) -> str:
    """An attention job that was done in this home, and a captioned model beside its own; returns the job's id."""
    store = JobStore(settings.record_url)
    worker = Worker(store, open_store(settings), folder)
    dataset_id = store.new_id("ds")
    report = {"captions": {"pairs": 2, "cf": 2, "fa": 0}}
    store.add_dataset(
        "local", dataset_id=dataset_id, name="A", digest="0" * 64, pairs=2, report=report, stored=StoredFiles()
    )
    store.create_job("local", CaptionedTrainingSpec(dataset_id=dataset_id))
    drawn_by = worker.train(Kind.CAPTIONED_TRAINING)
    store.create_job("local", CaptionedSpec(model_id=drawn_by, task="text_to_image", texts=("a fundus", "another")))
    store.create_job("local", TrainingSpec(dataset_id=dataset_id, steps=2))
    job, _ = store.create_job("local", AttentionSpec(model_id=worker.train(), index=3))
    text = b"# Attention\n\n![vessels](overlays/cf vessels.png)\n"
    worker.compute(Kind.ATTENTION, {"report.md": text, "report.json": b"{}", "overlays/cf vessels.png": png(1)})
    store.close()
    return job.id


def test_the_page_shows_every_kind_of_job_and_a_report_with_pictures_in_folders(
    browser: Browser, tmp_path: Path, migrated: Path
) -> None:
    settings = fresh_home(tmp_path, migrated)
    job_id = captured(settings, tmp_path / "worker")
    with served(settings) as url:
        browser.open(f"{url}/#{job_id}")
        browser.until("document.querySelector('#report img')?.naturalWidth === 48")
        text = "[...document.querySelectorAll('#{} .card')].map((card) => card.querySelector('.row').innerText)"
        jobs = browser.value(text.format("jobs"))
        told = ("Attention", "cross attention of pair 3, seed 42"), ("Captioned", "2 images of “a fundus” and 1 more")
        assert [all(part in jobs[number] for part in words) for number, words in zip((0, 2), told, strict=True)] == [
            True,
            True,
        ], jobs
        assert "Captioned training" in jobs[3] and "CF captions of ds_" in jobs[3]
        models = browser.value(text.format("models"))
        assert "dual_unet" in models[0] and "captioned" in models[1] and "step 2" in models[1]
        # The address of a training shows no pairs, and no error.
        training = browser.value("document.querySelectorAll('#jobs .card code')[3].textContent")
        browser.open(f"{url}/?again#{training}")
        browser.until("document.querySelectorAll('#jobs .card').length === 4")
        assert browser.value("document.getElementById('pairs-section').hidden") is True
    assert browser.errors == []
