"""The notebook of the examples runs against a real service, and is kept without outputs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from services.client.servers import Servers

NOTEBOOK = Path(__file__).resolve().parents[2] / "examples" / "first_pairs.ipynb"
# The same notebook with less to compute: a base of random weights, and the smallest side.
SMALLER = {"CFFA_NOTEBOOK_BASE": "micro", "CFFA_NOTEBOOK_SIDE": "64"}


@pytest.fixture
def notebook() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


def test_it_is_valid_and_has_no_outputs(notebook: Any) -> None:
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(cells) >= 8
    assert all(cell.outputs == [] and cell.execution_count is None for cell in cells)
    assert notebook.metadata.keys() == {"kernelspec", "language_info"}


@pytest.mark.slow
@pytest.mark.filterwarnings("default::DeprecationWarning")
def test_it_runs(notebook: Any, service: Servers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = str(NOTEBOOK.parents[1])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep))
    monkeypatch.setenv("CFFA_URL", service.url)
    monkeypatch.setenv("CFFA_NOTEBOOK_WORK", str(tmp_path / "work"))
    for name, value in SMALLER.items():
        monkeypatch.setenv(name, value)
    done = NotebookClient(notebook, timeout=240, kernel_name="python3").execute(cwd=str(tmp_path))
    cells = [cell for cell in done.cells if cell.cell_type == "code"]
    said = "".join(output.get("text", "") for cell in cells for output in cell.outputs)
    assert [said.count(f"{kind} succeeded") for kind in ("training", "generation", "evaluation")] == [1, 1, 1]
    assert said.count("(3, 3, 64, 64) (3, 1, 64, 64)") == 2
    assert "image/png" in cells[-1].outputs[0]["data"]
    assert len(list((tmp_path / "work").glob("*.zip"))) == 1
