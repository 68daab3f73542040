"""Scores as log-likelihood ratios: logistic calibration, and the metrics that judge it (Cllr, actDCF)."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import expit, logit

from memo_jax.scoring.metrics import cumulative_weights, detection_cost


class Calibration(NamedTuple):
    """Turns scores into natural-log likelihood ratios: `scale * score + offset`."""

    scale: float
    offset: float

    def __call__(self, scores: np.ndarray) -> np.ndarray:
        """Returns the log-likelihood ratios of scores."""
        return self.scale * np.asarray(scores, np.float64) + self.offset


def fit_calibration(
    scores: ArrayLike, target: ArrayLike, p_target: float = 0.5, weights: ArrayLike | None = None
) -> Calibration:
    """Fits a linear (logistic-regression) calibration, which makes a score a natural-log likelihood ratio.

    With l = scale·score + offset, minimises the prior-weighted cross-entropy, p times the mean over
    targets of log(1+e^-(l+logit p)) plus 1-p times the mean over nontargets of log(1+e^(l+logit p)). Each class counts
    as a whole, whatever its number of trials. Fit on trials other than those to be judged.

    Args:
      scores: [N], finite.
      target: bool [N].
      p_target: the prior at which calibration matters most, strictly between 0 and 1.
      weights: [N], zero or more; all one by default.

    Raises:
      ValueError: on equal or infinite scores, or see `metrics.cumulative_weights`.

    Source: Brümmer and du Preez, "Application-independent evaluation of speaker detection", 2006.
    """
    from scipy.optimize import minimize  # takes half a second to import; most commands do without it

    detection_cost(0.0, 0.0, p_target)  # checks the prior
    values, targets, nontargets = _class_weights(scores, target, weights)
    if len(values) == 1 or not np.isfinite(values[[0, -1]]).all():
        raise ValueError("calibration needs finite scores that are not all equal")
    targets, nontargets = p_target * targets / targets.sum(), (1 - p_target) * nontargets / nontargets.sum()
    total = targets + nontargets  # sums to 1
    center = total @ values
    spread = np.sqrt(total @ (values - center) ** 2)
    design = np.stack([(values - center) / spread, np.ones_like(values)])
    prior = logit(p_target)
    ridge = np.array([1e-9, 1e-9])  # without it, perfectly separated classes would have no finite solution

    def loss(theta):
        log_odds = theta @ design + prior
        return targets @ np.logaddexp(0, -log_odds) + nontargets @ np.logaddexp(0, log_odds) + ridge @ theta**2 / 2

    def gradient(theta):
        posterior = expit(theta @ design + prior)
        return design @ (total * posterior - targets) + ridge * theta

    def hessian(theta):
        posterior = expit(theta @ design + prior)
        return (design * (total * posterior * (1 - posterior))) @ design.T + np.diag(ridge)

    theta = minimize(loss, np.zeros(2), method="trust-exact", jac=gradient, hess=hessian, options={"gtol": 1e-12}).x
    scale = theta[0] / spread
    return Calibration(float(scale), float(theta[1] - scale * center))


def act_dcf(
    llrs: ArrayLike,
    target: ArrayLike,
    p_target: float,
    *,
    c_miss: float = 1,
    c_fa: float = 1,
    weights: ArrayLike | None = None,
) -> float:
    """Returns the normalised detection cost of the decisions that the log-likelihood ratios themselves imply.

    Accepts where llr >= log(c_fa (1-p) / (c_miss p)), Bayes' threshold. Never below `min_dcf`; the gap is what
    calibration loses. Can exceed 1. Arguments and errors as for `metrics.min_dcf`.
    """
    detection_cost(0.0, 0.0, p_target, c_miss, c_fa)  # checks the prior and the costs before the logarithm
    values, targets, nontargets = _class_weights(llrs, target, weights)
    accepted = values >= np.log(c_fa * (1 - p_target) / (c_miss * p_target))
    fnr = targets[~accepted].sum() / targets.sum()
    fpr = nontargets[accepted].sum() / nontargets.sum()
    return float(detection_cost(fnr, fpr, p_target, c_miss, c_fa))


def cllr(llrs: ArrayLike, target: ArrayLike, weights: ArrayLike | None = None) -> float:
    """Returns the cost of log-likelihood ratios (natural logs) over all operating points, in bits.

    0 is perfect, and 1 is uninformative. Errors as for `metrics.cumulative_weights`. Half the sum of the mean over
    targets of log2(1+e^-llr) and the mean over nontargets of log2(1+e^llr). Source: Brümmer and du Preez 2006, as
    above.
    """
    return _cllr(*_class_weights(llrs, target, weights))


def min_cllr(scores: ArrayLike, target: ArrayLike, weights: ArrayLike | None = None) -> float:
    """Returns the Cllr after the best monotone calibration there is: what discrimination alone costs.

    That calibration is found by pooling adjacent violators. Depends on the order of the scores only; in [0, 1], and
    never above `cllr`.
    """
    from scipy.optimize import isotonic_regression

    _, targets, nontargets = _class_weights(scores, target, weights)
    present = targets + nontargets > 0  # the bootstrap gives weight 0 to whole groups
    targets, nontargets = targets[present] / targets.sum(), nontargets[present] / nontargets.sum()
    posterior = isotonic_regression(targets / (targets + nontargets), weights=targets + nontargets).x
    return _cllr(logit(np.clip(posterior, 0, 1)), targets, nontargets)


def _class_weights(scores, target, weights=None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distinct scores ascending, with the weight of the targets and of the nontargets at each."""
    values, targets, nontargets = cumulative_weights(scores, target, weights)
    return values, np.diff(targets, prepend=0.0), np.diff(nontargets, prepend=0.0)


def _cllr(llrs, targets, nontargets) -> float:
    # a class without weight at an infinite llr must add 0, not 0 * inf
    of_targets = np.where(targets > 0, np.logaddexp(0, -llrs), 0) @ targets / targets.sum()
    of_nontargets = np.where(nontargets > 0, np.logaddexp(0, llrs), 0) @ nontargets / nontargets.sum()
    return float((of_targets + of_nontargets) / (2 * np.log(2)))
