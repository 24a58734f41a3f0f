"""`controlnet` (METHODS 3): CF and FA drawn on a GIVEN structure, shown to the base by ControlNets.

A LoRA per modality as in `dual_unet`, and beside the UNet one ControlNet (Zhang et al. 2023) that sees a vessel map and
one that sees the image as coarse tiles. Both serve both modalities; prompt and noise say which one is meant. How maps
and tiles are made is in `data.vessel_map`, where they come from in a generation in `recipes.structures`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from diffusers import ControlNetModel
from numpy.typing import NDArray
from safetensors.torch import save
from torch import nn

from cffa_core import rng
from cffa_core.data import vessel_map
from cffa_core.data.pairs import Pair
from cffa_core.errors import InvalidDataset, Problem
from cffa_core.jobs.spec import ControlNetSpec, Method
from cffa_core.methods.method import PairMethod, Tensors
from cffa_core.models.checkpoint import read_tensors

Vessels = Literal["frangi", "masks"]


class ControlNet(PairMethod):
    """A base with a LoRA per modality and ControlNets ``vessels`` and (unless it is off) ``tile``."""

    method = Method.CONTROLNET
    takes_structure = True

    def set_up(self) -> None:
        """Make the ControlNets."""
        self.spec = self.settings.controlnet or ControlNetSpec()
        names = ("vessels", "tile") if self.spec.tile else ("vessels",)
        self.nets: dict[str, Any] = {name: self._new_net(name) for name in names}

    def _new_net(self, name: str) -> Any:
        """A ControlNet that starts as the base's encoder and, by its zero convolutions, changes nothing at first.

        Its weights are float32 whatever the base is stored in: AdamW's steps are lost in half precision.
        """
        kept = torch.get_rng_state()
        try:
            # diffusers draws the embedding of the control image from the global generator.
            torch.default_generator.manual_seed(rng.derive_seed(self.settings.seed, "controlnet", name))
            net: Any = ControlNetModel.from_unet(self.base.unet)
        finally:
            torch.set_rng_state(kept)
        net.requires_grad_(True).eval().to(self.base.device)
        if self.settings.gradient_checkpointing:
            net.enable_gradient_checkpointing()
        return net

    # --- the structure ------------------------------------------------------------------------------------------------

    def structure(self, pair: Pair) -> dict[str, torch.Tensor]:
        """``vessels``, ``tile_cf`` and ``tile_fa`` of a pair, each ``(3, H, W)`` uint8; the vessels as in training."""
        return self.structure_from(pair, self.spec.vessels)

    def structure_from(self, pair: Pair, vessels: Vessels) -> dict[str, torch.Tensor]:
        """As :meth:`structure`, with the vessels from Frangi's filter or from the mask that came with the pair.

        Raises ``InvalidDataset`` if there is no such mask. A CF's tile keeps its own colours in every colour variant.
        """
        cf, fa = _bytes(pair.cf), _bytes(pair.fa)[..., 0]
        if vessels == "frangi":
            mask = vessel_map.frangi_vessels(cf, pair.valid_cf[0].numpy())
        elif "vessel" in pair.masks:
            mask = pair.masks["vessel"].numpy()
        else:
            file = f"masks/vessel/{pair.name}.png"
            message = f"pair {pair.name!r} has no vessel mask; add {file} to the data set, or use frangi vessel maps"
            raise InvalidDataset(message, problems=(Problem(file, "missing_mask", message),))
        shown = {"vessels": _image(vessel_map.scribble(mask))}
        if self.spec.tile:
            size = self.spec.tile_size
            shown |= {"tile_cf": _image(vessel_map.tile(cf, size)), "tile_fa": _image(vessel_map.tile(fa, size))}
        return shown

    def control_rows(self, structure: Tensors) -> Tensors:
        """``vessels`` and ``tile`` of each row: the vessels are both modalities', the tile is the row's own."""
        shown = {"vessels": torch.cat([structure["vessels"] for _ in self.modalities])}
        if self.spec.tile:
            shown["tile"] = torch.cat([structure[f"tile_{m}"] for m in self.modalities])
        return shown

    # --- training and sampling ----------------------------------------------------------------------------------------

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The LoRAs, then each ControlNet as ``controlnet_NAME/...``."""
        yield from self.lora.named_parameters()
        for name, net in self.nets.items():
            for inner, parameter in net.named_parameters():
                yield f"controlnet_{name}/{inner}", parameter

    def predict_noise(
        self,
        x: torch.Tensor,
        timesteps: torch.Tensor,
        text: torch.Tensor,
        rows: Sequence[str],
        structure: Tensors | None = None,
    ) -> torch.Tensor:
        """The base with each row's LoRA, its skip connections moved by the sum of the ControlNets' residuals."""
        if structure is None:
            raise ValueError("this method predicts noise for a given structure; there is none")
        self.lora.set_rows(rows)
        dtype = self.base.dtype
        x, text = x.to(dtype), text.to(dtype)
        down, middle = self._residuals(x, timesteps, text, structure)
        predicted: torch.Tensor = self.unet(
            x,
            timesteps,
            text,
            down_block_additional_residuals=down,
            mid_block_additional_residual=middle,
            return_dict=False,
        )[0]
        return predicted.float()

    def _residuals(
        self, x: torch.Tensor, timesteps: torch.Tensor, text: torch.Tensor, structure: Tensors
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """What is added to each of the UNet's skip connections, and to its middle."""
        dtype = self.base.dtype
        parts: list[list[torch.Tensor]] = []
        with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
            for name, net in self.nets.items():
                shown = structure[name].to(x.device, dtype) / 255
                down, middle = net(
                    x,
                    timesteps,
                    text,
                    controlnet_cond=shown,
                    conditioning_scale=self.spec.scale,
                    return_dict=False,
                )
                parts.append([*down, middle])
        sums = [torch.stack(places).sum(0).to(dtype) for places in zip(*parts, strict=True)]
        return sums[:-1], sums[-1]

    # --- the model folder ---------------------------------------------------------------------------------------------

    def parameter_counts(self) -> dict[str, int]:
        """Trained parameters of each LoRA and each ControlNet."""
        counts = {f"controlnet_{name}": sum(p.numel() for p in net.parameters()) for name, net in self.nets.items()}
        return super().parameter_counts() | counts

    def write_weights(self, folder: Path) -> None:
        """Write the LoRAs, and ``controlnet_NAME.safetensors`` under the names that diffusers gives the weights.

        The configuration of a ControlNet follows from the base, so there is none to write.
        """
        super().write_weights(folder)
        for name, net in self.nets.items():
            weights = {inner: weight.detach().cpu().contiguous() for inner, weight in net.state_dict().items()}
            (folder / f"controlnet_{name}.safetensors").write_bytes(save(weights))

    def read_weights(self, folder: Path) -> None:
        """Read what :meth:`write_weights` wrote; raises ``CorruptArtifact`` or ``ModelUnavailable``."""
        super().read_weights(folder)
        for name, net in self.nets.items():
            weights = read_tensors(folder / f"controlnet_{name}.safetensors", net.state_dict())
            net.load_state_dict(weights)


def _bytes(image: torch.Tensor) -> NDArray[np.uint8]:
    """``(C, H, W)`` in [-1, 1] -> ``(H, W, C)`` uint8."""
    scaled = ((image + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    pixels: NDArray[np.uint8] = scaled.permute(1, 2, 0).contiguous().numpy()
    return pixels


def _image(pixels: NDArray[np.uint8]) -> torch.Tensor:
    """``(H, W)`` or ``(H, W, 3)`` -> ``(3, H, W)``; one channel is shown three times and kept once."""
    found = torch.from_numpy(pixels)
    return found.expand(3, -1, -1) if found.ndim == 2 else found.permute(2, 0, 1).contiguous()
