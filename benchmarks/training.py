"""How fast does training go? Cached latents and one forward, against VAE and text encoder in the loop and two UNets.

Ours: `TrainingRun.train_step`, as jobs run it: latents and prompts encoded before, CF and FA rows through one UNet with
two LoRAs. Against it the structure of diffusers' text-to-image LoRA example, once per modality: every step encodes the
images and the prompts, and each modality has a UNet of its own with a LoRA of peft. Both start from the same LoRAs and
draw the same timesteps and noise for the same pairs, both minimise the same loss; the losses of each step are compared.

    python -m benchmarks.training [--base tiny sd15] [--device cuda --precision bf16]

writes benchmarks/results/training.json; ``sd15`` is its architecture with random weights. Goals: 2.5 times as many
steps per second on `tiny`, 1.3 times on SD 1.5.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import math
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

from benchmarks.timing import CLOCKS, circumstances, in_turn, seconds_of, shares, speedup, spread, weight_bytes
from cffa_core import rng
from cffa_core.data.pairs import load_pairs
from cffa_core.data.phantom import write_phantoms
from cffa_core.diffusion.latents import Variant, draw_variant
from cffa_core.diffusion.losses import ModalityLatents, pair_loss
from cffa_core.jobs.context import FolderContext
from cffa_core.jobs.spec import TrainSettings
from cffa_core.models.base import Base, load_base
from cffa_core.models.sd15 import write_sd15
from cffa_core.recipes.training_phases import learning_rate
from cffa_core.recipes.training_run import TrainingRun

RESULTS = Path(__file__).resolve().parent / "results" / "training.json"
OURS, EXAMPLE = "ours", "structure of the diffusers example"


def main() -> None:
    """Measure every base that was named, and add it to the JSON."""
    options = _options()
    found: dict[str, Any] = json.loads(options.results.read_text()) if options.results.exists() else {}
    found |= {"question": "how fast does training go?"}
    for ref in options.base:
        with tempfile.TemporaryDirectory(prefix="cffa-training-") as work:
            name = Path(ref).name if options.precision == "fp32" else f"{Path(ref).name}, {options.precision}"
            found[name] = _measure(ref, Path(work), options)
        options.results.parent.mkdir(exist_ok=True)
        options.results.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", nargs="+", default=["tiny"], help="bases; `sd15` has random weights")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16", "fp16"])
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=1, help="pairs per step")
    parser.add_argument("--steps", type=int, default=5, help="training steps per round")
    parser.add_argument("--repeats", type=int, default=5, help="rounds")
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--profile", action="store_true", help="also say where the time of a step goes")
    parser.add_argument("--clock", default="wall", choices=list(CLOCKS), help="cpu: for a machine that others use too")
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args()


def _measure(ref: str, work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Both arms on one base: the same steps, one after the other, in turn."""
    result = circumstances(options.device, options.clock)
    base = load_base(write_sd15(work / ref) if ref == "sd15" else ref, device=options.device, dtype=options.precision)
    write_phantoms(work / "pairs", options.pairs, 1, options.resolution)
    pairs = load_pairs(work / "pairs", options.resolution)
    settings = TrainSettings(
        resolution=options.resolution,
        batch_size=options.batch_size,
        precision=options.precision,
        steps=1_000_000,
        holdout=0.0,
        augment="none",
        preview_pairs=0,
        seed=5,
    )
    context = FolderContext(work / "run")
    run = TrainingRun(settings, pairs, base, work / "run", context)
    encoding = seconds_of(
        lambda: [run.train_latents.moments(i, Variant()) for i in range(len(pairs))], options.device, options.clock
    )
    run.start()
    example = Example(run, base)
    steps = max(1, options.steps)
    arms = {
        OURS: partial(_repeat, run.train_step, steps),
        EXAMPLE: partial(_repeat, example.train_step, steps),
    }
    for arm in (run.train_step, example.train_step):
        arm()  # warm-up; its losses are compared too
    seconds = in_turn(arms, options.repeats, options.device, options.clock)
    ours = [values["loss"] for _, values in context.logged]
    gaps = [float(f"{abs(a - b) / abs(a):.2g}") for a, b in zip(ours, example.losses, strict=True)]
    result |= {
        "setting": {
            name: getattr(options, name)
            for name in ("resolution", "batch_size", "steps", "repeats", "pairs", "device", "precision")
        },
        "steps_per_second": {name: spread([steps / s for s in found]) for name, found in seconds.items()},
        "ours_is_faster_by": speedup(seconds, OURS, EXAMPLE),
        "relative_difference_of_the_losses": {"first": gaps[0], "largest": max(gaps), "compared": len(gaps)},
        "seconds_to_encode_a_pair_once": round(encoding / len(pairs), 3),
        "unet_weight_bytes": {OURS: weight_bytes(run.model.unet), EXAMPLE: weight_bytes(*example.unets.values())},
    }
    if options.profile:
        result["where_the_time_goes"] = {
            OURS: shares(run.train_step, options.device),
            EXAMPLE: shares(example.train_step, options.device),
        }
    return result


def _repeat(step: Callable[[], None], times: int) -> None:
    for _ in range(times):
        step()


