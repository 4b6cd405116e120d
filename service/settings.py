"""The settings of a service. Each is an environment variable `WIKICLIP_*` and a flag of `wikiclip serve`."""

import os
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from core.errors import UserError
from core.files import is_uri
from core.runtime import usable_cores, usable_memory
from service.auth import digest_of
from service.image_fetcher import host_pattern
from service.limits import Rate

ENV_PREFIX = "WIKICLIP_"
MILVUS = "milvus:"
_MAX_BATCH, _MAX_BATCH_PER_THREAD = 32, 8  # the second applies on a CPU
_MAX_REGIONS = 16  # encoded for one image

_URL_PREFIXES = {
    "index": (MILVUS,),
    "otlp_endpoint": ("http://", "https://"),
    "redis_url": ("redis://", "rediss://", "unix://"),
}

Device = Literal["auto", "cpu", "cuda"]


def _split_commas(value: Any) -> Any:
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value


_SPLIT_COMMAS = BeforeValidator(_split_commas)


_Key = Annotated[str, AfterValidator(digest_of)]
_Host = Annotated[str, AfterValidator(host_pattern)]
_Rate = Annotated[Rate, BeforeValidator(lambda value: Rate.parse(value) if isinstance(value, str) else value)]
_Bundle = Annotated[Path | str, AfterValidator(lambda value: value if is_uri(value) else Path(value))]


