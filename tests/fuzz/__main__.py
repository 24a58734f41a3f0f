"""``python -m tests.fuzz``: see :mod:`tests.fuzz.campaign`."""

from __future__ import annotations

import sys

from tests.fuzz.campaign import main

sys.exit(main())
