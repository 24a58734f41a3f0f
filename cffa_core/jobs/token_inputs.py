"""What placeholder tokens need of a data set, and which of them a model has (METHODS 6), asked when a job is posted."""

from __future__ import annotations

import sqlalchemy as sa

from cffa_core.errors import InvalidSpec, Problem
from cffa_core.jobs.catalog import get_dataset, get_model
from cffa_core.jobs.spec import GenerationSpec, TokensSpec, check_tokens


def without_masks(connection: sa.Connection, owner: str, dataset_id: str, tokens: TokensSpec) -> list[Problem]:
    """A problem for each token of which no pair of a data set has a mask, as its report says.

    That a mask is empty in every pair is found when the training begins.
    """
    pairs = get_dataset(connection, owner, dataset_id).report.get("pairs", ())
    there = {mask for pair in pairs for mask in pair.get("masks", ())}
    problems = []
    for place, token in enumerate(tokens.tokens):
        if token.mask_names and not there.intersection(token.mask_names):
            wanted = " or ".join(f"masks/{name}/NAME.png" for name in token.mask_names)
            message = f"data set {dataset_id} has no masks for token {token.name!r}; upload it with {wanted}"
            problems.append(Problem(f"/tokens/tokens/{place}", "missing_mask", message))
    return problems


def unknown_tokens(connection: sa.Connection, owner: str, spec: GenerationSpec) -> list[Problem]:
    """A problem if a model is asked for placeholder tokens that it does not have."""
    trained = get_model(connection, owner, spec.model_id).card.get("settings", {}).get("tokens") or {}
    try:
        check_tokens([token["name"] for token in trained.get("tokens", ())], spec.tokens)
    except InvalidSpec as error:
        return list(error.problems)
    return []
