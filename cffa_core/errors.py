"""Typed errors of CFFA.

Every error that a user can cause or must act on is one of these. Each class carries a stable ``code`` (part of the
HTTP contract) and says whether the same request may succeed later (``retryable``). Mapping to HTTP status codes is
done in one place, ``services.api.problems``; nothing here knows about HTTP.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with one input.

    ``pointer`` names where: a JSON pointer into a spec (``/count``) or a file inside a data set (``cf/m024.png``).
    ``code`` is stable and machine-readable; ``message`` says what was wrong and what to do.
    """

    pointer: str
    code: str
    message: str


class CffaError(Exception):
    """Base of all typed errors; ``problems`` lists every finding, not just the first."""

    code: ClassVar[str] = "internal"
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, problems: tuple[Problem, ...] = ()) -> None:
        super().__init__(message)
        self.message = message
        self.problems = problems


class InvalidSpec(CffaError):
    """A job specification that can never run; refused when posted."""

    code = "invalid_spec"


class InvalidSettings(CffaError):
    """The settings describe a service that must not or cannot start; the message says which one to change."""

    code = "invalid_settings"


class InvalidDataset(CffaError):
    """A data set that was refused as a whole; ``problems`` names every bad file."""

    code = "invalid_dataset"


class NotFound(CffaError):
    """The id does not exist, or belongs to another owner (the two are not told apart)."""

    code = "not_found"


class Conflict(CffaError):
    """The request does not fit the state of the thing it names (e.g. cancelling a finished job)."""

    code = "conflict"


class QuotaExceeded(CffaError):
    """The owner has as much as they may have; deleting something, or an admin, makes room."""

    code = "quota_exceeded"


class TooManyActiveJobs(QuotaExceeded):
    """The owner has as many unfinished jobs as they may have; there is room once one of them is over."""

    retryable = True


class Gone(CffaError):
    """The artefact existed and was removed by retention."""

    code = "gone"


class Expired(Gone):
    """A job is over for longer than its products were to be kept; what remains is its history."""

    code = "expired"


class LeaseLost(CffaError):
    """A write was refused because a newer attempt owns the unit, or its job takes no more results."""

    code = "lease_lost"


class Cancelled(CffaError):
    """Raised inside a recipe when its job is being cancelled or paused; not a failure."""

    code = "cancelled"


class CorruptArtifact(CffaError):
    """Stored bytes do not match their recorded digest or size; nothing was used from them."""

    code = "corrupt_artifact"


class StorageUnavailable(CffaError):
    """Object storage or disk refused a read or write (full, unreachable)."""

    code = "storage_unavailable"
    retryable = True


class RecordOutdated(StorageUnavailable):
    """The record's schema is older than this version needs; whoever runs the service must set it up."""

    code = "record_outdated"


class VersionTooOld(StorageUnavailable):
    """This process is older than what it read from the record; it is to be replaced, and one that is newer answers."""

    code = "version_too_old"


class ModelUnavailable(CffaError):
    """A base model or checkpoint cannot be loaded: missing, incomplete, or offline."""

    code = "model_unavailable"


class NotEnoughData(CffaError):
    """A score was refused because too few samples stand behind it."""

    code = "not_enough_data"


class TrainingDiverged(CffaError):
    """The training loss is no longer a number; the settings (learning rate, precision) do not suit the data."""

    code = "training_diverged"


class NumericsMismatch(CffaError):
    """A job pinned to one numerics key cannot continue on this worker without losing bit-identity."""

    code = "numerics_mismatch"
