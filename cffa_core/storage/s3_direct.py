"""Files that users send straight to the S3 server: presigned PUT links and multipart uploads.

Plain S3 through the minio client, whose calls for multipart uploads have no public names yet (7.2). A presigned PUT
says nothing of the size: what arrived is looked at afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING

from minio.error import S3Error

from cffa_core.errors import NotFound, StorageUnavailable
from cffa_core.storage.base import key_segments
from cffa_core.storage.s3_transport import KeyTaken, typed_errors

if TYPE_CHECKING:
    from minio import Minio
    from minio.datatypes import Part

LONGEST_LINK_SECONDS = 7 * 86_400
PAGE = 1000


class S3DirectUploads:
    """A :class:`~cffa_core.storage.base.DirectUploads` in one bucket.

    ``client`` is the server as this process reaches it, ``signer`` as the users do.
    """

    def __init__(self, client: Minio, signer: Minio, bucket: str) -> None:
        self._client, self._signer, self._bucket = client, signer, bucket

    def put_url(self, key: str, *, size: int, expires_seconds: int) -> str:
        """See :class:`DirectUploads`."""
        key_segments(key)
        return self._signer.get_presigned_url("PUT", self._bucket, key, expires=_expiry(expires_seconds))

    def begin_parts(self, key: str) -> str:
        """See :class:`DirectUploads`."""
        key_segments(key)
        with typed_errors(self._bucket, key, writing=True):
            return self._client._create_multipart_upload(self._bucket, key, {})

    def part_url(self, key: str, multipart_id: str, number: int, *, size: int, expires_seconds: int) -> str:
        """See :class:`DirectUploads`."""
        asked: dict[str, str | list[str] | tuple[str]] = {"partNumber": str(number), "uploadId": multipart_id}
        return self._signer.get_presigned_url(
            "PUT", self._bucket, key, expires=_expiry(expires_seconds), extra_query_params=asked
        )

    def sizes(self, prefix: str) -> Iterator[tuple[str, int]]:
        """See :class:`DirectUploads`."""
        with typed_errors(self._bucket, prefix):
            for found in self._client.list_objects(self._bucket, prefix=prefix, recursive=True):
                if found.object_name is not None and not found.is_dir:
                    yield found.object_name, found.size or 0

    def parts(self, key: str, multipart_id: str) -> dict[int, int]:
        """See :class:`DirectUploads`."""
        return {part.part_number: part.size or 0 for part in self._listed(key, multipart_id)}

    def join(self, key: str, multipart_id: str) -> None:
        """See :class:`DirectUploads`."""
        parts = sorted(self._listed(key, multipart_id), key=lambda part: part.part_number)
        if parts:
            with suppress(KeyTaken), typed_errors(self._bucket, key, writing=True):
                self._client._complete_multipart_upload(self._bucket, key, multipart_id, parts)
        # Also where an earlier call joined them, and where the server reported a failure in an answer 200.
        with typed_errors(self._bucket, key):
            self._client.stat_object(self._bucket, key)

    def abort(self, key: str, multipart_id: str) -> None:
        """See :class:`DirectUploads`."""
        with suppress(NotFound), typed_errors(self._bucket, key):
            try:
                self._client._abort_multipart_upload(self._bucket, key, multipart_id)
            except S3Error as error:
                if error.code != "NoSuchUpload":
                    raise

    def _listed(self, key: str, multipart_id: str) -> list[Part]:
        """All parts that arrived, empty once they were joined or given up."""
        found: list[Part] = []
        marker: str | None = None
        while True:
            with typed_errors(self._bucket, key):
                try:
                    page = self._client._list_parts(
                        self._bucket, key, multipart_id, max_parts=PAGE, part_number_marker=marker
                    )
                except S3Error as error:
                    if error.code in ("NoSuchUpload", "NoSuchKey"):
                        return []
                    raise
            found += page.parts
            if not page.is_truncated:
                return found
            marker = str(page.next_part_number_marker)
            if marker == "None":
                raise StorageUnavailable(f"the object store lists the parts of {key} without an end")


def _expiry(seconds: int) -> timedelta:
    return timedelta(seconds=max(1, min(seconds, LONGEST_LINK_SECONDS)))
