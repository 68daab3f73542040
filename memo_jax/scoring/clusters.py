"""Clusters of utterances: agglomeration of groups by Ward or average linkage, and how pure clusters are."""

from collections.abc import Sequence

import numpy as np

LINKAGES = ("ward", "average")
MOST_GROUPS = 60_000  # groups that are agglomerated: their distances take 14 GB


def sizes_of(assignment: np.ndarray) -> dict[str, float]:
    """Returns the number of clusters, how many have a single utterance, and statistics of their sizes.

    Args:
      assignment: the number of each utterance's cluster, int [N] with N above 0.
    """
    counts = np.unique(assignment, return_counts=True)[1]
    return {
        "clusters": len(counts),
        "single": int((counts == 1).sum()),
        "smallest": int(counts.min()),
        "median": float(np.median(counts)),
        "mean": float(counts.mean()),
        "largest": int(counts.max()),
    }


def numbered_by_size(assignment: np.ndarray) -> np.ndarray:
    """Returns the same clusters, int32 [N], numbered from 0: the largest first, of equally large ones the earliest."""
    _, first, inverse, counts = np.unique(assignment, return_index=True, return_inverse=True, return_counts=True)
    number = np.empty(len(counts), np.int32)
    number[np.lexsort((first, -counts))] = np.arange(len(counts))
    return number[inverse]


def agglomerate(means: np.ndarray, weights: np.ndarray, clusters: int, linkage: str = "ward") -> np.ndarray:
    """Merges the nearest groups of utterances until this many clusters are left.

    The distances are those of the utterances in the groups, so a large group counts for more than a small one: with
    "ward", the growth of the sum of squared distances to the means (Ward, 1963), with "average", the mean cosine
    distance of all pairs of utterances (UPGMA). The result is that of agglomerating all utterances after those of each
    group have been merged. Neighbours are merged in the order of a nearest-neighbour chain (Murtagh, 1983), whose tree
    is the same, and the distances are updated by Lance and Williams' formula. They take 4·n² bytes.

    Args:
      means: float [n, D], the mean of the *unit* embeddings of each group: for "average", its length matters.
      weights: [n], the number of utterances in each group, above 0.
      clusters: 1 to n.
      linkage: of LINKAGES.

    Returns:
      the number of each group's cluster, int32 [n], from 0 in the order of their first groups.

    Raises:
      ValueError: impossible numbers.
    """
    if linkage not in LINKAGES:
        raise ValueError(f"linkage {linkage!r}: choose {' or '.join(LINKAGES)}")
    count = len(means)
    if not 1 <= clusters <= count:
        raise ValueError(f"{clusters:,} clusters of {count:,} groups: expected 1 to {count:,}")
    if count > MOST_GROUPS:
        raise ValueError(
            f"{count:,} groups are too many to agglomerate, {4e-9 * count**2:.0f} GB of distances: make at most "
            f"{MOST_GROUPS:,} by k-means first"
        )
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    heights, pairs = _merges(_distances(means, weights, linkage), np.array(weights, np.float32), linkage)
    kept = pairs[np.argsort(heights, kind="stable")[: count - clusters]]
    joined = coo_array((np.ones(len(kept), bool), kept.T), shape=(count, count))
    return connected_components(joined, directed=False)[1].astype(np.int32)


def _distances(means, weights, linkage):
    """The distances [n, n] between groups, infinite on the diagonal."""
    means, weights = np.asarray(means, np.float32), np.asarray(weights, np.float32)
    distances = means @ means.T
    if linkage == "average":
        np.subtract(1, distances, out=distances)
    else:
        squares = np.square(means).sum(axis=1)
        distances *= -2
        distances += squares
        distances += squares[:, None]
        for row, weight in zip(distances, weights):
            row *= weight * weights / (weight + weights)
    np.fill_diagonal(distances, np.inf)
    return distances


def _merges(distances, sizes, linkage):
    """Returns the heights [n−1] of all merges and the groups [n−1, 2] that represent their sides."""
    count = len(sizes)
    alive = np.ones(count, bool)
    heights, pairs, chain = np.empty(count - 1, np.float32), np.empty((count - 1, 2), np.int64), []
    for number in range(count - 1):
        if not chain:
            chain.append(int(alive.argmax()))
        while True:
            row = distances[chain[-1]]
            nearest = int(row.argmin())
            if len(chain) > 1 and row[chain[-2]] <= row[nearest]:  # each is the other's nearest
                break
            chain.append(nearest)
        gone, kept = chain.pop(), chain.pop()
        height, removed_distances, kept_distances = distances[gone, kept], distances[gone], distances[kept]
        if linkage == "average":
            merged = (sizes[gone] * removed_distances + sizes[kept] * kept_distances) / (sizes[gone] + sizes[kept])
        else:
            merged = (sizes + sizes[gone]) * removed_distances + (sizes + sizes[kept]) * kept_distances - sizes * height
            merged /= sizes + (sizes[gone] + sizes[kept])
        merged[[gone, kept]] = np.inf
        distances[kept], distances[:, kept] = merged, merged
        distances[gone], distances[:, gone] = np.inf, np.inf
        sizes[kept] += sizes[gone]
        alive[gone] = False
        heights[number], pairs[number] = height, (gone, kept)
    return heights, pairs


def purity(assignment: np.ndarray, labels: Sequence) -> float:
    """Returns the share of utterances that have the most frequent label of their cluster, in [0, 1].

    It is 1 for clusters of single utterances: compare it for equal numbers of clusters only.
    """
    from sklearn.metrics.cluster import contingency_matrix

    return float(contingency_matrix(labels, assignment, sparse=True).max(axis=0).sum() / len(labels))


def mutual_information(assignment: np.ndarray, labels: Sequence) -> float:
    """Returns the normalised mutual information of clusters and labels, in [0, 1]: I divided by their mean entropy."""
    from sklearn.metrics import normalized_mutual_info_score

    return float(normalized_mutual_info_score(labels, assignment))
