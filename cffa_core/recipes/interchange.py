"""Model folders in and out: LoRAs as standard files, bases with them fused in, and other programs' LoRAs as models.

A script over ``models.interchange`` and ``models.merged_base`` (files) and the pair methods (model folders). Nothing is
written over: an output that exists is refused.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from cffa_core.diffusion.rotation import BAND_EDGES
from cffa_core.disk_files import sha256_of
from cffa_core.errors import Conflict, CorruptArtifact, InvalidSpec, ModelUnavailable, Problem, StorageUnavailable
from cffa_core.jobs.spec import LoraSpec, Method, TrainSettings
from cffa_core.methods.dual_unet import DualUnet
from cffa_core.methods.method import read_card
from cffa_core.models.base import Base, load_base
from cffa_core.models.checkpoint import publish, verify_files
from cffa_core.models.interchange import find_lora_file, read_lora
from cffa_core.models.merged_base import fused_unet, write_base

CARD_FILE = "card.json"  # the model.json of the model that was exported
LORA_FILE = "pytorch_lora_weights.safetensors"  # the name that load_lora_weights(FOLDER) looks for
ADAPTER = re.compile(r"lora_(?P<name>[a-z0-9_]+)\.safetensors")
# How far a stock pipeline goes: what it draws with one method's LoRA is not always what our sampler draws.
EQUALITY = {
    Method.DUAL_UNET: "A stock pipeline draws the image that this model draws from the same initial latents.",
    Method.SHARED_ATTENTION: "A stock pipeline draws this model's CF from the same initial latents, but not its FA: "
    "there the FA looks through the CF's attention, which no LoRA file carries.",
    Method.SIDE_BY_SIDE: "A stock pipeline draws the whole canvas of this model, CF on the left, FA on the right; "
    "give it the canvas's height and width and cut the image in two.",
    Method.CONTROLNET: "The ControlNets of this model are not part of this file; without them a stock pipeline draws "
    "other images.",
}


def find_model(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The model folder at ``folder`` (or below, in a run's ``best_checkpoint``), verified, and its card."""
    if not (folder / "model.json").is_file() and (folder / "best_checkpoint" / "model.json").is_file():
        folder = folder / "best_checkpoint"
    card = read_card(folder)
    verify_files(folder, card["files"])
    return folder, card


def adapters_of(card: dict[str, Any], only: str | None = None) -> dict[str, str]:
    """Names of a model's LoRAs and their files; ``only`` picks one. Raises ``ModelUnavailable`` for an unknown name."""
    found = {match["name"]: file for file in sorted(card["files"]) if (match := ADAPTER.fullmatch(file))}
    if only is None:
        return found
    if only not in found:
        message = f"the model (method {card['method']}) has no LoRA {only!r}; it has {', '.join(sorted(found))}"
        raise ModelUnavailable(message)
    return {only: found[only]}


def export_lora(model: Path, out: Path, *, only: str | None = None) -> dict[str, Any]:
    """Write ``out/NAME/pytorch_lora_weights.safetensors`` for each LoRA of a model folder, README.md and card.json.

    ``pipe.load_lora_weights("out/cf")`` of stock diffusers reads it, rank and alpha included. Returns what was written.
    Raises ``ModelUnavailable``, ``CorruptArtifact`` for damaged files, ``Conflict`` if ``out`` exists.
    """
    folder, card = find_model(model)
    chosen = adapters_of(card, only)
    files: dict[str, dict[str, str]] = {}
    with _new_folder(out) as staging:
        for name, file in chosen.items():
            target = staging / name / LORA_FILE
            target.parent.mkdir()
            shutil.copyfile(folder / file, target)
            files[name] = {"file": f"{name}/{LORA_FILE}", "sha256": card["files"][file]["sha256"]}
        text = _readme(card, f"# LoRA of a CFFA model ({card['method']})", list(chosen), 'pipe.load_lora_weights("{}")')
        (staging / "README.md").write_text(text, encoding="utf-8")
        _write_card(staging / CARD_FILE, card)
    return {"out": str(out), "method": card["method"], "base": card["base"], "lora": _lora(card), "files": files}


