"""Placeholder tokens: ``<disc>`` as a word of tokenizer and text encoder whose embedding is learnt (METHODS 6).

The base that comes out encodes prompts with the tokens; the base that went in stays as it was. The rows of the
tokens are a parameter of their own beside the embedding table, so that all other embeddings are the base's, bit for
bit, after every step. Knows no masks and no losses.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import nn
from torch.nn import functional as F

from cffa_core.errors import InvalidSpec, Problem
from cffa_core.jobs.spec import TokensSpec, check_tokens
from cffa_core.models.base import Base
from cffa_core.models.checkpoint import read_tensors
from cffa_core.models.lora import share_weights

TOKENS_FILE, TEXT_FILE = "tokens.safetensors", "text_encoder.safetensors"
_PLACEHOLDER = re.compile(r"<([a-z0-9_]{1,32})>")


class TokenEmbedding(nn.Module):
    """The base's embedding table, frozen, and one learnt row for each id from ``first`` on."""

    def __init__(self, table: torch.Tensor, first: int, rows: torch.Tensor) -> None:
        super().__init__()
        # In a tuple, so that it is no parameter: the table stays the base's.
        self._table = (table,)
        self.first = first
        self.rows = nn.Parameter(rows)

    @property
    def table(self) -> torch.Tensor:
        """The base's embeddings ``(V, D)``."""
        return self._table[0]

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Embed ``(..., N)`` ids as ``(..., N, D)``."""
        known = F.embedding(ids.clamp(max=self.first - 1), self.table)
        own = F.embedding((ids - self.first).clamp(min=0), self.rows)
        return torch.where((ids >= self.first)[..., None], own.to(known.dtype), known)


class PlaceholderTokens:
    """The tokens of one model. ``base`` is the base with them; its UNet and VAE are those of the base given.

    Raises ``InvalidSpec`` if the base's tokenizer knows one of the names already.
    """

    def __init__(self, base: Base, spec: TokensSpec) -> None:
        self.spec = spec
        self.names = spec.names
        tokenizer = copy.deepcopy(base.tokenizer)
        first = len(tokenizer)
        placeholders = [f"<{name}>" for name in self.names]
        taken = [word for word in placeholders if word in tokenizer.get_vocab()]
        if taken or tokenizer.add_tokens(placeholders) != len(placeholders):
            message = f"the base's tokenizer has {', '.join(taken) or 'some of the tokens'} already; take other names"
            raise InvalidSpec(message, problems=(Problem("/tokens", "token_taken", message),))
        encoder: Any = share_weights(base.text_encoder)
        table: torch.Tensor = base.text_encoder.get_input_embeddings().weight
        rows = [_embedding_of(base, table, token.initial or token.name.replace("_", " ")) for token in spec.tokens]
        self.embedding = TokenEmbedding(table, first, torch.stack(rows))
        _replace(encoder, encoder.get_input_embeddings(), self.embedding)
        self.text: dict[str, nn.Parameter] = {}
        if spec.train_text_encoder:
            self.text = dict(_own_weights(encoder, self.embedding))
        self.base = replace(base, tokenizer=tokenizer, text_encoder=encoder)

    # --- prompts ------------------------------------------------------------------------------------------------------

    def prompts(self, prompts: Mapping[str, str], tokens: Sequence[str] | None) -> dict[str, str]:
        """The prompt of each branch with ``tokens`` in it (None: with all; none: as it is).

        A prompt that names placeholders itself (``a photo of <disc>``) is taken as it is if ``tokens`` is None.
        Raises ``InvalidSpec`` for tokens that the model does not have, naming those that it has.
        """
        check_tokens(self.names, tokens)
        found = {}
        for branch, prompt in prompts.items():
            said = _PLACEHOLDER.findall(prompt)
            check_tokens(self.names, said)
            found[branch] = prompt if said and tokens is None else self.prompt(prompt, tokens)
        return found

    def prompt(self, prompt: str, tokens: Sequence[str] | None = None) -> str:
        """``prompt`` and ``tokens`` (None: all) in the training's template: ``..., a photo of <disc> and <lesion>``."""
        placeholders = [f"<{name}>" for name in (self.names if tokens is None else tokens)]
        if not placeholders:
            return prompt
        *others, last = placeholders
        listed = f"{', '.join(others)} and {last}" if others else last
        return self.spec.template.replace("{prompt}", prompt).replace("{tokens}", listed)

    def positions(self, prompt: str) -> dict[str, int]:
        """Where each token of ``prompt`` stands in the encoded text."""
        ids: list[int] = self.base.tokenizer(prompt, verbose=False).input_ids
        first = self.embedding.first
        return {self.names[one - first]: place for place, one in enumerate(ids) if one >= first}

    # --- weights ------------------------------------------------------------------------------------------------------

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """``tokens/rows (T, D)``, then the text encoder's own weights as ``text/...`` where they are trained."""
        yield "tokens/rows", self.embedding.rows
        for name, weight in self.text.items():
            yield f"text/{name}", weight

    def write(self, folder: Path, *, with_text: bool) -> None:
        """Write ``tokens.safetensors``, one ``(D,)`` per name, and the trained text encoder if it is asked for."""
        rows = self.embedding.rows.detach().float().cpu()
        tokens = {f"<{name}>": row.clone() for name, row in zip(self.names, rows, strict=True)}
        (folder / TOKENS_FILE).write_bytes(save(tokens))
        if with_text:
            weights = {name: weight.detach().cpu().contiguous() for name, weight in self.text.items()}
            (folder / TEXT_FILE).write_bytes(save(weights))

    def read(self, folder: Path, *, with_text: bool) -> None:
        """Read what :meth:`write` wrote; raises ``CorruptArtifact`` or ``ModelUnavailable``."""
        width = self.embedding.rows.shape[1]
        found = read_tensors(folder / TOKENS_FILE, {f"<{name}>": torch.empty(width) for name in self.names})
        with torch.no_grad():
            self.embedding.rows.copy_(torch.stack([found[f"<{name}>"] for name in self.names]))
            if with_text:
                weights = read_tensors(folder / TEXT_FILE, self.text)
                for name, weight in self.text.items():
                    weight.copy_(weights[name])


def _embedding_of(base: Base, table: torch.Tensor, words: str) -> torch.Tensor:
    """Mean embedding ``(D,)`` of the tokens of ``words``."""
    ids: list[int] = base.tokenizer(words, add_special_tokens=False, verbose=False).input_ids
    if not ids:
        message = f"the words {words!r} have no token in this base; give the token other `initial` words"
        raise InvalidSpec(message, problems=(Problem("/tokens", "no_such_word", message),))
    return table[ids].detach().float().mean(0)


def _replace(root: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put ``new`` where ``old`` is among the modules of ``root``."""
    for name, module in root.named_modules():
        if module is old:
            parent, _, child = name.rpartition(".")
            setattr(root.get_submodule(parent), child, new)
            return
    raise ValueError("the module is not part of the other")


def _own_weights(encoder: nn.Module, embedding: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Give ``encoder`` weights of its own, but for the token embeddings, and yield them by name."""
    for path, module in list(encoder.named_modules()):
        if module is embedding:
            continue
        for name, weight in list(module.named_parameters(recurse=False)):
            own = nn.Parameter(weight.detach().clone(), requires_grad=False)
            setattr(module, name, own)
            yield f"{path}.{name}", own
