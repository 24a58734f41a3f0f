"""The main job through the command line and the client, against the real service with the micro base at 64 px."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner, Result

from cffa_core.data.phantom import write_phantoms
from cffa_core.disk_files import sha256_of
from cffa_core.errors import Conflict, InvalidDataset, InvalidSpec, NotFound
from cffa_core.jobs.spec import GenerateSettings, TrainSettings
from cffa_core.recipes.archive import verify_archive
from services.client.cli import app
from services.client.client import CffaClient
from services.client.servers import Servers
from tests.client.conftest import TRAINING

# One service for the whole file, also where tests are spread over processes.
pytestmark = pytest.mark.xdist_group("client service")

MISSING = "job_00000000000000000000"


def run(service: Servers, *arguments: str | Path) -> Result:
    return CliRunner(env={"CFFA_URL": service.url}).invoke(app, [str(argument) for argument in arguments])


def printed(result: Result) -> Any:
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(scope="session")
def training(service: Servers, pairs_folder: Path) -> dict[str, Any]:
    """A finished training job, posted and watched by the command line."""
    sets = [argument for field in TRAINING for argument in ("--set", field)]
    posted = printed(run(service, "submit", "train", "--dataset", pairs_folder, *sets, "--json"))
    assert posted["kind"] == "training"
    return dict(printed(run(service, "watch", posted["id"], "--json")))


@pytest.fixture(scope="session")
def generation(service: Servers, training: dict[str, Any]) -> dict[str, Any]:
    """A finished generation job of five pairs in parts of two."""
    options = ("--count", "5", "--part-size", "2", "--batch-size", "2", "--resolution", "64", "--steps", "2")
    result = run(service, "submit", "generate", "--model", training["id"], *options, "--watch", "--json")
    return dict(printed(result))


def test_a_trained_model_is_listed(client: CffaClient, training: dict[str, Any]) -> None:
    assert training["state"] == "succeeded"
    model = client.model_of(training["id"])
    assert model.id in [listed.id for listed in client.models()]
    assert (model.base, model.method, model.step is not None) == ("micro", "dual_unet", True)


@pytest.mark.parametrize(
    ("method", "own"),
    [
        ("shared_attention", ("--max-resolution", "4", "--step-range", "0", "0.6")),
        ("side_by_side", ("--no-squeeze",)),
    ],
)
def test_a_job_of_another_method(
    service: Servers, client: CffaClient, pairs_folder: Path, tmp_path: Path, method: str, own: tuple[str, ...]
) -> None:
    """Trained, listed, drawn from and downloaded, with the method's own options."""
    sets = [argument for field in (*TRAINING, "cf_prompt=CF", "fa_prompt=FA") for argument in ("--set", field)]
    options = ("--method", method, *own, "--watch", "--json")
    trained = printed(run(service, "submit", "train", "--dataset", pairs_folder, *sets, *options))
    model = client.model_of(trained["id"])
    assert (trained["state"], model.method) == ("succeeded", method)
    settings = GenerateSettings(count=3, resolution=64, batch_size=2, part_size=2, sampler={"steps": 2})
    made = client.wait(client.submit_generation(model.id, settings).id, timeout=120)
    assert made.state == "succeeded"
    client.download_archive(made.id, tmp_path / "pairs.zip")
    assert [pair["index"] for pair in verify_archive(tmp_path / "pairs.zip")["pairs"]] == [0, 1, 2]


def test_the_archive_holds_what_was_asked_for(service: Servers, generation: dict[str, Any], tmp_path: Path) -> None:
    report = printed(run(service, "download", generation["id"], "--out", tmp_path / "pairs.zip", "--json"))
    manifest = verify_archive(tmp_path / "pairs.zip")
    assert [pair["index"] for pair in manifest["pairs"]] == [0, 1, 2, 3, 4]
    assert report["pairs"] == 5
    assert report["bytes"] == (tmp_path / "pairs.zip").stat().st_size


def test_a_part_can_be_downloaded_alone(service: Servers, generation: dict[str, Any], tmp_path: Path) -> None:
    printed(run(service, "download", generation["id"], "--part", "2", "--out", tmp_path, "--json"))
    (path,) = tmp_path.iterdir()
    assert [pair["index"] for pair in verify_archive(path)["pairs"]] == [4]


