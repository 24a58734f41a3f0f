"""Damage to the images of pairs, in known amounts, and the features of what is left."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import cv2
import numpy as np

from cffa_core.data.contracts import PairImages
from cffa_core.evaluation.features import Collector, FeatureSet, load_extractor

Change = Callable[[PairImages, np.random.Generator], PairImages]


def blurred(sigma: float) -> Change:
    """Both images through a Gaussian blur."""

    def change(images: PairImages, _: np.random.Generator) -> PairImages:
        cf, fa = (cv2.GaussianBlur(image, (0, 0), sigma) for image in (images.cf, images.fa))
        return PairImages(cf, fa, images.valid_cf, images.valid_fa)

    return change


def noised(sigma: float) -> Change:
    """Both images with Gaussian noise, in grey levels."""

    def change(images: PairImages, random: np.random.Generator) -> PairImages:
        cf, fa = ((i + random.normal(0, sigma, i.shape)).clip(0, 255).astype(np.uint8) for i in (images.cf, images.fa))
        return PairImages(cf, fa, images.valid_cf, images.valid_fa)

    return change


def recoloured(amount: float) -> Change:
    """CF with less red and more blue, FA darkened by a gamma."""

    def change(images: PairImages, _: np.random.Generator) -> PairImages:
        cf = (images.cf * np.array([1 - amount, 1, 1 + amount])).clip(0, 255).astype(np.uint8)
        fa = (255 * (images.fa / 255.0) ** (1 + 2 * amount)).astype(np.uint8)
        return PairImages(cf, fa, images.valid_cf, images.valid_fa)

    return change


CHANGES = {
    "none": [lambda images, _: images],
    "blur": [blurred(sigma) for sigma in (0.5, 1.5)],
    "noise": [noised(sigma) for sigma in (4.0, 12.0)],
    "colour": [recoloured(amount) for amount in (0.1, 0.3)],
}


def features_of(pairs: Sequence[PairImages], eyes: Sequence[str], change: Change) -> FeatureSet:
    """Features by the default extractor, after a change of the pixels."""
    collector, random = Collector(load_extractor("filters")), np.random.default_rng(0)
    for eye, images in zip(eyes, pairs, strict=True):
        collector.add(eye, change(images, random))
    return collector.result()
