"""Files of a data set that lie in an object store: an upload that arrived piece by piece, or a prefix of the bucket.

A :class:`~cffa_core.data.sources.Source` over objects, under the same caps as a folder or a zip. Names are only looked
at, never joined to a path; the objects are read by their keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from cffa_core.data.contracts import Limits
from cffa_core.data.sources import Source, duplicate_problems, is_ignored, is_unsafe, printable
from cffa_core.errors import InvalidSpec, NotFound, Problem
from cffa_core.storage.base import ObjectStore, key_segments


@dataclass(frozen=True)
class StoredFile:
    """One file: the key it is stored under and the size in bytes that it was announced with."""

    key: str
    size: int


@dataclass(frozen=True)
class ObjectFolder:
    """Files by name that lie in an object store; what ``ingest.check`` takes beside a folder or a zip."""

    name: str
    objects: ObjectStore
    files: Mapping[str, StoredFile]
    problems: Sequence[Problem] = field(default=())

    def __str__(self) -> str:
        return self.name

    @contextmanager
    def open(self, limits: Limits) -> Iterator[Source]:
        """The files that may be read, under ``limits``."""
        yield ObjectSource(self, limits)


class ObjectSource:
    """See :class:`~cffa_core.data.sources.Source`."""

    def __init__(self, folder: ObjectFolder, limits: Limits) -> None:
        self._folder = folder
        self._limits = limits
        problems = list(folder.problems)
        names: list[str] = []
        for name in sorted(folder.files):
            if is_ignored(name):
                continue
            if is_unsafe(name):
                problems.append(Problem(printable(name), "unsafe_name", "unsafe file name; rename the file"))
            else:
                names.append(name)
        if len(names) > limits.max_members:
            problems, names = [Problem("", "too_many_members", f"more than {limits.max_members} files")], []
        total = sum(folder.files[name].size for name in names)
        if total > limits.max_total_bytes:
            message = f"{total} bytes in all; at most {limits.max_total_bytes} are taken"
            problems.append(Problem("", "too_large", message))
            names = []
        twice, found = duplicate_problems(names)
        self.names = tuple(sorted(set(names) - twice))
        self.problems = (*problems, *found)

    def read(self, name: str) -> bytes | Problem:
        """One file whole; a problem if it is not the size that was announced: somebody is still writing it."""
        file = self._folder.files[name]
        if file.size > self._limits.max_member_bytes:
            return Problem(name, "too_large", f"{file.size} bytes; at most {self._limits.max_member_bytes} are taken")
        try:
            with self._folder.objects.open(file.key, 0, file.size + 1) as stream:
                data = stream.read()
        except NotFound:
            return Problem(name, "missing", "the file is not in the object store any more; send it again")
        if len(data) != file.size:
            return Problem(name, "wrong_size", f"not the {file.size} bytes that were announced; send the file again")
        return data


def below_prefix(objects: ObjectStore, root: str, prefix: str, limits: Limits) -> ObjectFolder:
    """The objects below ``root + prefix``, by their names below it. ``root`` ends with ``/``.

    Raises ``InvalidSpec`` (pointer ``/prefix``) for a prefix that could leave ``root``, ``NotFound`` if nothing lies
    below it. Listing stops after one object more than ``limits`` allow.
    """
    inside = prefix.strip("/")
    try:
        key_segments(root + inside)
    except NotFound as error:
        message = "a prefix is made of names and single slashes; no name is empty or begins with a dot"
        raise InvalidSpec(message, problems=(Problem("/prefix", "bad_prefix", message),)) from error
    start = f"{root}{inside}/"
    files: dict[str, StoredFile] = {}
    for key, size in objects.direct().sizes(start):
        files[key.removeprefix(start)] = StoredFile(key, size)
        if len(files) > limits.max_members:
            break
    if not files:
        raise NotFound(f"there is no object below {start}")
    return ObjectFolder(inside.rpartition("/")[2], objects, files)
