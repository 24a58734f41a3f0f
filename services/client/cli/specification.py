"""How options become the specification of a job or run.

The order of precedence is: an option, then ``--set``, then the file of ``--spec``, then the default of the contract.
The options themselves are in ``options``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from cffa_core.errors import InvalidSpec, Problem

if TYPE_CHECKING:
    from cffa_core.jobs.records import Terms
    from cffa_core.jobs.spec import EvaluateSettings, ExportSettings, GenerateSettings, Spec, TrainSettings

S = TypeVar("S", bound="Spec")


def train_settings(
    spec: Path | None,
    assignments: list[str] | None,
    *,
    every: int | None = None,
    rank: int | None = None,
    max_resolution: int | None = None,
    step_range: tuple[float, float] | None = None,
    no_squeeze: bool = False,
    vessels: str | None = None,
    no_tile: bool = False,
    tokens: list[str] | None = None,
    token_steps: int | None = None,
    **fields: object,
) -> TrainSettings:
    """Settings of a training run from options; raises ``InvalidSpec`` naming every bad field."""
    from cffa_core.jobs.spec import TrainSettings

    fields |= {"validate_every": every, "checkpoint_every": every, "preview_every": every, "lora.rank": rank}
    fields |= {"shared_attention.max_resolution": max_resolution, "shared_attention.step_range": step_range}
    fields |= {"side_by_side.squeeze": False if no_squeeze else None}
    fields |= {"tokens.tokens": [_token(one) for one in tokens] if tokens else None, "tokens.phase1_steps": token_steps}
    fields |= {"controlnet.vessels": vessels, "controlnet.tile": False if no_tile else None}
    return _validated(TrainSettings, _merged(spec, assignments, fields))


def _token(text: str) -> dict[str, object]:
    """``vessel``, ``vessel=frangi`` or ``red=haemorrhage,microaneurysm`` as a token of the specification."""
    name, given, masks = text.partition("=")
    if masks == "frangi":
        return {"name": name, "source": "frangi"}
    return {"name": name, "masks": masks.split(",")} if given else {"name": name}


def generate_settings(
    spec: Path | None,
    assignments: list[str] | None,
    *,
    scheduler: str | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    noise: str | None = None,
    min_alignment: float | None = None,
    max_similarity: float | None = None,
    max_tries: int | None = None,
    tokens: str | None = None,
    **fields: object,
) -> GenerateSettings:
    """Settings of a generation run from options; raises ``InvalidSpec`` naming every bad field."""
    from cffa_core.jobs.spec import GenerateSettings

    fields |= {
        "sampler.scheduler": scheduler,
        "sampler.steps": steps,
        "sampler.guidance_scale": guidance,
        "sampler.initial_noise": noise,
        "gate.min_alignment": min_alignment,
        "gate.max_similarity_to_training": max_similarity,
        "gate.max_tries": max_tries,
        "tokens": tokens.split(",") if tokens else None,
    }
    return _validated(GenerateSettings, _merged(spec, assignments, fields))


def structures(given: str | None) -> Literal["dataset", "procedural"] | None:
    """The word of a specification for what ``--structures`` says: ``procedural``, or else a data set."""
    if given is None:
        return None
    return "procedural" if given == "procedural" else "dataset"


def evaluate_settings(spec: Path | None, assignments: list[str] | None, **fields: object) -> EvaluateSettings:
    """Settings of an evaluation from options; raises ``InvalidSpec`` naming every bad field."""
    from cffa_core.jobs.spec import EvaluateSettings

    return _validated(EvaluateSettings, _merged(spec, assignments, fields))


def export_settings(form: str, shard_size: int, **selection: object) -> ExportSettings:
    """Settings of an export from options; raises ``InvalidSpec`` naming every bad field."""
    from cffa_core.jobs.spec import ExportSettings

    chosen = {name: value for name, value in selection.items() if value is not None}
    return _validated(ExportSettings, {"form": form, "shard_size": shard_size, "selection": chosen})


def settings_of(kind: type[S], spec: Path | None, assignments: list[str] | None, **fields: object) -> S:
    """Settings of one kind from options, ``fields`` by dotted name; raises ``InvalidSpec`` naming every bad field."""
    return _validated(kind, _merged(spec, assignments, fields))


def terms(deadline: float | None, keep_days: float | None) -> Terms:
    """Deadline and retention of a job that is posted."""
    from cffa_core.jobs.records import Terms

    return Terms(deadline_seconds=deadline, retention_seconds=None if keep_days is None else keep_days * 86_400)


def reference(spec: Path | None, name: str, given: str | None) -> str:
    """What a job refers to (``dataset_id``, ``model_id``): the option, or the field of the file of ``--spec``."""
    found = given or field(spec, name)
    if not isinstance(found, str) or not found:
        option = "--" + name.removesuffix("_id").removesuffix("_dataset")
        raise InvalidSpec(f"the job needs {option} (or {name} in the file of --spec)")
    return found


def field(spec: Path | None, name: str) -> Any:
    """A field of the file of ``--spec``; None without a file or such a field."""
    return None if spec is None else read_json(spec).get(name)


def _merged(spec: Path | None, assignments: list[str] | None, fields: dict[str, object]) -> dict[str, Any]:
    raw = read_json(spec) if spec is not None else {}
    # A stored job's own spec may be given; what it refers to is not a setting (see `reference`).
    raw = {name: value for name, value in raw.items() if name != "kind" and not name.endswith("_id")}
    for assignment in assignments or ():
        name, equals, text = assignment.partition("=")
        if not equals or not name:
            raise InvalidSpec(f"--set takes FIELD=VALUE, not {assignment!r}")
        _assign(raw, name, _value(text))
    for name, value in fields.items():
        if value is not None:
            _assign(raw, name, value)
    return raw


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; raises ``InvalidSpec`` if there is none."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise InvalidSpec(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(raw, dict):
        raise InvalidSpec(f"{path} must hold one JSON object")
    return raw


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _assign(raw: dict[str, Any], name: str, value: object) -> None:
    *parents, last = name.split(".")
    place = raw
    for parent in parents:
        # A stored job's spec says null where a method's own settings are not used.
        inner = place[parent] = {} if place.get(parent) is None else place[parent]
        if not isinstance(inner, dict):
            raise InvalidSpec(f"{name}: {parent} is not an object")
        place = inner
    place[last] = value


def _validated(kind: type[S], raw: dict[str, Any]) -> S:
    from pydantic import ValidationError

    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        problems = tuple(
            Problem("/" + "/".join(str(part) for part in item["loc"]), str(item["type"]), str(item["msg"]))
            for item in error.errors()
        )
        raise InvalidSpec("the specification is not valid", problems=problems) from error
