"""Agglomeration against its definition over utterances and against SciPy, and measures of clusters."""

import itertools
import math

import numpy as np
import pytest
from scipy.cluster import hierarchy
from sklearn.metrics import normalized_mutual_info_score

from memo_jax.scoring import clusters

RANDOM = np.random.default_rng(0)


def unit_rows(rows: int, columns: int = 5) -> np.ndarray:
    x = RANDOM.normal(size=(rows, columns))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def partition(numbers) -> set[frozenset[int]]:
    return {frozenset(np.flatnonzero(numbers == number).tolist()) for number in np.unique(numbers)}


def merged_greedily(units, groups, count, linkage):
    """The definition in float64: the two nearest clusters of *utterances* are merged, over and over."""
    parts = [np.flatnonzero(groups == group) for group in np.unique(groups)]

    def distance(a, b):
        if linkage == "average":
            return np.mean([1 - units[i] @ units[j] for i in a for j in b])
        spread = lambda part: np.square(units[part] - units[part].mean(axis=0)).sum()  # noqa: E731
        return spread(np.concatenate([a, b])) - spread(a) - spread(b)

    while len(parts) > count:
        a, b = min(itertools.combinations(range(len(parts)), 2), key=lambda ab: distance(*(parts[i] for i in ab)))
        parts[a] = np.concatenate([parts[a], parts.pop(b)])
    return {frozenset(part.tolist()) for part in parts}


@pytest.mark.parametrize("linkage", clusters.LINKAGES)
def test_agglomeration_of_groups_is_that_of_their_utterances(linkage):
    units, groups = unit_rows(40), np.sort(RANDOM.integers(0, 15, 40))
    _, groups, weights = np.unique(groups, return_inverse=True, return_counts=True)
    means = np.stack([units[groups == group].mean(axis=0) for group in range(len(weights))])
    for count in (1, 3, 6, len(weights)):
        found = clusters.agglomerate(means, weights, count, linkage)
        assert partition(found[groups]) == merged_greedily(units, groups, count, linkage)


@pytest.mark.parametrize("linkage", clusters.LINKAGES)
def test_agglomeration_of_single_utterances_is_scipys(linkage):
    units = unit_rows(300, 8)
    metric = "cosine" if linkage == "average" else "euclidean"
    tree = hierarchy.linkage(units, linkage, metric)
    for count in (2, 7, 50):
        found = clusters.agglomerate(units, np.ones(300), count, linkage)
        assert partition(found) == partition(hierarchy.fcluster(tree, count, "maxclust"))
        assert found.dtype == np.int32 and found[0] == 0


def test_impossible_numbers_are_refused():
    units = unit_rows(4)
    for count, linkage, said in ((0, "ward", "0 clusters of 4"), (5, "ward", "5 clusters of 4"), (2, "x", "linkage")):
        with pytest.raises(ValueError, match=said):
            clusters.agglomerate(units, np.ones(4), count, linkage)
    with pytest.raises(ValueError, match="60,001 groups are too many"):
        clusters.agglomerate(np.zeros((60_001, 1)), np.ones(60_001), 2)


def test_clusters_are_numbered_by_size():
    assert clusters.numbered_by_size(np.array([7, 3, 3, 9, 9, 1])).tolist() == [2, 0, 0, 1, 1, 3]


def test_sizes_are_counted():
    sizes = {"clusters": 3, "single": 1, "smallest": 1, "median": 2.0, "mean": 2.0, "largest": 3}
    assert clusters.sizes_of(np.array([0, 0, 0, 1, 2, 2])) == sizes


def test_purity_and_mutual_information_are_their_definitions():
    assignment, labels = np.array([0, 0, 0, 1, 1, 2]), ["a", "a", "b", "b", "b", "a"]
    assert clusters.purity(assignment, labels) == pytest.approx(5 / 6)
    shares = {(0, "a"): 2 / 6, (0, "b"): 1 / 6, (1, "b"): 2 / 6, (2, "a"): 1 / 6}
    of_cluster, of_label = {0: 3 / 6, 1: 2 / 6, 2: 1 / 6}, {"a": 0.5, "b": 0.5}
    common = sum(p * math.log(p / of_cluster[c] / of_label[x]) for (c, x), p in shares.items())
    entropies = [-sum(p * math.log(p) for p in part.values()) for part in (of_cluster, of_label)]
    assert clusters.mutual_information(assignment, labels) == pytest.approx(common / np.mean(entropies))
    numbers, names = RANDOM.integers(0, 9, 200), RANDOM.integers(0, 7, 200)
    assert clusters.mutual_information(numbers, names) == normalized_mutual_info_score(names, numbers)
