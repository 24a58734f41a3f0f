"""The FiLM UNet: every residual block is steered after its normalisation, and everything stays 7 x 7."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers.models.resnet import ResnetBlock2D

from cffa_core.captioned.film_unet import FilmUnet
from cffa_core.jobs.captioned_spec import CaptionedSizes


def test_film_is_scale_and_shift_after_the_normalisation(sizes: CaptionedSizes) -> None:
    """One block against the equation h * (1 + scale) + shift, written out."""
    torch.manual_seed(0)
    block = FilmUnet(sizes).down[1]
    x, condition = torch.randn(2, 8, 7, 7), torch.randn(2, 16)
    h = block.conv1(F.silu(F.group_norm(x, 8, block.norm1.weight, block.norm1.bias, 1e-6)))
    scale, shift = block.time_emb_proj(F.silu(condition))[:, :, None, None].chunk(2, dim=1)
    h = F.group_norm(h, 8, block.norm2.weight, block.norm2.bias, 1e-6) * (1 + scale) + shift
    expected = block.conv_shortcut(x) + block.conv2(F.silu(h))
    torch.testing.assert_close(block(x, condition), expected)


def test_every_block_is_steered(sizes: CaptionedSizes) -> None:
    blocks = [part for part in FilmUnet(sizes).modules() if isinstance(part, ResnetBlock2D)]
    assert len(blocks) == 8 and all(block.time_embedding_norm == "scale_shift" for block in blocks)


def test_widths_of_the_specification() -> None:
    with torch.device("meta"):
        unet = FilmUnet(CaptionedSizes())
        seen: list[tuple[int, ...]] = []
        for part in unet.modules():
            if isinstance(part, ResnetBlock2D):
                part.register_forward_hook(lambda _part, _inputs, made: seen.append(tuple(made.shape[1:])))
        unet(torch.empty(2, 256, 7, 7), torch.empty(2, dtype=torch.int64), torch.empty(2, 512))
    assert [channels for channels, *_ in seen] == [128, 256, 512, 512, 512, 512, 256, 128]
    assert {tuple(side) for _, *side in seen} == {(7, 7)}
    assert unet.attention.heads == 4


def test_time_and_text_both_count(sizes: CaptionedSizes) -> None:
    torch.manual_seed(0)
    unet = FilmUnet(sizes)
    torch.nn.init.normal_(unet.leave.weight, std=0.1)
    x, text = torch.randn(1, 16, 7, 7).expand(2, -1, -1, -1), torch.randn(2, 16)
    same, early = torch.tensor([500, 500]), torch.tensor([500, 100])
    by_text = unet(x, same, text)
    by_time = unet(x, early, text[:1].expand(2, -1))
    assert (by_text[0] - by_text[1]).abs().max() > 1e-3
    assert (by_time[0] - by_time[1]).abs().max() > 1e-3
