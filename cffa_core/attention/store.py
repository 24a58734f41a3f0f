"""What is kept of the attention maps of a run: only what was asked for, averaged as it comes (METHODS 4).

A store is told of every forward of a UNet by `attention.processors.capturing` and of the map of every layer that it
wants. It never holds more than ``layers x rows x tokens x cells`` numbers (for every step that is kept by itself), and
of self-attention only what the asked points look at. Knows no UNet, text or picture.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, get_args

import torch
from torch.nn import functional as F

from cffa_core.attention.layers import Layer, MapKind, Place
from cffa_core.errors import InvalidSpec, Problem

Keep = Literal["mean", "each", "last"]
Point = tuple[float, float]


class AttentionStore:
    """Maps of the layers, steps, rows, tokens and points that were asked for; heads are always averaged.

    ``keep``: ``mean``, the running mean over the steps; ``each``, every step by itself; ``last``, the latest forward
    alone (edits and training). A step is one forward of the UNet, counted from 0 since the store was made or cleared;
    ``steps`` names those that count. ``rows`` are the rows of the batch that are kept, in this order, ``tokens`` the
    positions in the text, ``sides`` the heights of the levels (None: all of each). ``bring_to`` resizes every map to
    this height as it comes, which bounds what fine levels cost. ``points`` are (x, y) as fractions of the picture:
    of self-attention, the maps of the cells under them are kept. With ``gradients`` the maps stay part of the graph.
    Raises ``ValueError`` for a store that could hold nothing, or that would hold graphs of more than one forward.
    """

    def __init__(
        self,
        *,
        kinds: Sequence[MapKind] = ("cross",),
        places: Sequence[Place] = ("down", "mid", "up"),
        keep: Keep = "mean",
        steps: Iterable[int] | None = None,
        rows: Sequence[int] | None = None,
        tokens: Sequence[int] | None = None,
        sides: Iterable[int] | None = None,
        bring_to: int | None = None,
        points: Sequence[Point] = (),
        gradients: bool = False,
    ) -> None:
        if not kinds or not places or not set(kinds) <= set(get_args(MapKind)) or not set(places) <= {*get_args(Place)}:
            raise ValueError(f"a store keeps kinds {get_args(MapKind)} of places {get_args(Place)}")
        if ("self" in kinds) != bool(points):
            raise ValueError("self-attention is kept at points, and points belong to self-attention")
        if gradients and keep != "last":
            raise ValueError('with gradients only the last forward is kept: keep="last"')
        self.kinds, self.places, self.keep = tuple(kinds), tuple(places), keep
        self.steps = None if steps is None else frozenset(steps)
        self.rows = None if rows is None else tuple(rows)
        self.tokens = None if tokens is None else tuple(tokens)
        self.sides = None if sides is None else frozenset(sides)
        self.bring_to = bring_to
        self.points = tuple(points)
        self.gradients = gradients
        self.clear()

    def clear(self) -> None:
        """Forget every map and count steps from 0 again."""
        self.step = -1
        self.latent = (0, 0)
        self._layers: dict[str, Layer] = {}
        # By layer and step; with a mean or the last forward there is one entry per layer, under step -1.
        self._maps: dict[tuple[str, int], torch.Tensor] = {}
        self._counts: dict[str, int] = {}
        self._seen: set[str] = set()

    # --- filling ------------------------------------------------------------------------------------------------------

    def begin_step(self, latent: tuple[int, int]) -> None:
        """A forward of the UNet begins; its input is ``(..., h, w)`` with ``latent = (h, w)``."""
        self.step += 1
        self.latent = latent
        self._seen.clear()
        if self.keep == "last":
            self._maps.clear()

    def wants(self, layer: Layer, grid: tuple[int, int]) -> bool:
        """Whether the map of ``layer``, whose level has ``grid = (h, w)`` cells, is kept of this step."""
        return (
            layer.kind in self.kinds
            and layer.place in self.places
            and (self.steps is None or self.step in self.steps)
            and (self.sides is None or grid[0] in self.sides)
        )

    def add(self, layer: Layer, maps: torch.Tensor) -> None:
        """Keep ``maps (R, T, h, w)`` float32 of ``layer`` for this step.

        A layer counts once per step: gradient checkpointing runs it a second time, during backward.
        """
        if layer.name in self._seen:
            return
        self._seen.add(layer.name)
        self._layers[layer.name] = layer
        found = maps if self.gradients else maps.detach()
        if self.bring_to is not None:
            found = resized(found, self.bring_to, layer.kind)
        if self.keep != "mean":
            self._maps[layer.name, self.step if self.keep == "each" else -1] = found
            return
        count = self._counts[layer.name] = self._counts.get(layer.name, 0) + 1
        mean = self._maps.get((layer.name, -1))
        self._maps[layer.name, -1] = found if mean is None else mean + (found - mean) / count

    # --- looking ------------------------------------------------------------------------------------------------------

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layers of which there is a map, in the order in which they ran."""
        kept = {name for name, _ in self._maps}
        return tuple(layer for name, layer in self._layers.items() if name in kept)

    @property
    def kept_steps(self) -> tuple[int, ...]:
        """With ``keep="each"``: the steps of which there are maps."""
        return tuple(sorted({step for _, step in self._maps if step >= 0}))

    @property
    def numbers(self) -> int:
        """How many numbers are held."""
        return sum(maps.numel() for maps in self._maps.values())

    def maps(self, layer: str, steps: Iterable[int] | None = None) -> torch.Tensor:
        """The map of one layer ``(rows, tokens or points, h, w)``, the mean over ``steps`` (None: all that are kept).

        Raises ``InvalidSpec`` if there is none, naming what there is.
        """
        if steps is None or self.keep != "each":
            if steps is not None:
                raise ValueError('single steps are told apart by a store with keep="each"')
            chosen = [maps for (name, _), maps in self._maps.items() if name == layer]
        else:
            chosen = [self._maps[layer, step] for step in steps if (layer, step) in self._maps]
        if not chosen:
            there = f"steps {list(self.kept_steps)} of " if steps is not None else ""
            raise _nothing(f"no map of layer {layer!r}; there are {there}{[found.name for found in self.layers]}")
        return chosen[0] if len(chosen) == 1 else torch.stack(chosen).mean(0)

    def average(
        self,
        kind: MapKind = "cross",
        places: Sequence[Place] = ("down", "up"),
        side: int | None = 16,
        steps: Iterable[int] | None = None,
        *,
        resize: bool = False,
        layers: Sequence[str] | None = None,
    ) -> torch.Tensor:
        """Mean over layers (and steps): ``(rows, tokens, side, side)`` float32; of ``self``, points in place of tokens.

        Only layers whose level is ``side`` cells high count, as in prompt-to-prompt (Hertz et al. 2022); with
        ``resize`` all do, brought to ``side``. ``side=None`` brings all to the finest level there is. A canvas twice as
        wide as high gives maps twice as wide. ``layers`` names the only layers that count. Raises ``InvalidSpec`` if
        no layer is left, naming the sides there are.
        """
        steps = None if steps is None else tuple(steps)
        found = [
            self.maps(layer.name, steps)
            for layer in self.layers
            if layer.kind == kind and layer.place in places and (layers is None or layer.name in layers)
        ]
        there = sorted({maps.shape[-2] for maps in found})
        if side is not None and not resize:
            found = [maps for maps in found if maps.shape[-2] == side]
        if not found:
            raise _nothing(
                f"no {kind}-attention map of {', '.join(places)} at side {side}; the store holds sides {there} of these"
            )
        height = max(there) if side is None else side
        return torch.stack([resized(maps, height, kind) for maps in found]).mean(0)


def resized(maps: torch.Tensor, height: int, kind: MapKind) -> torch.Tensor:
    """``(R, T, h, w)`` brought to ``height`` rows, its proportions kept: means of areas down, bilinear up.

    A cross map says of each cell how much it looks at a token, so values stay; a self map says how one look is spread
    over the cells, so its sum stays (exactly where sides divide).
    """
    old_height, old_width = maps.shape[-2:]
    if old_height == height:
        return maps
    size = (height, round(old_width * height / old_height))
    if height < old_height:
        new = F.adaptive_avg_pool2d(maps, size)
    else:
        new = F.interpolate(maps, size, mode="bilinear", align_corners=False)
    return new if kind == "cross" else new * (old_height * old_width / (size[0] * size[1]))


def _nothing(message: str) -> InvalidSpec:
    return InvalidSpec(message, problems=(Problem("/map_resolution", "no_attention_map", message),))
