"""One opened bundle with all that answers from it. A service that is given another bundle makes another generation."""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Protocol

import numpy as np

from core.errors import BundleAltered, UserError
from core.runtime import faiss
from imaging import Preprocessing
from index.bundle import Bundle
from index.entity_encoder import ENTITY_ENCODER_FOLDER
from index.live import LiveSegment
from index.manifest import EMBEDDINGS_FOLDER, STORE_FILE
from index.overlay import EntityView, LiveChanges, LiveState, OverlayView
from index.store import EntityStore
from service.encoder import OnnxEncoder, wanted_device
from service.engine import Encoder, Engine
from service.join import SELECTIONS_KEPT, Joiner
from service.settings import MILVUS, Settings
from service.telemetry import Metrics
from service.updates import Editor
from wikiclip.answers import RecognizeOptions

_PRECISIONS = {"cpu": "int8", "cuda": "float16"}  # what each is fastest in

log = logging.getLogger("wikiclip.generation")


class LoadedBundle:
    """A bundle, its encoder, index and store, and the engine that owns them: a batch never mixes two bundles.

    Without an `encoder` the bundle's own is run on ONNX Runtime. Raises `BundleError`, or `UserError` where the device
    cannot be had.
    """

    def __init__(self, bundle: Bundle, settings: Settings, metrics: Metrics, encoder: Encoder | None = None) -> None:
        self.bundle = bundle
        self.model = model_name(bundle)
        self.preprocessing = Preprocessing.from_dict(bundle.manifest.preprocessing)
        # The encoder first: what is free on a GPU after it is what the index may have.
        file = bundle.manifest.image_encoder.file
        if encoder is None:
            encoder = open_encoder(bundle, self.preprocessing, settings)
            file = encoder.file
        self.encoder = encoder
        self.precision = next(name for name, each in bundle.manifest.image_encoder.files.items() if each == file)
        self.encoder_hash = encoder_hash(bundle, file)
        self._store = bundle.store()
        self._source = _open_source(bundle, self._store, settings)
        log.info("searching on %s: %s", *self._source.device)
        self.editor = self._open_editor(settings)
        self._snapshot = self._take_snapshot()
        self.engine = Engine(
            self.encoder,
            self._snapshot.entities,
            max_batch=settings.batch_limit(self.encoder.device),
            queue_limit=settings.queue_limit,
            # OpenMP keeps the number of threads for each calling thread.
            on_start=lambda: faiss.omp_set_num_threads(settings.thread_count),
            on_batch=metrics.batch_images.observe,
            on_death=metrics.engine_deaths.inc,
        )
        self._stuck_after_s = settings.stuck_ms / 1000
        self._holders = 0
        self._free = threading.Condition()

    @property
    def search_device(self) -> tuple[str, str]:
        """Where the search runs, and why there."""
        return self._source.device

    @property
    def unready_reason(self) -> str | None:
        """Why it cannot answer now, None when it can."""
        if self.editor is not None and self.editor.sync_error is not None:
            return self.editor.sync_error
        if not self.engine.alive:
            return "the engine has died"
        if self.engine.silent_s > self._stuck_after_s:
            return f"the engine has been stuck for {self.engine.silent_s:.0f} s"
        return None

    def snapshot(self) -> Snapshot:
        """What is served now; it stays as it is, whatever is put or deleted."""
        if self.editor is not None and self.editor.live.delta is not self._snapshot.delta:
            self._snapshot = self._take_snapshot()
        return self._snapshot

    def _take_snapshot(self) -> Snapshot:
        entities = self._source.view()
        return Snapshot(
            generation=self,
            entities=entities,
            joiner=Joiner(entities, self.bundle.calibration),
            label=f"{self.bundle.name}@{self.bundle.fingerprint}{entities.version}",
        )

    def _open_editor(self, settings: Settings) -> Editor | None:
        live = self._source.live
        if live is None:
            return None
        try:
            encoder = self.encoder
            if self.precision != "float" and (self.bundle.path / ENTITY_ENCODER_FOLDER).is_dir():
                # int8 and float16 are for queries: what is put lies beside embeddings that were made in floats.
                as_float = settings.model_copy(update={"precision": "float"})
                encoder = open_encoder(self.bundle, self.preprocessing, as_float)
            return Editor(self.bundle, live, encoder, max_pixels=settings.max_pixels)
        except UserError:
            live.close()
            raise

    def check(self) -> None:
        """Take one blank image all the way to its predictions. Raises `BundleAltered` if that fails."""
        size_px = self.preprocessing.size_px
        try:
            snapshot, blank = self.snapshot(), np.zeros((size_px, size_px, 3), np.uint8)
            found = self.engine.submit(blank, 1, None, snapshot.entities).result(self._stuck_after_s)
            snapshot.joiner.join(found, RecognizeOptions(top_k=1))
        except Exception as error:
            # Whatever goes wrong, in the encoder, in faiss or in SQLite, this is no bundle to answer from.
            raise BundleAltered(
                f"{self.bundle.path} does not answer for a blank image ({error}); export it again"
            ) from error

    def acquire(self) -> None:
        """Keep it open until it is let go as often as it was held. Only for who knows that it is open now."""
        with self._free:
            self._holders += 1

    def release(self) -> None:
        with self._free:
            self._holders -= 1
            self._free.notify_all()

    def retire(self, timeout_s: float) -> None:
        """Close it as soon as nobody holds it, without waiting for that. Nobody new may hold it from now on."""

        def close_when_free() -> None:
            with self._free:
                self._free.wait_for(lambda: self._holders == 0)
            if self.close(timeout_s):
                log.info("%s is released", self._snapshot.label)

        threading.Thread(target=close_when_free, name="retire", daemon=True).start()

    def close(self, timeout_s: float) -> bool:
        """Finish what was accepted, within `timeout_s`, and let go of everything. False if that took longer."""
        if not self.engine.close(timeout_s):
            log.error("the engine of %s did not stop in %g s", self._snapshot.label, timeout_s)
            return False  # it still uses the store and the index
        if self.editor is not None:
            self.editor.close()
        self._store.close()
        return True


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What one request sees: a generation at one state of its live changes. `label` names both."""

    generation: LoadedBundle
    entities: EntityView
    joiner: Joiner
    label: str

    @property
    def delta(self) -> LiveState | None:
        return self.entities.delta

    def label_at(self, generation: int) -> str:
        """The label of a later state of the same bundle, by the generation of its live changes."""
        bundle = self.generation.bundle
        return f"{bundle.name}@{bundle.fingerprint}+{generation}"


class _Source(Protocol):
    """What a generation is searched in: `view` gives its state now, `live` takes its changes, None where it has none.

    `device` says where the search runs, and why there.
    """

    @property
    def device(self) -> tuple[str, str]: ...
    @property
    def live(self) -> LiveChanges | None: ...
    def view(self) -> EntityView: ...


class _OwnIndex:
    """The bundle's own index, with the changes in LIVE_DIR over it."""

    def __init__(self, bundle: Bundle, store: EntityStore, settings: Settings) -> None:
        self._index = bundle.index(settings.index_device)
        self._store = store
        self._select = lru_cache(maxsize=SELECTIONS_KEPT)(store.select)
        self.device = (self._index.device, self._index.device_why)
        self.live = None if settings.live_dir is None else LiveSegment(settings.live_dir, bundle, store)

    def view(self) -> EntityView:
        return OverlayView(self._index, self._store, self.live, select=self._select)


