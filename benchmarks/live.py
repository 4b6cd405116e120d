"""`wikiclip bench live`: changes of entities and images over HTTP, compared with a dict, while the service is killed.

Two services share one live folder. The first takes the changes; every few hundred operations it is killed (SIGKILL) at
a random moment around a change and restarted. The second only reads. An acknowledged change must be there. A change
whose response was lost may be there. `differences` counts answers that are not the dict's.

Shapes: N embeddings of the bundle, I of an entity, Q queries, D embedding width.
"""

import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from heapq import nlargest
from pathlib import Path
from threading import Timer
from typing import Any, Self

import httpx
import numpy as np

from benchmarks.generator import service_process
from benchmarks.synthetic import photograph
from core.arrays import Float64Array
from imaging import Preprocessing, load_pixels
from index.bundle import Bundle
from index.embeddings import Pooling
from service.encoder import open_encoder
from service.settings import Settings

QUERIES, TOP_K = 12, 5
TOLERANCE = 1e-4  # of a cosine
SEEN_TIMEOUT_S = 30
KILL_WITHIN_S = 0.006  # of the start of a change, which takes about as long
TOKEN = "benchmark"
_KINDS = {"put": 0.2, "delete": 0.15, "add": 0.2, "remove": 0.15, "search": 0.3}


def measure(bundle_path: Path, *, smoke: bool) -> dict[str, object]:
    """Return the number of wrong answers, and latencies in ms: of durable changes, until another process sees one."""
    with (
        tempfile.TemporaryDirectory() as folder,
        _Service(bundle_path, folder) as writer,
        _Service(bundle_path, folder) as reader,
    ):
        run = _Run(Bundle.open(bundle_path), writer, reader)
        operations, operations_per_kill = (120, 70) if smoke else (10_000, 300)
        run.run(operations, operations_per_kill)
    took = {"put": run.took_ms["put"], "add_image": run.took_ms["add"], "seen_by_another_process": run.seen_ms}
    return {**run.counts, **{name: _summary(took_ms) for name, took_ms in took.items()}}


State = tuple[str, frozenset[str]]  # the title of an entity, and the ids of the images that were added to it


@dataclass
class Entity:
    """An entity: its embeddings in the bundle or in its record, and the images that were added, by id."""

    title: str
    own_ID: Float64Array
    images: dict[str, Float64Array] = field(default_factory=dict)


class Model(dict[str, Entity]):
    """The expected state of the catalog, by entity id."""

    pooling: Pooling

    @classmethod
    def of(cls, bundle: Bundle) -> Self:
        embeddings = bundle.embeddings()
        vectors_ND = np.concatenate(list(embeddings)).astype(np.float64)
        with bundle.store() as store:
            entities = store.by_rows(range(len(store)))
        rows_N = embeddings.rows_N
        starts, ends = (np.searchsorted(rows_N, np.arange(len(entities)), side) for side in ("left", "right"))
        model = cls(
            {each.entity_id: Entity(each.title, vectors_ND[starts[each.row] : ends[each.row]]) for each in entities}
        )
        model.pooling = bundle.manifest.pooling
        return model

    def state(self, entity_id: str) -> State | None:
        entity = self.get(entity_id)
        return None if entity is None else (entity.title, frozenset(entity.images))

    def best_scores(self, query_D: Float64Array) -> list[float]:
        """Return the scores of the best entities, the highest first."""
        return nlargest(TOP_K, (float((self._searched(each) @ query_D).max()) for each in self.values()))

    def _searched(self, entity: Entity) -> Float64Array:
        vectors_ID = np.stack([*entity.own_ID, *entity.images.values()]) if entity.images else entity.own_ID
        return _as_stored(vectors_ID.mean(axis=0))[None] if self.pooling == "mean" else vectors_ID


