"""Calls about data sets beyond a zip: folders file by file, imports, versions, reports, deletion.

A folder goes straight to the object store, in pieces; after a break only what is missing is sent again. Routes and
bytes; nothing here prints.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx

from cffa_core.errors import Conflict, NotFound
from services.client.problems import ApiError, document_of
from services.client.resources import Dataset, Page, Resource
from services.client.transport import Transport
from services.client.upload import files_below

BLOCK = 1 << 18
PASSES = 4
PAGE = 200
CHECK_SECONDS = 3600.0
OnBytes = Callable[[int, int], None]
Part = Mapping[str, float | int] | Mapping[str, Sequence[str]]


class Put(Resource):
    """One piece of a file that is still to be sent: ``size`` bytes from ``offset`` on, to ``url``."""

    offset: int
    size: int
    url: str


class UploadFile(Resource):
    """One announced file and what of it is missing."""

    path: str
    size: int
    received: int
    complete: bool
    puts: list[Put]


class Upload(Resource):
    """A folder on its way in; ``state`` is ``open`` or ``done``."""

    id: str
    name: str
    state: str
    bytes: int
    dataset_id: str | None
    expires_at: datetime
    files: tuple[UploadFile, ...] = ()
    next_page_token: str | None = None


class DatasetCalls:
    """What a client can do with data sets; ``CffaClient.sets``. Raises as the client does."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._http = transport.http

    def upload_folder(
        self,
        folder: Path,
        name: str | None = None,
        *,
        eye_pattern: str | None = None,
        patient_pattern: str | None = None,
        auto_register: bool = False,
        resume: bool = False,
        on_bytes: OnBytes | None = None,
    ) -> Dataset:
        """Send a folder of pairs file by file; ``on_bytes(sent, total)`` counts.

        With ``resume`` an open upload of the same name and files goes on, if there is one. Raises ``InvalidDataset``
        with every problem of every file, ``NotFound`` if ``folder`` is none.
        """
        if not folder.is_dir():
            raise NotFound(f"{folder} is not a folder; a zip goes with upload_dataset")
        files = {path.relative_to(folder).as_posix(): path for path in files_below(folder)}
        sizes = {path: file.stat().st_size for path, file in files.items()}
        name = name or folder.resolve().name
        found = self._open_one(name, sizes) if resume else None
        if (upload_id := found) is None:
            patterns = {"eye_pattern": eye_pattern, "patient_pattern": patient_pattern}
            upload_id = self.announce(name, sizes, **patterns, auto_register=auto_register).id
        self._send(upload_id, files, sum(sizes.values()), on_bytes)
        return self.complete(upload_id)

    def announce(
        self,
        name: str,
        sizes: Mapping[str, int],
        *,
        eye_pattern: str | None = None,
        patient_pattern: str | None = None,
        auto_register: bool = False,
    ) -> Upload:
        """Say which files (path -> bytes) are to come."""
        body: dict[str, Any] = {
            "name": name,
            "files": [{"path": path, "size": size} for path, size in sizes.items()],
            "auto_register": auto_register,
            **_given(eye_pattern=eye_pattern, patient_pattern=patient_pattern),
        }
        return Upload.model_validate_json(self._post("/v1/uploads", body).content)

    def uploads(self) -> Iterator[Upload]:
        """Uploads that are open or done and not removed yet, newest first."""
        token: str | None = None
        while True:
            query = {"page_token": token} if token else {}
            page = Page[Any].model_validate_json(self._get("/v1/uploads", query).content)
            yield from (Upload.model_validate(item) for item in page.items)
            if (token := page.next_page_token) is None:
                return

    def upload_files(self, upload_id: str) -> Iterator[UploadFile]:
        """Every announced file with what of it is there, and fresh links for the rest."""
        token: str | None = None
        while True:
            query = {"page_size": str(PAGE)} | ({"page_token": token} if token else {})
            page = Upload.model_validate_json(self._get(f"/v1/uploads/{upload_id}", query).content)
            yield from page.files
            if (token := page.next_page_token) is None:
                return

    def complete(self, upload_id: str) -> Dataset:
        """Make a data set of an upload that is all there; repeating it gives the same one."""
        return Dataset.model_validate_json(self._post(f"/v1/uploads/{upload_id}:complete", None).content)

    def abandon(self, upload_id: str) -> None:
        """Give an upload up, with everything that arrived of it."""
        self._transport.sent(lambda: self._http.delete(f"/v1/uploads/{upload_id}"), repeatable=False)

    def import_prefix(
        self,
        prefix: str,
        name: str | None = None,
        *,
        eye_pattern: str | None = None,
        patient_pattern: str | None = None,
        auto_register: bool = False,
    ) -> Dataset:
        """Take pairs in that lie in the service's bucket, in a folder below the owner's import folder."""
        body: dict[str, Any] = {
            "prefix": prefix,
            "name": name or prefix.strip("/").rpartition("/")[2],
            "auto_register": auto_register,
            **_given(eye_pattern=eye_pattern, patient_pattern=patient_pattern),
        }
        return Dataset.model_validate_json(self._post("/v1/datasets:import", body).content)

    def version(
        self,
        dataset_id: str,
        *,
        reject: Sequence[str] = (),
        split: Part | None = None,
        auto_register: Sequence[str] | str = (),
        patient_pattern: str | None = None,
        name: str | None = None,
    ) -> Dataset:
        """Make a version: without the pairs named in ``reject``, with a split by eye, with pairs registered anew, with
        patients by ``patient_pattern`` on the pairs' names.

        ``split`` is ``{"train": 0.7, "validation": 0.15, "test": 0.15, "seed": 0}``, or lists of eyes instead of
        numbers; ``auto_register`` names pairs, or is ``"flagged"``. Raises ``InvalidSpec`` naming every bad field.
        """
        chosen = auto_register if isinstance(auto_register, str) else list(auto_register)
        body: dict[str, Any] = {"reject": list(reject), "auto_register": chosen}
        body |= {"split": dict(split)} if split is not None else {}
        body |= _given(patient_pattern=patient_pattern, name=name)
        return Dataset.model_validate_json(self._post(f"/v1/datasets/{dataset_id}/versions", body).content)

    def delete(self, dataset_id: str) -> None:
        """Remove a data set; ``Conflict`` while a job that is not over uses it. What other versions share stays."""
        self._transport.sent(lambda: self._http.delete(f"/v1/datasets/{dataset_id}"), repeatable=False)

    def download_pictures(self, dataset_id: str, folder: Path) -> list[Path]:
        """Write the contact sheets of a data set's report into ``folder``; returns their paths."""
        report = document_of(self._get(f"/v1/datasets/{dataset_id}/report", {}))
        written = []
        for name, url in report.get("pictures", {}).items():  # sets of older versions have none
            response = self._transport.sent(lambda url=url: self._transport.signed.get(url), repeatable=True)  # type: ignore[misc]
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"{dataset_id}-{Path(name).name}"
            path.write_bytes(response.content)
            written.append(path)
        return written

    def _open_one(self, name: str, sizes: Mapping[str, int]) -> str | None:
        """The newest open upload of this name that announced exactly these files."""
        for upload in self.uploads():
            if upload.state == "open" and upload.name == name and upload.bytes == sum(sizes.values()):
                announced = {file.path: file.size for file in self.upload_files(upload.id)}
                if announced == dict(sizes):
                    return upload.id
        return None

    def _send(self, upload_id: str, files: Mapping[str, Path], total: int, on_bytes: OnBytes | None) -> None:
        """PUT what is missing; a link that has expired meanwhile is replaced in the next pass."""
        for attempt in range(PASSES):
            sent, missing = 0, False
            for file in self.upload_files(upload_id):
                sent += file.received
                for put in file.puts:
                    try:
                        self._put(put, files[file.path])
                    except ApiError:
                        if attempt == PASSES - 1:
                            raise
                        missing = True
                        continue
                    sent += put.size
                    if on_bytes is not None:
                        on_bytes(sent, total)
            if not missing:
                return
        raise Conflict(f"upload {upload_id} could not be sent; try again with resume")

    def _put(self, put: Put, path: Path) -> None:
        def send() -> httpx.Response:
            headers = {"Content-Length": str(put.size), "Content-Type": "application/octet-stream"}
            body = _blocks(path, put.offset, put.size)
            return self._transport.signed.put(put.url, content=body, headers=headers, timeout=httpx.Timeout(120.0))

        self._transport.sent(send, repeatable=True)

    def _get(self, path: str, query: Mapping[str, str]) -> httpx.Response:
        return self._transport.sent(lambda: self._http.get(path, params=dict(query)), repeatable=True)

    def _post(self, path: str, body: dict[str, Any] | None) -> httpx.Response:
        headers = {"Idempotency-Key": uuid.uuid4().hex}
        patience = httpx.Timeout(30.0, read=CHECK_SECONDS)
        return self._transport.sent(
            lambda: self._http.post(path, json=body, headers=headers, timeout=patience), repeatable=True
        )


def _given(**fields: str | None) -> dict[str, str]:
    """The fields that have a value."""
    return {name: value for name, value in fields.items() if value is not None}


def _blocks(path: Path, offset: int, size: int) -> Iterator[bytes]:
    """``size`` bytes of a file from ``offset`` on, in blocks."""
    with path.open("rb") as file:
        file.seek(offset)
        while size and (block := file.read(min(BLOCK, size))):
            size -= len(block)
            yield block
