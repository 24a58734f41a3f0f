"""Which files of a source belong together: the three ways in which teams keep their pairs (METHODS 1).

Works on names alone, and on the text of ``eyes.csv``, ``captions.jsonl`` and the pair list; no image is opened here.
"""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath

from cffa_core.data.captions import CAPTIONS, Caption, parse_captions
from cffa_core.data.contracts import MASK_FOLDERS, MASK_NAME, Layout
from cffa_core.data.sources import is_unsafe, printable
from cffa_core.errors import Problem

# Files beside images that are not images; they are left out with a warning, while an unknown ending is looked into.
TEXT_ENDINGS = {".txt", ".csv", ".json", ".jsonl", ".md", ".xml", ".html", ".pdf", ".xls", ".xlsx", ".docx"}
TOLERATED_FOLDERS = {"masks", "valid_cf", "valid_fa"}
TOLERATED_FILES = {CAPTIONS, "eyes.csv", "manifest.json", "dataset.json"}
# More rows than a source may have files; each bad one is a problem of its own.
MAX_ROWS = 20_000
CASE_FILE = re.compile(r"(?P<case>.+)_0?(?P<which>[12])$")
MODALITY = {"1": "cf", "2": "fa"}
LAYOUT_HELP = (
    "no pairs found; expected cf/NAME and fa/NAME, or NNN/NNN_01.* with NNN/NNN_02.*, or a CSV with cf_path,fa_path"
)

ReadText = Callable[[str], str | Problem]


@dataclass(frozen=True)
class Candidate:
    """Two files that should be one pair, with the names of their landmark files and their masks if any.

    ``vessel`` is the file of the vessel mask, ``annotations`` are names and files of the other masks, by name.
    ``original_name`` is what it was called before it got a safe name.
    """

    name: str
    cf: str
    fa: str
    cf_points: str | None = None
    fa_points: str | None = None
    eye: str | None = None
    patient: str | None = None
    vessel: str | None = None
    annotations: tuple[tuple[str, str], ...] = ()
    original_name: str | None = None

    @property
    def called(self) -> str:
        """Its name as whoever sent it knows it."""
        return self.original_name or self.name


@dataclass
class Found:
    """What a layout found: candidates in order of name, what is wrong, what was left out; and by pair eyes, patients
    and captions, where a file tells them."""

    layout: Layout
    candidates: list[Candidate] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    warnings: list[Problem] = field(default_factory=list)
    eyes: dict[str, str] = field(default_factory=dict)
    patients: dict[str, str] = field(default_factory=dict)
    captions: dict[str, Caption] = field(default_factory=dict)


def find_pairs(names: tuple[str, ...], read: ReadText) -> Found:
    """Find the layout of a source and the pairs in it. A single folder around everything is looked through."""
    prefix = wrapper(names)
    inside = {name.removeprefix(prefix): name for name in names}
    pair_list = _pair_list(inside, read)
    if pair_list is not None:
        found = _from_csv(pair_list[0], pair_list[1], inside)
    elif any(PurePosixPath(name).parts[0].lower() in ("cf", "fa") and "/" in name for name in inside):
        found = _from_folders(inside)
    elif any(_case_of(name) for name in inside):
        found = _from_cases(inside)
    else:
        return Found("unknown", problems=[Problem("", "unknown_layout", LAYOUT_HELP)])
    if "eyes.csv" in inside:
        _read_eyes(inside["eyes.csv"], read, found)
    if CAPTIONS in inside:
        _read_captions(inside[CAPTIONS], read, found)
    _take_masks(inside, found)
    _take_annotations(inside, found)
    found.candidates.sort(key=lambda candidate: candidate.name)
    return found


def wrapper(names: tuple[str, ...]) -> str:
    """The single folder around everything, as ``"folder/"``; empty if there is none or if it is part of a layout."""
    tops = {name.split("/", 1)[0] for name in names}
    if len(tops) != 1 or any("/" not in name for name in names):
        return ""
    top = tops.pop()
    inside = [name.removeprefix(f"{top}/") for name in names]
    is_layout = top.lower() in ("cf", "fa") or (
        any(_case_of(name) for name in names) and all("/" not in n for n in inside)
    )
    if is_layout:
        return ""
    return f"{top}/" + wrapper(tuple(inside))


