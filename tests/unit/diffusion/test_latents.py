"""The latent cache: one posterior per variant, encoded when first drawn, and the same whenever that is."""

from __future__ import annotations

import pytest
import torch

from cffa_core import rng
from cffa_core.data.pairs import PairSet, load_pairs, turn
from cffa_core.diffusion.latents import LatentCache, Variant, View, colour_variant, draw_variant
from cffa_core.models.base import Base
from tests.pair_folder import write_pair_folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> PairSet:
    return load_pairs(write_pair_folder(tmp_path_factory.mktemp("data"), n=3), 64)


def both(pair: View) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    return {"cf": (pair.cf, pair.valid_cf), "fa": (pair.fa.expand(3, -1, -1), pair.valid_fa)}


def cache_of(pairs: PairSet, base: Base) -> LatentCache:
    return LatentCache(pairs, base.encode_images, turn, both, seed=1)


def test_a_variant_is_encoded_from_the_turned_image(pairs: PairSet, base: Base) -> None:
    moments = cache_of(pairs, base).moments(1, Variant(turn=5))
    for m, image in (("cf", pairs[1].cf), ("fa", pairs[1].fa.repeat(3, 1, 1))):
        raw = base.vae.encode(turn(image, 5)[None]).latent_dist
        torch.testing.assert_close(moments[m].mean, raw.mean[0] * 0.18215)
        torch.testing.assert_close(torch.exp(moments[m].logvar / 2), raw.std[0] * 0.18215)
    assert not torch.allclose(moments["cf"].mean, turn(cache_of(pairs, base).moments(1, Variant()).pop("cf").mean, 5))


def test_each_variant_is_encoded_once_and_only_when_drawn(pairs: PairSet, base: Base) -> None:
    calls = []

    def encode(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(images.shape)
        return base.encode_images(images)

    cache = LatentCache(pairs, encode, turn, both, seed=1)
    assert calls == []
    for _ in range(3):
        cache.moments(0, Variant(turn=2))
    assert calls == [(1, 3, 64, 64)] * 2
    cache.moments(0, Variant(turn=3))
    assert len(calls) == 4


def test_moments_do_not_depend_on_what_was_drawn_before(pairs: PairSet, base: Base) -> None:
    first, second = cache_of(pairs, base), cache_of(pairs, base)
    first.moments(0, Variant(turn=7))
    a, b = first.moments(2, Variant(turn=1)), second.moments(2, Variant(turn=1))
    assert torch.equal(a["cf"].mean, b["cf"].mean) and torch.equal(a["fa"].logvar, b["fa"].logvar)


def test_masks_turn_with_the_image(pairs: PairSet, base: Base) -> None:
    moments = cache_of(pairs, base).moments(0, Variant(turn=1))
    assert moments["cf"].valid.all()
    expected = turn(pairs[0].valid_fa, 1)[:, ::8, ::8]
    assert torch.equal(moments["fa"].valid, expected) and not expected.all()


def test_a_draw_follows_the_posterior(pairs: PairSet, base: Base) -> None:
    moments = cache_of(pairs, base).moments(0, Variant())["cf"]
    draws = torch.stack([moments.sample(rng.generator("draw", i)) for i in range(400)])
    spread = torch.exp(moments.logvar / 2)
    assert ((draws.mean(0) - moments.mean).abs() < 5 * spread / 20).all()
    assert (draws.std(0) / spread - 1).abs().mean() < 0.05


def test_colour_variants_are_fixed_and_touch_cf_only(pairs: PairSet, base: Base) -> None:
    plain, coloured = (cache_of(pairs, base).moments(0, Variant(colour=c)) for c in (0, 2))
    assert torch.equal(plain["fa"].mean, coloured["fa"].mean)
    assert not torch.allclose(plain["cf"].mean, coloured["cf"].mean)
    image = pairs[0].cf
    assert torch.equal(colour_variant(image, 1, "a", 2), colour_variant(image, 1, "a", 2))
    assert not torch.equal(colour_variant(image, 1, "a", 2), colour_variant(image, 1, "a", 1))
    assert colour_variant(image, 1, "a", 2).abs().max() <= 1


def test_variants_are_drawn_evenly() -> None:
    generator = rng.generator("variants")
    drawn = [draw_variant(generator, "dihedral", 2) for _ in range(2400)]
    counts = [drawn.count(Variant(t, c)) for t in range(8) for c in range(3)]
    assert sum(counts) == 2400 and min(counts) > 60
    assert {draw_variant(generator, "none", 0) for _ in range(9)} == {Variant()}
