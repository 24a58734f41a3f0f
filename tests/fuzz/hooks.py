"""Schemathesis' hooks: where a request asks for something by an id that could be one, it often asks for one that is.

Loaded by the fuzzer (``schemathesis.toml`` names it). Without it nearly every request would end with 404. Also the
check that bad requests are refused, with the one exception that the API makes.
"""

from __future__ import annotations

import re
import zlib
from typing import Any

import schemathesis
from jsonschema import Draft202012Validator, ValidationError
from schemathesis.specs.openapi.checks import negative_data_rejection

from tests.api.driving import good_upload
from tests.fuzz.place import known_ids

ID = re.compile(r"(job|ds|mdl)_[0-9a-z]{20}")
PARAMETER = {"job": "job_id", "ds": "dataset_id", "mdl": "model_id"}
ONE_IN = 4
LONGEST_WAIT = 30


def _number(value: object) -> int:
    """A number that follows from ``value`` alone, so that a case that failed is the same when it is tried again."""
    return zlib.crc32(repr(value).encode())


@schemathesis.hook
def map_path_parameters(context: Any, path_parameters: dict[str, Any] | None) -> dict[str, Any] | None:
    """A known id for three of four."""
    ids = known_ids()
    for name, value in (path_parameters or {}).items():
        if name in ids and _number(value) % ONE_IN:
            path_parameters[name] = ids[name][_number(value) % len(ids[name])]  # type: ignore[index]
        elif name in ("index", "number") and isinstance(value, int) and _number(value) % 2:
            path_parameters[name] = value % 4  # type: ignore[index]
    return path_parameters


@schemathesis.hook
def map_query(context: Any, query: dict[str, Any] | None) -> dict[str, Any] | None:
    """No long polls of half a minute: nothing works on these jobs, and the fuzzer has other things to ask."""
    wait = str((query or {}).get("wait", ""))
    if wait.isdecimal() and 1 < int(wait[:9]) <= LONGEST_WAIT:
        query["wait"] = 1  # type: ignore[index]
    return query


@schemathesis.hook
def map_body(context: Any, body: Any) -> Any:
    """Known ids for those that have the form of one, and in half of all uploads a zip that can be taken in."""
    if isinstance(body, dict):
        for name, value in body.items():
            found = ID.fullmatch(value) if isinstance(value, str) else None
            if found is not None and (ids := known_ids()[PARAMETER[found[1]]]):
                body[name] = ids[_number(value) % len(ids)]
        if isinstance(body.get("file"), bytes) and _number(body["file"]) % 2:
            body["file"] = good_upload()
    return body


@schemathesis.check
def bad_data_is_refused(context: Any, response: Any, case: Any) -> bool | None:
    """What the document does not allow is refused, but for numbers and truth values that are written another way."""
    if is_only_written_otherwise(case):
        return True
    return bool(negative_data_rejection(context, response, case))


def is_only_written_otherwise(case: Any) -> bool:
    """Whether a body is wrong by its schema for nothing but ``"5"``, ``true`` or ``0`` in place of another scalar."""
    document, media = case.operation.schema.raw_schema, case.media_type
    operation = document["paths"][case.operation.path].get(case.method.lower(), {})
    described = operation.get("requestBody", {}).get("content", {})
    if media not in described or not isinstance(case.body, dict):
        return False
    schema = {**described[media]["schema"], "components": document["components"]}
    found = list(Draft202012Validator(schema).iter_errors(case.body))
    return bool(found) and all(_is_scalar_of_another_type(error) for error in found)


def _is_scalar_of_another_type(error: ValidationError) -> bool:
    if error.validator in ("anyOf", "oneOf"):
        branches: dict[Any, list[ValidationError]] = {}
        for inner in error.context or ():
            branches.setdefault(inner.schema_path[0], []).append(inner)
        return any(all(map(_is_scalar_of_another_type, inner)) for inner in branches.values())
    wanted = error.validator_value if error.validator == "type" else None
    return wanted in ("integer", "number", "boolean") and isinstance(error.instance, bool | int | float | str)
