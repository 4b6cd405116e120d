"""An image's way to its entities: decoded, encoded and searched, joined with their records.

Each stage has threads of its own and hands on to the next by itself. The event loop, which is busy with others, hears
of the end only: on few cores a stage that it would have to hand on waits for it. Where the records are in memory there
is nothing to wait for, and whoever takes the result joins them.

Shapes: H/W pixels, D embedding width.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from core.errors import Unavailable
from imaging import load_region
from index.store import Selection, StoredEntity
from service.engine import Found
from service.explain import Evidence, explain
from service.join import Ranking
from service.loaded_bundle import Snapshot
from service.workers import Workers
from wikiclip.answers import Box, RecognizeOptions


@dataclass(frozen=True, kw_only=True)
class Passed:
    """What was found. `stages` has when each began and ended, by `time.monotonic`: `decode`, `queue`, `encode` (both
    only of an image), `search`, `join`."""

    ranking: Ranking
    embedding_D: npt.NDArray[np.float32]
    stages: Mapping[str, tuple[float, float]]

    @property
    def timings_ms(self) -> dict[str, float]:
        """How long each stage took; `join` is in the total only."""
        return {name: 1000 * (end - begin) for name, (begin, end) in self.stages.items() if name != "join"}


class Passage:
    """One image on its way. The generation is held until nothing of this uses it any more."""

    def __init__(
        self, snapshot: Snapshot, options: RecognizeOptions, *, decoders: Workers, lookups: Workers, max_pixels: int
    ) -> None:
        self._result: Future[Callable[[], Passed]] = Future()
        self._snapshot, self._options = snapshot, options
        self._decoders, self._lookups = decoders, lookups
        self._max_pixels = max_pixels
        self._holds = False

    def begin(self, image: bytes | npt.NDArray[np.float32]) -> Future[Callable[[], Passed]]:
        """Set out with the bytes of an image, or with its embedding [D]; once. Call what the future gives.

        It raises what a stage did: a `UserError` for a bad image. Cancelling it drops what has not been begun. Who
        calls holds the generation.
        """
        result = self._result
        self._snapshot.generation.acquire()
        self._holds = True
        if self._options.types:
            self._do_in(self._lookups, self._select, image)
        else:
            self._do(self._set_out, image, None)
        return result

    def _select(self, image: bytes | npt.NDArray[np.float32]) -> None:
        self._set_out(image, self._snapshot.joiner.selection(self._options))

    def _set_out(self, image: bytes | npt.NDArray[np.float32], selection: Selection | None) -> None:
        if isinstance(image, np.ndarray):
            self._search(image, selection)
        else:
            self._do_in(self._decoders, self._decode, image, selection)

    def _search(self, embedding_D: npt.NDArray[np.float32], selection: Selection | None) -> None:
        engine, joiner, options = self._snapshot.generation.engine, self._snapshot.joiner, self._options
        engine.search(
            embedding_D,
            joiner.top_k(options),
            selection,
            self._snapshot.entities,
            unfiltered=joiner.needs_unfiltered_scores(options),
            future=self._follow({}),
        )

    def _decode(self, data: bytes, selection: Selection | None) -> None:
        began_at = time.monotonic()
        generation, joiner, options = self._snapshot.generation, self._snapshot.joiner, self._options
        pixels_HW3, region = load_region(data, generation.preprocessing, max_pixels=self._max_pixels, box=options.box)
        stages = {"decode": (began_at, time.monotonic())}
        generation.engine.submit(
            pixels_HW3,
            joiner.top_k(options),
            selection,
            self._snapshot.entities,
            unfiltered=joiner.needs_unfiltered_scores(options),
            explain=options.explain,
            future=self._follow(stages, region),
        )

    def _follow(self, stages: dict[str, tuple[float, float]], region: Box | None = None) -> Future[Found]:
        """What the engine is to fulfil: it ends this, and is cancelled with it, whenever that happens."""
        pending: Future[Found] = Future()
        self._result.add_done_callback(lambda _: pending.cancel())

        def go_on(ended: Future[Found]) -> None:
            if ended.cancelled():
                self._let_go()
            elif (error := ended.exception()) is not None:
                self._end(error)
            else:
                found = ended.result()
                first = self._snapshot.joiner.at_hand(found, self._options)
                if first is not None:
                    self._end(partial(self._joined, found, stages, region, first))
                else:
                    self._do_in(self._lookups, self._join, found, stages, region)

        pending.add_done_callback(go_on)
        return pending

    def _join(self, found: Found, stages: dict[str, tuple[float, float]], region: Box | None) -> None:
        passed = self._joined(found, stages, region)
        self._end(lambda: passed)

    def _joined(
        self,
        found: Found,
        stages: dict[str, tuple[float, float]],
        region: Box | None,
        first: Sequence[StoredEntity] | None = None,
    ) -> Passed:
        began_at = time.monotonic()
        ranking = self._snapshot.joiner.join(found, self._options, first)
        if found.patch_tokens_PC is not None and region is not None:
            evidence = Evidence(embedding_D=found.embedding_D, patch_tokens_PC=found.patch_tokens_PC, region=region)
            ranking = explain(self._snapshot.entities, ranking, evidence)
        stages |= {**found.stages, "join": (began_at, time.monotonic())}
        return Passed(ranking=ranking, embedding_D=found.embedding_D, stages=stages)

    def _do_in(self, workers: Workers, stage: Callable[..., None], *arguments: object) -> None:
        """Have one of the workers do a stage."""
        workers.put(partial(self._do, stage, *arguments), self._drop)

    def _drop(self) -> None:
        self._end(Unavailable("the service is stopping; try again elsewhere"))

    def _do(self, stage: Callable[..., None], *arguments: Any) -> None:
        """Do a stage, unless nobody waits for it any more."""
        if self._result.cancelled():
            self._let_go()
            return
        try:
            stage(*arguments)
        except Exception as error:
            self._end(error)

    def _let_go(self) -> None:
        if self._holds:
            self._holds = False
            self._snapshot.generation.release()

    def _end(self, outcome: Callable[[], Passed] | BaseException) -> None:
        self._let_go()
        result = self._result
        del self._result  # which knows of this, too: nothing is left to the collector
        if result.set_running_or_notify_cancel():
            if isinstance(outcome, BaseException):
                result.set_exception(outcome)
            else:
                result.set_result(outcome)
