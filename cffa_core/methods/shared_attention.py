"""`shared_attention` (METHODS 3): one UNet, one LoRA; the FA looks through the CF's self-attention.

CF and FA are rows of one batch with the same noise at the same timestep. In every self-attention the FA's values are
gathered by the CF's attention map, ``O_cf = A_cf V_cf`` and ``O_fa = A_cf V_fa``; cross-attention is left as it is.
Here are the method, the plan that says which row looks through whose map, and the attention processor that follows it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch.nn import functional as F

from cffa_core.errors import ModelUnavailable
from cffa_core.jobs.spec import Method, SharedAttentionSpec
from cffa_core.methods.method import PairMethod, Tensors
from cffa_core.models.lora import DualLora


class MapPlan:
    """Through whose attention map each row of the current batch looks; by row its own, or that of its CF.

    One object is shared by all processors of a UNet. It stays set until the next batch: gradient checkpointing runs the
    forward a second time, during backward.
    """

    def __init__(self) -> None:
        self.set((), torch.device("cpu"))

    def set(self, sources: Sequence[int], device: torch.device) -> None:
        """Let row ``i`` look through the map of row ``sources[i]``."""
        self.computed = sorted(set(sources))
        place = {row: at for at, row in enumerate(self.computed)}
        self.shares = len(self.computed) < len(sources)
        # For each row, where its map stands among those that are computed.
        self.places = torch.tensor([place[row] for row in sources], dtype=torch.long, device=device)
        self.computed_rows = torch.tensor(self.computed, dtype=torch.long, device=device)


class SharedMapProcessor:
    """Self-attention after a :class:`MapPlan`, in the protocol of diffusers' attention processors.

    ONE scaled-dot-product attention with ``q = [q_cf, q_cf]``, ``k = [k_cf, k_cf]``, ``v = [v_cf, v_fa]``: no map is
    ever held, and queries and keys are computed for rows that look through their own map alone. Where more than
    ``max_cells`` cells attend to each other, and where nothing is shared, this is plain attention.
    """

    def __init__(self, plan: MapPlan, lora: DualLora, max_cells: float = math.inf) -> None:
        self.plan = plan
        self.lora = lora
        self.max_cells = max_cells
        self.plain = AttnProcessor2_0()

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``(R, N, C)`` to ``(R, N, C)``, N the cells of the latent at this level."""
        plan = self.plan
        if self.places_of_maps(encoder_hidden_states, hidden_states.shape[1]) is None:
            plain: torch.Tensor = self.plain(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
            return plain
        shown = hidden_states.index_select(0, plan.computed_rows)
        with self.lora.only(plan.computed):
            query, key = _heads(attn, attn.to_q(shown)), _heads(attn, attn.to_k(shown))
        value = _heads(attn, attn.to_v(hidden_states))
        seen = F.scaled_dot_product_attention(
            query.index_select(0, plan.places), key.index_select(0, plan.places), value
        )
        out: torch.Tensor = attn.to_out[0](seen.transpose(1, 2).flatten(2)) / attn.rescale_output_factor
        return out

    def places_of_maps(self, encoder_hidden_states: torch.Tensor | None, cells: int) -> torch.Tensor | None:
        """For each row, where its map stands among those that are computed; None where every row has its own."""
        if not self.plan.shares or encoder_hidden_states is not None or cells > self.max_cells:
            return None
        return self.plan.places


def _heads(attn: Any, x: torch.Tensor) -> torch.Tensor:
    """``(R, N, H * D)`` -> ``(R, H, N, D)``."""
    heads: int = attn.heads
    return x.reshape(*x.shape[:2], heads, -1).transpose(1, 2)


def map_sources(rows: Sequence[str], shared: Sequence[bool]) -> list[int]:
    """For each row, the row whose map it looks through: the k-th FA row that of the k-th CF row where ``shared``.

    With guidance the batch is [uncond cf, uncond fa, cond cf, cond fa]; the k-th FA row belongs to the k-th CF row
    however they are interleaved. Raises ``ValueError`` unless every FA row has its CF row.
    """
    cf = [place for place, m in enumerate(rows) if m == "cf"]
    fa = [place for place, m in enumerate(rows) if m == "fa"]
    if len(cf) != len(fa) or len(cf) + len(fa) != len(rows):
        raise ValueError(f"every FA row needs one CF row; the batch has {len(cf)} CF and {len(fa)} FA of {len(rows)}")
    sources = list(range(len(rows)))
    for own, other in zip(fa, cf, strict=True):
        if shared[own]:
            sources[own] = other
    return sources


def in_step_range(timesteps: torch.Tensor, step_range: tuple[float, float], steps: int) -> list[bool]:
    """Whether each of ``timesteps (R,)`` lies in ``step_range``: past its begin and up to its end, ``1 - t / steps``.

    Ranges that meet at a number leave no timestep out and count none twice.
    """
    begin, end = step_range
    if (begin, end) == (0.0, 1.0):
        return [True] * len(timesteps)
    # Products of decimal fractions, such as 1000 * (1 - 0.7), must not miss a timestep by their last bit.
    first, last = (round(steps * (1 - part), 6) for part in (end, begin))
    # Some samplers begin at t = steps, which is pure noise as the last trained timestep is.
    t = timesteps.double().clamp(max=steps - 1)
    inside: list[bool] = ((t >= first) & (t < last)).tolist()
    return inside


class SharedAttention(PairMethod):
    """A base with one LoRA for both modalities and the CF's attention maps for both."""

    method = Method.SHARED_ATTENTION

    def set_up(self) -> None:
        """Put the processor into every self-attention."""
        self.sharing = self.settings.shared_attention or SharedAttentionSpec()
        self.plan = MapPlan()
        side = self.sharing.max_resolution
        processor = SharedMapProcessor(self.plan, self.lora, math.inf if side is None else side**2)
        found = [m for name, m in self.unet.named_modules() if isinstance(m, Attention) and name.endswith(".attn1")]
        if not found:
            raise ModelUnavailable(f"the UNet of base {self.base.name!r} has no self-attention that could be shared")
        for attention in found:
            attention.set_processor(processor)

    @property
    def adapters(self) -> tuple[str, ...]:
        """One LoRA for all rows."""
        return ("pair",)

    def tied(self, drawn: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """One timestep and one noise for both images."""
        return dict.fromkeys(drawn, drawn["cf"])

    def predict_noise(
        self,
        x: torch.Tensor,
        timesteps: torch.Tensor,
        text: torch.Tensor,
        rows: Sequence[str],
        structure: Tensors | None = None,
    ) -> torch.Tensor:
        """All rows with the one LoRA, FA rows through their CF's maps; see :meth:`PairMethod.predict_noise`."""
        shared = in_step_range(timesteps.expand(len(rows)), self.sharing.step_range, self.schedule.steps)
        self.plan.set(map_sources(rows, shared), x.device)
        return super().predict_noise(x, timesteps, text, ["pair"] * len(rows))
