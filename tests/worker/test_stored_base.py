"""A base that only the object store has: jobs find it by its name, and fetch it once for the machine."""

from __future__ import annotations

from pathlib import Path

from cffa_core.jobs.spec import SamplerSpec
from cffa_core.jobs.state import JobState
from cffa_core.models.base_folder import base_digest
from cffa_core.models.fetch import put_base
from tests.worker.world import OWNER, World


def test_jobs_fetch_a_base_that_only_the_store_has(tmp_path: Path, models_dir: Path) -> None:
    empty = tmp_path / "models"
    empty.mkdir()
    world = World(tmp_path / "home", empty)
    try:
        put_base(world.objects, models_dir / "micro", "bases/micro")
        with world.worker_thread():
            trained = world.wait_terminal(
                world.training(world.add_dataset(), steps=1, checkpoint_every=1, validate_every=1, preview_pairs=0).id
            )
            assert trained.state is JobState.SUCCEEDED, trained.error
            generated = world.wait_terminal(
                world.generation(trained.result["model_id"], count=1, sampler=SamplerSpec(steps=1)).id
            )
            assert generated.state is JobState.SUCCEEDED, generated.error
        card = world.store.get_model(OWNER, trained.result["model_id"]).card
        assert card["base"] == {"name": "micro", "digest": base_digest(models_dir / "micro")}
        (cached,) = (world.settings.scratch_dir / "cache" / "bases").iterdir()
        assert base_digest(cached / "micro") == base_digest(models_dir / "micro")
        assert list(empty.iterdir()) == []
    finally:
        world.close()


def test_a_base_that_is_nowhere_fails_the_job_by_name(tmp_path: Path, models_dir: Path) -> None:
    world = World(tmp_path / "home", models_dir)
    try:
        job = world.training(world.add_dataset(), base="no-such-base")
        with world.worker_thread():
            failed = world.wait_terminal(job.id)
    finally:
        world.close()
    assert failed.state is JobState.FAILED and failed.error is not None
    assert failed.error["code"] == "model_unavailable" and "'no-such-base'" in failed.error["message"]
