"""Fixtures of this folder: the micro base, and models of all methods whose LoRAs are not zero."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cffa_core.jobs.spec import LoraSpec, Method, TrainSettings
from cffa_core.methods.method import PairMethod
from cffa_core.methods.registry import METHODS
from cffa_core.models.base import Base, load_base
from tests.micro_base import write_micro_base

Make = Callable[..., PairMethod]


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_micro_base(tmp_path_factory.mktemp("base") / "micro")


@pytest.fixture(scope="session")
def base(base_folder: Path) -> Base:
    return load_base(base_folder)


@pytest.fixture(scope="session")
def make(base: Base) -> Make:
    """Make a model of a method; the two LoRAs differ, so that a map of the wrong row would be seen."""

    def made(method: str = "dual_unet", **settings: Any) -> PairMethod:
        chosen = Method(method)
        spec = TrainSettings(method=chosen, resolution=64, lora=LoraSpec(rank=4), **settings)
        model = METHODS[chosen](base, spec)
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for _, parameter in model.named_parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
        return model

    return made