def _ending(name: str) -> str:
    return PurePosixPath(name).suffix.lower()


def _pair_up(found: Found, files: Mapping[str, Mapping[str, list[str]]]) -> dict[str, tuple[str, str]]:
    """Match CF and FA files by key; orphans and doubles become problems. ``files[modality][key]`` lists file names."""
    pairs: dict[str, tuple[str, str]] = {}
    for modality in ("cf", "fa"):
        for key, paths in files[modality].items():
            if len(paths) > 1:
                message = f"{len(paths)} {modality.upper()} files for pair {key!r}; keep one"
                found.problems += [Problem(path, "duplicate_name", message) for path in paths]
    for key in sorted({*files["cf"], *files["fa"]}):
        cf, fa = files["cf"].get(key, []), files["fa"].get(key, [])
        if cf and not fa:
            found.problems.append(Problem(cf[0], "orphan_cf", "a CF without its FA; add the FA or remove the file"))
        elif fa and not cf:
            found.problems.append(Problem(fa[0], "orphan_fa", "an FA without its CF; add the CF or remove the file"))
        elif len(cf) == 1 and len(fa) == 1:
            pairs[key] = (cf[0], fa[0])
    return pairs


def _left_out(found: Found, path: str) -> None:
    found.warnings.append(Problem(path, "ignored", "not part of the layout; left out"))


def _from_folders(inside: dict[str, str]) -> Found:
    """Layout (a): ``cf/NAME`` and ``fa/NAME``; endings may differ."""
    found = Found("folders")
    files: dict[str, dict[str, list[str]]] = {"cf": {}, "fa": {}}
    for name, path in sorted(inside.items()):
        parts = PurePosixPath(name).parts
        top = parts[0].lower()
        if top in TOLERATED_FOLDERS or name.lower() in TOLERATED_FILES:
            continue
        if top not in files or len(parts) == 1 or _ending(name) in TEXT_ENDINGS:
            _left_out(found, path)
        elif len(parts) > 2:
            found.problems.append(
                Problem(path, "unsupported", f"put the images directly into {top}/, without subfolders")
            )
        else:
            files[top].setdefault(PurePosixPath(name).stem, []).append(path)
    found.candidates = [Candidate(key, cf, fa) for key, (cf, fa) in _pair_up(found, files).items()]
    return found


def _case_of(name: str) -> tuple[str, str] | None:
    """Case folder and modality of ``NNN/NNN_01.*``; None for other files."""
    parts = PurePosixPath(name).parts
    match = CASE_FILE.fullmatch(PurePosixPath(name).stem)
    if len(parts) != 2 or match is None:
        return None
    return parts[0], MODALITY[match["which"]]


def _from_cases(inside: dict[str, str]) -> Found:
    """Layout (b): a folder per case; ``_01`` is CF, ``_02`` is FA, text files of the same name hold landmarks."""
    found = Found("cases")
    files: dict[str, dict[str, list[str]]] = {"cf": {}, "fa": {}}
    points: dict[str, dict[str, str]] = {"cf": {}, "fa": {}}
    for name, path in sorted(inside.items()):
        case = _case_of(name)
        if case is None:
            if name.lower() not in TOLERATED_FILES and name.split("/", 1)[0] not in TOLERATED_FOLDERS:
                _left_out(found, path)
        elif _ending(name) == ".txt":
            points[case[1]][case[0]] = path
        elif _ending(name) in TEXT_ENDINGS:
            _left_out(found, path)
        else:
            files[case[1]].setdefault(case[0], []).append(path)
    for key, (cf, fa) in _pair_up(found, files).items():
        found.candidates.append(Candidate(key, cf, fa, points["cf"].get(key), points["fa"].get(key)))
    return found


def _rows(text: str) -> list[dict[str, str]]:
    """Rows of a CSV with a header; a semicolon is taken as separator if the header has no comma.

    Raises ``csv.Error`` for text that is none, or has more than ``MAX_ROWS`` rows.
    """
    if text.count("\n") > MAX_ROWS + 1:
        raise csv.Error(f"more than {MAX_ROWS} rows")
    header = text.split("\n", 1)[0]
    delimiter = ";" if ";" in header and "," not in header else ","
    reader = csv.DictReader(io.StringIO(text), delimiter=delimiter, restkey="", restval="")
    fields = [str(name).strip().lower() for name in reader.fieldnames or []]
    reader.fieldnames = fields
    return [{key: value.strip() for key, value in row.items() if key and isinstance(value, str)} for row in reader]


