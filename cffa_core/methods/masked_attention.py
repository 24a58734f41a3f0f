"""What a training step with placeholder tokens computes (METHODS 6, Break-A-Scene; docs/masked-attention.md).

Union sampling, the masked noise loss, the attention loss and prior preservation, around the forward of a pair method.
Which weights are trained when is in `recipes.training_phases`; nothing here steps an optimiser or makes prior pictures.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from cffa_core.attention.layers import Place, attention_layers
from cffa_core.attention.processors import capturing
from cffa_core.attention.store import AttentionStore
from cffa_core.data.pairs import Pair
from cffa_core.data.token_masks import token_mask
from cffa_core.diffusion.masked_losses import attention_loss, attention_target, cells_of, masked_noise_loss
from cffa_core.methods.method import PairMethod, Tensors
from cffa_core.methods.placeholder_tokens import PlaceholderTokens

Loss = tuple[torch.Tensor, dict[str, torch.Tensor]]
PLACES: tuple[Place, ...] = ("down", "up")


class MaskedAttention:
    """Training steps of ``model`` with its placeholder ``tokens``.

    ``side`` is that of the attention maps that are compared with masks: of the sides at which the UNet has
    cross-attention, the one nearest to the setting. ``prior`` are latents ``(N, C, h, w)`` by branch that the base drew
    from plain prompts; without any, no step preserves the prior.
    """

    def __init__(self, model: PairMethod, tokens: PlaceholderTokens) -> None:
        self.model = model
        self.tokens = tokens
        self.spec = tokens.spec
        self.latent_side = model.noise_shape(model.settings.resolution)[1]
        self.side = nearest_side(model.unet, self.latent_side, self.spec.attention_side)
        self.prior: dict[str, torch.Tensor] = {}
        self._plain = model.prompts(model.settings.cf_prompt, model.settings.fa_prompt)
        # The longest prompt of all: if the base cannot take it, that is said before the first step.
        tokens.base.encode_prompts([tokens.prompt(plain) for plain in self._plain.values()])

    @property
    def in_phase1(self) -> bool:
        """Whether the step to come trains the tokens alone."""
        return self.model.step < self.spec.phase1_steps

    def structure(self, pair: Pair) -> dict[str, torch.Tensor]:
        """The pair's masks by token: ``cells (T, h, w)`` bool at the latent, ``targets (T, s, s)`` for the attention.

        A token that the pair has no mask for is all 0.
        """
        nowhere = torch.zeros(pair.cf.shape[-2:], dtype=torch.bool)
        found = [token_mask(pair, token) for token in self.spec.tokens]
        masks = torch.stack([nowhere if mask is None else mask for mask in found])
        return {"cells": cells_of(masks, self.latent_side), "targets": attention_target(masks, self.side)}

    def parts(self, x0: Tensors, valid: Tensors, structure: Tensors, generator: torch.Generator) -> Iterator[Loss]:
        """The losses of one step, each to be followed by its own backward before the next is asked for.

        The first is that of the pairs with their tokens; in phase 2 a second one preserves the prior. One after the
        other they need the memory of one. ``x0`` and ``valid`` as in :meth:`PairMethod.training_loss`,
        ``structure`` as :meth:`structure` makes it, with a row per pair.
        """
        model = self.model
        there = structure["cells"].flatten(2).any(2)
        whole = not self.in_phase1 and torch.rand(1, generator=generator).item() < self.spec.whole_share
        chosen = [_all_of(row) if whole else draw_subset(row, generator) for row in there]
        timesteps, noise = model.draw(x0[model.branches[0]].shape, generator)
        # Inside, so that a backward which runs layers once more (gradient checkpointing) finds them as they were.
        with self._captured() as store:
            yield self._loss(store, x0, valid, structure, chosen, whole, timesteps, noise)
        if self.prior and not self.in_phase1:
            yield self._prior_loss(len(chosen), generator)

    def loss_at(
        self, x0: Tensors, valid: Tensors, structure: Tensors, timesteps: Tensors, noise: Tensors
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss of whole pictures with all tokens of each pair, at GIVEN timesteps and noise; for validation."""
        chosen = [_all_of(row) for row in structure["cells"].flatten(2).any(2)]
        with self._captured() as store:
            return self._loss(store, x0, valid, structure, chosen, True, timesteps, noise)

    def maps(self, x0: Tensors, valid: Tensors, structure: Tensors, timesteps: Tensors, noise: Tensors) -> Tensors:
        """Attention ``(B, T, s, s)`` of every token by branch, each pair with the prompt of all its own tokens.

        A token that the pair has no mask for is all 0.
        """
        chosen = [_all_of(row) for row in structure["cells"].flatten(2).any(2)]
        with torch.no_grad(), self._captured() as store:
            text, prompts = self._text(chosen)
            self.model.branches_at(x0, valid, text, timesteps, noise)
            return self._maps(store, chosen, prompts)

    # --- inside -------------------------------------------------------------------------------------------------------

    @contextmanager
    def _captured(self) -> Iterator[AttentionStore]:
        store = AttentionStore(places=PLACES, keep="last", sides=(self.side,), gradients=torch.is_grad_enabled())
        with capturing(self.model.unet, store):
            yield store

    def _text(self, chosen: Sequence[Sequence[int]]) -> tuple[dict[str, torch.Tensor], dict[str, list[str]]]:
        """Encoded prompts ``(B, 77, D)`` by branch, with a gradient to what is trained, and the prompts themselves."""
        names = self.tokens.names
        prompts = {
            b: [self.tokens.prompt(plain, [names[one] for one in row]) for row in chosen]
            for b, plain in self._plain.items()
        }
        return {b: self.tokens.base.encode_prompts_open(said) for b, said in prompts.items()}, prompts

    def _loss(
        self,
        store: AttentionStore,
        x0: Tensors,
        valid: Tensors,
        structure: Tensors,
        chosen: Sequence[Sequence[int]],
        whole: bool,
        timesteps: Tensors,
        noise: Tensors,
    ) -> Loss:
        model, device = self.model, self.model.base.device
        text, prompts = self._text(chosen)
        found = model.branches_at(x0, valid, text, timesteps, noise)
        is_chosen = torch.zeros(len(chosen), len(self.tokens.names), dtype=torch.bool)
        for row, picked in zip(is_chosen, chosen, strict=True):
            row[list(picked)] = True
        terms: dict[str, torch.Tensor] = {}
        if whole:
            loss, terms = model.pair_loss_of(found)
        else:
            union = (structure["cells"] & is_chosen[..., None, None]).any(1, keepdim=True).to(device)
            each = {
                f"masked_{b}": masked_noise_loss(said.predicted_noise, said.noise, union & said.valid)
                for b, said in found.items()
            }
            loss = torch.stack(list(each.values())).sum()
            terms = {name: term.detach() for name, term in each.items()}
        maps = self._maps(store, chosen, prompts)
        targets, on = structure["targets"].to(device), is_chosen.to(device)
        attention = torch.stack([attention_loss(found, targets, on) for found in maps.values()]).sum()
        # A pair without any mask says nothing to the tokens; the empty term keeps the backward of such a step whole.
        loss = loss + self.spec.attention_lambda * attention + 0 * self.tokens.embedding.rows.sum()
        return loss, {**terms, "attn_loss": attention.detach()}

    def _maps(
        self, store: AttentionStore, chosen: Sequence[Sequence[int]], prompts: dict[str, list[str]]
    ) -> dict[str, torch.Tensor]:
        """Attention ``(B, T, s, s)`` of the chosen tokens by branch; 0 for the others."""
        average = store.average("cross", PLACES, self.side)
        nothing = torch.zeros_like(average[0, 0])
        maps = {}
        for number, (b, said) in enumerate(prompts.items()):
            rows = []
            for place, (prompt, picked) in enumerate(zip(said, chosen, strict=True)):
                seen, at = average[number * len(chosen) + place], self.tokens.positions(prompt)
                tokens = enumerate(self.tokens.names)
                rows.append(torch.stack([seen[at[name]] if one in picked else nothing for one, name in tokens]))
            maps[b] = torch.stack(rows)
        return maps

    def _prior_loss(self, size: int, generator: torch.Generator) -> Loss:
        """``prior_weight * sum_b MSE`` on pictures of the base with plain prompts."""
        model = self.model
        count = len(next(iter(self.prior.values())))
        picked = torch.randint(count, (size,), generator=generator)
        x0 = {b: latents[picked] for b, latents in self.prior.items()}
        valid = {b: torch.ones_like(clean[:, :1], dtype=torch.bool) for b, clean in x0.items()}
        timesteps, noise = model.draw(x0[model.branches[0]].shape, generator)
        text = {b: self.tokens.base.encode_prompts_open([plain]) for b, plain in self._plain.items()}
        found = model.branches_at(x0, valid, text, timesteps, noise)
        loss = torch.stack([(said.noise - said.predicted_noise).square().mean() for said in found.values()]).sum()
        return self.spec.prior_weight * loss, {"prior_loss": loss.detach()}


def nearest_side(unet: Any, latent_side: int, asked: int) -> int:
    """Of the sides at which ``unet`` has cross-attention on its way down or up, the nearest to ``asked`` (by ratio)."""
    levels = len(unet.config.block_out_channels)
    sides = set()
    for layer, _ in attention_layers(unet, ("cross",), PLACES):
        block = int(layer.name.split(".")[1])
        side = latent_side
        for _ in range(block if layer.place == "down" else levels - 1 - block):
            side = -(-side // 2)
        sides.add(side)
    return min(sides, key=lambda side: (abs(math.log2(side / asked)), -side))


def draw_subset(there: torch.Tensor, generator: torch.Generator) -> list[int]:
    """Union sampling: a random non-empty subset of the tokens ``there (T,)`` bool, in random order.

    As in the paper's program, first how many (1 to all, alike), then which. Empty only if none is there.
    """
    places = _all_of(there)
    if not places:
        return []
    count = int(torch.randint(1, len(places) + 1, (1,), generator=generator))
    return [places[one] for one in torch.randperm(len(places), generator=generator)[:count].tolist()]


def _all_of(there: torch.Tensor) -> list[int]:
    found: list[int] = there.nonzero().flatten().tolist()
    return found
