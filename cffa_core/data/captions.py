"""Captions of pairs: ``captions.jsonl``, a JSON object per line; read, checked when it is a stranger's, written clean.

A line is ``{"name": ..., "cf": text or null, "fa": text or null, "findings": [words]}``; other keys are left out.
Which pairs there are is the affair of ``ingest``; nothing here opens an image or knows a tokenizer.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from cffa_core.data.dataset_folder import CAPTIONS, is_dataset_folder, safe_names
from cffa_core.data.sources import printable
from cffa_core.errors import InvalidDataset, Problem

__all__ = ["CAPTIONS", "Caption", "captions_text", "counted", "parse_captions", "read_captions"]

MAX_LINES = 20_000
MAX_LINE = 64 * 1024
MAX_TEXT = 1000
MAX_FINDINGS = 64
MAX_FINDING = 100
_IMAGE_ENDING = re.compile(r"\.(png|jpe?g|tiff?|dcm)$", re.IGNORECASE)
_NOT_TEXT = ("Cc", "Cs")  # control characters, halves of surrogate pairs


@dataclass(frozen=True)
class Caption:
    """What a person says of one pair: a text of the CF, one of the FA (None: none is known), words for what is seen."""

    name: str
    cf: str | None
    fa: str | None
    findings: tuple[str, ...]

    def line(self) -> str:
        """The line of ``captions.jsonl``, with its end."""
        value = {"name": self.name, "cf": self.cf, "fa": self.fa, "findings": list(self.findings)}
        return json.dumps(value, ensure_ascii=False) + "\n"


def read_captions(folder: Path) -> dict[str, Caption]:
    """Captions by name of pair, of a checked data set or of a folder that is to become one; empty if it has none.

    Names are those that the check gives: safe ones. Raises ``InvalidDataset`` with line and fault of every bad line.
    """
    try:
        text = (folder / CAPTIONS).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        problem = Problem(CAPTIONS, "bad_captions", f"it cannot be read as UTF-8 text: {error}")
        raise InvalidDataset(f"{folder / CAPTIONS} cannot be read", problems=(problem,)) from error
    found, problems = parse_captions(text)
    if problems:
        first = f"{problems[0].pointer}: {problems[0].message}"
        raise InvalidDataset(f"{folder}: {len(problems)} bad line(s) of captions; {first}", problems=tuple(problems))
    if is_dataset_folder(folder):
        return found
    bare = {name: _IMAGE_ENDING.sub("", name) for name in found}
    safe = safe_names(list(bare.values()))
    named = [(safe[bare[name]], said) for name, said in found.items()]
    return {name: Caption(name, said.cf, said.fa, said.findings) for name, said in named}


def parse_captions(
    text: str, names: Collection[str] | None = None, path: str = CAPTIONS
) -> tuple[dict[str, Caption], list[Problem]]:
    """Captions by name, and a problem (pointer ``path:line``) for each line that is not one; never raises.

    ``names`` are the pairs that there are (None: any name is taken); one may be named with its file's ending.
    """
    found: dict[str, Caption] = {}
    problems: list[Problem] = []
    lines = text.split("\n")
    if len(lines) > MAX_LINES + 1:
        return {}, [Problem(path, "too_large", f"{len(lines)} lines; at most {MAX_LINES} are taken")]
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        made = _caption(line, names)
        if isinstance(made, Caption) and made.name in found:
            made = f"pair {printable(made.name)!r} has a caption already; keep one line per pair"
        if isinstance(made, str):
            problems.append(Problem(f"{path}:{number}", "bad_captions", made))
        else:
            found[made.name] = made
    return found, problems


def captions_text(captions: Mapping[str, Caption], names: Iterable[str]) -> str:
    """The text of a ``captions.jsonl`` for the pairs of these names, in their order; pairs without one have no line."""
    return "".join(captions[name].line() for name in names if name in captions)


def counted(captions: Iterable[Caption]) -> dict[str, int]:
    """How many pairs have a text of the CF, of the FA, and either: ``{"pairs", "cf", "fa"}``."""
    known = list(captions)
    with_cf, with_fa = (sum(getattr(said, part) is not None for said in known) for part in ("cf", "fa"))
    return {"pairs": len(known), "cf": with_cf, "fa": with_fa}


def _caption(line: str, names: Collection[str] | None) -> Caption | str:
    """One line as a caption, or what is wrong with it."""
    if len(line) > MAX_LINE:
        return f"{len(line)} characters; a line has at most {MAX_LINE}"
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        return f"not a JSON object: {str(error)[:200]}"
    if not isinstance(value, dict):
        return 'not a JSON object; write {"name": ..., "cf": ..., "fa": ..., "findings": [...]}'
    name = value.get("name")
    if not isinstance(name, str) or not name or _is_no_text(name):
        return "name is missing; it is the name of a pair"
    if names is not None and name not in names:
        stem = PurePosixPath(name).stem
        if stem not in names:
            return f"no pair is named {printable(name)!r}; correct the name or take the line out"
        name = stem
    texts: dict[str, str | None] = {}
    for part in ("cf", "fa"):
        said = value.get(part)
        if said is not None and (fault := _text_fault(said, MAX_TEXT)):
            return f"{part} {fault}"
        texts[part] = said
    if texts["cf"] is None and texts["fa"] is None:
        return "neither cf nor fa is given; a caption is a text of one image at least"
    findings = value.get("findings", [])
    if fault := _findings_fault(findings):
        return f"findings {fault}"
    return Caption(name, texts["cf"], texts["fa"], tuple(findings))


def _findings_fault(findings: Any) -> str | None:
    if not isinstance(findings, list) or len(findings) > MAX_FINDINGS:
        return f"must be a list of at most {MAX_FINDINGS} words"
    for word in findings:
        if fault := _text_fault(word, MAX_FINDING):
            return f"holds a word that {fault}"
    return None if len(set(findings)) == len(findings) else "names something twice"


def _text_fault(text: Any, most: int) -> str | None:
    if not isinstance(text, str):
        return "must be a text"
    if not 1 <= len(text) <= most or not text.strip():
        return f"must have 1 to {most} characters that are not all blank; it has {len(text)}"
    return "must be one line without control characters" if _is_no_text(text) else None


def _is_no_text(text: str) -> bool:
    return any(unicodedata.category(character) in _NOT_TEXT for character in text)
