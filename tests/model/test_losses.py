"""InfoNCE, and batches and negatives of hard negative synthesis."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F

from model.losses import (
    MAX_LOGIT_SCALE,
    LogitScale,
    cluster_batches,
    draw_donors,
    info_nce,
    other_image_negatives,
    own_image_negatives,
)


def slow_info_nce(cosines: list[list[float]], entities: list[int], scale: float) -> float:
    total = 0.0
    for i, row in enumerate(cosines):
        denominator = 0.0
        for j, cosine in enumerate(row):
            if i == j or entities[i] != entities[j]:
                denominator += math.exp(scale * cosine)
        total += -math.log(math.exp(scale * row[i]) / denominator)
    return total / len(cosines)


@pytest.mark.parametrize("entities", [[0, 1, 2, 3, 4, 5], [0, 1, 0, 2, 1, 0], [7, 7, 7, 7, 7, 8]])
def test_info_nce_equals_the_formula(entities: list[int]) -> None:
    torch.manual_seed(0)
    queries, values = (F.normalize(torch.randn(6, 5, dtype=torch.float64), dim=1) for _ in range(2))
    cosines_BB = queries @ values.T
    loss = info_nce(cosines_BB, torch.tensor(entities), torch.tensor(9.0, dtype=torch.float64))
    assert loss.item() == pytest.approx(slow_info_nce(cosines_BB.tolist(), entities, 9.0), rel=1e-9)


def test_another_pair_of_the_same_entity_gets_no_gradient() -> None:
    cosines_BB = torch.rand(3, 3, requires_grad=True)
    loss = info_nce(cosines_BB, torch.tensor([4, 9, 4]), torch.tensor(5.0))
    loss.backward()  # type: ignore[no-untyped-call]
    assert cosines_BB.grad is not None
    assert cosines_BB.grad[0, 2] == cosines_BB.grad[2, 0] == 0
    assert cosines_BB.grad[0, 1] > 0 > cosines_BB.grad[0, 0]


def test_a_batch_of_one_entity_has_no_loss_and_no_nan() -> None:
    assert info_nce(torch.rand(4, 4), torch.tensor([1, 1, 1, 1]), torch.tensor(5.0)).item() == 0


def test_the_scale_is_clamped_and_recovers() -> None:
    scale = LogitScale()
    with torch.no_grad():
        scale.log_scale.fill_(20.0)
    scale.clamp_()
    assert scale().item() == pytest.approx(MAX_LOGIT_SCALE)
    scale().backward()
    assert scale.log_scale.grad is not None
    assert scale.log_scale.grad.item() == pytest.approx(MAX_LOGIT_SCALE, rel=1e-4)


ENTITIES = [0, 1, 0, 2, 3, 4, 4]
TEXTS = [10, 11, 10, 11, -1, 12, 12]  # entities 1 and 2 share texts, entity 3 has none


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=-1)


def blobs(groups: int, each: int) -> npt.NDArray[np.float32]:
    """Return groups of queries around distant centres, one group after another."""
    rng = np.random.default_rng(0)
    centres = np.eye(groups, 16, dtype=np.float32)
    points = np.repeat(centres, each, axis=0) + rng.normal(0, 0.02, (groups * each, 16)).astype(np.float32)
    normalised: npt.NDArray[np.float32] = points / np.linalg.norm(points, axis=1, keepdims=True)
    return normalised


@pytest.mark.parametrize(
    ("pairs", "cluster_size", "batch_size"), [(64, 8, 8), (67, 8, 16), (65, 64, 64), (10, 2, 4), (5, 8, 8), (33, 4, 32)]
)
def test_every_pair_once_in_batches_of_even_clusters(pairs: int, cluster_size: int, batch_size: int) -> None:
    embeddings = unit(pairs, 12).float().numpy()
    clustered = cluster_batches(embeddings, cluster_size=cluster_size, batch_size=batch_size, seed=(1, 1))
    batches = [batch for batch, _ in clustered]
    sizes = np.unique(np.concatenate([cluster_B for _, cluster_B in clustered]), return_counts=True)[1]
    assert max(sizes) <= cluster_size
    assert max(sizes) - min(sizes) <= 1
    assert sum(len(np.unique(cluster_B)) for _, cluster_B in clustered) == len(sizes)  # none is cut
    assert sorted(np.concatenate(batches).tolist()) == list(range(pairs))
    assert len(batches) == -(-pairs // batch_size)
    assert max(len(batch) for batch in batches) <= batch_size


def test_similar_queries_share_a_batch() -> None:
    """In random batches, one in seven pairs of queries would be of the same group."""

    def alike(batch: npt.NDArray[np.int64]) -> float:
        groups = batch // 8
        return float(((groups[:, None] == groups).sum() - len(batch)) / (len(batch) * (len(batch) - 1)))

    for seed in range(5):
        batches = cluster_batches(blobs(6, 8), cluster_size=8, batch_size=8, seed=(seed, 1))
        assert np.mean([alike(batch) for batch, _ in batches]) > 0.5


def test_a_batch_has_whole_clusters() -> None:
    small, large = (cluster_batches(blobs(6, 8), cluster_size=8, batch_size=size, seed=(0, 1)) for size in (8, 16))
    assert [batch.tolist() for batch, _ in large] == [[*small[row][0], *small[row + 1][0]] for row in (0, 2, 4)]
    assert [cluster_B.tolist() for _, cluster_B in large] == [[*small[row][1], *small[row + 1][1]] for row in (0, 2, 4)]


def test_clusters_depend_on_the_seed() -> None:
    embeddings = unit(60, 12).float().numpy()

    def drawn(seed: tuple[int, int]) -> list[list[int]]:
        return [batch.tolist() for batch, _ in cluster_batches(embeddings, cluster_size=6, batch_size=12, seed=seed)]

    assert drawn((3, 1)) == drawn((3, 1))
    groups = [{frozenset(batch) for batch in drawn((3, epoch))} for epoch in (1, 2)]
    assert groups[0] != groups[1]


def test_donors_are_other_entities_of_the_cluster_with_other_texts() -> None:
    entity_B, text_B, cluster_B = np.array(ENTITIES), np.array(TEXTS), np.array([0, 0, 0, 0, 0, 0, 1])
    drawn: list[set[int]] = [set() for _ in ENTITIES]
    for seed in range(200):
        donors_BS = draw_donors(entity_B, text_B, cluster_B, 2, np.random.default_rng(seed))
        for row, donors in enumerate(donors_BS):
            drawn[row] |= set(donors.tolist()) - {row}
            assert len({TEXTS[donor] for donor in donors if donor != row}) == (donors != row).sum()
    assert drawn == [{1, 3, 5}, {0, 2, 5}, {1, 3, 5}, {0, 2, 5}, {0, 1, 2, 3, 5}, {0, 1, 2, 3}, set()]


def test_fewer_texts_than_draws_leave_gaps_at_the_end() -> None:
    zeros = np.zeros(3, np.int64)
    donors_BS = draw_donors(np.array([0, 1, 1]), np.array([5, 6, 6]), zeros, 4, np.random.default_rng(0))
    assert [donors_BS[0, 0] in (1, 2), *donors_BS[0, 1:].tolist()] == [True, 0, 0]
    assert donors_BS[1:].tolist() == [[0, 1, 1], [0, 2, 2]]


def slow_own(cosines: torch.Tensor, queries: torch.Tensor, read: torch.Tensor, donors: list[list[int]]) -> Any:
    """Query i meets its own entity's image with each donor's text, in place of its easiest negatives."""
    result = cosines.tolist()
    for i, row in enumerate(result):
        harder = [float(queries[i] @ read[i, donor]) for donor in donors[i] if donor != i]
        negatives = sorted((cosine, j) for j, cosine in enumerate(row) if ENTITIES[i] != ENTITIES[j])
        for (_, j), synthetic in zip(negatives, harder, strict=False):
            row[j] = synthetic
    return result


def slow_other(cosines: torch.Tensor, queries: torch.Tensor, read: torch.Tensor, donors: list[list[int]]) -> Any:
    """Query i meets the image of j with the texts of j's donors, in place of v_j where that is harder."""
    result = cosines.tolist()
    for i, j in itertools.product(range(len(cosines)), repeat=2):
        if ENTITIES[i] == ENTITIES[j]:
            continue
        for donor in donors[j]:
            if donor == j or ENTITIES[donor] == ENTITIES[i] or (TEXTS[i] >= 0 and TEXTS[donor] == TEXTS[i]):
                continue
            result[i][j] = max(result[i][j], float(queries[i] @ read[j, donor]))
    return result


