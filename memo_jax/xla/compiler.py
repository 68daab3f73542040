"""Compiler options and barriers: how XLA is told what it does not find out by itself, mostly on CPUs."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

CPU_OPTIONS = {
    # Products go to the library, convolutions and sums do not: it takes the gradient of a 3×3 kernel at a third of the
    # speed of XLA's own code.
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_DOT,LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT",
    # This pass drops barriers before operations are fused and common subexpressions are merged.
    "xla_disable_hlo_passes": "cse_barrier_expander",
}


def compiler_options(platform: str) -> dict[str, Any] | None:
    """Returns the options that train steps are compiled with on a platform such as "cpu"; None for the defaults.

    Options that the installed jaxlib does not have are left out.
    """
    return dict(_known_cpu_options()) if platform == "cpu" else None


@functools.cache
def _known_cpu_options() -> tuple[tuple[str, Any], ...]:
    if _compiles_with(CPU_OPTIONS):
        return tuple(CPU_OPTIONS.items())
    return tuple((name, value) for name, value in CPU_OPTIONS.items() if _compiles_with({name: value}))


def _compiles_with(options: dict[str, Any]) -> bool:
    """Returns whether the CPU compiler accepts these options."""
    with jax.default_device(jax.devices("cpu")[0]):
        program = jax.jit(lambda: 0.0).lower()
    try:
        program.compile(options)
    except jax.errors.JaxRuntimeError as error:
        if "INVALID_ARGUMENT" not in str(error):
            raise
        return False
    return True


def run_once_options(platform: str) -> dict[str, Any] | None:
    """Returns the options for a program that runs only once; None for the defaults."""
    if platform != "cpu":
        return None
    # Optimising hundreds of small kernels takes several times as long as it saves.
    return {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@jax.jit
def materialize_on_cpu(tree: Any) -> Any:
    """Returns the pytree; on a CPU, all of it is computed once and held in memory before anything reads any of it.

    The same holds for its cotangents. XLA's CPU compiler would recompute a sum of residuals, and all sums before it, in
    every operation that reads it. Takes effect in programs compiled with `compiler_options`; elsewhere it does nothing.
    """
    return jax.lax.platform_dependent(tree, cpu=jax.lax.optimization_barrier, default=lambda tree: tree)


def materialize_on_gpu(x: jax.Array) -> jax.Array:
    """Returns the array; on an Nvidia GPU, it is computed before anything reads it. The same holds for its cotangent.

    XLA's GPU compiler aborts ("triton_tiling_propagation") where it fuses a strided slice into a product.
    """
    return jax.lax.platform_dependent(x, cuda=jax.lax.optimization_barrier, default=lambda x: x)


def each_device_its_rows(function: Callable[[jax.Array, jax.Array], jax.Array]):
    """Returns the function, of which each device computes its own rows only.

    XLA partitions Fourier transforms by itself on TPUs; on CPUs and GPUs each device would compute those of all rows.

    Args:
      function: maps arrays [N, A] and [N, B] to [N, C]; row i of the result depends on rows i alone.
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
