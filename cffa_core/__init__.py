"""The CFFA library: pairs, methods, jobs and storage. Knows neither FastAPI nor Celery."""

__version__ = "0.1.0"
