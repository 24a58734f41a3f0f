"""Procedural CF-FA pairs ("phantoms", METHODS 9): seeded, exactly registered, with exact masks.

``make_phantom`` draws one eye and renders both modalities from the same geometry. numpy and OpenCV only: no torch.
What a phantom cannot do: it is no model of disease and no substitute for photographs; see docs/phantom.md.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from cffa_core.errors import InvalidSpec

from . import lesions
from .anatomy import Anatomy, Eye, cup_field, disc_field, lay_out
from .fields import Mask, grid, stream
from .folder import write_phantoms
from .render import Phase, Scene, render_cf, render_fa, tissue
from .sheet import contact_sheet
from .vessels import draw, grow_trees

__all__ = [
    "CF_PROMPT",
    "FA_PROMPT",
    "FINDINGS",
    "PHASES",
    "SEEN_IN",
    "WORDS",
    "Eye",
    "Phantom",
    "Phase",
    "contact_sheet",
    "make_caption",
    "make_phantom",
    "write_phantoms",
]

CF_PROMPT = "A high quality color fundus photograph, retinal structure"
FA_PROMPT = "A high quality fluorescein angiography image, bright retinal vessels"
FINDINGS = lesions.FINDINGS
PHASES: tuple[Phase, ...] = ("early", "mid", "late")
# How captions say a finding, and which findings the captions of each modality name.
WORDS = {"haemorrhage": "haemorrhages", "exudate": "exudates", "microaneurysm": "microaneurysms", "leakage": "leakage"}
SEEN_IN: Mapping[str, tuple[str, ...]] = {
    "cf": ("haemorrhage", "exudate", "microaneurysm"),
    "fa": ("haemorrhage", "microaneurysm", "leakage"),
}


@dataclass(frozen=True)
class Phantom:
    """One registered pair with its truth.

    ``cf`` (H, W, 3) uint8 RGB; ``fa`` (H, W) uint8; ``valid_*`` (H, W) bool, False outside the camera's aperture, where
    the image is black. ``masks`` has the keys vessel, artery, vein, disc, cup, macula, haemorrhage, exudate,
    microaneurysm, leakage, each (H, W) bool, False where neither camera looked. ``findings`` are mask keys.
    """

    name: str
    seed: int
    cf: npt.NDArray[np.uint8]
    fa: npt.NDArray[np.uint8]
    valid_cf: Mask
    valid_fa: Mask
    masks: dict[str, Mask]
    findings: tuple[str, ...]
    phase: Phase
    eye: Eye
    cf_caption: str
    fa_caption: str

    def renamed(self, name: str) -> Phantom:
        """The same pair under another name."""
        return replace(self, name=name)


def make_phantom(
    seed: int, resolution: int = 512, *, findings: frozenset[str] | None = None, phase: Phase | None = None
) -> Phantom:
    """Make the pair of ``seed``; the same arguments give the same bytes.

    ``findings`` (mask keys of FINDINGS; empty for a healthy eye) and ``phase`` are drawn from the seed where None.
    Anatomy does not depend on them. Raises :class:`InvalidSpec` for an unknown finding or phase, or a resolution
    below 64.
    """
    if resolution < 64:
        raise InvalidSpec(f"phantom resolution is {resolution}; it must be at least 64 pixels")
    if phase is not None and phase not in PHASES:
        raise InvalidSpec(f"unknown angiography phase {phase!r}; choose one of {', '.join(PHASES)}")
    unknown = sorted((findings or frozenset()) - set(FINDINGS))
    if unknown:
        raise InvalidSpec(f"unknown findings {', '.join(unknown)}; choose among {', '.join(FINDINGS)}")
    chosen, chosen_phase = _history(seed, findings, phase)
    eye = lay_out(seed)
    scene = _scene(seed, eye, resolution, chosen)
    cf, valid_cf = render_cf(scene)
    fa, valid_fa = render_fa(scene, chosen_phase)
    seen = valid_cf | valid_fa
    return Phantom(
        name=f"phantom_{seed}",
        seed=seed,
        cf=cf,
        fa=fa,
        valid_cf=valid_cf,
        valid_fa=valid_fa,
        masks={name: mask & seen for name, mask in _masks(scene).items()},
        findings=tuple(f for f in FINDINGS if f in chosen),
        phase=chosen_phase,
        eye=eye.eye,
        cf_caption=make_caption("cf", chosen),
        fa_caption=make_caption("fa", chosen, chosen_phase),
    )


def make_caption(modality: str, findings: Collection[str], phase: Phase | None = None) -> str:
    """What a caption says of an image (``cf`` or ``fa``) with these findings, and of its phase where it is told.

    Findings that the modality does not show are not named.
    """
    words = [WORDS[f] for f in SEEN_IN[modality] if f in findings]
    ending = [*words, f"{phase} phase"] if phase else words
    prompt = CF_PROMPT if modality == "cf" else FA_PROMPT
    return ", with ".join((prompt, ", ".join(ending))) if words else ", ".join((prompt, *ending))


def _history(seed: int, findings: frozenset[str] | None, phase: Phase | None) -> tuple[frozenset[str], Phase]:
    """Draw what was not asked for: about four eyes in ten are healthy; leakage is not drawn for the early phase."""
    rng = stream(seed, "history")
    drawn_phase = PHASES[int(rng.choice(3, p=[0.2, 0.5, 0.3]))]
    ill = rng.random() < 0.6
    picked = {name for name, chance in zip(FINDINGS, rng.random(4), strict=True) if ill and chance < 0.5}
    chosen_phase: Phase = phase or drawn_phase
    if findings is not None:
        if phase is None and "leakage" in findings and chosen_phase == "early":
            chosen_phase = "late"
        return findings, chosen_phase
    if chosen_phase == "early":
        picked.discard("leakage")
    return frozenset(picked), chosen_phase


def _scene(seed: int, eye: Anatomy, resolution: int, findings: frozenset[str]) -> Scene:
    """Geometry of both modalities."""
    arteries, veins = grow_trees(seed, eye)
    capillaries, choroid = tissue(seed, eye, resolution)
    nothing = np.zeros((resolution, resolution), np.float32)
    dots = lesions.microaneurysm_points(seed, eye) if "microaneurysm" in findings else []
    return Scene(
        seed=seed,
        eye=eye,
        resolution=resolution,
        artery=draw(arteries, resolution),
        vein=draw(veins, resolution),
        artery_reflex=draw(arteries, resolution, calibre=0.3, thin_level=0.2),
        vein_core=draw(veins, resolution, calibre=0.55, thin_level=0.3),
        capillaries=capillaries,
        choroid=choroid,
        haemorrhage=lesions.haemorrhages(seed, eye, resolution) if "haemorrhage" in findings else nothing,
        exudate=lesions.exudates(seed, eye, resolution) if "exudate" in findings else nothing,
        microaneurysm=lesions.microaneurysms(seed, eye, resolution) if dots else nothing,
        leakage=lesions.leakage(seed, eye, resolution, dots) if "leakage" in findings else nothing,
    )


def _masks(scene: Scene) -> dict[str, Mask]:
    """Threshold the scene's fields at half their height."""
    x, y = grid(scene.resolution)
    eye = scene.eye
    macula = np.hypot(x - eye.fovea[0], y - eye.fovea[1]) < 1.2 * eye.macula_radius
    artery, vein = scene.artery > 0.35, scene.vein > 0.35
    return {
        "vessel": artery | vein,
        "artery": artery,
        "vein": vein,
        "disc": disc_field(eye, scene.resolution) > 0.5,
        "cup": cup_field(eye, scene.resolution) > 0.5,
        "macula": np.asarray(macula, np.bool_),
        "haemorrhage": scene.haemorrhage > 0.5,
        "exudate": scene.exudate > 0.5,
        "microaneurysm": scene.microaneurysm > 0.5,
        "leakage": scene.leakage > 0.5,
    }
