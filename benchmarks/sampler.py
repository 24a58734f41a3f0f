"""How fast are pairs drawn? One forward with two LoRAs, against two stock pipelines, and the first implementation.

Ours: `PairSampler`, 2B rows through one copy of the weights, prompts projected once. Against it (a) two diffusers
StableDiffusionPipelines, each with its LoRA fused into a UNet of its own, B images per call; (b) the first
implementation's loop, batch 1, two UNets one after the other. All get the same weights and initial latents, what they
draw is compared, and they run in turn in one process. With ``--compile`` also ours and (a) under torch.compile.

    python -m benchmarks.sampler [--base FOLDER --device cuda --precision bf16 --cuda-graph]

writes benchmarks/results/sampler.json. Goals: on a CPU not slower than (a) with half the UNet weights; on a GPU 1.5
times as fast as (a) compiled.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from numpy.typing import NDArray
from torch._dynamo.exc import TorchDynamoException
from torch._inductor.exc import InductorError
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.timing import (
    CLOCKS,
    circumstances,
    in_turn,
    matrix_rate,
    seconds_of,
    shares,
    speedup,
    spread,
    weight_bytes,
)
from cffa_core import rng
from cffa_core.diffusion.sampling import build_scheduler, draw_noise
from cffa_core.jobs.spec import LoraSpec, SamplerSpec, TrainSettings
from cffa_core.methods.dual_unet import DualUnet
from cffa_core.methods.method import Tensors
from cffa_core.methods.pair_sampler import PairSampler, to_uint8
from cffa_core.models.base import Base, load_base

RESULTS = Path(__file__).resolve().parent / "results" / "sampler.json"
OURS, STOCK, FIRST = "ours", "two stock pipelines", "first implementation"
Pictures = dict[str, list[NDArray[np.uint8]]]
Arm = Callable[[], Pictures]


def main() -> None:
    """Build the arms, compare what they draw, time them in turn, write the JSON."""
    options = _options()
    result: dict[str, Any] = {"question": "how fast are pairs drawn?", **circumstances(options.device, options.clock)}
    base = load_base(options.base, device=options.device, dtype=options.precision)
    result["setting"] = {
        name: getattr(options, name) for name in ("resolution", "batch_size", "steps", "repeats", "device", "precision")
    } | {"base": base.name, "scheduler": "ddim", "guidance_scale": 1.0}
    spec = SamplerSpec(steps=options.steps)
    seeds = list(range(options.batch_size))
    model = _model(base)
    sampler = PairSampler(model, spec, options.resolution, options.batch_size)
    with tempfile.TemporaryDirectory() as folder:
        pipes = {m: _pipeline(base, model, m, spec, Path(folder)) for m in ("cf", "fa")}
    noise = draw_noise(seeds, model.noise_shape(options.resolution), ("cf", "fa"), "shared", None, "z0")
    z = dict(zip(("cf", "fa"), noise.to(base.device).chunk(2), strict=True))
    arms: dict[str, Arm] = {
        OURS: lambda: _ours(sampler, seeds),
        STOCK: lambda: _stock(pipes, model, z, options),
        FIRST: lambda: _first(base, pipes, model, z, spec),
    }
    if options.cuda_graph:
        graphed = PairSampler(_graphed(_model(base)), spec, options.resolution, options.batch_size)
        arms[f"{OURS}, CUDA graph"] = lambda: _ours(graphed, seeds)
    if options.compile:
        result["compile"] = _add_compiled(arms, base, pipes, model, z, seeds, options)
    drawn = {name: arm() for name, arm in arms.items()}  # the first call also warms everything up
    others = [name for name in arms if name != OURS]
    result["largest_difference_to_ours"] = {name: _difference(drawn[OURS], drawn[name]) for name in others}
    seconds = in_turn(arms, options.repeats, options.device, options.clock)
    result["pairs_per_second"] = {name: spread([len(seeds) / s for s in found]) for name, found in seconds.items()}
    result["ours_is_faster_by"] = {name: speedup(seconds, OURS, name) for name in others}
    for name in arms:
        if name.startswith(f"{STOCK},"):
            mine = f"{OURS},{name.removeprefix(f'{STOCK},')}"
            result["ours_is_faster_by"][f"{name} (ours compiled too)"] = speedup(seconds, mine, name)
    unets = [pipe.unet for pipe in pipes.values()]
    result["weight_bytes"] = {
        "unet": {OURS: weight_bytes(model.unet), STOCK: weight_bytes(*unets), FIRST: weight_bytes(*unets)},
        "of which the two LoRAs": sum(p.numel() * p.element_size() for p in model.lora.parameters()),
        "vae and text encoder, once": weight_bytes(base.vae, base.text_encoder),
    }
    result["forward"] = _forward(model, sampler, seeds, options)
    result["where_the_time_goes"] = {name: shares(arms[name], options.device) for name in (OURS, STOCK)}
    options.results.parent.mkdir(exist_ok=True)
    options.results.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16", "fp16"])
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=10, help="sampler steps")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--compile", default="", choices=["", "blocks", "whole"], help="also under torch.compile")
    parser.add_argument("--cuda-graph", action="store_true", help="also ours as a CUDA graph")
    parser.add_argument("--clock", default="wall", choices=list(CLOCKS), help="cpu: for a machine that others use too")
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args()


def _model(base: Base) -> DualUnet:
    """Two LoRAs that change the picture visibly, as trained ones do; equal in every call."""
    model = DualUnet(base, TrainSettings(lora=LoraSpec()))
    with torch.no_grad():
        for name, parameter in model.lora.named_parameters():
            if ".lora_B." in name:
                drawn = torch.randn(parameter.shape, generator=rng.generator("speed", name))
                parameter.copy_(0.01 * drawn)
    return model


def _pipeline(base: Base, model: DualUnet, modality: str, spec: SamplerSpec, folder: Path) -> Any:
    """The stock pipeline of one modality: its LoRA read by diffusers and fused into a UNet of its own."""
    # As loaded by diffusers: weights in its own memory layout, all parts in one precision.
    unet, vae, text = (
        copy.deepcopy(part).to(base.dtype, memory_format=torch.contiguous_format)
        for part in (base.unet, base.vae, base.text_encoder)
    )
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=base.tokenizer,
        unet=unet,
        scheduler=build_scheduler(spec.scheduler, base.scheduler_config, spec.steps),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    (folder / f"{modality}.safetensors").write_bytes(model.lora.export(modality))
    pipe.load_lora_weights(folder, weight_name=f"{modality}.safetensors")
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    pipe.unet.requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _prompts(model: DualUnet) -> dict[str, str]:
    return model.prompts(model.settings.cf_prompt, model.settings.fa_prompt)


def _ours(sampler: PairSampler, seeds: list[int]) -> Pictures:
    """The latents and pictures of one batch, FA in colour, as the pipelines give it."""
    rows = sampler.latents(seeds)
    decoded = [sampler.model.decode(rows, place, len(seeds)) for place in range(len(seeds))]
    return {m: [to_uint8(pair[m]) for pair in decoded] for m in ("cf", "fa")}


def _stock(pipes: dict[str, Any], model: DualUnet, z: dict[str, torch.Tensor], options: argparse.Namespace) -> Pictures:
    """B images per pipeline."""
    drawn = {}
    for m, pipe in pipes.items():
        images = pipe(
            [_prompts(model)[m]] * len(z[m]),
            latents=z[m].to(pipe.unet.dtype),
            height=options.resolution,
            width=options.resolution,
            num_inference_steps=options.steps,
            guidance_scale=1.0,
            output_type="pil",
        ).images
        drawn[m] = [np.asarray(image) for image in images]
    return drawn


@torch.no_grad()
def _first(
    base: Base, pipes: dict[str, Any], model: DualUnet, z: dict[str, torch.Tensor], spec: SamplerSpec
) -> Pictures:
    """One pair at a time; per step the CF's UNet, then the FA's. (It drew with DDPM; here with DDIM, as all do.)"""
    text = {m: base.encode_prompts([prompt]).to(base.dtype) for m, prompt in _prompts(model).items()}
    drawn: Pictures = {"cf": [], "fa": []}
    for place in range(len(z["cf"])):
        x = {m: z[m][place : place + 1] for m in z}
        schedulers = {m: build_scheduler(spec.scheduler, base.scheduler_config, spec.steps) for m in x}
        for t in schedulers["cf"].timesteps:
            for m, scheduler in schedulers.items():
                said = pipes[m].unet(x[m].to(base.dtype), t, text[m]).sample.float()
                x[m] = scheduler.step(said, t, x[m], return_dict=False)[0]
        for m, pipe in pipes.items():
            unscaled = (x[m] / base.scaling_factor + base.shift_factor).to(base.dtype)
            drawn[m].append(to_uint8(pipe.vae.decode(unscaled).sample[0]))
    return drawn


def _difference(ours: Pictures, other: Pictures) -> dict[str, float]:
    """Largest difference in grey levels, and the share of values that differ at all."""
    gaps = [np.abs(a.astype(int) - b.astype(int)) for m in ours for a, b in zip(ours[m], other[m], strict=True)]
    return {
        "grey_levels": int(max(gap.max() for gap in gaps)),
        "share_of_values": round(float(np.mean([(gap > 0).mean() for gap in gaps])), 5),
    }


def _add_compiled(
    arms: dict[str, Arm],
    base: Base,
    pipes: dict[str, Any],
    model: DualUnet,
    z: dict[str, torch.Tensor],
    seeds: list[int],
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Arms of ours and of (a) under torch.compile: the repeated blocks, or the whole UNet. Returns what it cost."""
    compiled = _model(base)
    sampler = PairSampler(compiled, SamplerSpec(steps=options.steps), options.resolution, options.batch_size)
    twins = {m: copy.copy(pipe) for m, pipe in pipes.items()}
    for m, twin in twins.items():
        twin.unet = copy.deepcopy(pipes[m].unet)
    for unet in (compiled.unet, *(twin.unet for twin in twins.values())):
        if options.compile == "blocks":
            unet.compile_repeated_blocks(dynamic=False)
        else:
            unet.compile(dynamic=False)
    made: dict[str, Arm] = {
        f"{OURS}, compiled": lambda: _ours(sampler, seeds),
        f"{STOCK}, compiled": lambda: _stock(twins, model, z, options),
    }
    try:
        took = {name: round(seconds_of(arm, options.device, options.clock), 1) for name, arm in made.items()}
    except (TorchDynamoException, InductorError, RuntimeError) as error:
        return {"what": options.compile, "skipped": f"{type(error).__name__}: {str(error)[:300]}"}
    arms |= made
    return {"what": options.compile, "first_call_seconds": took}