def export_merged(
    model: Path,
    out: Path,
    *,
    base: str | Path | None = None,
    only: str | None = None,
    models_dir: Path | None = None,
) -> dict[str, Any]:
    """Write ``out/NAME/`` for each LoRA of a model folder: the whole base with that LoRA fused into its UNet, float32.

    ``load_base`` and stock diffusers load each folder as any other base. ``base`` says where the model's base is, if
    not under its name. Raises as :func:`export_lora` does, and ``ModelUnavailable`` for another base.
    """
    folder, card = find_model(model)
    chosen = adapters_of(card, only)
    if card["method"] == Method.CONTROLNET:
        raise ModelUnavailable("a model of method controlnet is more than a UNet and cannot be merged; use --lora")
    loaded = _base_of(card, base, models_dir)
    with _new_folder(out) as staging:
        for name, file in chosen.items():
            unet = fused_unet(loaded.unet, read_lora(folder / file, loaded.unet))
            title = f"# {card['base']['name']} with the LoRA `{name}` of a CFFA model fused in"
            text = _readme(card, title, [name], 'pipe = StableDiffusionPipeline.from_pretrained("{}")')
            (staging / name).mkdir()
            write_base(staging / name, loaded, unet, text)
        _write_card(staging / CARD_FILE, card)
    return {"out": str(out), "method": card["method"], "base": card["base"], "folders": {name: name for name in chosen}}


def import_lora(
    *,
    cf: Path | None,
    fa: Path | None,
    base: str | Path,
    out: Path,
    card: Path | None = None,
    resolution: int | None = None,
    cf_prompt: str | None = None,
    fa_prompt: str | None = None,
    models_dir: Path | None = None,
) -> dict[str, Any]:
    """Make a `dual_unet` model folder of two LoRA files (diffusers, peft or kohya); return its ``model.json``.

    ``resolution`` is what the LoRAs were trained at (default: the base's own). ``card`` is the ``card.json`` of an
    export: it gives prompts and resolution, where these are not given, and the rotations of the initial noise. The new
    card's ``imported`` names the files by SHA-256. Raises ``ModelUnavailable`` with all problems if a file does not fit
    the base, if one modality is missing, or if the two have different ranks, alphas or targets; ``Conflict`` if ``out``
    exists; ``CorruptArtifact`` for damaged files.
    """
    given = {"cf": cf, "fa": fa}
    missing = [
        Problem(f"/{m}", "missing_modality", f"the LoRA of {m.upper()} is missing") for m in given if not given[m]
    ]
    if missing:
        raise ModelUnavailable("a pair model needs a LoRA for CF and one for FA", problems=tuple(missing))
    _refuse_existing(out)
    loaded = load_base(base, models_dir=models_dir)
    files = {m: find_lora_file(path) for m, path in given.items() if path}
    loras = {m: read_lora(file, loaded.unet) for m, file in files.items()}
    _agree(loras["cf"].spec, loras["fa"].spec)
    known = _known(card, loaded) if card is not None else {}
    own = {"resolution": int(loaded.unet.config.sample_size) * loaded.latent_stride, **known.get("settings", {})}
    given_fields = {"resolution": resolution, "cf_prompt": cf_prompt, "fa_prompt": fa_prompt}
    settings = _settings(
        base=re.sub(r"[^A-Za-z0-9._/-]", "_", loaded.name),
        lora=loras["cf"].spec,
        **own | {name: value for name, value in given_fields.items() if value is not None},
    )
    model = DualUnet(loaded, settings, known.get("noise_rotation"))
    model.band_rotations = known.get("band_rotations")
    parameters = dict(model.lora.named_parameters())
    for m, lora in loras.items():
        for layer, (down, up) in lora.layers.items():
            weights = {f"{m}/{layer}.lora_A.weight": down, f"{m}/{layer}.lora_B.weight": up}
            for name, weight in weights.items():
                parameters[name].data.copy_(weight)
    with _new_folder(out) as staging:
        made = model.save(staging / "model", dataset_digest="", validation=None)
        made["imported"] = {m: {"file": file.name, "sha256": sha256_of(file)} for m, file in files.items()}
        _write_card(staging / "model" / "model.json", made)
        for file in sorted((staging / "model").iterdir()):
            file.rename(staging / file.name)
        (staging / "model").rmdir()
    return made


