"""Fixtures of this folder: micro sizes, a vocabulary, an untrained model, and captioned pairs small enough to train."""

from __future__ import annotations

from pathlib import Path

import pytest

from cffa_core.captioned.model import CaptionedModel
from cffa_core.captioned.vocabulary import Vocabulary
from cffa_core.data.phantom import write_phantoms
from cffa_core.jobs.captioned_spec import CaptionedSizes

CAPTIONS = (
    "A photograph, with haemorrhages, exudates",
    "A photograph",
    "A photograph, with exudates",
    "A photograph",
)


@pytest.fixture(scope="session")
def sizes() -> CaptionedSizes:
    return CaptionedSizes(
        embedding=16,
        latent_channels=16,
        unet=(8, 16, 24),
        image=8,
        decoder=64,
        text=16,
        text_layers=1,
        max_tokens=24,
    )


@pytest.fixture(scope="session")
def vocabulary() -> Vocabulary:
    return Vocabulary.of(CAPTIONS)


@pytest.fixture
def model(sizes: CaptionedSizes, vocabulary: Vocabulary) -> CaptionedModel:
    return CaptionedModel.build(sizes, vocabulary, seed=3)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("captioned") / "eyes"
    write_phantoms(folder, 7, seed=5, resolution=64, processes=1)
    return folder