class _Service:
    """A service that can be killed and restarted."""

    def __init__(self, bundle: Path, live_dir: str) -> None:
        self._bundle = bundle
        self._flags = ("--live-dir", live_dir, "--admin-token", TOKEN, "--threads", "1")

    def __enter__(self) -> Self:
        self._stack = ExitStack()
        self._process, url = self._stack.enter_context(service_process(self._bundle, *self._flags))
        headers = {"Authorization": f"Bearer {TOKEN}"}
        self.client = self._stack.enter_context(httpx.Client(base_url=url, timeout=30, headers=headers))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def restart(self) -> None:
        self.__exit__()
        self.__enter__()

    def state(self, entity_id: str) -> State | None:
        """Return the state of an entity, or None if it does not exist."""
        answer = self.client.get(f"/entities/{entity_id}")
        if answer.status_code == httpx.codes.NOT_FOUND:
            return None
        entity = answer.raise_for_status().json()
        added = frozenset(each for each in entity["image_ids"] if not each.startswith("base-"))
        return str(entity["title"]), added

    def agrees(self, model: Model, image: bytes, query_D: Float64Array) -> bool:
        """Return whether the predictions for an image are those of the model."""
        headers = {"Content-Type": "image/jpeg"}
        answer = self.client.post("/recognize", params={"top_k": TOP_K}, content=image, headers=headers)
        predictions = answer.raise_for_status().json()["predictions"]
        scores = [each["score"] for each in predictions]
        return (
            len(predictions) == TOP_K
            and np.allclose(scores, model.best_scores(query_D), rtol=0, atol=TOLERANCE)
            and all(
                each["entity_id"] in model and model[each["entity_id"]].title == each["title"] for each in predictions
            )
        )


