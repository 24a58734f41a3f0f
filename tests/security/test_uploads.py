"""Every file of the hostile corpus is refused by a running API: typed, soon, in little memory; and it goes on."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest

from tests.raw_pairs import pair_files
from tests.security.conftest import MAX_RSS, Watched
from tests.security.hostile import MIB, UPLOADS, zipped

SECONDS = 5.0
LARGEST_ANSWER = 4 * MIB


def upload(http: httpx.Client, data: bytes, **form: str) -> httpx.Response:
    files = {"file": ("upload.zip", data, "application/zip")}
    return http.post("/v1/datasets", files=files, data={"name": "hostile"} | form)


@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
@pytest.mark.parametrize("name", UPLOADS)
def test_refused(name: str, api: Watched, http: httpx.Client, record_property: pytest.RecordProperty) -> None:
    case = UPLOADS[name]
    data = case.make()
    before = api.cpu_seconds()
    answer = upload(http, data, **case.form)
    seconds = api.cpu_seconds() - before
    assert answer.status_code == 422, answer.text[:2000]
    assert answer.headers["content-type"] == "application/problem+json"
    body = answer.json()
    found = {item["code"] for item in body["errors"]}
    assert body["code"] == "invalid_dataset" and found & case.codes, found
    assert len(answer.content) < LARGEST_ANSWER
    assert seconds < SECONDS, f"{seconds:.1f} s of CPU time"
    assert api.api_peak() < MAX_RSS and api.decoder_peak < MAX_RSS, (api.api_peak() / MIB, api.decoder_peak / MIB)
    assert http.get("/readyz").status_code == 200
    figures = {"bytes": len(data), "cpu": seconds, "api": api.api_peak(), "decoder": api.decoder_peak}
    record_property("figures", json.dumps(figures))


def test_nothing_was_kept_and_a_good_upload_is_taken_in(api: Watched, http: httpx.Client) -> None:
    # One at least of this very API: the others may have gone to that of another test process.
    assert upload(http, next(iter(UPLOADS.values())).make()).status_code == 422
    assert http.get("/v1/datasets").json()["items"] == []
    assert not list(api.home.rglob("evil*")) and not list(api.home.rglob("unpickled"))
    assert not list((api.home / "scratch" / "uploads").iterdir())
    answer = upload(http, zipped(pair_files(2, 64).items()))
    assert answer.status_code == 201 and answer.json()["pairs"] == 2
    assert Path(f"/proc/{api.pid}").exists()
