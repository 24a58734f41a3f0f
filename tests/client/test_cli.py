"""The command line without a service: it starts fast, prints JSON alone when asked, and names typed errors plainly."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from cffa_core.errors import InvalidSpec
from cffa_core.jobs.store import JobStore
from services.client.cli import app, specification

HEAVY = (
    "torch",
    "diffusers",
    "transformers",
    "scipy",
    "skimage",
    "cv2",
    "numpy",
    "PIL",
    "httpx",
    "pydantic",
    "fastapi",
)


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_help_takes_less_than_half_a_second() -> None:
    seconds = []
    for _ in range(3):
        before = os.times()
        done = subprocess.run([sys.executable, "-m", "services.client.cli", "--help"], capture_output=True, check=True)
        after = os.times()
        seconds.append(after.children_user + after.children_system - before.children_user - before.children_system)
    assert b"demo" in done.stdout
    assert min(seconds) < 0.5


def test_the_command_line_imports_nothing_heavy() -> None:
    code = f"import sys, services.client.cli; print([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "command",
    [
        *("serve", "demo", "dataset check", "submit train", "submit generate", "jobs", "watch", "download", "upload"),
        *("cancel", "pause", "resume", "retry", "delete", "train", "generate", "evaluate alignment", "phantom"),
        *("base build", "base teach", "base info"),
        *("submit attention", "submit captioned-train", "submit captioned"),
    ],
)
def test_every_command_explains_itself(command: str) -> None:
    result = run(*command.split(), "--help")
    assert result.exit_code == 0
    assert "Usage" in result.stdout


def test_no_service_is_one_plain_line(tmp_path: Path) -> None:
    result = run("cancel", "job_00000000000000000000", "--url", "http://127.0.0.1:9")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("error: no answer from http://127.0.0.1:9")
    assert "Traceback" not in result.stderr


def test_impossible_settings_name_every_field_before_anything_is_sent() -> None:
    result = run("submit", "train", "--dataset", "ds_00000000000000000000", "--steps", "0", "--resolution", "100")
    assert result.exit_code == 1
    assert "/steps:" in result.stderr
    assert "/resolution:" in result.stderr


def test_wrong_usage_is_exit_code_2() -> None:
    assert run("jobs", "--kind", "nonsense", "--url", "http://127.0.0.1:9").exit_code == 2
    assert run("watch").exit_code == 2
    assert run("nonsense").exit_code == 2


def test_options_beat_assignments_beat_the_file(tmp_path: Path) -> None:
    spec = tmp_path / "spec.json"
    spec.write_text(
        json.dumps({"kind": "training", "dataset_id": "ds_x", "steps": 1, "seed": 1, "loss": {"hf_lambda": 0.1}})
    )
    settings = specification.train_settings(
        spec, ["steps=2", "seed=2", "loss.struct_loss=ngf", "lora.rank=4"], seed=3, every=7
    )
    assert (settings.steps, settings.seed) == (2, 3)
    assert (settings.loss.hf_lambda, settings.loss.struct_loss, settings.lora.rank) == (0.1, "ngf", 4)
    assert (settings.validate_every, settings.checkpoint_every, settings.preview_every) == (7, 7, 7)


def test_the_options_of_the_methods_reach_them(tmp_path: Path) -> None:
    sharing = specification.train_settings(
        None, None, method="shared_attention", max_resolution=16, step_range=(0.0, 0.6)
    ).shared_attention
    assert sharing is not None and (sharing.max_resolution, sharing.step_range) == (16, (0.0, 0.6))
    canvas = specification.train_settings(None, None, method="side_by_side", no_squeeze=True).side_by_side
    assert canvas is not None and not canvas.squeeze
    # The spec of a stored job says null where a method has no settings of its own.
    stored = tmp_path / "spec.json"
    stored.write_text(specification.train_settings(None, None).model_dump_json(exclude={"loss", "timesteps"}))
    assert specification.train_settings(stored, None, method="shared_attention", max_resolution=8).loss.hf_lambda == 0


def test_options_of_another_method_are_refused() -> None:
    data = ("--dataset", "ds_00000000000000000000")
    result = run("submit", "train", *data, "--method", "side_by_side", "--step-range", "0", "0.6")
    assert result.exit_code == 1
    said = " ".join(result.stderr.split())
    assert "shared_attention holds settings of method shared_attention, and this is side_by_side" in said


def test_sampler_options_reach_the_sampler() -> None:
    settings = specification.generate_settings(
        None, None, scheduler="ddpm", steps=9, guidance=2.0, noise="rotated", count=3
    )
    sampler = settings.sampler
    assert (sampler.scheduler, sampler.steps, sampler.guidance_scale, sampler.initial_noise) == (
        "ddpm",
        9,
        2.0,
        "rotated",
    )


@pytest.mark.parametrize("text", ["[1]", "{", ""])
def test_a_spec_file_must_hold_an_object(tmp_path: Path, text: str) -> None:
    spec = tmp_path / "spec.json"
    spec.write_text(text)
    with pytest.raises(InvalidSpec, match=r"spec\.json"):
        specification.train_settings(spec, None)


def test_what_a_job_refers_to_may_stand_in_the_file(tmp_path: Path) -> None:
    spec = tmp_path / "spec.json"
    spec.write_text('{"model_id": "mdl_a", "count": 2}')
    assert specification.reference(spec, "model_id", None) == "mdl_a"
    assert specification.reference(spec, "model_id", "mdl_b") == "mdl_b"
    with pytest.raises(InvalidSpec, match="--dataset"):
        specification.reference(spec, "dataset_id", None)


def test_phantoms_become_a_data_set_that_passes_its_check(tmp_path: Path) -> None:
    made = run(
        "phantom", "--n", "2", "--resolution", "64", "--out", tmp_path / "set", "--sheet", tmp_path / "sheet.png"
    )
    assert made.exit_code == 0, made.stderr
    assert (tmp_path / "sheet.png").stat().st_size > 1000
    checked = run("dataset", "check", tmp_path / "set", "--json")
    assert checked.exit_code == 0, checked.stderr
    report = json.loads(checked.stdout)
    assert report["ok"] is True
    assert len(report["pairs"]) == 2


def test_a_bad_data_set_is_refused_with_every_problem(tmp_path: Path) -> None:
    run("phantom", "--n", "2", "--resolution", "64", "--out", tmp_path / "set")
    (tmp_path / "set" / "fa" / "p00000.png").unlink()
    (tmp_path / "set" / "cf" / "p00001.png").write_text("no picture")
    result = run("dataset", "check", tmp_path / "set", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["ok"] is False
    assert "p00000" in result.stderr
    assert "p00001" in result.stderr


def test_base_info_counts_without_reading_weights(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from tests.micro_base import write_micro_base

    folder = write_micro_base(tmp_path / "micro")
    result = run("base", "info", folder, "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    counted = {part["part"]: part["parameters"] for part in report["parts"]}
    weights = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert counted["unet"] == sum(tensor.numel() for tensor in weights.values())
    assert set(counted) == {"unet", "vae", "text_encoder"}


def test_restore_reminds_of_the_secrets_and_backup_names_a_wrong_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CFFA_HOME", str(tmp_path / "home"))
    refused = run("backup", "--to", tmp_path / "backup")
    assert refused.exit_code == 1 and "CFFA_HOME is to name the folder of the service" in refused.stderr
    store = JobStore(f"sqlite:///{tmp_path / 'home' / 'record.sqlite'}")
    store.migrate()
    store.close()
    assert run("backup", "--to", tmp_path / "backup").exit_code == 0
    monkeypatch.setenv("CFFA_HOME", str(tmp_path / "other"))
    restored = run("restore", "--from", tmp_path / "backup", "--json")
    assert restored.exit_code == 0 and json.loads(restored.stdout)["objects"] == 0
    assert "none of its API keys is good" in restored.stderr
