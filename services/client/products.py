"""What jobs leave: pairs, archives, reports and previews, listed and downloaded.

Downloads go on where they broke off and are checked (``download``, ``exports``); here are the routes, and how a link
that has expired is replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from cffa_core.errors import CorruptArtifact
from services.client import download
from services.client.calls import Calls
from services.client.exports import OnBytes, fetch_export
from services.client.resources import (
    Archive,
    Archives,
    EmptySlot,
    Pair,
    Preview,
    Previews,
    Reject,
    Report,
    ReportFile,
)


class ProductCalls(Calls):
    """Calls on products, a part of :class:`services.client.client.CffaClient`; raises as its methods do."""

    def pairs(self, job_id: str) -> Iterator[Pair]:
        """Finished pairs of a generation or edit job, in index order."""
        return self._pages(f"/v1/jobs/{job_id}/pairs", Pair)

    def rejects(self, job_id: str) -> Iterator[Reject]:
        """Pairs that the gate of a generation job refused, by index and try, with the reasons."""
        return self._pages(f"/v1/jobs/{job_id}/rejects", Reject)

    def exhausted(self, job_id: str) -> Iterator[EmptySlot]:
        """Slots of a generation job that stayed empty because no try passed its gate."""
        return self._pages(f"/v1/jobs/{job_id}/exhausted", EmptySlot)

    def archives(self, job_id: str) -> Archives:
        """Archives that can be downloaded now: of all finished parts, and of the whole job once it has succeeded."""
        parts: list[Archive] = []
        token: str | None = None
        while True:
            page = self._get(f"/v1/jobs/{job_id}/archives", Archives, {"page_token": token})
            parts += page.parts
            token = (page.model_extra or {}).get("next_page_token")
            if token is None:
                return page.model_copy(update={"parts": parts})

    def download_archive(
        self, job_id: str, target: Path, *, part: int | None = None, on_bytes: OnBytes | None = None
    ) -> Archive:
        """Download the whole archive (or that of one part) to ``target``: a file, or a folder to put it into.

        A broken download goes on where it stopped, in this call or the next. The file appears only when size and
        SHA-256 are right. Raises ``Conflict`` while the archive is not made yet, ``NotFound`` if it never will be,
        ``CorruptArtifact``.
        """
        return self._download(lambda: self._archive(job_id, part), target, on_bytes)

    def download_rejects(self, job_id: str, target: Path, part: int, *, on_bytes: OnBytes | None = None) -> Archive:
        """Download the pairs that the gate refused in one part, as :meth:`download_archive` does those of the part.

        Raises ``NotFound`` if none was refused.
        """
        path = f"/v1/jobs/{job_id}/archives/{part}/rejects"
        return self._download(lambda: self._get(path, Archive), target, on_bytes)

    def download_export(self, job_id: str, folder: Path, *, on_bytes: OnBytes | None = None) -> Archives:
        """Download all archives of an export, and its manifest, into ``folder``; goes on where it broke off.

        Raises ``Conflict`` for an export that has not succeeded, ``CorruptArtifact``.
        """
        return fetch_export(
            self._transport.signed,
            lambda: self.archives(job_id),
            lambda number: self._archive(job_id, number),
            folder,
            on_bytes,
        )

    def report(self, job_id: str) -> Report:
        """The report of a job; raises ``Conflict`` while it is not made, ``NotFound`` if it never will be."""
        return self._get(f"/v1/jobs/{job_id}/report", Report)

    def download_report(self, job_id: str, folder: Path, *, on_bytes: OnBytes | None = None) -> Report:
        """Download all files of a report into ``folder``, each checked by size and SHA-256; goes on where it broke off.

        Raises as :meth:`report` does, and ``CorruptArtifact``.
        """
        report = self.report(job_id)
        for file in report.files:
            if not _is_inside(file.name):
                raise CorruptArtifact(f"{file.name!r} is no name for a file; nothing was written to it")
            self._fetch_report_file(job_id, file.name, report, folder, on_bytes)
        return report

    def previews(self, job_id: str) -> list[Preview]:
        """Pictures that a training drew, by step: regular ones, and those that were asked for (``asked``)."""
        return self._get(f"/v1/jobs/{job_id}/previews", Previews).items

    def download_previews(self, job_id: str, folder: Path) -> list[Path]:
        """Download the sheet of pictures of each step as ``FOLDER/step_000123.png`` (``..._asked.png`` for those that
        were asked for), each checked by size and SHA-256; returns the paths."""
        written = []
        for preview in self.previews(job_id):
            for file in preview.files:
                if file.name == "sheet.png":
                    target = folder / f"step_{preview.step:06d}{'_asked' if preview.asked else ''}.png"
                    self._fetch_file(file, target)
                    written.append(target)
        return written

    def _download(self, find: Callable[[], Archive], target: Path, on_bytes: OnBytes | None) -> Archive:
        archive = find()
        if target.is_dir():
            target = target / archive.filename
        addresses = iter([archive.url])
        download.fetch(
            self._transport.signed,
            lambda: next(addresses, None) or find().url,
            target,
            sha256=archive.sha256,
            size=archive.bytes,
            on_bytes=on_bytes,
        )
        return archive

    def _archive(self, job_id: str, part: int | None) -> Archive:
        return self._get(f"/v1/jobs/{job_id}/archives/{'all' if part is None else part}", Archive)

    def _fetch_report_file(
        self, job_id: str, name: str, report: Report, folder: Path, on_bytes: OnBytes | None
    ) -> None:
        known = iter([report])

        def url() -> str:
            """The link that is known, later fresh ones: they expire."""
            current = next(known, None) or self.report(job_id)
            return next(file.url for file in current.files if file.name == name)

        (file,) = (file for file in report.files if file.name == name)
        download.fetch(
            self._transport.signed, url, folder / name, sha256=file.sha256, size=file.bytes, on_bytes=on_bytes
        )

    def _fetch_file(self, file: ReportFile, target: Path) -> None:
        download.fetch(
            self._transport.signed, lambda: file.url, target, sha256=file.sha256, size=file.bytes, on_bytes=None
        )


def _is_inside(name: str) -> bool:
    """Whether a name, with or without folders, stays inside the folder that it is put into."""
    path = PurePosixPath(name)
    return (
        bool(path.parts)
        and path.as_posix() == name
        and not path.is_absolute()
        and ".." not in path.parts
        and "\\" not in name
    )
