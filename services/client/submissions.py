"""Posting jobs, one method for each kind; ``CffaClient`` has them all as its own.

A post carries an ``Idempotency-Key`` minted once per call, so that repeating it makes no second job. What can be done
with a job afterwards is in ``jobs``.
"""

from __future__ import annotations

from collections.abc import Mapping

from cffa_core.jobs.records import USUAL_TERMS, Terms
from cffa_core.jobs.spec import (
    AttentionSettings,
    CaptionedSettings,
    CaptionedTrainSettings,
    EditSpec,
    EvaluateSettings,
    ExportSettings,
    GenerateSettings,
    Spec,
    TrainSettings,
)
from services.client.calls import Calls, new_key
from services.client.resources import Job

DAY_SECONDS = 86_400.0


class Submissions(Calls):
    """Posts of jobs, a part of :class:`services.client.client.CffaClient`; raises as its methods do."""

    def submit_training(
        self, dataset_id: str, settings: TrainSettings, *, priority: int = 0, asked: Terms = USUAL_TERMS
    ) -> Job:
        """Post a training job; raises ``InvalidSpec`` naming every bad field.

        ``asked`` (here and for the other kinds) are its deadline and how long its products are to be kept.
        """
        return self._submit("/v1/training-jobs", {"dataset_id": dataset_id}, settings, priority, asked)

    def submit_generation(
        self,
        model_id: str,
        settings: GenerateSettings,
        *,
        structure_dataset_id: str | None = None,
        priority: int = 0,
        asked: Terms = USUAL_TERMS,
    ) -> Job:
        """Post a generation job for ``settings.count`` pairs; raises ``InvalidSpec`` naming every bad field.

        ``structure_dataset_id`` names the data set that ``structures = "dataset"`` stands for.
        """
        names = {"model_id": model_id}
        if structure_dataset_id is not None:
            names["structure_dataset_id"] = structure_dataset_id
        return self._submit("/v1/generation-jobs", names, settings, priority, asked)

    def submit_evaluation(
        self,
        settings: EvaluateSettings,
        *,
        reference_dataset_id: str,
        generation_job_id: str | None = None,
        pairs_dataset_id: str | None = None,
        train_dataset_id: str | None = None,
        priority: int = 0,
        asked: Terms = USUAL_TERMS,
    ) -> Job:
        """Post an evaluation of the pairs of a generation or edit job or of a data set (name one of the two).

        Without ``train_dataset_id`` the pairs of a generation job are compared with the data set of its model's
        training, if the service still knows it. Raises ``InvalidSpec`` naming every bad field.
        """
        references = {
            "generation_job_id": generation_job_id,
            "pairs_dataset_id": pairs_dataset_id,
            "reference_dataset_id": reference_dataset_id,
            "train_dataset_id": train_dataset_id,
        }
        named = {name: id_ for name, id_ in references.items() if id_ is not None}
        return self._submit("/v1/evaluation-jobs", named, settings, priority, asked)

    def submit_attention(
        self, model_id: str, settings: AttentionSettings, *, priority: int = 0, asked: Terms = USUAL_TERMS
    ) -> Job:
        """Post a look into the attention of a pair model; see ``report``. Raises ``InvalidSpec``."""
        return self._submit("/v1/attention-jobs", {"model_id": model_id}, settings, priority, asked)

    def submit_captioned_training(
        self, dataset_id: str, settings: CaptionedTrainSettings, *, priority: int = 0, asked: Terms = USUAL_TERMS
    ) -> Job:
        """Post a training of the captioned model on a data set that has captions; raises ``InvalidSpec``."""
        return self._submit("/v1/captioned-training-jobs", {"dataset_id": dataset_id}, settings, priority, asked)

    def submit_captioned(
        self,
        model_id: str,
        settings: CaptionedSettings,
        *,
        dataset_id: str | None = None,
        priority: int = 0,
        asked: Terms = USUAL_TERMS,
    ) -> Job:
        """Post the drawing of texts, or with ``dataset_id`` the captioning of its images; see ``report``.

        Raises ``InvalidSpec`` naming every bad field, also for a model that is not a captioned one.
        """
        named = {"model_id": model_id} if dataset_id is None else {"model_id": model_id, "dataset_id": dataset_id}
        return self._submit("/v1/captioned-jobs", named, settings, priority, asked)

    def submit_edit(self, spec: EditSpec, *, priority: int = 0, asked: Terms = USUAL_TERMS) -> Job:
        """Post an edit of pairs of a data set (one pair is enough) or of a succeeded job that made pairs.

        ``spec`` says which pairs, with which model, and what changes; its ``count`` is filled in by the service. Raises
        ``InvalidSpec`` naming every bad field.
        """
        return self._submit("/v1/edit-jobs", {}, spec, priority, asked)

    def submit_export(
        self, generation_job_id: str, settings: ExportSettings, *, priority: int = 0, asked: Terms = USUAL_TERMS
    ) -> Job:
        """Post the export of pairs of a generation or edit job, of the parts that are finished now.

        Raises ``Conflict`` while it has none, ``InvalidSpec`` for a selection that no finished pair can meet.
        """
        return self._submit(f"/v1/jobs/{generation_job_id}/exports", {}, settings, priority, asked)

    def regenerate(self, job_id: str, index: int) -> Job:
        """Post a job that makes one pair of a generation job once more, on a worker with the same numerics.

        Once it has succeeded, ``result["regenerated"]["same"]`` says whether both files are the same to the last bit.
        Raises ``NotFound`` for a pair that was not made, ``Conflict`` while it is not made yet.
        """
        headers = {"Idempotency-Key": new_key()}
        path = f"/v1/jobs/{job_id}/pairs/{index}:regenerate"
        response = self._transport.sent(lambda: self._http.post(path, headers=headers), repeatable=True)
        return Job.model_validate_json(response.content)

    def _submit(
        self,
        path: str,
        reference: Mapping[str, str],
        settings: Spec,
        priority: int,
        asked: Terms,
    ) -> Job:
        body = settings.model_dump(mode="json", exclude_unset=True) | dict(reference)
        if priority:
            body["priority"] = priority
        if asked.deadline_seconds is not None:
            body["deadline_seconds"] = asked.deadline_seconds
        if asked.deadline_at is not None:
            body["deadline_at"] = asked.deadline_at.isoformat()
        if asked.retention_seconds is not None:
            body["retention_days"] = asked.retention_seconds / DAY_SECONDS
        headers = {"Idempotency-Key": new_key()}
        response = self._transport.sent(lambda: self._http.post(path, json=body, headers=headers), repeatable=True)
        return Job.model_validate_json(response.content)