class _Run:
    """Random operations on the writer and the model, and what they show."""

    def __init__(self, bundle: Bundle, writer: _Service, reader: _Service) -> None:
        self._rng = np.random.default_rng(0)
        self._model, self._writer, self._reader = Model.of(bundle), writer, reader
        self._images = [photograph(seed, 64, 64) for seed in range(QUERIES)]
        self._queries_QD = _embed(bundle, self._images)
        existing = self._rng.choice(sorted(self._model), 40, replace=False).tolist()
        self._entity_ids = [*existing, *(f"new {number}" for number in range(40))]
        self.counts = dict.fromkeys(("operations", "kills", "cut_off", "differences"), 0)
        self.took_ms: dict[str, list[float]] = {"put": [], "add": []}
        self.seen_ms: list[float] = []

    def run(self, operations: int, operations_per_kill: int) -> None:
        for number in range(operations):
            self.counts["operations"] += 1
            kill = number % operations_per_kill == operations_per_kill - 1
            kind = str(self._rng.choice(list(_KINDS), p=list(_KINDS.values())))
            entity_id, query = str(self._rng.choice(self._entity_ids)), int(self._rng.integers(QUERIES))
            if kind == "search" and kill:
                kind = "add"
            if kind == "search":
                self._search(self._writer, query)
                continue
            self._change(kind, entity_id, f"Version {number}", _nearby(self._queries_QD[query], self._rng), kill=kill)
            if number % 10 == 0:
                self.seen_ms.append(self._time_until_seen(entity_id))
        for service in (self._writer, self._reader):
            for entity_id in self._entity_ids:
                self.counts["differences"] += service.state(entity_id) != self._model.state(entity_id)
            for query in range(QUERIES):
                self._search(service, query)

    def _search(self, service: _Service, query: int) -> None:
        agrees = service.agrees(self._model, self._images[query], self._queries_QD[query])
        self.counts["differences"] += not agrees

    def _change(self, kind: str, entity_id: str, title: str, embedding_D: Float64Array, *, kill: bool) -> None:
        """Put, delete, or add or remove an image. With `kill`, the writer dies about then."""
        before, entity = self._model.state(entity_id), self._model.get(entity_id)
        removed = next(iter(entity.images), "0") if entity else "0"
        request, expected = self._request(kind, entity_id, title, embedding_D, removed)
        killer = Timer(self._rng.uniform(0, KILL_WITHIN_S), self._writer.kill)
        if kill:
            killer.start()
        answer: httpx.Response | None = None
        started = time.perf_counter()
        try:
            answer = self._writer.client.request(**request)
            if kind in self.took_ms:
                self.took_ms[kind].append(1000 * (time.perf_counter() - started))
            self.counts["differences"] += answer.status_code != expected
        except httpx.TransportError:
            self.counts["cut_off"] += 1
        if kill:
            killer.join()
            self._writer.restart()
            self.counts["kills"] += 1
        added = None if answer is None or kind != "add" else answer.json().get("image_id")
        if answer is None:  # the change was made, or it was not
            now = self._writer.state(entity_id)
            if now == before:
                return
            if kind == "add" and now is not None and before is not None:
                added = next(iter(now[1] - before[1]), None)
        self._apply(kind, entity_id, Entity(title, embedding_D[None]), added, removed)
        if answer is None:
            self.counts["differences"] += now != self._model.state(entity_id)

    def _request(
        self, kind: str, entity_id: str, title: str, embedding_D: Float64Array, removed: str
    ) -> tuple[dict[str, Any], int]:
        """Return the arguments of a request, and the status that it must get."""
        url, entity, codes = f"/entities/{entity_id}", self._model.get(entity_id), httpx.codes
        if kind == "put":
            record = {"title": title, "embedding": embedding_D.tolist()}
            return {"method": "PUT", "url": url, "json": record}, codes.OK if entity else codes.CREATED
        if kind == "add":
            image = {"embedding": embedding_D.tolist()}
            request = {"method": "POST", "url": f"{url}/images", "json": image}
            return request, codes.CREATED if entity else codes.NOT_FOUND
        if kind == "remove":
            exists = entity is not None and removed in entity.images
            request = {"method": "DELETE", "url": f"{url}/images/{removed}"}
            return request, codes.NO_CONTENT if exists else codes.NOT_FOUND
        return {"method": "DELETE", "url": url}, codes.NO_CONTENT if entity else codes.NOT_FOUND

    def _apply(self, kind: str, entity_id: str, put: Entity, added: str | None, removed: str) -> None:
        """Make a change of the model."""
        if kind == "put":
            self._model[entity_id] = put
        elif kind == "add" and entity_id in self._model and added is not None:
            self._model[entity_id].images[added] = put.own_ID[0]
        elif kind == "remove" and entity_id in self._model:
            self._model[entity_id].images.pop(removed, None)
        elif kind == "delete":
            self._model.pop(entity_id, None)

    def _time_until_seen(self, entity_id: str) -> float:
        """Return the milliseconds until the other process has the current state."""
        started = time.perf_counter()
        while self._reader.state(entity_id) != self._model.state(entity_id):
            if time.perf_counter() - started > SEEN_TIMEOUT_S:
                raise TimeoutError(f"another process did not see a change within {SEEN_TIMEOUT_S} s")
        return 1000 * (time.perf_counter() - started)


def _summary(took_ms: list[float]) -> dict[str, float]:
    p50, p99, most = np.percentile(took_ms, (50, 99, 100)).round(1).tolist()
    return {"p50_ms": p50, "p99_ms": p99, "max_ms": most}


def _nearby(query_D: Float64Array, rng: np.random.Generator) -> Float64Array:
    """Return an embedding near a query, rounded to float16 as the service stores it."""
    return _as_stored(query_D + rng.normal(0, 0.5 / np.sqrt(len(query_D)), len(query_D)))


def _as_stored(vector_D: Float64Array) -> Float64Array:
    stored_D = (vector_D / np.linalg.norm(vector_D)).astype(np.float16).astype(np.float64)
    unit_D: Float64Array = stored_D / np.linalg.norm(stored_D)
    return unit_D


def _embed(bundle: Bundle, images: list[bytes]) -> Float64Array:
    preprocessing = Preprocessing.from_dict(bundle.manifest.preprocessing)
    encoder = open_encoder(bundle, preprocessing, Settings(threads=1))
    pixels = [load_pixels(image, preprocessing, max_pixels=10**6) for image in images]
    return np.concatenate([np.asarray(encoder.encode(each[None])) for each in pixels]).astype(np.float64)
