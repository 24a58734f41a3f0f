"""The way to the S3 store is slow, reset, cut in the middle of an upload or a download, answers 503 or nothing at all.

Trouble strikes at the n-th request, once or for good. Afterwards no object is readable that is not whole, every
failed call failed with a typed error after a bounded number of requests, and the same calls succeed once the way is
good again. Every eighth seed runs a job of a whole cluster through such a way instead.
"""

from __future__ import annotations

import hashlib
import io
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cffa_core.errors import NotFound, StorageUnavailable
from cffa_core.jobs import sweep
from cffa_core.storage.base import ObjectInfo
from cffa_core.storage.s3 import SMALLEST_PART, S3Store
from tests.faults.campaign import Facts, Fault
from tests.faults.place import Place
from tests.faults.proxy import Proxy, Trouble, What
from tests.faults.timed_child import timed
from tests.servers import S3_ACCESS_KEY, S3_SECRET_KEY
from tests.worker.world import OWNER

KINDS: tuple[What, ...] = ("reset", "cut_up", "cut_down", "http_503", "latency", "blackhole")
FOR_GOOD = 10_000
RETRIES = 2
READ_SECONDS = 2.0
LONGEST_SECONDS = 90.0
LARGE = 2 * SMALLEST_PART + 12_345


def scenario(seed: int, place: Place) -> Facts:
    """One trouble at one request of a fixed sequence of calls, or of a job."""
    dice = random.Random(seed)
    if seed % 8 == 0:
        return _job_through_trouble(place, dice)
    server = place.server("s3")
    bucket = f"trouble-{seed}-{dice.randrange(10**9)}"
    direct = _store(server.port, bucket)
    direct.ensure_bucket()
    with Proxy(server.port, http=True) as proxy:
        through = _store(proxy.port, bucket)
        if "requests" not in place.kept:
            proxy.begin(None)
            _calls(through, place.new_folder(), "untroubled", dice)
            place.kept["requests"] = proxy.calls
        requests = int(place.kept["requests"])
        trouble = Trouble(
            KINDS[seed % len(KINDS)],
            first=1 + (seed // len(KINDS)) % requests,
            times=dice.choice([1, 1, RETRIES, FOR_GOOD]),
            seconds=1.0,
            after=dice.choice([0, 1000, 200_000]),
        )
        if trouble.what in ("latency", "blackhole") and trouble.times == FOR_GOOD:
            trouble = Trouble(trouble.what, trouble.first, RETRIES, trouble.seconds)
        proxy.begin(trouble)
        began = time.monotonic()
        whole, errors = _calls(through, place.new_folder(), "troubled", dice)
        took = time.monotonic() - began
        sent = proxy.calls
        _nothing_partial(direct, whole)
        assert took < LONGEST_SECONDS, f"the calls took {took:.0f} s"
        # Each request is tried three times; multipart uploads are taken back, bodies resumed, ends looked at.
        assert sent <= 4 * requests * (1 + RETRIES), f"{sent} requests instead of {requests}"
        if trouble.times == 1 and trouble.what in ("http_503", "latency"):
            assert errors == 0, "one refused request must not fail a call"
        proxy.begin(None)
        again, errors_again = _calls(through, place.new_folder(), "troubled", random.Random(seed), whole)
        assert errors_again == 0
        _nothing_partial(direct, again)
        through.close()
    direct.close()
    return {"errors": errors, "seconds": took, "requests": sent, "what": trouble.what}


def _store(port: int, bucket: str) -> S3Store:
    return S3Store(
        endpoint=f"http://127.0.0.1:{port}",
        bucket=bucket,
        access_key=S3_ACCESS_KEY,
        secret_key=S3_SECRET_KEY,
        part_bytes=SMALLEST_PART,
        connect_seconds=READ_SECONDS,
        read_seconds=READ_SECONDS,
        retries=RETRIES,
    )


def _calls(
    store: S3Store, folder: Path, prefix: str, dice: random.Random, known: dict[str, bytes] | None = None
) -> tuple[dict[str, bytes], int]:
    """Put a small and a large object, read both back, list, delete one; returns what was to be stored, and errors."""
    wanted = known or {
        f"jobs/{prefix}/small": dice.randbytes(2000),
        f"jobs/{prefix}/large": dice.randbytes(LARGE),
        f"jobs/{prefix}/gone": dice.randbytes(100),
    }
    small, large, gone = wanted
    errors = 0

    def attempt(call: Callable[[], Any]) -> Any:
        nonlocal errors
        try:
            return call()
        except StorageUnavailable:
            errors += 1
        except NotFound:
            assert errors, "an object that was stored is not there"
        return None

    attempt(lambda: store.put_bytes(small, wanted[small]))
    info = attempt(lambda: store.put_stream(large, io.BytesIO(wanted[large])))
    assert info is None or info == _info(large, wanted[large])
    read = attempt(lambda: store.get_bytes(small))
    assert read in (None, wanted[small])
    target = folder / "large"
    attempt(lambda: store.fetch(_info(large, wanted[large]), target))
    assert not target.exists() or target.read_bytes() == wanted[large]
    attempt(lambda: store.put_bytes(gone, wanted[gone]))
    attempt(lambda: list(store.list(f"jobs/{prefix}/")))
    attempt(lambda: store.delete(gone))
    return wanted, errors


def _info(key: str, data: bytes) -> ObjectInfo:
    return ObjectInfo(key, len(data), hashlib.sha256(data).hexdigest())


def _nothing_partial(store: S3Store, wanted: dict[str, bytes]) -> None:
    """Whatever can be read is whole, whatever is listed can be read."""
    listed = set(store.list("jobs/troubled/"))
    assert listed <= set(wanted)
    for key in listed:
        assert store.get_bytes(key) == wanted[key], f"{key} is readable and not whole"


def _job_through_trouble(place: Place, dice: random.Random) -> Facts:
    """Workers whose requests are refused, reset or cut now and then; the job is done, its objects are whole."""
    server = place.server("s3")
    with (
        Proxy(server.port, http=True) as proxy,
        place.whole_cluster(lease_seconds=6.0, poll_seconds=0.5, s3_endpoint=f"http://127.0.0.1:{proxy.port}") as world,
    ):
        log = world.settings.home / "child.log"
        job = world.generation(world.adopt_model(), count=6, part_size=1)
        what = dice.choice(KINDS[:4])
        proxy.begin(Trouble(what, first=dice.randint(1, 20), times=dice.randint(1, 3), after=dice.choice([0, 1000])))
        for _ in range(2):
            world.start_worker(timed(log, 0.3, size=100_000))
        world.wait_terminal(job.id)
        world.assert_succeeded(job.id)
        recorded = {}
        for part in world.store.parts(OWNER, job.id):
            for info in part.stored.files.values():
                world.objects.fetch(info, world.settings.home / "fetched")
                recorded[info.key] = info
        sweep.orphans(world.store, world.objects)
        assert set(world.objects.list(f"jobs/{job.id}/")) == set(recorded)
        return {"what": f"job, {what}", "requests": proxy.calls}


FAULT = Fault(
    "s3_trouble", "S3 slow, reset, cut, 503 or silent at the n-th request", 150, scenario, quick=(2, 3), servers=True
)
