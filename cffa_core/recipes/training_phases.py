"""The phases of a training run: which weights are trained when, and at which rate.

Most runs have one phase. With placeholder tokens there are two (METHODS 6): the tokens alone, then LoRAs and text
encoder, each with an optimiser of its own. Knows no losses and no data.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from cffa_core.jobs.spec import TrainSettings
from cffa_core.methods.method import PairMethod

# Weights by the first part of their names: those of placeholder tokens, of the text encoder, and all others.
TOKENS, TEXT, MODEL = "tokens", "text", "model"


def learning_rate(done: int, steps: int, peak: float) -> float:
    """Rate of the step after ``done`` finished ones: constant for half of the run, then a cosine to 0."""
    half = steps // 2
    if done < half:
        return peak
    return peak * 0.5 * (1 + math.cos(math.pi * (done - half) / (steps - half)))


@dataclass(frozen=True)
class Phase:
    """The steps after ``first`` finished ones up to ``last``: ``peaks`` are the rates of the parts that are trained."""

    first: int
    last: int
    peaks: Mapping[str, float]
    constant: bool = False

    def rate(self, done: int, peak: float) -> float:
        """Rate of the step after ``done`` finished ones of the run."""
        return peak if self.constant else learning_rate(done - self.first, self.last - self.first, peak)

    def optimizer(self, model: PairMethod, weight_decay: float) -> torch.optim.AdamW:
        """A fresh AdamW over the weights of this phase; those of the model that it does not train are frozen."""
        groups: dict[str, list[torch.nn.Parameter]] = {part: [] for part in self.peaks}
        for name, weight in model.named_parameters():
            part = part_of(name)
            weight.requires_grad_(part in groups)
            if part in groups:
                groups[part].append(weight)
        return torch.optim.AdamW(
            [{"params": found, "lr": self.peaks[part], "peak": self.peaks[part]} for part, found in groups.items()],
            weight_decay=weight_decay,
        )


def part_of(name: str) -> str:
    """Part to which the weight of this name (``PairMethod.named_parameters``) belongs."""
    first = name.partition("/")[0]
    return first if first in (TOKENS, TEXT) else MODEL


def phase_at(settings: TrainSettings, done: int) -> Phase:
    """The phase of the step after ``done`` finished ones (at the end of the run: its last phase)."""
    tokens = settings.tokens
    if tokens is None:
        return Phase(0, settings.steps, {MODEL: settings.learning_rate})
    # A finished run stays in its last phase, so that what it saves and what it loads is the same.
    if done < tokens.phase1_steps or tokens.phase1_steps == settings.steps:
        return Phase(0, tokens.phase1_steps, {TOKENS: tokens.phase1_learning_rate}, constant=True)
    peaks = {MODEL: settings.learning_rate, TOKENS: tokens.text_learning_rate}
    if tokens.train_text_encoder:
        peaks[TEXT] = tokens.text_learning_rate
    return Phase(tokens.phase1_steps, settings.steps, peaks)
