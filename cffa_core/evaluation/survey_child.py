"""The process in which a stored data set is surveyed: ``python -m cffa_core.evaluation.survey_child REQUEST``.

REQUEST is a JSON file: ``folder`` (a checked data set), ``notes`` and ``split`` as ``survey`` takes them, and where the
``findings`` (JSON) and the ``sheet`` of flagged pairs (PNG) go. A process of its own, so that a server's answers do not
wait for it.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
from pathlib import Path

MEMORY_BYTES = 6 * 2**30
NICENESS = 10


def main(request: Path) -> None:
    """Do what ``request`` asks for; see the module."""
    os.nice(NICENESS)
    with contextlib.suppress(ValueError, OSError):  # a system that knows no such limit goes without
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    import cv2

    from cffa_core.data.dataset_folder import read_index, read_pairs
    from cffa_core.evaluation.dataset_survey import survey
    from cffa_core.evaluation.survey_sheet import flagged_names, flagged_sheet

    cv2.setNumThreads(1)
    asked = json.loads(request.read_text(encoding="utf-8"))
    folder = Path(asked["folder"])
    _, pairs = read_index(folder)
    found = survey(read_pairs(folder, pairs), notes=asked["notes"], split=asked["split"])
    flagged = set(flagged_names(found))
    flagged_sheet(found, read_pairs(folder, [pair for pair in pairs if pair.name in flagged]), Path(asked["sheet"]))
    Path(asked["findings"]).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
