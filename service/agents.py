"""What `wikiclip mcp` serves: tools for agents (Model Context Protocol), over stdio or HTTP."""

import asyncio
import logging
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import uvicorn
from mcp.server.mcpserver import MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp_types import ToolAnnotations
from pydantic import BaseModel, ConfigDict, Field

from core.errors import BadRequest, TooLarge, UndecodableImage, UserError, WikiclipError
from imaging import sniff
from service import routes, uploads
from service.image_fetcher import ImageFetcher
from service.recognizer import Recognizer
from service.server import bind, server_config, url_of
from service.settings import Settings, load_settings
from service.telemetry import configure_logging
from wikiclip.answers import MAX_TOP_K, Entities, Entity, Recognition, RecognizeOptions
from wikiclip.client import AsyncClient

_MAX_TEXT_CHARACTERS = 10_000  # of an entity; more would fill the context of a language model

_EntityId = Annotated[str, Field(description="An entity_id of another tool's answer, such as Q15083.", min_length=1)]
_Path = Annotated[str, Field(description="Path of an image file on this server's machine.")]
_Base64 = Annotated[str, Field(description="The image file's bytes in base64, or a data: URL.")]
_Url = Annotated[str, Field(description="http(s) URL of the image. Refused unless the operator allows its host.")]
_TopK = Annotated[int, Field(description="Maximum number of predictions.", ge=1, le=MAX_TOP_K)]
_Types = Annotated[tuple[str, ...], Field(description="Only entities with any of these types, as in search_titles.")]
_Lang = Annotated[str | None, Field(description="Language of the titles, a code such as fr.", max_length=35)]

_RECOGNISE = (
    "Name the Wikipedia entity that an image shows, such as an animal, a landmark or a flag. Give the image in exactly "
    "one way. Predictions are ordered, best first. If `abstained` is true, the entity is probably not in the catalog: "
    "do not present the first prediction as the answer."
)
_READS_ONLY = ToolAnnotations(read_only_hint=True)

log = logging.getLogger("wikiclip.agents")


class BundleAnswers:
    """The methods of `AsyncClient` that the tools call, for a bundle. The settings say which URLs it fetches."""

    def __init__(self, bundle: str, settings: Settings) -> None:
        timeout_s = settings.url_timeout_ms / 1000
        self._recognizer = Recognizer.open(bundle, settings)
        self._fetcher = ImageFetcher(settings.url_allowlist, max_bytes=settings.max_body_bytes, timeout_s=timeout_s)

    async def recognize(self, image: bytes | str, options: RecognizeOptions) -> Recognition:
        with self._recognizer.admission.admit(1):
            content = image if isinstance(image, bytes) else await self._fetcher.fetch(image)
            return await self._recognizer.recognize(content, options)

    async def get_entity(self, entity_id: str) -> Entity:
        return await asyncio.to_thread(routes.get_entity, entity_id, self._recognizer)

    async def search_entities(self, query: str, *, limit: int) -> Entities:
        return await asyncio.to_thread(routes.search_entities, self._recognizer, query, limit)

    async def close(self) -> None:
        await self._recognizer.aclose()


class Named(BaseModel):
    model_config = ConfigDict(from_attributes=True)

    entity_id: str
    title: str
    description: str | None
    url: str | None


class Predicted(Named):
    score: float = Field(description="Cosine between the image and the entity.")
    confidence: float | None = Field(description="Probability of being right; null without calibration.")


class Recognised(BaseModel):
    predictions: list[Predicted]
    known: float | None = Field(description="Probability that the entity is in the catalog; null without calibration.")
    abstained: bool | None = Field(description="True when the entity is probably not in the catalog.")


class Found(Named):
    types: tuple[str, ...]
    matched_language: str | None = Field(description="Language of the title that matched, if not the default one.")


class FoundEntities(BaseModel):
    entities: list[Found]


