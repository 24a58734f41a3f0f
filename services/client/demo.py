"""The main job, end to end, as a team would run it: data set, training, generation, verified archive, contact sheet.

Everything goes over HTTP: to servers that are started here and stopped at the end, or to a service that runs already.
Nothing reaches into them. Says in plain words what it does on standard error; the last line, on standard output, is one
JSON object.
"""

from __future__ import annotations

import io
import json
import signal
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
from PIL import Image

from cffa_core.data.sheet import SheetRow, contact_sheet
from cffa_core.errors import CffaError
from cffa_core.jobs.spec import GenerateSettings, SamplerSpec, Scheduler, TrainSettings
from cffa_core.recipes.archive import verify_archive
from services.client.client import CffaClient
from services.client.resources import Job
from services.client.servers import Servers

Say = Callable[[str], None]
OnProgress = Callable[[str, int, int], None]
PHANTOMS = 24
SHEET_ROWS = 16
REGISTRATION = {
    "given": "registered already",
    "homography": "registered here by their landmarks",
    "affine": "registered here by few landmarks",
}


class DemoFailed(CffaError):
    """A job of the demo did not succeed; the message carries its reason and the end of the worker's log."""

    code = "demo_failed"


@dataclass(frozen=True)
class DemoPlan:
    """What the demo does. Without ``data`` (folder or zip) it draws pairs, without ``out`` it makes a new folder,
    without ``url`` it starts a service of its own on ``port``."""

    data: Path | None = None
    out: Path | None = None
    url: str = ""
    api_key: str = field(default="", repr=False)
    port: int = 0
    pairs: int = 8
    resolution: int = 512
    base: str = "tiny"
    steps: int = 60
    sampler_steps: int = 25
    seed: int = 42

    def training(self) -> TrainSettings:
        """Few steps: enough to see the whole path work, not to learn a clinic's retinas."""
        preview = SamplerSpec(scheduler=Scheduler.DPM, steps=min(10, self.sampler_steps))
        return TrainSettings(
            base=self.base,
            resolution=self.resolution,
            steps=self.steps,
            learning_rate=1e-4,
            augment="none",
            validate_every=self.steps,
            checkpoint_every=max(1, self.steps // 2),
            preview_every=self.steps,
            preview_pairs=2,
            preview=preview,
            seed=self.seed,
        )

    def generation(self) -> GenerateSettings:
        """At most eight parts, of four pairs or more: the first archive is there before the last pair."""
        return GenerateSettings(
            count=self.pairs,
            resolution=self.resolution,
            batch_size=min(4, self.pairs),
            part_size=max(4, -(-self.pairs // 8)),
            sampler=SamplerSpec(scheduler=Scheduler.DPM, steps=self.sampler_steps),
            seed=self.seed,
        )


def run_demo(plan: DemoPlan, say: Say, on_progress: OnProgress) -> dict[str, Any]:
    """Run the demo; returns the report that is its last line.

    Stops its servers whatever happens, also on Ctrl-C and SIGTERM; on a service that ran before, it cancels its job.
    Raises ``DemoFailed`` and every error on the way.
    """
    began = time.monotonic()
    out = (plan.out or Path(tempfile.mkdtemp(prefix="cffa-demo-"))).resolve()
    out.mkdir(parents=True, exist_ok=True)
    say(f"[1/6] Pairs to learn from. Results go to {out}")
    data = plan.data or _procedural_pairs(plan, out / "procedural-pairs", say, on_progress)
    # Ctrl-C works even where the starter had it ignored, as shells do for commands in the background.
    handlers = {signal.SIGTERM: _end, signal.SIGINT: signal.default_int_handler}
    previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        run = _on_running_service if plan.url else _on_own_service
        report = run(plan, data, out, say, on_progress)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    url = report.pop("url")
    return {**report, "seconds": round(time.monotonic() - began, 1), "url": url}


def _on_own_service(plan: DemoPlan, data: Path, out: Path, say: Say, on_progress: OnProgress) -> dict[str, Any]:
    servers = Servers(
        out / "home",
        port=plan.port,
        logs=out / "logs",
        environment={"CFFA_DATABASE_URL": "", "CFFA_PUBLIC_URL": ""},
        on_event=lambda name, text: say(f"      {name} {text}\n{_log_tail(servers, name)}"),
        give_up=4,
    )
    say("[2/6] Starting the service on this machine: an API and a worker")
    with servers, CffaClient(servers.url) as client:
        try:
            servers.wait_ready()
            say(f"      it is at {servers.url} while the demo runs")
            _cancel_leftovers(client, say)
            report = _work(plan, client, servers, data, out, say, on_progress)
        except (KeyboardInterrupt, SystemExit):
            say("interrupted: stopping the service")
            raise
    say("      done; the service is stopped")
    say(f"      look at it again with: cffa serve --home {out / 'home'}")
    return report


def _on_running_service(plan: DemoPlan, data: Path, out: Path, say: Say, on_progress: OnProgress) -> dict[str, Any]:
    with CffaClient(plan.url, api_key=plan.api_key or None) as client:
        say(f"[2/6] Using the service at {client.base_url}")
        queue = client.queue()
        say(f"      {queue.workers} worker(s), {queue.waiting} job(s) waiting, {queue.running} running")
        if not queue.workers:
            say("      note: no worker is there now; the jobs wait until one is")
        return _work(plan, client, None, data, out, say, on_progress)


def _work(
    plan: DemoPlan,
    client: CffaClient,
    servers: Servers | None,
    data: Path,
    out: Path,
    say: Say,
    on_progress: OnProgress,
) -> dict[str, Any]:
    say(f"[3/6] Uploading {data.name} over HTTP; the service checks every file")
    dataset = client.upload_dataset(data, on_bytes=lambda done, total: on_progress("uploading", done, total))
    found = client.dataset_report(dataset.id)
    kinds = Counter(str(pair["registration"]) for pair in found["pairs"])
    listed = ", ".join(f"{count} {REGISTRATION.get(kind, kind)}" for kind, count in kinds.items())
    say(f"      data set {dataset.id}: {dataset.pairs} pairs were taken in ({listed})")
    for warning in found["warnings"][:5]:
        say(f"      note: {warning['pointer']}: {warning['message']}")

    say(f"[4/6] Training job: dual_unet on the base `{plan.base}`, {plan.steps} steps at {plan.resolution} px")
    training = client.submit_training(dataset.id, plan.training())
    _follow(client, servers, training, say, on_progress)
    model = client.model_of(training.id)
    say(f"      model {model.id}")

    settings = plan.generation()
    sampler = settings.sampler
    say(
        f"[5/6] Generation job: {plan.pairs} new pairs in {settings.parts} part(s), {sampler.steps} steps of "
        f"{sampler.scheduler}"
    )
    generation = client.submit_generation(model.id, settings)
    _follow(client, servers, generation, say, on_progress)

    say("[6/6] Downloading the archive, checking every SHA-256 of its manifest, drawing the contact sheet")
    path = out / "pairs.zip"
    archive = client.download_archive(
        generation.id, path, on_bytes=lambda done, total: on_progress("downloading", done, total)
    )
    manifest = verify_archive(path)
    say(f"      {path.name}: {len(manifest['pairs'])} pairs, every size and SHA-256 is right")
    sheet = _contact_sheet(path, manifest, out / "contact_sheet.png")
    say(f"      contact sheet: {sheet}")
    return {
        "pairs": len(manifest["pairs"]),
        "archive": str(path),
        "sha256": archive.sha256,
        "contact_sheet": str(sheet),
        "url": f"{client.base_url}/v1/jobs/{generation.id}/archives",
    }


def _procedural_pairs(plan: DemoPlan, folder: Path, say: Say, on_progress: OnProgress) -> Path:
    from cffa_core.data.phantom import write_phantoms

    say(f"      drawing {PHANTOMS} procedural pairs (use --data for your own)")
    write_phantoms(
        folder, PHANTOMS, plan.seed, plan.resolution, lambda done, total: on_progress("drawing pairs", done, total)
    )
    return folder


def _follow(client: CffaClient, servers: Servers | None, posted: Job, say: Say, on_progress: OnProgress) -> None:
    """Draw a job's progress to its end; raises :class:`DemoFailed` unless it succeeds."""
    try:
        for job in client.watch(posted.id):
            if servers is not None:
                servers.check()
            if job.progress.total:
                on_progress(f"{job.kind}: {job.progress.stage}", job.progress.current, job.progress.total)
    except (KeyboardInterrupt, SystemExit):
        if servers is None:  # others use this service: what nobody waits for any more must not keep them waiting
            say(f"interrupted: cancelling job {posted.id}")
            client.cancel(posted.id)
        raise
    if job.state != "succeeded":
        why = (job.error or {}).get("message") or job.reason or "no reason given"
        tail = "" if servers is None else f"\n{_log_tail(servers, 'worker')}"
        raise DemoFailed(f"the {job.kind} job is {job.state}: {why}{tail}")


def _cancel_leftovers(client: CffaClient, say: Say) -> None:
    """An earlier demo with the same --out may have been interrupted: its jobs must not come first."""
    for job in client.jobs():
        if not job.terminal:
            say(f"      cancelling job {job.id}, left by an earlier demo")
            client.cancel(job.id)


def _contact_sheet(archive: Path, manifest: dict[str, Any], path: Path) -> Path:
    rows = []
    with zipfile.ZipFile(archive) as members:

        def pixels(name: str, mode: str) -> Any:
            return np.asarray(Image.open(io.BytesIO(members.read(name))).convert(mode))

        for pair in manifest["pairs"][:SHEET_ROWS]:
            label = (f"pair {pair['index']}", f"seed {pair['seed']}")
            rows.append(SheetRow(pixels(pair["cf"]["name"], "RGB"), pixels(pair["fa"]["name"], "L"), label))
    return contact_sheet(rows, path, title="New pairs: dual_unet")


def _log_tail(servers: Servers, name: str) -> str:
    return next((child.tail() for child in servers.children if child.name == name), "")


def _end(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def print_report(report: dict[str, Any]) -> None:
    """Write the report as the last line of standard output."""
    sys.stderr.flush()
    sys.stdout.write(json.dumps(report) + "\n")
    sys.stdout.flush()
