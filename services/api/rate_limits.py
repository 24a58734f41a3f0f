"""How often one key may ask: a sliding window of a minute, counted by the library ``limits``.

In a cluster the counts live in the broker's Redis, so that all replicas share them; in one process in its memory. Redis
is no reason to refuse anybody: while it is away every request passes, which is logged once a minute.
"""

from __future__ import annotations

import logging
import math
import time
from typing import Self

import redis.asyncio as redis
from limits import RateLimitItem, RateLimitItemPerMinute
from limits.aio.storage import MemoryStorage, RedisStorage
from limits.aio.strategies import SlidingWindowCounterRateLimiter
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from cffa_core.settings import Settings
from services.api.problems import RateLimited

PREFIX = "cffa-rate"
WINDOW_SECONDS = 60
PATIENCE_SECONDS = 0.5
AWAY_SECONDS = 5.0
SAY_EVERY = 60.0
_log = logging.getLogger("cffa.api")


class RateLimits:
    """Limits per key: ``per_minute`` requests, of these ``posts_per_minute`` that change something; 0 means no limit.

    ``url`` is that of a Redis (empty: this process's memory). :meth:`close` it in the loop that used it.
    """

    def __init__(self, *, per_minute: int, posts_per_minute: int, url: str = "") -> None:
        self._limits: dict[str, RateLimitItem] = {
            name: RateLimitItemPerMinute(amount, namespace=name)
            for name, amount in (("posts", posts_per_minute), ("requests", per_minute))
            if amount
        }
        self._pool: redis.ConnectionPool | None = None
        storage: MemoryStorage | RedisStorage
        if url:
            self._pool = redis.ConnectionPool.from_url(
                url,
                socket_timeout=PATIENCE_SECONDS,
                socket_connect_timeout=PATIENCE_SECONDS,
                retry=Retry(NoBackoff(), 0),
            )
            options: dict[str, object] = {"connection_pool": self._pool}
            storage = RedisStorage(f"async+{url}", implementation="redispy", key_prefix=PREFIX, **options)  # type: ignore[arg-type]
        else:
            storage = MemoryStorage()
        self._storage = storage
        self._windows = SlidingWindowCounterRateLimiter(storage)
        self._away_until = -math.inf
        self._said = -math.inf

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """The limits of a service's settings."""
        return cls(
            per_minute=settings.rate_limit_per_minute,
            posts_per_minute=settings.posts_per_minute,
            url=settings.queue_url,
        )

    async def require(self, key: str, *, changing: bool) -> None:
        """Count a request of a key (named by its id); raises :class:`RateLimited` if it is one too many.

        A request that is refused is not counted.
        """
        if not self._limits or time.monotonic() < self._away_until:
            return
        asked = {name: limit for name, limit in self._limits.items() if name == "requests" or changing}
        try:
            # With two limits both are looked at before either counts.
            for within in (self._windows.test, self._windows.hit) if len(asked) > 1 else (self._windows.hit,):
                for name, limit in asked.items():
                    if not await within(limit, key):
                        free = (await self._windows.get_window_stats(limit, key)).reset_time - time.time()
                        raise RateLimited(name, limit.amount, WINDOW_SECONDS, max(1, math.ceil(free)))
        except (RedisError, OSError, TimeoutError) as error:
            self._passed(error)

    async def close(self) -> None:
        """Close all connections."""
        if self._pool is not None:
            await self._pool.disconnect()
        if isinstance(self._storage, MemoryStorage) and self._storage.timer is not None:
            self._storage.timer.cancel()

    def _passed(self, error: Exception) -> None:
        """Ask nobody for a few seconds, so that requests do not wait for a server that does not answer."""
        now = time.monotonic()
        self._away_until = now + AWAY_SECONDS
        if now - self._said > SAY_EVERY:
            self._said = now
            _log.warning("requests are not counted, Redis does not answer: %s", error)