def _known(path: Path, base: Base) -> dict[str, Any]:
    """What the card of an export says that no LoRA file can carry: prompts, resolution, rotations of the noise."""
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
        if card["method"] != Method.DUAL_UNET or card["base"]["digest"] != base.digest:
            raise ModelUnavailable(
                f"{path.name} is of method {card['method']} on base {card['base']['name']!r}; what is imported is a "
                f"dual_unet on {base.name!r} as it is here"
            )
        found = {"settings": {name: card["settings"][name] for name in ("resolution", "cf_prompt", "fa_prompt")}}
        square = (base.latent_channels, base.latent_channels)
        shapes = {"noise_rotation": square, "band_rotations": (len(BAND_EDGES) + 1, *square)}
        stored = {name: card[name] for name in shapes if card.get(name) is not None}
        return found | {name: _rotation(value, shapes[name]) for name, value in stored.items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorruptArtifact(f"{path} is not the card.json of an export: {error!r}") from error


def _rotation(value: Any, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Orthogonal matrices of the latent's channels, up to a card's rounding: others would not leave noise as it is."""
    rotation = np.asarray(value, dtype=np.float64)
    if rotation.shape != shape or not np.allclose(rotation @ rotation.swapaxes(-1, -2), np.eye(shape[-1]), atol=1e-5):
        raise ValueError(f"a rotation of the noise is not orthogonal or not of shape {shape}")
    return rotation


def _agree(cf: LoraSpec, fa: LoraSpec) -> None:
    """Both LoRAs of a model have one specification."""
    differing = [field for field in ("rank", "alpha", "targets") if getattr(cf, field) != getattr(fa, field)]
    problems = tuple(
        Problem(f"/fa/{field}", f"other_{field}", f"CF has {field} {getattr(cf, field)}, FA {getattr(fa, field)}")
        for field in differing
    )
    if problems:
        message = f"the two LoRAs differ in {', '.join(differing)}; both LoRAs of a model must have the same"
        raise ModelUnavailable(message, problems=problems)


def _settings(**fields: Any) -> TrainSettings:
    try:
        return TrainSettings(**fields)
    except ValidationError as error:
        problems = tuple(
            Problem("/" + "/".join(map(str, item["loc"])), str(item["type"]), str(item["msg"]))
            for item in error.errors()
        )
        raise InvalidSpec("the model cannot be described with these settings", problems=problems) from error


def _base_of(card: dict[str, Any], base: str | Path | None, models_dir: Path | None) -> Base:
    loaded = load_base(base or card["base"]["name"], models_dir=models_dir)
    if loaded.digest != card["base"]["digest"]:
        raise ModelUnavailable(
            f"the model was trained on base {card['base']['name']!r} with other weights than {loaded.name!r} has here; "
            "say with --base where its base is"
        )
    return loaded


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """An empty folder that becomes ``out`` if the block ends well."""
    _refuse_existing(out)
    try:
        with publish(out.resolve()) as staging:
            yield staging
    except OSError as error:
        raise StorageUnavailable(f"{out} cannot be written: {error.strerror or error}") from error


def _refuse_existing(out: Path) -> None:
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise Conflict(f"{out} exists; nothing is written over: name another folder or remove it first")


def _write_card(path: Path, card: dict[str, Any]) -> None:
    path.write_text(json.dumps(card, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _lora(card: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = card["settings"]["lora"]
    return found


def _readme(card: dict[str, Any], title: str, names: list[str], load: str) -> str:
    """What somebody who gets only these files must know to use them."""
    lora, settings = _lora(card), card["settings"]
    canvas = card["method"] == Method.SIDE_BY_SIDE
    lines = [
        title,
        "",
        EQUALITY[Method(card["method"])],
        "",
        f"- Base: `{card['base']['name']}`, digest `{card['base']['digest']}`",
        f"- Rank {lora['rank']}, alpha {lora['alpha']:g}, on {', '.join(lora['targets'])}",
        f"- Trained for {card['step']} steps at {settings['resolution']} px",
        f"- CF prompt: {settings['cf_prompt']}",
        f"- FA prompt: {settings['fa_prompt']}",
        *([f"- Prompt of the canvas: {settings['cf_prompt']}, beside {settings['fa_prompt']}"] if canvas else []),
        "",
        *(f"    {load.format(name)}" for name in names),
        "",
        *(
            []
            if canvas
            else ["What makes a pair is the initial latents: the same for CF and FA, or the FA's turned by the"]
        ),
        *([] if canvas else ["rotations in `card.json`, as this model's own sampler does by default if it has them."]),
        "An FA is turned into one channel by its luminance.",
    ]
    return "\n".join(lines) + "\n"
