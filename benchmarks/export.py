"""What does an export of a large job cost? Read N pairs from their parts and write them as a worker does; memory by N.

Each measurement is a process of its own, so that its peak memory is its own: it runs the export unit of the worker on a
local object store. Images are of noise, so that nothing compresses.

    python -m benchmarks.export --pairs 500 4000 --work runs/export

prints a table and writes benchmarks/results/export.json. Goal: under 200 MB, the same for every N.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from cffa_core.jobs.context import FolderContext
from cffa_core.jobs.records import StoredFiles
from cffa_core.jobs.spec import ExportSpec
from cffa_core.jobs.state import UnitKind
from cffa_core.recipes.archive import write_part_archive
from cffa_core.storage.local import LocalStore
from cffa_core.storage.manifest import stored_from_json, stored_to_json
from services.worker.export import export
from services.worker.protocol import WorkOrder
from tests.faults.campaign import machine

RESULTS = Path(__file__).resolve().parent / "results" / "export.json"
PART = 100
FORMS = ("zip", "webdataset", "dicom")


def main() -> None:
    """Measure all sizes and forms, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, nargs="+", default=[500, 4000])
    parser.add_argument("--side", type=int, default=128, help="side of an image in pixels")
    parser.add_argument("--shard-size", type=int, default=500)
    parser.add_argument("--work", type=Path, default=Path("runs/export"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--measure", choices=FORMS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure is not None:
        print(json.dumps(_measure(options.work, options.measure, options.shard_size)))
        return
    rows = [row for pairs in options.pairs for row in _rows(pairs, options)]
    result = {
        "question": "what does an export of a large job cost?",
        "side": options.side,
        "pairs_per_part": PART,
        "shard_size": options.shard_size,
        "machine": machine(),
        "goal": {"peak_rss_mb": 200},
        "rows": rows,
    }
    options.results.parent.mkdir(exist_ok=True)
    options.results.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print("| form | pairs | MB written | pairs/s of one core | peak RSS MB |\n|---|---|---|---|---|")
    for row in rows:
        speed = f"{row['pairs_per_cpu_second']} | {row['peak_rss_mb']}"
        print(f"| {row['form']} | {row['pairs']} | {row['megabytes']} | {speed} |")


def _rows(pairs: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    work = options.work / str(pairs)
    shutil.rmtree(work, ignore_errors=True)
    _write_parts(work, pairs, options.side)
    rows = []
    for form in FORMS:
        command = [sys.executable, "-m", "benchmarks.export", "--measure", form, "--work", str(work)]
        command += ["--shard-size", str(options.shard_size)]
        rows.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    shutil.rmtree(work)
    return rows


def _write_parts(work: Path, pairs: int, side: int) -> None:
    """Parts as a generation leaves them in the object store; every pair has the same two images."""
    store = LocalStore(work / "objects", secret=b"x" * 32, base_url="http://127.0.0.1")
    dice = np.random.default_rng(pairs)
    images = {
        "cf": cv2.imencode(".png", dice.integers(0, 256, (side, side, 3), dtype=np.uint8))[1].tobytes(),
        "fa": cv2.imencode(".png", dice.integers(0, 256, (side, side), dtype=np.uint8))[1].tobytes(),
    }
    stored = {}
    for first in range(0, pairs, PART):
        part = work / "part"
        entries = []
        for index in range(first, min(first + PART, pairs)):
            entry: dict[str, Any] = {"index": index, "seed": index, "try": 0}
            for modality, data in images.items():
                path = part / modality / f"{index:06d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
                digest = hashlib.sha256(data).hexdigest()
                entry[modality] = {"name": f"{modality}/{index:06d}.png", "size": len(data), "sha256": digest}
            entries.append(entry)
        (part / "part.json").write_text(json.dumps({"pairs": entries}))
        index_of_zip = write_part_archive(part, part / "pairs.zip", {"spec": {}})
        (part / "part.json").write_text(json.dumps(index_of_zip))
        for name in ("pairs.zip", "part.json"):
            key = f"{first // PART:05d}/{name}"
            stored[key] = store.put_file(key, part / name)
        shutil.rmtree(part)
    (work / "stored.json").write_text(json.dumps(stored_to_json(StoredFiles(stored))))


def _measure(work: Path, form: str, shard_size: int) -> dict[str, Any]:
    """One export, from the listing of the parts to the last stored archive."""
    store = LocalStore(work / "objects", secret=b"x" * 32, base_url="http://127.0.0.1")
    found = stored_from_json(json.loads((work / "stored.json").read_text()))
    spec = ExportSpec.model_validate({"generation_job_id": "job_" + "0" * 20, "form": form, "shard_size": shard_size})
    folder = work / form
    folder.mkdir()
    order = WorkOrder(
        settings={},
        job_id=f"export-{form}",
        kind=UnitKind.EXPORT,
        index=0,
        attempt=1,
        spec=spec,
        numerics_key=None,
        checkpoints=(),
        inputs={"parts": found},
        facts={},
        folder=str(folder),
        cache=str(folder),
    )
    began = time.process_time()
    done = export(order, spec, FolderContext(folder / "out"), store)
    seconds = time.process_time() - began
    files = done.info["files"]
    pairs = sum(file["pairs"] for file in files)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "form": form,
        "pairs": pairs,
        "archives": len(files),
        "megabytes": round(sum(file["size"] for file in files) / 1e6, 1),
        "pairs_per_cpu_second": round(pairs / seconds),
        "peak_rss_mb": round(peak / 1e6, 1),
    }


if __name__ == "__main__":
    main()
