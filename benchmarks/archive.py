"""What does the archive of a large job cost? Merge N small pairs as `finalize` does; speed and peak memory over N.

Each measurement is a process of its own, so that its peak memory is its own: it merges part archives one by one, as
they are fetched, and streams the whole archive into a local object store. In turn with it, a second process copies the
same bytes with nothing but SHA-256, as the floor.

    python -m benchmarks.archive --pairs 1000 10000 --work runs/archive

prints a table and writes benchmarks/results/archive.json. Goal: under 200 MB, the same for every N.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cffa_core.recipes.archive import merge_archives, write_part_archive
from cffa_core.storage.local import LocalStore
from tests.faults.campaign import machine

RESULTS = Path(__file__).resolve().parent / "results" / "archive.json"
PART = 100
CHUNK = 1 << 20


def main() -> None:
    """Measure all sizes, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, nargs="+", default=[1000, 10_000])
    parser.add_argument("--image-bytes", type=int, default=12_000, help="size of one image")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path("runs/archive"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--measure", choices=["merge", "copy"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure is not None:
        measured = {"merge": _merge, "copy": _copy}[options.measure](options.work)
        print(json.dumps(measured | {"peak_rss_mb": round(_peak_rss() / 1e6, 1)}))
        return
    rows = [_row(pairs, options) for pairs in options.pairs]
    result = {
        "question": "what does the archive of a large job cost?",
        "image_bytes": options.image_bytes,
        "pairs_per_part": PART,
        "machine": machine(),
        "goal": {"peak_rss_mb": 200},
        "rows": rows,
    }
    options.results.parent.mkdir(exist_ok=True)
    options.results.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print("| pairs | MB | MB/s merged | MB/s copied | peak RSS MB |\n|---|---|---|---|---|")
    for row in rows:
        merged, copied = row["merge"], row["copy"]
        speeds = f"{merged['mb_per_second']} | {copied['mb_per_second']}"
        print(f"| {row['pairs']} | {merged['megabytes']} | {speeds} | {merged['peak_rss_mb']} |")


def _row(pairs: int, options: argparse.Namespace) -> dict[str, Any]:
    """The best of some repeats of both ways, in turn."""
    work = options.work / str(pairs)
    _write_parts(work / "parts", pairs, options.image_bytes)
    best: dict[str, dict[str, Any]] = {}
    for _ in range(options.repeats):
        for way in ("merge", "copy"):
            command = [sys.executable, "-m", "benchmarks.archive", "--measure", way, "--work", str(work)]
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            if way not in best or found["mb_per_second"] > best[way]["mb_per_second"]:
                best[way] = found
            shutil.rmtree(work / "out")
    shutil.rmtree(work)
    slower = best["copy"]["mb_per_second"] / best["merge"]["mb_per_second"]
    return {"pairs": pairs, **best, "times_slower_than_copying": round(slower, 2)}


def _write_parts(folder: Path, pairs: int, size: int) -> None:
    """Part archives of random bytes in place of images: nothing here looks into them."""
    dice = random.Random(pairs)
    folder.mkdir(parents=True, exist_ok=True)
    for first in range(0, pairs, PART):
        part = folder / "part"
        entries = []
        for index in range(first, min(first + PART, pairs)):
            entry: dict[str, Any] = {"index": index, "seed": dice.getrandbits(60)}
            for modality in ("cf", "fa"):
                data = dice.randbytes(size)
                path = part / modality / f"{index:06d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
                digest = hashlib.sha256(data).hexdigest()
                entry[modality] = {"name": f"{modality}/{index:06d}.png", "size": size, "sha256": digest}
            entries.append(entry)
        (part / "part.json").write_text(json.dumps({"pairs": entries}))
        write_part_archive(part, folder / f"{first:08d}.zip")
        shutil.rmtree(part)


def _merge(work: Path) -> dict[str, Any]:
    """Fetch, merge and store as the finalize unit does."""
    out = work / "out"
    out.mkdir()
    store = LocalStore(out / "objects", secret=b"x" * 32, base_url="http://127.0.0.1")

    def fetched() -> Iterator[Path]:
        for path in sorted((work / "parts").glob("*.zip")):
            copy = out / path.name
            shutil.copyfile(path, copy)
            yield copy
            copy.unlink()

    began = time.perf_counter()
    merge_archives(fetched(), out / "archive.zip", {"spec": {}})
    info = store.put_file("jobs/job_1/finalize/a1/archive.zip", out / "archive.zip")
    return _speed(info.size, time.perf_counter() - began)


def _copy(work: Path) -> dict[str, Any]:
    """The floor: the same bytes read, hashed and written twice, as merging and storing must."""
    out = work / "out"
    out.mkdir()
    total = 0
    began = time.perf_counter()
    for target in (out / "first", out / "second"):
        sources = sorted((work / "parts").glob("*.zip")) if target.name == "first" else [out / "first"]
        digest = hashlib.sha256()
        with target.open("wb") as sink:
            for path in sources:
                with path.open("rb") as source:
                    while chunk := source.read(CHUNK):
                        digest.update(chunk)
                        sink.write(chunk)
        total = target.stat().st_size
    return _speed(total, time.perf_counter() - began)


def _speed(size: int, seconds: float) -> dict[str, Any]:
    megabytes = size / 1e6
    return {
        "megabytes": round(megabytes, 1),
        "seconds": round(seconds, 2),
        "mb_per_second": round(megabytes / seconds, 1),
    }


def _peak_rss() -> int:
    """Bytes of the largest resident set that this process had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
