"""What a posted job says beside its specification: priority, deadline, retention. None of it changes a result."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, Field

from cffa_core.jobs.records import Terms
from services.api.moments import Moment

DAY_SECONDS = 86_400.0
LONGEST_DAYS = 36_500
Priority = Annotated[int, Field(ge=-100, le=100, description="Among one owner's jobs, higher goes first.")]


class JobTerms(BaseModel):
    """The terms on which a job is posted."""

    priority: Priority = 0
    deadline_seconds: float | None = Field(
        default=None,
        gt=0,
        le=LONGEST_DAYS * DAY_SECONDS,
        description="A job that is not over so long after it was posted fails; what it finished is kept.",
    )
    deadline_at: Moment | None = Field(default=None, description="The same as a time (with its zone).")
    retention_days: float | None = Field(
        default=None,
        ge=0,
        le=LONGEST_DAYS,
        description="Products are removed so long after the job's end; 0: never; left out: as the service does.",
    )

    def terms(self) -> Terms:
        """As the record takes them."""
        keep = None if self.retention_days is None else self.retention_days * DAY_SECONDS
        return Terms(deadline_seconds=self.deadline_seconds, deadline_at=self.deadline_at, retention_seconds=keep)


TERMS = frozenset(JobTerms.model_fields)
"""Fields of a posted job that are not of its specification."""
