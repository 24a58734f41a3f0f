"""An edit really adds a lesion: judged by the classifier of findings, on an eye that no training saw."""

from __future__ import annotations

import numpy as np
import torch

from cffa_core import rng
from cffa_core.data.contracts import Bytes
from cffa_core.data.phantom import CF_PROMPT, FA_PROMPT, make_phantom
from cffa_core.editing.denoiser import BaseAlone
from cffa_core.editing.editor import PairEditor, SourcePair
from cffa_core.evaluation.findings import FindingsClassifier
from cffa_core.jobs.edit_spec import EditSettings
from cffa_core.models.base import Base


def test_haemorrhages_that_are_added_are_seen_in_both_images(tiny: Base) -> None:
    eye = make_phantom(rng.derive_seed(990_000, "edit", 0), 512, findings=frozenset(), phase="late")
    settings = EditSettings.model_validate(
        {
            "count": 1,
            "edits": [{"text": "haemorrhages", "strength": 8.0}],
            "resolution": 512,
            "steps": 12,
            "cf_sentence": f"{CF_PROMPT}, with {{}}",
            "fa_sentence": f"{FA_PROMPT}, with {{}}",
        }
    )
    edited = PairEditor(BaseAlone(tiny), settings).edit(SourcePair(0, "healthy", eye.cf, eye.fa))
    judge = FindingsClassifier.load()
    for modality, before, after in (("cf", eye.cf, edited.cf), ("fa", eye.fa, edited.fa)):
        seen = [float(judge.predict(modality, shown(image))["haemorrhage"]) for image in (before, after)]
        assert seen[0] < 0.1 and seen[1] > 0.5, (modality, seen)


def shown(image: Bytes) -> torch.Tensor:
    colour = image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2)
    return torch.from_numpy(colour.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
