"""Training with placeholder tokens: two phases, what a run leaves, and that stopping and resuming changes no byte."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from cffa_core.data.phantom import write_phantoms
from cffa_core.errors import Cancelled, Conflict, InvalidDataset, InvalidSpec
from cffa_core.jobs.context import FolderContext
from cffa_core.jobs.spec import AttentionSettings, GenerateSettings, LoraSpec, SamplerSpec, TrainSettings
from cffa_core.methods.dual_unet import DualUnet
from cffa_core.methods.method import read_card
from cffa_core.models.base import Base
from cffa_core.recipes.attention import capture_attention
from cffa_core.recipes.generate import generate_part, load_sampler
from cffa_core.recipes.train import run_training
from cffa_core.recipes.training_phases import phase_at

TOKENS: dict[str, Any] = {
    "tokens": ["disc", "lesion", {"name": "vessel", "source": "frangi"}],
    "phase1_steps": 3,
    "phase1_learning_rate": 1e-2,
    "text_learning_rate": 1e-3,
    "attention_lambda": 1.0,
    "prior_images": 3,
    "prior_steps": 2,
}


def settings_of(**options: Any) -> TrainSettings:
    defaults: dict[str, Any] = {
        "resolution": 64,
        "steps": 6,
        "learning_rate": 1e-2,
        "lora": LoraSpec(rank=2),
        "holdout": 0.3,
        "ema_decay": 0.5,
        "validate_every": 3,
        "checkpoint_every": 1,
        "preview_every": 3,
        "preview_pairs": 1,
        "preview": SamplerSpec(steps=2),
        "tokens": TOKENS,
        "cf_prompt": "a CF",
        "fa_prompt": "an FA",
        "seed": 7,
    }
    return TrainSettings(**(defaults | options))


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a run, without the context's own checkpoints."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    names = {path.relative_to(folder).as_posix(): path for path in paths}
    return {name: path.read_bytes() for name, path in names.items() if not name.startswith("checkpoints/")}


class Stops(FolderContext):
    """Its job is cancelled after so many steps."""

    def __init__(self, out: Path, after: int) -> None:
        super().__init__(out)
        self.after = after

    def progress(self, stage: str, current: int, total: int) -> None:
        if (stage, current) == ("training", self.after):
            raise Cancelled("stopped by the test")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "eyes"
    write_phantoms(folder, 5, seed=3, resolution=64, processes=1)
    return folder


@pytest.fixture(scope="module")
def run(base: Base, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run."""
    out = tmp_path_factory.mktemp("run") / "out"
    run_training(settings_of(), dataset, base.folder, out, FolderContext(out))
    return out


