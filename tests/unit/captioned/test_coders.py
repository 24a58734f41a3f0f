"""Picture and text coders: shapes, standardised latents, masks, and captions that are drawn by seed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from cffa_core.captioned.image_coder import ImageDecoder, ImageEncoder, LatentScale
from cffa_core.captioned.model import CaptionedModel
from cffa_core.captioned.text_coder import CaptionSampling, WordRepetitionPenalty
from cffa_core.captioned.vocabulary import END, Vocabulary
from cffa_core.jobs.captioned_spec import CaptionedSizes
from tests.unit.captioned.conftest import CAPTIONS


def test_sizes_of_the_specification() -> None:
    with torch.device("meta"):
        encoder, decoder = ImageEncoder(CaptionedSizes()), ImageDecoder(CaptionedSizes())
        embedding, *maps = encoder(torch.empty(2, 3, 224, 224))
        latent = decoder.latent(embedding)
        assert (embedding.shape, latent.shape) == ((2, 512), (2, 256, 7, 7))
        assert [m.shape[1:] for m in maps] == [(64, 56, 56), (128, 28, 28), (256, 14, 14), (512, 7, 7)]
        assert decoder(latent).shape == (2, 3, 224, 224)
    strides = [part.stride for part in encoder.trunk.modules() if isinstance(part, nn.Conv2d)]
    assert strides == [(2, 2)] * 5


def test_a_single_dot_is_seen_wherever_it_is(sizes: CaptionedSizes) -> None:
    """Four plain pictures in a batch have one embedding; a fifth and a sixth with a dot of 2 x 2 have others."""
    torch.manual_seed(0)
    images = torch.zeros(6, 3, 224, 224)
    images[4, :, 20:22, 30:32] = -1
    images[5, :, 200:202, 111:113] = -1
    found = ImageEncoder(sizes)(images)[0]
    assert (found[:4] - found[0]).abs().max() < 1e-3
    assert (found[4:] - found[0]).abs().amax(dim=1).min() > 0.1


def test_latents_are_standardised() -> None:
    torch.manual_seed(0)
    scale = LatentScale(16)
    batches = torch.randn(40, 32, 16, 7, 7) * torch.linspace(0.5, 9, 16)[:, None, None] + torch.randn(16, 7, 7) * 5
    for latents in batches:
        scale.update(latents)
    made = scale.standardise(batches.flatten(0, 1))
    assert made.mean((0, 2, 3)).abs().max() < 0.05
    assert (made.std((0, 2, 3)) - 1).abs().max() < 0.05
    assert made.mean(0).abs().max() < 0.3, "also place by place"
    torch.testing.assert_close(scale.restore(made), batches.flatten(0, 1), atol=1e-4, rtol=1e-4)


def test_the_first_batch_alone_sets_the_scale() -> None:
    scale = LatentScale(16)
    latents = torch.randn(64, 16, 7, 7) * 30 + 100
    scale.update(latents)
    assert scale.standardise(latents).std() == pytest.approx(1, abs=0.02)


def test_masks_reach_both_transformers(model: CaptionedModel, vocabulary: Vocabulary) -> None:
    seen: dict[str, torch.Tensor] = {}

    def note(name: str) -> Any:
        return lambda _part, _args, kwargs: seen.update({name: kwargs["attention_mask"]})

    model.text_encoder.clip.register_forward_pre_hook(note("text"), with_kwargs=True)
    model.caption_decoder.gpt.register_forward_pre_hook(note("caption"), with_kwargs=True)
    tokens = vocabulary.encode(CAPTIONS)
    model.caption_decoder.loss(model.text_encoder(tokens), tokens)
    assert seen["text"].equal(tokens.mask)
    assert seen["caption"].sum(dim=1).tolist() == [1 + 7, 1 + 3, 1 + 6, 1 + 3], "the picture, and what is no padding"


def test_padding_changes_no_embedding_and_no_loss(model: CaptionedModel, vocabulary: Vocabulary) -> None:
    model.eval()
    alone, padded = vocabulary.encode(CAPTIONS[1:2]), vocabulary.encode(CAPTIONS[:2])
    torch.testing.assert_close(model.text_encoder(alone)[0], model.text_encoder(padded)[1])
    embedding = torch.randn(2, 16)
    both = [model.caption_decoder.loss(embedding[i : i + 1], vocabulary.encode(CAPTIONS[i : i + 1])) for i in (0, 1)]
    counts = torch.tensor([8.0, 3.0])
    expected = (torch.stack(both) * counts).sum() / counts.sum()
    torch.testing.assert_close(model.caption_decoder.loss(embedding, padded), expected)


def test_captions_are_drawn_by_their_seed_alone(model: CaptionedModel) -> None:
    model.eval()
    embedding, sampling = torch.randn(16), CaptionSampling(top_p=1.0, top_k=0)
    state = torch.get_rng_state()
    first = model.caption_decoder.draw(embedding, 4, sampling, seed=1)
    assert torch.get_rng_state().equal(state), "the global generator is left as it was"
    torch.randn(3)
    assert model.caption_decoder.draw(embedding, 4, sampling, seed=1) == first
    assert model.caption_decoder.draw(embedding, 4, sampling, seed=2) != first
    assert len(first) == 4 and len({tuple(row) for row in first}) > 1
    assert all(len(row) <= 23 for row in first)


def test_a_caption_has_a_word_at_least(model: CaptionedModel) -> None:
    """Even where the end is the likeliest of all."""
    model.eval()
    torch.nn.init.zeros_(model.caption_decoder.gpt.lm_head.weight)
    model.caption_decoder.gpt.lm_head.weight.data[END] = 1
    model.caption_decoder.gpt.transformer.ln_f.bias.data += 5
    for row in model.caption_decoder.draw(torch.randn(16), 3, CaptionSampling(), seed=0):
        assert len(row) >= 2 and row[0] != END and row[1] == END


def test_sampling_options_count(model: CaptionedModel) -> None:
    """top_k 1, a top_p near 0 and a low temperature each leave the likeliest word alone."""
    model.eval()
    embedding = torch.randn(16)
    likeliest = model.caption_decoder.draw(embedding, 1, CaptionSampling(sampled=False), seed=0)
    for only in (CaptionSampling(top_k=1), CaptionSampling(top_p=1e-6), CaptionSampling(temperature=1e-4)):
        assert model.caption_decoder.draw(embedding, 2, only, seed=9) == likeliest * 2


def test_the_penalty_is_on_words_alone() -> None:
    penalty = WordRepetitionPenalty(2.0, marks=[END, 4])
    scores = torch.tensor([[1.0, -1.0, 3.0, 4.0, 5.0, 6.0]])
    made = penalty(torch.tensor([[4, 1, 2]]), scores)
    assert made.tolist() == [[1.0, -2.0, 1.5, 4.0, 5.0, 6.0]]
