"""The stages that teach ``tiny`` its words: where lesions are, what prompts say, and that words come to matter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from cffa_core.data.phantom import CF_PROMPT, FA_PROMPT, FINDINGS, PHASES, Phantom, make_caption, make_phantom
from cffa_core.models.base import load_base
from cffa_core.models.tiny import MICRO, TinyParts, build_parts
from cffa_core.recipes.pretrain_config import PretrainConfig, PretrainRun
from cffa_core.recipes.pretrain_loop import Budget
from cffa_core.recipes.pretrain_unet import tokens
from cffa_core.recipes.pretrain_words import Lesions, cache_lesions, measure_words, teach_text, train_words
from cffa_core.rng import derive_seed

PAIRS, RESOLUTION = 4, 128


def quiet(stage: str, done: int, total: int, loss: float) -> None:
    """Nobody looks."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def parts(tmp_path: Path) -> TinyParts:
    return build_parts(MICRO, 5, tmp_path / "tokenizer")


def run_of(work: Path) -> PretrainRun:
    return PretrainRun(3, work, PretrainConfig(sizes=MICRO, bf16=False), False, torch.device("cpu"), quiet)


def test_cells_are_where_the_masks_are(tmp_path: Path) -> None:
    lesions = cache_lesions(tmp_path, "train", PAIRS, RESOLUTION, 4, quiet)
    found = set()
    for index in range(PAIRS):
        phantom = make_phantom(derive_seed(4, "tiny", "train", index), RESOLUTION)
        assert PHASES[int(lesions.phase[index])] == phantom.phase
        for place, finding in enumerate(FINDINGS):
            marked = {(y // 8, x // 8) for y, x in np.argwhere(phantom.masks[finding])}
            cells = {(y, x) for y, x in torch.nonzero(lesions.cells[index, place]).tolist()}
            assert marked <= cells and all(min(abs(y - v) + abs(x - u) for v, u in marked) <= 2 for y, x in cells), (
                "a cell no lesion touches"
            )
            found |= {finding} if marked else set()
        for row, modality in ((2 * index, "cf"), (2 * index + 1, "fa")):
            assert set(lesions.findings(row)) <= set(phantom.findings)
            named = [f for f in phantom.findings if phantom.masks[f].any()]
            assert lesions.prompt(row, phase=modality == "fa") == make_caption(
                modality, named, phantom.phase if modality == "fa" else None
            )
    assert len(found) >= 2, "the eyes of this test must have lesions"
    path = next(tmp_path.glob("lesions-*.safetensors"))
    before = path.stat().st_mtime_ns
    again = cache_lesions(tmp_path, "train", PAIRS, RESOLUTION, 4, quiet)
    assert torch.equal(again.cells, lesions.cells) and path.stat().st_mtime_ns == before


def test_a_photograph_is_not_told_of_leakage_nor_an_angiogram_of_exudates() -> None:
    cells = torch.ones(1, len(FINDINGS), 2, 2, dtype=torch.bool)
    lesions = Lesions(cells, torch.tensor([PHASES.index("mid")]))
    assert lesions.prompt(0, phase=False) == f"{CF_PROMPT}, with haemorrhages, exudates, microaneurysms"
    assert lesions.prompt(1, phase=True) == f"{FA_PROMPT}, with haemorrhages, microaneurysms, leakage, mid phase"
    assert (
        lesions.prompt(1, phase=False, findings=("haemorrhage", "microaneurysm"))
        == f"{FA_PROMPT}, with haemorrhages, microaneurysms"
    )
    assert make_caption("fa", []) == FA_PROMPT and make_caption("fa", [], "early") == f"{FA_PROMPT}, early phase"


def encoded(parts: TinyParts, *prompts: str) -> torch.Tensor:
    """What the U-Net is shown of prompts, (B, 77, D)."""
    with torch.no_grad():
        return parts.text_encoder(tokens(parts, list(prompts))).last_hidden_state


def test_the_encoder_learns_to_tell_findings_apart_and_keeps_what_it_said_of_all_else(
    parts: TinyParts, tmp_path: Path
) -> None:
    named = [make_caption("cf", found) for found in ((), ("haemorrhage",), ("exudate",))]
    plain = ["", CF_PROMPT, FA_PROMPT, make_caption("fa", (), "late")]

    def apart() -> float:
        states = torch.nn.functional.normalize(encoded(parts, *named).mean(1), dim=1)
        return min(float((states[a] - states[b]).norm()) for a, b in ((0, 1), (0, 2), (1, 2)))

    before, was = apart(), encoded(parts, *plain)
    facts = teach_text(run_of(tmp_path), parts, Budget(steps=150, batch=16, lr=3e-3))
    assert apart() > 5 * before
    assert facts["loss"] < 1.3  # two sums of log 2 at the beginning
    moved = (encoded(parts, *plain) - was).flatten(1).norm(dim=1) / was.flatten(1).norm(dim=1)
    told = (encoded(parts, *named[1:]) - was[1]).flatten(1).norm(dim=1) / was[1].norm()
    assert moved.max() < 0.3 * told.min()


def test_only_cells_of_lesions_that_are_named_are_anything_new(parts: TinyParts, tmp_path: Path) -> None:
    """A pupil that is still its teacher has nothing to learn from healthy eyes, and something from ill ones."""
    latents = torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    healthy = torch.zeros(4, len(FINDINGS), 8, 8, dtype=torch.bool)
    ill = healthy.clone()
    ill[:, FINDINGS.index("haemorrhage"), :3, :3] = True
    phase = torch.full((4,), PHASES.index("late"))
    losses = [
        train_words(run_of(tmp_path / name), parts, latents, Lesions(cells, phase), parts, Budget(1, 16, 0.0))["loss"]
        for name, cells in (("healthy", healthy), ("ill", ill))
    ]
    assert losses[0] < 1e-9 < 1e-3 < losses[1]


class Listener(torch.nn.Module):
    """Guesses the noise of latents that are 0: off by 0.1 with the first prompt, by 0.3 with another one."""

    def __init__(self, alpha_bar: torch.Tensor) -> None:
        super().__init__()
        self.alpha_bar = alpha_bar

    def forward(self, noisy: torch.Tensor, t: int, encoder_hidden_states: torch.Tensor) -> SimpleNamespace:
        other = (encoder_hidden_states != encoder_hidden_states[:1]).any(dim=(1, 2))
        off = torch.where(other, 0.3, 0.1)[:, None, None, None]
        return SimpleNamespace(sample=noisy / (1 - self.alpha_bar[t]).sqrt() + off)


def test_the_measure_is_the_error_without_the_word_over_that_with_it(parts: TinyParts) -> None:
    cells = torch.zeros(2, len(FINDINGS), 8, 8, dtype=torch.bool)
    cells[:, FINDINGS.index("leakage"), 2, 3] = True
    lesions = Lesions(cells, torch.full((2,), PHASES.index("late")))
    heard = replace(parts, unet=Listener(parts.scheduler.alphas_cumprod))
    found = measure_words(heard, torch.zeros(4, 4, 8, 8), lesions, torch.device("cpu"))
    assert found == {"fa leakage": pytest.approx(9.0, rel=1e-4)}  # squares of 0.3 and 0.1; no photograph shows leakage


def test_without_any_lesion_nothing_is_measured(parts: TinyParts) -> None:
    healthy = Lesions(torch.zeros(2, len(FINDINGS), 8, 8, dtype=torch.bool), torch.zeros(2, dtype=torch.long))
    assert measure_words(parts, torch.zeros(4, 4, 8, 8), healthy, torch.device("cpu")) == {}


def test_the_shipped_words_mean_lesions() -> None:
    """With a finding's word the shipped base knows the noise on the finding's cells better than without."""
    base = load_base("tiny")
    eyes = [make_phantom(seed, 512, findings=frozenset({"haemorrhage"}), phase="late") for seed in (990_001, 990_002)]
    images = [image for eye in eyes for image in (eye.cf, np.repeat(eye.fa[..., None], 3, axis=2))]
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
    cells = torch.stack([_haemorrhages(eye) for eye in eyes])
    lesions = Lesions(cells, torch.full((len(eyes),), PHASES.index("late")))
    scheduler = DDIMScheduler.from_config(base.scheduler_config)
    parts = TinyParts(base.tokenizer, base.text_encoder, base.vae, base.unet, scheduler)
    found = measure_words(parts, base.encode_images(pixels)[0], lesions, torch.device("cpu"))
    assert found["cf haemorrhage"] > 1.05 and found["fa haemorrhage"] > 1.05, found


def _haemorrhages(eye: Phantom) -> torch.Tensor:
    cells = torch.zeros(len(FINDINGS), 64, 64, dtype=torch.bool)
    mask = torch.from_numpy(eye.masks["haemorrhage"]).reshape(64, 8, 64, 8)
    cells[FINDINGS.index("haemorrhage")] = mask.any(3).any(1)
    return cells