class Example:
    """The example's training step, for two modalities, with everything that it computes anew at each step.

    It takes the data, the draws and the loss of ``run``, so that the two arms can be compared step by step.
    """

    def __init__(self, run: TrainingRun, base: Base) -> None:
        def as_loaded(part: Any) -> Any:
            """A copy in the memory layout in which diffusers loads it."""
            return copy.deepcopy(part).to(memory_format=torch.contiguous_format)

        # As the example does it: text encoder and VAE in the precision of the run too.
        frozen = {"vae": as_loaded(base.vae), "text_encoder": copy.deepcopy(base.text_encoder)}
        self.run, self.step = run, 0
        self.base = dataclasses.replace(base, **{name: part.to(base.dtype) for name, part in frozen.items()})
        self.losses: list[float] = []
        spec = run.settings.lora
        config = LoraConfig(r=spec.rank, lora_alpha=spec.alpha, target_modules=list(spec.targets))
        self.unets = {m: as_loaded(base.unet) for m in run.model.modalities}
        own = dict(run.model.named_parameters())
        weights: list[torch.nn.Parameter] = []
        for m, unet in self.unets.items():
            unet.requires_grad_(False)
            unet.add_adapter(config)
            for name, weight in unet.named_parameters():
                if weight.requires_grad:
                    with torch.no_grad():
                        weight.data = weight.data.float()
                        weight.copy_(own[f"{m}/{name.replace('.default', '')}"])
                    weights.append(weight)
        if sum(weight.numel() for weight in weights) != sum(weight.numel() for weight in own.values()):
            raise RuntimeError("peft trains other parameters than we do")
        settings = run.settings
        # The example, too, tokenises before its loop.
        padding = {"padding": "max_length", "max_length": base.text_encoder.config.max_position_embeddings}
        prompts = run.model.prompts(settings.cf_prompt, settings.fa_prompt)
        tokens = {m: base.tokenizer(said, return_tensors="pt", **padding) for m, said in prompts.items()}
        self.tokens = {m: found.input_ids.to(base.device) for m, found in tokens.items()}
        self.weights = weights
        self.optimizer = torch.optim.AdamW(weights, lr=settings.learning_rate, weight_decay=settings.weight_decay)

    def train_step(self) -> None:
        """Images and prompts through their encoders, noise, one forward per UNet, loss, backward, AdamW."""
        settings, base, schedule = self.run.settings, self.base, self.run.model.schedule
        generator = rng.generator(settings.seed, "step", self.step + 1)
        rate = learning_rate(self.step, settings.steps, settings.learning_rate)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        x0, valid = self._encoded(generator)
        timesteps, noise = self.run.model.draw(x0["cf"].shape, generator)
        found = {}
        for m, unet in self.unets.items():
            eps, t = noise[m].to(base.device), timesteps[m].to(base.device)
            x_t = schedule.add_noise(x0[m], eps, t)
            with torch.no_grad():
                text = base.text_encoder(self.tokens[m].expand(len(x_t), -1)).last_hidden_state
            with torch.autocast(base.device.type, base.dtype, enabled=base.dtype != torch.float32):
                said = unet(x_t.to(base.dtype), t, text.to(base.dtype), return_dict=False)[0]
            found[m] = ModalityLatents(x0[m], x_t, eps, t, valid[m].to(base.device), said.float())
        loss, _ = pair_loss(found, schedule, settings.loss)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.weights, settings.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.losses.append(float(loss.detach()))
        self.step += 1

    def _encoded(self, generator: torch.Generator) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """The batch of this step, its images taken through the VAE now; masks are taken as they are known."""
        settings, run = self.run.settings, self.run
        chosen = []
        for place in range(self.step * settings.batch_size, (self.step + 1) * settings.batch_size):
            epoch = rng.generator(settings.seed, "epoch", place // len(run.train))
            chosen.append(int(torch.randperm(len(run.train), generator=epoch)[place % len(run.train)]))
        images = {"cf": [run.train[i].cf for i in chosen], "fa": [run.train[i].fa.expand(3, -1, -1) for i in chosen]}
        moments = {m: self._moments(torch.stack(shown)) for m, shown in images.items()}
        x0: dict[str, list[torch.Tensor]] = {"cf": [], "fa": []}
        valid: dict[str, list[torch.Tensor]] = {"cf": [], "fa": []}
        for row, index in enumerate(chosen):
            draw_variant(generator, settings.augment, settings.colour_variants)
            for m, (mean, logvar) in moments.items():
                noise = torch.randn(mean.shape[1:], generator=generator).to(mean.device)
                x0[m].append(mean[row] + torch.exp(logvar[row] / 2) * noise)
                valid[m].append(run.train_latents.moments(index, Variant())[m].valid)
        return {m: torch.stack(rows) for m, rows in x0.items()}, {m: torch.stack(rows) for m, rows in valid.items()}

    @torch.no_grad()
    def _moments(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What :meth:`Base.encode_images` gives, from a VAE in the precision of the run."""
        base = self.base
        distribution = base.vae.encode(images.to(base.device, base.dtype)).latent_dist
        mean, logvar = distribution.mean.float(), distribution.logvar.float()
        return (mean - base.shift_factor) * base.scaling_factor, logvar + 2 * math.log(base.scaling_factor)


if __name__ == "__main__":
    main()