def test_what_a_run_leaves(run: Path, base: Base) -> None:
    lines = [json.loads(line) for line in (run / "training_log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert all(line["attn_loss"] > 0 for line in lines)
    assert [line["lr"] for line in lines[:3]] == [1e-2] * 3, "phase 1 has a rate of its own"
    assert all({"masked_cf", "masked_fa"} <= set(line) and "prior_loss" not in line for line in lines[:3])
    assert all("prior_loss" in line for line in lines[3:]), "phase 2 preserves the prior"
    assert all(("eps_cf" in line) != ("masked_cf" in line) for line in lines[3:])
    sheet = run / "step_000006_random_pairs/attention.png"
    with Image.open(sheet) as image:
        assert image.width > 300 and image.height > 150
    latest = run / "latest_checkpoints/step_000006"
    model = DualUnet.load(latest, base)
    card = read_card(latest)
    assert card["parameters"]["tokens"] == 3 * 32
    # The text encoder without its table of 514 words; float32.
    words = base.text_encoder.get_input_embeddings().weight
    text = sum(weight.numel() for weight in base.text_encoder.parameters()) - words.numel()
    assert card["parameters"]["text_encoder"] == text
    assert (latest / "text_encoder.safetensors").stat().st_size == pytest.approx(4 * text, rel=0.05)
    rows = load_file(latest / "tokens.safetensors")
    assert set(rows) == {"<disc>", "<lesion>", "<vessel>"}
    assert model.tokens is not None and torch.equal(rows["<disc>"], model.tokens.embedding.rows[0].detach())


def test_phase_1_moves_the_tokens_alone_and_phase_2_all_but_the_words(
    run: Path, base: Base, dataset: Path, tmp_path: Path
) -> None:
    fresh = DualUnet(base, settings_of())
    before = {name: weight.detach().clone() for name, weight in fresh.named_parameters()}
    model = DualUnet.load(run / "latest_checkpoints/step_000006", base)
    now = dict(model.named_parameters())
    assert {n.split("/")[0] for n in before if not torch.equal(before[n], now[n])} == {"cf", "fa", "tokens", "text"}
    words = base.text_encoder.get_input_embeddings().weight
    assert model.tokens is not None and model.tokens.embedding.table is words, "words are the base's own"
    with pytest.raises(Cancelled):
        run_training(settings_of(), dataset, base.folder, tmp_path, Stops(tmp_path, 4))
    state = load_file(tmp_path / "checkpoints/00000003/state.safetensors")
    assert not any(name.startswith("adamw/") for name in state), "phase 2 begins with a fresh optimiser"
    assert state["prior/cf"].shape == (3, 4, 8, 8) and not torch.equal(state["prior/cf"], state["prior/fa"])
    assert {n.split("/")[0] for n in before if not torch.equal(before[n], state[f"weight/{n}"])} == {"tokens"}
    assert (before["tokens/rows"] != state["weight/tokens/rows"]).any(1).all(), "every token has learnt"


@pytest.mark.parametrize("after", [3, 4, 6])
def test_a_stopped_and_resumed_run_ends_with_the_same_bytes(
    run: Path, base: Base, dataset: Path, tmp_path: Path, after: int
) -> None:
    """Stopped inside phase 1, at the turn to phase 2 and inside phase 2; the second half has the checkpoint alone."""
    first, second = tmp_path / "first", tmp_path / "second"
    with pytest.raises(Cancelled):
        run_training(settings_of(), dataset, base.folder, first, Stops(first, after))
    shutil.copytree(first / "checkpoints", second / "checkpoints")
    assert {path.name for path in (second / "checkpoints").iterdir()} == {f"{after - 1:08d}"}
    run_training(settings_of(), dataset, base.folder, second, FolderContext(second))
    assert contents(second) == contents(run)


def test_gradient_checkpointing_changes_no_loss(base: Base, dataset: Path, tmp_path: Path) -> None:
    """The attention maps are part of the graph, and layers run once more during backward."""
    options: dict[str, Any] = {
        "gradient_accumulation": 2,
        "batch_size": 2,
        "holdout": 0.0,
        "preview_pairs": 0,
        "checkpoint_every": 9,
        "steps": 3,
        "tokens": TOKENS | {"phase1_steps": 1},
    }
    losses = []
    for name, light in (("plain", False), ("light", True)):
        settings = settings_of(**options, gradient_checkpointing=light)
        run_training(settings, dataset, base.folder, tmp_path / name, FolderContext(tmp_path / name))
        lines = (tmp_path / name / "training_log.jsonl").read_text().splitlines()
        losses.append([(json.loads(line)["loss"], json.loads(line)["grad_norm"]) for line in lines])
    assert len(losses[0]) == 3
    for plain, light in zip(*losses, strict=True):
        assert plain == pytest.approx(light, rel=1e-4)


def test_what_does_not_fit_is_refused(run: Path, base: Base, dataset: Path, tmp_path: Path) -> None:
    out = shutil.copytree(run, tmp_path / "out")
    with pytest.raises(Conflict, match="settings differ"):
        run_training(settings_of(tokens=None), dataset, base.folder, out, FolderContext(out))
    bare = tmp_path / "bare"
    shutil.copytree(dataset, bare)
    shutil.rmtree(bare / "masks/disc")
    for path in (bare / "masks").glob("*/*.png"):
        if path.parent.name in ("haemorrhage", "exudate", "microaneurysm", "leakage"):
            Image.new("L", (64, 64)).save(path)
    with pytest.raises(InvalidDataset) as caught:
        run_training(settings_of(), bare, base.folder, tmp_path / "fresh", FolderContext(tmp_path / "fresh"))
    found = {(problem.pointer, problem.code) for problem in caught.value.problems}
    assert found == {("/tokens/tokens/0", "missing_mask"), ("/tokens/tokens/1", "empty_mask")}
    assert "masks/disc/NAME.png" in caught.value.message
    long = settings_of(fa_prompt="an angiogram " * 6)
    with pytest.raises(InvalidSpec, match=r"the prompt has \d+ tokens, this base takes 77"):
        run_training(long, dataset, base.folder, tmp_path / "long", FolderContext(tmp_path / "long"))


def test_a_subset_is_drawn_and_an_unknown_token_is_named(run: Path, base: Base, tmp_path: Path) -> None:
    model = run / "latest_checkpoints/step_000006"
    shared: dict[str, Any] = {"count": 1, "resolution": 64, "batch_size": 1, "sampler": SamplerSpec(steps=2)}
    images = {}
    for name, tokens in {"all": None, "named": ("disc", "lesion", "vessel"), "one": ("disc",)}.items():
        settings = GenerateSettings(**shared, tokens=tokens)
        sampler = load_sampler(settings, model, base.folder)
        assert ("<lesion>" in sampler.prompts["fa"]) == (name != "one") and "<disc>" in sampler.prompts["cf"]
        generate_part(sampler, settings, 0, tmp_path / name, FolderContext(tmp_path / name))
        images[name] = (tmp_path / name / "cf/000000.png").read_bytes()
    assert images["all"] == images["named"] != images["one"]
    with pytest.raises(InvalidSpec, match=r"does not know the tokens cup; it has disc, lesion, vessel"):
        load_sampler(GenerateSettings(**shared, tokens=("disc", "cup")), model, base.folder)
    own = GenerateSettings(**(shared | {"sampler": SamplerSpec(steps=2, cf_prompt="only <disc>")}))
    assert load_sampler(own, model, base.folder).prompts["cf"] == "only <disc>"
    with pytest.raises(InvalidSpec, match="tokens cup"):
        load_sampler(GenerateSettings(**(shared | {"sampler": SamplerSpec(cf_prompt="a <cup>")})), model, base.folder)


def test_a_model_without_tokens_takes_none(base: Base, dataset: Path, tmp_path: Path) -> None:
    settings = settings_of(tokens=None, steps=1, preview_pairs=0)
    run_training(settings, dataset, base.folder, tmp_path, FolderContext(tmp_path))
    model = tmp_path / "best_checkpoint"
    asked: dict[str, Any] = {"count": 1, "resolution": 64, "tokens": ("disc",)}
    with pytest.raises(InvalidSpec, match="trained without tokens"):
        load_sampler(GenerateSettings(**asked), model, base.folder)
    # A card of before the tokens.
    card = json.loads((model / "model.json").read_text())
    del card["settings"]["tokens"]
    (model / "model.json").write_text(json.dumps(card))
    assert DualUnet.load(model, base).tokens is None


def test_rates_of_the_phases() -> None:
    settings = settings_of(steps=10)
    phases = [phase_at(settings, done) for done in range(11)]
    assert [phase.first for phase in phases] == [0] * 3 + [3] * 8
    assert phases[0].peaks == {"tokens": 1e-2}
    assert phases[5].peaks == {"model": 1e-2, "tokens": 1e-3, "text": 1e-3}
    assert [round(phases[done].rate(done, 1.0), 3) for done in (0, 2, 3, 5, 6, 9)] == [1, 1, 1, 1, 1, 0.146]
    only = settings_of(steps=3)
    assert [phase_at(only, done).first for done in (0, 2, 3)] == [0, 0, 0], "a run of phase 1 alone stays in it"
    frozen = settings_of(tokens=TOKENS | {"train_text_encoder": False})
    assert set(phase_at(frozen, 4).peaks) == {"model", "tokens"}


def test_the_attention_of_a_token_can_be_looked_at(run: Path, base: Base, tmp_path: Path) -> None:
    settings = AttentionSettings(resolution=64, sampler=SamplerSpec(steps=2), map_resolution=8)
    model = run / "latest_checkpoints/step_000006"
    report = capture_attention(settings, model, base.folder, tmp_path, lambda *_: None)
    assert report["prompts"]["fa"] == "an FA, a photo of <disc>, <lesion> and <vessel>"
    assert "<lesion>" in json.dumps(report)


def test_a_checkpoint_that_is_older_than_a_setting_goes_on(base: Base, dataset: Path, tmp_path: Path) -> None:
    settings = settings_of(tokens=None, steps=2, preview_pairs=0)
    with pytest.raises(Cancelled):
        run_training(settings, dataset, base.folder, tmp_path, Stops(tmp_path, 2))
    (state,) = tmp_path.glob("checkpoints/*/state.json")
    document = json.loads(state.read_text())
    assert document["state"]["identity"]["settings"].pop("tokens") is None
    state.write_text(json.dumps(document))
    run_training(settings, dataset, base.folder, tmp_path, FolderContext(tmp_path))
    lines = (tmp_path / "training_log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
