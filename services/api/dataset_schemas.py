"""What the API says of ways into the service and of versions: uploads file by file, imports, splits.

Data sets themselves are in ``schemas``.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, StringConstraints, Tag

from services.api.schemas import DATASET, NOON, example
from services.api.taking_in import Wanted

UPLOAD = "up_0123456789abcdefghij"
MOST_FILES = 20_000
Name = Annotated[str, Field(min_length=1, max_length=200)]
PairName = Annotated[str, StringConstraints(min_length=1, max_length=200)]
Eye = Annotated[str, StringConstraints(min_length=1, max_length=300)]
EyePattern = Annotated[
    str | None,
    Field(max_length=200, description="Regular expression; pairs whose names give the same match are one eye."),
]
PatientPattern = Annotated[
    str | None,
    Field(
        max_length=200,
        description="Regular expression; eyes whose pairs' names give the same match are of one patient, and no split "
        "divides them.",
    ),
]
AutoRegister = Annotated[
    bool,
    Field(description="Register pairs that come without landmarks; those that cannot be are left out."),
]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _DatasetRequest(_Request):
    """What every way in is told about a data set."""

    name: Name
    eye_pattern: EyePattern = None
    patient_pattern: PatientPattern = None
    auto_register: AutoRegister = False

    def wanted(self, key: str | None = None) -> Wanted:
        """The same for the check; raises ``InvalidSpec`` for a name or pattern that cannot be."""
        return Wanted(self.name, self.eye_pattern, self.patient_pattern, self.auto_register, key).checked()


class FileToSend(_Request):
    """One file that is to come, by its path in the data set."""

    path: str = Field(min_length=1, max_length=500, examples=["cf/m024.png"])
    size: int = Field(ge=1, le=2**40, description="Bytes.")


class UploadRequest(_DatasetRequest):
    """A folder that is to be sent file by file."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {
                    "name": "clinic A",
                    "files": [{"path": "cf/m024.png", "size": 412003}, {"path": "fa/m024.png", "size": 208114}],
                }
            ]
        },
    )
    files: list[FileToSend] = Field(min_length=1, max_length=MOST_FILES)


class PartToPut(BaseModel):
    """One PUT that is still to be made: ``size`` bytes of the file from ``offset`` on, to ``url``."""

    number: int | None = Field(description="Null where the file goes whole.")
    offset: int
    size: int
    url: str


class UploadFileView(BaseModel):
    """One announced file: how many of its bytes are there, and what is to be sent."""

    path: str
    size: int
    received: int
    complete: bool
    puts: list[PartToPut]


class UploadView(BaseModel):
    """An upload file by file, and a page of its files. When all are complete, post to `links.complete`."""

    model_config = example(
        {
            "id": UPLOAD,
            "name": "clinic A",
            "state": "open",
            "bytes": 620117,
            "dataset_id": None,
            "created_at": NOON,
            "expires_at": NOON,
            "files": [],
            "next_page_token": None,
            "links": {"self": f"/v1/uploads/{UPLOAD}", "complete": f"/v1/uploads/{UPLOAD}:complete"},
        }
    )
    id: str
    name: str
    state: str = Field(description="`open` or `done`.")
    bytes: int
    dataset_id: str | None
    created_at: datetime
    expires_at: datetime
    files: list[UploadFileView]
    next_page_token: str | None
    links: dict[str, str]


class UploadList(BaseModel):
    """One page of uploads, newest first, without their files."""

    items: list[UploadView]
    next_page_token: str | None


class ImportRequest(_DatasetRequest):
    """A folder of the service's bucket."""

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"name": "clinic A", "prefix": "2026-11/clinic-a"}]}
    )
    prefix: str = Field(min_length=1, max_length=500, description="Folder below the owner's import folder.")


class SplitByFraction(_Request):
    """Shares of the eyes, relative to their sum; which eye goes where follows from the seed."""

    train: float = Field(gt=0, le=1000)
    validation: float = Field(default=0.0, ge=0, le=1000)
    test: float = Field(default=0.0, ge=0, le=1000)
    seed: int = Field(default=0, ge=0, lt=2**63)


class SplitByEyes(_Request):
    """The eyes of each part by name; pairs of eyes that are not named are in none."""

    train: list[Eye] = Field(min_length=1)
    validation: list[Eye] = []
    test: list[Eye] = []


def _kind_of_split(asked: Any) -> str:
    """``eyes`` if a part is a list, so that a mistake is told about the kind of split that was meant."""
    told = asked.values() if isinstance(asked, dict) else vars(asked).values() if isinstance(asked, BaseModel) else ()
    return "eyes" if any(isinstance(part, list) for part in told) else "shares"


Split = Annotated[
    Annotated[SplitByFraction, Tag("shares")] | Annotated[SplitByEyes, Tag("eyes")], Discriminator(_kind_of_split)
]


class VersionRequest(_Request):
    """What a new version of a data set is to be. Without a split here it keeps its parent's."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {"reject": ["m032"], "split": {"train": 0.7, "validation": 0.15, "test": 0.15, "seed": 7}},
                {"split": {"train": ["u1", "u2"], "validation": ["u4"], "test": ["m024"]}},
            ]
        },
    )
    name: Name | None = Field(default=None, description="Default: that of the data set.")
    reject: list[PairName] = Field(default=[], description="Names of pairs that are left out.")
    auto_register: list[PairName] | Literal["flagged"] = Field(
        default=[], description="Pairs to register anew, or `flagged`: those that the report calls misregistered."
    )
    patient_pattern: PatientPattern = None
    split: Split | None = None


__all__ = [
    "DATASET",
    "FileToSend",
    "ImportRequest",
    "SplitByEyes",
    "SplitByFraction",
    "UploadFileView",
    "UploadList",
    "UploadRequest",
    "UploadView",
    "VersionRequest",
]
