"""A short piece of the long campaign: no server error, and every answer is one that the document describes.

Also what HTTP itself asks of wrong methods and wrong content types, which is looked at route by route.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis

from tests.fuzz.campaign import errors_in, run
from tests.fuzz.hooks import is_only_written_otherwise
from tests.fuzz.place import Target, target

# Which phases run where, and for how many seconds at most; together they see each phase, with keys and without.
SHORT = {"open": ("coverage", 20), "keyed": ("fuzzing,stateful", 8)}
EXAMPLES = 3


@pytest.fixture(scope="module", params=["open", "keyed"])
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    with target(tmp_path_factory.mktemp(request.param) / "home", keyed=request.param == "keyed") as started:
        yield started


@pytest.mark.slow
def test_every_answer_is_as_documented(place: Target) -> None:
    phases, seconds = SHORT["keyed" if place.key else "open"]
    done = run(place, "--phases", phases, "--max-examples", str(EXAMPLES), "--max-time", str(seconds), "--seed", "1")
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2000:]
    assert not errors_in(place.logs)


@pytest.mark.parametrize(
    ("body", "otherwise"),
    [
        ({"split": {"train": "0.7", "seed": False}}, True),
        ({"split": {"train": 1}}, False),
        ({"split": {"train": "0.7", "other": 1}}, False),
        ({"split": {"train": 0}}, False),
        ({"split": {"validation": "1"}}, False),
        ({"reject": "m000"}, False),
        ({"name": 5}, False),
    ],
)
def test_only_scalars_may_be_written_otherwise(place: Target, body: dict[str, Any], otherwise: bool) -> None:
    document = httpx.get(f"{place.url}/openapi.json").json()
    operation = schemathesis.openapi.from_dict(document)["/v1/datasets/{dataset_id}/versions"]["POST"]
    case = operation.Case(body=body, media_type="application/json")
    assert is_only_written_otherwise(case) is otherwise


def test_the_stateful_phase_has_links_to_follow(place: Target) -> None:
    document = httpx.get(f"{place.url}/openapi.json").json()
    posted = document["paths"]["/v1/generation-jobs"]["post"]["responses"]["202"]["links"]
    assert {"getJob", "cancelJob", "deleteJob", "listPairs", "listArchives"} <= posted.keys()
    taken = document["paths"]["/v1/datasets"]["post"]["responses"]["201"]["links"]
    assert {"getDataset", "listDatasetPairs"} <= taken.keys()


def test_wrong_methods_and_wrong_bodies(place: Target) -> None:
    headers = {"Authorization": f"Bearer {place.key}"} if place.key else {}
    with httpx.Client(base_url=place.url, headers=headers) as http:
        document: dict[str, Any] = http.get("/openapi.json").json()
        for path, item in document["paths"].items():
            if "{token}" in path or ("{" in path and ":" not in path):
                continue
            url = path.replace("{job_id}", place.ids["job_id"][0]).replace("{dataset_id}", place.ids["dataset_id"][0])
            if "{" in url:
                continue
            refused = http.request("TRACE", url)
            assert refused.status_code == 405, url
            assert set(refused.headers["allow"].split(", ")) == {method.upper() for method in item}, url
            if "application/json" in item.get("post", {}).get("requestBody", {}).get("content", {}):
                answer = http.post(url, content=b"a=b", headers={"Content-Type": "application/x-www-form-urlencoded"})
                assert (answer.status_code, answer.json()["code"]) == (415, "unsupported_media_type"), url


def test_the_log_is_searched(tmp_path: Path) -> None:
    (tmp_path / "api.log").write_text(
        "2026 ERROR cffa.api request 1 failed\nTraceback (most recent call last):\nfine\n"
    )
    assert len(errors_in(tmp_path)) == 2
