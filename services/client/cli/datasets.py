"""Commands about data sets: check one here, and upload, import, list, report, version and delete those of a service."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cffa_core.errors import CffaError, InvalidDataset
from services.client.cli import options, specification
from services.client.cli.direct import Pairs, dataset
from services.client.cli.options import Key, Url
from services.client.cli.terminal import AsJson, print_json, print_table, progress_bars, say

DatasetId = Annotated[str, typer.Argument(metavar="ID", help="Id of the data set.")]
Name = Annotated[str | None, typer.Option(help="Name of the data set.")]
COLUMNS = ("size", "registration", "shift px", "vessel Dice", "flags")


class SurveyPending(CffaError):
    """The service has not looked into the pairs of a data set yet."""

    code = "survey_pending"


def check(
    path: Pairs,
    eye_pattern: options.EyePattern = None,
    patient_pattern: options.PatientPattern = None,
    auto_register: options.AutoRegister = False,
    sheet: Annotated[
        Path | None, typer.Option(dir_okay=False, help="Write flagged pairs as checkerboards (PNG) here.")
    ] = None,
    registration_sheet: Annotated[
        Path | None, typer.Option(dir_okay=False, help="Write pairs before and after --auto-register (PNG) here.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="What an upload checks; pairs are not looked into.")] = False,
    as_json: AsJson = False,
) -> None:
    """Check a folder or zip as an upload would, and look into its pairs; takes nothing in.

    Names every problem of every file; flags misregistered pairs, duplicates, missing overlap, grey CF, colour FA.
    """
    from cffa_core.data import ingest

    with progress_bars() as bars:
        checked = ingest.check(
            path,
            eye_pattern=eye_pattern,
            patient_pattern=patient_pattern,
            auto_register=auto_register,
            on_progress=lambda done, total: bars("checking", done, total),
        )
    survey = None if quick else _surveyed(checked, sheet)
    if registration_sheet is not None:
        from cffa_core.evaluation import survey_sheet

        if survey_sheet.registration_sheet(checked.registered, registration_sheet):
            say(f"before and after registration: {registration_sheet}")
    report = checked.report() | ({"survey": survey} if survey is not None else {})
    if as_json:
        print_json(report)
    else:
        print_report(report)
        known = "" if checked.patients is None else f" of {checked.patients} known patients"
        count = f"{len(checked.pairs)} pairs, {checked.eyes} eyes{known}"
        say(f"{count}, layout: {checked.layout}, digest: {checked.digest[:16]}")
    if not checked.ok:
        raise InvalidDataset(f"{path} would be refused", problems=checked.problems)


def _surveyed(checked: Any, sheet: Path | None) -> dict[str, Any]:
    """The survey of a checked source, and its sheet if one is wanted."""
    from cffa_core.evaluation.dataset_survey import survey
    from cffa_core.evaluation.survey_sheet import flagged_sheet

    with progress_bars() as bars:
        total = len(checked.pairs)
        found = survey(
            checked.decoded(), notes=checked.notes, on_progress=lambda done: bars("looking into pairs", done, total)
        )
    if sheet is not None:
        drawn = flagged_sheet(found, checked.decoded(), sheet)
        say(f"flagged pairs: {sheet}" if drawn else "no pair is flagged: no sheet is written")
    return found


def print_report(report: dict[str, Any]) -> None:
    """Pairs with their flags, likenesses, leaks and warnings, for people."""
    survey = report.get("survey", {})
    found = {pair["name"]: pair for pair in survey.get("pairs", ())}
    rows = []
    part_of = {name: part for part, names in (report.get("split") or {}).items() for name in names}
    renamed = any(pair.get("original_name") for pair in report["pairs"])
    patients = any(pair.get("patient") is not None for pair in report["pairs"])
    for pair in report["pairs"]:
        seen = found.get(pair["name"], {})
        size, flags = f"{pair['width']} x {pair['height']}", ", ".join(seen.get("flags", ()))
        known = seen.get("shift_px"), seen.get("vessel_dice")
        whose = (pair["eye"], pair.get("patient")) if patients else (pair["eye"],)
        called = (pair.get("original_name") or pair["name"],) if renamed else ()
        part = (part_of.get(pair["name"], ""),) if part_of else ()
        rows.append((pair["name"], *called, *whose, *part, size, pair["registration"], *known, flags))
    own = ("pair", *(("came as",) if renamed else ()), "eye", *(("patient",) if patients else ()))
    print_table((*own, *(("part",) if part_of else ()), *COLUMNS), rows)
    for like in survey.get("likenesses", ()):
        turned = f", turned ({like['turn']})" if like["turn"] else ""
        say(f"alike: {like['first']} and {like['second']}: {like['kind']}{turned}")
    for leak in survey.get("leaks", ()):
        who = f"patient {leak['patient']}" if leak["patient"] else leak["kind"]
        say(f"leak: {who} is in {' and '.join(sorted(leak['parts']))}")
    for warning in report.get("warnings", ()):
        where = f"{warning['pointer']}: " if warning["pointer"] else ""
        say(f"warning: {where}{warning['message']} [{warning['code']}]")


def upload(
    source: Annotated[Path, typer.Argument(metavar="PATH", help="Folder of pairs, or a zip.")],
    name: Name = None,
    eye_pattern: options.EyePattern = None,
    patient_pattern: options.PatientPattern = None,
    auto_register: options.AutoRegister = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an upload that broke off.")] = False,
    as_json: AsJson = False,
    url: Url = options.DEFAULT_URL,
    api_key: Key = "",
) -> None:
    """Upload a folder file by file, straight to the object store, or a zip as a whole."""
    with options.connect(url, api_key) as client, progress_bars() as bars:
        if source.is_dir():
            made = client.sets.upload_folder(
                source,
                name,
                eye_pattern=eye_pattern,
                patient_pattern=patient_pattern,
                auto_register=auto_register,
                resume=resume,
                on_bytes=lambda done, total: bars("uploading", done, total),
            )
        else:
            made = client.upload_dataset(
                source,
                name,
                lambda done, total: bars("uploading", done, total),
                eye_pattern=eye_pattern,
                patient_pattern=patient_pattern,
                auto_register=auto_register,
            )
    _print_one(made, as_json)


def import_(
    prefix: Annotated[str, typer.Argument(help="Folder below your import folder in the service's bucket.")],
    name: Name = None,
    eye_pattern: options.EyePattern = None,
    patient_pattern: options.PatientPattern = None,
    auto_register: options.AutoRegister = False,
    as_json: AsJson = False,
    url: Url = options.DEFAULT_URL,
    api_key: Key = "",
) -> None:
    """Take pairs in that lie in the service's object store already."""
    with options.connect(url, api_key) as client:
        made = client.sets.import_prefix(
            prefix, name, eye_pattern=eye_pattern, patient_pattern=patient_pattern, auto_register=auto_register
        )
    _print_one(made, as_json)


