"""The guidance of one step of an edit: what the words change, where, for both images at once (METHODS 5).

``sum_c (+/-) s_c (eps_c - eps_uncond) * M_c``, LEDITS++ (Brack et al. 2024, equations 3 to 6) without momentum. The
one difference from it is that ``M_c`` is joined over CF and FA. Knows no UNet and no solver.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cffa_core.editing.masks import GUIDANCE_MASK_FROM, MaskMode, attention_mask, guidance_mask, join
from cffa_core.jobs.edit_spec import EditTerm


@dataclass(frozen=True)
class EncodedEdit:
    """An edit with its text for CF and FA: ``text (2, 77, D)`` and the positions of its ``words`` in each."""

    term: EditTerm
    text: torch.Tensor
    words: tuple[tuple[int, ...], tuple[int, ...]]

    def acts_at(self, i: int) -> bool:
        """Whether the edit acts at step ``i``: from its warmup on, until its cooldown."""
        return self.term.warmup <= i and (self.term.cooldown is None or i < self.term.cooldown)


def edit_guidance(
    edits: Sequence[EncodedEdit],
    reference: torch.Tensor,
    conditional: torch.Tensor,
    maps: torch.Tensor,
    t: int,
    mode: MaskMode,
    within: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Guidance ``(2, C, h, w)`` of all ``edits`` at timestep ``t``, and the mask ``(h, w)`` of where there is any.

    ``reference (2, C, h, w)`` (without a prompt) and ``conditional (E, 2, C, h, w)`` are noise predictions of CF and
    FA, ``maps (E, 2, 77, s, s)`` the cross-attention of all tokens; ``within (h, w)`` bool, where edits may act at all.
    """
    size = (reference.shape[-2], reference.shape[-1])
    total = torch.zeros_like(reference)
    touched = torch.zeros(size, dtype=torch.bool, device=reference.device)
    for edit, predicted, attention in zip(edits, conditional, maps, strict=True):
        term = edit.term
        sign = 1.0 if term.direction == "add" else -1.0
        guidance = sign * term.strength * (predicted - reference)
        own = torch.cat(
            [
                attention_mask(seen[None, list(words)], term.threshold, size, within)
                for seen, words in zip(attention, edit.words, strict=True)
            ]
        )
        if t <= GUIDANCE_MASK_FROM:
            own = own * guidance_mask(guidance, term.threshold, within)
        mask = join(own, mode)
        total = total + guidance * mask
        touched |= mask[0, 0] > 0
    return total, touched