def create_server(answers: BundleAnswers | AsyncClient, max_bytes: int, *, local_files: bool) -> MCPServer[None]:
    """Return a server with the tools. `max_bytes` limits an image; only with `local_files` are paths read."""
    server = MCPServer[None]("wikiclip", version=version("wikiclip-serve"))

    async def recognise(
        base64: _Base64 = "", url: _Url = "", top_k: _TopK = 5, types: _Types = (), lang: _Lang = None
    ) -> Recognised:
        return await recognise_file("", base64, url, top_k, types, lang)

    async def recognise_file(
        path: _Path = "", base64: _Base64 = "", url: _Url = "", top_k: _TopK = 5, types: _Types = (), lang: _Lang = None
    ) -> Recognised:
        with _tool_errors():
            image = await asyncio.to_thread(_image, path, base64, url, max_bytes)
            answer = await answers.recognize(image, RecognizeOptions(top_k=top_k, types=types, lang=lang))
        predictions = [Predicted.model_validate(each) for each in answer.predictions]
        return Recognised(predictions=predictions, known=answer.in_catalog_probability, abstained=answer.abstained)

    async def describe_entity(entity_id: _EntityId) -> Entity:
        """Get the record of an entity: its titles in all languages, description, URL, types, image credits and text."""
        with _tool_errors():
            entity = await answers.get_entity(entity_id)
        return entity.model_copy(update={"text": entity.text and entity.text[:_MAX_TEXT_CHARACTERS]})

    async def search_titles(
        query: Annotated[str, Field(min_length=1, max_length=200)],
        limit: Annotated[int, Field(description="Maximum number of entities.", ge=1, le=100)] = 20,
    ) -> FoundEntities:
        """Find entities by words of their titles, in any language. The last word may be incomplete."""
        with _tool_errors():
            found = await answers.search_entities(query, limit=limit)
        return FoundEntities(entities=[Found.model_validate(each) for each in found.entities])

    tool = recognise_file if local_files else recognise
    server.add_tool(tool, "recognise", description=_RECOGNISE, annotations=_READS_ONLY)
    server.add_tool(describe_entity, annotations=_READS_ONLY)
    server.add_tool(search_titles, annotations=_READS_ONLY)
    return server


@contextmanager
def _tool_errors() -> Iterator[None]:
    try:
        yield
    except WikiclipError as error:
        raise ToolError(error.detail) from error


def _image(path: str, base64: str, url: str, max_bytes: int) -> bytes | str:
    """Return the bytes of an image, or its URL. Raises `UserError` unless there is one, of at most `max_bytes`."""
    if bool(path) + bool(base64) + bool(url) != 1:
        raise BadRequest("give exactly one image: a path (over stdio only), base64 or url")
    if url:
        if not url.startswith(("http://", "https://")):  # the client would read any other string as a path
            raise BadRequest("the URL must begin with http:// or https://")
        return url
    data = _read(Path(os.path.expanduser(path)), max_bytes) if path else uploads.image_in_json({"base64": base64})
    if len(data) > max_bytes:
        raise TooLarge(f"the image has over {max_bytes} bytes; give a smaller one")
    return data


def _read(path: Path, max_bytes: int) -> bytes:
    """Return the bytes of an image file, up to one more than `max_bytes`."""
    try:
        if not path.is_file():
            raise BadRequest(f"{path} is not a file; check the path")
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); check the path and its permissions") from error
    if sniff(data) is None:  # no other file may reach a service on another machine
        raise UndecodableImage(f"{path} is not an image; give another file")
    return data


def serve_agents(*, bundle: str | None, url: str | None, api_key: str | None, http_port: int | None) -> None:
    """Serve agents over stdio, or on a port of this machine, until they close stdin or a signal stops the process.

    Raises `UserError` for a bad bundle, URL, setting or port.
    """
    settings = load_settings(redis_url=None)
    configure_logging(settings.log_level)
    answers = BundleAnswers(bundle, settings) if bundle is not None else AsyncClient(url or "", api_key=api_key)
    server = create_server(answers, settings.max_body_bytes, local_files=http_port is None)

    async def serve() -> None:
        try:
            if http_port is None:
                # Otherwise Ctrl-C would wait for the thread that reads stdin, until the next line.
                signal.signal(signal.SIGINT, lambda *_: os._exit(130))
                await server.run_stdio_async()
                return
            body_bytes = settings.max_body_bytes * 3 // 2 + 65_536  # an image in base64, and the rest of the JSON
            app = server.streamable_http_app(stateless_http=True, json_response=True, max_request_body_size=body_bytes)
            with bind("127.0.0.1", http_port) as listener:  # there are no keys, so no other machine may reach it
                listener.listen()  # connections wait until the server starts
                log.info("serving agents on %s/mcp", url_of(*listener.getsockname()[:2]))
                await uvicorn.Server(server_config(settings, app)).serve(sockets=[listener])
        finally:
            await answers.close()

    asyncio.run(serve())
