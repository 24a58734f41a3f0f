"""What each kind of unit does: fetch its inputs, run its recipe, store its products, say what was stored.

This runs in the child. It reads and writes object storage and scratch folders, never the record; numeric libraries are
imported only for units that compute, so a finalize unit starts at once.
"""

from __future__ import annotations

import json
import os
import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cffa_core.errors import Cancelled, CorruptArtifact
from cffa_core.jobs.records import NOVELTY_FILE, NewModel, StoredFiles
from cffa_core.jobs.spec import (
    AttentionSpec,
    CaptionedSpec,
    CaptionedTrainingSpec,
    EditSpec,
    EvaluationSpec,
    ExportSpec,
    GenerationSpec,
    TrainingSpec,
)
from cffa_core.jobs.state import UnitKind
from cffa_core.models.fetch import models_dir_with
from cffa_core.recipes.archive import REJECTS
from cffa_core.recipes.provenance import edit_provenance, provenance
from cffa_core.recipes.regenerate import compared
from cffa_core.rng import numerics_key
from cffa_core.settings import Settings
from cffa_core.storage.base import ObjectInfo, ObjectStore, result_key
from services.worker.channel import Channel
from services.worker.edit import edit
from services.worker.evaluate import evaluate, finish_evaluation
from services.worker.export import export, finish_export
from services.worker.job_context import UnitContext
from services.worker.pair_parts import finish_pairs, store_pairs
from services.worker.protocol import Done, Ready, WorkOrder
from services.worker.reports import compute_attention, compute_captioned, finish_report
from services.worker.scratch import cached, files_digest

if TYPE_CHECKING:
    from cffa_core.editing.editor import PairEditor
    from cffa_core.evaluation.pair_scores import TrainingPairs
    from cffa_core.methods.pair_sampler import PairSampler
    from cffa_core.recipes.structures import Structures

MODEL = "model/"
BASES = "bases"
_ATTEMPT = re.compile(r"/a(\d+)/")


