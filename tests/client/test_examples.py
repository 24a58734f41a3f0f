"""The ten lines of the README are the example, and the example runs."""

from __future__ import annotations

import ast
import re
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "library.py"
SMALLER = {
    '"tiny"': '"./micro"',
    "resolution=512": "resolution=64",
    "steps=200": "steps=2, preview_pairs=0",
    "steps=25": "steps=2",
}


def code(source: str) -> str:
    """Source without comments, layout and the module's docstring."""
    tree = ast.parse(source)
    if ast.get_docstring(tree) is not None:
        del tree.body[0]
    return ast.unparse(tree)


def test_the_readme_shows_the_example() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert code(EXAMPLE.read_text(encoding="utf-8")) in [code(block) for block in blocks]


def test_the_example_runs(
    tmp_path: Path, models_dir: Path, pairs_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(models_dir / "micro", tmp_path / "micro")
    shutil.copytree(pairs_folder, tmp_path / "my_pairs")
    monkeypatch.chdir(tmp_path)
    source = EXAMPLE.read_text(encoding="utf-8")
    for long, short in SMALLER.items():
        assert source.count(long) == 1
        source = source.replace(long, short)
    exec(compile(source, str(EXAMPLE), "exec"), {})
    made = sorted(path.relative_to(tmp_path / "new_pairs").as_posix() for path in tmp_path.glob("new_pairs/*/*"))
    assert made == [f"{modality}/{index:06d}.png" for modality in ("cf", "fa") for index in range(8)]
