"""What supervisor and child say to each other: one JSON object per line, over the child's standard input and output.

The supervisor sends a :class:`WorkOrder` and then answers; the child reports. The child never sees the record, so an
order carries everything it needs: the spec, the stored files it works on, and where its scratch folder is. Nothing
here starts processes.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, TypeAdapter

from cffa_core.errors import Problem
from cffa_core.jobs.records import NewModel, StoredFiles, Wish
from cffa_core.jobs.spec import JobSpec
from cffa_core.jobs.state import UnitKind
from cffa_core.settings import Settings


class Message(BaseModel):
    """Base of all messages: unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    def line(self) -> bytes:
        """The message as one line."""
        return self.model_dump_json().encode() + b"\n"


# --- supervisor to child ------------------------------------------------------------------------------------------


class WorkOrder(Message):
    """One claimed unit. ``inputs`` are groups of stored files by role, e.g. ``dataset``, ``model``, ``parts``.

    ``facts`` are plain values from the record that the unit needs, e.g. ``model_digest``. ``checkpoints`` are the
    steps and files to resume from, best first: each stands in for the one before it should its bytes be damaged.
    ``folder`` is this attempt's scratch folder, ``cache`` the machine's shared one.
    """

    type: Literal["order"] = "order"
    settings: dict[str, Any]
    job_id: str
    kind: UnitKind
    index: int
    attempt: int
    spec: JobSpec
    numerics_key: str | None
    checkpoints: tuple[tuple[int, StoredFiles], ...]
    inputs: dict[str, StoredFiles]
    facts: dict[str, Any]
    folder: str
    cache: str


class Answer(Message):
    """Reply to :class:`Ready` and :class:`CheckpointSaved`: go on, or stop because the claim is no longer good.

    ``superseded`` are keys of objects that nothing points to any more; the child deletes them.
    """

    type: Literal["answer"] = "answer"
    accepted: bool
    superseded: tuple[str, ...] = ()


class Stop(Message):
    """Leave the unit at the next safe point and report :class:`Stopped`."""

    type: Literal["stop"] = "stop"


class Wished(Message):
    """The job's owner asks a training for something at its next step; the unit goes on."""

    type: Literal["wish"] = "wish"
    what: Wish


# --- child to supervisor ------------------------------------------------------------------------------------------


class Ready(Message):
    """The child has its inputs and its libraries and is about to compute under this numerics key; it waits."""

    type: Literal["ready"] = "ready"
    numerics_key: str


class Beat(Message):
    """A sign of life: how many steps the child has counted since the order, how far it is, metrics since the last.

    ``gpu_memory`` are the bytes that the child has reserved on its GPU; 0 without one.
    """

    type: Literal["beat"] = "beat"
    steps: int
    stage: str
    current: int
    total: int
    metrics: tuple[tuple[int, dict[str, float]], ...] = ()
    gpu_memory: int = 0


class CheckpointSaved(Message):
    """All files of a checkpoint are stored; the child waits until the record points to them."""

    type: Literal["checkpoint"] = "checkpoint"
    step: int
    stored: StoredFiles


class Done(Message):
    """The unit's products are stored."""

    type: Literal["done"] = "done"
    stored: StoredFiles
    info: dict[str, Any]
    job_result: dict[str, Any] | None = None
    model: NewModel | None = None


class Stopped(Message):
    """The unit was left at a safe point, as asked."""

    type: Literal["stopped"] = "stopped"


class Failed(Message):
    """The unit ended with an error. ``code`` is None for one that is not a typed error of CFFA.

    ``prepared`` says whether the child had reported :class:`Ready`: before that, an untyped error is the worker's.
    """

    type: Literal["failed"] = "failed"
    code: str | None
    retryable: bool
    message: str
    problems: tuple[Problem, ...] = ()
    traceback: str
    prepared: bool


Order = Annotated[WorkOrder | Answer | Stop | Wished, Field(discriminator="type")]
Report = Annotated[Ready | Beat | CheckpointSaved | Done | Stopped | Failed, Field(discriminator="type")]

ORDERS: TypeAdapter[Order] = TypeAdapter(Order)
REPORTS: TypeAdapter[Report] = TypeAdapter(Report)


def settings_for_child(settings: Settings) -> dict[str, Any]:
    """All settings as JSON values, secrets included: the pipe is private, and the child needs the object store."""
    values = settings.model_dump(mode="json")
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        if isinstance(value, SecretStr):
            values[name] = value.get_secret_value()
    return values
