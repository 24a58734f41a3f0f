"""The attention layers of a UNet in the Stable Diffusion layout, and how their cells lie on the latent.

A layer is named as diffusers names it (``down_blocks.1.attentions.0.transformer_blocks.0.attn2``). Holds no map.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from diffusers.models.attention_processor import Attention

from cffa_core.errors import ModelUnavailable

MapKind = Literal["cross", "self"]
Place = Literal["down", "mid", "up"]

_PLACES: dict[str, Place] = {"down_blocks": "down", "mid_block": "mid", "up_blocks": "up"}


@dataclass(frozen=True)
class Layer:
    """One attention: ``cross`` looks at the tokens of the text, ``self`` at the cells of the latent."""

    name: str
    kind: MapKind
    place: Place


def attention_layers(unet: Any, kinds: Sequence[str], places: Sequence[str]) -> list[tuple[Layer, Any]]:
    """All attentions of these kinds and places, in the order of the UNet's modules, each with its module.

    Raises ``ModelUnavailable`` if the UNet has none of a kind that was asked for.
    """
    found: list[tuple[Layer, Any]] = []
    for name, module in unet.named_modules():
        place = _PLACES.get(name.partition(".")[0])
        if isinstance(module, Attention) and place is not None:
            layer = Layer(name, "cross" if module.is_cross_attention else "self", place)
            if layer.kind in kinds and place in places:
                found.append((layer, module))
    missing = [kind for kind in kinds if not any(layer.kind == kind for layer, _ in found)]
    if missing:
        raise ModelUnavailable(
            f"this UNet has no {' or '.join(missing)}-attention in its parts {', '.join(places)}; ask for other places"
        )
    return found


def grid_of(cells: int, latent: tuple[int, int]) -> tuple[int, int]:
    """Height and width of a level with ``cells`` cells of a UNet whose input is ``latent = (h, w)``.

    Every level halves both sides, rounding up. Raises ``ModelUnavailable`` if no level has as many cells.
    """
    height, width = latent
    while height * width > cells:
        height, width = -(-height // 2), -(-width // 2)
    if height * width != cells:
        raise ModelUnavailable(f"an attention over {cells} cells fits no level of a UNet on a {latent} latent")
    return height, width
