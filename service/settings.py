"""What a service can be told: environment variables `WIKICLIP_*`, each also a flag of `wikiclip serve`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from core.errors import UserError
from core.files import is_uri
from core.runtime import usable_cores
from service.auth import digest_of
from service.image_fetcher import host_pattern
from service.limits import Rate

ENV_PREFIX = "WIKICLIP_"
MILVUS = "milvus:"
_BATCH, _BATCH_A_THREAD = 32, 8  # images encoded at once, at most; the latter on a CPU

_SECRET = frozenset(("admin_token", "api_keys", "index", "redis_url"))  # their values are never told

Device = Literal["auto", "cpu", "cuda"]


class Settings(BaseSettings):
    """The one list of settings. Precedence: argument (a flag), then environment, then default."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, frozen=True, extra="forbid", env_ignore_empty=True, hide_input_in_errors=True
    )

    bundle: Path | str | None = Field(
        default=None, description="The bundle to serve: a folder, or a URI as s3://bucket/prefix, pulled first."
    )
    bundle_cache: Path | None = Field(default=None, description="Folder that keeps bundles which are given by URI.")
    index: str | None = Field(
        default=None,
        repr=False,
        description="Search in Milvus instead of the bundle's own index, milvus:http://[USER:PASSWORD@]HOST:PORT.",
    )
    live_dir: Path | None = Field(
        default=None, description="Folder that keeps entities which are put and deleted while serving."
    )
    host: str = Field(default="127.0.0.1", description="Address to listen on; 0.0.0.0 for all.")
    port: int = Field(default=8000, ge=0, le=65535, description="TCP port to listen on; 0 takes a free one.")
    device: Device = Field(default="auto", description="Where the image encoder runs; auto takes CUDA where it works.")
    precision: Literal["auto", "float"] = Field(
        default="auto",
        description="Which encoder of the bundle runs; auto takes int8 on a CPU, float16 on a GPU where there is one.",
    )
    search_device: Literal["same", "auto", "cpu", "cuda"] = Field(
        default="same", description="Where the search runs: same is where the image encoder is to run."
    )
    threads: int = Field(
        default=0, ge=0, le=1024, description="Threads of the encoder and of the search; 0 is one a core."
    )
    decode_threads: int = Field(default=0, ge=0, le=1024, description="Threads that decode images; 0 is two a core.")
    cache: Literal["on", "off"] = Field(default="on", description="Keep embeddings and answers of images seen before.")
    cache_max_bytes: int = Field(default=64 * 1024**2, ge=1, description="Size in bytes of the cache in the process.")
    redis_url: str | None = Field(
        default=None, description="Redis that several processes share as cache, redis://host:port/db."
    )
    redis_timeout_ms: int = Field(
        default=100, ge=1, description="Milliseconds that Redis may take; then a request goes on without it."
    )
    max_batch: int = Field(
        default=0, ge=0, le=1024,
        description="Images encoded at once, at most; 0 is 32 on a GPU, and 8 a thread up to 32 on a CPU.",
    )  # fmt: skip
    max_batch_images: int = Field(
        default=32, ge=1, le=1024, description="Images in one POST /recognize/batch, at most."
    )
    queue_limit: int = Field(default=256, ge=1, description="Images accepted and not yet answered; more get a 429.")
    deadline_ms: int = Field(
        default=10_000, ge=1, description="Milliseconds an accepted request may take; then it gets a 504."
    )
    stuck_ms: int = Field(
        default=20_000,
        ge=1,
        description="Milliseconds without a sign of life after which the engine is not ready; above its longest batch.",
    )
    receive_timeout_ms: int = Field(
        default=30_000, ge=1, description="Milliseconds for a request's head to arrive, and as many for its body."
    )
    max_body_bytes: int = Field(default=20 * 1024**2, ge=1, description="Bytes of a request body, at most.")
    max_pixels: int = Field(default=64_000_000, ge=1, description="Pixels of an image, width times height, at most.")
    api_keys: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(),
        repr=False,
        description="Keys of which one is needed to ask, separated by commas, plain or as sha256:HEX of the key.",
    )
    admin_token: str | None = Field(
        default=None,
        repr=False,
        description="Token that lets its holder change what is served, plain or as sha256:HEX of the token.",
    )
    rate_limit: str | None = Field(
        default=None,
        description="Images that one key, or without keys one address, may send: N/second, N/minute or N/hour.",
    )
    url_allowlist: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(), description="Hosts whose images may be given by URL, separated by commas, as a.org or *.a.org."
    )
    url_timeout_ms: int = Field(
        default=5000, ge=1, description="Milliseconds that fetching an image by URL may take, in all."
    )
    cors_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(), description="Origins whose pages may call the service, separated by commas; * for any."
    )
    otlp_endpoint: str | None = Field(
        default=None, description="OpenTelemetry collector that is sent traces, as http://127.0.0.1:4318."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="What is logged on stderr."
    )

    @field_validator("bundle")
    @classmethod
    def _a_folder_unless_a_uri(cls, value: Path | str | None) -> Path | str | None:
        return value if value is None or is_uri(value) else Path(value)

    @field_validator("api_keys", "url_allowlist", "cors_origins", mode="before")
    @classmethod
    def _split_commas(cls, value: Any) -> Any:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value

    @field_validator("api_keys")
    @classmethod
    def _only_digests(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(digest_of(key) for key in value)

    @field_validator("admin_token")
    @classmethod
    def _only_a_digest(cls, value: str | None) -> str | None:
        return digest_of(value) if value else None

    @field_validator("url_allowlist")
    @classmethod
    def _only_hosts(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(host_pattern(host) for host in value)

    @field_validator("rate_limit")
    @classmethod
    def _a_rate(cls, value: str | None) -> str | None:
        if value:
            Rate.parse(value)
        return value or None

    @field_validator("redis_url")
    @classmethod
    def _known_scheme(cls, value: str | None) -> str | None:
        if value and not value.startswith(("redis://", "rediss://", "unix://")):
            raise ValueError("start it with redis://, rediss:// or unix://")
        return value or None

    @field_validator("otlp_endpoint")
    @classmethod
    def _over_http(cls, value: str | None) -> str | None:
        if value and not value.startswith(("http://", "https://")):
            raise ValueError("start it with http:// or https://")
        return value or None

    @field_validator("index")
    @classmethod
    def _a_milvus(cls, value: str | None) -> str | None:
        if value and not value.startswith(MILVUS):
            raise ValueError("start it with milvus: and the URI, as milvus:http://127.0.0.1:19530")
        return value or None

    @model_validator(mode="after")
    def _one_place_for_changes(self) -> Self:
        if self.index is not None and self.live_dir is not None:
            raise ValueError("with index milvus: changes are kept in Milvus; leave out live_dir")
        return self

    @model_validator(mode="after")
    def _a_full_batch_fits(self) -> Self:
        if self.queue_limit < self.max_batch_images:
            raise ValueError(
                f"queue_limit {self.queue_limit} is below max_batch_images {self.max_batch_images}: "
                "a full batch could never be accepted; raise queue_limit or lower max_batch_images"
            )
        return self

    @property
    def index_device(self) -> str:
        return self.device if self.search_device == "same" else self.search_device

    @property
    def receive_timeout_s(self) -> float:
        return self.receive_timeout_ms / 1000

    @property
    def thread_count(self) -> int:
        return self.threads or usable_cores()

    def batch_limit(self, device: str) -> int:
        """Images encoded at once on `cuda` or `cpu`, at most. On a CPU more than a few a thread gain nothing: what the
        network computes on the way then falls out of the cache."""
        return self.max_batch or (_BATCH if device == "cuda" else min(_BATCH, _BATCH_A_THREAD * self.thread_count))

    @property
    def decode_thread_count(self) -> int:
        # With one a core, what is decoded comes to the engine in uneven batches, and the slowest answers wait for two.
        return self.decode_threads or 2 * usable_cores()


def load_settings(**given: Any) -> Settings:
    """Settings from what was given, then the environment, then the defaults; an empty variable counts as unset.

    Raises `UserError`, one line, for a value that does not fit and for a `WIKICLIP_*` variable that is no setting: a
    protection that someone believes to have switched on must not be ignored in silence.
    """
    known = {ENV_PREFIX + name.upper() for name in Settings.model_fields}
    unknown = sorted(
        name
        for name, value in os.environ.items()
        if value and name.startswith(ENV_PREFIX) and name.upper() not in known
    )
    if unknown:
        raise UserError(f"{', '.join(unknown)}: no such setting; unset it (`wikiclip serve --help` lists them)")
    try:
        return Settings(**given)
    except ValidationError as error:
        raise UserError("; ".join(_one_line(problem) for problem in error.errors())) from error


def _one_line(problem: Any) -> str:
    name = str(problem["loc"][0]) if problem["loc"] else ""
    message = str(problem["msg"]).removeprefix("Value error, ")
    if not name:
        return message
    if name in _SECRET:
        return f"setting {name} (WIKICLIP_{name.upper()}): {message}"
    return f"setting {name} (WIKICLIP_{name.upper()}) is {problem['input']!r}: {message}"
