"""Reductions in groups: the same results as plain ones, for sizes that groups divide and for others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memo_jax.xla import reductions
from memo_jax.xla.compiler import compiler_options
from memo_jax.xla.reductions import logsumexp, mean_and_variance, over_last_axis, squared_norm, sum_from_first_axis

SHAPES = [(48, 64), (401, 7), (1, 31, 5), (6, 13, 4, 3)]


@pytest.mark.parametrize("shape", SHAPES)
def test_reductions_are_those_of_numpy(shape):
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    exact = x.astype(np.float64)
    channels = tuple(range(x.ndim - 1))
    np.testing.assert_allclose(sum_from_first_axis(jnp.asarray(x), 0), exact.sum(0), atol=1e-4)
    np.testing.assert_allclose(sum_from_first_axis(jnp.asarray(x), channels), exact.sum(channels), atol=1e-4)
    np.testing.assert_allclose(over_last_axis(jnp.sum, jnp.asarray(x)), exact.sum(-1), atol=1e-4)
    np.testing.assert_array_equal(over_last_axis(jnp.max, jnp.asarray(x)), x.max(-1))
    np.testing.assert_allclose(logsumexp(jnp.asarray(x)), np.log(np.exp(exact).sum(-1)), rtol=1e-6)
    np.testing.assert_allclose(squared_norm(jnp.asarray(x)), np.square(exact).sum(), rtol=1e-6)
    np.testing.assert_allclose(squared_norm(jnp.asarray(x.ravel())), np.square(exact).sum(), rtol=1e-6)


def test_logsumexp_of_large_numbers_is_finite():
    np.testing.assert_allclose(logsumexp(jnp.full((2, 32), 1e4)), 1e4 + np.log(32), rtol=1e-6)


def test_squares_are_not_written_before_they_are_summed():
    x = jnp.ones((256, 1024))
    compiled = jax.jit(squared_norm).lower(x).compile(compiler_options(jax.default_backend()))
    assert compiled.memory_analysis().temp_size_in_bytes < x.nbytes / 4


@pytest.mark.parametrize("shape", [(400, 6), (20, 7, 12), (5, 8, 10, 6)])
@pytest.mark.parametrize(
    ("offset", "near_mean", "tolerance"), [(0, 0, 2e-6), (30, 0, 3e-3), (30, 29, 1e-5), (3000, 2999, 1e-3)]
)
def test_mean_and_variance_of_values_far_from_zero(shape, offset, near_mean, tolerance, monkeypatch):
    """In one pass, the variance loses about 2⁻²⁴ · (1 + d²/σ²) to cancellation, d being the distance of the means.

    In a new network the running mean is 0; after a few steps it has followed. At 3,000 the values themselves have a
    thousandth of a deviation's rounding. Shapes hold one or two values of each of six channels.
    """
    x = np.random.default_rng(0).normal(offset, 1, shape).astype(np.float32)
    exact = x.astype(np.float64).reshape(-1, 6)
    for mean_first_on in (("cpu",), ()):
        monkeypatch.setattr(reductions, "MEAN_FIRST_ON", mean_first_on)
        mean, variance = jax.jit(lambda *arrays: mean_and_variance(*arrays))(x, jnp.full(6, float(near_mean)))
        np.testing.assert_allclose(mean, exact.mean(0), rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(variance, exact.var(0), rtol=tolerance)


def test_accelerators_take_mean_and_variance_in_one_pass(monkeypatch):
    def forms():
        traced = jax.jit(lambda *arrays: mean_and_variance(*arrays)).trace(jnp.ones((400, 6)), jnp.zeros(6))
        return {name: traced.lower(lowering_platforms=(name,)).as_text() for name in ("cpu", "cuda", "tpu")}

    by_default = forms()
    assert by_default["cuda"] == by_default["tpu"] != by_default["cpu"]
    monkeypatch.setattr(reductions, "MEAN_FIRST_ON", ("cuda",))
    assert forms() == by_default | {"cuda": by_default["cpu"], "cpu": by_default["cuda"]}
