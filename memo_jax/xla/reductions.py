"""Sums and maxima over many elements, in an order that a CPU computes in one pass over its inputs.

XLA's CPU compiler cuts a long reduction into windows, and then writes everything that goes into it, such as squares or
exponentials, to memory first. A reduction over a few rows is fused with its inputs and rounds less. On a CPU, rows are
therefore first reduced in groups, and a barrier keeps XLA from merging the two stages again (`compiler.py`).
`mean_and_variance` also saves accelerators a pass and an all-reduce.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

ROWS_AT_ONCE = 16  # the most rows that are reduced at once
MEAN_FIRST_ON = ("cpu",)  # platforms on which `mean_and_variance` reads its input twice; read when it is traced


def _group(rows: int) -> int:
    """Returns how many rows to reduce at once: the largest divisor of their number up to ROWS_AT_ONCE."""
    return max(size for size in range(1, ROWS_AT_ONCE + 1) if rows % size == 0)


@functools.partial(jax.jit, static_argnums=1)
def sum_from_first_axis(x: jax.Array, axis: int | tuple[int, ...]) -> jax.Array:
    """Returns x.sum(axis) over axes that include the first."""

    def in_groups(x):
        sums = x.reshape(-1, _group(x.shape[0]), math.prod(x.shape[1:])).sum(axis=1)
        return jax.lax.optimization_barrier(sums).reshape(-1, *x.shape[1:]).sum(axis=axis)

    return jax.lax.platform_dependent(x, cpu=in_groups, default=lambda x: x.sum(axis=axis))


def channel_sums(x: jax.Array, channels: int) -> jax.Array:
    """Returns the sums [channels] of x [..., p·channels] over all but the channels."""
    sums = x.sum(axis=0) if x.ndim < 3 else sum_from_first_axis(x, tuple(range(x.ndim - 1)))
    return sums if sums.size == channels else sums.reshape(-1, channels).sum(axis=0)


def side_by_side(values: jax.Array, x: jax.Array) -> jax.Array:
    """Returns values [C], repeated p times for x [..., p·C]."""
    return values if values.size == x.shape[-1] else jnp.tile(values, x.shape[-1] // values.size)


def mean_and_variance(x: jax.Array, near_mean: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns mean and biased variance [C] of x [..., p·C], float32, which holds p values of each channel.

    An accelerator takes both sums in one pass over x, and a sharded program in one all-reduce. They are taken around
    `near_mean` [C]: the nearer it is to the mean, the less the variance loses to cancellation. A CPU, which gains
    nothing by that, takes the mean first and rounds less. `MEAN_FIRST_ON` chooses.
    """
    mean_first = dict.fromkeys(MEAN_FIRST_ON, _mean_first)
    return jax.lax.platform_dependent(x, near_mean, default=_in_one_pass, **mean_first)


def _mean_first(x, near_mean):
    channels = near_mean.size
    count = x.size // channels
    mean = channel_sums(x, channels) / count
    return mean, channel_sums(jnp.square(x - side_by_side(mean, x)), channels) / count


def _in_one_pass(x, near_mean):
    channels = near_mean.size
    count, shifted = x.size // channels, x - side_by_side(near_mean, x)
    offset = channel_sums(shifted, channels) / count
    variance = channel_sums(jnp.square(shifted), channels) / count - jnp.square(offset)
    return near_mean + offset, jnp.maximum(variance, 0)


def over_last_axis(reduce: Callable[..., jax.Array], x: jax.Array) -> jax.Array:
    """Returns reduce(x, axis=-1), where `reduce` is jnp.sum or jnp.max."""

    def in_groups(x):
        groups = reduce(x.reshape(*x.shape[:-1], _group(x.shape[-1]), -1), axis=-2)
        return reduce(jax.lax.optimization_barrier(groups), axis=-1)

    return jax.lax.platform_dependent(x, cpu=in_groups, default=lambda x: reduce(x, axis=-1))


def logsumexp(x: jax.Array) -> jax.Array:
    """Returns ln Σ exp x [...] over the last axis of finite x [..., K]."""
    largest = over_last_axis(jnp.max, x)
    return largest + jnp.log(over_last_axis(jnp.sum, jnp.exp(x - largest[..., None])))


@jax.jit
def squared_norm(x: jax.Array) -> jax.Array:
    """Returns the sum of the squares of all elements, a float32 scalar."""
    squares = jnp.square(x.astype(jnp.float32))
    return squares.sum() if x.ndim < 2 else sum_from_first_axis(squares.reshape(-1, x.shape[-1]), (0, 1))
