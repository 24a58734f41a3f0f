"""The mask of a pair that a placeholder token stands for: the data set's own, a union, or Frangi's (METHODS 6)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from cffa_core.data import vessel_map
from cffa_core.data.pairs import Pair
from cffa_core.errors import InvalidDataset, Problem
from cffa_core.jobs.spec import TokenSpec, TokensSpec


def masks_to_load(tokens: TokensSpec | None) -> tuple[str, ...]:
    """Names of the masks that a training needs: all that its tokens mean, and the vessels that others may want."""
    found = {"vessel"} | {name for token in (tokens.tokens if tokens else ()) for name in token.mask_names}
    return tuple(sorted(found))


def token_mask(pair: Pair, token: TokenSpec) -> torch.Tensor | None:
    """Where the token is in a pair, ``(H, W)`` bool; None if the pair has no mask for it (it may have an empty one)."""
    if token.source == "frangi":
        cf = ((pair.cf + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
        return torch.from_numpy(np.ascontiguousarray(vessel_map.frangi_vessels(cf, pair.valid_cf[0].numpy())))
    names: Sequence[str] = token.mask_names
    if token.masks is None and token.name in pair.masks:
        names = (token.name,)
    found = [pair.masks[name] for name in names if name in pair.masks]
    return torch.stack(found).any(0) if found else None


def require_masks(pairs: Sequence[Pair], tokens: TokensSpec) -> None:
    """Raise ``InvalidDataset`` naming every token of which no pair has a mask, or only empty ones.

    A single pair without a mask, or with an empty one, is no fault: the token is left out of that pair's prompts.
    """
    problems = []
    for place, token in enumerate(tokens.tokens):
        if token.source == "frangi":
            continue
        masks = [mask for pair in pairs if (mask := token_mask(pair, token)) is not None]
        if any(bool(mask.any()) for mask in masks):
            continue
        wanted = " or ".join(f"masks/{name}/NAME.png" for name in token.mask_names)
        if masks:
            code, what = "empty_mask", f"all {len(masks)} masks of token {token.name!r} are empty"
        else:
            code, what = "missing_mask", f"no pair has a mask for token {token.name!r}"
        message = f"{what}; add {wanted} to the data set, or leave the token out"
        problems.append(Problem(f"/tokens/tokens/{place}", code, message))
    if problems:
        listed = "; ".join(problem.message for problem in problems)
        raise InvalidDataset(f"the pairs lack masks of tokens: {listed}", problems=tuple(problems))
