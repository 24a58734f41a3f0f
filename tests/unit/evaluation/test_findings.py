"""The classifier of findings: what it tells apart, what it refuses, and that it depends on nothing but the image."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from cffa_core.data.phantom import make_phantom
from cffa_core.errors import CorruptArtifact, InvalidSpec, ModelUnavailable, NotFound
from cffa_core.evaluation.findings import CARD, SEEN, SHIPPED, FindingsClassifier, FindingsNet, Modality, at_side

SEEDS = (900_001, 900_002, 900_003)


@pytest.fixture(scope="module")
def classifier() -> FindingsClassifier:
    """The shipped one."""
    return FindingsClassifier.load()


def phantom_images(seed: int, findings: frozenset[str]) -> dict[Modality, torch.Tensor]:
    """CF and FA (1, 3, 512, 512) in [-1, 1] of one procedural eye in the late phase."""
    made = make_phantom(seed, 512, findings=findings, phase="late")
    cf = torch.from_numpy(made.cf).permute(2, 0, 1)[None].float() / 127.5 - 1
    fa = torch.from_numpy(made.fa)[None, None].float() / 127.5 - 1
    return {"cf": cf, "fa": fa.expand(-1, 3, -1, -1)}


def test_sees_the_findings_of_procedural_eyes_and_none_in_healthy_ones(classifier: FindingsClassifier) -> None:
    everything = frozenset({"haemorrhage", "exudate", "microaneurysm", "leakage"})
    right = {False: 0, True: 0}
    asked = 0
    for seed in SEEDS:
        for ill in (False, True):
            images = phantom_images(seed, everything if ill else frozenset())
            for modality, names in SEEN.items():
                seen = classifier.seen(modality, images[modality])[0]
                right[ill] += len(seen) if ill else len(names) - len(seen)
                asked += len(names)
    assert right[True] >= 0.8 * asked / 2
    assert right[False] >= 0.8 * asked / 2


def test_each_finding_raises_its_own_probability_most(classifier: FindingsClassifier) -> None:
    healthy, bleeding = (phantom_images(SEEDS[0], frozenset(names)) for names in ([], ["haemorrhage"]))
    for modality in SEEN:
        before = classifier.strength(modality, healthy[modality])[0]
        after = classifier.strength(modality, bleeding[modality])[0]
        assert int((after - before).argmax()) == SEEN[modality].index("haemorrhage")


def test_an_image_is_judged_alone(classifier: FindingsClassifier) -> None:
    images = torch.rand(3, 3, 96, 96, generator=torch.Generator().manual_seed(5)) * 2 - 1
    together = classifier.predict("cf", images)
    for row in range(3):
        alone = classifier.predict("cf", images[row : row + 1])
        assert all(torch.equal(alone[name][0], together[name][row]) for name in SEEN["cf"])


def test_an_angiogram_has_no_colour(classifier: FindingsClassifier) -> None:
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(6)) * 2 - 1
    permuted = classifier.strength("fa", image[:, [2, 0, 1]])
    assert torch.allclose(classifier.strength("fa", image), permuted, atol=1e-4)
    assert not torch.allclose(classifier.strength("cf", image), classifier.strength("cf", image[:, [2, 0, 1]]))


def test_larger_images_are_averaged_down() -> None:
    image = torch.rand(1, 3, 1024, 1024, generator=torch.Generator().manual_seed(7))
    assert torch.allclose(at_side(image), torch.nn.functional.avg_pool2d(image, 2), atol=1e-6)


@pytest.mark.parametrize(
    ("modality", "images", "code"),
    [
        ("oct", torch.zeros(1, 3, 64, 64), "bad_modality"),
        ("cf", torch.zeros(1, 1, 64, 64), "bad_shape"),
        ("fa", torch.zeros(3, 64, 64), "bad_shape"),
        ("cf", torch.zeros(0, 3, 64, 64), "bad_shape"),
        ("cf", torch.zeros(1, 3, 64, 96), "bad_shape"),
        ("cf", torch.zeros(1, 3, 32, 32), "bad_shape"),
        ("cf", torch.full((1, 3, 64, 64), 255.0), "bad_range"),
        ("cf", torch.full((1, 3, 64, 64), float("nan")), "bad_range"),
    ],
)
def test_refuses_what_it_cannot_judge(
    classifier: FindingsClassifier, modality: Modality, images: torch.Tensor, code: str
) -> None:
    with pytest.raises(InvalidSpec) as refused:
        classifier.predict(modality, images)
    assert refused.value.problems[0].code == code


def test_refuses_folders_that_hold_no_whole_classifier(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="findings-train"):
        FindingsClassifier.load(tmp_path)
    broken = tmp_path / "broken"
    shutil.copytree(SHIPPED, broken)
    weights = bytearray((broken / "cf.safetensors").read_bytes())
    weights[-1] ^= 1
    (broken / "cf.safetensors").write_bytes(weights)
    with pytest.raises(CorruptArtifact, match=r"cf\.safetensors"):
        FindingsClassifier.load(broken)
    (broken / CARD).write_text(json.dumps({"format": "another/1"}))
    with pytest.raises(ModelUnavailable, match="train the classifier anew"):
        FindingsClassifier.load(broken)


def test_the_shipped_files_are_small_and_their_figures_good() -> None:
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) < 3_000_000
    measured = json.loads((SHIPPED / CARD).read_text())["measured"]
    plain = {(row["modality"], row["finding"]): row for row in measured if row["side"] == 512 and not row["decoded"]}
    assert set(plain) == {(modality, name) for modality, names in SEEN.items() for name in names}
    for (_, name), row in plain.items():
        assert row["auc"]["n"] >= 300
        assert row["auc"]["low"] > (0.75 if name == "microaneurysm" else 0.95)


def test_a_cell_sees_its_surroundings_and_no_more() -> None:
    torch.manual_seed(0)
    net = FindingsNet().eval()
    image = torch.rand(1, 3, 512, 512, generator=torch.Generator().manual_seed(1)).requires_grad_()
    net(image)[0, :, 32, 32].sum().backward()
    assert image.grad is not None
    rows, columns = torch.nonzero(image.grad[0].abs().sum(0), as_tuple=True)
    reach = max(int((256 - rows).abs().max()), int((256 - columns).abs().max()))
    assert 120 < reach <= 170
    assert np.isfinite(image.grad.numpy()).all()