@pytest.mark.parametrize("slow", [slow_own, slow_other])
@pytest.mark.parametrize("draws", [1, 3, 8])
def test_synthetic_negatives_equal_the_formula(slow: Callable[..., Any], draws: int) -> None:
    queries_BD, values_BD, read_BBD = unit(7, 5), unit(7, 5, seed=1), unit(7, 7, 5, seed=2)
    entity_B, text_B, cluster_B = np.array(ENTITIES), np.array(TEXTS), np.array([0, 0, 0, 0, 0, 0, 1])
    donors_BS = torch.from_numpy(draw_donors(entity_B, text_B, cluster_B, draws, np.random.default_rng(draws)))
    cosines_BB, entities, texts = queries_BD @ values_BD.T, torch.from_numpy(entity_B), torch.from_numpy(text_B)

    def embed(donor_B: torch.Tensor) -> torch.Tensor:
        return read_BBD[torch.arange(7), donor_B]

    if slow is slow_own:
        hard_BB = own_image_negatives(cosines_BB, queries_BD, donors_BS, entities, embed)
    else:
        hard_BB = other_image_negatives(cosines_BB, queries_BD, donors_BS, entities, texts, embed)
    expected = torch.tensor(slow(cosines_BB, queries_BD, read_BBD, donors_BS.tolist()), dtype=torch.float64)
    torch.testing.assert_close(hard_BB, expected, atol=1e-12, rtol=0)
    assert (hard_BB != cosines_BB).any()
    assert torch.equal(hard_BB[6], cosines_BB[6]) == (slow is slow_own)  # alone in its cluster, it has no donor