def test_pairs_and_archives_agree(client: CffaClient, generation: dict[str, Any], tmp_path: Path) -> None:
    client.download_archive(generation["id"], tmp_path / "pairs.zip")
    manifest = verify_archive(tmp_path / "pairs.zip")
    pairs = list(client.pairs(generation["id"]))
    assert [pair.cf.sha256 for pair in pairs] == [pair["cf"]["sha256"] for pair in manifest["pairs"]]
    archives = client.archives(generation["id"])
    assert [part.number for part in archives.parts] == [0, 1, 2]
    assert archives.whole is not None


def test_one_pair_is_made_once_more(service: Servers, client: CffaClient, generation: dict[str, Any]) -> None:
    assert [(pair.attempt, pair.novelty is not None) for pair in client.pairs(generation["id"])] == [(0, True)] * 5
    shown = run(service, "pair", "regenerate", generation["id"], "3", "--watch")
    assert shown.exit_code == 0, shown.stderr
    assert f"pair 3 of {generation['id']} is the same to the last bit" in " ".join(
        (shown.stdout + shown.stderr).split()
    )
    absent = run(service, "pair", "regenerate", generation["id"], "5")
    assert absent.exit_code == 1 and "has no pair 5" in " ".join(absent.stderr.split())


def test_pairs_that_a_gate_refused_can_be_looked_at(
    service: Servers, client: CffaClient, training: dict[str, Any], tmp_path: Path
) -> None:
    """No pair is wholly unlike all training pairs."""
    options = ("--count", "2", "--batch-size", "2", "--resolution", "64", "--steps", "2", "--watch", "--json")
    gate = ("--max-similarity", "0", "--max-tries", "2")
    job = printed(run(service, "submit", "generate", "--model", training["id"], *options, *gate))
    assert (job["state"], job["counts"]["rejected"], job["counts"]["failed"]) == ("succeeded", 4, 2)
    found = printed(run(service, "pair", "rejects", job["id"], "--out", tmp_path, "--json"))
    assert [(entry["index"], entry["try"]) for entry in found["rejects"]] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert {reason for entry in found["rejects"] for reason in entry["reasons"]} == {"too_similar_to_training"}
    assert [slot["tries"] for slot in found["exhausted"]] == [2, 2]
    (downloaded,) = tmp_path.iterdir()
    assert len(verify_archive(downloaded)["pairs"]) == 4
    client.download_archive(job["id"], tmp_path / "whole.zip")
    manifest = verify_archive(tmp_path / "whole.zip")
    assert manifest["pairs"] == [] and [slot["index"] for slot in manifest["exhausted"]] == [0, 1]
    assert "slots that stayed empty: 0, 1" in run(service, "pair", "rejects", job["id"]).stderr


def test_generated_pairs_are_measured_and_the_report_comes_home(
    service: Servers, client: CffaClient, training: dict[str, Any], generation: dict[str, Any], tmp_path: Path
) -> None:
    real = tmp_path / "real"
    write_phantoms(real, 4, seed=2, resolution=64, processes=1)
    asked = ("--pairs", generation["id"], "--reference", real, "--set", "base=null")
    done = printed(run(service, "submit", "evaluate", *asked, "--watch", "--json"))
    assert (done["kind"], done["state"]) == ("evaluation", "succeeded")
    assert done["spec"]["train_dataset_id"] == training["spec"]["dataset_id"]
    fetched = printed(run(service, "download", done["id"], "--out", tmp_path, "--json"))
    folder = tmp_path / f"{done['id']}-report"
    listed = {Path(file["path"]).name: (file["bytes"], file["sha256"]) for file in fetched["files"]}
    assert {"report.json", "report.md", "alignment.png"} <= set(listed)
    assert listed == {path.name: (path.stat().st_size, sha256_of(path)) for path in folder.iterdir()}
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert report == fetched["report"] == client.report(done["id"]).report
    assert (report["pairs"]["pairs"], report["reference"]["pairs"], report["train"]["pairs"]) == (5, 4, 6)
    assert "report.md" in run(service, "download", done["id"], "--out", tmp_path).stdout
    with pytest.raises(Conflict):
        client.report(generation["id"])


def test_an_evaluation_of_nothing_is_refused_before_anything_is_uploaded(service: Servers, tmp_path: Path) -> None:
    refused = run(service, "submit", "evaluate", "--reference", tmp_path)
    assert refused.exit_code == 1
    assert "--pairs" in refused.stderr


def test_jobs_are_listed_as_json_and_as_a_table(
    service: Servers, training: dict[str, Any], generation: dict[str, Any]
) -> None:
    listed = printed(run(service, "jobs", "--json"))
    assert {training["id"], generation["id"]} <= {job["id"] for job in listed}
    table = run(service, "jobs", "--kind", "generation", "--state", "succeeded").stdout
    assert generation["id"] in table
    assert training["id"] not in table


