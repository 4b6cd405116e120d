"""Request bodies, and how `/openapi.json` describes bodies and problems."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class BundleRequest(BaseModel):
    path: str = Field(
        min_length=1,
        max_length=4096,
        description="Folder of the bundle, on the service's machine, or a URI as s3://bucket/prefix.",
    )


class EntityRequest(BaseModel):
    """An entity to put, without its image, which comes as bytes."""

    model_config = ConfigDict(extra="forbid")

    title: str = Field(min_length=1, max_length=2000, pattern=r"\S")
    text: str = Field(default="", description="What is said about the entity; it goes into the embedding.")
    types: list[str] = []
    url: str | None = None
    titles: dict[str, str] = Field(default={}, description="By language.")
    description: str | None = Field(default=None, description="One line to show; else the first sentence of the text.")
    symbol: str | None = Field(default=None, description="A character that shows the entity.")
    embedding: list[float] | None = Field(default=None, description="Instead of image and text to embed; any length.")


SECURITY_SCHEMES: dict[str, Any] = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
    "admin": {"type": "http", "scheme": "bearer", "description": "The admin token."},
}
ADMIN_ONLY: dict[str, Any] = {"security": [{"admin": []}]}

PROBLEM_CONTENT: dict[str, Any] = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route: what may go wrong on it."""
    means = {
        400: "Empty or malformed request",
        401: "No key or token, or one that is not known",
        403: "Not allowed here: a URL that may not be fetched, or a change where there is no admin token",
        404: "Not found",
        408: "The request did not arrive in time",
        409: "Another change is under way",
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


_IMAGE_IN_JSON: dict[str, Any] = {
    "oneOf": [
        {"type": "object", "required": [kind], "properties": {kind: {"type": "string"}}} for kind in ("base64", "url")
    ]
}


def recognize_body(image_types: list[str]) -> dict[str, Any]:
    """OpenAPI of the three forms in which `POST /recognize` takes an image."""
    in_json = {
        "type": "object",
        "required": ["image"],
        "properties": {
            "image": _IMAGE_IN_JSON,
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


def json_body(model: type[BaseModel]) -> dict[str, Any]:
    """OpenAPI of a JSON body that a route reads by itself."""
    schema = {"schema": model.model_json_schema()}
    return {"requestBody": {"required": True, "content": {"application/json": schema}}}


def entity_body() -> dict[str, Any]:
    """OpenAPI of the two forms in which `PUT /entities/{entity_id}` takes an entity."""
    record = EntityRequest.model_json_schema()
    in_json = {**record, "properties": {**record["properties"], "image": _IMAGE_IN_JSON}}
    form = {
        "type": "object",
        "required": ["record"],
        "properties": {"record": record, "image": {"type": "string", "format": "binary"}},
    }
    content = {"application/json": {"schema": in_json}, "multipart/form-data": {"schema": form}}
    return {"requestBody": {"required": True, "content": content}}