def test_only_negatives_of_the_own_image_punish_an_adaptor_that_ignores_text() -> None:
    queries_BD = unit(16, 32)
    values_BD = F.normalize(queries_BD + 0.5 * unit(16, 32, seed=1), dim=1)
    rows = torch.arange(16)
    donors_BS = torch.from_numpy(
        draw_donors(rows.numpy(), rows.numpy(), np.zeros(16, np.int64), 8, np.random.default_rng(0))
    )
    cosines_BB = queries_BD @ values_BD.T

    def ignore_text(donor_B: torch.Tensor) -> torch.Tensor:
        return values_BD

    own_BB = own_image_negatives(cosines_BB, queries_BD, donors_BS, rows, ignore_text)
    other_BB = other_image_negatives(cosines_BB, queries_BD, donors_BS, rows, rows, ignore_text)
    plain, own, other = (info_nce(each, rows, torch.tensor(14.0)).item() for each in (cosines_BB, own_BB, other_BB))
    assert own > plain + 1  # eight of sixteen logits now equal the positive's
    assert other == plain


def test_gradients_flow_through_what_replaces_and_not_through_what_is_replaced() -> None:
    cosines_BB = torch.tensor([[0.9, 0.1, 0.5], [0.2, 0.8, 0.3], [0.4, 0.1, 0.7]], requires_grad=True)
    queries_BD, read_BD = torch.eye(3), torch.full((3, 3), 0.6, requires_grad=True)
    rows, donors_BS = torch.arange(3), torch.tensor([[2], [1], [2]])  # only the first query has a donor
    hard_BB = own_image_negatives(cosines_BB, queries_BD, donors_BS, rows, lambda donor_B: read_BD)
    info_nce(hard_BB, rows, torch.tensor(9.0)).backward()  # type: ignore[no-untyped-call]
    assert cosines_BB.grad is not None
    assert read_BD.grad is not None
    assert (cosines_BB.grad == 0).nonzero().tolist() == [[0, 1]]
    assert read_BD.grad.nonzero().tolist() == [[0, 0]]
