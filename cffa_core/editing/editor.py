"""Edit a pair by text: CF and FA as rows of ONE forward, changed under ONE mask (METHODS 5).

Encodes the pair, inverts it, runs the sampler back with the edits' guidance and lays the change onto the pair. What
comes out depends on (model, settings, seed, pixels) of the pair alone: it never shares a forward with another. Knows no
files and no jobs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from cffa_core import rng
from cffa_core.attention.processors import capturing
from cffa_core.attention.store import AttentionStore
from cffa_core.attention.words import word_positions
from cffa_core.editing.compositing import grey, inner_weight, lay_on, mean_difference, pixel_weight, seen_area
from cffa_core.editing.denoiser import MODALITIES, Denoiser
from cffa_core.editing.guidance import EncodedEdit, edit_guidance
from cffa_core.editing.inversion import OnStep, StochasticSolver, invert, replay
from cffa_core.editing.masks import shrink
from cffa_core.errors import InvalidDataset, InvalidSpec, Problem
from cffa_core.jobs.edit_spec import HERE, EditSettings, EditTerm
from cffa_core.methods.pair_sampler import chroma, to_uint8
from cffa_core.rng import pair_seed


@dataclass(frozen=True)
class SourcePair:
    """A pair to be edited: ``cf (H, W, 3)`` and ``fa (H, W)`` uint8, registered.

    ``where (H, W)`` bool, if given, is the only area in which anything may change.
    """

    index: int
    name: str
    cf: NDArray[np.uint8]
    fa: NDArray[np.uint8]
    where: NDArray[np.bool_] | None = None


@dataclass(frozen=True)
class EditedPair:
    """An edited pair: ``cf (H, W, 3)``, ``fa (H, W)`` uint8, and ``weight (H, W)`` in [0, 1], the share of the edit.

    Where ``weight`` is 0 every pixel is the source's; ``spill`` is how much the decoded images changed there, which was
    not laid on, ``round_trip`` the error of the VAE alone on each source image: means in grey levels of 255.
    ``fa_chroma`` as of a generated pair.
    """

    index: int
    seed: int
    cf: NDArray[np.uint8]
    fa: NDArray[np.uint8]
    weight: NDArray[np.float32]
    fa_chroma: float
    round_trip: dict[str, float]
    spill: dict[str, float]


class PairEditor:
    """A model ready to edit pairs with one setting; prompts are encoded once.

    Raises ``InvalidSpec`` for a prompt longer than the tokenizer takes, naming which, or a resolution that does not
    divide. ``model_digest`` is what the pairs' files call the model they come from.
    """

    def __init__(self, denoiser: Denoiser, settings: EditSettings, *, model_digest: str | None = None) -> None:
        self.denoiser = denoiser
        self.settings = settings
        self.model_digest = model_digest
        base = denoiser.base
        self.shape = base.latent_shape(settings.resolution)
        self.solver = StochasticSolver(base.scheduler_config, settings.steps, settings.skip)
        self._unconditional = self._encode("", "")
        prompts = (settings.cf_prompt, settings.fa_prompt)
        # Without a prompt of the source there is nothing to guide it with (as in LEDITS++).
        self._source = self._encode(*prompts) if any(prompts) else None
        self.edits = [self._edit(place, term) for place, term in enumerate(settings.edits)]

    def _edit(self, place: int, term: EditTerm) -> EncodedEdit:
        """An edit in its sentences."""
        texts = (term.text, term.fa_text or term.text)
        cf, fa = (
            sentence.replace(HERE, text)
            for sentence, text in zip((self.settings.cf_sentence, self.settings.fa_sentence), texts, strict=True)
        )
        words = (self._words(texts[0], cf), self._words(texts[1], fa))
        pointers = (f"/edits/{place}/text", f"/edits/{place}/{'fa_text' if term.fa_text else 'text'}")
        return EncodedEdit(term, self._encode(cf, fa, pointers), words)

    def _encode(self, cf: str, fa: str, pointers: tuple[str, str] = ("/cf_prompt", "/fa_prompt")) -> torch.Tensor:
        """``(2, 77, D)``; an error names the field of the specification."""
        rows = []
        for text, pointer in zip((cf, fa), pointers, strict=True):
            try:
                rows.append(self.denoiser.base.encode_prompts([text]))
            except InvalidSpec as error:
                problems = (Problem(pointer, "prompt_too_long", error.message),)
                raise InvalidSpec(f"{pointer}: {error.message}", problems=problems) from error
        return torch.cat(rows)

    def _words(self, text: str, sentence: str) -> tuple[int, ...]:
        """Positions of the tokens of ``text`` in ``sentence``; raises ``InvalidSpec`` if it has none."""
        tokenizer = self.denoiser.base.tokenizer
        if text != sentence:
            return word_positions(tokenizer, sentence, text)
        count = len(tokenizer(text, verbose=False).input_ids) - 2
        if count < 1:
            message = f"the text of an edit, {text!r}, is empty to this base's tokenizer; write a word"
            raise InvalidSpec(message, problems=(Problem("/edits", "no_words", message),))
        return tuple(range(1, 1 + count))

    @property
    def steps(self) -> int:
        """Forwards per pair: one per step on the way to noise and one on the way back."""
        return 2 * len(self.solver.timesteps)

    @torch.no_grad()
    def edit(self, source: SourcePair, on_step: OnStep | None = None) -> EditedPair:
        """Edit one pair; raises ``InvalidDataset`` for a pair without its partner, of another size, or a bad area.

        What is laid onto the source is the CHANGE, ``decode(edited) - decode(source's latent)``, weighted: with no
        edit the pair comes back to the last bit, and what the VAE cannot hold (fine vessels) stays (`compositing`).
        """
        check_source(source, self.settings.resolution)
        base, count = self.denoiser.base, len(self.solver.timesteps)
        seed = pair_seed(self.settings.seed, source.index)
        x0 = self.encode(source)
        area = seen_area(source.cf, source.fa, 2 * base.latent_stride) if source.where is None else source.where
        x, touched = self.latents(x0, seed, area if area.any() else None, on_step)
        weight = pixel_weight(touched.cpu().numpy(), base.latent_stride)
        if source.where is not None:
            weight *= inner_weight(source.where, base.latent_stride)
        before = [to_uint8(base.decode(row[None])[0]) for row in x0]
        after = [to_uint8(base.decode(row[None])[0]) for row in x]
        shown = {"cf": (before[0], after[0]), "fa": (grey(before[1]), grey(after[1]))}
        result = {m: lay_on(getattr(source, m), *shown[m], weight) for m in MODALITIES}
        if on_step is not None:
            on_step(2 * count, 2 * count)
        return EditedPair(
            index=source.index,
            seed=seed,
            cf=result["cf"],
            fa=result["fa"],
            weight=weight,
            fa_chroma=chroma(after[1]),
            round_trip={m: mean_difference(getattr(source, m), shown[m][0]) for m in MODALITIES},
            spill={m: mean_difference(*(image[weight == 0] for image in shown[m])) for m in MODALITIES},
        )

    @torch.no_grad()
    def encode(self, source: SourcePair) -> torch.Tensor:
        """The latents ``(2, C, h, w)`` of a pair: the mean of what the VAE says, one image per call."""
        shown = (source.cf, np.repeat(source.fa[..., None], 3, axis=2))
        images = [torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1 for image in shown]
        return torch.cat([self.denoiser.base.encode_images(image)[0] for image in images])

    @torch.no_grad()
    def latents(
        self,
        x0: torch.Tensor,
        seed: int,
        where: NDArray[np.bool_] | None = None,
        on_step: OnStep | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Edited latents ``(2, C, h, w)`` of ``x0``, and the cells ``(h, w)`` bool on which an edit ever acted."""
        device, count = x0.device, len(self.solver.timesteps)
        within = None if where is None else shrink(torch.from_numpy(where).to(device), (x0.shape[-2], x0.shape[-1]))
        touched = torch.zeros(x0.shape[-2:], dtype=torch.bool, device=device)

        def edited(x: torch.Tensor, t: torch.Tensor, i: int) -> torch.Tensor:
            nonlocal touched
            active = [edit for edit in self.edits if edit.acts_at(i)]
            eps, guidance, mask = self._predict(x, t, active, within)
            touched = touched | mask
            return eps + guidance

        def told(first: int) -> OnStep | None:
            return None if on_step is None else lambda done, _: on_step(first + done, 2 * count)

        noise_at = pair_noise(seed, self.shape, self.settings.noise, device)
        inversion = invert(lambda x, t, _: self._predict(x, t, (), None)[0], self.solver, x0, noise_at, told(0))
        return replay(edited, self.solver, inversion, told(count)), touched

    def _predict(
        self, x: torch.Tensor, t: torch.Tensor, edits: Sequence[EncodedEdit], within: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Prediction without the edits and their guidance, each ``(2, C, h, w)``, and the mask ``(h, w)``.

        Rows of the one forward: CF and FA without a prompt, with the source's if there is one, with each edit's.
        """
        texts = [self._unconditional, *([] if self._source is None else [self._source]), *(e.text for e in edits)]
        rows = MODALITIES * len(texts)
        first = len(rows) - 2 * len(edits)
        store = AttentionStore(
            kinds=("cross",),
            places=("down", "up"),
            keep="last",
            rows=range(first, len(rows)),
        )
        with ExitStack() as stack:
            if edits:
                stack.enter_context(capturing(self.denoiser.unet, store))
            said = self.denoiser.predict_noise(x.repeat(len(texts), 1, 1, 1), t, torch.cat(texts), rows)
        by_text = said.reshape(len(texts), 2, *said.shape[1:])
        unconditional = eps = by_text[0]
        if self._source is not None:
            eps = unconditional + self.settings.source_guidance * (by_text[1] - unconditional)
        if not edits:
            return eps, torch.zeros_like(eps), torch.zeros(x.shape[-2:], dtype=torch.bool, device=x.device)
        seen = store.average("cross", side=mask_side(store, x.shape[-2]))
        maps = seen.reshape(len(edits), 2, *seen.shape[1:])
        conditional = by_text[len(texts) - len(edits) :]
        reference = by_text[1] if self.settings.against == "source" else unconditional
        return eps, *edit_guidance(edits, reference, conditional, maps, int(t), self.settings.mask, within)


def mask_side(store: AttentionStore, latent_side: int) -> int:
    """The side of the maps that make a mask: a quarter of the latent's, or the nearest that the UNet has."""
    sides = sorted({store.maps(layer.name).shape[-2] for layer in store.layers})
    return min(sides, key=lambda side: abs(side - latent_side / 4))


def pair_noise(
    seed: int, shape: tuple[int, int, int], mode: str, device: torch.device
) -> Callable[[int], torch.Tensor]:
    """The noise ``(2, C, h, w)`` of ``x_t`` at each step, drawn anew for each; shared by CF and FA, or their own."""

    def noise_at(i: int) -> torch.Tensor:
        cf = torch.randn(shape, generator=rng.generator(seed, f"x_t {i}"))
        own = mode == "independent"
        fa = torch.randn(shape, generator=rng.generator(seed, f"x_t {i}", "fa")) if own else cf
        return torch.stack([cf, fa]).to(device)

    return noise_at


def check_source(source: SourcePair, resolution: int) -> None:
    """Raise ``InvalidDataset`` unless both images are there, are ``resolution`` pixels a side, and the area fits."""
    size = (resolution, resolution)
    problems = []
    for m, shape in (("cf", (*size, 3)), ("fa", size)):
        image = getattr(source, m)
        if image is None:
            problems.append(Problem(source.name, "no_partner", f"the pair has no {m.upper()}; an edit needs both"))
        elif image.shape != shape or image.dtype != np.uint8:
            found = f"{m.upper()} is {image.shape} {image.dtype}, not {shape} uint8"
            problems.append(Problem(source.name, "size", f"{found}; resize the pair or set another resolution"))
    if source.where is not None:
        if source.where.shape != size:
            found = f"the area to be edited is {source.where.shape}, not {size}; draw it on the picture at its size"
            problems.append(Problem(source.name, "mask_size", found))
        elif not source.where.any():
            problems.append(Problem(source.name, "mask_empty", "the area to be edited is empty; mark at least a pixel"))
    if problems:
        raise InvalidDataset(f"pair {source.name!r} cannot be edited: {problems[0].message}", problems=tuple(problems))
