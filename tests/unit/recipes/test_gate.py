"""The gate: seeds per try, what is refused and why, slots that stay empty; and one pair made once more."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cffa_core.data.contracts import PairImages
from cffa_core.data.field_of_view import field_of_view
from cffa_core.errors import InvalidSpec
from cffa_core.evaluation.pair_scores import TrainingPairs
from cffa_core.jobs.context import FolderContext
from cffa_core.jobs.spec import GateSpec, GenerateSettings, LoraSpec, SamplerSpec, TrainSettings
from cffa_core.methods.dual_unet import DualUnet
from cffa_core.methods.pair_sampler import NewPair, PairSampler
from cffa_core.models.base import Base
from cffa_core.recipes.archive import verify_archive, write_part_archive
from cffa_core.recipes.gate import fill_slots
from cffa_core.recipes.generate import generate_part, load_sampler
from cffa_core.recipes.regenerate import one_pair
from cffa_core.rng import derive_seed, pair_seed

TRIES = 3


def settings_of(**options: Any) -> GenerateSettings:
    defaults: dict[str, Any] = {"count": 5, "part_size": 5, "batch_size": 2, "resolution": 64, "seed": 3}
    return GenerateSettings(**(defaults | {"sampler": SamplerSpec(steps=2)} | options))


@pytest.fixture(scope="module")
def sampler(base: Base, tmp_path_factory: pytest.TempPathFactory) -> PairSampler:
    folder = tmp_path_factory.mktemp("model") / "model"
    trained = DualUnet(base, TrainSettings(lora=LoraSpec(rank=2)), noise_rotation=-np.eye(4))
    trained.save(folder, dataset_digest="d", validation=None)
    return load_sampler(settings_of(), folder, base.folder)


def draw(
    sampler: PairSampler, out: Path, part: int = 0, training: TrainingPairs | None = None, **options: Any
) -> dict[str, Any]:
    return generate_part(sampler, settings_of(**options), part, out, FolderContext(out / "c"), None, training)


@pytest.fixture(scope="module")
def tries(sampler: PairSampler, tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Any]]]:
    """Entries of every slot at every try, each drawn by itself: ``tries[k][index]``."""
    folder = tmp_path_factory.mktemp("tries")
    return [draw(sampler, folder / str(k), only=tuple((index, k) for index in range(5)))["pairs"] for k in range(TRIES)]


@pytest.fixture(scope="module")
def threshold(tries: list[list[dict[str, Any]]]) -> float:
    """A least ridge correlation that some first tries reach, and some slots never do."""
    found = [[entry["alignment"]["ridge_correlation"] for entry in attempt] for attempt in tries]
    best = sorted(max(values) for values in zip(*found, strict=True))
    return (best[1] + best[2]) / 2


def expected(tries: list[list[dict[str, Any]]], least: float) -> dict[int, dict[str, Any]]:
    """What fills each slot, worked out from all tries."""
    filled: dict[int, dict[str, Any]] = {}
    for index in range(5):
        good = [t[index] for t in tries if t[index]["alignment"]["ridge_correlation"] >= least]
        filled |= {index: good[0]} if good else {}
    return filled


def test_a_gate_that_refuses_nothing_changes_nothing(sampler: PairSampler, tmp_path: Path) -> None:
    plain = draw(sampler, tmp_path / "plain")
    assert draw(sampler, tmp_path / "gated", gate=GateSpec(min_alignment=-1)) == plain
    assert plain["exhausted"] == []
    assert [pair["seed"] for pair in plain["pairs"]] == [pair_seed(3, index) for index in range(5)]
    assert not (tmp_path / "gated" / "rejects").exists()


def test_each_try_has_its_own_seed() -> None:
    assert pair_seed(3, 4) == pair_seed(3, 4, 0) == derive_seed(3, "pair", 4)
    assert pair_seed(3, 4, 2) == derive_seed(3, "pair", 4, 2)
    assert len({pair_seed(3, index, k) for index in range(50) for k in range(50)}) == 2500


@pytest.mark.parametrize("part_size", [1, 2, 5])
def test_a_slot_takes_the_first_try_that_passes_in_any_grid(
    sampler: PairSampler, tries: list[list[dict[str, Any]]], threshold: float, part_size: int, tmp_path: Path
) -> None:
    gate = GateSpec(min_alignment=threshold, max_tries=TRIES)
    settings = settings_of(gate=gate, part_size=part_size)
    parts = [
        draw(sampler, tmp_path / str(p), p, gate=gate, part_size=part_size) for p in reversed(range(settings.parts))
    ]
    wanted = expected(tries, threshold)
    assert 0 < len(wanted) < 5 and any(entry["try"] for entry in wanted.values()), "the test needs all cases"
    assert {pair["index"]: pair for part in parts for pair in part["pairs"]} == wanted
    empty = sorted(slot["index"] for part in parts for slot in part["exhausted"])
    assert empty == sorted(set(range(5)) - set(wanted))


def test_refused_pairs_are_kept_with_the_reason(
    sampler: PairSampler, tries: list[list[dict[str, Any]]], threshold: float, tmp_path: Path
) -> None:
    found = draw(sampler, tmp_path / "part", gate=GateSpec(min_alignment=threshold, max_tries=TRIES))
    wanted = expected(tries, threshold)
    refused = {(i, k) for i in range(5) for k in range(wanted[i]["try"] if i in wanted else TRIES)}
    index = write_part_archive(tmp_path / "part" / "rejects", tmp_path / "rejects.zip", {}, rejects=True)
    manifest = verify_archive(tmp_path / "rejects.zip")
    assert manifest["format"] == "cffa-rejects/1" and "exhausted" not in manifest
    assert [(entry["index"], entry["try"]) for entry in manifest["pairs"]] == sorted(refused)
    for entry, located in zip(manifest["pairs"], index["pairs"], strict=True):
        assert entry["reasons"] == ["too_little_aligned"]
        alone = tries[entry["try"]][entry["index"]]
        assert entry["cf"]["name"] == f"cf/{entry['index']:06d}.try{entry['try']:02d}.png"
        assert entry["cf"]["sha256"] == alone["cf"]["sha256"] and entry["alignment"] == alone["alignment"]
        image = (tmp_path / "rejects.zip").read_bytes()[located["fa"]["offset"] :][: located["fa"]["size"]]
        assert hashlib.sha256(image).hexdigest() == alone["fa"]["sha256"]
    for slot in found["exhausted"]:
        scores = [attempt[slot["index"]]["alignment"]["ridge_correlation"] for attempt in tries]
        assert (slot["tries"], slot["best_alignment"], slot["least_similarity"]) == (TRIES, max(scores), None)


def test_a_gate_that_nothing_passes_ends_with_empty_slots(sampler: PairSampler, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    context = FolderContext(tmp_path, lambda _, done, total: seen.append((done, total)))
    settings = settings_of(gate=GateSpec(min_alignment=1, max_tries=2), count=3)
    found = generate_part(sampler, settings, 0, tmp_path / "part", context)
    assert found["pairs"] == [] and [slot["tries"] for slot in found["exhausted"]] == [2, 2, 2]
    # 3 slots in batches of 2: two batches are foreseen, each refused pair adds to what waits.
    assert seen == [(1, 4), (2, 4), (3, 6), (4, 6), (5, 6), (6, 6)]
    written = write_part_archive(tmp_path / "part", tmp_path / "part.zip", {"spec": {}})
    assert written["pairs"] == [] and len(verify_archive(tmp_path / "part.zip")["exhausted"]) == 3


def test_a_copy_of_a_training_pair_is_refused(sampler: PairSampler, tmp_path: Path) -> None:
    """The training pairs are made to hold what slot 1 would get at its first try."""
    plain = draw(sampler, tmp_path / "plain")
    cf, fa = (np.asarray(Image.open(tmp_path / "plain" / plain["pairs"][1][m]["name"])) for m in ("cf", "fa"))
    images = PairImages(cf, fa, field_of_view(cf), field_of_view(fa))
    training = TrainingPairs.of([("patient", images)], "d")
    gate = GateSpec(max_similarity_to_training=0.99)
    found = draw(sampler, tmp_path / "gated", training=training, gate=gate)
    assert [pair["try"] for pair in found["pairs"]] == [0, 1, 0, 0, 0]
    assert all(pair["novelty"]["similarity"] <= 0.99 for pair in found["pairs"])
    (refused,) = json.loads((tmp_path / "gated" / "rejects" / "part.json").read_text())["pairs"]
    assert refused["reasons"] == ["too_similar_to_training"]
    assert refused["novelty"]["nearest"] == "patient" and refused["novelty"]["similarity"] > 0.999


def test_similarity_to_unknown_pairs_is_refused(sampler: PairSampler, tmp_path: Path) -> None:
    with pytest.raises(InvalidSpec) as caught:
        draw(sampler, tmp_path, gate=GateSpec(max_similarity_to_training=0.5))
    assert [problem.pointer for problem in caught.value.problems] == ["/gate/max_similarity_to_training"]


@pytest.mark.parametrize("gated", [False, True])
def test_one_pair_can_be_made_once_more(
    sampler: PairSampler, tries: list[list[dict[str, Any]]], threshold: float, gated: bool, tmp_path: Path
) -> None:
    gate = GateSpec(min_alignment=threshold, max_tries=TRIES) if gated else None
    whole = draw(sampler, tmp_path / "whole", gate=gate)["pairs"]
    pair = max(whole[:-1], key=lambda entry: (entry["try"], entry["index"]))
    settings = one_pair(settings_of(gate=gate), pair)
    (again,) = generate_part(sampler, settings, 0, tmp_path / "again", FolderContext(tmp_path))["pairs"]
    assert again == pair and bool(pair["try"]) == gated
    assert settings.parts == 1 and list(settings.part_range(0)) == [pair["index"]]


def test_retries_of_several_slots_share_a_batch() -> None:
    batches: list[tuple[list[tuple[int, int]], int, int]] = []

    def made(slots: Sequence[tuple[int, int]], number: int, total: int) -> list[NewPair]:
        batches.append((list(slots), number, total))
        scores = {(0, 0): 0.1, (1, 0): None, (2, 0): 0.9, (0, 1): 0.9, (1, 1): 0.9}
        found = [(index, k, scores[index, k]) for index, k in slots]
        return [
            NewPair(i, 0, None, None, 0.0, k, None if score is None else {"ridge_correlation": score})
            for i, k, score in found
        ]

    drawn = list(fill_slots([(0, 0), (1, 0), (2, 0)], GateSpec(min_alignment=0.5), 2, made))
    assert batches == [([(0, 0), (1, 0)], 0, 2), ([(2, 0), (0, 1)], 1, 3), ([(1, 1)], 2, 3)]
    reasons = {(pair.index, pair.attempt): why for pair, why in drawn}
    assert reasons == {
        (0, 0): ("too_little_aligned",), (1, 0): ("not_scored",), (2, 0): (), (0, 1): (), (1, 1): (),
    }  # fmt: skip