def test_a_finished_job_takes_no_orders(service: Servers, client: CffaClient, generation: dict[str, Any]) -> None:
    with pytest.raises(Conflict) as caught:
        client.pause(generation["id"])
    assert getattr(caught.value, "status", None) == 409
    assert run(service, "cancel", generation["id"]).exit_code == 1


def test_unknown_ids_are_not_found(client: CffaClient) -> None:
    with pytest.raises(NotFound) as caught:
        client.job(MISSING)
    assert getattr(caught.value, "request_id", None)


def test_a_spec_that_names_nothing_is_refused(client: CffaClient) -> None:
    with pytest.raises(InvalidSpec) as caught:
        client.submit_generation("mdl_00000000000000000000", GenerateSettings(count=1))
    assert [problem.pointer for problem in caught.value.problems] == ["/model_id"]


def test_a_model_that_takes_no_structures_says_so(
    service: Servers, training: dict[str, Any], pairs_folder: Path
) -> None:
    """The option uploads a folder, or means procedural eyes; what it names reaches the service."""
    for structures in (pairs_folder, "procedural"):
        options = ("--model", training["id"], "--count", "1", "--structures", structures)
        refused = run(service, "submit", "generate", *options)
        assert refused.exit_code == 1
        assert "/structures" in refused.stderr and "takes no structures" in " ".join(refused.stderr.split())


def test_a_bad_upload_names_every_file(
    service: Servers, client: CffaClient, pairs_folder: Path, tmp_path: Path
) -> None:
    for name in ("cf/a.png", "fa/a.png", "cf/b.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("no picture")
    before = len(list(client.datasets()))
    with pytest.raises(InvalidDataset) as caught:
        client.upload_dataset(tmp_path)
    named = " ".join(problem.pointer for problem in caught.value.problems)
    assert "a.png" in named
    assert "b.png" in named
    assert len(list(client.datasets())) == before
    refused = run(service, "upload", tmp_path)
    assert refused.exit_code == 1
    assert "b.png" in refused.stderr


class Records(httpx.HTTPTransport):
    """Notes which paths were asked with a key."""

    def __init__(self) -> None:
        super().__init__()
        self.keyed: dict[str, bool] = {}

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        self.keyed[request.url.path.split("/")[2]] = "authorization" in request.headers
        return super().handle_request(request)


def test_the_key_goes_to_the_api_and_not_to_signed_links(
    service: Servers, generation: dict[str, Any], tmp_path: Path
) -> None:
    transport = Records()
    with CffaClient(service.url, api_key="secret", transport=transport) as client:
        client.download_archive(generation["id"], tmp_path)
    assert transport.keyed == {"jobs": True, "blobs": False}


class BreaksOnce(httpx.HTTPTransport):
    """Delivers the first post, then loses its answer."""

    broken = False

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        response = super().handle_request(request)
        if request.method == "POST" and not self.broken:
            self.broken = True
            response.close()
            raise httpx.ReadError("the connection broke")
        return response


@pytest.fixture
def breaking(service: Servers) -> Iterator[CffaClient]:
    with CffaClient(service.url, transport=BreaksOnce()) as client:
        yield client


def test_a_post_whose_answer_was_lost_is_one_job(client: CffaClient, breaking: CffaClient, pairs_folder: Path) -> None:
    dataset = client.upload_dataset(pairs_folder, "one job")
    before = {job.id for job in client.jobs()}
    job = breaking.submit_training(dataset.id, TrainSettings(base="micro", resolution=64, steps=100_000))
    assert {job.id for job in client.jobs()} - before == {job.id}
    client.cancel(job.id)
    assert client.wait(job.id, timeout=60).state == "canceled"
    client.delete(job.id)
    with pytest.raises(NotFound):
        client.job(job.id)


def test_watching_outlives_the_api(service: Servers, client: CffaClient, training: dict[str, Any]) -> None:
    model = client.model_of(training["id"])
    settings = GenerateSettings(count=300, resolution=64, batch_size=1, part_size=1)
    job = client.submit_generation(model.id, settings)
    watched = client.watch(job.id, timeout=60)
    made = next(job for job in watched if job.counts.generated)
    api = service.children[0].process
    assert api is not None
    api.kill()
    assert next(job for job in watched if job.counts.generated > made.counts.generated).state == "running"
    assert service.children[0].codes == [-signal.SIGKILL]
    client.cancel(job.id)
    assert client.wait(job.id, timeout=60).state == "canceled"