class Executor:
    """Does the units of one job, one after the other; a sampler or editor, once loaded, serves all its parts."""

    def __init__(self, channel: Channel, objects: ObjectStore, settings: Settings) -> None:
        self.prepared = False
        self._channel = channel
        self._objects = objects
        self._settings = settings
        self._sampler: PairSampler | None = None
        self._editor: PairEditor | None = None
        self._structures: Structures | None = None
        self._training: TrainingPairs | None = None
        self._numerics_key: str | None = None

    def run(self, order: WorkOrder, context: UnitContext) -> Done:
        """Do one unit; raises what its recipe raises."""
        self.prepared = False
        if isinstance(order.spec, TrainingSpec | CaptionedTrainingSpec):
            if order.kind is UnitKind.TRAIN:
                return self._train(order, order.spec, context)
            return self._finish_training(order, order.spec, context)
        if isinstance(order.spec, EvaluationSpec):
            return self._evaluate(order, order.spec, context)
        if isinstance(order.spec, ExportSpec):
            return self._export(order, order.spec, context)
        if isinstance(order.spec, AttentionSpec | CaptionedSpec):
            return self._report(order, order.spec, context)
        if isinstance(order.spec, EditSpec):
            return self._edit(order, order.spec, context)
        if order.kind is UnitKind.PART:
            return self._generate(order, order.spec, context)
        return self._finish_generation(order, order.spec, context)

    def _train(self, order: WorkOrder, spec: TrainingSpec | CaptionedTrainingSpec, context: UnitContext) -> Done:
        dataset = self._input(order, "dataset", context)
        self._remove_leavings(order, f"jobs/{order.job_id}/")
        out = Path(order.folder) / "run"
        out.mkdir()
        if isinstance(spec, CaptionedTrainingSpec):
            device = self._prepare(spec.precision, spec.batch_size)
            from cffa_core.recipes.captioned import run_captioned_training

            model = run_captioned_training(spec.settings(), dataset, out, context, device=device)
        else:
            device = self._prepare(spec.precision, spec.batch_size)
            from cffa_core.recipes.train import run_training

            model = run_training(
                spec.settings(),
                dataset,
                spec.base,
                out,
                context,
                device=device,
                models_dir=self._models_dir(spec.base, order, context),
                lpips_weights=self._settings.lpips_weights,
            )
        files: dict[str, ObjectInfo] = dict(context.published.files)
        paths = [(path, _product_name(path.relative_to(out))) for path in sorted(out.rglob("*")) if path.is_file()]
        products = [(path, name) for path, name in paths if name is not None]
        for done, (path, name) in enumerate(products, start=1):
            files[name] = self._objects.put_file(result_key(order.job_id, order.kind, order.attempt, name), path)
            context.progress("storing", done, len(products))
        return Done(stored=StoredFiles(files), info={"model": model})

    def _generate(self, order: WorkOrder, spec: GenerationSpec, context: UnitContext) -> Done:
        settings = spec.settings()
        self._remove_leavings(order, f"jobs/{order.job_id}/parts/{order.index:05d}/")
        if self._sampler is None:
            model = self._input(order, "model", context)
            dataset = self._input(order, "structures", context) if "structures" in order.inputs else None
            known = self._input(order, "novelty", context) / NOVELTY_FILE if "novelty" in order.inputs else None
            device = self._prepare(spec.precision, spec.batch_size)
            from cffa_core.evaluation.pair_scores import TrainingPairs
            from cffa_core.recipes.generate import load_sampler
            from cffa_core.recipes.structures import structures_for

            self._training = None if known is None else TrainingPairs.read(known)
            base = _read_card(model / "model.json")["base"]["name"]
            sampler = load_sampler(settings, model, base, device, models_dir=self._models_dir(base, order, context))
            self._structures = structures_for(settings, sampler.model, dataset)
            self._sampler = sampler
        else:
            self._prepare(spec.precision, spec.batch_size)
        from cffa_core.recipes.generate import generate_part

        folder = Path(order.folder) / "part"
        folder.mkdir()
        generate_part(self._sampler, settings, order.index, folder, context, self._structures, self._training)
        header = self._header(order, spec)
        files, index = store_pairs(order, self._objects, header, folder)
        info: dict[str, Any] = {"pairs": [pair["index"] for pair in index["pairs"]]}
        if settings.gate is not None:
            rejected = 0
            if (folder / REJECTS).is_dir():
                names = ("rejects.zip", "rejects.json")
                more, refused = store_pairs(order, self._objects, header, folder / REJECTS, *names)
                files, rejected = files | more, len(refused["pairs"])
            info["gate"] = {"rejected": rejected, "exhausted": len(index["exhausted"])}
        return Done(stored=StoredFiles({**context.published.files, **files}), info=info)

    def _finish_generation(self, order: WorkOrder, spec: GenerationSpec, context: UnitContext) -> Done:
        self._remove_leavings(order, f"jobs/{order.job_id}/{order.kind}/")
        header = self._header(order, spec)
        done, archive, empty = finish_pairs(order, spec, context, self._objects, header, "cffa-generation/1")
        more: dict[str, Any] = {}
        if spec.gate is not None:
            more["exhausted"] = empty
        if spec.regenerates is not None:
            more["regenerated"] = compared(spec, archive)
        return done.model_copy(update={"job_result": (done.job_result or {}) | more})

    def _edit(self, order: WorkOrder, spec: EditSpec, context: UnitContext) -> Done:
        if order.kind is UnitKind.FINALIZE:
            self._remove_leavings(order, f"jobs/{order.job_id}/{order.kind}/")
            header = self._edit_header(order, spec)
            return finish_pairs(order, spec, context, self._objects, header, "cffa-edit/1")[0]
        self._remove_leavings(order, f"jobs/{order.job_id}/parts/{order.index:05d}/")
        if self._editor is None:
            model = self._input(order, "model", context) if "model" in order.inputs else None
            device = self._prepare(spec.precision, 1)
            from cffa_core.recipes.edit import load_editor

            base = spec.base if model is None else _read_card(model / "model.json")["base"]["name"]
            found = self._models_dir(base, order, context)
            self._editor = load_editor(spec.settings(), model, base, device, models_dir=found)
        else:
            self._prepare(spec.precision, 1)
        return edit(order, spec, context, self._objects, self._editor, self._edit_header(order, spec))

    def _finish_training(
        self, order: WorkOrder, spec: TrainingSpec | CaptionedTrainingSpec, context: UnitContext
    ) -> Done:
        self._remove_leavings(order, f"jobs/{order.job_id}/{order.kind}/")
        products = order.inputs["train"].files
        model = StoredFiles({name.removeprefix(MODEL): i for name, i in products.items() if name.startswith(MODEL)})
        if "model.json" not in model.files:
            raise CorruptArtifact("the training left no model.json")
        self._objects.fetch(model.files["model.json"], Path(order.folder) / "model.json")
        context.progress("manifest", 1, 1)
        digest = files_digest(model)
        files = {name: {"size": info.size, "sha256": info.sha256} for name, info in sorted(products.items())}
        manifest = {
            "format": "cffa-training/1",
            "spec": spec.settings().model_dump(mode="json"),
            "model_digest": digest,
            "numerics_key": order.numerics_key,
            "files": files,
        }
        listing = self._put_json(order, "manifest.json", manifest)
        card = {**_read_card(Path(order.folder) / "model.json"), "digest": digest, "numerics_key": order.numerics_key}
        return Done(
            stored=StoredFiles({"manifest.json": listing}),
            info={"files": len(products)},
            job_result={"model_digest": digest, "manifest": {"sha256": listing.sha256}},
            model=NewModel(digest=digest, card=card, stored=model),
        )

    def _evaluate(self, order: WorkOrder, spec: EvaluationSpec, context: UnitContext) -> Done:
        self._remove_leavings(order, f"jobs/{order.job_id}/{order.kind}/")
        if order.kind is UnitKind.FINALIZE:
            return finish_evaluation(order, spec, self._objects)
        prepare = partial(self._prepare, "fp32", 1)
        return evaluate(order, spec, context, self._objects, self._settings, prepare)

    def _report(self, order: WorkOrder, spec: AttentionSpec | CaptionedSpec, context: UnitContext) -> Done:
        self._remove_leavings(order, f"jobs/{order.job_id}/{order.kind}/")
        if order.kind is UnitKind.FINALIZE:
            facts = {"inputs": order.facts["inputs"]}
            return finish_report(order, spec, order.inputs["report"], facts, self._objects)
        model = self._input(order, "model", context)
        if isinstance(spec, CaptionedSpec):
            dataset = self._input(order, "dataset", context) if "dataset" in order.inputs else None
            from cffa_core.recipes.captioned import BATCH

            device = self._prepare("fp32", BATCH)
            return compute_captioned(order, spec, model, dataset, context, self._objects, device)
        base = _read_card(model / "model.json")["base"]["name"]
        models_dir = self._models_dir(base, order, context)
        device = self._prepare(spec.precision, 1)
        return compute_attention(order, spec, model, base, context, self._objects, device, models_dir)

    def _export(self, order: WorkOrder, spec: ExportSpec, context: UnitContext) -> Done:
        self._remove_leavings(order, f"jobs/{order.job_id}/{order.kind}/")
        if order.kind is UnitKind.FINALIZE:
            return finish_export(order, spec, self._objects)
        return export(order, spec, context, self._objects)

    def _prepare(self, dtype: str, batch_size: int) -> str:
        """Import the numeric libraries with their thread count and agree on the numerics key; returns the device."""
        import torch

        torch.set_num_threads(self._settings.threads or len(os.sched_getaffinity(0)))
        device = self._settings.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        key = numerics_key(device=device, dtype=dtype, batch_size=batch_size)
        self.prepared = True
        self._numerics_key = key
        self._channel.send(Ready(numerics_key=key))
        if not self._channel.answer().accepted:
            raise Cancelled("the job is bound to the numerics of another kind of worker")
        return device

    def _input(self, order: WorkOrder, name: str, context: UnitContext) -> Path:
        def on_file(done: int, total: int) -> None:
            context.progress(f"fetching {name}", done, total)

        return cached(self._objects, order.inputs[name], Path(order.cache), name, on_file)

    def _models_dir(self, base: str, order: WorkOrder, context: UnitContext) -> Path | None:
        """The folder in which this base is found by its name; a base that only the object store has is fetched."""

        def on_file(done: int, total: int) -> None:
            context.progress("fetching base", done, total)

        cache = Path(order.cache) / BASES
        return models_dir_with(
            base, models_dir=self._settings.models_dir, store=self._objects, cache=cache, on_file=on_file
        )

    def _remove_leavings(self, order: WorkOrder, prefix: str) -> None:
        """Delete what earlier attempts at this unit stored and the record never pointed to."""
        recorded = set(order.facts.get("recorded_keys", ()))
        for key in list(self._objects.list(prefix)):
            attempt = _ATTEMPT.search(key)
            if key not in recorded and attempt is not None and int(attempt[1]) < order.attempt:
                self._objects.delete(key)

    def _header(self, order: WorkOrder, spec: GenerationSpec) -> dict[str, Any]:
        return provenance(
            spec.settings(),
            model_digest=order.facts["model_digest"],
            dataset_digest=order.facts["dataset_digest"],
            # The first part of a job is ordered before the job is bound to a key; it was accepted under this one.
            numerics_key=order.numerics_key or self._numerics_key,
            structures_digest=order.facts.get("structures_digest"),
        )

    def _edit_header(self, order: WorkOrder, spec: EditSpec) -> dict[str, Any]:
        return edit_provenance(
            spec.settings(),
            base=spec.base if spec.model_id is None else None,
            model_digest=order.facts["model_digest"],
            dataset_digest=order.facts["dataset_digest"],
            numerics_key=order.numerics_key or self._numerics_key,
            source=order.facts["source"],
        )

    def _result_key(self, order: WorkOrder, name: str) -> str:
        return result_key(order.job_id, order.kind, order.attempt, name)

    def _put_json(self, order: WorkOrder, name: str, value: dict[str, Any]) -> ObjectInfo:
        text = json.dumps(value, indent=1, sort_keys=True) + "\n"
        return self._objects.put_bytes(self._result_key(order, name), text.encode())


def _product_name(path: Path) -> str | None:
    """Name of a run's file among its products; None for checkpoints, which are published as such."""
    head, *rest = path.parts
    if head == "latest_checkpoints":
        return None
    return MODEL + "/".join(rest) if head == "best_checkpoint" else path.as_posix()


def _read_card(path: Path) -> dict[str, Any]:
    try:
        card: dict[str, Any] = json.loads(path.read_bytes())
    except ValueError as error:
        raise CorruptArtifact(f"{path.name} is not readable: {error}") from error
    return card
