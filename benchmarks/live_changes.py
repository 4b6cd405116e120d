"""`wikiclip bench live`: PUT, DELETE and searches over HTTP against a dict, the service killed again and again.

Two services share one live folder. The first takes the changes; every few hundred operations it is killed (SIGKILL) at
some moment of the next ones, and started again. The second only answers. A change that was acknowledged must be there;
one whose answer was cut off may be there or not. `differences` counts every answer that is not the dict's.
"""

from __future__ import annotations

import io
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from threading import Timer
from types import TracebackType
from typing import Self

import httpx
import numpy as np
import numpy.typing as npt
from PIL import Image

from benchmarks.server import free_port, wait_until_ready
from imaging import Preprocessing, load_pixels
from index.bundle import Bundle
from service.loaded_bundle import open_encoder
from service.settings import Settings

OPERATIONS, SMOKE_OPERATIONS = 10_000, 120
KILLED_EVERY, SMOKE_KILLED_EVERY = 300, 70
QUERIES, TOP_K = 12, 5
TOLERANCE = 1e-4  # of a cosine: sums are rounded differently here and there
ADMIN = {"Authorization": "Bearer benchmark"}

Vector = npt.NDArray[np.float64]


class Model:
    """What must be answered, as a dict would know it."""

    def __init__(self, bundle: Bundle) -> None:
        embeddings = bundle.embeddings()
        self._base_ND = np.concatenate(list(embeddings)).astype(np.float64)
        self._rows_N = embeddings.rows_N
        with bundle.store() as store:
            stored = store.by_rows(range(len(store)))
        self._row_of = {entity.entity_id: entity.row for entity in stored}
        self.titles = {entity.entity_id: entity.title for entity in stored}
        self._visible_N = np.ones(len(self._rows_N), np.bool_)
        self._put: dict[str, Vector] = {}

    def put(self, entity_id: str, title: str, embedding_D: Vector) -> None:
        self.delete(entity_id)
        self.titles[entity_id], self._put[entity_id] = title, embedding_D

    def delete(self, entity_id: str) -> None:
        self.titles.pop(entity_id, None)
        self._put.pop(entity_id, None)
        if entity_id in self._row_of:
            self._visible_N[self._rows_N == self._row_of[entity_id]] = False

    def best(self, query_D: Vector) -> Vector:
        """The scores of the best entities, falling."""
        scores = np.full(len(self._row_of), -2.0)
        np.maximum.at(scores, self._rows_N[self._visible_N], self._base_ND[self._visible_N] @ query_D)
        put = [float(embedding_D @ query_D) for embedding_D in self._put.values()]
        return np.sort(np.concatenate([scores, put]))[::-1][:TOP_K]


class _Service:
    """`wikiclip serve` on a port of its own, which it keeps when it is killed and started again."""

    def __init__(self, bundle: Path, live_dir: str) -> None:
        port = free_port()
        self._command = [sys.executable, "-m", "wikiclip", "serve", "--bundle", str(bundle), "--live-dir", live_dir]
        self._command += ["--port", str(port), "--admin-token", "benchmark", "--threads", "1", "--log-level", "error"]
        self._url = f"http://127.0.0.1:{port}"
        self.client = httpx.Client(base_url=self._url, timeout=30, headers=ADMIN)

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL)
        wait_until_ready(self._process, self._url)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.kill()
        self.client.close()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def restart(self) -> None:
        self.kill()
        self.__enter__()

    def title(self, entity_id: str) -> str | None:
        """The title of an entity, None where there is none."""
        answer = self.client.get(f"/entities/{entity_id}")
        return None if answer.status_code == httpx.codes.NOT_FOUND else str(answer.raise_for_status().json()["title"])

    def answers_as(self, model: Model, image: bytes, query_D: Vector) -> bool:
        answer = self.client.post(
            "/recognize", params={"top_k": TOP_K}, content=image, headers={"Content-Type": "image/png"}
        )
        found = answer.raise_for_status().json()["predictions"]
        wanted = model.best(query_D)
        return (
            len(found) == len(wanted)
            and bool(np.all(np.abs(np.array([each["score"] for each in found]) - wanted) < TOLERANCE))
            and all(model.titles.get(each["entity_id"]) == each["title"] for each in found)
        )


