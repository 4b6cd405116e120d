"""InfoNCE, and batches and negatives of hard negative synthesis."""

from __future__ import annotations

import itertools
import math

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F

from model.losses import (
    MAX_LOGIT_SCALE,
    NO_DONOR,
    LogitScale,
    cluster_batches,
    draw_donors,
    harden,
    info_nce,
    synthetic_cosines,
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
    batches = cluster_batches(embeddings, cluster_size=cluster_size, batch_size=batch_size, seed=(1, 1))
    assert sorted(np.concatenate(batches).tolist()) == list(range(pairs))
    assert len(batches) == -(-pairs // batch_size)
    assert max(len(batch) for batch in batches) <= batch_size
    if cluster_size == batch_size:
        assert max(len(batch) for batch in batches) - min(len(batch) for batch in batches) <= 1


def test_similar_queries_share_a_batch() -> None:
    """In random batches, one in seven pairs of queries would be of the same group."""

    def alike(batch: npt.NDArray[np.int64]) -> float:
        groups = batch // 8
        return float(((groups[:, None] == groups).sum() - len(batch)) / (len(batch) * (len(batch) - 1)))

    for seed in range(5):
        batches = cluster_batches(blobs(6, 8), cluster_size=8, batch_size=8, seed=(seed, 1))
        assert np.mean([alike(batch) for batch in batches]) > 0.5


def test_a_batch_has_whole_clusters() -> None:
    small, large = (cluster_batches(blobs(6, 8), cluster_size=8, batch_size=size, seed=(0, 1)) for size in (8, 16))
    assert [batch.tolist() for batch in large] == [[*small[row], *small[row + 1]] for row in (0, 2, 4)]


def test_clusters_depend_on_the_seed() -> None:
    embeddings = unit(60, 12).float().numpy()

    def drawn(seed: tuple[int, int]) -> list[list[int]]:
        return [batch.tolist() for batch in cluster_batches(embeddings, cluster_size=6, batch_size=12, seed=seed)]

    assert drawn((3, 1)) == drawn((3, 1))
    groups = [{frozenset(batch) for batch in drawn((3, epoch))} for epoch in (1, 2)]
    assert groups[0] != groups[1]


def test_donors_are_other_entities_with_other_texts() -> None:
    entity_B, text_B = np.array(ENTITIES), np.array(TEXTS)
    drawn: list[set[int]] = [set() for _ in ENTITIES]
    for seed in range(200):
        donors_BS = draw_donors(entity_B, text_B, 2, np.random.default_rng(seed))
        for row, donors in enumerate(donors_BS):
            drawn[row] |= set(donors.tolist())
            assert len({TEXTS[donor] for donor in donors if donor != NO_DONOR}) == (donors != NO_DONOR).sum()
    allowed = [
        {
            other
            for other in range(7)
            if TEXTS[other] >= 0 and TEXTS[other] != TEXTS[row] and ENTITIES[other] != ENTITIES[row]
        }
        for row in range(7)
    ]
    assert drawn == allowed


def test_fewer_texts_than_draws_leave_gaps() -> None:
    donors_BS = draw_donors(np.array([0, 1, 1]), np.array([5, 6, 6]), 4, np.random.default_rng(0))
    assert (donors_BS != NO_DONOR).sum(axis=1).tolist() == [1, 1, 1]
    assert donors_BS[1, 0] == donors_BS[2, 0] == 0
    alone = draw_donors(np.array([0, 1]), np.array([5, -1]), 3, np.random.default_rng(0))
    assert (alone != NO_DONOR).sum(axis=1).tolist() == [0, 1]


def slow_harden(
    cosines: torch.Tensor, queries: torch.Tensor, read: torch.Tensor, donors: npt.NDArray[np.int64]
) -> list[list[float]]:
    """The formula: replace v_j by its hardest synthetic negative if that is harder."""
    result = cosines.tolist()
    for i, j in itertools.product(range(len(cosines)), repeat=2):
        if ENTITIES[i] == ENTITIES[j]:
            continue
        for donor in donors[j]:
            if donor == NO_DONOR or ENTITIES[donor] == ENTITIES[i] or (TEXTS[i] >= 0 and TEXTS[donor] == TEXTS[i]):
                continue
            result[i][j] = max(result[i][j], float(queries[i] @ read[j, donor]))
    return result


@pytest.mark.parametrize("draws", [1, 3, 8])
def test_harden_equals_the_formula(draws: int) -> None:
    queries_BD, values_BD, read_BBD = unit(7, 5), unit(7, 5, seed=1), unit(7, 7, 5, seed=2)
    entity_B, text_B = np.array(ENTITIES), np.array(TEXTS)
    donors_BS = draw_donors(entity_B, text_B, draws, np.random.default_rng(draws))
    cosines_BB = queries_BD @ values_BD.T
    synthetic_BBS = synthetic_cosines(
        queries_BD, torch.from_numpy(donors_BS), lambda donor_B: read_BBD[torch.arange(7), donor_B]
    )
    hardened = harden(
        cosines_BB, synthetic_BBS, torch.from_numpy(donors_BS), torch.from_numpy(entity_B), torch.from_numpy(text_B)
    )
    slow = torch.tensor(slow_harden(cosines_BB, queries_BD, read_BBD, donors_BS), dtype=torch.float64)
    torch.testing.assert_close(hardened, slow, atol=1e-12, rtol=0)
    assert (hardened > cosines_BB).any()


def test_only_the_hardest_negative_gets_a_gradient() -> None:
    queries_BD = unit(3, 5)
    cosines_BB = (queries_BD @ unit(3, 5, seed=1).T).requires_grad_()
    synthetic_BBS = torch.full((3, 3, 2), -0.9, dtype=torch.float64)
    synthetic_BBS[0, 1, 1] = 0.95  # harder than the negative it replaces
    synthetic_BBS[1, 1, 0] = 0.99  # a positive's column
    synthetic_BBS.requires_grad_()
    entity_B, text_B = torch.tensor([0, 1, 2]), torch.tensor([0, 1, 2])
    donors_BS = torch.tensor([[1, 2], [0, 2], [0, 1]])
    scale = torch.tensor(9.0, dtype=torch.float64)
    plain = info_nce(cosines_BB, entity_B, scale)
    hard = info_nce(harden(cosines_BB, synthetic_BBS, donors_BS, entity_B, text_B), entity_B, scale)
    assert hard.item() > plain.item()
    hard.backward()  # type: ignore[no-untyped-call]
    assert synthetic_BBS.grad is not None
    assert cosines_BB.grad is not None
    assert synthetic_BBS.grad.nonzero().tolist() == [[0, 1, 1]]
    assert (cosines_BB.grad == 0).nonzero().tolist() == [[0, 1]]
