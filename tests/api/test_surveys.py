"""Looking into a data set after it was taken in: in a child, written into its report, with a sheet of flagged pairs."""

from __future__ import annotations

import asyncio
import io

import cv2
import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from cffa_core.data.phantom import make_phantom
from services.api import surveys
from services.api.access import Backend
from tests.api.driving import zipped


def as_png(pixels: np.ndarray) -> bytes:
    shown = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR) if pixels.ndim == 3 else pixels
    return bytes(cv2.imencode(".png", shown)[1].tobytes())


@pytest.fixture
def by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """The application leaves looking into data sets to the test."""
    monkeypatch.setattr(surveys, "PAUSE_SECONDS", 3600.0)


def test_what_is_found_is_in_the_report_and_on_a_sheet(by_hand: None, client: TestClient, backend: Backend) -> None:
    members = {}
    for index in range(3):
        phantom = make_phantom(700 + index, 192)
        fa = np.roll(phantom.fa, 6, axis=1) if index == 1 else phantom.fa
        members |= {f"cf/e{index}.png": as_png(phantom.cf), f"fa/e{index}.png": as_png(fa)}
    grey = cv2.cvtColor(make_phantom(702, 192).cf, cv2.COLOR_RGB2GRAY)
    members["cf/e2.png"] = as_png(grey)
    form = {"name": "phantoms"}
    made = client.post("/v1/datasets", files={"file": ("s.zip", zipped(members), "application/zip")}, data=form).json()
    url = made["links"]["report"]
    assert client.get(url).json()["survey"]["state"] == "waiting"
    (dataset,) = backend.store.unsurveyed_datasets()
    for _ in range(2):  # the second comes too late and leaves nothing behind
        asyncio.run(surveys.survey(backend, dataset))
    report = client.get(url).json()
    flags = {pair["name"]: pair["flags"] for pair in report["survey"]["pairs"]}
    assert flags == {"e0": [], "e1": ["misregistered"], "e2": ["grey_cf"]}
    assert backend.store.unsurveyed_datasets() == []
    with Image.open(io.BytesIO(client.get(report["pictures"]["flagged.png"]).content)) as sheet:
        assert sheet.size[1] > 2 * 250
    # a version with the misregistered pair registered anew, found by the report
    again = client.post(f"/v1/datasets/{made['id']}/versions", json={"auto_register": "flagged"}).json()
    pairs = client.get(f"/v1/datasets/{again['id']}/pairs").json()["items"]
    assert [pair["registration"] for pair in pairs] == ["given", "auto", "given"]
    asyncio.run(surveys.survey(backend, backend.store.get_dataset("local", again["id"])))
    found = client.get(f"/v1/datasets/{again['id']}/report").json()["survey"]["pairs"]
    assert next(pair["shift_px"] for pair in found if pair["name"] == "e1") < 1.0
    for dataset_id in (made["id"], again["id"]):
        assert client.delete(f"/v1/datasets/{dataset_id}").status_code == 204
    assert list(backend.objects.list("datasets/")) == []
