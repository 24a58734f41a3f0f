"""The images: linted, cut from the one lock, without what they do not need, and complete for what they run."""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.deploy import tools

REQUIREMENTS = tools.ROOT / "requirements"
CUTS = ("api.txt", "flower.txt", "worker.txt")
HEAVY = {"torch", "diffusers", "transformers", "peft", "accelerate", "safetensors"}
PICTURES = {"scipy", "scikit-image", "simpleitk"}  # the API registers and surveys what is uploaded
DEVELOPMENT = {"pytest", "hypothesis", "ruff", "mypy", "import-linter", "pytest-xdist"}
# What the images run, and the lock it has to do with.
STARTED = [
    ("api.txt", "services.api.__main__"),
    ("api.txt", "services.api.setup"),
    ("api.txt", "cffa_core.data.auto_registration"),
    ("flower.txt", "services.worker.celery_app"),
    ("worker.txt", "services.worker.__main__"),
    ("worker.txt", "services.worker.child"),
    ("worker.txt", "cffa_core.recipes.train, cffa_core.recipes.generate"),
]
DOCKERFILES = {"Dockerfile.api": "python -m services.api", "Dockerfile.worker": "python -m services.worker"}


def locked(name: str) -> dict[str, str]:
    """Package, version and hashes; markers are left out, since a package may be needed under fewer conditions."""
    entries = re.split(r"\n(?=\S)", (REQUIREMENTS / name).read_text().strip())
    named: dict[str, str] = {}
    for entry in entries:
        package = canonicalize_name(Requirement(entry.split("\\")[0]).name)
        named[package] = named.get(package, "") + re.sub(r" ;[^\\\n]*", " ", entry) + "\n"
    return named


@pytest.mark.parametrize("name", CUTS)
def test_is_cut_from_the_lock(name: str) -> None:
    whole = locked("lock.txt")
    for package, entry in locked(name).items():
        assert entry == whole[package], f"requirements/lock.sh --cut-only makes {name} anew"
        assert "--hash=sha256:" in entry


def test_leaves_out_what_an_image_does_not_need() -> None:
    assert not set(locked("api.txt")) & (HEAVY | DEVELOPMENT | {"typer", "httpx", "flower"})
    assert not set(locked("flower.txt")) & (HEAVY | PICTURES | DEVELOPMENT)
    assert not set(locked("worker.txt")) & (DEVELOPMENT | {"fastapi", "uvicorn", "flower", "simpleitk"})
    assert "flower" in locked("flower.txt")
    assert set(locked("api.txt")) > PICTURES


def test_tools_of_this_folder_share_the_versions_of_the_lock() -> None:
    whole = locked("lock.txt")
    for package, entry in locked("deploy.txt").items():
        if package in whole:
            assert entry.split("\\")[0] == whole[package].split("\\")[0]


