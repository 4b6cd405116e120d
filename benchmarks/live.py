"""`wikiclip bench live`: PUT, DELETE and searches over HTTP, compared with a dict, while the service is killed.

Two services share one live folder. The first takes the changes; every few hundred operations it is killed (SIGKILL) at
a random moment around a change and restarted. The second only reads. An acknowledged change must be there. A change
whose response was lost may be there. `differences` counts answers that are not the dict's.

Shapes: N embeddings of the bundle, Q queries, D embedding width.
"""

import tempfile
import time
from contextlib import ExitStack
from heapq import nlargest
from pathlib import Path
from threading import Timer
from typing import Self

import httpx
import numpy as np

from benchmarks.generator import service_process
from benchmarks.synthetic import photograph
from core.arrays import Float64Array
from imaging import Preprocessing, load_pixels
from index.bundle import Bundle
from service.encoder import open_encoder
from service.settings import Settings

QUERIES, TOP_K = 12, 5
TOLERANCE = 1e-4  # of a cosine
SEEN_TIMEOUT_S = 30
KILL_WITHIN_S = 0.02  # of the start of a change, which takes about as long
TOKEN = "benchmark"


def measure(bundle_path: Path, *, smoke: bool) -> dict[str, object]:
    """Return the number of wrong answers, and latencies in ms: of a durable PUT, and until another process sees it."""
    with (
        tempfile.TemporaryDirectory() as folder,
        _Service(bundle_path, folder) as writer,
        _Service(bundle_path, folder) as reader,
    ):
        run = _Run(Bundle.open(bundle_path), writer, reader)
        operations, operations_per_kill = (120, 70) if smoke else (10_000, 300)
        run.run(operations, operations_per_kill)
    return {**run.counts, "put": _summary(run.put_ms), "seen_by_another_process": _summary(run.seen_ms)}


