"""What the speed benchmarks share: arms run in turn, medians with their range, the machine, and where the time goes.

In turn means one call of every arm per round, each round beginning with another arm, so that whatever disturbs the
machine disturbs all arms alike. Ratios are taken within a round. Knows nothing of models.
"""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import diffusers
import torch
from torch.profiler import ProfilerActivity, profile

from tests.faults.campaign import machine

# Operator of the profiler -> what it is part of; the rest is "other".
KINDS = {
    "convolution": ("conv",),
    "attention": ("scaled_dot_product", "flash_attention", "_softmax"),
    "matrix products": ("mm", "linear", "matmul"),
    "normalisation": ("norm",),
    "optimiser": ("adam", "foreach", "lerp", "addcdiv", "addcmul"),
    "elementwise and copies": ("silu", "gelu", "mul", "add", "copy", "cat", "div", "sub", "upsample", "clone", "sqrt"),
}


# On a machine that others use, the CPU time of a single thread says what an undisturbed core would have needed.
CLOCKS = {"wall": "wall clock", "cpu": "CPU time of the process"}


def circumstances(device: str, clock: str) -> dict[str, Any]:
    """Machine, versions, threads, clock, and how busy the machine was before the first measurement."""
    gpu = {"gpu": torch.cuda.get_device_name()} if device.startswith("cuda") else {}
    return {
        "machine": machine() | gpu,
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
        "threads": torch.get_num_threads(),
        "clock": CLOCKS[clock],
        "load_before": round(os.getloadavg()[0], 2),
    }


def in_turn(arms: Mapping[str, Callable[[], Any]], repeats: int, device: str, clock: str) -> dict[str, list[float]]:
    """Seconds of each arm in each round."""
    names = list(arms)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(repeats):
        start = number % len(names)
        for name in names[start:] + names[:start]:
            gc.collect()
            seconds[name].append(seconds_of(arms[name], device, clock))
            print(f"round {number + 1}: {name} {seconds[name][-1]:.2f} s", flush=True)
    return seconds


def seconds_of(work: Callable[[], Any], device: str, clock: str) -> float:
    """Seconds of one call, until the device has done it."""
    now = time.process_time if clock == "cpu" else time.perf_counter
    _wait(device)
    began = now()
    work()
    _wait(device)
    return now() - began


def spread(values: Sequence[float], digits: int = 4) -> dict[str, Any]:
    """Median, smallest and largest value, and how many there are."""
    return {
        "median": round(statistics.median(values), digits),
        "range": [round(min(values), digits), round(max(values), digits)],
        "n": len(values),
    }


def speedup(seconds: dict[str, list[float]], ours: str, other: str) -> dict[str, Any]:
    """How many times faster ``ours`` is than ``other``: the ratio within each round."""
    return spread([b / a for a, b in zip(seconds[ours], seconds[other], strict=True)], 3)


def weight_bytes(*modules: Any) -> int:
    """Bytes of all parameters of these modules; a tensor that several hold counts once."""
    held = {weight.untyped_storage().data_ptr(): weight for module in modules for weight in module.parameters()}
    return sum(weight.untyped_storage().nbytes() for weight in held.values())


def matrix_rate(dtype: torch.dtype, device: str, clock: str, size: int) -> float:
    """Measured rate of one large matrix product in FLOP/s: the best of five."""
    a, b = (torch.randn(size, size, dtype=torch.float32).to(device, dtype) for _ in range(2))
    torch.mm(a, b)
    return 2 * size**3 / min(seconds_of(lambda: torch.mm(a, b), device, clock) for _ in range(5))


def shares(work: Callable[[], Any], device: str) -> dict[str, Any]:
    """Where the time of one call goes: percent by kind of operator, and the eight largest operators."""
    gpu = device.startswith("cuda")
    with profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as found:
        work()
        _wait(device)
    times: dict[str, float] = {}
    for event in found.key_averages():
        spent = event.self_device_time_total if gpu else event.self_cpu_time_total
        times[event.key] = times.get(event.key, 0.0) + float(spent)
    total = sum(times.values())
    kinds = dict.fromkeys([*KINDS, "other"], 0.0)
    for name, spent in times.items():
        kind = next((k for k, marks in KINDS.items() if any(mark in name.lower() for mark in marks)), "other")
        kinds[kind] += spent
    largest = sorted(times.items(), key=lambda item: -item[1])[:8]
    return {
        "percent_by_kind": {kind: round(100 * spent / total, 1) for kind, spent in kinds.items()},
        "percent_by_operator": {name[:60]: round(100 * spent / total, 1) for name, spent in largest},
    }


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
