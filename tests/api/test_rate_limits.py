"""Requests per minute of one key: in memory, in a real Redis that replicas share, and with Redis gone."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import redis
from fastapi.testclient import TestClient
from pydantic import SecretStr

from services.api.app import create_app
from services.api.problems import RateLimited
from services.api.rate_limits import AWAY_SECONDS, RateLimits
from tests.api.conftest import fresh_home
from tests.api.driving import URL, problem
from tests.api.people_world import BOOTSTRAP, bearer
from tests.servers import Server, running

Case = Callable[[], Coroutine[Any, Any, None]]


@asynccontextmanager
async def opened(url: str, *, per_minute: int = 0, posts: int = 0) -> AsyncIterator[RateLimits]:
    limits = RateLimits(per_minute=per_minute, posts_per_minute=posts, url=url)
    try:
        yield limits
    finally:
        await limits.close()


async def passed(limits: RateLimits, key: str, times: int, *, changing: bool = False) -> list[bool]:
    found = []
    for _ in range(times):
        try:
            await limits.require(key, changing=changing)
        except RateLimited:
            found.append(False)
        else:
            found.append(True)
    return found


@pytest.fixture(params=["memory", "redis"])
def url(request: pytest.FixtureRequest) -> str:
    """Where the counts live; each test has keys of its own."""
    if request.param == "memory":
        return ""
    server: Server = request.getfixturevalue("redis_server")
    return server.url


def run(case: Case) -> None:
    asyncio.run(case())


def test_one_too_many_is_refused_and_says_when_to_come_back(url: str) -> None:
    key = f"key-{time.time_ns()}"

    async def case() -> None:
        async with opened(url, per_minute=5) as limits:
            assert await passed(limits, key, 5) == [True] * 5
            with pytest.raises(RateLimited) as caught:
                await limits.require(key, changing=False)
            wait = int(caught.value.headers["Retry-After"])
            assert 1 <= wait <= 60
            assert caught.value.headers["RateLimit-Policy"] == '"requests";q=5;w=60'
            assert caught.value.headers["RateLimit"] == f'"requests";r=0;t={wait}'
            assert await passed(limits, f"{key}-another", 1) == [True]

    run(case)


def test_changes_have_a_limit_of_their_own(url: str) -> None:
    key = f"key-{time.time_ns()}"

    async def case() -> None:
        async with opened(url, per_minute=6, posts=2) as limits:
            assert await passed(limits, key, 3, changing=True) == [True, True, False]
            assert await passed(limits, key, 5) == [True] * 4 + [False]

    run(case)


def test_a_change_that_one_limit_refuses_counts_in_neither(url: str) -> None:
    key = f"key-{time.time_ns()}"

    async def case() -> None:
        async with opened(url, per_minute=3, posts=3) as limits, opened(url, posts=3) as posts_alone:
            assert await passed(limits, key, 2) == [True] * 2
            assert await passed(limits, key, 3, changing=True) == [True, False, False]
            seen = limits if not url else posts_alone  # memory is the process's own
            if not url:
                del limits._limits["requests"]
            assert await passed(seen, key, 3, changing=True) == [True, True, False]

    run(case)


def test_replicas_count_together(redis_server: Server) -> None:
    key = f"key-{time.time_ns()}"

    async def case() -> None:
        async with opened(redis_server.url, per_minute=4) as one, opened(redis_server.url, per_minute=4) as other:
            assert await passed(one, key, 3) == [True] * 3
            assert await passed(other, key, 3) == [True, False, False]

    run(case)


def test_nothing_stays_in_redis(redis_server: Server) -> None:
    key = f"key-{time.time_ns()}"

    async def case() -> None:
        async with opened(redis_server.url, per_minute=5) as limits:
            await passed(limits, key, 3)

    run(case)
    with redis.Redis.from_url(redis_server.url) as client:
        left = [name for name in client.scan_iter("*") if key.encode() in name]
        assert left and all(0 < client.ttl(name) <= 120 for name in left)


def test_when_redis_is_killed_requests_pass_and_it_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    async def case(server: Server) -> None:
        async with opened(server.url, per_minute=2) as limits:
            assert await passed(limits, "key", 3) == [True, True, False]
            await asyncio.to_thread(server.kill)
            began = time.monotonic()
            assert await passed(limits, "key", 200) == [True] * 200
            assert time.monotonic() - began < AWAY_SECONDS
            limits._away_until = 0.0  # as if it were time to ask again
            assert await passed(limits, "key", 1) == [True]
            await asyncio.to_thread(server.start)
            limits._away_until = 0.0
            assert await passed(limits, "another key", 3) == [True, True, False]

    with caplog.at_level(logging.WARNING), running("redis") as server:
        asyncio.run(case(server))
    assert caplog.text.count("requests are not counted, Redis does not answer") == 1


def test_no_limit_asks_nobody() -> None:
    async def case() -> None:
        async with opened("redis://127.0.0.1:9/0") as limits:
            assert await passed(limits, "key", 100) == [True] * 100

    run(case)


def test_over_http(tmp_path: Path, migrated: Path) -> None:
    more = {"require_keys": True, "bootstrap_key": SecretStr(BOOTSTRAP), "rate_limit_per_minute": 3}
    settings = fresh_home(tmp_path, migrated).model_copy(update=more)
    with TestClient(create_app(settings), base_url=URL, raise_server_exceptions=False) as client:
        for _ in range(3):
            assert client.get("/v1/jobs", headers=bearer(BOOTSTRAP)).status_code == 200
        refused = client.get("/v1/jobs", headers=bearer(BOOTSTRAP))
        assert problem(refused, 429, "rate_limited")["retryable"] is True
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert refused.headers["ratelimit-policy"] == '"requests";q=3;w=60'
        for _ in range(5):
            assert client.get("/livez").status_code == 200
            assert client.get("/v1/jobs").status_code == 401
