"""The shapes of answers as `/openapi.json` tells them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field


class PredictionSchema(BaseModel):
    rank: int = Field(description="From 1.")
    entity_id: str
    title: str
    score: float = Field(description="Cosine between the query image and the entity; never rises with rank.")
    confidence: float | None = Field(description="Probability of being right; null without calibration.")
    description: str | None
    url: str | None
    symbol: str | None = Field(description="A character that shows the entity.")
    types: list[str]
    has_thumbnail: bool = Field(description="Whether GET /entities/{entity_id}/thumbnail has one.")


class RecognizeResponse(BaseModel):
    request_id: str
    model: str
    bundle: str = Field(description="name@fingerprint of the bundle that answered.")
    cached: bool = Field(description="The image was not encoded for this answer.")
    abstained: bool | None = Field(description="The best prediction is probably wrong; null without calibration.")
    predictions: list[PredictionSchema]
    timings_ms: dict[str, float] = Field(
        description="Milliseconds in decode, queue, encode, search, as far as they took place, and in total."
    )


class Problem(BaseModel):
    """RFC 9457."""

    type: str
    title: str
    status: int
    detail: str
    request_id: str


class BatchResponse(BaseModel):
    request_id: str
    model: str
    bundle: str
    results: list[RecognizeResponse | Problem] = Field(description="In the order of the parts.")


class EntitySchema(BaseModel):
    entity_id: str
    title: str
    titles: dict[str, str] = Field(description="By language.")
    description: str | None
    url: str | None
    symbol: str | None
    types: list[str]
    image_count: int
    has_text: bool
    has_thumbnail: bool
    text: str | None = Field(description="Only where the bundle was exported with it.")


class EntitiesResponse(BaseModel):
    entities: list[EntitySchema]


class Liveness(BaseModel):
    status: Literal["alive"]


class Readiness(BaseModel):
    status: Literal["ready"]


class Info(BaseModel):
    version: str
    model: str
    bundle: str
    entities: int
    embeddings: int
    embedding_dim: int
    device: str
    index: str = Field(description="faiss's factory string.")
    calibrated: bool
    image_types: list[str]
    limits: dict[str, int]


SECURITY_SCHEMES: dict[str, Any] = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
}

PROBLEM_CONTENT: dict[str, Any] = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route: what may go wrong on it."""
    means = {
        400: "Empty or malformed request",
        401: "No API key, or one that is not known",
        403: "The image is given by a URL that may not be fetched",
        404: "Not found",
        413: "Too many bytes or pixels",
        415: "The declared type is no image type that is read",
        422: "Bytes that do not decode, or a bad parameter",
        429: "Too many images at a time; see Retry-After",
        503: "Not ready, or stopping",
        504: "Past the deadline",
    }
    return {status: {"description": means[status], "content": PROBLEM_CONTENT} for status in statuses}


def _image_form(*, many: bool) -> dict[str, Any]:
    file = {"type": "string", "format": "binary"}
    return {
        "type": "object",
        "required": ["image"],
        "properties": {"image": {"type": "array", "items": file} if many else file},
    }


def recognize_body(image_types: list[str]) -> dict[str, Any]:
    """OpenAPI of the three forms in which `POST /recognize` takes an image."""
    in_json = {
        "type": "object",
        "required": ["image"],
        "properties": {
            "image": {
                "oneOf": [
                    {"type": "object", "required": [kind], "properties": {kind: {"type": "string"}}}
                    for kind in ("base64", "url")
                ]
            }
        },
    }
    content: dict[str, Any] = {
        "multipart/form-data": {"schema": _image_form(many=False)},
        "application/json": {"schema": in_json},
    }
    content |= {kind: {"schema": {"type": "string", "format": "binary"}} for kind in image_types}
    return {"requestBody": {"required": True, "content": content}}


def batch_body() -> dict[str, Any]:
    """OpenAPI of the body of `POST /recognize/batch`."""
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": _image_form(many=True)}}}}
