"""deploy/secrets.sh: makes what compose needs, once, and closes the folder."""

from __future__ import annotations

import stat
import subprocess
from pathlib import Path

import pytest

from cffa_core.settings import Settings
from tests.deploy import tools


def make(folder: Path) -> dict[str, str]:
    subprocess.run([str(tools.DEPLOY / "secrets.sh"), str(folder)], check=True, capture_output=True, timeout=60)
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_makes_all_that_compose_asks_for(tmp_path: Path) -> None:
    made = make(tmp_path / "secrets")
    assert set(made) == set(tools.compose()["secrets"])
    assert len(set(made.values())) == len(made)
    for name, found in tools.compose()["secrets"].items():
        assert found["file"] == str(tools.DEPLOY / "secrets" / name)


def test_folder_is_closed_and_files_cannot_be_changed(tmp_path: Path) -> None:
    """Containers read the files as users of their own, so it is the folder that keeps others out."""
    folder = tmp_path / "secrets"
    make(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o444}


def test_keeps_what_is_there(tmp_path: Path) -> None:
    folder = tmp_path / "secrets"
    folder.mkdir()
    (folder / "cffa_broker_password").write_text("chosen by somebody")
    first = make(folder)
    assert first["cffa_broker_password"] == "chosen by somebody"
    assert make(folder) == first


def test_a_cluster_accepts_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make(tmp_path / "secrets")
    monkeypatch.setenv("CFFA_SECRETS_DIR", str(tmp_path / "secrets"))
    for name, value in tools.services()["api"]["environment"].items():
        if name != "CFFA_SECRETS_DIR":
            monkeypatch.setenv(name, value)
    settings = Settings()
    assert settings.record_url == f"postgresql+psycopg://cffa:{made['cffa_database_password']}@postgres:5432/cffa"
    assert settings.queue_url == f"redis://:{made['cffa_broker_password']}@redis:6379/0"
    assert settings.bootstrap_key.get_secret_value() == made["cffa_bootstrap_key"]
    assert settings.key_secret.get_secret_value() == made["cffa_key_secret"]
    # The longest that MinIO's relatives accept.
    assert len(made["cffa_s3_access_key"]) <= 20 and len(made["cffa_s3_secret_key"]) <= 40


def test_kubernetes_mounts_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mounted Secret is a folder of links into a dated folder beside them, so that it can be renewed in one step."""
    dated = tmp_path / "..2026_11_21"
    dated.mkdir()
    (dated / "cffa_bootstrap_key").write_text("k" * 48)
    (tmp_path / "..data").symlink_to(dated.name)
    (tmp_path / "cffa_bootstrap_key").symlink_to("..data/cffa_bootstrap_key")
    monkeypatch.setenv("CFFA_SECRETS_DIR", str(tmp_path))
    assert Settings().bootstrap_key.get_secret_value() == "k" * 48


def test_are_kept_out_of_the_repository_and_the_images() -> None:
    assert "/secrets/" in (tools.DEPLOY / ".gitignore").read_text().split()
    let_in = [line for line in (tools.ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!deploy")]
    assert let_in == ["!deploy/Dockerfile.*"]
