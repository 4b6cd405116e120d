"""What a request asks and what the service answers.

The recogniser, the HTTP API with its OpenAPI document, the clients and the cache all use these models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, field_validator

MAX_TOP_K = 100
MAX_WIDTH = 65_536  # of an embedding
_MAX_TITLES = 200_000  # characters of the titles in all languages, which stay in memory

Fraction = Annotated[float, Field(allow_inf_nan=False)]
Box = tuple[Fraction, Fraction, Fraction, Fraction]  # x, y, width, height as fractions of the upright image


def _split_commas(value: Any) -> Any:
    """Return the sorted parts of strings that may each name several things, separated by commas."""
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, Sequence | set) or not all(isinstance(each, str) for each in value):
        return value  # pydantic reports it
    return tuple(sorted({part.strip() for each in value for part in each.split(",") if part.strip()}))


def _split_box(value: Any) -> Any:
    """Accept a box as one string `x,y,w,h`, as a query string has it."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if not isinstance(value, str):
        return value
    parts = value.split(",")
    if value and len(parts) != 4:
        raise ValueError("give four numbers, x,y,w,h, in fractions of the image")
    return parts if value else None


class EmbedOptions(BaseModel):
    """The query parameters of `POST /embed`."""

    model_config = ConfigDict(frozen=True)

    box: Annotated[Box | None, BeforeValidator(_split_box), WithJsonSchema({"type": "string"})] = Field(
        default=None, description="Region of the image: x,y,w,h in fractions of it."
    )


class RecognizeOptions(EmbedOptions):
    """The options of a recognition, which are also the query parameters of `POST /recognize`."""

    top_k: int = Field(default=5, ge=1, le=MAX_TOP_K, description="Maximum number of predictions.")
    min_score: float | None = Field(
        default=None, ge=-1, le=1, allow_inf_nan=False, description="Drop predictions with a lower cosine."
    )
    types: Annotated[tuple[str, ...], BeforeValidator(_split_commas)] = Field(
        default=(), description="Only entities with any of these types or their descendants. Repeat it or use commas."
    )
    lang: str | None = Field(
        default=None, max_length=35, description="Language of the titles, a code such as fr, where the catalog has it."
    )
    regions: Literal["auto"] | None = Field(
        default=None, description="`auto` finds the things in the image, and answers for each of them, too."
    )
    explain: bool = Field(
        default=False, description="Explain each prediction: where in the image it matches, and which words matter."
    )


class FeedbackOptions(EmbedOptions):
    """The query parameters of `POST /feedback`."""

    entity_id: str = Field(min_length=1, max_length=2000, description="The entity that the image shows.")


_Title = Annotated[str, Field(max_length=2000)]
_Type = Annotated[str, Field(max_length=500)]
_Language = Annotated[str, Field(max_length=35)]


class EntityRequest(BaseModel):
    """An entity to add or replace, without its image."""

    model_config = ConfigDict(extra="forbid")

    title: _Title = Field(min_length=1, pattern=r"\S")
    text: str = Field(default="", max_length=1_000_000, description="The entity's text. It goes into the embedding.")
    types: list[_Type] = Field(default=[], max_length=100)
    url: str | None = Field(default=None, max_length=4096)
    titles: dict[_Language, _Title] = Field(default={}, max_length=1000, description="By language.")
    description: str | None = Field(
        default=None, max_length=5000, description="One line to show; default: the text's first sentence."
    )
    symbol: str | None = Field(default=None, max_length=64, description="A character that shows the entity.")
    embedding: list[float] | None = Field(
        default=None, max_length=MAX_WIDTH, description="Instead of image and text. It is normalised."
    )
    encoder: str | None = Field(
        default=None, max_length=64, description="Content hash of the encoder that made `embedding`, to be checked."
    )

    @field_validator("titles")
    @classmethod
    def _check_total(cls, titles: dict[str, str]) -> dict[str, str]:
        total = sum(map(len, titles.values()))
        if total > _MAX_TITLES:
            raise ValueError(f"should have at most {_MAX_TITLES} characters in all, not {total}")
        return titles


