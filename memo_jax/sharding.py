"""Devices: the data mesh, who holds what, and host batches as global arrays. The only file that knows about devices."""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

DATA_AXIS = "data"


def data_mesh(devices=None) -> Mesh:
    """Returns a mesh of all (or the given) devices along one axis, over which batches are split."""
    devices = jax.devices() if devices is None else devices
    # Explicit axes, the default, refuse products over a sharded axis such as NT-Xent's z zᵀ.
    return jax.make_mesh((len(devices),), (DATA_AXIS,), axis_types=(AxisType.Auto,), devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of what every device holds whole: the train state, the banks."""
    return NamedSharding(mesh, PartitionSpec())


def split_batch(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of arrays whose first axis is split over the devices."""
    return NamedSharding(mesh, PartitionSpec(DATA_AXIS))


def global_batch(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Returns the global arrays of which each process gives its rows."""
    sharding = split_batch(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}


def replicate(mesh: Mesh, tree):
    """Returns a pytree of host arrays held whole by every device."""
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(replicated(mesh), np.asarray(x)), tree)
