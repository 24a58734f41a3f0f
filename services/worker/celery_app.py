"""The application for Celery's own programs: ``celery -A services.worker.celery_app inspect active``, Flower.

It reads the settings of the environment when it is imported. Workers are started by ``python -m services.worker``.
"""

from __future__ import annotations

from cffa_core.settings import Settings
from services.worker.tasks import make_app

app = make_app(Settings())
