"""The generative baseline answers with an entity of the catalog, for any weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from benchmarks.claim import verdict
from benchmarks.generative.models import SIZES, VOCABULARY, build_model, parameter_count
from benchmarks.generative.recognizer import (
    END,
    IMAGE,
    AllowedNames,
    GenerativeRecognizer,
    prompt,
    train_tokenizer,
)
from imaging import load_pixels

NAMES = [
    "Giraffe",
    "Lion",
    "Lion of Lucerne",
    "Flag of Japan",
    "Flag of Brazil",
    "Flag of Côte d’Ivoire",
    "長頸鹿",
    "Lions",
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(NAMES, tokens=320)


def recognizer(tokenizer, *, seed: int, names_in_tree: int = 300, quantised: bool = False) -> GenerativeRecognizer:
    torch.manual_seed(seed)
    model, head = build_model(
        SIZES["tiny"], image_token=tokenizer.token_to_id(IMAGE), vocabulary=tokenizer.get_vocab_size(), device="cpu"
    )
    embeddings = F.normalize(torch.randn(len(NAMES), SIZES["tiny"].retrieval_dim), dim=1)
    generative = GenerativeRecognizer(model, head, tokenizer, NAMES, embeddings, names_in_tree=names_in_tree)
    if quantised:
        generative.quantise()
    return generative


def pixels(generative: GenerativeRecognizer, images: dict[str, bytes], count: int) -> np.ndarray:
    chosen = list(images.values())[:count]
    return np.stack([load_pixels(data, generative.preprocessing, max_pixels=1_000_000) for data in chosen])


def test_tree_allows_names_and_nothing_else() -> None:
    tree = AllowedNames([[1, 2], [1, 2, 3], [4], [1, 2]], end=0)
    assert sorted(tree.allowed([])) == [1, 4]
    assert tree.allowed([1]) == [2]
    assert sorted(tree.allowed([1, 2])) == [0, 3]
    assert tree.allowed([9]) == tree.allowed([4, 0]) == [0]
    assert (tree.completed([4]), tree.completed([1]), tree.completed([1, 2, 3]), tree.completed([7])) == (
        2,
        None,
        1,
        None,
    )
    assert (tree.name([1, 2, 0, 0]), tree.name([1, 2, 3, 0]), tree.name([4, 0])) == (0, 1, 2)
    with pytest.raises(KeyError):
        tree.name([1, 0])


def test_tokenizer_spells_every_name(tokenizer) -> None:
    for name in [*NAMES, "Ωmega 🦒"]:
        assert tokenizer.decode(tokenizer.encode(name).ids) == name
    assert tokenizer.token_to_id(END) is not None


@pytest.mark.parametrize("quantised", [False, True], ids=["float32", "int8"])
@pytest.mark.parametrize("seed", range(3))
def test_every_answer_is_an_entity_of_the_tree(tokenizer, small_images, seed: int, quantised: bool) -> None:
    generative = recognizer(tokenizer, seed=seed, names_in_tree=4, quantised=quantised)
    seen = []
    retrieve = generative._retrieve
    generative._retrieve = lambda *args, **kwargs: seen.append(retrieve(*args, **kwargs)) or seen[-1]
    for each in pixels(generative, small_images, 3):
        faithful, optimised = generative.faithful(each), generative.optimised(each)
        nearest, _ = seen[-1]
        assert len(nearest) == 4
        assert faithful.row in nearest
        assert optimised.row in nearest
        assert faithful.tokens == len(tokenizer.encode(NAMES[faithful.row]).ids) + 1
        assert set(faithful.stages_ms) == {"image tower", "prefill", "retrieve", "tree", "prefill again and decode"}
        assert set(optimised.stages_ms) == {"image tower", "prefill", "retrieve", "tree", "decode"}


def test_optimised_gives_the_answer_of_greedy_generate(tokenizer, small_images) -> None:
    """Reusing keys and values and stopping early gives the answer of transformers' own greedy search."""
    generative = recognizer(tokenizer, seed=7)
    (pixels_HW3,) = pixels(generative, small_images, 1)
    tree = AllowedNames((tokenizer.encode(name).ids for name in NAMES), generative._end)
    length = generative.prompt_1L.shape[1]
    (sequence,) = generative._model.generate(
        input_ids=generative.prompt_1L, attention_mask=torch.ones_like(generative.prompt_1L),
        pixel_values=generative._pixel_values(pixels_HW3), do_sample=False, max_new_tokens=40,
        prefix_allowed_tokens_fn=lambda _, tokens: tree.allowed(tokens[length:].tolist()),
        eos_token_id=generative._end, pad_token_id=generative._end,
    )  # fmt: skip
    assert generative.optimised(pixels_HW3).row == tree.name(sequence[length:].tolist())


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [("135M", 0.12e9, 0.24e9), ("0.5B", 0.4e9, 0.5e9), ("7B", 6.7e9, 7.3e9), ("13B", 13e9, 13.6e9)],
)
def test_shapes_and_parameters_of_every_size(tokenizer, name: str, least: float, most: float) -> None:
    size = SIZES[name]
    image_token = tokenizer.token_to_id(IMAGE)
    model, head = build_model(size, image_token=image_token, dtype=torch.bfloat16, device="meta")
    assert least < parameter_count(model) < most
    features = model.get_image_features(
        pixel_values=torch.empty(2, 3, size.tower.size_px, size.tower.size_px, dtype=torch.bfloat16, device="meta")
    ).pooler_output
    assert [tuple(each.shape) for each in features] == 2 * [(576, size.width)]
    prompt_1L = prompt(tokenizer, size.tower.patches)
    assert int((prompt_1L == image_token).sum()) == 576
    embeddings = torch.empty(2, prompt_1L.shape[1], size.width, dtype=torch.bfloat16, device="meta")
    state = model.model.language_model(inputs_embeds=embeddings).last_hidden_state[:, -1]
    assert head(state).shape == (2, size.retrieval_dim)
    assert model.lm_head(state).shape == (2, VOCABULARY)


def test_the_verdict_says_what_the_ratios_say() -> None:
    ratio = {"faithful": 180.2, "optimised": 41.0, "between": 103.0}
    intervals = {"faithful": [150.0, 200.0], "optimised": [38.0, 44.0], "between": [95.0, 110.0]}
    assert verdict("float32", ratio, intervals) == [
        "float32, faithful: 180.2 times (150.0 to 200.0), at least the 100 of the claim",
        "float32, optimised: 41.0 times (38.0 to 44.0), less than the 100 of the claim",
        "float32, between: 103.0 times (95.0 to 110.0), not distinguishable from the 100 of the claim",
    ]
