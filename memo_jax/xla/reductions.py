"""Sums and maxima over many elements that CPUs, too, take in one pass over what they are of.

XLA's compiler for CPUs cuts a long reduction into windows, and then writes all that goes into it, say squares or
exponentials, to memory before. Over few rows of one axis it is made in one pass with them, and rounds less. So on a CPU
rows are first reduced in groups, and barriers keep XLA from joining what follows with that again (`compiler.py`).
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

GROUP = 16  # the most rows that are reduced at once


def _group(rows: int) -> int:
    """Returns how many of so many rows to reduce at once, a divisor of their number."""
    return max(size for size in range(1, GROUP + 1) if rows % size == 0)


@functools.partial(jax.jit, static_argnums=1)
def sum_from_first_axis(x: jax.Array, axis: int | tuple[int, ...]) -> jax.Array:
    """Returns x.sum(axis) over axes that include the first."""

    def in_groups(x):
        sums = x.reshape(-1, _group(x.shape[0]), math.prod(x.shape[1:])).sum(axis=1)
        return jax.lax.optimization_barrier(sums).reshape(-1, *x.shape[1:]).sum(axis=axis)

    return jax.lax.platform_dependent(x, cpu=in_groups, default=lambda x: x.sum(axis=axis))


def over_last_axis(reduce: Callable[..., jax.Array], x: jax.Array) -> jax.Array:
    """Returns reduce(x, axis=-1), where `reduce` is jnp.sum or jnp.max."""

    def in_groups(x):
        groups = reduce(x.reshape(*x.shape[:-1], _group(x.shape[-1]), -1), axis=-2)
        return reduce(jax.lax.optimization_barrier(groups), axis=-1)

    return jax.lax.platform_dependent(x, cpu=in_groups, default=lambda x: reduce(x, axis=-1))


def logsumexp(x: jax.Array) -> jax.Array:
    """Returns ln Σ exp x over the last axis of finite x."""
    largest = over_last_axis(jnp.max, x)
    return largest + jnp.log(over_last_axis(jnp.sum, jnp.exp(x - largest[..., None])))


@jax.jit
def squared_norm(x: jax.Array) -> jax.Array:
    """Returns the sum of the squares of all elements, float32."""
    squares = jnp.square(x.astype(jnp.float32))
    return squares.sum() if x.ndim < 2 else sum_from_first_axis(squares.reshape(-1, x.shape[-1]), (0, 1))
