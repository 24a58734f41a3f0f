"""Where the command line finds the key of a service: an option, a variable, or a file that only its owner may read.

Nothing here sends a key; ``transport`` does, and only to the service itself.
"""

from __future__ import annotations

import os
from pathlib import Path

from cffa_core.errors import InvalidSettings

VARIABLE = "CFFA_API_KEY"
FILE_VARIABLE = "CFFA_API_KEY_FILE"


def find_key(given: str) -> str:
    """``given``, or else the content of the file that ``CFFA_API_KEY_FILE`` names, or else nothing.

    Raises :class:`InvalidSettings` if there is such a file and it cannot be read, or what was found is no key. No
    message repeats a key.
    """
    path = os.environ.get(FILE_VARIABLE, "")
    if given or not path:
        source, key = f"--api-key ({VARIABLE})", given.strip()
    else:
        source = f"{path} ({FILE_VARIABLE})"
        try:
            key = Path(path).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is not text"
            raise InvalidSettings(f"the key in {source} cannot be read: {why}") from error
        if not key:
            raise InvalidSettings(f"the key in {source} is empty")
    if not all("!" <= letter <= "~" for letter in key):
        raise InvalidSettings(f"the key of {source} is no key: it holds blanks or letters outside ASCII")
    return key
