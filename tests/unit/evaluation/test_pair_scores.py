"""Scores of single pairs: the same as those of sets, copies are found and named, and the file of thumbnails."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from cffa_core.data.contracts import PairImages
from cffa_core.errors import CorruptArtifact
from cffa_core.evaluation.alignment import score_set
from cffa_core.evaluation.pair_scores import TrainingPairs, score_pairs
from cffa_core.evaluation.scores import SCORES


@pytest.fixture(scope="module")
def training(small_phantoms: list[PairImages]) -> TrainingPairs:
    return TrainingPairs.of(((f"m{i:03d}", images) for i, images in enumerate(small_phantoms[:10])), "ab" * 32)


def test_alignment_is_what_an_evaluation_says(phantoms: list[PairImages]) -> None:
    (found,) = score_pairs([(phantoms[0].cf, phantoms[0].fa)])
    assert found.alignment is not None and found.novelty is None
    (expected,) = score_set([("a", "a", phantoms[0])], repeats=0).pairs
    assert expected.true is not None and set(found.alignment) == set(SCORES)
    # The evaluation was given the true aperture, the scores of a made pair have to find it.
    assert found.alignment["ridge_correlation"] == pytest.approx(expected.true["ridge_correlation"], abs=0.02)


def test_a_pair_of_two_eyes_scores_lower_than_either(phantoms: list[PairImages]) -> None:
    one, two, mixed = score_pairs(
        [(phantoms[0].cf, phantoms[0].fa), (phantoms[1].cf, phantoms[1].fa), (phantoms[0].cf, phantoms[1].fa)]
    )
    assert one.alignment is not None and two.alignment is not None and mixed.alignment is not None
    least = min(one.alignment["ridge_correlation"], two.alignment["ridge_correlation"])
    assert mixed.alignment["ridge_correlation"] < least - 0.2


def test_a_pair_that_shows_nothing_has_no_alignment(training: TrainingPairs) -> None:
    black = (np.zeros((96, 96, 3), np.uint8), np.zeros((96, 96), np.uint8))
    (found,) = score_pairs([black], training)
    assert found.alignment is None
    assert found.novelty is not None and found.novelty["similarity"] == 0


def test_a_planted_copy_is_found_and_named(training: TrainingPairs, small_phantoms: list[PairImages]) -> None:
    """Turned, darker and noisy, among pairs that the training never saw."""
    copy = small_phantoms[7]
    noise = np.random.default_rng(0).normal(0, 3, (96, 96))
    cf = np.clip(np.rot90(copy.cf) * 0.9 + noise[..., None], 0, 255).astype(np.uint8)
    fa = np.clip(np.rot90(copy.fa) * 0.9 + noise, 0, 255).astype(np.uint8)
    new = [(images.cf, images.fa) for images in small_phantoms[50:54]]
    *others, planted = (scores.novelty for scores in score_pairs([*new, (cf, fa)], training))
    assert planted is not None and planted["nearest"] == "m007"
    assert planted["similarity"] > 0.95
    assert all(other is not None and other["similarity"] < 0.8 for other in others)


def test_the_file_gives_the_same_bytes_and_the_same_scores(
    training: TrainingPairs, small_phantoms: list[PairImages], tmp_path: Path
) -> None:
    training.write(tmp_path / "a")
    training.write(tmp_path / "b")
    read = TrainingPairs.read(tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert (read.names, read.dataset_digest) == (training.names, "ab" * 32)
    pair = [(small_phantoms[60].cf, small_phantoms[60].fa)]
    assert score_pairs(pair, read) == score_pairs(pair, training)


def test_any_other_file_is_refused(training: TrainingPairs, tmp_path: Path) -> None:
    path = tmp_path / "novelty.safetensors"
    training.write(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorruptArtifact, match="not readable"):
        TrainingPairs.read(path)
    thumbnails = {"thumbnails": np.zeros((1, 2, 64, 64), np.float16)}
    for metadata in (
        None,
        {"cffa": json.dumps({"format": "cffa-novelty/9"})},
        {"cffa": json.dumps({"format": "cffa-novelty/1", "dataset_digest": "d", "names": ["a", "b"]})},
    ):
        path.write_bytes(save(thumbnails, metadata=metadata))
        with pytest.raises(CorruptArtifact):
            TrainingPairs.read(path)
