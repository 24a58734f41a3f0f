"""The contracts: defaults that depend on the method, what each validator refuses and how it says so, round trips."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cffa_core.errors import InvalidSpec
from cffa_core.jobs.spec import (
    GenerateSettings,
    GenerationSpec,
    LossSpec,
    Method,
    SamplerSpec,
    TrainingSpec,
    TrainSettings,
    parse_spec,
)

DATASET = "ds_0123456789abcdefghij"
MODEL = "mdl_0123456789abcdefghij"
OTHERS = ("shared_attention", "side_by_side", "controlnet")


def training(**fields: Any) -> dict[str, Any]:
    return {"kind": "training", "dataset_id": DATASET} | fields


def refusal(raw: dict[str, Any]) -> list[tuple[str, str]]:
    """What a user reads: pointer and message of every problem."""
    with pytest.raises(InvalidSpec, match="the job specification is not valid") as caught:
        parse_spec(raw)
    return [(problem.pointer, problem.message) for problem in caught.value.problems]


def test_dual_unet_is_the_default_and_its_losses_are_on() -> None:
    settings = TrainSettings()
    assert (settings.method, settings.timesteps) == (Method.DUAL_UNET, "independent")
    assert (settings.loss.hf_lambda, settings.loss.struct_lambda) == (0.5, 0.3)
    assert settings.shared_attention is settings.side_by_side is settings.controlnet is None


@pytest.mark.parametrize("method", OTHERS)
def test_the_other_methods_have_the_noise_loss_alone(method: str) -> None:
    settings = TrainSettings(method=method)
    assert (settings.loss.hf_lambda, settings.loss.struct_lambda, settings.loss.offset_noise) == (0.0, 0.0, 0.1)
    assert settings.timesteps == ("independent" if method == "controlnet" else "shared")
    assert [name for name in OTHERS if getattr(settings, name) is not None] == [method]


def test_what_each_method_s_own_settings_are_by_default() -> None:
    sharing = TrainSettings(method="shared_attention").shared_attention
    canvas = TrainSettings(method="side_by_side").side_by_side
    assert sharing is not None and (sharing.max_resolution, sharing.step_range) == (None, (0.0, 1.0))
    assert canvas is not None and canvas.squeeze is True


@pytest.mark.parametrize("form", [dict, LossSpec])
def test_a_given_loss_stands_and_the_rest_follows_the_method(form: Any) -> None:
    loss = TrainSettings(method="side_by_side", loss=form(hf_lambda=0.2, offset_noise=0.0)).loss
    assert (loss.hf_lambda, loss.struct_lambda, loss.offset_noise) == (0.2, 0.0, 0.0)
    assert TrainSettings(loss=form(hf_lambda=0.2)).loss.struct_lambda == 0.3


@pytest.mark.parametrize("method", ["shared_attention", "side_by_side"])
def test_one_timestep_for_both_images(method: str) -> None:
    assert refusal(training(method=method, timesteps="independent")) == [
        ("/", f"Value error, {method} has one timestep for both images; leave timesteps out")
    ]
    assert TrainSettings(method=method, timesteps="shared").timesteps == "shared"


@pytest.mark.parametrize("method", OTHERS)
def test_only_dual_unet_trains_one_modality_alone(method: str) -> None:
    assert refusal(training(method=method, modalities=["fa"])) == [
        ("/", f"Value error, {method} trains both modalities; dual_unet can train one alone")
    ]
    assert TrainSettings(modalities=("fa",)).modalities == ("fa",)


@pytest.mark.parametrize("modalities", [[], ["cf", "cf"]])
def test_modalities_are_named_once(modalities: list[str]) -> None:
    assert refusal(training(modalities=modalities)) == [
        ("/", "Value error, modalities must name cf, fa or both, each once")
    ]


@pytest.mark.parametrize("method", list(Method))
@pytest.mark.parametrize("other", OTHERS)
def test_settings_of_another_method_are_refused(method: Method, other: str) -> None:
    raw = training(method=method.value, **{other: {}})
    if method == other:
        assert getattr(parse_spec(raw), other) is not None
    else:
        assert refusal(raw) == [("/", f"Value error, {other} holds settings of method {other}, and this is {method}")]


@pytest.mark.parametrize("step_range", [[0.5, 0.5], [0.6, 0.4], [-0.1, 0.5], [0.5, 1.1]])
def test_a_step_range_runs_forward_on_the_scale(step_range: list[float]) -> None:
    assert refusal(training(method="shared_attention", shared_attention={"step_range": step_range})) == [
        ("/shared_attention", "Value error, step_range must be two numbers with 0 <= begin < end <= 1")
    ]


def test_wrong_fields_of_a_method_s_settings_are_named() -> None:
    found = refusal(training(method="shared_attention", shared_attention={"max_resolution": 0, "step_range": [0.1]}))
    assert [pointer for pointer, _ in found] == ["/shared_attention/max_resolution", "/shared_attention/step_range/1"]
    (unknown,) = refusal(training(method="side_by_side", side_by_side={"gap": 3}))
    assert unknown == ("/side_by_side/gap", "Extra inputs are not permitted")


@pytest.mark.parametrize("method", ["v23", "cffa_core.methods.dual_unet", 7, ["dual_unet"], None])
def test_the_list_of_methods_is_closed(method: Any) -> None:
    ((pointer, message),) = refusal(training(method=method))
    assert pointer == "/method"
    assert all(f"'{known}'" in message for known in Method)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"method": "shared_attention", "shared_attention": {"max_resolution": 16, "step_range": [0.2, 0.7]}},
        {"method": "side_by_side", "side_by_side": {"squeeze": False}, "loss": {"struct_lambda": 0.3}},
        {"method": "controlnet"},
    ],
)
def test_a_stored_spec_reads_back_as_it_was(fields: dict[str, Any]) -> None:
    spec = parse_spec(training(**fields))
    assert isinstance(spec, TrainingSpec)
    stored = json.loads(json.dumps(spec.model_dump(mode="json")))
    assert parse_spec(stored) == spec
    assert parse_spec(stored).model_dump_json() == spec.model_dump_json()
    settings = spec.model_dump(include=set(TrainSettings.model_fields))
    assert TrainSettings.model_validate(settings).model_dump() == settings


def test_specs_from_before_there_were_other_methods_still_read() -> None:
    """A spec of version 1 named dual_unet (or nothing), a loss, and an initial noise that was always one of three."""
    stored = training(
        method="dual_unet", timesteps="shared", loss={"hf_lambda": 0.5}, preview={"initial_noise": "shared"}
    )
    spec = parse_spec(stored)
    assert isinstance(spec, TrainingSpec)
    assert (spec.method, spec.preview.initial_noise, spec.preview.step_noise) == ("dual_unet", "shared", None)


def test_the_noise_is_the_method_s_unless_it_is_named() -> None:
    assert SamplerSpec().initial_noise is None
    assert SamplerSpec(initial_noise="rotated").initial_noise == "rotated"
    spec = parse_spec({"kind": "generation", "model_id": MODEL, "count": 2, "sampler": {"initial_noise": None}})
    assert isinstance(spec, GenerationSpec) and spec.sampler.initial_noise is None


def test_generation_settings_are_those_of_the_job_without_its_ids() -> None:
    spec = GenerationSpec(model_id=MODEL, count=5, part_size=2)
    assert (
        spec.model_dump(include=set(GenerateSettings.model_fields))
        == GenerateSettings(count=5, part_size=2).model_dump()
    )
    assert [list(spec.part_range(part)) for part in range(spec.parts)] == [[0, 1], [2, 3], [4]]


def test_stored_generation_jobs_of_before_gates_are_still_read() -> None:
    new = GenerationSpec(model_id=MODEL, count=5)
    later = ("gate", "only", "regenerates")
    assert parse_spec({k: value for k, value in new.model_dump(mode="json").items() if k not in later}) == new


def test_chosen_pairs_keep_their_indices_in_a_grid_of_their_own() -> None:
    spec = GenerationSpec(model_id=MODEL, count=1_000_000, part_size=2, only=((3, 0), (17, 4), (999_999, 1)))
    assert (list(spec.indices), spec.parts) == ([3, 17, 999_999], 2)
    assert [spec.first_tries(part) for part in range(2)] == [[(3, 0), (17, 4)], [(999_999, 1)]]
    assert [spec.part_of(index) for index in (3, 4, 999_999)] == [0, None, 1]
    assert GenerationSpec(model_id=MODEL, count=5, part_size=2).part_of(4) == 2
    assert GenerationSpec(model_id=MODEL, count=5, part_size=2).part_of(5) is None


@pytest.mark.parametrize(
    "fields",
    [
        {"gate": {}},
        {"gate": {"min_alignment": 0.1, "max_tries": 0}},
        {"gate": {"max_similarity_to_training": 1.1}},
        {"only": []},
        {"only": [[5, 0]]},
        {"only": [[1, 0], [1, 1]]},
        {"only": [[2, 0], [1, 0]]},
        {"only": [[1, 100]]},
        {"only": [[1, 0]], "gate": {"min_alignment": 0.1}},
        {"regenerates": {"job_id": "job_0123456789abcdefghij", "cf": "a" * 64, "fa": "b" * 64}},
    ],
)
def test_impossible_gates_and_choices_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidSpec):
        parse_spec({"kind": "generation", "model_id": MODEL, "count": 5, **fields})
