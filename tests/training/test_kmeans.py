"""Spherical k-means against the definition in NumPy, and on several devices."""

import subprocess
import sys

import numpy as np
import pytest

import tiny
from memo_jax.training.kmeans import nearest_other_centroid, spherical_kmeans
from memo_jax.xla import sharding


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def definition(embeddings, clusters, iterations, seed):
    """Lloyd's iterations with cosines, in float64, starting from the same rows."""
    points = unit(embeddings.astype(np.float64))
    centroids = points[np.sort(np.random.default_rng(seed).choice(len(points), clusters, replace=False))]
    for _ in range(iterations):
        nearest = (points @ centroids.T).argmax(axis=1)
        for cluster in range(clusters):
            if (nearest == cluster).any():
                centroids[cluster] = unit(points[nearest == cluster].sum(axis=0))
    return centroids, (points @ centroids.T).argmax(axis=1)


def blobs(rows=1500, dimension=6):
    random = np.random.default_rng(0)
    centers = random.normal(0, 1, (12, dimension))
    return (3 * centers[random.integers(0, 12, rows)] + random.normal(0, 1, (rows, dimension))).astype(np.float32)


@pytest.mark.parametrize("iterations", [1, 10])
def test_it_is_lloyds_algorithm_with_cosines(iterations):
    """Over more than one block, the last one not full; rows have any length."""
    points = blobs()
    centroids, assignment = spherical_kmeans(points, 20, iterations, [3, 5], sharding.data_mesh())
    expected, nearest = definition(points, 20, iterations, [3, 5])
    np.testing.assert_allclose(centroids, expected, atol=2e-5)
    np.testing.assert_array_equal(assignment, nearest)
    assert centroids.dtype == np.float32 and assignment.dtype == np.int32


def test_a_centroid_without_rows_stays():
    """Of two equal initial centroids, the second never wins a row."""
    points = np.array([[1, 0], [1, 0], [0, 1]], np.float32)
    centroids, assignment = spherical_kmeans(points, 3, 4, 0, sharding.data_mesh())
    np.testing.assert_allclose(centroids, points, atol=1e-6)
    np.testing.assert_array_equal(assignment, [0, 0, 2])


SHARDED = """
import sys, numpy as np
sys.path.insert(0, sys.argv[1])
from memo_jax.training.kmeans import spherical_kmeans
from memo_jax.xla import sharding
import jax
from test_kmeans import blobs
assert len(jax.devices()) == 4
np.savez(sys.argv[2], *spherical_kmeans(blobs(), 20, 10, 7, sharding.data_mesh()))
"""


def test_four_devices_give_the_bits_of_one(tmp_path):
    path = tmp_path / "four.npz"
    here = str(tiny.ROOT / "tests")
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {here!r})\n" + SHARDED]
    subprocess.run([*command, f"{here}/training", path], env=tiny.environment(devices=4), check=True)
    ours = spherical_kmeans(blobs(), 20, 10, 7, sharding.data_mesh())
    with np.load(path) as file:
        for mine, theirs in zip(ours, file.values(), strict=True):
            np.testing.assert_array_equal(mine, theirs, strict=True)


def test_the_nearest_other_centroid_is_no_centroid_itself():
    centroids = unit(np.random.default_rng(1).normal(0, 1, (1100, 4))).astype(np.float32)
    cosines = centroids.astype(np.float64) @ centroids.T
    np.fill_diagonal(cosines, -2)
    found = nearest_other_centroid(centroids, sharding.data_mesh())
    rows = np.arange(len(found))
    np.testing.assert_allclose(cosines[rows, found], cosines.max(axis=1), atol=1e-6)
    assert (found != rows).all()
    assert nearest_other_centroid(centroids[:1], sharding.data_mesh()).tolist() == [0]


@pytest.mark.parametrize("clusters, iterations", [(0, 1), (1501, 1), (3, 0)])
def test_impossible_numbers_are_refused(clusters, iterations):
    with pytest.raises(ValueError, match="expected"):
        spherical_kmeans(blobs(), clusters, iterations, 0, sharding.data_mesh())
