"""Sizes and budgets of the pretraining stages of ``tiny``, and what all stages know of their run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from cffa_core.models.tiny import TinySizes

from .pretrain_loop import Budget, Progress

VAE_BUDGET = Budget(steps=12000, batch=8, lr=8e-4, minutes=30)
REFINE_BUDGET = Budget(steps=8000, batch=8, lr=3e-4, minutes=10)
DECODER_BUDGET = Budget(steps=4000, batch=2, lr=5e-4, minutes=12, shards=2)
SMALL_BUDGET = Budget(steps=6000, batch=16, lr=6e-4, minutes=16)
LARGE_BUDGET = Budget(steps=12000, batch=4, lr=5e-4, minutes=46)
TEXT_BUDGET = Budget(steps=400, batch=24, lr=1e-3)
WORDS_BUDGET = Budget(steps=2600, batch=4, lr=3e-4)


@dataclass(frozen=True)
class PretrainConfig:
    """Sizes and budgets of the stages. The defaults take about 170 minutes on two idle CPU cores.

    Without ``teach_words`` the last two stages, about 40 of them, are left out: prompts then draw no findings.
    """

    phantoms: int = 3000
    large_pairs: int = 1000
    heldout: int = 48
    resolution: int = 512
    crop: int = 128
    sizes: TinySizes = field(default_factory=TinySizes)
    vae: Budget = VAE_BUDGET
    refine: Budget = REFINE_BUDGET
    decoder: Budget = DECODER_BUDGET
    small: Budget = SMALL_BUDGET
    large: Budget = LARGE_BUDGET
    teach_words: bool = True
    text: Budget = TEXT_BUDGET
    words: Budget = WORDS_BUDGET
    every: int = 250
    bf16: bool = True


@dataclass(frozen=True)
class PretrainRun:
    """What every stage needs to know of the whole run: caches and checkpoints are below ``work``."""

    seed: int
    work: Path
    config: PretrainConfig
    resume: bool
    device: torch.device
    progress: Progress

    def autocast(self) -> torch.autocast:
        """bf16 on the device: about 1.5x faster than fp32 on a CPU that has it."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.bf16)