def _pair_list(inside: dict[str, str], read: ReadText) -> tuple[str, list[dict[str, str]] | Problem] | None:
    """The CSV beside the data whose header names cf_path and fa_path, and its rows (or why they cannot be read)."""
    for name, path in sorted(inside.items()):
        if "/" in name or _ending(name) != ".csv" or name.lower() == "eyes.csv":
            continue
        text = read(path)
        if isinstance(text, Problem):
            return path, text
        header = re.split(r"[,;]", text.split("\n", 1)[0].lower())
        columns = {column.strip().strip('"') for column in header}
        if {"cf_path", "fa_path"} & columns:
            if not {"cf_path", "fa_path"} <= columns:
                return path, Problem(path, "bad_csv", "the header needs both cf_path and fa_path")
            try:
                return path, _rows(text)
            except csv.Error as error:
                return path, Problem(path, "bad_csv", f"not a readable CSV: {error}")
    return None


def _from_csv(path: str, rows: list[dict[str, str]] | Problem, inside: dict[str, str]) -> Found:
    """Layout (c): a CSV of relative paths; optional columns cf_pts_path, fa_pts_path, name, eye, patient.

    A CF may be paired with several FAs (phases); such pairs are one eye unless the eye column says otherwise.
    """
    found = Found("csv")
    if isinstance(rows, Problem):
        found.problems.append(rows)
        return found
    folder = path.rpartition("/")[0]
    often = Counter(PurePosixPath(row.get("cf_path", "")).stem for row in rows)
    shared = Counter(row.get("cf_path", "") for row in rows)
    taken: set[str] = set()
    for line, row in enumerate(rows, start=2):
        pointer = f"{path}:{line}"
        wanted = {key: row.get(key, "") for key in ("cf_path", "fa_path", "cf_pts_path", "fa_pts_path")}
        bad = [
            _missing(pointer, key, value, inside, path)
            for key, value in wanted.items()
            if value or key in ("cf_path", "fa_path")
        ]
        problems = [problem for problem in bad if problem is not None]
        cf, fa = PurePosixPath(wanted["cf_path"]), PurePosixPath(wanted["fa_path"])
        name = row.get("name") or (cf.stem if often[cf.stem] == 1 else f"{cf.with_suffix('')}-{fa.stem}")
        if not problems and name in taken:
            problems.append(Problem(pointer, "duplicate_name", f"pair {printable(name)!r} occurs in more than one row"))
        found.problems += problems
        if problems:
            continue
        taken.add(name)
        files = [f"{folder}/{value}".removeprefix("/") if value else None for value in wanted.values()]
        assert files[0] is not None and files[1] is not None
        eye = row.get("eye") or (str(cf.with_suffix("")) if shared[wanted["cf_path"]] > 1 else "")
        patient = row.get("patient") or None
        found.candidates.append(Candidate(name, files[0], files[1], files[2], files[3], eye or None, patient))
    return found


def _missing(pointer: str, column: str, value: str, inside: dict[str, str], path: str) -> Problem | None:
    if not value:
        return Problem(pointer, "bad_csv", f"{column} is empty")
    if is_unsafe(value):
        return Problem(pointer, "unsafe_name", f"{column} {printable(value)!r} is not a plain relative path")
    if value not in inside:
        return Problem(pointer, "bad_csv", f"{column} {printable(value)!r} is not a file beside {path}")
    return None


