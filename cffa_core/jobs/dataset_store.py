"""What the record knows of data sets, of the uploads that become some, and of models.

The statements are in ``catalog``, ``dataset_rows`` and ``upload_rows``. Nothing here touches the bytes: keys that are
returned are the caller's to delete.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from cffa_core.jobs import catalog, dataset_rows, inputs, upload_rows
from cffa_core.jobs.open_record import OpenRecord
from cffa_core.jobs.records import Dataset, Model, Page, StoredFiles
from cffa_core.jobs.upload_rows import AnnouncedFile, Upload
from cffa_core.people import quotas
from cffa_core.storage.base import ObjectInfo
from cffa_core.storage.manifest import stored_to_json


class DatasetStore(OpenRecord):
    """Data sets, uploads and models, a part of :class:`cffa_core.jobs.store.JobStore`; raises as that says."""

    # --- data sets ------------------------------------------------------------------------------------------------

    def add_dataset(
        self,
        owner: str,
        *,
        dataset_id: str,
        name: str,
        digest: str,
        pairs: int,
        report: dict[str, Any],
        stored: StoredFiles,
        parent_id: str | None = None,
        split: dict[str, list[str]] | None = None,
    ) -> Dataset:
        """Make a data set visible whose files are already stored; raises :class:`Conflict` if the id is taken.

        The id is a new one (:meth:`new_id`) or one that was derived from an idempotency key. A version of ``parent_id``
        may name the parent's files; :class:`NotFound` if the parent is gone by now.
        """

        def add(connection: sa.Connection) -> Dataset:
            return catalog.add_dataset(
                connection,
                owner,
                dataset_id=dataset_id,
                name=name,
                digest=digest,
                pairs=pairs,
                report=report,
                stored=stored,
                parent_id=parent_id,
                split=split,
            )

        return self._db.write(
            lambda connection: quotas.within_bytes(connection, owner, self._limits, lambda: add(connection)),
            landed=catalog.holds_dataset,
        )

    def require_bytes(self, owner: str, more: int) -> None:
        """Raise :class:`QuotaExceeded` if the owner may not store ``more`` bytes: asked before they are sent."""
        self._db.read(lambda connection: quotas.require_bytes(connection, owner, more, self._limits))

    def delete_dataset(self, owner: str, dataset_id: str) -> tuple[str, ...]:
        """Remove a data set and return the storage keys that are now to be deleted: those no other version names.

        Raises :class:`Conflict` while a job that is not over names it.
        """
        return self._db.write(
            lambda connection: dataset_rows.delete(connection, owner, dataset_id),
            landed=lambda connection, _: dataset_rows.deleted(connection, dataset_id),
        )

    def unsurveyed_datasets(self) -> list[Dataset]:
        """The oldest data sets, of any owner, whose report says that their pairs were not looked at yet."""
        return self._db.read(dataset_rows.unsurveyed)

    def add_survey(
        self, owner: str, dataset_id: str, survey: dict[str, Any], pictures: dict[str, ObjectInfo] | None = None
    ) -> bool:
        """Add to a data set's report what was found in its pairs, with the stored pictures that show it.

        False, and nothing is changed, if another process was faster.
        """
        shown = stored_to_json(StoredFiles(pictures or {}))
        return self._db.write(
            lambda connection: dataset_rows.add_to_report(connection, owner, dataset_id, survey, shown)
        )

    def get_dataset(self, owner: str, dataset_id: str) -> Dataset:
        """One data set of this owner."""
        return self._db.read(lambda connection: catalog.get_dataset(connection, owner, dataset_id))

    def list_datasets(self, owner: str, page_size: int = 50, page_token: str | None = None) -> Page[Dataset]:
        """Data sets of this owner, newest first; a bad token raises :class:`InvalidSpec`."""
        return self._db.read(lambda connection: catalog.list_datasets(connection, owner, page_size, page_token))

    # --- uploads in progress --------------------------------------------------------------------------------------

    def add_upload(
        self,
        owner: str,
        upload_id: str,
        name: str,
        files: Sequence[AnnouncedFile],
        options: dict[str, Any],
        *,
        seconds: float,
    ) -> Upload:
        """Write an upload down that stays open for ``seconds``; the one that has this id already, if there is one."""

        def add(connection: sa.Connection) -> Upload:
            return upload_rows.add(connection, owner, upload_id, name, files, options, seconds)

        return self._db.write(
            lambda connection: quotas.within_bytes(
                connection, owner, self._limits, lambda: add(connection), coming=True
            )
        )

    def get_upload(self, owner: str, upload_id: str) -> Upload:
        """One upload of this owner."""
        return self._db.read(lambda connection: upload_rows.get(connection, owner, upload_id))

    def list_uploads(self, owner: str, page_size: int = 50, page_token: str | None = None) -> Page[Upload]:
        """Uploads of this owner that are not removed yet, newest first."""
        return self._db.read(lambda connection: upload_rows.page(connection, owner, page_size, page_token))

    def hold_upload(self, owner: str, upload_id: str, *, seconds: float) -> Upload:
        """Keep an upload from expiring within ``seconds``: it is about to be checked."""
        return self._db.write(lambda connection: upload_rows.hold(connection, owner, upload_id, seconds))

    def finish_upload(self, owner: str, upload_id: str, dataset_id: str) -> None:
        """Note that an upload has become a data set; its own objects may be deleted then."""
        self._db.write(lambda connection: upload_rows.finish(connection, owner, upload_id, dataset_id))

    def remove_upload(self, owner: str, upload_id: str) -> Upload:
        """Give an upload up and return it; raises :class:`Conflict` if it has become a data set."""
        upload = self.get_upload(owner, upload_id)
        return self._db.write(
            lambda connection: upload_rows.remove(connection, owner, upload_id),
            landed=lambda connection, _: not upload_rows.is_open(connection, upload.id),
        )

    def expired_uploads(self) -> list[Upload]:
        """Some uploads, of any owner, whose time is over; :meth:`forget_upload` once their objects are gone."""
        return self._db.read(upload_rows.expired)

    def forget_upload(self, upload_id: str) -> None:
        """Strike out an upload that expired."""
        self._db.write(lambda connection: upload_rows.forget(connection, upload_id))

    def upload_is_open(self, upload_id: str) -> bool:
        """Whether files of this upload, of whichever owner, may still arrive."""
        return self._db.read(lambda connection: upload_rows.is_open(connection, upload_id))

    # --- models ---------------------------------------------------------------------------------------------------

    def get_model(self, owner: str, model_id: str) -> Model:
        """One model of this owner."""
        return self._db.read(lambda connection: catalog.get_model(connection, owner, model_id))

    def list_models(
        self, owner: str, *, job_id: str | None = None, page_size: int = 50, page_token: str | None = None
    ) -> Page[Model]:
        """Models of this owner, newest first; ``job_id`` keeps those that one training job made."""
        return self._db.read(lambda connection: catalog.list_models(connection, owner, job_id, page_size, page_token))

    def novelty_file(self, owner: str, model_id: str) -> ObjectInfo | None:
        """Thumbnails of the pairs that a model was trained on; None if its training left none or is gone."""
        return self._db.read(lambda connection: inputs.novelty_file(connection, owner, model_id))