class Model(dict[str, tuple[str, Float64Array]]):
    """The expected state of the catalog: title and embeddings [N, D] by entity id."""

    @classmethod
    def of(cls, bundle: Bundle) -> Self:
        embeddings = bundle.embeddings()
        vectors_ND = np.concatenate(list(embeddings)).astype(np.float64)
        with bundle.store() as store:
            entities = store.by_rows(range(len(store)))
        return cls({each.entity_id: (each.title, vectors_ND[embeddings.rows_N == each.row]) for each in entities})

    def title(self, entity_id: str) -> str | None:
        return self[entity_id][0] if entity_id in self else None

    def best_scores(self, query_D: Float64Array) -> list[float]:
        """Return the scores of the best entities, the highest first."""
        return nlargest(TOP_K, (float((vectors_ND @ query_D).max()) for _, vectors_ND in self.values()))


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

    def title(self, entity_id: str) -> str | None:
        """Return the title of an entity, or None if it does not exist."""
        answer = self.client.get(f"/entities/{entity_id}")
        return None if answer.status_code == httpx.codes.NOT_FOUND else str(answer.raise_for_status().json()["title"])

    def agrees(self, model: Model, image: bytes, query_D: Float64Array) -> bool:
        """Return whether the predictions for an image are those of the model."""
        headers = {"Content-Type": "image/jpeg"}
        answer = self.client.post("/recognize", params={"top_k": TOP_K}, content=image, headers=headers)
        predictions = answer.raise_for_status().json()["predictions"]
        scores = [each["score"] for each in predictions]
        return (
            len(predictions) == TOP_K
            and np.allclose(scores, model.best_scores(query_D), rtol=0, atol=TOLERANCE)
            and all(model.title(each["entity_id"]) == each["title"] for each in predictions)
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
        self.put_ms: list[float] = []
        self.seen_ms: list[float] = []

    def run(self, operations: int, operations_per_kill: int) -> None:
        for number in range(operations):
            self.counts["operations"] += 1
            kill = number % operations_per_kill == operations_per_kill - 1
            kind = self._rng.choice(["put", "delete", "search"], p=[0.35, 0.25, 0.4])
            entity_id, query = str(self._rng.choice(self._entity_ids)), int(self._rng.integers(QUERIES))
            if kind == "search" and not kill:
                self._search(self._writer, query)
                continue
            title = None if kind == "delete" else f"Version {number}"
            self._change(entity_id, title, _nearby(self._queries_QD[query], self._rng), kill=kill)
            if number % 10 == 0:
                self.seen_ms.append(self._time_until_seen(entity_id))
        for service in (self._writer, self._reader):
            for entity_id in self._entity_ids:
                self.counts["differences"] += service.title(entity_id) != self._model.title(entity_id)
            for query in range(QUERIES):
                self._search(service, query)

    def _search(self, service: _Service, query: int) -> None:
        agrees = service.agrees(self._model, self._images[query], self._queries_QD[query])
        self.counts["differences"] += not agrees

    def _change(self, entity_id: str, title: str | None, embedding_D: Float64Array, *, kill: bool) -> None:
        """PUT an entity, or DELETE it if `title` is None. With `kill`, the writer dies about then."""
        before = self._model.title(entity_id)
        killer = Timer(self._rng.uniform(0, KILL_WITHIN_S), self._writer.kill)
        if kill:
            killer.start()
        acknowledged = True
        started = time.perf_counter()
        try:
            if title is None:
                answer = self._writer.client.delete(f"/entities/{entity_id}")
                expected = httpx.codes.NOT_FOUND if before is None else httpx.codes.NO_CONTENT
            else:
                record = {"title": title, "embedding": embedding_D.tolist()}
                answer = self._writer.client.put(f"/entities/{entity_id}", json=record)
                expected = httpx.codes.CREATED if before is None else httpx.codes.OK
                self.put_ms.append(1000 * (time.perf_counter() - started))
            self.counts["differences"] += answer.status_code != expected
        except httpx.TransportError:
            acknowledged = False
        if kill:
            killer.join()
            self._writer.restart()
            self.counts["kills"] += 1
        if not acknowledged:  # the change was made, or it was not
            self.counts["cut_off"] += 1
            now = self._writer.title(entity_id)
            self.counts["differences"] += now not in (title, before)
            if now != title:
                return
        if title is None:
            self._model.pop(entity_id, None)
        else:
            self._model[entity_id] = title, embedding_D[None]

    def _time_until_seen(self, entity_id: str) -> float:
        """Return the milliseconds until the other process has the current title."""
        started = time.perf_counter()
        while self._reader.title(entity_id) != self._model.title(entity_id):
            if time.perf_counter() - started > SEEN_TIMEOUT_S:
                raise TimeoutError(f"another process did not see a change within {SEEN_TIMEOUT_S} s")
        return 1000 * (time.perf_counter() - started)


def _summary(took_ms: list[float]) -> dict[str, float]:
    p50, p99, most = np.percentile(took_ms, (50, 99, 100)).round(1).tolist()
    return {"p50_ms": p50, "p99_ms": p99, "max_ms": most}


def _nearby(query_D: Float64Array, rng: np.random.Generator) -> Float64Array:
    """Return an embedding near a query, rounded to float16 as the service stores it."""
    near_D = query_D + rng.normal(0, 0.5 / np.sqrt(len(query_D)), len(query_D))
    stored_D = (near_D / np.linalg.norm(near_D)).astype(np.float16).astype(np.float64)
    unit_D: Float64Array = stored_D / np.linalg.norm(stored_D)
    return unit_D


def _embed(bundle: Bundle, images: list[bytes]) -> Float64Array:
    preprocessing = Preprocessing.from_dict(bundle.manifest.preprocessing)
    encoder = open_encoder(bundle, preprocessing, Settings(threads=1))
    pixels = [load_pixels(image, preprocessing, max_pixels=10**6) for image in images]
    return np.stack([encoder.encode(each[None])[0] for each in pixels]).astype(np.float64)
