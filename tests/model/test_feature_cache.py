from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from core.errors import UserError
from model.feature_cache import FeatureCache, content_key

HASH = "ab" * 32


def features(seed: int, count: int) -> tuple[list[bytes], np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    keys = [content_key(f"{seed}-{row}".encode()) for row in range(count)]
    return keys, rng.normal(size=(count, 4, 6)).astype(np.float32), rng.normal(size=(count, 8)).astype(np.float32)


def test_images_are_read_back_after_reopening(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, HASH)
    for seed in (1, 2):
        cache.add(*features(seed, 3))
        cache.flush()
    again = FeatureCache(tmp_path, HASH)
    for seed in (1, 2):
        for key, tokens, embedding in zip(*features(seed, 3), strict=True):
            np.testing.assert_array_equal(again.tokens(key), tokens.astype(np.float16))
            np.testing.assert_array_equal(again.embedding(key), embedding)
            assert again.tokens(key).dtype == np.float16
            assert again.embedding(key).dtype == np.float32
    assert content_key(b"other") not in again


def test_texts_of_any_length_are_read_back(tmp_path: Path) -> None:
    texts = [np.random.default_rng(n).normal(size=(n, 5)).astype(np.float32) for n in (3, 1, 7, 2)]
    keys = [content_key(bytes([n])) for n in range(4)]
    cache = FeatureCache(tmp_path, HASH)
    cache.add(keys, texts)
    cache.flush()
    again = FeatureCache(tmp_path, HASH)
    for key, text in zip(keys, texts, strict=True):
        np.testing.assert_array_equal(again.tokens(key), text.astype(np.float16))


def test_encoders_do_not_share_features(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, HASH)
    keys, *arrays = features(1, 2)
    cache.add(keys, arrays[0], arrays[1])
    cache.flush()
    assert keys[0] in cache
    assert keys[0] not in FeatureCache(tmp_path, "cd" * 32)


def test_values_beyond_float16_stay_finite(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, HASH)
    cache.add([content_key(b"x")], [np.array([[1e6, -1e6, 1.0]], np.float32)])
    cache.flush()
    assert cache.tokens(content_key(b"x")).tolist() == [[65504.0, -65504.0, 1.0]]


WRITER = """
import sys, numpy as np
from pathlib import Path
from model.feature_cache import FeatureCache, content_key
cache = FeatureCache(Path(sys.argv[1]), "ab" * 32)
for number in range(100000):
    keys = [content_key(b"%d-%d" % (number, row)) for row in range(50)]
    cache.add(keys, np.full((50, 64, 32), number % 1000, np.float32), np.full((50, 8), number, np.float32))
    cache.flush()
    print(number, flush=True)
"""


def test_a_kill_while_writing_leaves_only_complete_segments(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    written = -1
    for line in process.stdout:
        written = int(line)
        if written >= 5:
            break
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    cache = FeatureCache(tmp_path, HASH)
    for number in range(written + 1):
        for row in (0, 49):
            key = content_key(b"%d-%d" % (number, row))
            assert set(cache.tokens(key).ravel().tolist()) == {number % 1000}
            assert set(cache.embedding(key).tolist()) == {number}


def test_an_incomplete_segment_is_ignored(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, HASH)
    keys, tokens, embeddings = features(1, 2)
    cache.add(keys, tokens, embeddings)
    cache.flush()
    (segment,) = tmp_path.rglob("*.safetensors")
    (segment.parent / ".1.safetensors").write_bytes(segment.read_bytes()[:100])
    (segment.parent / ".1.safetensors.partial").write_bytes(b"")
    segment.unlink()
    assert keys[0] not in FeatureCache(tmp_path, HASH)


def test_errors_name_an_unwritable_folder(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(UserError, match="--cache-dir"):
        FeatureCache(blocked, HASH)