class Settings(BaseSettings):
    """All settings. Precedence: argument (from a flag), then environment, then default."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, frozen=True, extra="forbid", env_ignore_empty=True, hide_input_in_errors=True
    )

    bundle: _Bundle | None = Field(
        default=None,
        description="Bundle to serve: a folder, or a URI such as s3://bucket/prefix, which is downloaded first.",
    )
    bundle_cache: Path | None = Field(default=None, description="Folder for downloaded bundles.")
    index: str | None = Field(
        default=None,
        repr=False,
        description="Search in Milvus instead of the bundle's own index: milvus:http://[USER:PASSWORD@]HOST:PORT.",
    )
    live_dir: Path | None = Field(
        default=None, description="Folder for live changes: entities added, replaced or deleted while serving."
    )
    feedback_file: Path | None = Field(
        default=None,
        description="File that embeddings with the right entities from POST /feedback are appended to; none: off.",
    )
    host: str = Field(default="127.0.0.1", description="Address to listen on; 0.0.0.0 is all interfaces.")
    port: int = Field(default=8000, ge=0, le=65535, description="TCP port to listen on; 0 picks a free one.")
    device: Device = Field(default="auto", description="Where the image encoder runs; auto uses CUDA if it works.")
    precision: Literal["auto", "float"] = Field(
        default="auto",
        description="Precision of the image encoder; auto uses int8 on a CPU and float16 on a GPU if available.",
    )
    search_device: Literal["same", "auto", "cpu", "cuda", "graph"] = Field(
        default="same",
        description="Where the search runs; same is the image encoder's device, graph runs a GPU's search on the CPU.",
    )
    threads: int = Field(
        default=0, ge=0, le=1024, description="Threads for the encoder and the search; 0 is one per core."
    )
    decode_threads: int = Field(default=0, ge=0, le=1024, description="Threads that decode images; 0 is two per core.")
    decode_budget_bytes: int = Field(
        default=0,
        ge=0,
        description="Bytes that images may take while they are decoded, together; 0 is 40 % of the memory that the "
        "process may use.",
    )
    decode_timeout_ms: int = Field(
        default=4000,
        ge=1,
        description="Milliseconds after which decoding an image of MAX_PIXELS is stopped, a small one after a quarter "
        "of them; at most half of the deadline.",
    )
    cache: Literal["on", "off"] = Field(default="on", description="Cache embeddings and answers by image.")
    cache_max_bytes: int = Field(default=64 * 1024**2, ge=1, description="Bytes of the in-process cache.")
    redis_url: str | None = Field(
        default=None,
        repr=False,
        description="Redis that processes share for the cache and rate limits: redis://host:port/db.",
    )
    redis_timeout_ms: int = Field(
        default=100, ge=1, description="Milliseconds to wait for Redis before a request continues without it."
    )
    max_batch: int = Field(
        default=0, ge=0, le=1024,
        description="Maximum images encoded together; 0 is 32 on a GPU and 8 per thread, up to 32, on a CPU.",
    )  # fmt: skip
    max_batch_images: int = Field(default=32, ge=1, le=1024, description="Maximum images in one POST /recognize/batch.")
    max_views: int = Field(
        default=8, ge=1, le=1024, description="Maximum photographs of one thing in one POST /recognize; more get 413."
    )
    queue_limit: int = Field(
        default=256,
        ge=1,
        description="Maximum images accepted and not yet answered; more get 429, as do requests that would miss the "
        "deadline at the current speed.",
    )
    deadline_ms: int = Field(
        default=10_000, ge=1, description="Milliseconds an accepted request may take before it gets 504."
    )
    stuck_ms: int = Field(
        default=20_000,
        ge=1,
        description="Milliseconds without progress after which engine or decoders are unready; must exceed the longest "
        "batch.",
    )
    receive_timeout_ms: int = Field(
        default=30_000, ge=1, description="Milliseconds for a request's head to arrive, and again for its body."
    )
    max_body_bytes: int = Field(default=20 * 1024**2, ge=1, description="Maximum bytes of a request body.")
    body_budget_bytes: int = Field(
        default=0,
        ge=0,
        description="Bytes that request bodies may take together; more get 429. 0 is 10 % of the memory that the "
        "process may use, and at least four bodies of MAX_BODY_BYTES.",
    )
    max_pixels: int = Field(default=64_000_000, ge=1, description="Maximum pixels of an image, width times height.")
    api_keys: Annotated[tuple[_Key, ...], NoDecode, _SPLIT_COMMAS] = Field(
        default=(),
        repr=False,
        description="API keys, comma-separated, plain or as sha256:HEX; requests then need one of them.",
    )
    admin_token: _Key | None = Field(
        default=None,
        repr=False,
        description="Token that permits changes to what is served, plain or as sha256:HEX.",
    )
    rate_limit: _Rate | None = Field(
        default=None,
        description="Maximum images per API key, or per address without keys: N/second, N/minute or N/hour.",
    )
    url_allowlist: Annotated[tuple[_Host, ...], NoDecode, _SPLIT_COMMAS] = Field(
        default=(), description="Hosts that images may be fetched from, comma-separated, such as a.org or *.a.org."
    )
    url_timeout_ms: int = Field(
        default=5000, ge=1, description="Milliseconds to fetch an image by URL, redirects included."
    )
    cors_origins: Annotated[tuple[str, ...], NoDecode, _SPLIT_COMMAS] = Field(
        default=(), description="Origins whose pages may call the service, comma-separated; * is any."
    )
    otlp_endpoint: str | None = Field(
        default=None, description="OpenTelemetry collector that receives traces, such as http://127.0.0.1:4318."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="Lowest level that is logged to stderr."
    )

    @field_validator("admin_token", "rate_limit", *_URL_PREFIXES, mode="before")
    @classmethod
    def _empty_is_none(cls, value: Any) -> Any:
        return None if value == "" else value

    @field_validator(*_URL_PREFIXES)
    @classmethod
    def _check_prefix(cls, value: str | None, info: ValidationInfo) -> str | None:
        prefixes = _URL_PREFIXES[info.field_name or ""]
        if value is not None and not value.startswith(prefixes):
            raise ValueError(f"must begin with {' or '.join(prefixes)}")
        return value

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.index is not None and self.live_dir is not None:
            raise ValueError("with index milvus:..., live changes are stored in Milvus; remove live_dir")
        if self.queue_limit < self.max_batch_images:
            raise ValueError(
                f"queue_limit {self.queue_limit} is below max_batch_images {self.max_batch_images}: "
                "a full batch would never be accepted; raise queue_limit or lower max_batch_images"
            )
        return self

    @property
    def thread_count(self) -> int:
        return self.threads or usable_cores()

    @property
    def view_limit(self) -> int:
        """Return how many images of one thing a request may have. More than the queue takes would never be accepted."""
        return min(self.max_views, self.queue_limit)

    @property
    def region_limit(self) -> int:
        """Return how many regions of an image are encoded. They and the image itself must fit into the queue."""
        return min(_MAX_REGIONS, self.queue_limit - 1)

    def batch_limit(self, device: str) -> int:
        """Return the maximum images encoded together on `cuda` or `cpu`.

        On a CPU, larger batches are not faster, because activations no longer fit into the CPU's cache.
        """
        if self.max_batch:
            return self.max_batch
        return _MAX_BATCH if device == "cuda" else min(_MAX_BATCH, _MAX_BATCH_PER_THREAD * self.thread_count)

    @property
    def decode_thread_count(self) -> int:
        # With one per core, batches reach the engine unevenly and the slowest requests wait for two of them.
        return self.decode_threads or 2 * usable_cores()

    @property
    def body_limit_bytes(self) -> int:
        """Return how many bytes all request bodies may take together."""
        return self.body_budget_bytes or max(usable_memory() // 10, 4 * self.max_body_bytes)

    @property
    def decode_timeout_s(self) -> float:
        return min(self.decode_timeout_ms, self.deadline_ms / 2) / 1000


def load_settings(**arguments: Any) -> Settings:
    """Load settings from arguments, environment and defaults. Empty variables count as unset.

    Raises `UserError` for an invalid value and for an unknown `WIKICLIP_*` variable: a misspelled protection must not
    be ignored silently.
    """
    known = {ENV_PREFIX + name.upper() for name in Settings.model_fields}
    given = (name for name, value in os.environ.items() if value and name.startswith(ENV_PREFIX))
    unknown = sorted(name for name in given if name.upper() not in known)
    if unknown:
        raise UserError(f"{', '.join(unknown)}: unknown setting; unset it (see `wikiclip serve --help`)")
    try:
        return Settings(**arguments)
    except ValidationError as error:
        raise UserError("; ".join(_one_line(problem) for problem in error.errors())) from error


def _one_line(problem: Any) -> str:
    name = str(problem["loc"][0]) if problem["loc"] else ""
    message = str(problem["msg"]).removeprefix("Value error, ")
    if not name:
        return message
    field = Settings.model_fields.get(name)
    secret = field is not None and not field.repr
    value = "" if secret else f" is {problem['input']!r}"
    return f"setting {name} (WIKICLIP_{name.upper()}){value}: {message}"
