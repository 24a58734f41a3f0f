"""The text that a training gives each pair: the two fixed prompts, or the pair's own caption."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from cffa_core.data.captions import Caption, read_captions
from cffa_core.errors import InvalidDataset, Problem
from cffa_core.jobs.spec import TrainSettings
from cffa_core.methods.method import PairMethod


class PairText:
    """Encoded prompts of pairs; each text is encoded once, when it is first needed.

    Without captions every pair has the fixed prompts; with them a pair, or an image, that has none keeps its fixed one.
    """

    def __init__(self, model: PairMethod, settings: TrainSettings, captions: Mapping[str, Caption]) -> None:
        self._model, self._settings, self._captions = model, settings, captions
        self._known: dict[str, torch.Tensor] = {}

    def of(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """Text of each branch for these pairs, (B, 77, D); (1, 77, D) where it is the same for all."""
        chosen = [self._prompts(name) for name in (names if self._captions else names[:1])]
        return {b: torch.cat([self._encoded(prompts[b]) for prompts in chosen]) for b in self._model.branches}

    def _prompts(self, name: str) -> dict[str, str]:
        said = self._captions.get(name)
        cf = (said and said.cf) or self._settings.cf_prompt
        fa = (said and said.fa) or self._settings.fa_prompt
        return self._model.prompts(cf, fa)

    def _encoded(self, prompt: str) -> torch.Tensor:
        if prompt not in self._known:
            self._known[prompt] = self._model.base.encode_prompts([prompt])
        return self._known[prompt]


def captions_of(settings: TrainSettings, dataset: Path, names: Sequence[str]) -> dict[str, Caption]:
    """The captions that a training on ``dataset`` learns from; none unless it asks for them.

    Raises ``InvalidDataset`` for a bad line, or if it asks for them and no pair of ``names`` has one.
    """
    if not settings.captions:
        return {}
    found = read_captions(dataset) if dataset.is_dir() else {}
    kept = {name: found[name] for name in names if name in found}
    if not kept:
        message = "no pair has a caption: put captions.jsonl into the data set's folder, or train without captions"
        raise InvalidDataset(message, problems=(Problem("captions.jsonl", "no_captions", message),))
    return kept
