"""Sends web hooks: a task of every API process that takes due deliveries from the record and writes down what came.

The name of a receiver is looked up once and the connection goes to an address that was checked; its name is still
what TLS verifies and what the Host header says. No redirects, no proxies, no kept connections; what a receiver answers
is read a little and dropped. Which deliveries are due, and when again, the record decides.
"""

from __future__ import annotations

import asyncio
import logging
import math
import ssl
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cached_property, partial
from typing import Any, TypeVar

import anyio
import certifi
import h11

from cffa_core.errors import CffaError, InvalidSettings
from cffa_core.jobs.store import JobStore
from cffa_core.settings import Settings
from cffa_core.webhooks import signing
from cffa_core.webhooks.addresses import Lookup, Policy, Target, system_lookup
from cffa_core.webhooks.due import Ending
from cffa_core.webhooks.records import Due, Outcome
from cffa_core.webhooks.store import Webhooks

T = TypeVar("T")
AT_ONCE = 8
LEASE_SECONDS = 60.0
CONNECT_SECONDS = 5.0
ADDRESSES_TRIED = 3
LONGEST_ANSWER = 64 << 10
PIECE = 16 << 10
LAST_SECONDS = 2.0
"""What is being sent when the process ends gets so long to be answered."""
USER_AGENT = "CFFA-Webhooks/1"
_log = logging.getLogger("cffa.webhooks")


def require_sensible(settings: Settings) -> None:
    """Raise :class:`InvalidSettings` for ``CFFA_WEBHOOK_*`` with which no web hook could be sent."""
    Policy.of(settings)
    if settings.webhook_ca_file is not None:
        trusted(settings)


def trusted(settings: Settings) -> ssl.SSLContext:
    """Public certificate authorities, and those of ``CFFA_WEBHOOK_CA_FILE``; raises :class:`InvalidSettings`."""
    context = ssl.create_default_context(cafile=certifi.where())
    if settings.webhook_ca_file is not None:
        try:
            context.load_verify_locations(settings.webhook_ca_file)
        except (OSError, ssl.SSLError) as error:
            raise InvalidSettings(f"CFFA_WEBHOOK_CA_FILE holds no certificates that can be read: {error}") from error
    return context


