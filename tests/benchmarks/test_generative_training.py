"""The generative baseline, trained for a few steps on a synthetic Symbols."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.generative.recognizer import IMAGE, prompt, train_tokenizer
from benchmarks.generative.train import IGNORED, KINDS, TinyLlava, pooled, run
from core.errors import UserError
from imaging import load_pixels
from model.encoders.tiny import load_tiny


@pytest.fixture(scope="module")
def symbols(tmp_path_factory: pytest.TempPathFactory, small_images: dict[str, bytes]) -> Path:
    """Write the files of `demo.build`: eleven entities, half of them seen, each with its image twice."""
    build = tmp_path_factory.mktemp("symbols")
    catalog, pairs, queries = [], [], []
    for position, (entity_id, data) in enumerate(small_images.items()):
        for number in range(2):
            # Decoders ignore bytes after the end of a PNG: two files show the same picture.
            (build / f"{position}-{number}.png").write_bytes(data + bytes([number]))
        catalog.append(
            {"entity_id": entity_id, "title": f"Thing {position}", "text": "A thing.", "images": [f"{position}-0.png"]}
        )
        seen = "seen" if position % 2 else "unseen"
        row = {"image": f"{position}-0.png", "entity_id": entity_id}
        queries.append({"data_id": f"q{position}", "data_split": f"test_{seen}", **row})
        if seen == "seen":
            for number in range(2):
                copy = {**row, "image": f"{position}-{number}.png"}
                pairs.append({"data_id": f"p{position}-{number}", "data_split": "train_seen", **copy})
    files = {"catalog": catalog, "pairs_train": pairs} | {f"queries_test_{kind}": queries for kind in KINDS}
    for name, rows in files.items():
        (build / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return build


def test_training_learns_the_names_of_seen_entities(symbols: Path) -> None:
    torch.set_num_threads(1)
    figures = run(symbols, steps=60, language_steps=2)
    assert figures["training_images"] == 10
    accuracy = figures["accuracy"]
    for kind in KINDS:
        assert accuracy["generative, optimised"][kind]["seen"] == 100  # the queries are training images
        assert accuracy["generative, faithful"][kind]["queries"] == 11
        # Retrieval finds unseen entities, whose images are in the catalog. Generation names only what it has learned.
        assert accuracy["generative, its retrieval alone"][kind]["unseen"] == 100


def test_missing_symbols_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="make symbols"):
        run(tmp_path, steps=1, language_steps=1)


def test_training_and_inference_use_the_same_network(small_images: dict[str, bytes]) -> None:
    """Cached patch tokens give the same embeddings as pixels through the tower."""
    encoder = load_tiny()
    tokenizer = train_tokenizer(["Giraffe", "Lion"], tokens=300)
    network = TinyLlava(
        encoder, encoder.module, scale=2.0, image_token=tokenizer.token_to_id(IMAGE),
        vocabulary=tokenizer.get_vocab_size(),
    ).eval()  # fmt: skip
    pixels = np.stack(
        [load_pixels(d, encoder.preprocessing, max_pixels=10**6) for d in list(small_images.values())[:2]]
    )
    prompt_1L = prompt(tokenizer, network.model.config.image_seq_length)
    features = encoder.encode(pixels)
    tokens_BPC = pooled(features.patch_tokens_BPC)
    cached = network.retrieve(tokens_BPC, prompt_1L)
    from imaging import normalise

    states = network.model.model(
        input_ids=prompt_1L.expand(2, -1), pixel_values=torch.from_numpy(normalise(pixels, encoder.preprocessing))
    ).last_hidden_state[:, -1]
    direct = torch.nn.functional.normalize(network.head(states), dim=1)
    torch.testing.assert_close(cached, direct, rtol=1e-4, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in network.model.model.vision_tower.parameters())
    names = torch.tensor([[5, 1, IGNORED], [6, 7, 1]])
    named, contrast = network.losses(tokens_BPC, prompt_1L, names)
    assert float(named.detach()) > 0
    assert float(contrast.detach()) == pytest.approx(0)  # one pair has no negatives
