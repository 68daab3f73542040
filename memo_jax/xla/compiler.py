"""How XLA's compiler is told what it does not find out by itself; mostly for CPUs, where its defaults cost most."""

import functools

import jax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec


def compiler_options(platform: str) -> dict | None:
    """Returns the options that train steps are compiled with for a platform such as "cpu"."""
    if platform != "cpu":
        return None
    return {
        # Without the library's convolutions and sums, which XLA would use, too: it takes the gradient of a 3×3 kernel at a
        # third of the speed of XLA's own, and copies what it reads.
        "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_DOT,LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT",
        # This pass would drop barriers before operations are fused and what occurs twice is merged.
        "xla_disable_hlo_passes": "cse_barrier_expander",
        # Small operations that do not need each other then run side by side.
        "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_CONCURRENCY_OPTIMIZED",
    }


def run_once_options(platform: str) -> dict | None:
    """Returns the options for a program that runs once, which is not worth optimising."""
    if platform != "cpu":
        return None
    # Optimising hundreds of small kernels takes several times as long as it saves.
    return {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@jax.jit
def cpu_barrier(tree):
    """Returns a pytree of arrays; on a CPU all of it is computed, once, before what reads any of it, gradients likewise.

    XLA's compiler for CPUs would compute a sum of residuals, and all sums before it, again in each operation that reads
    it. Holds in what is compiled with `compiler_options`; elsewhere it is the identity.
    """
    return jax.lax.platform_dependent(tree, cpu=jax.lax.optimization_barrier, default=lambda tree: tree)


def gpu_barrier(x: jax.Array) -> jax.Array:
    """Returns an array; on an Nvidia GPU it is computed before what reads it, and the gradient likewise.

    XLA's compiler for GPUs aborts (JAX 0.11.2, "triton_tiling_propagation") where it would fuse a strided slice into the
    matrix product that reads it.
    """
    return jax.lax.platform_dependent(x, cuda=jax.lax.optimization_barrier, default=lambda x: x)


def each_device_its_rows(function):
    """Returns a function of two arrays [N, ·] → [N, ·], of which row i needs rows i alone: each device computes its own.

    For Fourier transforms, which XLA splits among TPUs by itself; among CPUs and GPUs each would do those of all rows.
    """
    split = custom_partitioning(function)

    def partition(mesh, arguments, result):
        rows = NamedSharding(mesh, PartitionSpec(*arguments[0].sharding.spec[:1], None))
        return mesh, function, rows, (rows, rows)

    split.def_partition(partition, sharding_rule="n a, n b -> n c", need_replication_factors=("a", "b", "c"))

    @functools.wraps(function)
    def by_rows(*arrays):
        return jax.lax.platform_dependent(*arrays, tpu=function, default=split)

    return by_rows
