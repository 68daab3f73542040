"""Packed planes: convolving them yields the same as convolving the planes, whatever the packing."""

import jax
import numpy as np
import pytest

from memo_jax.models.packed import pack, packed_convolution, packing


@pytest.mark.parametrize(
    ("frequencies", "channels", "packed", "features", "size", "strides"),
    [
        (16, 16, 8, 16, 3, (1, 1)),  # as many inside as outside
        (16, 16, 8, 32, 3, (2, 2)),  # a halved plane
        (16, 16, 8, 32, 1, (2, 2)),  # its shortcut, a matrix product
        (16, 1, 8, 16, 3, (1, 1)),  # the first convolution
        (15, 24, 5, 48, 3, (1, 2)),  # an odd number of frequencies, and another packing of the output
        (10, 128, 1, 256, 3, (2, 2)),  # channels that fill the lanes by themselves
        (10, 128, 1, 256, 1, (1, 2)),
        (12, 8, 12, 8, 5, (1, 1)),  # a wider kernel
    ],
)
def test_packed_convolution_is_the_convolution(frequencies, channels, packed, features, size, strides):
    random = np.random.default_rng(0)
    x = random.standard_normal((2, 7, frequencies, channels)).astype(np.float32)
    kernel = random.standard_normal((size, size, channels, features)).astype(np.float32)
    ours = jax.jit(packed_convolution, static_argnums=2)(pack(x, packed), kernel, strides)
    pad = (size // 2, size // 2)
    expected = jax.lax.conv_general_dilated(x, kernel, strides, (pad, pad), dimension_numbers=("NHWC", "HWIO", "NHWC"))
    side_by_side = packing(expected.shape[2], features)
    assert ours.shape[3] == side_by_side * features
    np.testing.assert_allclose(ours, pack(expected, side_by_side), atol=1e-5 * np.abs(expected).max())


def test_as_many_frequencies_as_fit_go_side_by_side():
    assert [packing(*plane) for plane in ((80, 16), (40, 32), (20, 64), (10, 128), (10, 256), (15, 24))] == [
        8,
        4,
        2,
        1,
        1,
        5,
    ]
