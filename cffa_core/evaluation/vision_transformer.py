"""Feature extractor from a vision transformer in a local folder: DINOv2, DINOv3, or a ViT such as RETFound.

The folder has the layout of ``transformers`` (``config.json``, ``model.safetensors``, perhaps
``preprocessor_config.json``). Nothing is downloaded, no code of the folder runs, weights are safetensors only.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from safetensors import SafetensorError
from transformers import Dinov2Model, Dinov2WithRegistersModel, DINOv3ViTModel, ViTModel

from cffa_core.data.contracts import Bytes, PairImages
from cffa_core.errors import ModelUnavailable
from cffa_core.evaluation.bootstrap import Values

# model_type of config.json -> class and its options; a pooler is a head, and published weights often lack it.
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "dinov2": (Dinov2Model, {}),
    "dinov2_with_registers": (Dinov2WithRegistersModel, {}),
    "dinov3_vit": (DINOv3ViTModel, {}),
    "vit": (ViTModel, {"add_pooling_layer": False}),
}
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MAX_SIDE = 518


class VisionTransformer:
    """Extractor ``vit``: the class token after the last layer, of each image at the model's own size.

    ``sha256`` is the digest of the configuration, the preprocessing and the weights.
    """

    def __init__(self, folder: Path, *, device: str = "cpu") -> None:
        """Load from ``folder``. Raises ``ModelUnavailable`` that says what is missing or not supported."""
        if not folder.is_dir():
            raise ModelUnavailable(
                f"there is no feature extractor at {folder}: give the folder of a vision transformer"
            )
        weights = sorted(folder.glob("model*.safetensors"))
        if not weights or not (folder / "config.json").is_file():
            raise ModelUnavailable(
                f"{folder} is no extractor: config.json and model.safetensors are needed (other weight formats are "
                "not read; save the model again with save_pretrained)"
            )
        config = _read(folder / "config.json")
        kind = str(config.get("model_type"))
        if kind not in KINDS:
            raise ModelUnavailable(f"{folder} holds a {kind!r} model; supported are {', '.join(sorted(KINDS))}")
        preparing = folder / "preprocessor_config.json"
        prepared = _read(preparing) if preparing.is_file() else {}
        self.name = f"vit:{folder.resolve().name}"
        self.sha256 = _digest([folder / "config.json", *([preparing] if prepared else []), *weights])
        self.model = _load(folder, *KINDS[kind]).eval().requires_grad_(False).to(device)
        self.device = device
        self._kind = kind
        self.side = self._side(prepared)
        self._mean = np.array(prepared.get("image_mean") or IMAGENET_MEAN, dtype=np.float32)
        self._std = np.array(prepared.get("image_std") or IMAGENET_STD, dtype=np.float32)

    def pair(self, images: PairImages) -> tuple[Values, Values]:
        """Features (D,) of CF and (D,) of FA, which is shown as a grey image of three equal channels."""
        fa = np.repeat(images.fa[..., None], 3, axis=2)
        batch = torch.from_numpy(np.stack([self._prepared(images.cf), self._prepared(fa)])).to(self.device)
        with torch.no_grad():
            found = self.model(pixel_values=batch).last_hidden_state[:, 0].double().cpu().numpy()
        return found[0], found[1]

    def _side(self, prepared: dict[str, Any]) -> int:
        """Side of the input: the one it was trained at, in whole patches."""
        own, patch = int(self.model.config.image_size), int(self.model.config.patch_size)
        if self._kind == "vit":
            return own
        asked = prepared.get("crop_size") or prepared.get("size") or {}
        side = int(asked.get("height") or asked.get("shortest_edge") or own)
        return max(patch, min(side, MAX_SIDE) // patch * patch)

    def _prepared(self, image: Bytes) -> Any:
        kind = cv2.INTER_AREA if max(image.shape[:2]) > self.side else cv2.INTER_CUBIC
        resized = cv2.resize(image, (self.side, self.side), interpolation=kind).astype(np.float32) / 255
        return np.ascontiguousarray(((resized - self._mean) / self._std).transpose(2, 0, 1), dtype=np.float32)


def _load(folder: Path, kind: Any, options: dict[str, Any]) -> Any:
    """Load strictly: a weight that the file lacks would be random, and its features meaningless."""
    try:
        model, report = kind.from_pretrained(
            folder,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            dtype=torch.float32,
            **options,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelUnavailable(f"the extractor in {folder} cannot be loaded: {error}") from error
    absent = sorted(report["missing_keys"])
    if absent:
        raise ModelUnavailable(f"the extractor in {folder} lacks weights: {absent[:5]}")
    return model


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelUnavailable(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ModelUnavailable(f"{path} is not a JSON object")
    return content


def _digest(files: list[Path]) -> str:
    found = hashlib.sha256()
    for path in files:
        with path.open("rb") as stream:
            found.update(f"{path.name} {hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return found.hexdigest()
