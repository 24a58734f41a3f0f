"""Texts to embeddings, and embeddings of pictures to captions; both are transformers' own, small (METHODS 7).

The encoder is CLIP's (Radford et al. 2021), read off at the end token; the caption decoder is GPT-2's (Radford et al.
2019), which sees the picture as its first token. Masks of padding are passed to both.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    GPT2Config,
    GPT2LMHeadModel,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
)

from cffa_core.captioned.vocabulary import END, PAD, START, UNKNOWN, Tokens, Vocabulary
from cffa_core.jobs.captioned_spec import CaptionedSizes

HEADS = 4


class TextEncoder(nn.Module):
    """Texts to embeddings ``(B, E)``, each number standardised over the batch as those of pictures are.

    Captions of one kind differ in a word or two, and an untrained transformer makes nearly the same embedding of them
    all: without it the contrastive loss starts on a plateau, where pictures cannot learn from texts nor texts from
    pictures (docs/captioned.md).
    """

    def __init__(self, sizes: CaptionedSizes, vocabulary: Vocabulary) -> None:
        super().__init__()
        self.clip = CLIPTextModelWithProjection(
            CLIPTextConfig(
                vocab_size=len(vocabulary),
                hidden_size=sizes.text,
                intermediate_size=4 * sizes.text,
                projection_dim=sizes.embedding,
                num_hidden_layers=sizes.text_layers,
                num_attention_heads=HEADS,
                max_position_embeddings=sizes.max_tokens,
                bos_token_id=START,
                eos_token_id=END,
                pad_token_id=PAD,
            )
        )
        self.norm = nn.BatchNorm1d(sizes.embedding, affine=False, momentum=0.05)

    def forward(self, tokens: Tokens) -> torch.Tensor:
        """Embeddings of texts; what is padded has no part in them."""
        found = self.clip(input_ids=tokens.ids, attention_mask=tokens.mask).text_embeds
        return torch.as_tensor(self.norm(found))


@dataclass(frozen=True)
class CaptionSampling:
    """How captions are drawn; ``top_k`` 0 and ``top_p`` 1 keep all words. Not ``sampled``: the likeliest word each."""

    temperature: float = 0.9
    top_k: int = 50
    top_p: float = 0.9
    repetition_penalty: float = 1.3
    sampled: bool = True


class WordRepetitionPenalty(RepetitionPenaltyLogitsProcessor):  # type: ignore[misc]
    """The repetition penalty (Keskar et al. 2019) on words alone: commas and the like repeat in any good sentence."""

    def __init__(self, penalty: float, marks: list[int]) -> None:
        super().__init__(penalty)
        self._marks = marks

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores ``(B, V)`` after the words of ``input_ids (B, L)``."""
        free = scores[:, self._marks].clone()
        changed = super().__call__(input_ids, scores).clone()
        changed[:, self._marks] = free
        return torch.as_tensor(changed)


class CaptionDecoder(nn.Module):
    """Embeddings of pictures to captions, word by word."""

    def __init__(self, sizes: CaptionedSizes, vocabulary: Vocabulary) -> None:
        super().__init__()
        self.max_tokens = sizes.max_tokens
        self.marks = [*range(4), *(4 + place for place, word in enumerate(vocabulary.words) if not word.isalnum())]
        self.prefix = nn.Linear(sizes.embedding, sizes.text)
        self.gpt = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=len(vocabulary),
                n_positions=sizes.max_tokens,
                n_embd=sizes.text,
                n_layer=sizes.text_layers,
                n_head=HEADS,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                bos_token_id=START,
                eos_token_id=END,
                pad_token_id=PAD,
                tie_word_embeddings=False,
            )
        )

    def loss(self, embedding: torch.Tensor, tokens: Tokens) -> torch.Tensor:
        """Cross-entropy of the captions' next words, mean over real tokens; the picture stands for the start token."""
        words, mask = tokens.ids[:, 1:-1], tokens.mask[:, 1:-1]
        inputs = torch.cat([self.prefix(embedding)[:, None], self.gpt.transformer.wte(words)], dim=1)
        seen = torch.cat([torch.ones_like(mask[:, :1]), mask], dim=1)
        logits = self.gpt(inputs_embeds=inputs, attention_mask=seen).logits.float()
        targets = tokens.ids[:, 1:].masked_fill(tokens.mask[:, 1:] == 0, -100)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)

    @torch.no_grad()
    def draw(self, embedding: torch.Tensor, count: int, sampling: CaptionSampling, seed: int) -> list[list[int]]:
        """``count`` captions as numbers of ONE picture's embedding ``(E,)``; the same seed draws the same captions."""
        start = self.prefix(embedding[None])[:, None].expand(count, -1, -1)
        options = (
            {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
            if sampling.sampled
            else {}
        )
        penalty = LogitsProcessorList([WordRepetitionPenalty(float(sampling.repetition_penalty), self.marks)])
        devices = [embedding.device] if embedding.device.type == "cuda" else []
        # transformers draws from the global generators; they are left as they were.
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            drawn = self.gpt.generate(
                inputs_embeds=start,
                attention_mask=torch.ones(count, 1, dtype=torch.int64, device=embedding.device),
                max_new_tokens=self.max_tokens - 1,
                min_new_tokens=1,
                do_sample=sampling.sampled,
                logits_processor=penalty,
                suppress_tokens=[PAD, START, UNKNOWN],
                **options,
            )
        return [[int(number) for number in row] for row in drawn]
