"""One opened bundle with the encoder, index, store and engine that answer from it."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from core.arrays import Float32Array
from core.errors import BundleAltered, Conflict, NoEntitySide, WikiclipError
from core.runtime import faiss
from imaging import Decoder, Preprocessing
from index.bundle import Bundle
from index.live import LiveSegment
from index.manifest import ENTITY_ENCODER_FOLDER, MANIFEST_FILE
from index.overlay import EntityView, LiveChanges, OverlayView
from service.encoder import open_encoder
from service.engine import Encoder, Engine
from service.ranking import Ranker
from service.settings import MILVUS, Settings
from service.telemetry import Metrics
from service.updates import NO_ENTITY_ENCODER, Editor, EntityEmbedder, ImageEmbedder, open_embedder
from wikiclip.answers import RecognizeOptions

_WATCH_INTERVAL_S = 1.0

log = logging.getLogger("wikiclip.bundle")


@contextmanager
def opening(bundle: Path | str) -> Iterator[None]:
    """Raise `BundleAltered` for whatever the content of a bundle makes its readers raise, except `WikiclipError`."""
    try:
        yield
    except WikiclipError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        raise BundleAltered(f"{bundle} cannot be opened ({type(error).__name__}: {reason}); export it again") from error


def _watch(manifest: Path, closing: threading.Event, gone: threading.Event) -> None:
    """Say whether the manifest is gone, until closing. In a thread, because a network's file system may hang."""
    while not closing.wait(_WATCH_INTERVAL_S):
        if os.path.isfile(manifest):  # false also if the file system fails
            gone.clear()
        else:
            gone.set()


class _Revision(NamedTuple):
    """A `BundleView` without its bundle. The bundle keeps this one: with a view it would be a reference cycle.

    `number` is the `revision` that `entities` had.
    """

    number: int | None
    entities: EntityView
    ranker: Ranker
    label: str


