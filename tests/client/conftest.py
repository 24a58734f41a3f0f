"""The real service on a temporary home, with a real worker and the micro base; one for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cffa_core.data.phantom import write_phantoms
from services.client.client import CffaClient
from services.client.servers import Servers
from tests.micro_base import write_micro_base

TRAINING = ("base=micro", "resolution=64", "steps=3", "validate_every=3", "checkpoint_every=3", "preview_every=3",
            "preview_pairs=1", "preview.steps=2", "augment=none")  # fmt: skip


@pytest.fixture(scope="session")
def models_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of base models that holds `micro`."""
    folder = tmp_path_factory.mktemp("models")
    write_micro_base(folder / "micro")
    return folder


@pytest.fixture(scope="session")
def pairs_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six procedural pairs of 64 px."""
    folder = tmp_path_factory.mktemp("pairs")
    write_phantoms(folder, 6, seed=1, resolution=64, processes=1)
    return folder


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory, models_dir: Path) -> Iterator[Servers]:
    """API and worker."""
    home = tmp_path_factory.mktemp("service")
    environment = {"CFFA_MODELS_DIR": str(models_dir), "CFFA_POLL_SECONDS": "0.1", "CFFA_THREADS": "1"}
    with Servers(home / "home", logs=home / "logs", environment=environment) as servers:
        servers.wait_ready()
        yield servers


@pytest.fixture(scope="session")
def client(service: Servers) -> Iterator[CffaClient]:
    """Client of the service."""
    with CffaClient(service.url) as connected:
        yield connected
