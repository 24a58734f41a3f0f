"""A thousand posts at once with one key make one job: a real server, a thousand connections, on each database."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from cffa_core.jobs.store import JobStore
from services.client.servers import Servers
from tests.record_cases import trained_model

POSTS = 1000
OTHERS = 50
OWNER = "local"


async def post_all(url: str, requests: list[bytes]) -> list[tuple[int, dict[str, str], dict[str, Any]]]:
    """Open a connection for each request, then send all of them at once; status, headers and body of each answer."""
    address = urlsplit(url)
    assert address.hostname is not None
    opened = [await asyncio.open_connection(address.hostname, address.port, limit=1 << 20) for _ in requests]

    async def answer_to(
        request: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> tuple[int, dict[str, str], dict[str, Any]]:
        writer.write(request)
        await writer.drain()
        data = await reader.read()  # the server closes the connection when it has answered
        writer.close()
        head, _, body = data.partition(b"\r\n\r\n")
        first, *lines = head.decode().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines)
        return int(first.split()[1]), headers, json.loads(body)

    return await asyncio.gather(
        *(answer_to(request, *streams) for request, streams in zip(requests, opened, strict=True))
    )


def request(body: dict[str, Any], key: str) -> bytes:
    content = json.dumps(body).encode()
    head = (
        "POST /v1/generation-jobs HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\nIdempotency-Key: {key}\r\n\r\n"
    )
    return head.encode() + content


@pytest.mark.slow
def test_a_thousand_posts_with_one_key_make_one_job(record_url: str, tmp_path: Path) -> None:
    store = JobStore(record_url)
    model_id = trained_model(store, OWNER)
    store.close()
    environment = {
        "CFFA_DATABASE_URL": record_url,
        "CFFA_RATE_LIMIT_PER_MINUTE": "0",
        "CFFA_RATE_LIMIT_POSTS_PER_MINUTE": "0",
    }
    body = {"model_id": model_id, "count": 8, "seed": 7}
    same = request(body, "one-key-for-all")
    other = request(body | {"seed": 8}, "one-key-for-all")
    with Servers(tmp_path / "home", workers=0, logs=tmp_path / "logs", environment=environment) as servers:
        servers.wait_ready()
        answers = asyncio.run(post_all(servers.url, [same] * POSTS))
        refused = asyncio.run(post_all(servers.url, [other] * OTHERS))
        listed = httpx.get(f"{servers.url}/v1/jobs", params={"kind": "generation"}, timeout=60).json()["items"]
        # With another key it is another job, so that one job above is not all that this server would make.
        ((again, _, second),) = asyncio.run(post_all(servers.url, [request(body, "another")]))
    assert Counter(status for status, _, _ in answers) == {202: POSTS}
    assert len({answer["id"] for _, _, answer in answers}) == 1
    assert sum("idempotency-replayed" not in headers for _, headers, _ in answers) == 1
    assert [job["id"] for job in listed] == [answers[0][2]["id"]]
    assert Counter((status, answer["code"]) for status, _, answer in refused) == {
        (422, "idempotency_key_reused"): OTHERS
    }
    assert again == 202 and second["id"] != listed[0]["id"]
