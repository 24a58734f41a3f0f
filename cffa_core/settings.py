"""One settings object for every process of CFFA, read from ``CFFA_*`` environment variables.

``embedded`` is one machine: SQLite, a local folder, a worker that polls. ``cluster`` names servers for all three.
Secrets may also come from files (container secrets): a file ``cffa_s3_secret_key`` in the folder that
``CFFA_SECRETS_DIR`` names counts as that setting; the environment wins. No other module reads the environment.
"""

from __future__ import annotations

import os
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from pydantic import Field, SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SecretsSettingsSource, SettingsConfigDict

from cffa_core.errors import InvalidSettings, Problem

SHORTEST_SECRET = 16
SHORTEST_KEY = 32
_KNOWN_SECRETS = frozenset(
    [
        "admin",
        "cffa",
        "cffa-secret",
        "change-me",
        "change_me",
        "changeme",
        "default",
        "example",
        "foobared",
        "guest",
        "minioadmin",
        "passw0rd",
        "password",
        "postgres",
        "postgresql",
        "redis",
        "root",
        "secret",
        "test",
        "user",
    ]
)


class Settings(BaseSettings):
    """Where things are and how long they may take. Durations are seconds, sizes are bytes."""

    model_config = SettingsConfigDict(env_prefix="CFFA_", extra="ignore", frozen=True, hide_input_in_errors=True)

    mode: Literal["embedded", "cluster"] = "embedded"
    home: Path = Field(default=Path("cffa-home"), description="Folder of the embedded record, objects and caches.")
    database_url: str = Field(default="", description="SQLAlchemy URL; empty means SQLite inside `home`.")
    database_password: SecretStr = Field(default=SecretStr(""), description="Put into `database_url`.")
    broker_url: str = Field(default="", description="redis://host:port/0 of the cluster's Celery broker.")
    broker_password: SecretStr = Field(default=SecretStr(""), description="Put into `broker_url`.")

    s3_endpoint: str = Field(default="", description="http(s)://host:port of the object store, as the services see it.")
    s3_public_endpoint: str = Field(
        default="", description="The same store as users reach it: download links are signed for it; empty: as above."
    )
    s3_bucket: str = Field(default="cffa", min_length=3, max_length=63)
    s3_region: str = "us-east-1"
    s3_access_key: SecretStr = SecretStr("")
    s3_secret_key: SecretStr = SecretStr("")

    bootstrap_key: SecretStr = Field(
        default=SecretStr(""), description="A first key of scope admin, of the account `admin`; empty: none."
    )
    key_secret: SecretStr = Field(
        default=SecretStr(""), description="Under which API keys are kept; empty (embedded): one kept inside `home`."
    )
    require_keys: bool = Field(default=False, description="Ask for keys in embedded mode too.")
    rate_limit_per_minute: int = Field(
        default_factory=lambda earlier: 15_000 if earlier.get("mode") == "cluster" else 0,
        ge=0,
        description="Requests of one key per minute; 0 means no limit.",
    )
    posts_per_minute: int = Field(
        default_factory=lambda earlier: 3_000 if earlier.get("mode") == "cluster" else 0,
        ge=0,
        description="Of these, requests that change something; 0 means no limit.",
    )
    quota_active_jobs: int = Field(default=0, ge=0, description="Unfinished jobs of one owner; 0 means no limit.")
    quota_pairs: int = Field(default=0, ge=0, description="Pairs in kept generation jobs of one owner; 0: no limit.")
    quota_bytes: int = Field(default=0, ge=0, description="Stored bytes of one owner; 0 means no limit.")
    audit_days: float = Field(default=365.0, gt=0, description="How long the audit log is kept.")
    metrics_port: int = Field(
        default=0, ge=0, le=65535, description="Port of a worker's own /metrics; 0 means none (the API has a route)."
    )
    owner_running_units: int = Field(
        default=0, ge=0, description="Units of one owner that run at a time; 0 means no limit."
    )

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
    poll_seconds: float = Field(
        default_factory=lambda earlier: 10.0 if earlier.get("mode") == "cluster" else 1.0,
        gt=0,
        description="How often an idle worker looks for work by itself: every second, 10 s where a broker wakes it.",
    )
    worker_kinds: str = Field(
        default="", description="Kinds of jobs that a worker takes, e.g. `generation,evaluation`; empty means all."
    )
    sweep_seconds: float = Field(default=5.0, gt=0)
    stall_seconds: float = Field(default=1800.0, gt=0, description="No step within this time: the child is killed.")
    cancel_grace_seconds: float = Field(default=20.0, gt=0)
    max_crashes: int = Field(default=3, ge=1, description="Child crashes in a row without progress.")
    max_expiries: int = Field(default=10, ge=1, description="Lease expiries in a row without progress.")

    retention_days: float = Field(
        default=0.0,
        ge=0,
        le=36_500,
        description="Products of a job are kept so long once it is over; 0 means for ever.",
    )
    log_format: Literal["text", "json"] = Field(
        default="text", description="Lines for people, or one JSON object each."
    )
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    otel_endpoint: str = Field(
        default="", description="http(s) address of an OpenTelemetry collector (OTLP over HTTP); empty: no tracing."
    )

    webhook_allow_http: bool = Field(default=False, description="Let web hooks have http addresses besides https.")
    webhook_ports: str = Field(default="80,443,1024-65535", description="Ports that web hooks are sent to.")
    webhook_allow_networks: str = Field(
        default="", description="Networks that web hooks may reach though they are not public, e.g. `10.1.2.0/24`."
    )
    webhook_ca_file: Path | None = Field(
        default=None, description="PEM file of certificate authorities that receivers may have besides public ones."
    )
    webhook_tries: int = Field(default=12, ge=1, description="Tries of a delivery before it is given up.")
    webhook_first_pause_seconds: float = Field(
        default=5.0, gt=0, description="Pause after a delivery's first try; each is three times the one before."
    )
    webhook_longest_pause_seconds: float = Field(default=21_600.0, gt=0)
    webhook_give_up_after: int = Field(
        default=5, ge=1, description="Deliveries given up in a row that switch a web hook off."
    )
    webhook_timeout_seconds: float = Field(default=15.0, gt=0, description="One try, from look-up to answer.")
    webhook_poll_seconds: float = Field(default=1.0, gt=0, description="How often the API looks for deliveries.")
    webhook_keep_days: float = Field(default=30.0, gt=0, description="How long deliveries that are over are listed.")

    max_upload_bytes: int = Field(default=8 * 2**30, gt=0)
    import_prefix: str = Field(
        default="imports/", description="Below it, in a folder named after them, users may lay objects to import."
    )
    upload_part_bytes: int = Field(
        default=64 * 2**20, ge=5 * 2**20, description="A larger file of an upload file by file comes in parts of this."
    )
    upload_open_seconds: float = Field(
        default=86_400.0, gt=0, description="How long an upload file by file may take; then it is removed."
    )
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
        return self

    @model_validator(mode="after")
    def _cluster_is_complete(self) -> Self:
        """A cluster names all its servers, and none of its secrets is one that everybody knows."""
        if self.mode == "cluster":
            needed = ("database_url", "broker_url", "s3_endpoint", "s3_access_key", "s3_secret_key")
            if missing := [f"CFFA_{name.upper()}" for name in needed if not _plain(getattr(self, name))]:
                raise ValueError(f"cluster mode needs {', '.join(missing)}")
            for name in ("database", "broker"):
                url, password = getattr(self, f"{name}_url"), getattr(self, f"{name}_password")
                if {_plain(password).lower(), unquote(urlsplit(url).password or "").lower()} & _KNOWN_SECRETS:
                    raise ValueError(f"the password of CFFA_{name.upper()}_URL is one that everybody knows")
        elif not self.require_keys:
            return self
        shortest_of = {"s3_secret_key": SHORTEST_SECRET, "bootstrap_key": SHORTEST_KEY, "key_secret": SHORTEST_KEY}
        for name, shortest in shortest_of.items():
            secret = _plain(getattr(self, name))
            if secret and (len(secret) < shortest or secret.lower() in _KNOWN_SECRETS):
                raise ValueError(f"CFFA_{name.upper()} is a default or shorter than {shortest} characters")
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Arguments, then the environment, then the files of ``CFFA_SECRETS_DIR``."""
        folder = os.environ.get("CFFA_SECRETS_DIR")
        files = (SecretsSettingsSource(settings_cls, secrets_dir=folder),) if folder else ()
        return (init_settings, env_settings, *files)

    @cached_property
    def record_url(self) -> str:
        """SQLAlchemy URL of the record (job table), with its password."""
        if not self.database_url:
            return f"sqlite:///{(self.home / 'record.sqlite').resolve()}"
        return _with_password(self.database_url, self.database_password)

    @cached_property
    def queue_url(self) -> str:
        """URL of the broker, with its password; empty where none delivers (embedded mode)."""
        return _with_password(self.broker_url, self.broker_password) if self.mode == "cluster" else ""

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


def read_settings() -> Settings:
    """This process's settings; raises :class:`InvalidSettings` that names every bad variable and repeats no value."""
    try:
        return Settings()
    except ValidationError as error:
        problems = tuple(
            Problem(
                "_".join(("CFFA", *map(str, item["loc"] or ("*",)))).upper(),
                str(item["type"]),
                str(item["msg"]).removeprefix("Value error, "),
            )
            for item in error.errors(include_input=False, include_context=False)
        )
        raise InvalidSettings("the CFFA_* environment variables are not valid", problems=problems) from error


def _plain(value: Any) -> str:
    return value.get_secret_value() if isinstance(value, SecretStr) else str(value)


def _with_password(url: str, password: SecretStr) -> str:
    """``url`` with the password put in, unless it is empty or the URL carries one already."""
    parts = urlsplit(url)
    if not password.get_secret_value() or parts.password is not None:
        return url
    user, _, host = parts.netloc.rpartition("@")
    return urlunsplit(parts._replace(netloc=f"{user}:{quote(password.get_secret_value(), safe='')}@{host}"))
