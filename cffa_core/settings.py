"""One settings object for every process of CFFA, read from ``CFFA_*`` environment variables.

``embedded`` is one machine: SQLite, a local folder, a worker that polls. ``cluster`` names servers for all three.
No other module reads the environment.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, SecretStr, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    """Where things are and how long they may take. Durations are seconds, sizes are bytes."""

    model_config = SettingsConfigDict(env_prefix="CFFA_", extra="ignore", frozen=True, secrets_dir=None)

    mode: Literal["embedded", "cluster"] = "embedded"
    home: Path = Field(default=Path("cffa-home"), description="Folder of the embedded record, objects and caches.")
    database_url: str = Field(default="", description="SQLAlchemy URL; empty means SQLite inside `home`.")

    host: str = "127.0.0.1"
    port: int = Field(default=8008, ge=0, le=65535)
    allow_remote: bool = Field(
        default=False, description="Let the keyless embedded API listen beyond loopback (container, trusted network)."
    )
    public_url: str = Field(default="", description="Address users reach the API under; empty means host:port.")
    blob_secret: SecretStr = Field(
        default=SecretStr(""), description="Key of signed blob URLs; empty means one kept inside `home`."
    )
    blob_url_ttl: int = Field(default=3600, gt=0)

    lease_seconds: float = Field(default=60.0, gt=0)
    renew_seconds: float = Field(default=15.0, gt=0)
    poll_seconds: float = Field(default=1.0, gt=0, description="How often an idle worker looks for work.")
    sweep_seconds: float = Field(default=5.0, gt=0)
    stall_seconds: float = Field(default=1800.0, gt=0, description="No step within this time: the child is killed.")
    cancel_grace_seconds: float = Field(default=20.0, gt=0)
    max_crashes: int = Field(default=3, ge=1, description="Child crashes in a row without progress.")
    max_expiries: int = Field(default=10, ge=1, description="Lease expiries in a row without progress.")

    max_upload_bytes: int = Field(default=8 * 2**30, gt=0)
    max_image_pixels: int = Field(default=64_000_000, gt=0)
    max_archive_members: int = Field(default=20_000, gt=0)
    max_archive_ratio: float = Field(default=200.0, gt=1)
    max_unpacked_bytes: int = Field(default=32 * 2**30, gt=0)

    device: str = Field(default="auto", description="auto | cpu | cuda | cuda:N")
    threads: int = Field(default=0, ge=0, description="CPU threads of a child; 0 means the machine's cores.")
    models_dir: Path | None = Field(default=None, description="Folder in which base models are looked up by name.")
    lpips_weights: Path | None = Field(default=None, description="Weight file of the LPIPS term (loss.lpips_lambda).")

    @model_validator(mode="after")
    def _leases_make_sense(self) -> Self:
        if self.renew_seconds * 2 > self.lease_seconds:
            raise ValueError("renew_seconds must be at most half of lease_seconds")
        if self.mode == "cluster" and not self.database_url:
            raise ValueError("cluster mode needs CFFA_DATABASE_URL")
        return self

    @cached_property
    def record_url(self) -> str:
        """SQLAlchemy URL of the record (job table)."""
        return self.database_url or f"sqlite:///{(self.home / 'record.sqlite').resolve()}"

    @cached_property
    def objects_dir(self) -> Path:
        """Folder of the local object store (embedded mode)."""
        return self.home / "objects"

    @cached_property
    def scratch_dir(self) -> Path:
        """Folder of working files and caches; safe to delete when nothing runs."""
        return self.home / "scratch"

    @cached_property
    def url(self) -> str:
        """Address under which clients reach the API."""
        return self.public_url or f"http://{self.host}:{self.port}"
