"""The index backend of CONTRIBUTING.md finds what faiss finds, in the index and behind a recogniser."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from index.bundle import Bundle
from index.search import EntityIndex
from service.recognizer import Recognizer
from service.settings import Settings
from wikiclip.answers import Recognition, RecognizeOptions

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return Bundle.open(ROOT / "demo" / "bundle")


@pytest.fixture(scope="module")
def backend() -> Any:
    """Return the class that the page defines."""
    (block,) = re.findall(r"^```python\n(.*?)^```$", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE | re.DOTALL)
    namespace: dict[str, Any] = {}
    exec(block, namespace)
    return namespace["NumpyCandidates"]


@pytest.mark.parametrize("types", [(), ("flag",), ("carnivore",), ("flag", "animal")])
@pytest.mark.parametrize("top_k", [1, 10, 100])
def test_the_index_finds_what_faiss_finds(bundle: Bundle, backend: Any, types: tuple[str, ...], top_k: int) -> None:
    embeddings = bundle.searched()
    index = EntityIndex(backend(embeddings), embeddings, {})
    queries_BD = np.random.default_rng(0).normal(size=(20, embeddings.dim)).astype(np.float32)
    with bundle.store() as store:
        selection = store.select(types) if types else None
        rows_BK, scores_BK = index.search(queries_BD, top_k, selection=selection)
        faiss_rows_BK, faiss_scores_BK = bundle.index().search(queries_BD, top_k, selection=selection)
    np.testing.assert_array_equal(rows_BK, faiss_rows_BK)
    np.testing.assert_allclose(scores_BK, faiss_scores_BK, atol=1e-5)


def test_a_recogniser_answers_the_same(bundle: Bundle, backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    image = (ROOT / "demo" / "example.jpg").read_bytes()

    def answer(types: tuple[str, ...]) -> Recognition:
        with Recognizer(bundle, Settings(device="cpu", cache="off", threads=1)) as recognizer:
            (recognition,) = recognizer.recognize_many([image], RecognizeOptions(top_k=10, types=types))
        assert isinstance(recognition, Recognition)
        return recognition

    def read(cls, path, embeddings, parameters, device="cpu", remembered=None):
        return cls(backend(embeddings), embeddings, parameters, remembered=remembered)

    expected = [answer(types) for types in ((), ("animal",))]
    monkeypatch.setattr(EntityIndex, "read", classmethod(read))
    for types, before in zip(((), ("animal",)), expected, strict=True):
        after = answer(types)
        assert [each.entity_id for each in after.predictions] == [each.entity_id for each in before.predictions]
        assert [each.score for each in after.predictions] == pytest.approx([each.score for each in before.predictions])
        assert after.in_catalog_probability == pytest.approx(before.in_catalog_probability, abs=1e-4)