class EmbeddingQuery(BaseModel):
    """A query by an embedding instead of an image."""

    model_config = ConfigDict(extra="forbid")

    embedding: list[float] = Field(max_length=MAX_WIDTH, description="As `POST /embed` returns it. It is normalised.")
    encoder: str | None = Field(
        default=None, max_length=64, description="Content hash of the encoder that made it; another one's gets 409."
    )


class TextQuery(BaseModel):
    """A text to embed as an entity's."""

    model_config = ConfigDict(extra="forbid")

    text: str = Field(max_length=1_000_000, pattern=r"\S")


class Answer(BaseModel):
    """Base of what the service answers. A field may have another name in JSON than in Python."""

    model_config = ConfigDict(
        frozen=True,
        allow_inf_nan=False,
        validate_by_name=True,
        validate_by_alias=True,
        serialize_by_alias=True,
        json_schema_serialization_defaults_required=True,
    )


class Reply(Answer):
    """Base of the whole answer to a request. The service sends the id as the header `X-Request-ID`."""

    request_id: str = Field(default="", exclude=True, description="Id of the HTTP request; empty without HTTP.")


class AttendedWord(Answer):
    word: str
    start: int = Field(description="First character of the word in the entity's text.")
    end: int
    weight: float = Field(description="Its share of the adaptor's attention to the text, from 0 to 1.")


class Explanation(Answer):
    """Why an entity was found."""

    heat_map: tuple[tuple[float, ...], ...] | None = Field(
        description="Cosine of each patch of the image with the entity, in rows from the top; null where the encoder's "
        "patches cannot be compared with entities."
    )
    region: Box = Field(description="The part of the upright image that the heat map covers: x, y, width, height.")
    words: tuple[AttendedWord, ...] | None = Field(
        description="The words with the largest weights, largest first; null where the bundle has no texts."
    )


class Prediction(Answer):
    rank: int = Field(description="From 1.")
    entity_id: str
    title: str
    score: float = Field(description="Cosine between the query image and the entity; never rises with rank.")
    confidence: float | None = Field(description="Probability of being right; null without calibration.")
    description: str | None
    url: str | None
    symbol: str | None = Field(description="A character that shows the entity.")
    types: tuple[str, ...]
    has_thumbnail: bool = Field(description="Whether GET /entities/{entity_id}/thumbnail has one.")
    explanation: Explanation | None = Field(default=None, description="Null unless `explain` asks for it.")


class Level(Answer):
    """What is certain about an image: the entity, or only a type of it."""

    id: str = Field(description="The entity's id, or the type's key.")
    title: str
    kind: Literal["entity", "type"]
    confidence: float = Field(description="Probability of being right, at least 0.9.")


class SkippedImage(Answer):
    """One of several images that was not used."""

    index: int = Field(description="Its place in the request, from 0.")
    detail: str = Field(description="Why it does not decode, and what to do.")


class Region(Answer):
    """A thing in the image."""

    box: Box = Field(description="Where it is: x, y, width, height as fractions of the upright image.")
    predictions: tuple[Prediction, ...]
    in_catalog_probability: float | None = Field(
        validation_alias="known",
        serialization_alias="known",
        description="Probability that its entity is in the catalog; null without calibration.",
    )


class Recognition(Reply):
    """Predictions for one image, or for several photographs of one thing, best first."""

    request_id: str = Field(default="", description="Id of the HTTP request; empty without HTTP.")
    model: str
    bundle: str = Field(description="name@fingerprint of the bundle that answered.")
    cached: bool = Field(description="Whether this answer needed no pass of the image encoder.")
    in_catalog_probability: float | None = Field(
        validation_alias="known",
        serialization_alias="known",
        description="Probability that the entity is in the catalog; null without calibration.",
    )
    abstained: bool | None = Field(
        description="True when the entity is probably not in the catalog; null without calibration. "
        "Predictions are returned anyway."
    )
    level: Level | None = Field(
        default=None,
        description="The most specific entity or type with a probability of at least 0.9. Types cover at most a tenth "
        "of the catalog. Null without calibration, or if there is none.",
    )
    predictions: tuple[Prediction, ...]
    skipped: tuple[SkippedImage, ...] | None = Field(
        default=None,
        exclude_if=lambda skipped: skipped is None,
        description="Of several images, those that do not decode; they have no other effect. Left out for one image.",
    )
    regions: tuple[Region, ...] | None = Field(
        default=None,
        exclude_if=lambda regions: regions is None,
        description="The things in the image, the most certain first. Left out unless `regions` asks for it.",
    )
    timings_ms: dict[str, float] = Field(
        default={},
        description="Milliseconds of the stages that took place (decode, queue, encode, search, regions) and in total. "
        "Of several images, those of the one that took longest.",
    )


