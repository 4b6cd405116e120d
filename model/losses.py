"""InfoNCE and hard negative synthesis, as in the paper: clustered batches and swapped texts.

Pure functions. `cluster_batches` puts pairs whose queries look alike into the same batch. `own_image_negatives` and
`other_image_negatives` replace in-batch negatives by synthetic ones: an entity's image with the text of another entity,
its donor. They work on cosines, before the loss, so `info_nce` stays a plain softmax.

Shapes: N pairs of an epoch, D embedding, K clusters, B pairs of a batch, S donors of a pair. Row i of `cosines_BB` is
query i against the entity of every pair. `entity_B` and `text_B` number the entities and texts of the pairs: equal ones
have equal numbers, and -1 is no text.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from core.arrays import Float32Array, Int64Array
from core.runtime import faiss

MAX_LOGIT_SCALE = 100.0
INITIAL_LOGIT_SCALE = 1 / 0.07

_ITERATIONS = 10
_SAMPLES_PER_CENTROID = 64  # for fitting k-means; every query is assigned
_CANDIDATES = 8  # nearest centroids tried per query and round

Embed = Callable[[torch.Tensor], torch.Tensor]
"""From the row `[B]` of each pair's donor to the embedding `[B, D]` of the pair's image with the donor's text."""


class LogitScale(nn.Module):
    """1 / temperature, learned on a log scale. Training is unstable above `MAX_LOGIT_SCALE`."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(math.log(INITIAL_LOGIT_SCALE)))

    def forward(self) -> torch.Tensor:
        return self.log_scale.exp()

    @torch.no_grad()
    def clamp_(self) -> None:
        """Clamp the parameter. Call it after each step: a clamp in `forward` would stop the gradient for good."""
        self.log_scale.clamp_(max=math.log(MAX_LOGIT_SCALE))


def info_nce(cosines_BB: torch.Tensor, entity_B: torch.Tensor, logit_scale: torch.Tensor) -> torch.Tensor:
    """Return the mean over queries of `-log softmax(logit_scale * cosines)` at the query's own pair.

    Other pairs of the same entity are left out of the softmax, since they are neither positives nor negatives.
    """
    same_BB = entity_B[:, None] == entity_B[None, :]
    others_BB = same_BB & ~torch.eye(len(entity_B), dtype=torch.bool, device=entity_B.device)
    logits_BB = (logit_scale * cosines_BB).masked_fill(others_BB, -torch.inf)
    return F.cross_entropy(logits_BB, torch.arange(len(entity_B), device=entity_B.device))


def cluster_batches(
    query_embeddings_ND: Float32Array, *, cluster_size: int, batch_size: int, seed: tuple[int, ...]
) -> list[tuple[Int64Array, Int64Array]]:
    """Return an epoch's batches, made of whole clusters of similar queries: rows of pairs, and the cluster of each row.

    Visual clustering in the paper. Every row occurs once. Cluster sizes differ by one pair at most and never exceed
    `cluster_size`, so there are as many batches as without clusters. Which clusters share a batch, and the order of
    batches, is random. The batches depend only on the seed.
    """
    rng = np.random.default_rng(seed)
    clusters = -(-len(query_embeddings_ND) // cluster_size)
    owner_N = _balanced_clusters(query_embeddings_ND, clusters, int(rng.integers(2**31)))
    members = np.split(np.argsort(owner_N, kind="stable"), np.cumsum(np.bincount(owner_N, minlength=clusters))[:-1])
    order, together = rng.permutation(clusters), batch_size // cluster_size
    batches = [
        np.concatenate([members[cluster] for cluster in order[start : start + together]])
        for start in range(0, clusters, together)
    ]
    return [(rows_B, owner_N[rows_B]) for rows_B in batches]


def _balanced_clusters(embeddings_ND: Float32Array, clusters: int, seed: int) -> Int64Array:
    """Return the cluster of each row, with sizes that differ by one at most. Assigns the nearest pairs first."""
    count, dim = embeddings_ND.shape
    kmeans = faiss.Kmeans(
        dim,
        clusters,
        niter=_ITERATIONS,
        seed=seed,
        spherical=True,
        min_points_per_centroid=1,
        max_points_per_centroid=_SAMPLES_PER_CENTROID,
        gpu=faiss.get_num_gpus() > 0,
    )
    kmeans.train(embeddings_ND)
    centroids_KD = np.asarray(kmeans.centroids)

    owner_N = np.full(count, -1, np.int64)
    room_K = np.full(clusters, count // clusters, np.int64)
    room_K[: count % clusters] += 1
    while len(waiting := np.flatnonzero(owner_N < 0)):
        open_clusters = np.flatnonzero(room_K)
        index = faiss.IndexFlatIP(dim)
        index.add(centroids_KD[open_clusters])
        cosines, found = index.search(embeddings_ND[waiting], min(_CANDIDATES, len(open_clusters)))
        for place in np.argsort(-cosines, axis=None, kind="stable"):
            row, cluster = waiting[place // found.shape[1]], open_clusters[found.flat[place]]
            if owner_N[row] < 0 and room_K[cluster]:
                owner_N[row] = cluster
                room_K[cluster] -= 1
    return owner_N


def draw_donors(
    entity_B: Int64Array, text_B: Int64Array, cluster_B: Int64Array, draws: int, rng: np.random.Generator
) -> Int64Array:
    """Return, for each pair, random donors of texts `[B, S]`, at most `draws` (`N_sync` in the paper).

    Donors are rows of the same cluster and of other entities. Their texts differ from the pair's own and from one
    another. The row itself takes the place of each missing donor, after the others.
    """
    own_B = np.arange(len(entity_B))
    donors_BS = np.repeat(own_B[:, None], min(draws, len(own_B)), axis=1)
    for row in own_B:
        allowed_B = (cluster_B == cluster_B[row]) & (entity_B != entity_B[row]) & (text_B != text_B[row])
        shuffled = rng.permutation(np.flatnonzero(allowed_B & (text_B >= 0)))
        _, first = np.unique(text_B[shuffled], return_index=True)
        drawn = shuffled[np.sort(first)][:draws]
        donors_BS[row, : len(drawn)] = drawn
    return donors_BS


def own_image_negatives(
    cosines_BB: torch.Tensor, queries_BD: torch.Tensor, donors_BS: torch.Tensor, entity_B: torch.Tensor, embed: Embed
) -> torch.Tensor:
    """Return the cosines `[B, B]`, with each query's easiest negatives replaced by synthetic ones of its own image.

    Query i meets the image of its own entity with the text of each donor. Only the text distinguishes these from the
    positive. They replace as many negatives, those with the lowest cosine to the query.
    """
    drawn_BS = donors_BS != _own_rows(donors_BS)[:, None]
    synthetic_BS = torch.stack([(queries_BD * embed(donor_B)).sum(dim=1) for donor_B in donors_BS.T], dim=1)
    same_BB = entity_B[:, None] == entity_B[None, :]
    # Donors are negatives themselves, so there are at least as many negatives as donors.
    easiest_BS = cosines_BB.detach().masked_fill(same_BB, torch.inf).argsort(dim=1)[:, : donors_BS.shape[1]]
    replaced_BS = torch.where(drawn_BS, synthetic_BS, cosines_BB.gather(1, easiest_BS))
    return cosines_BB.scatter(1, easiest_BS, replaced_BS)


def other_image_negatives(
    cosines_BB: torch.Tensor,
    queries_BD: torch.Tensor,
    donors_BS: torch.Tensor,
    entity_B: torch.Tensor,
    text_B: torch.Tensor,
    embed: Embed,
) -> torch.Tensor:
    """Return the cosines `[B, B]`, with each negative replaced by its hardest synthetic one where that is harder.

    Query i meets the image of entity j with the texts of j's donors, never with a text of its own entity. The positive
    and other pairs of the query's entity are never replaced.
    """
    different_BB = entity_B[:, None] != entity_B[None, :]
    hardest_BB = cosines_BB
    for donor_B in donors_BS.T:
        synthetic_BB = queries_BD @ embed(donor_B).T
        not_own_BB = different_BB[:, donor_B] & (text_B[:, None] != text_B[donor_B])
        harder_BB = different_BB & not_own_BB & (donor_B != _own_rows(donors_BS)) & (synthetic_BB > hardest_BB)
        hardest_BB = torch.where(harder_BB, synthetic_BB, hardest_BB)
    return hardest_BB


def _own_rows(donors_BS: torch.Tensor) -> torch.Tensor:
    return torch.arange(len(donors_BS), device=donors_BS.device)
