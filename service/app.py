"""The ASGI application."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from starlette.responses import FileResponse, PlainTextResponse, Response
from starlette.staticfiles import StaticFiles

from core.errors import UserError
from imaging import readable_types
from service import errors, routes
from service.image_fetcher import ImageFetcher
from service.limits import BodyBudget, RateLimiter
from service.middleware import RequestContext
from service.recognizer import Recognizer
from service.settings import Settings
from service.telemetry import Metrics, Tracing, open_tracing
from wikiclip.answers import Info, Liveness, Problem, Readiness

_PAGE = Path(__file__).parent / "page"
_DOCS = Path(__file__).parent / "docs"
_LIMITS = ("max_body_bytes", "max_pixels", "max_batch_images", "max_views", "queue_limit", "deadline_ms")


def create_app(
    settings: Settings,
    recognizer: Recognizer | None = None,
    fetcher: ImageFetcher | None = None,
    tracing: Tracing | None = None,
) -> FastAPI:
    """Return the service. Without a recogniser, it opens the bundle of `settings` at startup.

    `fetcher` and `tracing` replace those that `settings` describe. The app closes the recogniser at shutdown. Raises
    `UserError` if there is neither a recogniser nor a bundle.
    """
    if recognizer is None and settings.bundle is None:
        raise UserError("there is no bundle to serve; name one with --bundle or WIKICLIP_BUNDLE")

    if settings.feedback_file is not None and not settings.feedback_file.parent.is_dir():
        raise UserError(f"the folder of feedback_file {settings.feedback_file} does not exist; create it")

    limiter = None
    if settings.rate_limit is not None:
        redis = None
        if settings.redis_url is not None:
            from service.redis_link import RedisLink

            redis = RedisLink(settings.redis_url, settings.redis_timeout_ms / 1000)
        limiter = RateLimiter(settings.rate_limit, redis)
    tracing = tracing or open_tracing(settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        opened = recognizer
        if opened is None:
            assert settings.bundle is not None
            opened = await asyncio.to_thread(Recognizer.open, settings.bundle, settings)
        app.state.recognizer, app.state.metrics = opened, opened.metrics
        try:
            yield
        finally:
            if limiter is not None:
                await limiter.close()
            await opened.aclose()
            if tracing is not None:
                await asyncio.to_thread(tracing.close)

    app = FastAPI(
        title="WikiCLIP Serve",
        summary="Which entity of Wikipedia is in this picture.",
        description=errors.problem_table(),
        version=version("wikiclip-serve"),
        servers=[{"url": "/", "description": "This service"}],
        responses=errors.problems(500),
        generate_unique_id_function=lambda route: route.name,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        telemetry={"tracing": False, "metrics": False, "logs": False},  # service.telemetry has its own
    )
    # Without a recogniser, these are replaced at startup. A server that skips ASGI's startup gets 503 for every image.
    app.state.recognizer = recognizer
    app.state.metrics = Metrics() if recognizer is None else recognizer.metrics
    app.state.api_keys = settings.api_keys
    app.state.admin_token = settings.admin_token
    app.state.fetcher = fetcher or ImageFetcher(
        settings.url_allowlist, max_bytes=settings.max_body_bytes, timeout_s=settings.url_timeout_ms / 1000
    )
    app.state.rate_limiter = limiter
    app.state.body_budget = BodyBudget(settings.body_limit_bytes)
    errors.install(app)
    app.include_router(routes.recognition_router)
    app.include_router(routes.entity_router)
    app.include_router(routes.admin_router)
    _add_operations(app)
    _add_pages(app)
    # The middleware added last is the outermost. CORS comes last because error responses need its headers as well.
    app.add_middleware(RequestContext, tracing=tracing)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["Content-Type", "X-Request-ID", "Authorization", "X-API-Key"],
            expose_headers=["X-Request-ID", "Server-Timing", "Retry-After"],
        )
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


def _add_operations(app: FastAPI) -> None:
    @app.get("/livez", summary="Check that the process answers", tags=["operations"])
    async def get_liveness() -> Liveness:
        return Liveness()

    @app.get(
        "/readyz",
        summary="Check that images can be recognised now",
        responses=errors.problems(503),
        tags=["operations"],
    )
    async def get_readiness(recognizer: routes.ReadyRecognizer) -> Readiness:
        return Readiness()

    @app.get("/metrics", summary="Metrics for Prometheus", response_class=PlainTextResponse, tags=["operations"])
    async def get_metrics() -> Response:
        recognizer: Recognizer | None = app.state.recognizer
        metrics: Metrics = app.state.metrics
        if recognizer is not None:
            metrics.in_flight_images.set(recognizer.admission.in_flight)
            metrics.queue_images.set(recognizer.queue_depth)
        metrics.ready.set(recognizer is not None and recognizer.unready_reason is None)
        return Response(metrics.exposition(), headers={"Content-Type": metrics.content_type})

    @app.get(
        "/info", summary="Describe what is served, and its limits", responses=errors.problems(503), tags=["operations"]
    )
    async def get_info(recognizer: routes.AnyRecognizer) -> Info:
        with recognizer.acquire() as view:
            loaded = view.loaded
        return Info(
            version=version("wikiclip-serve"),
            model=loaded.model,
            bundle=view.label,
            entities=view.entities.entity_count,
            embeddings=loaded.bundle.manifest.counts.embeddings,
            embedding_dim=loaded.bundle.manifest.embedding_dim,
            encoder=loaded.encoder_hash,
            device=loaded.encoder.device,
            precision=loaded.precision,
            index=loaded.bundle.index_manifest.factory,
            search_device=loaded.search_device[0],
            search_device_why=loaded.search_device[1],
            calibrated=loaded.bundle.calibration is not None,
            heat_maps=loaded.encoder.heat_maps,
            regions=loaded.bundle.manifest.image_encoder.has_patch_tokens,
            image_types=tuple(readable_types()),
            limits={name: getattr(recognizer.settings, name) for name in _LIMITS},
        )


def _add_pages(app: FastAPI) -> None:
    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(_PAGE / "index.html", headers={"Cache-Control": "no-cache"})

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return FileResponse(_DOCS / "docs.html", headers={"Cache-Control": "no-cache"})

    app.mount("/page", StaticFiles(directory=_PAGE))
    app.mount("/docs", StaticFiles(directory=_DOCS, packages=[("fastapi_offline", "static")]))  # Swagger UI's files


def _openapi(app: FastAPI) -> dict[str, Any]:
    if app.openapi_schema is None:
        document = FastAPI.openapi(app)
        components = document["components"]["schemas"]
        components["Problem"] = {**Problem.model_json_schema(), "x-types": errors.problem_types()}
        # FastAPI's own description of invalid parameters. The service answers with a problem instead.
        for unused in ("HTTPValidationError", "ValidationError"):
            components.pop(unused, None)
        for operation in (operation for methods in document["paths"].values() for operation in methods.values()):
            if "application/json" in operation["responses"].get("422", {}).get("content", {}):
                del operation["responses"]["422"]
            if app.state.api_keys and "401" in operation["responses"]:
                operation.setdefault("security", [{name: []} for name in ("bearer", "header")])
        document["components"]["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer"},
            "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
            "admin": {"type": "http", "scheme": "bearer", "description": "The admin token."},
        }
    return FastAPI.openapi(app)