class Problem(Answer):
    """An error, as RFC 9457 describes it."""

    type: str
    title: str
    status: int
    detail: str
    request_id: str


class BatchRecognition(Reply):
    request_id: str
    model: str
    bundle: str
    results: tuple[Recognition | Problem, ...] = Field(description="In the order of the parts.")


class Embedding(Reply):
    """The query embedding of an image or a text."""

    embedding: tuple[float, ...] = Field(description="L2-normalised.")
    dim: int
    encoder: str = Field(description="Content hash of the image encoder. Embeddings of one encoder can be compared.")
    bundle: str = Field(description="name@fingerprint of the bundle whose encoder this is.")


class Feedback(Reply):
    """A labelled query that was kept: its embedding, not its image."""

    data_id: str = Field(description="Names the query in the file.")
    entity_id: str


class ImageCredit(Answer):
    """Who made an image, and the licence under which it may be shown."""

    author: str | None = None
    licence: str | None = None
    licence_url: str | None = None
    source: str | None = Field(default=None, description="The page that describes the image.")


class Entity(Reply):
    entity_id: str
    title: str
    titles: dict[str, str] = Field(description="By language.")
    description: str | None
    url: str | None
    types: tuple[str, ...]
    symbol: str | None
    image_count: int
    has_text: bool
    text: str | None = Field(description="Null unless the bundle was exported with texts.")
    has_thumbnail: bool
    image_credits: tuple[ImageCredit | None, ...] = Field(
        default=(),
        description="One per image, null if unknown, the thumbnail's first. Empty if none of them is known.",
    )


class EntityDetails(Entity):
    image_ids: tuple[str, ...] = Field(
        default=(), description="Of its images, those of the bundle first. Images added while serving can be removed."
    )


class FoundEntity(Entity):
    matched_language: str | None = Field(
        default=None, description="Language of the title that matched the query; null if the default title did."
    )


class Entities(Reply):
    entities: tuple[FoundEntity, ...]


class Liveness(Reply):
    status: Literal["alive"] = "alive"


class Readiness(Reply):
    status: Literal["ready"] = "ready"


class Info(Reply):
    """What is served, and its limits."""

    version: str
    model: str
    bundle: str
    entities: int
    embeddings: int
    embedding_dim: int
    encoder: str = Field(default="", description="Content hash of the image encoder, as embeddings have it.")
    device: str
    precision: str = Field(description="Which of the bundle's encoders runs: float, int8 or float16.")
    index: str = Field(description="faiss's factory string.")
    search_device: str
    search_device_why: str = Field(description="Why the search runs there.")
    calibrated: bool
    heat_maps: bool = Field(default=False, description="Whether explanations have heat maps.")
    regions: bool = Field(default=False, description="Whether the things in an image can be found.")
    image_types: tuple[str, ...]
    limits: dict[str, int]


class BundleChange(Reply):
    bundle: str = Field(description="name@fingerprint of the bundle that answers from now on.")
    previous: str
    model: str
    entities: int


class EditedEntity(EntityDetails):
    bundle: str = Field(description="name@fingerprint+N: answers with this label include the change.")


class AddedImage(Reply):
    """An image that was added to an entity. It is stored as an embedding."""

    entity_id: str
    image_id: str = Field(description="Names the image to remove it.")
    bundle: str = Field(description="name@fingerprint+N: answers with this label include the change.")
