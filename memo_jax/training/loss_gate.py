"""The loss gate of training on pseudo-labels: utterances whose loss suggests that their label is wrong are left out.

The losses of right and of wrong labels form two modes. At the end of an epoch, a mixture of two normal distributions is
fitted to the logarithms of each utterance's latest loss. In the next one, an utterance is trained on (contributes to
the loss) if its loss was at most the point between the two means at which the weighted densities cross (Han, Chen and
Qian, "Self-Supervised Speaker Verification Using Dynamic Loss-Gate and Label Correction", Interspeech 2022).
"""

from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

NEVER_SEEN = -1.0  # the loss of an utterance that has had none, or has no label
LEAST_LOSS = 1e-8  # smaller ones count as this, since zero has no logarithm
LEAST_VARIANCE = 1e-6
ITERATIONS, TOLERANCE = 1000, 1e-7  # of the fit: at most, and the change of the mean log-likelihood at which it ends


@flax.struct.dataclass
class LossGate:
    """The state of the gate.

    Attributes:
      losses: float32 [N], the latest loss of each utterance; NEVER_SEEN where there is none.
      threshold: float32, the largest loss of an utterance that is trained on in this epoch; infinite while all are.
    """

    losses: jax.Array
    threshold: jax.Array


def initial_loss_gate(utterances: int) -> LossGate:
    """Returns the gate before the first step, for a dataset with this many utterances: all are trained on."""
    return LossGate(jnp.full(utterances, NEVER_SEEN, jnp.float32), jnp.full((), jnp.inf, jnp.float32))


def passes(gate: LossGate, index: jax.Array) -> jax.Array:
    """Returns which of the utterances, int32 [B], are trained on, bool [B]; those without a loss are."""
    return gate.losses[index] <= gate.threshold


def with_losses(gate: LossGate, index: jax.Array, losses: jax.Array, labels: jax.Array) -> LossGate:
    """Returns the gate after a step in which the utterances, int32 [B], had these labels and losses, each [B]."""
    return gate.replace(losses=gate.losses.at[index].set(jnp.where(labels >= 0, losses, NEVER_SEEN)))


class Mixture(NamedTuple):
    """Two normal distributions with their weights, each [2], in the order of their means."""

    weights: np.ndarray
    means: np.ndarray
    deviations: np.ndarray


def fitted_mixture(x: np.ndarray) -> Mixture:
    """Fits two normal distributions to numbers [N ≥ 2] by expectation maximisation, starting from their two halves."""
    x = np.asarray(x, np.float64)
    low = x <= np.median(x)
    shares = np.stack([low, ~low]).astype(np.float64) if not low.all() else np.full((2, len(x)), 0.5)
    before = -np.inf
    for _ in range(ITERATIONS):
        sums = np.maximum(shares.sum(axis=1), 1e-12)
        weights, means = sums / len(x), shares @ x / sums
        variances = np.maximum((shares * np.square(x - means[:, None])).sum(axis=1) / sums, LEAST_VARIANCE)
        logs = np.log(weights / np.sqrt(2 * np.pi * variances))[:, None] - np.square(x - means[:, None]) / (
            2 * variances[:, None]
        )
        total = np.logaddexp(*logs)
        shares, likelihood = np.exp(logs - total), total.mean()
        if likelihood - before < TOLERANCE:
            break
        before = likelihood
    order = np.argsort(means, kind="stable")
    return Mixture(weights[order], means[order], np.sqrt(variances[order]))


def crossing_point(mixture: Mixture) -> float:
    """Returns where, between the means, the weighted densities are equal; infinity where they do not cross there."""
    from scipy.optimize import brentq

    def log_ratio(x):
        low, high = (
            np.log(mixture.weights / mixture.deviations) - np.square((x - mixture.means) / mixture.deviations) / 2
        )
        return low - high

    begin, end = mixture.means
    if not log_ratio(begin) > 0 > log_ratio(end):
        return float("inf")
    return float(brentq(log_ratio, begin, end, xtol=1e-12))


def gate_threshold(losses: np.ndarray) -> float:
    """Returns the largest loss of an utterance to be trained on, given all losses [N]; infinity for no limit."""
    seen = np.asarray(losses, np.float64)
    seen = seen[seen >= 0]
    if len(seen) < 2:
        return float("inf")
    return float(np.exp(crossing_point(fitted_mixture(np.log(np.maximum(seen, LEAST_LOSS))))))
