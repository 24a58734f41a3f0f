"""The parts together: who learns from which loss, where sampling begins, what guidance does."""

from __future__ import annotations

import pytest
import torch

from cffa_core import rng
from cffa_core.captioned.model import CaptionedModel, Draws, build_scheduler
from cffa_core.captioned.vocabulary import Vocabulary
from cffa_core.errors import InvalidSpec
from cffa_core.jobs.captioned_spec import CaptionedSizes, CaptionedTrainSettings
from tests.unit.captioned.conftest import CAPTIONS

WEIGHTS = ("contrastive", "caption", "reconstruction", "diffusion")


def learners(model: CaptionedModel, vocabulary: Vocabulary, term: str, dropout: float = 0.0) -> set[str]:
    """Parts of the model that get a gradient from one term of the loss alone."""
    torch.nn.init.normal_(model.unet.leave.weight)
    settings = CaptionedTrainSettings(sizes=model.sizes, **{f"{name}_weight": float(name == term) for name in WEIGHTS})
    images = torch.rand(4, 3, 224, 224, generator=rng.generator("pictures")) * 2 - 1
    draws = Draws.of(4, model.sizes, dropout, rng.generator("draws"))
    loss, _ = model.training_loss(images, vocabulary.encode(CAPTIONS), draws, settings)
    loss.backward()  # type: ignore[no-untyped-call]
    return {
        name
        for name, part in model.named_children()
        if any(p.grad is not None and bool(p.grad.abs().max() > 0) for p in part.parameters())
    }


def test_who_learns_from_what(model: CaptionedModel, vocabulary: Vocabulary) -> None:
    """The latent is a fixed target for the diffusion, and the text really enters it."""
    assert learners(model, vocabulary, "diffusion") == {"unet", "text_encoder"}


@pytest.mark.parametrize(
    ("term", "parts"),
    [
        ("contrastive", {"text_encoder", "image_encoder", "compared", "bridge"}),
        ("caption", {"image_encoder", "caption_decoder"}),
        ("reconstruction", {"image_encoder", "image_decoder"}),
    ],
)
def test_who_learns_from_the_other_terms(
    model: CaptionedModel, vocabulary: Vocabulary, term: str, parts: set[str]
) -> None:
    assert learners(model, vocabulary, term) == parts


def test_what_is_drawn_leaves_the_encoder_s_statistics(model: CaptionedModel, vocabulary: Vocabulary) -> None:
    """The trunk's running statistics after a step are those of one pass over the pictures."""
    images = torch.rand(4, 3, 224, 224, generator=rng.generator("pictures")) * 2 - 1
    settings = CaptionedTrainSettings(sizes=model.sizes)
    model.training_loss(images, vocabulary.encode(CAPTIONS), Draws.of(4, model.sizes, 0, rng.generator("d")), settings)
    first = model.image_encoder.trunk.levels[0]
    with torch.no_grad():
        mean = first[0](images).mean((0, 2, 3))
    assert first[1].num_batches_tracked == 1
    torch.testing.assert_close(first[1].running_mean, 0.1 * mean)


def test_dropped_texts_train_the_place_without_text(sizes: CaptionedSizes, vocabulary: Vocabulary) -> None:
    for dropout, moved, learnt in ((0.0, False, True), (1.0 - 1e-6, True, False)):
        model = CaptionedModel.build(sizes, vocabulary, seed=3)
        parts = learners(model, vocabulary, "diffusion", dropout)
        grad = model.unet.no_text.grad
        assert (grad is not None and bool(grad.abs().max() > 0)) is moved
        assert ("text_encoder" in parts) is learnt


def test_a_part_of_the_batch_may_be_drawn(model: CaptionedModel, vocabulary: Vocabulary) -> None:
    """All are compared and captioned, the first two alone are reconstructed and diffused."""
    model.eval()
    settings = CaptionedTrainSettings(sizes=model.sizes)
    images = torch.rand(4, 3, 224, 224, generator=rng.generator("pictures")) * 2 - 1
    draws = Draws.of(2, model.sizes, 0.0, rng.generator("draws"))
    found = [
        model.training_loss(images[:count], vocabulary.encode(CAPTIONS[:count]), draws, settings)[1] for count in (4, 2)
    ]
    for name in ("reconstruction", "diffusion"):
        torch.testing.assert_close(found[0][name], found[1][name])
    for name in ("contrastive", "caption"):
        assert (found[0][name] - found[1][name]).abs() > 1e-4


def test_dropout_is_a_share_of_pictures(sizes: CaptionedSizes) -> None:
    draws = Draws.of(4000, sizes.model_copy(update={"latent_channels": 8}), 0.25, rng.generator("share"))
    assert draws.without_text.float().mean() == pytest.approx(0.25, abs=0.03)
    assert draws.timesteps.min() < 5 and draws.timesteps.max() > 994


@pytest.mark.parametrize("steps", [10, 37, 50, 100])
def test_sampling_begins_at_the_last_step(steps: int) -> None:
    scheduler = build_scheduler()
    assert torch.allclose(scheduler.betas, torch.linspace(1e-4, 0.02, 1000))
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps[0] == 999 and len(scheduler.timesteps) == steps


def test_ddim_ends_at_what_the_unet_sees(model: CaptionedModel) -> None:
    """A UNet that always sees the same clean latent: DDIM must end at it, in the decoder's own scale."""
    model.scale.update(torch.randn(8, 16, 7, 7) * 3 + 1)
    clean = torch.randn(16)
    torch.nn.init.zeros_(model.unet.leave.weight)
    model.unet.leave.bias.data.copy_(clean)
    drawn = model.draw(torch.randn(2, 16), torch.randn(2, 16, 7, 7), 10, 1.0)
    latent = clean[None, :, None, None].expand(2, -1, 7, 7)
    expected = model.image_decoder(latent * model.scale.deviation + model.scale.mean).clamp(-1, 1)
    torch.testing.assert_close(drawn, expected, atol=1e-4, rtol=1e-4)


def test_guidance_moves_away_from_no_text(model: CaptionedModel) -> None:
    torch.nn.init.normal_(model.unet.leave.weight, std=0.2)
    text, noise = torch.randn(1, 16), torch.randn(1, 16, 7, 7)
    plain, guided = (model.draw(text, noise, 10, scale) for scale in (1.0, 4.0))
    assert (plain - guided).abs().max() > 1e-3
    model.unet.no_text.data.copy_(text[0])
    torch.testing.assert_close(model.draw(text, noise, 10, 4.0), plain, atol=1e-4, rtol=1e-4)


def test_without_diffusion_the_text_is_decoded(model: CaptionedModel) -> None:
    model.eval()
    text = model.embed_text(CAPTIONS[0])
    expected = model.image_decoder(model.image_decoder.projection(model.bridge(text)[None]).view(1, 16, 7, 7)).clamp(
        -1, 1
    )
    assert model.draw_directly(text[None]).equal(expected)


def test_a_text_that_cannot_be_read_is_refused(model: CaptionedModel) -> None:
    with pytest.raises(InvalidSpec, match="never read 'cataract'"):
        model.embed_text("A photograph, with cataract")
