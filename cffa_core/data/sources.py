"""Where the files of a data set come from: a folder or a zip, listed and streamed under caps, never extracted.

Names are judged before anything is opened, and what a zip's headers promise is only ever an upper bound: bytes are
counted as they come out. What the files mean is the business of ``layouts``.
"""

from __future__ import annotations

import io
import os
import re
import stat
import unicodedata
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

from cffa_core.data.contracts import Limits
from cffa_core.errors import NotFound, Problem

CHUNK = 1 << 20
RATIO_GRACE = 1 << 20  # tiny members may shrink by any ratio
IGNORED_NAMES = {".ds_store", "thumbs.db", "desktop.ini"}
STREAMED = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}
DAMAGE = (
    *(zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError),
    UnicodeDecodeError,  # a name that is said to be UTF-8
)
# A central directory entry with a long name and extra fields; bounds what zipfile reads into memory at once.
BYTES_PER_ENTRY = 1024


class Source(Protocol):
    """Files by name. ``names`` are safe, "/"-separated paths; ``problems`` says which others were refused."""

    names: tuple[str, ...]
    problems: tuple[Problem, ...]

    def read(self, name: str) -> bytes | Problem:
        """Read one file whole, within the caps; a problem instead if it breaks one or is damaged."""


def read_text(source: Source, name: str, limits: Limits) -> str | Problem:
    """Read a small UTF-8 text file; a problem instead if it is large (it is parsed line by line) or no such text."""
    data = source.read(name)
    if isinstance(data, Problem):
        return data
    ending = name.lower().rpartition(".")[2]
    most = limits.max_captions_bytes if ending == "jsonl" else limits.max_text_bytes
    if len(data) > most:
        return Problem(name, "too_large", f"{len(data)} bytes of text; at most {most} are taken")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        code = {"csv": "bad_csv", "jsonl": "bad_captions"}.get(ending, "bad_landmarks")
        return Problem(name, code, "not UTF-8 text; save the file as UTF-8")


def printable(name: str) -> str:
    """Name as it may be shown: control characters and broken Unicode replaced."""
    text = name.encode("utf-8", "replace").decode("utf-8")
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)[:300]


def is_unsafe(name: str) -> bool:
    """True for a name that must not be joined to a path: absolute, "..", backslash, drive, control character."""
    parts = name.split("/")
    return (
        not name
        or name.startswith("/")
        or "\\" in name
        or re.match(r"[A-Za-z]:", name) is not None
        or any(part in ("", ".", "..") for part in parts)
        or printable(name) != name
    )


def is_ignored(name: str) -> bool:
    """True for what operating systems leave behind: ``__MACOSX``, ``.DS_Store``, hidden files."""
    parts = name.lower().split("/")
    return (
        "__macosx" in parts
        or parts[-1] in IGNORED_NAMES
        or any(part.startswith(".") and part != ".." for part in parts)
    )


def duplicates(names: list[str]) -> set[str]:
    """Names that are the same file to some system: equal after Unicode normalisation and case folding."""
    seen: dict[str, str] = {}
    twice: set[str] = set()
    for name in names:
        key = unicodedata.normalize("NFC", name).casefold()
        if key in seen:
            twice |= {name, seen[key]}
        seen[key] = name
    return twice


def duplicate_problems(names: list[str]) -> tuple[set[str], list[Problem]]:
    """Names that occur twice, and a problem for each."""
    twice = duplicates(names)
    message = "the name occurs more than once (letter case does not count); rename one of the files"
    return twice, [Problem(printable(name), "duplicate_name", message) for name in sorted(twice)]


class FolderSource:
    """A folder on this machine. Links are followed only inside the folder."""

    def __init__(self, root: Path, limits: Limits) -> None:
        self._root = root.resolve()
        self._limits = limits
        names: list[str] = []
        problems: list[Problem] = []
        total = 0
        for path in self._files():
            name = path.relative_to(self._root).as_posix()
            if is_ignored(name):
                continue
            if len(names) >= limits.max_members:
                problems = [Problem("", "too_many_members", f"more than {limits.max_members} files")]
                names = []
                break
            if is_unsafe(name):
                problems.append(Problem(printable(name), "unsafe_name", "unsafe file name; rename the file"))
            elif not path.resolve().is_relative_to(self._root) or not path.is_file():
                problems.append(Problem(name, "unsafe_name", "not a plain file inside the folder; copy it there"))
            else:
                names.append(name)
                total += path.stat().st_size
        if total > limits.max_total_bytes:
            problems.append(
                Problem("", "too_large", f"{total} bytes in all; at most {limits.max_total_bytes} are taken")
            )
        twice, found = duplicate_problems(names)
        self.names = tuple(sorted(set(names) - twice))
        self.problems = (*problems, *found)

    def _files(self) -> Iterator[Path]:
        for folder, inner, files in os.walk(self._root):
            inner.sort()
            for name in sorted(files):
                yield Path(folder) / name

    def read(self, name: str) -> bytes | Problem:
        path = self._root / name
        try:
            if path.stat().st_size > self._limits.max_member_bytes:
                return Problem(name, "too_large", f"more than {self._limits.max_member_bytes} bytes")
            return path.read_bytes()
        except OSError as error:
            return Problem(name, "truncated", f"the file cannot be read: {error.strerror}")


