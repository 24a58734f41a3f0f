"""A multipart upload, streamed to a file on disk with its size capped while it arrives.

Takes one part named ``file`` and a few short text fields; knows nothing of data sets. The system's temporary folder
is not used: uploads may be larger than it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from cffa_core.errors import InvalidSpec, Problem, StorageUnavailable
from services.api.problems import BadRequest, PayloadTooLarge, UnsupportedMediaType

MAX_FIELD_BYTES = 4096
MAX_PARTS = 16
_HEADER_BYTES = 64 << 10


@dataclass
class Upload:
    """What arrived: text fields by name, the name the client gave the file, and its size in bytes."""

    fields: dict[str, str] = field(default_factory=dict)
    filename: str | None = None
    size: int = 0


async def receive(request: Request, target: Path, *, fields: Mapping[str, bool], max_bytes: int) -> Upload:
    """Stream the body of ``request`` into ``target``; ``fields`` maps the text fields to whether they are required.

    Raises ``UnsupportedMediaType`` for another kind of body, ``BadRequest`` if it is not complete multipart,
    ``PayloadTooLarge`` as soon as it exceeds ``max_bytes``, and ``InvalidSpec`` naming every missing, doubled or
    unknown part.
    """
    kind, options = parse_options_header(request.headers.get("content-type"))
    boundary = options.get(b"boundary", b"")
    if kind != b"multipart/form-data":
        raise UnsupportedMediaType("send the data set as multipart/form-data with a part named `file`")
    if not 1 <= len(boundary) <= 256:
        raise BadRequest("the Content-Type of a multipart body names a boundary of 1 to 256 characters")
    limit = max_bytes + _HEADER_BYTES
    too_large = PayloadTooLarge(f"an upload may have at most {max_bytes} bytes")
    if declared_bytes(request) > limit:
        raise too_large
    received = 0
    with target.open("xb") as out:
        parts = _Parts(out)
        try:
            parser = MultipartParser(boundary, parts.callbacks())  # type: ignore[arg-type]
            async for block in request.stream():
                received += len(block)
                if received > limit:
                    raise too_large
                await run_in_threadpool(parser.write, block)
                if parts.upload.size > max_bytes:
                    raise too_large
        except FormParserError as error:
            raise BadRequest(f"the multipart body is broken: {error}") from error
        except ClientDisconnect as error:
            raise BadRequest("the connection closed before the upload was complete") from error
        except OSError as error:
            raise StorageUnavailable(f"no room for the upload: {error.strerror}") from error
    if not parts.complete:
        raise BadRequest("the multipart body ends before its closing boundary")
    return parts.checked(fields)


def declared_bytes(request: Request) -> int:
    """How many bytes the body is said to have; 0 if nothing is said."""
    declared = request.headers.get("content-length", "")
    return int(declared[:19]) if declared.isdecimal() else 0


class _Parts:
    """Callbacks of the multipart parser: writes the file part to ``out``, keeps text fields in memory."""

    def __init__(self, out: BinaryIO) -> None:
        self.upload = Upload()
        self.complete = False
        self._out = out
        self._header = b""
        self._value = b""
        self._name = ""
        self._is_file = False
        self._data = bytearray()
        self._count = 0
        self._problems: list[Problem] = []

    def callbacks(self) -> dict[str, object]:
        return {
            "on_part_begin": self._begin,
            "on_part_data": self._on_data,
            "on_part_end": self._end,
            "on_header_field": self._on_header_field,
            "on_header_value": self._on_header_value,
            "on_header_end": self._header_end,
            "on_end": self._finish,
        }

    def checked(self, known: Mapping[str, bool]) -> Upload:
        problems = list(self._problems)
        if self.upload.filename is None:
            problems.append(Problem("/file", "missing", "add the zip of the data set as a part named `file`"))
        problems += [
            Problem(f"/{name}", "extra_forbidden", f"there is no field {name!r}")
            for name in self.upload.fields.keys() - known.keys()
        ]
        for name, required in known.items():
            if required and name not in self.upload.fields:
                problems.append(Problem(f"/{name}", "missing", "this field is required"))
        if problems:
            raise InvalidSpec("the upload form is not valid; see errors", problems=tuple(problems))
        return self.upload

    def _begin(self) -> None:
        self._count += 1
        if self._count > MAX_PARTS:
            raise BadRequest(f"an upload has at most {MAX_PARTS} parts")
        self._name, self._is_file, self._data = "", False, bytearray()

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            _, options = parse_options_header(self._value)
            self._name = options.get(b"name", b"").decode(errors="replace")
            if b"filename" in options and self._name == "file":
                if self.upload.filename is not None:
                    self._problems.append(Problem("/file", "duplicate", "send one file"))
                self._is_file = True
                self.upload.filename = options[b"filename"].decode(errors="replace")
        self._header = self._value = b""

    def _on_data(self, data: bytes, start: int, end: int) -> None:
        if self._is_file:
            self._out.write(data[start:end])
            self.upload.size += end - start
            return
        if len(self._data) + end - start > MAX_FIELD_BYTES:
            raise BadRequest(f"the field {self._name!r} is longer than {MAX_FIELD_BYTES} bytes")
        self._data += data[start:end]

    def _end(self) -> None:
        if self._is_file:
            return
        if self._name in self.upload.fields:
            self._problems.append(Problem(f"/{self._name}", "duplicate", "send this field once"))
        try:
            self.upload.fields[self._name] = self._data.decode()
        except UnicodeDecodeError:
            self._problems.append(Problem(f"/{self._name}", "not_utf8", "fields are UTF-8 text"))

    def _finish(self) -> None:
        self.complete = True
