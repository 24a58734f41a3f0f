"""The page in a real browser with an edit job: its pairs as those of a generation job, and before and after."""

from __future__ import annotations

from pathlib import Path

from cffa_core.jobs.records import StoredFiles
from cffa_core.jobs.spec import EditSpec, EditTerm, GenerationSpec
from cffa_core.jobs.store import JobStore
from cffa_core.settings import Settings
from cffa_core.storage.base import ObjectInfo
from cffa_core.storage.open import open_store
from tests.api.browser import Browser
from tests.api.conftest import fresh_home
from tests.api.driving import Worker
from tests.api.test_edits import make_part
from tests.api.test_page import browser, served
from tests.record_cases import training_job

__all__ = ["browser"]


def made(settings: Settings, folder: Path) -> tuple[str, str]:
    """An edit job and a generation job with a pair each."""
    store = JobStore(settings.record_url)
    worker = Worker(store, open_store(settings), folder)
    files = {f"{m}/m000.png": ObjectInfo("x", 1, "0" * 64) for m in ("cf", "fa")}
    dataset = store.add_dataset(
        "local",
        dataset_id=store.new_id("ds"),
        name="A",
        digest="0" * 64,
        pairs=1,
        report={},
        stored=StoredFiles(files),
    )
    training_job(store, "local")
    generation, _ = store.create_job("local", GenerationSpec(model_id=worker.train(), count=1))
    worker.make_part()
    edits = (EditTerm(text="haemorrhages"), EditTerm(text="disc", direction="remove"))
    edit, _ = store.create_job("local", EditSpec(dataset_id=dataset.id, edits=edits))
    make_part(worker)
    store.close()
    return edit.id, generation.id


def test_an_edit_shows_its_pairs_before_and_after(browser: Browser, tmp_path: Path, migrated: Path) -> None:
    settings = fresh_home(tmp_path, migrated)
    edit, generation = made(settings, tmp_path)
    shown = "getComputedStyle(document.getElementById('stage-{}')).display !== 'none'"
    offered = "document.querySelector('button[data-mode=sheet]').hidden"
    with served(settings) as url:
        browser.open(url)
        browser.until("document.querySelector('#jobs strong')?.textContent === 'Edit'")
        row = browser.value("document.querySelector('#jobs li').textContent")
        assert "add “haemorrhages”, remove “disc”: 1 pair of ds_" in row
        browser.value("document.querySelector('#jobs button').click()")
        browser.until("document.querySelector('#pairs .pair') !== null")
        browser.value("document.querySelector('#pairs .pair').click()")
        browser.until("document.getElementById('stage-cf').naturalWidth === 48")
        assert browser.value(offered) is False and browser.value(shown.format("sheet")) is False
        browser.value("document.querySelector('button[data-mode=sheet]').click()")
        browser.until("document.getElementById('stage-sheet').naturalWidth === 48")
        assert browser.value(f"{shown.format('sheet')} && !({shown.format('cf')}) && !({shown.format('fa')})") is True
        assert browser.value("location.hash") == f"#{edit}/0/sheet"
        # A generated pair has no sheet, so the mode is left.
        browser.open(f"{url}/?again#{generation}/0/sheet")
        browser.until(
            "document.getElementById('viewer')?.open && document.getElementById('stage').dataset.mode === 'side'"
        )
        assert browser.value(offered) is True and browser.value(shown.format("cf")) is True
    assert browser.errors == []
