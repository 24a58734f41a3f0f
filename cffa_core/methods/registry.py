"""Which class is which method: the closed list behind the word ``method`` of a spec."""

from __future__ import annotations

from pathlib import Path

from cffa_core.jobs.spec import Method
from cffa_core.methods.controlnet import ControlNet
from cffa_core.methods.dual_unet import DualUnet
from cffa_core.methods.method import PairMethod, read_card
from cffa_core.methods.shared_attention import SharedAttention
from cffa_core.methods.side_by_side import SideBySide
from cffa_core.models.base import Base

METHODS: dict[Method, type[PairMethod]] = {
    found.method: found for found in (ControlNet, DualUnet, SharedAttention, SideBySide)
}


def load_method(folder: Path, base: Base) -> PairMethod:
    """Load a model folder of any method onto ``base``; raises as :meth:`PairMethod.load` does."""
    return METHODS[Method(read_card(folder)["method"])].load(folder, base)
