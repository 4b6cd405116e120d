"""Hard negatives in the two steps that the paper takes: batches of queries that look alike, and swapped texts.

Pure functions. The first says which pairs share a batch. The second decides, before the loss and in the cosines alone,
where an in-batch negative gives way to a synthetic one: the same image, read with the text of another entity.

Shapes: N pairs of an epoch, D embedding, K clusters, B pairs of a batch, S draws for each of them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from core.runtime import faiss

Ints = npt.NDArray[np.int64]
NO_DONOR = -1

_ITERATIONS = 10
_SAMPLE_PER_CENTROID = 64  # k-means looks at so many queries a cluster; every query is assigned
_CANDIDATES = 8  # nearest centroids that a query may ask for in one round


def cluster_batches(
    query_embeddings_ND: npt.NDArray[np.float32], *, cluster_size: int, batch_size: int, seed: tuple[int, ...]
) -> list[Ints]:
    """An epoch's batches: rows of pairs, every row once, each batch made of whole clusters of queries that look alike.

    Clusters differ in size by one pair at most and hold `cluster_size` at most, so there are as many batches as without
    them. Which clusters meet in a batch, and the order of the batches, is random. The same seed gives the same batches;
    another one other clusters, since k-means starts elsewhere.
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


def _balanced_clusters(embeddings_ND: npt.NDArray[np.float32], clusters: int, seed: int) -> Ints:
    """The cluster of each row. Sizes differ by one at most: the nearest pairs of row and centroid are served first."""
    count, dim = embeddings_ND.shape
    kmeans = faiss.Kmeans(
        dim,
        clusters,
        niter=_ITERATIONS,
        seed=seed,
        spherical=True,
        min_points_per_centroid=1,
        max_points_per_centroid=_SAMPLE_PER_CENTROID,
        gpu=faiss.get_num_gpus() > 0,
    )
    kmeans.train(embeddings_ND)
    centroids_KD = np.asarray(kmeans.centroids)

    owner_N = np.full(count, -1, np.int64)
    room_K = np.full(clusters, count // clusters, np.int64)
    larger = count % clusters  # so many clusters take one more
    while len(waiting := np.flatnonzero(owner_N < 0)):
        open_clusters = np.flatnonzero((room_K > 0) | (larger > 0) & (room_K == 0))
        index = faiss.IndexFlatIP(dim)
        index.add(centroids_KD[open_clusters])
        cosines, found = index.search(embeddings_ND[waiting], min(_CANDIDATES, len(open_clusters)))
        for place in np.argsort(-cosines, axis=None, kind="stable"):
            row, cluster = waiting[place // found.shape[1]], open_clusters[found.flat[place]]
            if owner_N[row] >= 0 or room_K[cluster] < 0 or (room_K[cluster] == 0 and larger == 0):
                continue
            larger -= int(room_K[cluster] == 0)
            room_K[cluster] -= 1
            owner_N[row] = cluster
    return owner_N


def draw_donors(entity_B: Ints, text_B: Ints, draws: int, rng: np.random.Generator) -> Ints:
    """For each pair, the rows `[B, S]` of the batch whose texts its image is to be read with; `NO_DONOR` where none is.

    `text_B` numbers the texts, equal ones alike, -1 for none. A row's donors belong to other entities, and have other
    texts than it and than one another, so one who finds fewer than `draws` of them has `NO_DONOR` in the rest.
    """
    donors_BS = np.full((len(entity_B), draws), NO_DONOR, np.int64)
    for row, (entity, text) in enumerate(zip(entity_B, text_B, strict=True)):
        able = np.flatnonzero((text_B >= 0) & (text_B != text) & (entity_B != entity))
        mixed = rng.permutation(able)
        _, first = np.unique(text_B[mixed], return_index=True)
        drawn = mixed[np.sort(first)][:draws]
        donors_BS[row, : len(drawn)] = drawn
    return donors_BS


def synthetic_cosines(
    queries_BD: torch.Tensor, donors_BS: torch.Tensor, embed: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """`[B, B, S]`: the cosine of query i with entity j's image read with the text of its donor s.

    `embed(donor_B)` gives the embeddings `[B, D]` of every image with the text of row `donor_B`. Where there is no
    donor the image is read with its own text, which `harden` leaves out.
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
    """The cosines `[B, B]` in which a negative is replaced by its hardest synthetic one, where that one is harder.

    Left as they are: the positive, other pairs of the query's entity (`info_nce` leaves them out), and whatever only a
    text of the query's own entity would have made harder. `text_B` numbers the texts as for `draw_donors`.
    """
    donor_entity_BS, donor_text_BS = entity_B[donors_BS], text_B[donors_BS]  # NO_DONOR reads some row; see `there_BS`
    there_BS = donors_BS != NO_DONOR
    own_BBS = (donor_entity_BS[None] == entity_B[:, None, None]) | (
        (donor_text_BS[None] == text_B[:, None, None]) & (text_B >= 0)[:, None, None]
    )
    hardest_BB = synthetic_BBS.masked_fill(own_BBS | ~there_BS[None], -torch.inf).amax(dim=2)
    negative_BB = entity_B[:, None] != entity_B[None, :]
    return torch.where(negative_BB & (hardest_BB > cosines_BB), hardest_BB, cosines_BB)
