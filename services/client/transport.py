"""Requests that are sent until they are answered: what may be repeated is, when the connection breaks or the service
says "later". Knows no routes and no resources.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import httpx

from cffa_core.errors import InvalidSpec
from services.client.problems import ApiQuotaExceeded, ServiceUnreachable, from_response

LONGEST_DELAY = 8.0
LATER = (httpx.codes.TOO_MANY_REQUESTS, httpx.codes.SERVICE_UNAVAILABLE)


class Transport:
    """Connections to one service; ``http`` carries the key, ``signed`` is for links that carry their own permission."""

    def __init__(
        self, base_url: str, *, api_key: str | None, timeout: float, retries: int, transport: httpx.BaseTransport | None
    ) -> None:
        def connections(headers: dict[str, str]) -> httpx.Client:
            return httpx.Client(
                base_url=base_url, headers=headers, timeout=timeout, transport=transport, follow_redirects=True
            )

        self.http = connections({"Authorization": f"Bearer {api_key}"} if api_key else {})
        self.signed = connections({})
        self._retries = retries
        self._answered = False

    @property
    def base_url(self) -> str:
        """Address of the service."""
        return str(self.http.base_url).rstrip("/")

    def close(self) -> None:
        """Close all connections."""
        self.http.close()
        self.signed.close()

    def sent(self, send: Callable[[], httpx.Response], *, repeatable: bool) -> httpx.Response:
        """The answer to ``send()``, called again after 0.25 s, 0.5 s, 1 s ... as long as that is safe.

        A request that is not ``repeatable`` is sent again only if it surely was not acted on. Raises ``ApiError`` for a
        refusal, ``ServiceUnreachable`` when there is no answer.
        """
        for attempt in range(self._retries + 1):
            last = attempt == self._retries
            delay = min(LONGEST_DELAY, 0.25 * 2**attempt)
            try:
                response = send()
            except ValueError as error:
                if "JSON" not in str(error):  # the number that httpx does not write
                    raise
                raise InvalidSpec("a number is not finite; nothing was sent") from error
            except httpx.TransportError as error:
                # Nobody there at the very first request is a wrong address, not a restart.
                absent = isinstance(error, httpx.ConnectError) and not self._answered
                if last or absent or not (repeatable or isinstance(error, httpx.ConnectError)):
                    what = str(error) or type(error).__name__
                    raise ServiceUnreachable(f"no answer from {self.base_url}: {what}") from error
            else:
                self._answered = True
                if not response.is_error:
                    return response
                problem = from_response(response)
                # An account's unfinished jobs end in hours, not in seconds: whoever posts decides what to do.
                if last or response.status_code not in LATER or isinstance(problem, ApiQuotaExceeded):
                    raise problem
                delay = problem.retry_after or delay
            time.sleep(delay)
        raise AssertionError("unreachable")
