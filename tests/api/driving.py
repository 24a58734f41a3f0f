"""What the API tests share: small uploads, what a problem must look like, and a worker's half of the protocol."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from cffa_core.jobs.records import Claim, NewModel, StoredFiles
from cffa_core.jobs.spec import GenerationSpec, Kind
from cffa_core.jobs.state import UnitKind
from cffa_core.jobs.store import JobStore
from cffa_core.recipes.archive import merge_archives, write_part_archive
from cffa_core.rng import pair_seed
from cffa_core.storage.base import ObjectStore, part_key, result_key

URL = "http://127.0.0.1:8008"


def png(seed: int, *, colour: bool = True, side: int = 48) -> bytes:
    """A small noisy PNG; the same seed gives the same bytes."""
    shape = (side, side, 3) if colour else (side, side)
    pixels = np.random.default_rng(seed).integers(60, 220, shape, dtype=np.uint8)
    return bytes(cv2.imencode(".png", pixels)[1].tobytes())


def zipped(members: dict[str, bytes]) -> bytes:
    """A zip with these members."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def good_upload(pairs: int = 3, captions: str | None = None) -> bytes:
    """A zip that the check takes in, if the captions are right."""
    members: dict[str, bytes] = {} if captions is None else {"captions.jsonl": captions.encode()}
    for index in range(pairs):
        members[f"cf/m{index:03d}.png"] = png(index)
        members[f"fa/m{index:03d}.png"] = png(index, colour=False)
    return zipped(members)


def captions(*names: str) -> str:
    """A captions.jsonl with one text of the CF for each pair."""
    return "".join(json.dumps({"name": name, "cf": f"fundus {name}", "findings": ["exudate"]}) + "\n" for name in names)


def problem(response: Any, status: int, code: str) -> dict[str, Any]:
    """Assert that ``response`` is a complete problem document, and return it."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = response.json()
    assert body["code"] == code, body
    assert body["status"] == status
    assert body["type"] == f"urn:cffa:problem:{code}"
    assert body["title"] and body["detail"]
    assert status != 422 or body["title"] == "Unprocessable Content", "the same on every version of Python"
    assert body["request_id"] == response.headers["x-request-id"]
    assert isinstance(body["retryable"], bool)
    return body


@dataclass
class Worker:
    """What a worker does to the record and the object store, without computing anything."""

    store: JobStore
    objects: ObjectStore
    folder: Path
    name: str = "worker-1"

    def claim(self, kind: Kind = Kind.GENERATION) -> Claim:
        claim = self.store.claim(self.name, [kind], lease_seconds=60)
        assert claim is not None
        return claim

    def make_part(self) -> Claim:
        """Claim and finish the next unit of a generation job: a part, or the end."""
        claim = self.claim()
        self.finish_part(claim) if claim.kind is UnitKind.PART else self.finish_job(claim)
        return claim

    def finish_part(self, claim: Claim) -> None:
        spec = claim.spec
        assert isinstance(spec, GenerationSpec)
        folder = self.folder / claim.unit_id
        pairs = []
        for index in spec.part_range(claim.index):
            entry: dict[str, Any] = {"index": index, "seed": pair_seed(spec.seed, index), "fa_chroma": 0.5}
            for modality in ("cf", "fa"):
                data = png(index, colour=modality == "cf")
                path = folder / modality / f"{index:06d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
                entry[modality] = {"name": f"{modality}/{index:06d}.png", "size": len(data), "sha256": sha256(data)}
            pairs.append(entry)
        (folder / "part.json").write_text(json.dumps({"pairs": pairs}))
        index_of_zip = write_part_archive(folder, folder / "pairs.zip")
        (folder / "part.json").write_text(json.dumps(index_of_zip))
        stored = {
            name: self.objects.put_file(part_key(claim.job_id, claim.index, claim.attempt, name), folder / name)
            for name in ("pairs.zip", "part.json")
        }
        self.store.commit(claim, StoredFiles(stored), index_of_zip)

    def finish_job(self, claim: Claim) -> None:
        parts = self.store.parts(claim.owner, claim.job_id, kind=UnitKind.PART)
        path = self.folder / f"{claim.job_id}.zip"
        merge_archives((self.folder / part.unit_id / "pairs.zip" for part in parts), path, {"made_by": "a test"})
        key = result_key(claim.job_id, "finalize", claim.attempt, "archive.zip")
        self.store.commit(claim, StoredFiles({"archive.zip": self.objects.put_file(key, path)}), {}, job_result={})

    def compute(self, kind: Kind, files: dict[str, bytes]) -> str:
        """Claim and finish both units of a job that computes a report of these files; return the job's id."""
        claim = self.claim(kind)
        stored = {
            name: self.objects.put_bytes(result_key(claim.job_id, "compute", claim.attempt, name), data)
            for name, data in files.items()
        }
        self.store.commit(claim, StoredFiles(stored), {"inputs": {}})
        self.store.commit(self.claim(kind), StoredFiles(), {}, job_result={"files": len(files)})
        return claim.job_id

    def train(self, kind: Kind = Kind.TRAINING) -> str:
        """Claim and finish both units of a training job; return its model's id."""
        claim = self.claim(kind)
        key = result_key(claim.job_id, "train", claim.attempt, "model/model.json")
        stored = StoredFiles({"model/model.json": self.objects.put_bytes(key, b'{"method": "dual_unet"}')})
        self.store.add_metrics(claim, 1, {"loss_cf": 0.9, "loss_fa": 0.8})
        self.store.add_metrics(claim, 2, {"loss_cf": 0.7, "loss_fa": 0.6})
        self.store.add_checkpoint(claim, 2, stored)
        self.store.commit(claim, stored, {})
        last = self.claim(kind)
        card: dict[str, Any] = {"method": "dual_unet", "base": {"name": "tiny", "digest": "0" * 64}, "step": 2}
        if kind is Kind.CAPTIONED_TRAINING:
            card = {"family": "captioned", "modality": "cf", "step": 2}
        made = NewModel(digest="1" * 64, card=card, stored=stored)
        job = self.store.commit(last, StoredFiles({}), {}, job_result={}, model=made)
        assert job.result is not None
        return str(job.result["model_id"])


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
