"""InfoNCE and hard negative synthesis, as in the paper: clustered batches and swapped texts.

Pure functions. `cluster_batches` puts pairs whose queries look alike into the same batch. `harden` replaces in-batch
negatives by harder synthetic ones: an entity's image read with the text of another entity. It works on cosines, before
the loss, so `info_nce` stays a plain softmax.

Shapes: N pairs of an epoch, D embedding, K clusters, B pairs of a batch, S draws per pair. Row i of `cosines_BB` is
query i against the entity of every pair.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from core.arrays import Float32Array, Int64Array
from core.runtime import faiss

NO_DONOR = -1
MAX_LOGIT_SCALE = 100.0
INITIAL_LOGIT_SCALE = 1 / 0.07

_ITERATIONS = 10
_SAMPLES_PER_CENTROID = 64  # for fitting k-means; every query is assigned
_CANDIDATES = 8  # nearest centroids tried per query and round


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

    `entity_B` numbers each pair's entity. Other pairs of the same entity are left out of the softmax, since they are
    neither positives nor negatives.
    """
    same_BB = entity_B[:, None] == entity_B[None, :]
    others_BB = same_BB & ~torch.eye(len(entity_B), dtype=torch.bool, device=entity_B.device)
    logits_BB = (logit_scale * cosines_BB).masked_fill(others_BB, -torch.inf)
    return F.cross_entropy(logits_BB, torch.arange(len(entity_B), device=entity_B.device))


def cluster_batches(
    query_embeddings_ND: Float32Array, *, cluster_size: int, batch_size: int, seed: tuple[int, ...]
) -> list[Int64Array]:
    """Return an epoch's batches: rows of pairs, every row once, each batch made of whole clusters of similar queries.

    Visual clustering in the paper. Cluster sizes differ by one pair at most and never exceed `cluster_size`, so there
    are as many batches as without clusters. Which clusters share a batch, and the order of batches, is random. The
    batches depend only on the seed.
    """
    rng = np.random.default_rng(seed)
    clusters = -(-len(query_embeddings_ND) // cluster_size)
    owner_N = _balanced_clusters(query_embeddings_ND, clusters, int(rng.integers(2**31)))
    members = np.split(np.argsort(owner_N, kind="stable"), np.cumsum(np.bincount(owner_N, minlength=clusters))[:-1])
    order, together = rng.permutation(clusters), batch_size // cluster_size
    return [
        np.concatenate([members[cluster] for cluster in order[start : start + together]])
        for start in range(0, clusters, together)
    ]


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


def draw_donors(entity_B: Int64Array, text_B: Int64Array, draws: int, rng: np.random.Generator) -> Int64Array:
    """Return, for each pair, the rows `[B, S]` whose texts replace its own in synthetic negatives (`N_sync` draws).

    `text_B` numbers the texts: equal texts have equal numbers, and -1 is no text. A row's donors are of other entities,
    and their texts differ from its own and from one another. Missing donors are `NO_DONOR`.
    """
    donors_BS = np.full((len(entity_B), draws), NO_DONOR, np.int64)
    for row, (entity, text) in enumerate(zip(entity_B, text_B, strict=True)):
        candidates = np.flatnonzero((text_B >= 0) & (text_B != text) & (entity_B != entity))
        shuffled = rng.permutation(candidates)
        _, first = np.unique(text_B[shuffled], return_index=True)
        drawn = shuffled[np.sort(first)][:draws]
        donors_BS[row, : len(drawn)] = drawn
    return donors_BS


def synthetic_cosines(
    queries_BD: torch.Tensor, donors_BS: torch.Tensor, embed: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Return `[B, B, S]`: the cosine of query i with entity j's image read with the text of its donor s.

    `embed(donor_B)` returns the embeddings `[B, D]` of every image with the text of row `donor_B`. An image without a
    donor is read with its own text, which `harden` ignores.
    """
    own_B = torch.arange(len(donors_BS), device=donors_BS.device)
    draws = [embed(torch.where(donor_B == NO_DONOR, own_B, donor_B)) for donor_B in donors_BS.T]
    return torch.stack([queries_BD @ embeddings_BD.T for embeddings_BD in draws], dim=2)


def harden(
    cosines_BB: torch.Tensor,
    synthetic_BBS: torch.Tensor,
    donors_BS: torch.Tensor,
    entity_B: torch.Tensor,
    text_B: torch.Tensor,
) -> torch.Tensor:
    """Return the cosines `[B, B]`, each negative replaced by its hardest synthetic negative where that is harder.

    It never replaces the positive or other pairs of the query's entity, and never uses a text of the query's own
    entity. `text_B` numbers the texts as in `draw_donors`.
    """
    donor_entity_BS, donor_text_BS = entity_B[donors_BS], text_B[donors_BS]  # meaningless at NO_DONOR, masked below
    drawn_BS = donors_BS != NO_DONOR
    own_BBS = (donor_entity_BS[None] == entity_B[:, None, None]) | (
        (donor_text_BS[None] == text_B[:, None, None]) & (text_B >= 0)[:, None, None]
    )
    hardest_BB = synthetic_BBS.masked_fill(own_BBS | ~drawn_BS[None], -torch.inf).amax(dim=2)
    negative_BB = entity_B[:, None] != entity_B[None, :]
    return torch.where(negative_BB & (hardest_BB > cosines_BB), hardest_BB, cosines_BB)