class _BoundedReads(io.FileIO):
    """A file that refuses one read larger than ``most``: zipfile reads the whole directory of a zip in one."""

    def __init__(self, path: Path, most: int) -> None:
        super().__init__(path, "rb")
        self._most = most

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > self._most:
            raise _DirectoryTooLarge
        return super().read(-1 if size is None else size) or b""


class _DirectoryTooLarge(Exception):
    """The zip's directory holds more than the cap on members allows."""


class ZipSource:
    """A zip archive, listed and streamed; use through :func:`open_source`, which closes it."""

    def __init__(self, path: Path, limits: Limits) -> None:
        self._limits = limits
        self._archive: zipfile.ZipFile | None = None
        self._members: dict[str, zipfile.ZipInfo] = {}
        self._streamed: dict[str, int] = {}
        self._total = 0
        self._size = path.stat().st_size
        self.names: tuple[str, ...] = ()
        self.problems: tuple[Problem, ...] = ()
        self._file = _BoundedReads(path, max(limits.max_members * BYTES_PER_ENTRY, 2 * CHUNK))
        try:
            self._archive = zipfile.ZipFile(self._file)
        except _DirectoryTooLarge:
            self.problems = (Problem("", "too_many_members", f"more than {limits.max_members} files"),)
        except DAMAGE as error:
            if self._size == 0:
                self.problems = (Problem("", "empty_archive", "the archive is empty (0 bytes)"),)
            else:
                self.problems = (Problem("", "not_an_archive", f"not a readable zip archive ({str(error)[:120]})"),)
        else:
            self._list(self._archive.infolist())

    def close(self) -> None:
        """Close the archive's file."""
        if self._archive is not None:
            self._archive.close()
        self._file.close()

    def _list(self, infos: list[zipfile.ZipInfo]) -> None:
        if len(infos) > self._limits.max_members:
            message = f"{len(infos)} files; at most {self._limits.max_members} are taken"
            self.problems = (Problem("", "too_many_members", message),)
            return
        problems: list[Problem] = []
        files: list[zipfile.ZipInfo] = []
        for info in infos:
            problem = self._judge(info)
            if problem is not None:
                problems.append(problem)
            elif not info.is_dir() and not is_ignored(info.filename):
                files.append(info)
        promised = sum(info.file_size for info in files)
        if promised > self._limits.max_total_bytes:
            message = f"{promised} bytes unpacked; at most {self._limits.max_total_bytes} are taken"
            problems.append(Problem("", "too_large", message))
        if sum(info.compress_size for info in files) > self._size:
            problems.append(Problem("", "ratio", "members overlap or promise more bytes than the archive has"))
        twice, found = duplicate_problems([info.filename for info in files])
        self._members = {info.filename: info for info in files if info.filename not in twice}
        self.names = tuple(sorted(self._members))
        self.problems = (*problems, *found)

    def _judge(self, info: zipfile.ZipInfo) -> Problem | None:
        """Refuse a member by its directory entry alone."""
        name = info.filename
        shown = printable(info.orig_filename)
        if is_unsafe(name.removesuffix("/")) or info.orig_filename != name:
            return Problem(shown, "unsafe_name", "absolute path, '..', backslash or control character in the name")
        mode = info.external_attr >> 16
        if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
            return Problem(shown, "unsafe_name", "a link or special file; put the file itself into the archive")
        if is_ignored(name):
            return None
        if info.flag_bits & 0x1:
            return Problem(shown, "encrypted", "the member is encrypted; send the archive without a password")
        if info.compress_type not in STREAMED:
            return Problem(shown, "unsupported", "compression other than deflate; pack the archive again as plain zip")
        if info.file_size > self._limits.max_member_bytes:
            return Problem(
                shown, "too_large", f"{info.file_size} bytes; at most {self._limits.max_member_bytes} are taken"
            )
        return None

    def read(self, name: str) -> bytes | Problem:
        info = self._members[name]
        assert self._archive is not None
        allowed = max(RATIO_GRACE, int(min(info.compress_size, self._size) * self._limits.max_ratio))
        elsewhere = self._total - self._streamed.get(name, 0)
        out = bytearray()
        try:
            with self._archive.open(info) as stream:
                while chunk := stream.read(CHUNK):
                    out += chunk
                    if len(out) > allowed:
                        return Problem(name, "ratio", f"unpacks to more than {self._limits.max_ratio:g} times its size")
                    if len(out) > self._limits.max_member_bytes or len(out) + elsewhere > self._limits.max_total_bytes:
                        return Problem(name, "too_large", "unpacks to more bytes than are taken")
        except DAMAGE as error:
            return Problem(name, "truncated", f"the archive member is damaged ({str(error)[:120]})")
        self._total = elsewhere + len(out)
        self._streamed[name] = len(out)
        return bytes(out)


class Place(Protocol):
    """Something other than a path that holds files: what ``object_source`` offers."""

    @property
    def name(self) -> str:
        """What it is called in messages."""

    def open(self, limits: Limits) -> AbstractContextManager[Source]:
        """Its files, under ``limits``."""


@contextmanager
def open_source(path: Path | Place, limits: Limits) -> Iterator[Source]:
    """Open a folder, a zip or another place. Raises ``NotFound`` if there is nothing at ``path``."""
    if not isinstance(path, Path):
        with path.open(limits) as opened:
            yield opened
    elif path.is_dir():
        yield FolderSource(path, limits)
    elif path.is_file():
        source = ZipSource(path, limits)
        try:
            yield source
        finally:
            source.close()
    else:
        raise NotFound(f"no folder or zip at {path}")
