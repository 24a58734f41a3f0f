"""The CFFA library: pairs, methods, jobs and storage. Knows neither FastAPI nor Celery.

``load_base``, ``load_pairs``, ``train``, ``load_model`` and ``edit`` (see :mod:`cffa_core.library`) are the whole of it
for a notebook; they are looked up on first use, so that ``import cffa_core`` costs nothing and brings no torch.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "edit", "load_base", "load_model", "load_pairs", "train"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("cffa_core.library"), name)
    raise AttributeError(f"module 'cffa_core' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
