"""The two units of an evaluation job: measure the pairs and store the report, then say what was stored.

This runs in the child, called by ``execute``. What is measured, and how, is the matter of the recipe.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cffa_core.data.dataset_folder import part_folder, read_split
from cffa_core.errors import ModelUnavailable
from cffa_core.jobs.spec import EvaluationSpec
from cffa_core.settings import Settings
from cffa_core.storage.base import ObjectStore
from services.worker.generated_pairs import fetch_pairs
from services.worker.job_context import UnitContext
from services.worker.protocol import Done, WorkOrder
from services.worker.reports import finish_report, store_report
from services.worker.scratch import cached

SETS = ("pairs", "reference", "train")


def evaluate(
    order: WorkOrder,
    spec: EvaluationSpec,
    context: UnitContext,
    objects: ObjectStore,
    settings: Settings,
    prepare: Callable[[], str],
) -> Done:
    """Measure and store report.json, report.md and the pictures; ``prepare`` says the device to compute on."""
    folder = Path(order.folder)
    parts = {"reference": spec.reference_split, "train": "train"}
    sets = {
        name: _fetched(order, name, folder / name, context, objects, parts.get(name))
        for name in SETS
        if name in order.inputs
    }
    extractor_folder = _extractor_folder(spec, settings)
    device = prepare()
    from cffa_core.recipes.evaluate_pairs import evaluate_pairs

    out = folder / "report"
    evaluate_pairs(
        sets["pairs"],
        reference=sets["reference"],
        train=sets.get("train"),
        base=spec.base,
        extractor=spec.extractor,
        extractor_folder=extractor_folder,
        out=out,
        on_progress=context.progress,
        max_pairs=spec.max_pairs,
        seed=spec.seed,
        device=device,
        models_dir=settings.models_dir,
    )
    return Done(stored=store_report(order, out, context, objects), info={"sets": order.facts["sets"]})


def finish_evaluation(order: WorkOrder, spec: EvaluationSpec, objects: ObjectStore) -> Done:
    """Write the manifest, with what was measured by name and digest."""
    return finish_report(order, spec, order.inputs["evaluate"], {"sets": order.facts["sets"]}, objects)


def _fetched(
    order: WorkOrder, name: str, folder: Path, context: UnitContext, objects: ObjectStore, part: str | None
) -> Path:
    """The folder of one set of pairs, named by its role: that is the name it has in the report.

    Of a data set with a split it is ``part`` alone, if one is named.
    """

    def on_file(done: int, total: int) -> None:
        context.progress(f"fetching {name}", done, total)

    stored = order.inputs[name]
    if name == "pairs" and "indices" in order.facts:
        return fetch_pairs(objects, stored, order.facts["indices"], folder, on_file)
    whole = cached(objects, stored, Path(order.cache), "dataset", on_file)
    if part is not None and (name == "reference" or read_split(whole) is not None):
        return part_folder(whole, part, folder)
    folder.symlink_to(whole, target_is_directory=True)
    return folder


def _extractor_folder(spec: EvaluationSpec, settings: Settings) -> Path | None:
    if spec.extractor_model is None:
        return None
    if settings.models_dir is None:
        raise ModelUnavailable(
            f"this worker has no folder of models for extractor_model {spec.extractor_model!r}; set CFFA_MODELS_DIR"
        )
    folder = settings.models_dir / spec.extractor_model
    if not folder.is_dir():
        raise ModelUnavailable(
            f"the models folder of this worker has no {spec.extractor_model!r}; put the transformer's folder there "
            "(config.json and safetensors; nothing is downloaded), or use extractor filters"
        )
    return folder
