"""The mesh of devices, the shardings of arrays on it, functions split over it, and host batches as global arrays."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from memo_jax.xla.devices import chosen_devices

DATA_AXIS = "data"


def data_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns a mesh of all (or the given) devices along one axis, over which batches are split.

    A device chosen by `devices.on_device` makes up the whole mesh.

    The devices of a process are neighbours, and thus its rows of a batch are, too: a batch does not depend on which
    process reads which part of it.
    """
    devices = sorted(chosen_devices() if devices is None else devices, key=lambda d: (d.process_index, d.id))
    # Explicit axes, the default, refuse products over a sharded axis such as NT-Xent's z zᵀ.
    return Mesh(np.array(devices), (DATA_AXIS,), axis_types=(AxisType.Auto,))


def on_mesh(mesh: Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the function, traced for a mesh: `each_device_its_rows` splits rows over its devices."""

    @functools.wraps(function)
    def traced(*arguments, **settings):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*arguments, **settings)

    return traced


def each_device_its_rows(
    function: Callable[[jax.Array, jax.Array], jax.Array],
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Wraps a row-wise function so that each device of the mesh in context (`on_mesh`) computes only its own rows.

    XLA splits Fourier transforms by itself on TPUs; on CPUs and GPUs each device would compute those of all rows.

    Args:
      function: maps arrays [N, A] and [N, B] to [N, C]; row i of the result depends on rows i alone. The number of
        devices divides N.
    """
    rows = PartitionSpec(DATA_AXIS)

    @functools.wraps(function)
    def by_rows(*arrays):
        if jax.sharding.get_abstract_mesh().empty:
            return function(*arrays)
        return jax.shard_map(function, in_specs=rows, out_specs=rows)(*arrays)

    return by_rows


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the replicated sharding: that of the banks, and of most of the train state."""
    return NamedSharding(mesh, PartitionSpec())


def shard_batch(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of arrays whose first axis is split over the devices."""
    return NamedSharding(mesh, PartitionSpec(DATA_AXIS))


def shard_longest_axis(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """Returns a sharding that splits the longest axis which the devices can share evenly."""
    axes = [axis for axis, size in enumerate(shape) if size % mesh.size == 0]
    if not axes:
        return replicated(mesh)
    longest = max(axes, key=lambda axis: shape[axis])
    return NamedSharding(mesh, PartitionSpec(*(DATA_AXIS if axis == longest else None for axis in range(len(shape)))))


def global_batch(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Returns global arrays assembled from the rows that each process supplies."""
    sharding = shard_batch(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}


def replicate(mesh: Mesh, tree: Any) -> Any:
    """Returns a pytree of host arrays, replicated on every device."""
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(replicated(mesh), np.asarray(x)), tree)


def on_one_device(tree: Any) -> Any:
    """Returns a pytree of replicated arrays as one device of this process holds it, for programs it runs alone."""
    return jax.tree.map(lambda x: x if x.is_fully_addressable else x.addressable_data(0), tree)


def parts_here(x: jax.Array | np.ndarray) -> list:
    """Returns the parts of an array that this process holds, each once; a host array counts as a single part."""
    return (
        list({str(shard.index): shard.data for shard in x.addressable_shards}.values())
        if isinstance(x, jax.Array)
        else [x]
    )
