"""A moment in a request: a date and time with its zone, as the OpenAPI document says, and nothing else.

pydantic alone would take a number of seconds too, and what the document does not allow is refused.
"""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AwareDatetime, BeforeValidator
from pydantic_core import PydanticCustomError

_WRITTEN = re.compile(r"\d{4}-\d{2}-\d{2}[Tt ]\d{2}:\d{2}.*", re.DOTALL)


def _written_out(value: Any) -> Any:
    number = isinstance(value, int | float) or (isinstance(value, str) and _WRITTEN.fullmatch(value) is None)
    if number:
        raise PydanticCustomError("datetime_parsing", "write a date and a time with its zone, as 2026-11-21T12:00:00Z")
    return value


Moment = Annotated[AwareDatetime, BeforeValidator(_written_out)]