def _graphed(model: DualUnet) -> DualUnet:
    """``model`` whose forward is captured as a CUDA graph at the third step of every run, and replayed from then on."""
    eager = model.predict_noise
    held: dict[str, Any] = {}

    def predict(
        x: torch.Tensor,
        timesteps: torch.Tensor,
        text: torch.Tensor,
        rows: Sequence[str],
        structure: Tensors | None = None,
    ) -> torch.Tensor:
        if held.get("text") is not text:  # a new run
            held.clear()
            held.update(text=text, calls=0, x=x.clone(), t=timesteps.to(x.device, torch.float32).clone())
        held["calls"] += 1
        held["x"].copy_(x)
        held["t"].copy_(timesteps)
        if held["calls"] <= 2:
            return eager(held["x"], held["t"], text, rows)
        if "graph" not in held:
            held["graph"] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(held["graph"]):
                held["said"] = eager(held["x"], held["t"], text, rows)
        held["graph"].replay()
        said: torch.Tensor = held["said"].clone()
        return said

    model.predict_noise = predict  # type: ignore[method-assign]
    return model


@torch.no_grad()
def _forward(model: DualUnet, sampler: PairSampler, seeds: list[int], options: argparse.Namespace) -> dict[str, Any]:
    """FLOPs of one UNet forward of a batch, its rate, the rate of a plain matrix product, and what fixed text saves."""
    rows = [m for m in model.modalities for _ in seeds]
    x = torch.zeros(len(rows), *model.noise_shape(options.resolution), device=model.base.device)
    t = torch.tensor(500, device=model.base.device)
    text = model.base.encode_prompts([_prompts(model)[m] for m in rows])

    def forward() -> None:
        model.predict_noise(x, t, text, rows)

    with FlopCounterMode(display=False) as counter:
        forward()
    flops = counter.get_total_flops()
    plain, fixed = [], []
    for _ in range(max(3, options.repeats)):
        plain.append(seconds_of(forward, options.device, options.clock))
        with sampler.fixed_text.during_a_run():
            forward()
            fixed.append(seconds_of(forward, options.device, options.clock))
    size = 8192 if options.device.startswith("cuda") else 2048
    rate, plain_rate = (
        flops / sorted(fixed)[len(fixed) // 2],
        matrix_rate(model.base.dtype, options.device, options.clock, size),
    )
    return {
        "rows": len(rows),
        "tflop": round(flops / 1e12, 4),
        "seconds": spread(fixed),
        "seconds_when_text_is_projected_every_step": spread(plain),
        "tflops_per_second": round(rate / 1e12, 4),
        "tflops_per_second_of_a_matrix_product": round(plain_rate / 1e12, 4),
        "share_of_the_matrix_rate": round(rate / plain_rate, 3),
    }


if __name__ == "__main__":
    began = time.perf_counter()
    main()
    print(f"took {time.perf_counter() - began:.0f} s")
