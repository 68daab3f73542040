"""Scores as log-likelihood ratios: logistic calibration, and the metrics that judge it (Cllr, actDCF)."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import expit, logit

from memo_jax.scoring.metrics import cumulative_counts, detection_cost, error_rates


class Calibration(NamedTuple):
    """Turns scores into natural-log likelihood ratios: `scale * score + offset`."""

    scale: float
    offset: float

    def __call__(self, scores: np.ndarray) -> np.ndarray:
        """Returns the log-likelihood ratios of scores."""
        return self.scale * np.asarray(scores, np.float64) + self.offset


def fit_calibration(scores: ArrayLike, target: ArrayLike) -> Calibration:
    """Fits a linear (logistic-regression) calibration, which makes a score a natural-log likelihood ratio.

    With l = scale·score + offset, minimises the mean over targets of log(1+e^-l) plus the mean over nontargets of
    log(1+e^l). Each class counts as a whole, whatever its number of trials. Fit on trials other than those to be
    judged.

    Args:
      scores: [N], finite.
      target: bool [N].

    Raises:
      ValueError: on equal or infinite scores, or see `metrics.cumulative_counts`.

    Source: Brümmer and du Preez, "Application-independent evaluation of speaker detection", 2006.
    """
    from scipy.optimize import minimize  # takes half a second to import; most commands do without it

    values, targets, nontargets = _shares(scores, target)
    if len(values) == 1 or not np.isfinite(values[[0, -1]]).all():
        raise ValueError("calibration needs finite scores that are not all equal")
    targets, nontargets = targets / 2, nontargets / 2
    total = targets + nontargets  # sums to 1
    center = total @ values
    spread = np.sqrt(total @ (values - center) ** 2)
    design = np.stack([(values - center) / spread, np.ones_like(values)])
    ridge = np.array([1e-9, 1e-9])  # without it, perfectly separated classes would have no finite solution

    def loss(theta):
        log_odds = theta @ design
        return targets @ np.logaddexp(0, -log_odds) + nontargets @ np.logaddexp(0, log_odds) + ridge @ theta**2 / 2

    def gradient(theta):
        posterior = expit(theta @ design)
        return design @ (total * posterior - targets) + ridge * theta

    def hessian(theta):
        posterior = expit(theta @ design)
        return (design * (total * posterior * (1 - posterior))) @ design.T + np.diag(ridge)

    theta = minimize(loss, np.zeros(2), method="trust-exact", jac=gradient, hess=hessian, options={"gtol": 1e-12}).x
    scale = theta[0] / spread
    return Calibration(float(scale), float(theta[1] - scale * center))


def act_dcf(llrs: ArrayLike, target: ArrayLike, p_target: float) -> float:
    """Returns the normalised detection cost of the decisions that the log-likelihood ratios themselves imply.

    Accepts where llr >= log((1-p) / p), Bayes' threshold. Never below `min_dcf`; the gap is what calibration loses. Can
    exceed 1. Arguments and errors as for `metrics.min_dcf`.
    """
    detection_cost(0.0, 0.0, p_target)  # checks the prior before the logarithm
    thresholds, fnr, fpr = error_rates(llrs, target)
    at = np.searchsorted(thresholds, np.log((1 - p_target) / p_target))
    return float(detection_cost(fnr[at], fpr[at], p_target))


def cllr(llrs: ArrayLike, target: ArrayLike) -> float:
    """Returns the cost of log-likelihood ratios (natural logs) over all operating points, in bits.

    0 is perfect, and 1 is uninformative. Errors as for `metrics.cumulative_counts`. Half the sum of the mean over
    targets of log2(1+e^-llr) and the mean over nontargets of log2(1+e^llr). Source: Brümmer and du Preez 2006, as
    above.
    """
    return _cllr(*_shares(llrs, target))


def min_cllr(scores: ArrayLike, target: ArrayLike) -> float:
    """Returns the Cllr after the best monotone calibration there is: what discrimination alone costs.

    That calibration is found by pooling adjacent violators. Depends on the order of the scores only; in [0, 1], and
    never above `cllr`.
    """
    from scipy.optimize import isotonic_regression

    _, targets, nontargets = _shares(scores, target)
    posterior = isotonic_regression(targets / (targets + nontargets), weights=targets + nontargets).x
    return _cllr(logit(np.clip(posterior, 0, 1)), targets, nontargets)


def _shares(scores, target) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distinct scores ascending, with the shares of all targets and of all nontargets at each."""
    values, *counts = cumulative_counts(scores, target)
    return values, *(np.diff(count, prepend=0) / count[-1] for count in counts)


def _cllr(llrs, targets, nontargets) -> float:
    # a class without trials at an infinite llr must add 0, not 0 * inf
    of_targets = np.where(targets > 0, np.logaddexp(0, -llrs), 0) @ targets
    of_nontargets = np.where(nontargets > 0, np.logaddexp(0, llrs), 0) @ nontargets
    return float((of_targets + of_nontargets) / (2 * np.log(2)))
