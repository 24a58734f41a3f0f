"""The gate of a generation: which pairs count, and how a slot that got a bad one is filled (docs/gates.md).

Slot i tries the seeds ``pair_seed(seed, i, k)`` in order. A pair is judged by its own scores alone, and its pixels
depend on its seed alone; so what fills a slot depends neither on time nor on which tries share a batch. Knows no files.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from cffa_core.errors import InvalidSpec, Problem
from cffa_core.evaluation.pair_scores import ALIGNMENT, TrainingPairs
from cffa_core.jobs.spec import GateSpec
from cffa_core.methods.pair_sampler import NewPair

TOO_LITTLE_ALIGNED, TOO_SIMILAR, NOT_SCORED = "too_little_aligned", "too_similar_to_training", "not_scored"

Try = tuple[int, int]
Draw = Callable[[Sequence[Try], int, int], list[NewPair]]


def check_gate(gate: GateSpec | None, training: TrainingPairs | None) -> None:
    """Raise ``InvalidSpec`` (pointer ``/gate/max_similarity_to_training``) if novelty is asked for and unknown."""
    if gate is None or gate.max_similarity_to_training is None or training is not None:
        return
    message = (
        "the pairs that this model was trained on are not known here, so nothing can be compared with them; take a "
        "model whose training still exists, or leave max_similarity_to_training out"
    )
    raise InvalidSpec(message, problems=(Problem("/gate/max_similarity_to_training", "training_unknown", message),))


def refusals(gate: GateSpec | None, pair: NewPair) -> tuple[str, ...]:
    """Why a scored pair does not pass; empty if it does. A pair that could not be scored does not."""
    found = []
    if gate is not None and gate.min_alignment is not None:
        if pair.alignment is None:
            found.append(NOT_SCORED)
        elif pair.alignment[ALIGNMENT] < gate.min_alignment:
            found.append(TOO_LITTLE_ALIGNED)
    if gate is not None and gate.max_similarity_to_training is not None:
        assert pair.novelty is not None  # check_gate
        if pair.novelty["similarity"] > gate.max_similarity_to_training:
            found.append(TOO_SIMILAR)
    return tuple(found)


def fill_slots(
    slots: Sequence[Try], gate: GateSpec | None, batch_size: int, draw: Draw
) -> Iterator[tuple[NewPair, tuple[str, ...]]]:
    """Fill ``slots``, (index, first try) each; yield every pair that was drawn with why it was refused (``()``: taken).

    ``draw(tries, number, total)`` draws and scores one batch; it is told how many batches came before and how many
    there will be if no further pair is refused. Retries of several slots share batches.
    """
    waiting = deque(slots)
    number = 0
    while waiting:
        batch = [waiting.popleft() for _ in range(min(batch_size, len(waiting)))]
        for pair in draw(batch, number, number + 1 + math.ceil(len(waiting) / batch_size)):
            reasons = refusals(gate, pair)
            yield pair, reasons
            if reasons and gate is not None and pair.attempt + 1 < gate.max_tries:
                waiting.append((pair.index, pair.attempt + 1))
        number += 1


def exhausted(rejected: Iterable[Mapping[str, Any]], filled: Iterable[int]) -> list[dict[str, Any]]:
    """Slots that no pair filled, by index: number of tries, and the best that any try reached of each score.

    ``rejected`` are the entries of refused pairs (``NewPair.save``), ``filled`` the indices that were filled.
    """
    taken = set(filled)
    slots: dict[int, list[Mapping[str, Any]]] = {}
    for entry in rejected:
        if entry["index"] not in taken:
            slots.setdefault(entry["index"], []).append(entry)
    return [
        {
            "index": index,
            "tries": len(entries),
            "best_alignment": max((e["alignment"][ALIGNMENT] for e in entries if e["alignment"]), default=None),
            "least_similarity": min((e["novelty"]["similarity"] for e in entries if e["novelty"]), default=None),
        }
        for index, entries in sorted(slots.items())
    ]