class Sender:
    """Sends what ``hooks`` has due; ``on_ending`` hears what became of each try.

    ``lookup`` finds all addresses of a name. A try that is not written down within ``lease_seconds`` is made again.
    """

    def __init__(
        self,
        hooks: Webhooks,
        settings: Settings,
        *,
        on_ending: Callable[[Ending], None] = lambda ending: None,
        lookup: Lookup = system_lookup,
        lease_seconds: float = LEASE_SECONDS,
    ) -> None:
        self._hooks = hooks
        self._settings = settings
        self._limit = settings.webhook_timeout_seconds
        self._poll = settings.webhook_poll_seconds
        self._on_ending = on_ending
        self._lookup = lookup
        self._lease = lease_seconds
        # Threads of its own: however slow name servers are, requests to the API keep theirs.
        self._names = anyio.CapacityLimiter(2 * AT_ONCE)
        self._record = anyio.CapacityLimiter(4)
        self._sending: set[asyncio.Task[None]] = set()

    async def run(self, store: JobStore) -> None:
        """Send until cancelled; what is under way then gets two seconds more. A record that is away is waited for."""
        ready = False
        try:
            while True:
                found = 0
                try:
                    if not ready:  # this process may be older than the answers of its database
                        await self._asked(store.require_schema)
                        ready = True
                    found = await self._start_due()
                except CffaError as error:
                    _log.error("web hooks wait, they are tried again in %s s: %s", self._poll, error.message)
                await self._wait(hurry=found > 0)
        finally:
            await self._finish()

    async def _start_due(self) -> int:
        """Begin to send what is due; returns how many deliveries that is."""
        claim = partial(self._hooks.claim, AT_ONCE - len(self._sending), lease_seconds=self._lease)
        due = await self._asked(claim)
        for delivery in due:
            task = asyncio.create_task(self._deliver(delivery))
            self._sending.add(task)
            task.add_done_callback(self._done)
        return len(due)

    async def _wait(self, *, hurry: bool) -> None:
        """Until it is worth looking again: at once when one of several was sent, else after the polling interval."""
        if hurry and self._sending:
            await asyncio.wait(self._sending, timeout=self._poll, return_when=asyncio.FIRST_COMPLETED)
        else:
            await asyncio.sleep(self._poll)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._sending.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("a web hook was not sent; it is tried again when its lease ends", exc_info=error)

    async def _finish(self) -> None:
        left = set(self._sending)
        if left:
            await asyncio.wait(left, timeout=LAST_SECONDS)
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    async def _deliver(self, due: Due) -> None:
        outcome = await self.send(due)
        try:
            ending = await self._asked(partial(self._hooks.record, due, outcome))
        except CffaError as error:
            _log.error("delivery %s was sent, but not written down: %s", due.delivery_id, error.message)
            return
        self._on_ending(ending)
        _log.log(
            logging.INFO if ending == "delivered" else logging.WARNING,
            "web hook %s, delivery %s, try %s: %s (%s)",
            *(due.webhook_id, due.delivery_id, due.tries, ending, outcome.error or outcome.status),
        )

    async def send(self, due: Due) -> Outcome:
        """One try, which takes no longer than the limit of the settings, whatever the receiver does. Never raises."""
        began = time.monotonic()
        answer = _Answer()
        try:
            async with asyncio.timeout(self._limit):
                await self._exchange(due, answer)
        except TimeoutError:
            answer.error = f"no answer within {self._limit:g} s"
        except CffaError as error:  # the URL or its addresses are not allowed
            answer.error = error.message
        except (OSError, h11.ProtocolError):
            answer.error = "the answer was not HTTP or broke off"
        seconds = time.monotonic() - began
        if answer.status is None:
            return Outcome(None, answer.error, seconds)
        # What the status line said counts, also if the rest of the answer never came.
        return Outcome(answer.status, None, seconds, answer.retry_after)

    async def _exchange(self, due: Due, answer: _Answer) -> None:
        target = self._hooks.policy.target(due.url)
        lookup = partial(self._hooks.policy.addresses, target, self._lookup)
        addresses = await anyio.to_thread.run_sync(lookup, limiter=self._names, abandon_on_cancel=True)
        body = due.body.encode()
        signed = signing.headers(due.secrets, due.message_id, int(time.time()), body)
        fixed = {
            "Host": target.authority,
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            "User-Agent": USER_AGENT,
            "Connection": "close",
        }
        headers = list((fixed | signed).items())
        request = h11.Request(method="POST", target=target.path, headers=headers)
        for address in addresses[:ADDRESSES_TRIED]:
            try:
                reader, writer = await self._connect(target, address)
            except ssl.SSLError as error:
                answer.error = f"TLS failed: {getattr(error, 'verify_message', None) or error.reason or 'no agreement'}"
            except (OSError, TimeoutError, UnicodeError):
                answer.error = "no connection"
            else:
                try:
                    await _converse(reader, writer, request, body, answer)
                finally:
                    writer.transport.abort()  # nothing more is said, also not by a receiver that goes on
                return

    async def _connect(self, target: Target, address: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Connect to an address that was checked; it is the name that TLS asks for and verifies."""
        tls: dict[str, Any] = {}
        if target.scheme == "https":
            tls = {"ssl": self._trusted, "server_hostname": target.host}
        async with asyncio.timeout(CONNECT_SECONDS):
            return await asyncio.open_connection(address, target.port, **tls)

    @cached_property
    def _trusted(self) -> ssl.SSLContext:
        """Made when first needed: most processes send nothing."""
        return trusted(self._settings)

    def _asked(self, question: Callable[[], T]) -> Awaitable[T]:
        return anyio.to_thread.run_sync(question, limiter=self._record)


class _Answer:
    """What is known of an answer so far."""

    status: int | None = None
    retry_after: float | None = None
    error: str | None = None


async def _converse(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: h11.Request, body: bytes, answer: _Answer
) -> None:
    """Post and hear the answer; raises ``h11.ProtocolError`` if it is none, ``OSError`` if it broke off."""
    speech = h11.Connection(h11.CLIENT, max_incomplete_event_size=LONGEST_ANSWER)
    for event in (request, h11.Data(data=body), h11.EndOfMessage()):
        writer.write(speech.send(event) or b"")
    await writer.drain()
    read = 0
    while read <= LONGEST_ANSWER:
        heard = speech.next_event()
        if heard is h11.NEED_DATA:
            piece = await reader.read(PIECE)
            read += len(piece)
            speech.receive_data(piece)
        elif isinstance(heard, h11.Response):
            answer.status = heard.status_code
            answer.retry_after = _retry_after(dict(heard.headers).get(b"retry-after", b"").decode("ascii", "replace"))
        elif heard is h11.PAUSED or isinstance(heard, h11.EndOfMessage | h11.ConnectionClosed):
            break
    if answer.status is None:
        raise h11.RemoteProtocolError("no final answer")


def _retry_after(header: str) -> float | None:
    """Seconds of a Retry-After header (RFC 9110, section 10.2.3): a number, or a date."""
    if header.isascii() and header.isdecimal() and len(header) < 10:
        return float(header)
    try:
        moment = parsedate_to_datetime(header)
        seconds = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() - datetime.now(UTC).timestamp()
    except (ValueError, TypeError, OverflowError):
        return None
    return seconds if math.isfinite(seconds) else None