class _InMilvus:
    """A collection that `wikiclip index --backend milvus` loaded."""

    def __init__(self, bundle: Bundle, store: EntityStore, uri: str) -> None:
        from index.milvus_view import MilvusEntities, MilvusView  # its extra is not installed everywhere

        self.live = MilvusEntities(uri, bundle, store)
        self._view = partial(MilvusView, self.live)
        self.device = ("milvus", "as asked for")

    def view(self) -> EntityView:
        return self._view()


def _open_source(bundle: Bundle, store: EntityStore, settings: Settings) -> _Source:
    if settings.index is None:
        return _OwnIndex(bundle, store, settings)
    return _InMilvus(bundle, store, settings.index.removeprefix(MILVUS))


def encoder_hash(bundle: Bundle, file: str) -> str:
    """What the embedding of an image depends on besides the image: the files of the encoder that is run (`file` and
    what lies beside it) and the preprocessing.

    Two bundles whose encoder is the same have the same hash, whatever their entities are.
    """
    manifest = bundle.manifest
    entry = manifest.image_encoder
    others = [STORE_FILE, f"{EMBEDDINGS_FOLDER}/"]
    others += [each for each in entry.files.values() if each not in (file, entry.file)]
    files = {name: each.sha256 for name, each in manifest.files.items() if not name.startswith(tuple(others))}
    content = [files, dict(manifest.preprocessing), file, entry.input, list(entry.outputs)]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def model_name(bundle: Bundle) -> str:
    """What answers call the model: `name` in the manifest's `model`, else its image encoder's spec without a path."""
    model = bundle.manifest.model
    return str(model.get("name") or Path(str(model.get("image_encoder", "unknown"))).name)


def open_encoder(bundle: Bundle, preprocessing: Preprocessing, settings: Settings) -> OnnxEncoder:
    """The bundle's image encoder as `settings` want it run: in what the device does fastest, if the bundle has it."""
    encoder = _open_file(bundle, _file_for(bundle, settings, wanted_device(settings.device)), preprocessing, settings)
    if encoder.file != (file := _file_for(bundle, settings, encoder.device)):  # CUDA was wanted and not got
        encoder = _open_file(bundle, file, preprocessing, settings)
    return encoder


def _file_for(bundle: Bundle, settings: Settings, device: str) -> str:
    files = bundle.manifest.image_encoder.files
    precision = _PRECISIONS[device] if settings.precision == "auto" else "float"
    return files.get(precision, files["float"])


def _open_file(bundle: Bundle, file: str, preprocessing: Preprocessing, settings: Settings) -> OnnxEncoder:
    entry = bundle.manifest.image_encoder
    return OnnxEncoder(
        bundle.path / file,
        preprocessing,
        input_name=entry.input,
        patches_name=entry.outputs[0],
        embedding_name=entry.outputs[1],
        embedding_dim=bundle.manifest.embedding_dim,
        device=settings.device,
        threads=settings.thread_count,
        max_batch=settings.batch_limit("cuda"),  # which only a GPU is told of
    )
