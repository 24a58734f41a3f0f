"""The process in which a stored data set is surveyed: ``python -m cffa_core.evaluation.survey_child FOLDER``.

FOLDER holds a checked data set and ``survey-request.json``; the findings go to ``survey.json`` beside it, the sheet of
flagged pairs to ``flagged.png``. A process of its own, so that the answers of a server do not wait for it.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
from pathlib import Path

REQUEST, FINDINGS, SHEET = "survey-request.json", "survey.json", "flagged.png"
MEMORY_BYTES = 6 * 2**30
NICENESS = 10


def main(folder: Path) -> None:
    """Survey the data set in ``folder``; see the module."""
    os.nice(NICENESS)
    with contextlib.suppress(ValueError, OSError):  # a system that knows no such limit goes without
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    import cv2

    from cffa_core.data.dataset_folder import read_index, read_pairs
    from cffa_core.evaluation.dataset_survey import survey
    from cffa_core.evaluation.survey_sheet import flagged_names, flagged_sheet

    cv2.setNumThreads(1)
    asked = json.loads((folder / REQUEST).read_text(encoding="utf-8"))
    _, pairs = read_index(folder)
    found = survey(read_pairs(folder, pairs), notes=asked["notes"], split=asked["split"])
    flagged = set(flagged_names(found))
    flagged_sheet(found, read_pairs(folder, [pair for pair in pairs if pair.name in flagged]), folder / SHEET)
    (folder / FINDINGS).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
