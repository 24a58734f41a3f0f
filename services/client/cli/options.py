"""Options that several commands share, and what those of the service and the machine stand for.

How the others become the settings of a job is in ``specification``; options of one kind of job alone stand with it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from services.client.keys import find_key

if TYPE_CHECKING:
    from cffa_core.settings import Settings
    from services.client.client import CffaClient

Url = Annotated[
    str, typer.Option("--url", envvar="CFFA_URL", help="Address of the service.", rich_help_panel="Service")
]
Key = Annotated[
    str,
    typer.Option(
        "--api-key",
        envvar="CFFA_API_KEY",
        callback=find_key,
        help="Key of the service, if it wants one; better kept in the file that CFFA_API_KEY_FILE names.",
        rich_help_panel="Service",
    ),
]
DEFAULT_URL = "http://127.0.0.1:8008"

SpecFile = Annotated[
    Path | None,
    typer.Option("--spec", exists=True, dir_okay=False, help="JSON file with any fields of the specification."),
]
Assignments = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="Any field, e.g. loss.hf_lambda=0.2; may be repeated."),
]
Device = Annotated[str, typer.Option(envvar="CFFA_DEVICE", help="auto | cpu | cuda | cuda:N")]
EyePattern = Annotated[
    str | None, typer.Option(help="Regular expression: pairs whose names give the same match are one eye.")
]
PatientPattern = Annotated[
    str | None,
    typer.Option(help="Regular expression: eyes whose pairs' names give the same match are of one patient."),
]
AutoRegister = Annotated[
    bool,
    typer.Option("--auto-register", help="Register pairs that come without landmarks by their vessels."),
]
Method = Annotated[
    str | None, typer.Option(help="Pair method: dual_unet | shared_attention | side_by_side | controlnet.")
]
MaxResolution = Annotated[
    int | None, typer.Option(help="shared_attention: largest latent side at which attention is shared.")
]
StepRange = Annotated[
    tuple[float, float] | None,
    typer.Option(metavar="BEGIN END", help="shared_attention: part of the way from noise (0) to image (1)."),
]
NoSqueeze = Annotated[bool, typer.Option("--no-squeeze", help="side_by_side: each image at its full width.")]
Vessels = Annotated[
    str | None, typer.Option(help="controlnet: vessel maps by Frangi's filter (frangi) or the data set's own (masks).")
]
Token = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME[=MASK,...]",
        help="dual_unet: a placeholder token bound to the data set's masks of that name, to these masks, or to "
        "Frangi's filter (vessel=frangi); may be repeated.",
    ),
]
TokenSteps = Annotated[int | None, typer.Option(help="With --token: the first steps, which train the tokens alone.")]
DrawnTokens = Annotated[
    str | None, typer.Option("--tokens", metavar="NAME,...", help="Of a model with tokens, draw these; default all.")
]
NoTile = Annotated[bool, typer.Option("--no-tile", help="controlnet: vessel maps alone, without the tile image.")]
Base = Annotated[str | None, typer.Option(help="Base model: `tiny`, a hub id, or a folder in CFFA_MODELS_DIR.")]
Resolution = Annotated[int | None, typer.Option(help="Side of the images in pixels, a multiple of 8.")]
Steps = Annotated[int | None, typer.Option(help="Training steps.")]
BatchSize = Annotated[int | None, typer.Option(help="Pairs per step.")]
LearningRate = Annotated[float | None, typer.Option(help="AdamW's learning rate.")]
Rank = Annotated[int | None, typer.Option(help="Rank of the low-rank adapters.")]
Timesteps = Annotated[str | None, typer.Option(help="independent | shared")]
Holdout = Annotated[float | None, typer.Option(help="Fraction of eyes held out for validation.")]
PreviewPairs = Annotated[int | None, typer.Option(help="Pairs drawn at each preview; 0 for none.")]
EveryN = Annotated[int | None, typer.Option("--every", help="Validate, checkpoint and preview every N steps.")]
Seed = Annotated[int | None, typer.Option(help="Seed of everything random.")]
Count = Annotated[int | None, typer.Option("--count", "-n", help="Number of pairs.")]
Scheduler = Annotated[str | None, typer.Option(help="ddim | pndm | dpm++2m | unipc | euler | ddpm")]
SampleSteps = Annotated[int | None, typer.Option("--steps", help="Steps of the sampler.")]
Guidance = Annotated[float | None, typer.Option(help="Guidance scale; 1 switches guidance off.")]
MinAlignment = Annotated[
    float | None, typer.Option(help="Gate: least ridge correlation of CF and FA; other pairs are drawn again.")
]
MaxSimilarity = Annotated[
    float | None, typer.Option(help="Gate: largest similarity to a pair of the training; a copy has 1.")
]
MaxTries = Annotated[int | None, typer.Option(help="Gate: pairs drawn for one slot before it is given up.")]
Noise = Annotated[str | None, typer.Option(help="Initial noise: shared | rotated | banded | independent")]

Deadline = Annotated[
    float | None, typer.Option(help="Seconds after which a job that is not over fails; what it finished is kept.")
]
KeepDays = Annotated[
    float | None, typer.Option(help="Days for which products are kept once the job is over; 0 for ever.")
]
Priority = Annotated[int, typer.Option(help="Among your own jobs, higher goes first.")]
Watch = Annotated[bool, typer.Option("--watch", help="Wait for the end, with a progress bar.")]
PartSize = Annotated[int | None, typer.Option(help="Pairs per part (one archive each).")]
Limit = Annotated[int, typer.Option(min=1, help="At most so many, newest first.")]

ModelFolder = Annotated[Path, typer.Argument(exists=True, file_okay=False, help="Model folder (OUT/best_checkpoint).")]
ModelOrRun = Annotated[
    Path, typer.Argument(metavar="MODEL", exists=True, file_okay=False, help="Model folder, or the run around it.")
]
RunFolder = Annotated[
    Path, typer.Option("--out", "-o", file_okay=False, help="Folder of the run; resumed if it has one.")
]
BaseOfModel = Annotated[str | None, typer.Option(help="Where the model's base is, if not under its name.")]
VaeBase = Annotated[str | None, typer.Option(help="Base whose VAE the reference goes through, e.g. `tiny`.")]
SetSeed = Annotated[int, typer.Option(min=0, help="Seed of everything random.")]


def settings() -> Settings:
    """This machine's settings from the environment; raises ``InvalidSettings`` naming every bad variable."""
    from cffa_core.settings import read_settings

    return read_settings()


def device(asked: str) -> str:
    """The device to compute on; ``auto`` is the first GPU, if there is one."""
    if asked != "auto":
        return asked
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def connect(url: str, key: str) -> CffaClient:
    """A client of the service at ``url``."""
    from services.client.client import CffaClient

    return CffaClient(url, api_key=key or None)