def list_(
    limit: options.Limit = 50,
    as_json: AsJson = False,
    url: Url = options.DEFAULT_URL,
    api_key: Key = "",
) -> None:
    """List data sets and their versions, newest first."""
    from itertools import islice

    with options.connect(url, api_key) as client:
        found = list(islice(client.datasets(), limit))
    if as_json:
        print_json([item.model_dump(mode="json") for item in found])
        return
    rows = [(item.id, item.name, item.version, item.pairs, _split(item.split), item.parent_id or "") for item in found]
    print_table(("data set", "name", "version", "pairs", "split", "made from"), rows)


def report(
    dataset_id: DatasetId,
    wait: Annotated[float, typer.Option(min=0, help="Seconds to wait for the service to look into the pairs.")] = 600.0,
    pictures: Annotated[
        Path | None, typer.Option(file_okay=False, help="Write the contact sheets of the report into this folder.")
    ] = None,
    as_json: AsJson = False,
    url: Url = options.DEFAULT_URL,
    api_key: Key = "",
) -> None:
    """Show what was found in a data set: registration, overlap, duplicates, leaks of its split."""
    import time

    end = time.monotonic() + wait
    with options.connect(url, api_key) as client:
        while True:
            found = client.dataset_report(dataset_id)
            if found["survey"]["state"] != "waiting":
                break
            if time.monotonic() > end:
                raise SurveyPending(
                    f"the pairs of {dataset_id} were not looked into within {wait:g} s; ask again later"
                )
            time.sleep(1.0)
        written = client.sets.download_pictures(dataset_id, pictures) if pictures is not None else []
    if as_json:
        print_json(found)
        return
    print_report(found)
    for path in written:
        say(f"written: {path}")


def version(
    dataset_id: DatasetId,
    reject: Annotated[list[str] | None, typer.Option(help="Name of a pair to leave out; may be repeated.")] = None,
    split: Annotated[
        tuple[float, float, float] | None,
        typer.Option(metavar="TRAIN VALIDATION TEST", help="Shares of the eyes, locked into the version."),
    ] = None,
    split_file: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="JSON with lists of eyes: train, validation, test."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Which eyes go where, with --split.")] = 0,
    register: Annotated[
        list[str] | None, typer.Option(help="Name of a pair to register anew; may be repeated; or `flagged`.")
    ] = None,
    patient_pattern: options.PatientPattern = None,
    name: Name = None,
    as_json: AsJson = False,
    url: Url = options.DEFAULT_URL,
    api_key: Key = "",
) -> None:
    """Make a version of a data set: pairs left out, patients told, a split by eye, pairs registered anew."""
    asked: Any = None
    if split_file is not None:
        asked = specification.read_json(split_file)
    elif split is not None:
        asked = {**dict(zip(("train", "validation", "test"), split, strict=True)), "seed": seed}
    chosen: Any = "flagged" if register == ["flagged"] else register or []
    with options.connect(url, api_key) as client:
        made = client.sets.version(
            dataset_id,
            reject=reject or [],
            split=asked,
            auto_register=chosen,
            patient_pattern=patient_pattern,
            name=name,
        )
    _print_one(made, as_json)


def delete(dataset_id: DatasetId, url: Url = options.DEFAULT_URL, api_key: Key = "") -> None:
    """Remove a data set that no unfinished job uses; what other versions share stays."""
    with options.connect(url, api_key) as client:
        client.sets.delete(dataset_id)
    say(f"{dataset_id} is deleted")


def _print_one(made: Any, as_json: bool) -> None:
    if as_json:
        print_json(made.model_dump(mode="json"))
        return
    row = (made.id, made.name, made.version, made.pairs, _split(made.split), made.digest[:16])
    print_table(("data set", "name", "version", "pairs", "split", "digest"), [row])


def _split(split: dict[str, int] | None) -> str:
    return "" if split is None else " / ".join(str(split.get(part, 0)) for part in ("train", "validation", "test"))


def register(app: typer.Typer) -> None:
    """Add these commands to the group ``dataset``."""
    dataset.command("check")(check)
    dataset.command("upload")(upload)
    dataset.command("import")(import_)
    dataset.command("list")(list_)
    dataset.command("report")(report)
    dataset.command("version")(version)
    dataset.command("delete")(delete)