@pytest.mark.parametrize(("lock", "module"), STARTED, ids=[module for _, module in STARTED])
def test_lock_has_all_that_is_imported(lock: str, module: str, tmp_path: Path) -> None:
    """Imports while every package outside the lock (and outside torch, where the image has it) seems absent."""
    allowed = set(locked(lock)) | {"cffa"} | (torch_and_its_own() if lock == "worker.txt" else set())
    hidden = [
        top
        for top, packages in importlib.metadata.packages_distributions().items()
        if not {canonicalize_name(package) for package in packages} & allowed
    ]
    program = (
        "import importlib.machinery, json, sys\n"
        f"hidden = set(json.loads({json.dumps(json.dumps(hidden))}))\n"
        "class Finder(importlib.machinery.PathFinder):\n"
        "    @classmethod\n"
        "    def find_spec(cls, name, path=None, target=None):\n"
        "        return None if name.partition('.')[0] in hidden else super().find_spec(name, path, target)\n"
        "own = [finder is importlib.machinery.PathFinder for finder in sys.meta_path]\n"
        "sys.meta_path[own.index(True)] = Finder\n"
        f"import {module}\n"
        "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))\n"
    )
    environment = {"PYTHONPATH": str(tools.ROOT), "HF_HUB_OFFLINE": "1", "PATH": ""} | cluster_settings(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    loaded = set(json.loads(done.stdout))
    assert ("torch" in loaded) == ("recipes" in module), f"{module} must start without torch"


def torch_and_its_own() -> set[str]:
    """torch and what its wheel brings; its other dependencies are in the lock."""
    brought = importlib.metadata.requires("torch") or []
    return {"torch"} | {
        name
        for name in (canonicalize_name(Requirement(line).name) for line in brought)
        if name.startswith(("nvidia", "triton", "cuda"))
    }


def cluster_settings(home: Path) -> dict[str, str]:
    """Enough settings for a process of a cluster to be imported; no server is asked."""
    return {
        "CFFA_MODE": "cluster",
        "CFFA_HOME": str(home),
        "CFFA_DATABASE_URL": "postgresql+psycopg://cffa@127.0.0.1:1/cffa",
        "CFFA_BROKER_URL": "redis://127.0.0.1:1/0",
        "CFFA_S3_ENDPOINT": "http://127.0.0.1:1",
        "CFFA_S3_ACCESS_KEY": "nobody",
        "CFFA_S3_SECRET_KEY": "nobody-asks-for-this",
        "CFFA_BOOTSTRAP_KEY": "nobody-asks-for-this-either-in-here",
        "CFFA_KEY_SECRET": "nobody-has-a-key-of-this-service-in-here",
    }


@pytest.mark.parametrize("name", DOCKERFILES)
def test_hadolint_has_nothing_to_say(name: str) -> None:
    done = subprocess.run(
        [tools.program("hadolint"), "--no-color", str(tools.DEPLOY / name)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", DOCKERFILES)
def test_dockerfile(name: str) -> None:
    text = (tools.DEPLOY / name).read_text()
    bases = re.findall(r"^FROM (\S+)", text, re.MULTILINE)
    stages = set(re.findall(r"^FROM \S+ AS (\S+)", text, re.MULTILINE))
    outside = [base for base in bases if base not in stages]
    assert len(outside) == 1
    assert re.fullmatch(r"python:3\.11\.\d+-slim-bookworm@sha256:[0-9a-f]{64}", outside[0])
    # The last stage is what is shipped: it installs nothing, and does not run as root.
    last = text[text.rindex("\nFROM ") :]
    assert "apt-get" not in text and "pip install" not in last
    assert re.findall(r"^USER (.+)", text, re.MULTILINE) == ["10001:10001"]
    assert " ".join(json.loads(re.findall(r"^CMD (\[.+\])", last, re.MULTILINE)[-1])) == DOCKERFILES[name]
    for line in re.findall(r"pip .*install (?:.|\\\n)*?-r (\S+)", text):
        assert (tools.ROOT / line).exists()
    for line in re.findall(r"install [^\n]*-r requirements/\S+", text):
        assert "--require-hashes" in line or "torch.txt" in line


@pytest.mark.parametrize("name", DOCKERFILES)
def test_copies_what_the_context_has(name: str) -> None:
    """.dockerignore lets nothing in by default: each source of a COPY must be named there, and be in the tree."""
    ignore = (tools.ROOT / ".dockerignore").read_text().splitlines()
    let_in = [line[1:] for line in ignore if line.startswith("!")]
    assert "*" in ignore
    copied = re.findall(r"^COPY (?!--from)(.+)", (tools.DEPLOY / name).read_text(), re.MULTILINE)
    sources = [source for line in copied for source in line.split()[:-1]]
    assert sources
    for source in sources:
        assert (tools.ROOT / source).exists()
        assert any(source == path or source.startswith(f"{path}/") for path in let_in), source


def test_compose_runs_what_the_images_run() -> None:
    commands = {name: " ".join(tools.services()[name]["command"]) for name in tools.OWN_SERVICES}
    assert commands["api"] == DOCKERFILES["Dockerfile.api"]
    assert commands["worker-cpu"] == commands["worker-gpu"] == DOCKERFILES["Dockerfile.worker"]
    flower = re.findall(r"^CMD (\[.*flower.*\])", (tools.DEPLOY / "Dockerfile.api").read_text(), re.MULTILINE)
    assert commands["flower"] == " ".join(json.loads(flower[0]))
