"""Pickles named safetensors in bases and models of a real service: the job fails typed, nothing runs, all else goes on.

What the library refuses is in ``test_weights``; here API, worker and child are the real processes.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from cffa_core.data.phantom import write_phantoms
from cffa_core.jobs.spec import GenerateSettings, SamplerSpec, TrainSettings
from cffa_core.models.fetch import SUMS, put_base
from cffa_core.settings import Settings
from cffa_core.storage.base import ObjectStore
from cffa_core.storage.open import open_store
from services.client.client import CffaClient
from services.client.resources import Job
from services.client.servers import Servers
from tests.micro_base import write_micro_base

PARTS = ("unet", "text_encoder", "vae")
ONE_IMAGE = GenerateSettings(count=1, sampler=SamplerSpec(steps=1))


@dataclass(frozen=True)
class Place:
    """A running service with one worker. ``pickle`` would make the folder ``trace`` if anybody unpickled it."""

    client: CffaClient
    dataset_id: str
    models: Path
    home: Path
    objects: ObjectStore
    pickle: bytes
    trace: Path

    def train(self, base: str) -> Job:
        """A training of one step on a base, once it is over."""
        settings = TrainSettings(
            base=base, resolution=64, steps=1, validate_every=1, checkpoint_every=1, preview_every=1, preview_pairs=0
        )
        return self.client.wait(self.client.submit_training(self.dataset_id, settings).id, timeout=300)

    def generate(self, model_id: str) -> Job:
        """A generation of one pair, once it is over."""
        return self.client.wait(self.client.submit_generation(model_id, ONE_IMAGE).id, timeout=300)

    def refused(self, job: Job, code: str) -> str:
        """What a failed job says, after a look at all that must not have happened."""
        assert (job.state, (job.error or {}).get("code")) == ("failed", code), job
        assert not self.trace.exists()
        assert self.client.job(job.id).state == "failed" and list(self.client.datasets())
        crashes = [event for event in self.client.inspect.events(job.id) if event.type == "crashed"]
        assert crashes == [], "the child refused the file, it did not die of it"
        return str((job.error or {}).get("message"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("weights")
    trace = folder / "unpickled"
    write_micro_base(folder / "models" / "micro")
    write_phantoms(folder / "pairs", 2, seed=1, resolution=64, processes=1)
    environment = {"CFFA_MODELS_DIR": str(folder / "models"), "CFFA_POLL_SECONDS": "0.1", "CFFA_THREADS": "1"}
    with Servers(folder / "home", logs=folder / "logs", environment=environment) as servers:
        servers.wait_ready()
        with CffaClient(servers.url) as client:
            yield Place(
                client=client,
                dataset_id=client.upload_dataset(folder / "pairs").id,
                models=folder / "models",
                home=folder / "home",
                objects=open_store(Settings(home=folder / "home")),
                pickle=f"cos\nmkdir\n(S'{trace}'\ntR.".encode(),
                trace=trace,
            )


def weights_of(folder: Path) -> Path:
    (found,) = folder.glob("*.safetensors")
    return found


def test_the_pickle_would_act(place: Place) -> None:
    """So that a folder that is not there means something."""
    subprocess.run([sys.executable, "-c", "import pickle, sys; pickle.load(sys.stdin.buffer)"], input=place.pickle)
    assert place.trace.is_dir()
    place.trace.rmdir()


@pytest.mark.parametrize("part", PARTS)
def test_a_training_on_a_folder(place: Place, part: str) -> None:
    base = shutil.copytree(place.models / "micro", place.models / f"hostile-{part}")
    weights_of(base / part).write_bytes(place.pickle)
    message = place.refused(place.train(base.name), "model_unavailable")
    assert part in message and base.name in message


def test_a_training_on_a_base_of_the_object_store(place: Place, tmp_path: Path) -> None:
    """Its SHA256SUMS is right: who can write there can write that too."""
    base = shutil.copytree(place.models / "micro", tmp_path / "hostile")
    weights_of(base / "unet").write_bytes(place.pickle)
    put_base(place.objects, base, "bases/stored-hostile")
    sums = place.objects.get_bytes(f"bases/stored-hostile/{SUMS}").decode()
    assert hashlib.sha256(place.pickle).hexdigest() in sums
    assert "unet" in place.refused(place.train("stored-hostile"), "model_unavailable")


def test_generations_after_a_base_or_a_model_was_exchanged(place: Place) -> None:
    base = shutil.copytree(place.models / "micro", place.models / "exchanged")
    trained = place.train("exchanged")
    assert trained.state == "succeeded" and trained.result is not None, trained
    model_id = trained.result["model_id"]
    stored = [path for path in (place.home / "objects" / "jobs").rglob("*.safetensors") if "model" in path.parts]
    kept = {path: path.read_bytes() for path in [*stored, weights_of(base / "unet")]}
    assert stored
    for path in stored:
        path.chmod(0o644)
        path.write_bytes(place.pickle)
    place.refused(place.generate(model_id), "corrupt_artifact")
    for path, data in kept.items():
        path.write_bytes(data)
    weights_of(base / "unet").write_bytes(place.pickle)
    assert "unet" in place.refused(place.generate(model_id), "model_unavailable")
    weights_of(base / "unet").write_bytes(kept[weights_of(base / "unet")])
    assert place.generate(model_id).state == "succeeded", "the same worker goes on"