class LoadedBundle:
    """A bundle that is ready to answer. Each has its own engine, so a batch never mixes two bundles.

    Without an `encoder`, it runs the bundle's own. Raises `BundleError`, or `UserError` if the device is not available.
    """

    def __init__(
        self, bundle: Bundle, settings: Settings, metrics: Metrics, decoder: Decoder, encoder: Encoder | None = None
    ) -> None:
        self.bundle = bundle
        model = bundle.manifest.model
        self.model = str(model.get("name") or Path(str(model.get("image_encoder", "unknown"))).name)
        self.preprocessing = Preprocessing.from_dict(bundle.manifest.preprocessing)
        self._calibration = bundle.calibration
        # The encoder first: on a GPU, the index gets the memory that the encoder leaves.
        file = bundle.manifest.image_encoder.file
        if encoder is None:
            encoder = open_encoder(bundle, self.preprocessing, settings)
            file = encoder.file
        self.encoder = encoder
        self.precision = next(name for name, each in bundle.manifest.image_encoder.files.items() if each == file)
        self.encoder_hash = bundle.manifest.encoder_hash(file)
        self._store = bundle.store()
        self.search_device: tuple[str, str]  # where the search runs, and why there
        self._entity_view: Callable[[], EntityView]
        live = self._open_index(settings) if settings.index is None else self._open_milvus(settings.index)
        log.info("searching on %s: %s", *self.search_device)
        self.editor = None if live is None else self._open_editor(live, settings, decoder)
        self._revision = self._current_revision()
        self.engine = Engine(
            self.encoder,
            self._revision.entities,
            max_batch=settings.batch_limit(self.encoder.device),
            queue_limit=settings.queue_limit,
            # OpenMP's number of threads is a setting of the calling thread.
            on_start=lambda: faiss.omp_set_num_threads(settings.thread_count),
            on_batch=metrics.batch_images.observe,
            on_death=metrics.engine_deaths.inc,
        )
        self._embedder: EntityEmbedder | ImageEmbedder | None = None  # without an editor, opened when it is needed
        self._embedder_lock = threading.Lock()
        self._stuck_after_s = settings.stuck_ms / 1000
        self._users = 0
        self._unused = threading.Condition()
        self._closing, self._folder_gone = threading.Event(), threading.Event()
        manifest = bundle.path.resolve() / MANIFEST_FILE
        watch = threading.Thread(target=_watch, args=(manifest, self._closing, self._folder_gone), daemon=True)
        watch.start()

    @property
    def unready_reason(self) -> str | None:
        """Return why it cannot answer now, None if it can."""
        if self.editor is not None and self.editor.sync_error is not None:
            return self.editor.sync_error
        if self._folder_gone.is_set():
            return "the bundle's folder has disappeared"
        if not self.engine.alive:
            return "the engine has died"
        if self.engine.silent_s > self._stuck_after_s:
            return f"the engine has been stuck for {self.engine.silent_s:.0f} s"
        return None

    def view(self) -> BundleView:
        """Return the current view. Later changes to entities do not affect it."""
        revision = self._revision
        if self.editor is not None and self.editor.live.revision != revision.number:
            revision = self._revision = self._current_revision()
        return BundleView(loaded=self, entities=revision.entities, ranker=revision.ranker, label=revision.label)

    def check_encoder(self, content_hash: str | None) -> None:
        """Raise `Conflict` if an embedding is by another encoder. None: not known."""
        if content_hash not in (None, self.encoder_hash):
            raise Conflict(
                f"the embedding is by the encoder {content_hash}, and {self._revision.label} has {self.encoder_hash}; "
                "embed the image again with POST /embed"
            )

    def embed_text(self, text: str) -> Float32Array:
        """Return the embedding [D] of an entity with this text and no image.

        Raises `NoEntitySide` if the bundle cannot, `BundleAltered`, `MissingExtra`.
        """
        if self.editor is not None:
            embedder = self.editor.embedder
        else:
            with self._embedder_lock:
                if self._embedder is None:
                    self._embedder = open_embedder(self.bundle, self.encoder)
                embedder = self._embedder
        if embedder is None:
            raise NoEntitySide(NO_ENTITY_ENCODER)
        return embedder.embed(None, text)

    def check(self) -> None:
        """Recognise a blank image. Raises `BundleAltered` if that fails in any way."""
        size_px = self.preprocessing.size_px
        try:
            view, blank = self.view(), np.zeros((size_px, size_px, 3), np.uint8)
            found = self.engine.submit(blank, 1, None, view.entities).result(self._stuck_after_s)
            view.ranker.rank(found, RecognizeOptions(top_k=1))
        except Exception as error:
            reason = f"{self.bundle.path} does not answer for a blank image ({error}); export it again"
            raise BundleAltered(reason) from error

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Keep it open within the block."""
        self.acquire()
        try:
            yield
        finally:
            self.release()

    def acquire(self) -> None:
        """Keep it open until `release` is called as often. Only for callers that know that it is open."""
        with self._unused:
            self._users += 1

    def release(self) -> None:
        with self._unused:
            self._users -= 1
            self._unused.notify_all()

    def keep_open(self, pending: Future[Any]) -> None:
        """Keep it open until the future is done."""
        self.acquire()
        pending.add_done_callback(lambda _: self.release())

    def retire(self, timeout_s: float) -> None:
        """Close it in the background once every user has released it. There must be no new users."""

        def close_when_unused() -> None:
            with self._unused:
                self._unused.wait_for(lambda: self._users == 0)
            if self.close(timeout_s):
                log.info("%s is closed", self._revision.label)

        threading.Thread(target=close_when_unused, name="retire", daemon=True).start()

    def close(self, timeout_s: float) -> bool:
        """Finish accepted jobs and close everything. Return False if the engine takes longer than `timeout_s`."""
        self._closing.set()
        if not self.engine.close(timeout_s):
            log.error("the engine of %s did not stop in %g s", self._revision.label, timeout_s)
            return False  # it still uses the store and the index
        if self.editor is not None:
            self.editor.close()
        self._store.close()
        return True

    def _current_revision(self) -> _Revision:
        entities = self._entity_view()
        number = entities.revision
        label = f"{self.bundle.name}@{self.bundle.fingerprint}{entities.version}"
        return _Revision(number, entities, Ranker(entities, self._calibration, self.model, label), label)

    def _open_index(self, settings: Settings) -> LiveChanges | None:
        """Search the bundle's own index, with the changes in LIVE_DIR. Return None if entities cannot be changed."""
        device = settings.device if settings.search_device == "same" else settings.search_device
        index, store = self.bundle.index(device), self._store
        live = None if settings.live_dir is None else LiveSegment(settings.live_dir, self.bundle, store)
        self.search_device = (index.device, index.device_why)
        self._entity_view = lambda: OverlayView(index, store, live)
        return live

    def _open_milvus(self, index: str) -> LiveChanges:
        """Search a collection that `wikiclip index --backend milvus` loaded."""
        from index.milvus_view import MilvusEntities  # needs the extra milvus

        entities = MilvusEntities(index.removeprefix(MILVUS), self.bundle, self._store)
        self.search_device = ("milvus", "as configured")
        self._entity_view = lambda: entities
        return entities

    def _open_editor(self, live: LiveChanges, settings: Settings, decoder: Decoder) -> Editor:
        try:
            encoder = self.encoder
            embeds = self.bundle.manifest.images_only or (self.bundle.path / ENTITY_ENCODER_FOLDER).is_dir()
            if self.precision != "float" and embeds:
                # The export embedded all other entities in float, so int8 and float16 are for queries only.
                float_settings = settings.model_copy(update={"precision": "float"})
                encoder = open_encoder(self.bundle, self.preprocessing, float_settings)
            return Editor(self.bundle, live, encoder, decoder)
        except WikiclipError:
            live.close()
            raise


@dataclass(frozen=True, kw_only=True)
class BundleView:
    """What one request sees: a loaded bundle at one revision of its live index. `label` names both."""

    loaded: LoadedBundle
    entities: EntityView
    ranker: Ranker
    label: str
