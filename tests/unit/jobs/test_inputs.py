"""What is refused when a job is posted for what it names: structures that a model cannot use, masks not there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cffa_core.errors import InvalidSpec
from cffa_core.jobs.records import NewModel
from cffa_core.jobs.spec import GenerationSpec, JobSpec, TrainingSpec
from cffa_core.jobs.store import JobStore
from tests.record_cases import OTHER, OWNER, add_dataset, claimed, files, memory_folder, sqlite_store, training_job


@pytest.fixture
def store() -> Iterator[JobStore]:
    with memory_folder() as folder:
        opened = sqlite_store(Path(folder))
        yield opened
        opened.close()


def dataset_of(store: JobStore, *masks: list[str], owner: str = OWNER) -> str:
    """A data set whose pairs have these masks."""
    dataset_id = store.new_id("ds")
    store.add_dataset(
        owner,
        dataset_id=dataset_id,
        name="retinas",
        digest="0" * 64,
        pairs=len(masks),
        report={"pairs": [{"name": f"p{i}", "masks": names} for i, names in enumerate(masks)]},
        stored=files(f"datasets/{dataset_id}/dataset.json"),
    )
    return dataset_id


def model_of(store: JobStore, **card: Any) -> str:
    """A model with this card."""
    training_job(store)
    store.commit(claimed(store), files("jobs/x/train/a1/model/model.json"), {})
    made = NewModel("1" * 64, card, files("jobs/x/train/a1/model/model.json"))
    done = store.commit(claimed(store), files("jobs/x/finalize/a1/m.json"), {}, job_result={}, model=made)
    assert done.result is not None
    return str(done.result["model_id"])


def refused(store: JobStore, spec: JobSpec) -> list[tuple[str, str]]:
    with pytest.raises(InvalidSpec) as caught:
        store.create_job(OWNER, spec)
    return [(problem.pointer, problem.code) for problem in caught.value.problems]


def controlnet(vessels: str = "frangi") -> dict[str, Any]:
    return {"method": "controlnet", "settings": {"controlnet": {"vessels": vessels}}}


def test_structures_and_methods_must_fit(store: JobStore) -> None:
    dataset = dataset_of(store, [], [])
    conditional, plain = model_of(store, **controlnet()), model_of(store, method="dual_unet", settings={})
    unsaid = model_of(store, base="tiny")
    on_dataset = {"structures": "dataset", "structure_dataset_id": dataset}
    for model, fields in (
        (conditional, {"structures": "procedural"}),
        (conditional, on_dataset),
        (plain, {}),
        (unsaid, {}),
        (unsaid, {"structures": "procedural"}),
    ):
        store.create_job(OWNER, GenerationSpec(model_id=model, count=1, **fields))
    for model, fields in ((conditional, {}), (plain, {"structures": "procedural"}), (plain, on_dataset)):
        assert refused(store, GenerationSpec(model_id=model, count=1, **fields)) == [("/structures", "structures")]


def test_a_structure_data_set_must_be_one_s_own(store: JobStore) -> None:
    foreign = add_dataset(store, OTHER)
    spec = GenerationSpec(
        model_id=model_of(store, **controlnet()), count=1, structures="dataset", structure_dataset_id=foreign
    )
    assert refused(store, spec) == [("/structure_dataset_id", "not_found")]


def test_masks_that_are_wanted_must_be_there(store: JobStore) -> None:
    bare, some, full = (dataset_of(store, *masks) for masks in ([[], []], [["vessel"], []], [["vessel"], ["vessel"]]))
    model = model_of(store, **controlnet("masks"))

    def generation(dataset_id: str) -> GenerationSpec:
        return GenerationSpec(model_id=model, count=1, structures="dataset", structure_dataset_id=dataset_id)

    def training(dataset_id: str) -> TrainingSpec:
        return TrainingSpec(dataset_id=dataset_id, method="controlnet", controlnet={"vessels": "masks"})

    for spec_of, pointer in ((generation, "/structure_dataset_id"), (training, "/controlnet/vessels")):
        store.create_job(OWNER, spec_of(full))
        for dataset_id in (bare, some):
            assert refused(store, spec_of(dataset_id)) == [(pointer, "missing_mask")]
    store.create_job(OWNER, TrainingSpec(dataset_id=bare, method="controlnet"))