def _take_masks(inside: dict[str, str], found: Found) -> None:
    """Give each candidate its ``masks/vessel/NAME.*`` (or ``masks/vessels/``): all pairs have one, or none has.

    A case is called by its folder: ``masks/vessel/NNN.png``.
    """
    files: dict[str, list[str]] = {}
    for name, path in sorted(inside.items()):
        parts = PurePosixPath(name).parts
        if len(parts) == 3 and parts[0].lower() == "masks" and parts[1].lower() in MASK_FOLDERS:
            files.setdefault(PurePosixPath(name).stem, []).append(path)
    if not files:
        return
    for stem, paths in files.items():
        if len(paths) > 1:
            message = f"{len(paths)} vessel masks for pair {printable(stem)!r}; keep one"
            found.problems += [Problem(path, "duplicate_name", message) for path in paths]
    some = next(iter(files.values()))[0]
    with_mask = []
    for candidate in found.candidates:
        paths = files.pop(candidate.name, [])
        if not paths:
            message = f"{printable(some)} is there, but no mask for pair {printable(candidate.name)!r}; add it"
            found.problems.append(Problem(f"{some.rpartition('/')[0]}/{candidate.name}.png", "missing_mask", message))
        with_mask.append(replace(candidate, vessel=paths[0] if paths else None))
    found.candidates = with_mask
    for paths in files.values():
        for path in paths:
            _left_out(found, path)


def _take_annotations(inside: dict[str, str], found: Found) -> None:
    """Give each candidate its other masks, ``masks/disc/NAME.*`` and the like; any of them may be absent.

    Folders whose names are no names of masks (``MASK_NAME``) are left where they are.
    """
    files: dict[tuple[str, str], list[str]] = {}
    for name, path in sorted(inside.items()):
        parts = PurePosixPath(name).parts
        inside_masks = len(parts) == 3 and parts[0].lower() == "masks"
        if inside_masks and parts[1].lower() not in MASK_FOLDERS and MASK_NAME.fullmatch(parts[1]):
            files.setdefault((PurePosixPath(name).stem, parts[1]), []).append(path)
    for (stem, mask), paths in files.items():
        if len(paths) > 1:
            message = f"{len(paths)} masks {mask!r} for pair {printable(stem)!r}; keep one"
            found.problems += [Problem(path, "duplicate_name", message) for path in paths]
    masks = sorted({mask for _, mask in files})
    found.candidates = [
        replace(c, annotations=tuple((m, files.pop((c.name, m))[0]) for m in masks if (c.name, m) in files))
        for c in found.candidates
    ]
    for paths in files.values():
        for path in paths:
            _left_out(found, path)


def _read_eyes(path: str, read: ReadText, found: Found) -> None:
    """``eyes.csv``: which pair belongs to which eye, columns name and eye; and patient, where it is known."""
    text = read(path)
    if isinstance(text, Problem):
        found.problems.append(text)
        return
    try:
        rows = _rows(text)
    except csv.Error as error:
        found.problems.append(Problem(path, "bad_csv", f"not a readable CSV: {error}"))
        return
    known = {candidate.name for candidate in found.candidates}
    for line, row in enumerate(rows, start=2):
        if not row.get("name") or not row.get("eye"):
            found.problems.append(Problem(f"{path}:{line}", "bad_csv", "each row needs the columns name and eye"))
            continue
        name = row["name"] if row["name"] in known else PurePosixPath(row["name"]).stem
        if name not in known:
            found.warnings.append(Problem(f"{path}:{line}", "ignored", f"no pair is named {printable(row['name'])!r}"))
        elif found.eyes.get(name, row["eye"]) != row["eye"]:
            found.problems.append(Problem(f"{path}:{line}", "bad_csv", f"pair {name!r} is given two eyes"))
        elif row.get("patient") and found.patients.get(name, row["patient"]) != row["patient"]:
            found.problems.append(Problem(f"{path}:{line}", "bad_csv", f"pair {name!r} is given two patients"))
        else:
            found.eyes[name] = row["eye"]
            found.patients |= {name: row["patient"]} if row.get("patient") else {}


def _read_captions(path: str, read: ReadText, found: Found) -> None:
    """``captions.jsonl``: what is said of each pair; a pair of which nothing is said is odd, but no fault."""
    text = read(path)
    if isinstance(text, Problem):
        found.problems.append(text)
        return
    names = [candidate.name for candidate in found.candidates]
    found.captions, problems = parse_captions(text, set(names), path)
    found.problems += problems
    silent = [name for name in names if name not in found.captions]
    if silent and found.captions and not problems:
        shown = ", ".join(printable(name) for name in silent[:5])
        message = f"{len(silent)} of {len(names)} pairs have no caption, e.g. {shown}"
        found.warnings.append(Problem(path, "without_caption", message))
