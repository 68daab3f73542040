"""Packed planes: [N, T, F, C] laid out as [N, T, F/p, p·C], p neighbouring frequencies side by side, for TPUs.

With 16 channels, most of a TPU's 128 lanes and of the columns of its matrix units would stay empty. A kernel that holds
p copies of the given one, and zeros elsewhere, convolves packed planes: more multiplications, but all units are full.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

LANES = 128


def packing(frequencies: int, channels: int) -> int:
    """Returns p, how many frequencies are packed: the largest divisor of `frequencies` that fits into the lanes."""
    return next(p for p in range(max(LANES // channels, 1), 0, -1) if frequencies % p == 0)


def pack(x: jax.Array, p: int) -> jax.Array:
    """Returns x [N, T, F, C] as [N, T, F/p, p·C]; the packing of an already packed x is multiplied by p."""
    return x.reshape(*x.shape[:2], x.shape[2] // p, p * x.shape[3])


def packed_convolution(x: jax.Array, kernel: jax.Array, strides: tuple[int, int]) -> jax.Array:
    """Convolves packed planes as `PlaneConv` does plain ones, and returns packed planes.

    Args:
      x: [N, T, F/p, p·C] for any p.
      kernel: [k, k, C, D], k odd.
      strides: over time and over frequency.

    Returns:
      [N, ⌈T/stride⌉, F'/q, q·D] with F' = ⌈F/stride⌉ and q = packing(F', D).
    """
    size, stride, channels, features = kernel.shape[0], strides[1], kernel.shape[2], kernel.shape[3]
    p = x.shape[3] // channels
    outputs = -(-x.shape[2] * p // stride)
    q = packing(outputs, features)
    shared = math.gcd(p, stride * q)  # each group of outputs starts at a group of inputs
    x, p = x.reshape(*x.shape[:2], -1, shared * channels), shared
    step, before = stride * q // p, -(-(size // 2) // p)
    places = _places(size, stride, p, q, before)
    groups = places.shape[1]
    wide = jnp.einsum("tfcd,fgpq->tgpcqd", kernel, places.astype(kernel.dtype))
    wide = wide.reshape(size, groups, p * channels, q * features)
    if wide.shape[:2] == (1, 1) and step == 1:
        return x[:, :: strides[0]] @ wide[0, 0]
    after = (outputs // q - 1) * step + groups - before - x.shape[2]
    return jax.lax.conv_general_dilated(
        x,
        wide,
        (strides[0], step),
        ((size // 2, size // 2), (before, after)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


@functools.cache
def _places(size: int, stride: int, p: int, q: int, before: int) -> np.ndarray:
    """Returns 1 where a tap of the kernel leads from place i of an input group to place o of an output group, else 0.

    float32 [taps, groups, p, q]; groups are counted from `before` groups ahead of the output group's first input.
    """
    groups = before + (stride * (q - 1) + size - 1 - size // 2) // p + 1
    tap, group, i, o = np.ogrid[:size, :groups, :p, :q]
    return ((group - before) * p + i == stride * o + tap - size // 2).astype(np.float32)
