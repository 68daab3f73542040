"""How XLA's compiler is told what it does not find out by itself; for CPUs, where its defaults cost most."""

import math
from collections.abc import Callable

import jax

GROUP = 16  # the most rows that a sum on CPUs adds up at once


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
    }


def cpu_barrier(tree):
    """Returns a pytree of arrays; on a CPU all of it is computed, once, before what reads any of it, gradients likewise.

    XLA's compiler for CPUs would compute a sum of residuals, and all sums before it, again in each operation that reads
    it. Holds in what is compiled with `compiler_options`; elsewhere it is the identity.
    """
    return jax.lax.platform_dependent(tree, cpu=jax.lax.optimization_barrier, default=lambda tree: tree)


# XLA's compiler for CPUs cuts a long sum or maximum into windows, and then writes all that goes into it, say a square or an
# exponential, to memory before. Over few rows of one axis it is made in one pass, and a sum rounds less than by windows. The
# barriers keep what follows from being joined with it again.
def sum_from_first_axis(x: jax.Array, axis: int | tuple[int, ...]) -> jax.Array:
    """Returns x.sum(axis) over axes that include the first; on a CPU over groups of its rows to begin with."""

    def in_groups(x):
        sums = x.reshape(-1, _group(x.shape[0]), math.prod(x.shape[1:])).sum(axis=1)
        return jax.lax.optimization_barrier(sums).reshape(-1, *x.shape[1:]).sum(axis=axis)

    return jax.lax.platform_dependent(x, cpu=in_groups, default=lambda x: x.sum(axis=axis))


def over_last_axis(reduce: Callable[..., jax.Array], x: jax.Array) -> jax.Array:
    """Returns reduce(x, axis=-1), where `reduce` is jnp.sum or jnp.max; on a CPU over groups to begin with."""

    def in_groups(x):
        groups = reduce(x.reshape(*x.shape[:-1], _group(x.shape[-1]), -1), axis=-2)
        return reduce(jax.lax.optimization_barrier(groups), axis=-1)

    return jax.lax.platform_dependent(x, cpu=in_groups, default=lambda x: reduce(x, axis=-1))


def _group(size):
    """How many of so many rows to take at once: a divisor of their number."""
    return max(group for group in range(1, GROUP + 1) if size % group == 0)


def squared_norm(x: jax.Array) -> jax.Array:
    """Returns the sum of the squares of all elements, float32."""
    squares = jax.numpy.square(x.astype(jax.numpy.float32))
    return squares.sum() if x.ndim < 2 else sum_from_first_axis(squares.reshape(-1, x.shape[-1]), (0, 1))
