"""``cffa submit edit`` and the client's edits against a real service, whose worker edits with the micro base."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cffa_core.errors import InvalidSpec
from cffa_core.jobs.spec import EditSpec, EditTerm, Kind
from cffa_core.recipes.archive import verify_archive
from cffa_core.settings import Settings
from services.client.cli import app
from services.client.client import CffaClient
from services.client.servers import free_port
from services.worker import loop
from tests.client.test_people import served
from tests.worker.world import SIDE, running_worker, write_pairs

SMALL = ("--base", "micro", "--resolution", str(SIDE), "--steps", "4", "--part-size", "2")


def run(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory, models_dir: Path) -> Settings:
    home = tmp_path_factory.mktemp("edits") / "home"
    return Settings(home=home, port=free_port(), poll_seconds=0.1, models_dir=models_dir, threads=1, device="cpu")


@pytest.fixture(scope="module")
def url(settings: Settings) -> Iterator[str]:
    """A served API with a worker that takes edits."""
    with served(settings) as address, running_worker(loop.Worker(settings, kinds=[Kind.EDIT])):
        yield address


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[CffaClient]:
    with CffaClient(url) as connected:
        yield connected


def test_one_pair_from_a_folder_to_an_edited_archive(url: str, client: CffaClient, tmp_path: Path) -> None:
    folder = write_pairs(tmp_path / "eye", 1)
    asked = ("--add", "haemorrhages", "--remove", "disc", "--strength", "4", "--mask", "cf", "--watch", "--json")
    done = run("submit", "edit", "--dataset", folder, *SMALL, *asked, "--url", url)
    assert done.exit_code == 0, done.output
    job = json.loads(done.stdout)
    assert (job["state"], job["spec"]["count"], job["spec"]["mask"]) == ("succeeded", 1, "cf")
    assert [(edit["text"], edit["direction"], edit["strength"]) for edit in job["spec"]["edits"]] == [
        ("haemorrhages", "add", 4.0),
        ("disc", "remove", 4.0),
    ]
    fetched = run("download", job["id"], "-o", tmp_path / "edited.zip", "--url", url)
    assert fetched.exit_code == 0, fetched.output
    (pair,) = verify_archive(tmp_path / "edited.zip")["pairs"]
    assert pair["source"]["name"] == "p0" and pair["mask"]["name"] == "mask/000000.png"
    (listed,) = client.pairs(job["id"])
    assert listed.mask is not None and listed.sheet is not None and listed.mask_share == pair["mask_share"]
    assert listed.source is not None and listed.source["name"] == "p0"
    assert client.inspect.pair_image(job["id"], 0, "sheet").startswith(b"\x89PNG")
    # A stored job's spec is posted once more, on its pairs, with another mask.
    (tmp_path / "spec.json").write_text(json.dumps(job["spec"]))
    again = run(
        "submit", "edit", "--job", job["id"], "--pair", "0", "--spec", tmp_path / "spec.json", "--mask", "fa",
        "--json", "--url", url,
    )  # fmt: skip
    assert again.exit_code == 0, again.output
    spec = json.loads(again.stdout)["spec"]
    assert (spec["generation_job_id"], spec["dataset_id"], spec["mask"]) == (job["id"], None, "fa")
    assert [edit["text"] for edit in spec["edits"]] == ["haemorrhages", "disc"]
    assert client.cancel(json.loads(again.stdout)["id"]).state in ("canceling", "canceled")


def test_the_client_posts_an_edit_and_hears_every_fault(client: CffaClient, tmp_path: Path) -> None:
    dataset = client.upload_dataset(write_pairs(tmp_path / "set", 2), "two")
    job = client.submit_edit(EditSpec(dataset_id=dataset.id, edits=(EditTerm(text="disc"),)), priority=-5)
    assert (job.kind, client.cancel(job.id).kind) == ("edit", "edit")
    with pytest.raises(InvalidSpec) as caught:
        client.submit_edit(EditSpec(dataset_id=dataset.id, names=("p1", "p9"), model_id="mdl_" + "0" * 20))
    assert {problem.pointer for problem in caught.value.problems} == {"/names", "/model_id"}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--dataset", "ds_" + "0" * 20), "--add TEXT or --remove TEXT"),
        (("--add", "disc"), "--dataset or --job"),
        (("--add", "disc", "--dataset", "ds_" + "0" * 20, "--job", "job_" + "0" * 20), "one of the two"),
        (("--add", "disc", "--dataset", "ds_" + "0" * 20, "--mask", "both"), "/mask"),
        (("--add", "disc", "--job", "job_" + "0" * 20, "--name", "p0"), "pair_indices"),
    ],
)
def test_options_that_cannot_be(arguments: tuple[str, ...], told: str) -> None:
    refused = run("submit", "edit", *arguments, "--url", "http://127.0.0.1:9")
    assert refused.exit_code == 1 and told in refused.output
