"""A store holds what was asked for and nothing else, and its averages are those of numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from cffa_core.attention.layers import Layer, grid_of
from cffa_core.attention.store import AttentionStore, resized
from cffa_core.errors import InvalidSpec, ModelUnavailable

FINE, COARSE, MIDDLE = (
    Layer("down_blocks.0.attn2", "cross", "down"),
    Layer("up_blocks.0.attn2", "cross", "up"),
    Layer("mid_block.attn2", "cross", "mid"),
)
SIDES = {FINE: 8, COARSE: 4, MIDDLE: 2}


def filled(forwards: int = 3, **asked: Any) -> tuple[AttentionStore, dict[tuple[Layer, int], np.ndarray[Any, Any]]]:
    """A store that was told of ``steps`` forwards, and all maps that there were."""
    store, given = AttentionStore(**asked), {}
    draws = np.random.default_rng(0)
    for step in range(forwards):
        store.begin_step((8, 8))
        for layer, side in SIDES.items():
            given[layer, step] = maps = draws.random((2, 3, side, side), dtype=np.float32)
            if store.wants(layer, (side, side)):
                store.add(layer, torch.from_numpy(maps))
    return store, given


def test_the_running_mean_is_the_mean_over_steps() -> None:
    store, given = filled()
    wanted = np.mean([given[FINE, step] for step in range(3)], axis=0)
    np.testing.assert_allclose(store.maps(FINE.name), wanted, rtol=1e-6)
    assert store.numbers == sum(2 * 3 * side**2 for side in SIDES.values())


def test_only_layers_of_the_side_count_unless_maps_are_resized() -> None:
    store, given = filled(forwards=1)
    np.testing.assert_allclose(store.average(side=4), given[COARSE, 0])
    small = given[FINE, 0].reshape(2, 3, 4, 2, 4, 2).mean((3, 5))
    np.testing.assert_allclose(store.average(side=4, resize=True), (small + given[COARSE, 0]) / 2, rtol=1e-5)
    assert store.average(side=None).shape == (2, 3, 8, 8)
    np.testing.assert_allclose(store.average(side=None, places=("mid",)), given[MIDDLE, 0])
    np.testing.assert_allclose(store.average(side=8, resize=True, layers=(FINE.name,)), given[FINE, 0])


def test_each_step_is_kept_by_itself_where_that_is_asked_for() -> None:
    store, given = filled(keep="each", steps=(0, 2))
    assert store.kept_steps == (0, 2)
    np.testing.assert_allclose(store.average(side=8, steps=(2,)), given[FINE, 2])
    np.testing.assert_allclose(store.average(side=8), (given[FINE, 0] + given[FINE, 2]) / 2, rtol=1e-6)
    with pytest.raises(InvalidSpec, match=r"steps \[0, 2\]"):
        store.maps(FINE.name, steps=(1,))


def test_the_last_forward_alone_is_kept() -> None:
    store, given = filled(keep="last", sides=(8,))
    assert store.layers == (FINE,)
    np.testing.assert_allclose(store.maps(FINE.name), given[FINE, 2])
    store.clear()
    assert (store.layers, store.numbers, store.step) == ((), 0, -1)


def test_a_layer_counts_once_per_step() -> None:
    store = AttentionStore()
    store.begin_step((8, 8))
    for value in (1.0, 5.0):
        store.add(FINE, torch.full((1, 1, 8, 8), value))
    assert store.maps(FINE.name).unique().tolist() == [1.0]


def test_bringing_maps_to_a_side_bounds_what_is_held() -> None:
    store, given = filled(bring_to=2, places=("down", "up"))
    assert store.numbers == 2 * 2 * 3 * 2 * 2
    wanted = np.mean([given[FINE, step].reshape(2, 3, 2, 4, 2, 4).mean((3, 5)) for step in range(3)], axis=0)
    np.testing.assert_allclose(store.maps(FINE.name), wanted, rtol=1e-5)


def test_cross_maps_keep_their_values_and_self_maps_their_sum() -> None:
    maps = torch.rand(1, 1, 4, 8)
    assert resized(maps, 2, "cross").shape == (1, 1, 2, 4)
    assert resized(maps, 2, "cross").mean() == pytest.approx(float(maps.mean()))
    for height in (2, 8):
        assert resized(maps, height, "self").sum() == pytest.approx(float(maps.sum()), rel=0.05)


def test_asking_for_what_is_not_there_names_what_is() -> None:
    store, _ = filled()
    with pytest.raises(InvalidSpec, match=r"no cross-attention map of down, up at side 16; .* sides \[4, 8\]"):
        store.average()
    with pytest.raises(InvalidSpec, match="no map of layer 'other'"):
        store.maps("other")


@pytest.mark.parametrize(
    "asked",
    [
        {"kinds": ()},
        {"kinds": ("both",)},
        {"places": ("middle",)},
        {"kinds": ("self",)},
        {"points": ((0.5, 0.5),)},
        {"gradients": True},
    ],
)
def test_stores_that_make_no_sense_are_refused(asked: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        AttentionStore(**asked)


def test_levels_halve_and_round_up() -> None:
    assert [grid_of(cells, (9, 18)) for cells in (162, 45, 15)] == [(9, 18), (5, 9), (3, 5)]
    with pytest.raises(ModelUnavailable, match="fits no level"):
        grid_of(50, (9, 18))
