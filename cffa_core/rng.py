"""Seeds, generators and the numerics key: everything that makes a result repeatable.

Knows nothing of models or jobs. torch is imported inside the functions that need it, so that torch-free packages may
use the seed derivation.
"""

from __future__ import annotations

import hashlib
import platform
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

SEED_BITS = 63


def derive_seed(*parts: int | str) -> int:
    """Derive a 63-bit seed from ``parts`` with SHA-256; e.g. ``derive_seed(job_seed, "pair", 17)``.

    The same parts give the same seed on every machine; different parts give independent seeds.
    """
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> (64 - SEED_BITS)


def pair_seed(job_seed: int, index: int, attempt: int = 0) -> int:
    """Seed of try ``attempt`` at pair ``index`` of a generation job (DESIGN, Generation).

    Try 0 is the only one without a gate, so that a gate that refuses nothing changes no pair.
    """
    return derive_seed(job_seed, "pair", index, *((attempt,) if attempt else ()))


def generator(*parts: int | str) -> torch.Generator:
    """Return a CPU generator seeded by :func:`derive_seed`; noise is always drawn on the CPU, then moved."""
    import torch

    return torch.Generator(device="cpu").manual_seed(derive_seed(*parts))


def cpu_model() -> str:
    """Name of this machine's processor, as far as the system tells it."""
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        return platform.processor() or platform.machine()
    return platform.processor() or platform.machine()


def numerics_key(*, device: str, dtype: str, batch_size: int) -> str:
    """Name everything that bit-identity depends on (DESIGN, Generation).

    Two runs of one spec are bit-identical if their keys are equal: device and its model, torch and diffusers
    versions, dtype, CPU threads, batch size.
    """
    import diffusers
    import torch

    name = torch.cuda.get_device_name() if device.startswith("cuda") else cpu_model()
    threads = torch.get_num_threads() if device == "cpu" else 0
    return (
        f"{device.split(':')[0]}/{name}/torch-{torch.__version__}/diffusers-{diffusers.__version__}"
        f"/{dtype}/threads-{threads}/batch-{batch_size}"
    )
