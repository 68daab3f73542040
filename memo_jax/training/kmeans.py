"""Spherical k-means on the devices: the same bits for any number of devices and processes.

The sums of a cluster's members are sums of integers, which do not depend on their order.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from memo_jax.xla import sharding

BLOCK = 1024  # rows compared with all centroids at once: 100 MB of cosines with 25,000 of them
FIXED_POINT = 2**18  # a unit vector's numbers are summed in steps of 1 / FIXED_POINT
HALF = 2**9  # FIXED_POINT = HALF²: each half of such a number is summed by itself
MAX_ROWS = 2**21  # the sums of this many halves fit into 32 bits


class Clusters(NamedTuple):
    """The result of `spherical_kmeans`: unit vectors float32 [K, D], and the nearest of them to each row, int32 [N]."""

    centroids: np.ndarray
    assignment: np.ndarray


def spherical_kmeans(
    embeddings: np.ndarray, clusters: int, iterations: int, seed: int | Sequence[int], mesh: Mesh
) -> Clusters:
    """Clusters embeddings by their cosine (Dhillon and Modha, 2001).

    It starts from the directions of `clusters` rows, drawn without replacement. An iteration assigns every row to the
    nearest centroid, and makes each centroid the direction of the sum of its rows; one without rows stays. In the end,
    rows are assigned once more.

    Rows are split over the devices of the mesh, and compared with the centroids in blocks of 1,024.

    Args:
      embeddings: float [N, D], complete and the same in all processes; rows need not have unit length.
      clusters: K, at most N.
      iterations: at least 1.
      seed: of the draw, what `numpy.random.default_rng` takes: an integer, or a list of integers.
      mesh: the devices.

    Raises:
      ValueError: impossible numbers.
    """
    embeddings = np.asarray(embeddings)
    rows = len(embeddings)
    if not 1 <= clusters <= rows:
        raise ValueError(f"{clusters} clusters of {rows} embeddings: expected 1 to {rows}")
    if iterations < 1:
        raise ValueError(f"k-means of {iterations} iterations: expected at least 1")
    if rows > MAX_ROWS:
        raise ValueError(f"k-means of {rows} embeddings: at most {MAX_ROWS} can be clustered")
    chosen = np.sort(np.random.default_rng(seed).choice(rows, clusters, replace=False))
    padded = np.zeros((padded_rows(rows, mesh), embeddings.shape[1]), np.float32)
    padded[:rows] = embeddings
    split = sharding.shard_batch(mesh)
    points = jax.make_array_from_callback(padded.shape, split, lambda index: padded[index])
    start = sharding.replicate(mesh, padded[chosen])
    centroids, assignment = jitted_kmeans(mesh, iterations)(points, start, np.int32(rows))
    return Clusters(np.asarray(centroids.addressable_data(0)), np.asarray(assignment.addressable_data(0))[:rows])


def padded_rows(rows: int, mesh: Mesh) -> int:
    """Returns the number of rows with which every device has the same number of whole blocks."""
    return -(-rows // (BLOCK * mesh.size)) * BLOCK * mesh.size


@functools.cache
def jitted_kmeans(mesh: Mesh, iterations: int) -> jax.stages.Wrapped:
    """Returns the jitted function (rows [N, D], first centroids [K, D], number of rows that count) → Clusters.

    N is as `padded_rows` says. Both results are replicated on every device.
    """
    rows, whole = PartitionSpec(sharding.DATA_AXIS), PartitionSpec()
    kmeans = functools.partial(_kmeans, iterations)
    return jax.jit(jax.shard_map(kmeans, mesh=mesh, in_specs=(rows, whole, whole), out_specs=whole, check_vma=False))


def _kmeans(iterations, points, centroids, rows):
    """Runs on each device, on its own rows."""
    blocks = _unit(points).reshape(-1, BLOCK, points.shape[1])
    first = jax.lax.axis_index(sharding.DATA_AXIS) * len(points)

    def iteration(_, centroids):
        def add(i, halves):
            block = blocks[i]
            counts = (first + i * BLOCK + jnp.arange(BLOCK) < rows)[:, None]
            number = jnp.round(block * FIXED_POINT).astype(jnp.int32)
            high, low = number >> 9, number & (HALF - 1)
            nearest = _nearest(block, centroids)
            return tuple(
                of_half.at[nearest].add(jnp.where(counts, half, 0)) for of_half, half in zip(halves, (high, low))
            )

        zeros = jnp.zeros(centroids.shape, jnp.int32)
        halves = jax.lax.fori_loop(0, len(blocks), add, (zeros, zeros))
        high, low = (jax.lax.psum(half, sharding.DATA_AXIS).astype(jnp.float32) for half in halves)
        sums = high * HALF + low
        # The sum of no rows is zero, and so is that of opposite rows: neither has a direction.
        return jnp.where((sums != 0).any(axis=1, keepdims=True), _unit(sums), centroids)

    centroids = jax.lax.fori_loop(0, iterations, iteration, _unit(centroids))
    nearest = jax.lax.map(lambda block: _nearest(block, centroids), blocks).reshape(-1)
    return Clusters(centroids, jax.lax.all_gather(nearest, sharding.DATA_AXIS, tiled=True))


def _unit(x):
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def _nearest(block, centroids):
    """Returns the number of the centroid nearest to each row; of equally near ones, the first."""
    cosines = jnp.matmul(block, centroids.T, precision="highest")
    return cosines.argmax(axis=1).astype(jnp.int32)


def nearest_other_centroid(centroids: np.ndarray, mesh: Mesh) -> np.ndarray:
    """Returns, for each centroid, the number of the nearest other one, int32 [K]; with a single centroid, its own.

    Args:
      centroids: unit vectors float32 [K, D].
      mesh: the devices; each compares all centroids, in blocks.
    """
    count = len(centroids)
    padded = np.pad(centroids, ((0, -count % BLOCK), (0, 0)))
    found = jitted_nearest_other(mesh)(*sharding.replicate(mesh, (padded, np.asarray(centroids))))
    return np.asarray(found.addressable_data(0))[:count] if count > 1 else np.zeros(1, np.int32)


@functools.cache
def jitted_nearest_other(mesh: Mesh) -> jax.stages.Wrapped:
    """Returns the jitted function (centroids [K', D], padded to whole blocks, centroids [K, D]) → int32 [K']."""

    def nearest_other(padded, centroids):
        def of_block(i):
            block = jax.lax.dynamic_slice_in_dim(padded, i * BLOCK, BLOCK)
            cosines = jnp.matmul(block, centroids.T, precision="highest")
            itself = i * BLOCK + jnp.arange(BLOCK)[:, None] == jnp.arange(len(centroids))
            return jnp.where(itself, -jnp.inf, cosines).argmax(axis=1).astype(jnp.int32)

        return jax.lax.map(of_block, jnp.arange(len(padded) // BLOCK)).reshape(-1)

    return jax.jit(nearest_other, out_shardings=sharding.replicated(mesh))
