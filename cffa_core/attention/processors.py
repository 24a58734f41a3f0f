"""Look into a UNet's attentions while it runs, and change nothing of what it computes.

A capturing processor lets the layer's own processor do its work, untouched, and listens to the two projections that it
calls: what ``to_q`` and ``to_k`` answered is enough to compute the map beside it. So LoRA layers, prompts that are
projected once (`models.fixed_text`) and processors that share maps stay in effect. Only UNets that are given; which
row of a batch is which is the caller's knowledge.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from cffa_core.attention.layers import Layer, attention_layers, grid_of
from cffa_core.attention.store import AttentionStore, Point
from cffa_core.errors import ModelUnavailable


@contextmanager
def capturing(unet: Any, store: AttentionStore) -> Iterator[AttentionStore]:
    """Inside, every forward of ``unet`` is a step of ``store``; afterwards all processors are as before.

    With gradient checkpointing, backward must run inside too: it runs the layers once more, as they were. Raises
    ``ModelUnavailable`` for a UNet without the attentions that the store asks for, or whose maps would not be those
    that it uses (normalised queries, masks).
    """
    layers = attention_layers(unet, store.kinds, store.places)
    for layer, attention in layers:
        if attention.norm_q is not None or attention.norm_k is not None or attention.added_kv_proj_dim is not None:
            raise ModelUnavailable(f"{layer.name} is no attention of Stable Diffusion's layout; it cannot be captured")
    own = [attention.processor for _, attention in layers]
    listening = unet.register_forward_pre_hook(lambda _, args, kwargs: _begin(store, args, kwargs), with_kwargs=True)
    try:
        for (layer, attention), processor in zip(layers, own, strict=True):
            attention.processor = CapturingProcessor(processor, layer, store)
        yield store
    finally:
        listening.remove()
        for (_, attention), processor in zip(layers, own, strict=True):
            attention.processor = processor


def _begin(store: AttentionStore, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    sample: torch.Tensor = args[0] if args else kwargs["sample"]
    if store.rows is not None and not all(0 <= row < len(sample) for row in store.rows):
        raise ValueError(f"the store keeps rows {store.rows}, the batch has {len(sample)}")
    store.begin_step((int(sample.shape[-2]), int(sample.shape[-1])))


class CapturingProcessor:
    """Calls ``inner``, the layer's own processor, and gives the layer's map to the store if it wants it."""

    def __init__(self, inner: Any, layer: Layer, store: AttentionStore) -> None:
        self.inner = inner
        self.layer = layer
        self.store = store

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``(R, N, C)`` (or ``(R, C, h, w)``) to the same shape: exactly what ``inner`` answers."""

        def answer() -> torch.Tensor:
            out: torch.Tensor = self.inner(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
            return out

        latent = self.store.latent
        cells = hidden_states.shape[1] if hidden_states.ndim == 3 else hidden_states[0, 0].numel()
        grid = grid_of(cells, latent)
        if not self.store.wants(self.layer, grid):
            return answer()
        if attention_mask is not None:
            raise ModelUnavailable(f"{self.layer.name} was called with an attention mask; its map cannot be captured")
        with _heard(attn.to_q) as queries, _heard(attn.to_k) as keys:
            out = answer()
        if len(queries) != 1 or len(keys) != 1:
            raise ModelUnavailable(
                f"the processor of {self.layer.name} does not project queries and keys once; it cannot be captured"
            )
        # Rows that look through another row's map have none of their own: such a processor says where it stands.
        sharing = getattr(self.inner, "places_of_maps", None)
        places = sharing(encoder_hidden_states, cells) if sharing is not None else None
        with torch.set_grad_enabled(self.store.gradients and torch.is_grad_enabled()):
            self.store.add(self.layer, self._maps(queries[0], keys[0], int(attn.heads), grid, places))
        return out

    def _maps(
        self, query: torch.Tensor, key: torch.Tensor, heads: int, grid: tuple[int, int], places: torch.Tensor | None
    ) -> torch.Tensor:
        """``(rows, tokens, h, w)`` of cross-attention, ``(rows, points, h, w)`` of self-attention."""
        store = self.store
        if places is not None or store.rows is not None:
            rows = torch.arange(len(query), device=query.device) if places is None else places
            rows = rows if store.rows is None else rows[list(store.rows)]
            query, key = query.index_select(0, rows), key.index_select(0, rows)
        if self.layer.kind == "self":
            cells = torch.tensor([cell_of(point, grid) for point in store.points], device=query.device)
            maps = attention_map(query.index_select(1, cells), key, heads)
        else:
            maps = attention_map(query, key, heads).transpose(1, 2)
            maps = maps if store.tokens is None else maps[:, list(store.tokens)]
        return maps.reshape(*maps.shape[:2], *grid)


@contextmanager
def _heard(projection: nn.Module) -> Iterator[list[torch.Tensor]]:
    """What ``projection`` answers inside, call by call."""
    answers: list[torch.Tensor] = []
    listening = projection.register_forward_hook(lambda _, __, answer: answers.append(answer))
    try:
        yield answers
    finally:
        listening.remove()


def attention_map(query: torch.Tensor, key: torch.Tensor, heads: int) -> torch.Tensor:
    """``softmax(q k^T / sqrt(d))``, the mean of all heads: ``(R, Nq, H D)``, ``(R, Nk, H D)`` -> ``(R, Nq, Nk)``.

    In float32 whatever the UNet computes in. Vaswani et al. 2017, equation 1.
    """
    with torch.autocast(query.device.type, enabled=False):
        q, k = (x.float().reshape(*x.shape[:2], heads, -1).transpose(1, 2) for x in (query, key))
        return torch.softmax((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2), dim=-1).mean(1)


def cell_of(point: Point, grid: tuple[int, int]) -> int:
    """The cell under ``point = (x, y)``, fractions of the picture's width and height, counted row by row."""
    height, width = grid
    column, row = (min(int(part * size), size - 1) for part, size in zip(point, (width, height), strict=True))
    return row * width + column
