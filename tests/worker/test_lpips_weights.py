"""The weight file of the LPIPS term is the worker's to name, not the job's."""

from __future__ import annotations

from pathlib import Path

from cffa_core.jobs.spec import LossSpec
from cffa_core.jobs.state import JobState
from tests.worker.world import World


def test_a_job_that_needs_it_fails_by_name_where_it_is_absent(tmp_path: Path, models_dir: Path) -> None:
    world = World(tmp_path / "home", models_dir, lpips_weights=tmp_path / "absent.safetensors")
    try:
        job = world.training(world.add_dataset(), loss=LossSpec(lpips_lambda=0.1))
        with world.worker_thread():
            failed = world.wait_terminal(job.id)
    finally:
        world.close()
    assert failed.state is JobState.FAILED and failed.error is not None
    assert failed.error["code"] == "model_unavailable"
    assert "no LPIPS weights at" in failed.error["message"] and "absent.safetensors" in failed.error["message"]
    assert world.events(job.id, "crashed") == []
