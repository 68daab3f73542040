"""Compiler options and optimisation barriers, mostly for XLA's CPU compiler."""

import functools
from collections.abc import Mapping
from typing import Any

import jax

from memo_jax.log import say

CPU_OPTIONS = {
    # Matrix products go to the library, convolutions and sums do not: the library computes the gradient of a 3×3
    # kernel at a third of the speed of XLA's own code.
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_DOT,LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT",
    # In jaxlib 0.10 this pass drops barriers before operations are fused and common subexpressions are merged.
    "xla_disable_hlo_passes": "cse_barrier_expander",
}
if jax.__version_info__ >= (0, 11):
    # A Fourier transform on a thread of the pool can deadlock while it waits for other threads of the pool
    # (openxla/xla issue 46345). This runs each transform, but also each convolution, on one thread.
    CPU_OPTIONS["xla_cpu_multi_thread_eigen"] = False
RUN_ONCE_CPU_OPTIONS = {
    # Optimising hundreds of small kernels takes several times as long as it saves.
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}


def compiler_options(platform: str) -> dict[str, Any] | None:
    """Returns the options that train steps are compiled with on a platform such as "cpu"; None for the defaults."""
    return known_options(CPU_OPTIONS) if platform == "cpu" else None


def run_once_options(platform: str) -> dict[str, Any] | None:
    """Returns the options for a program that runs only once; None for the defaults."""
    return known_options(RUN_ONCE_CPU_OPTIONS) if platform == "cpu" else None


def known_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options that the installed jaxlib knows; reports those that it does not, once."""
    return dict(_known_options(tuple(options.items())))


@functools.cache
def _known_options(options: tuple[tuple[str, Any], ...]) -> tuple[tuple[str, Any], ...]:
    if _compiles_with(dict(options)):
        return options
    known = tuple((name, value) for name, value in options if _compiles_with({name: value}))
    for name, _ in options:
        if name not in dict(known):
            say(f"this jaxlib does not know the compiler option {name}: continuing without it")
    return known


def _compiles_with(options: dict[str, Any]) -> bool:
    """Returns whether XLA accepts these options."""
    try:
        device = jax.local_devices(backend="cpu")[0]  # all of XLA's own compilers share one list of options
    except RuntimeError:  # JAX_PLATFORMS leaves the CPU out
        device = jax.local_devices()[0]
    with jax.default_device(device):
        program = jax.jit(lambda: 0.0).lower()
    try:
        program.compile(options)
    except jax.errors.JaxRuntimeError as error:
        if "INVALID_ARGUMENT" not in str(error):
            raise
        return False
    return True


@jax.jit
def materialize_on_cpu(tree: Any) -> Any:
    """Returns the pytree; on a CPU, all of it is computed once and held in memory before anything reads any of it.

    The same holds for its cotangents. XLA's CPU compiler would recompute a sum of residuals, and all sums before it, in
    every operation that reads it, likewise a schedule's cosine in the update of every array; and it would hold the
    gradients of all heads at once. Takes effect in programs compiled with `compiler_options`; elsewhere does nothing.
    """
    return jax.lax.platform_dependent(tree, cpu=jax.lax.optimization_barrier, default=lambda tree: tree)


def finish_sums_over_processes(tree: Any) -> Any:
    """Returns the pytree. On CPUs, all of it is computed before any operation that depends on it starts an all-reduce.

    Gloo, the CPU collectives backend, mixes up the all-reduces of two losses that are in flight at once.
    """
    return materialize_on_cpu(tree)


def materialize_on_gpu(x: jax.Array) -> jax.Array:
    """Returns the array; on an Nvidia GPU, it is computed before anything reads it. The same holds for its cotangent.

    XLA's GPU compiler aborts ("triton_tiling_propagation") where it fuses a strided slice into a product.
    """
    return jax.lax.platform_dependent(x, cuda=jax.lax.optimization_barrier, default=lambda x: x)