def measure(bundle_path: Path, *, smoke: bool) -> dict[str, object]:
    """How many answers differ from a dict's; milliseconds of a durable PUT, and until another process answers so."""
    operations = SMOKE_OPERATIONS if smoke else OPERATIONS
    killed_every = SMOKE_KILLED_EVERY if smoke else KILLED_EVERY
    bundle = Bundle.open(bundle_path)
    model, rng = Model(bundle), np.random.default_rng(0)
    images = [_draw(rng) for _ in range(QUERIES)]
    queries_QD = _embeddings(bundle, images)
    names = [*rng.choice(sorted(model.titles), 40, replace=False).tolist(), *(f"new {n}" for n in range(40))]
    put_ms: list[float] = []
    seen_ms: list[float] = []
    differences = kills = cut_off = 0
    killer: Timer | None = None
    with (
        tempfile.TemporaryDirectory() as folder,
        _Service(bundle_path, folder) as writer,
        _Service(bundle_path, folder) as reader,
    ):
        for number in range(operations):
            if number % killed_every == killed_every - 1:
                killer = Timer(float(rng.uniform(0, 0.2)), writer.kill)
                killer.start()
            kind, entity_id = rng.choice(["put", "delete", "search"], p=[0.35, 0.25, 0.4]), str(rng.choice(names))
            embedding_D = _near(queries_QD[rng.integers(QUERIES)], rng)
            title, query = f"Version {number}", int(rng.integers(QUERIES))
            old = model.titles.get(entity_id)
            try:
                if kind == "search":
                    differences += not writer.answers_as(model, images[query], queries_QD[query])
                    continue
                started = time.perf_counter()
                if kind == "put":
                    record = {"title": title, "embedding": embedding_D.tolist()}
                    answer = writer.client.put(f"/entities/{entity_id}", json=record)
                    put_ms.append(1000 * (time.perf_counter() - started))
                    differences += answer.status_code != (201 if old is None else 200)
                    model.put(entity_id, title, embedding_D)
                else:
                    answer = writer.client.delete(f"/entities/{entity_id}")
                    differences += answer.status_code != (404 if old is None else 204)
                    model.delete(entity_id)
                if number % 10 == 0:
                    seen_ms.append(_until_seen_ms(reader, entity_id, model.titles.get(entity_id)))
            except httpx.TransportError:
                if killer is not None:
                    killer.join()
                writer.restart()
                kills += 1
                if kind == "search":
                    continue
                cut_off += 1  # it may have been made or not
                now = writer.title(entity_id)
                if kind == "put" and now == title:
                    model.put(entity_id, title, embedding_D)
                elif kind == "delete" and now is None:
                    model.delete(entity_id)
                else:
                    differences += now != old
        if killer is not None:
            killer.join()
            writer.restart()
        for service in (writer, reader):
            differences += sum(service.title(name) != model.titles.get(name) for name in names)
            differences += sum(
                not service.answers_as(model, image, query_D) for image, query_D in zip(images, queries_QD, strict=True)
            )
    return {
        "operations": operations,
        "kills": kills,
        "cut_off": cut_off,
        "differences": differences,
        "put": _summary(put_ms),
        "seen_by_another_process": _summary(seen_ms),
    }


def _until_seen_ms(reader: _Service, entity_id: str, title: str | None) -> float:
    started = time.perf_counter()
    while reader.title(entity_id) != title:
        if time.perf_counter() - started > 30:
            raise TimeoutError("a change is not seen by another process within 30 s")
    return 1000 * (time.perf_counter() - started)


def _summary(taken_ms: list[float]) -> dict[str, float]:
    p50, p99, most = np.percentile(taken_ms, (50, 99, 100)).round(1).tolist()
    return {"p50_ms": p50, "p99_ms": p99, "max_ms": most}


def _near(query_D: Vector, rng: np.random.Generator) -> Vector:
    """An embedding that a query finds, as it comes back from being stored in float16."""
    near_D = query_D + rng.normal(0, 0.5 / np.sqrt(len(query_D)), len(query_D))
    stored_D = (near_D / np.linalg.norm(near_D)).astype(np.float16).astype(np.float64)
    normal_D: Vector = stored_D / np.linalg.norm(stored_D)
    return normal_D


def _draw(rng: np.random.Generator) -> bytes:
    buffer = io.BytesIO()
    coarse = rng.integers(0, 256, (4, 4, 3), np.uint8)
    Image.fromarray(coarse).resize((64, 64)).save(buffer, "PNG")
    return buffer.getvalue()


def _embeddings(bundle: Bundle, images: list[bytes]) -> Vector:
    preprocessing = Preprocessing.from_dict(bundle.manifest.preprocessing)
    encoder = open_encoder(bundle, preprocessing, Settings(threads=1))
    pixels = [load_pixels(image, preprocessing, max_pixels=10**6) for image in images]
    embeddings = [encoder.encode(each[None])[0] for each in pixels]
    return np.stack(embeddings).astype(np.float64)
