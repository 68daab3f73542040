"""Scores of trials and their error rates: plain numpy, nothing else.

Conventions: a higher score means "more likely the same speaker"; a trial is accepted when score >= threshold. Rates and
costs are fractions, never percent. `WeightedTrials` gives trials weights, for the bootstrap of confidence.py.
"""

import bisect
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

TRIALS_AT_ONCE = 2048  # trials per block: keeps the gathered embeddings inside the processor's cache


def unit_norm(embeddings: np.ndarray) -> np.ndarray:
    """Scales embeddings [..., D] to length 1, float32.

    Raises:
      ValueError: an embedding is zero or not finite; the message names its row.
    """
    embeddings = np.asarray(embeddings, np.float32)
    norms = np.sqrt(np.einsum("...d,...d->...", embeddings, embeddings))[..., None]
    bad = np.argwhere(~(np.isfinite(norms) & (norms > 0)))
    if bad.size:
        raise ValueError(f"the embedding in row {bad[0][0]} is zero or not finite, so it has no direction to compare")
    return embeddings / norms


def _directions(embeddings: np.ndarray) -> np.ndarray:
    """Unit embeddings [M, D], or the mean over crops of [M, R, D] unit embeddings.

    The mean of the R x R cosines between the crops of two recordings *is* the dot product of these means.
    """
    if np.ndim(embeddings) not in (2, 3):
        raise ValueError(f"embeddings must be [recordings, D] or [recordings, crops, D], not {np.shape(embeddings)}")
    units = unit_norm(embeddings)
    return units if units.ndim == 2 else units.mean(axis=1)


def subtract_mean(embeddings: np.ndarray, cohort: np.ndarray) -> np.ndarray:
    """Subtracts the mean of a cohort's raw embeddings [C, D] from embeddings [..., D]: what all recordings share.

    The mean is taken before any length normalisation, as wespeaker does with its training set.
    """
    return np.asarray(embeddings) - np.mean(cohort, axis=0, dtype=np.float64)


def cosine_scores(embeddings: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Returns the cosine of every trial, in [-1, 1], float64 [N].

    Args:
      embeddings: [M, D], or [M, R, D] for R crops per recording: then the mean over all R x R pairs of crops.
      pairs: int [N, 2], rows of the two recordings (`trial_pairs`).

    Raises:
      ValueError: embeddings of another number of axes, or one that is zero or not finite.
    """
    directions = _directions(embeddings)
    scores = np.empty(len(pairs))
    for start in range(0, len(pairs), TRIALS_AT_ONCE):
        enrol, test = pairs[start : start + TRIALS_AT_ONCE].T
        scores[start : start + TRIALS_AT_ONCE] = np.einsum("nd,nd->n", directions[enrol], directions[test])
    return np.clip(scores, -1, 1, out=scores)


def as_norm(
    scores: np.ndarray, embeddings: np.ndarray, pairs: np.ndarray, cohort: np.ndarray, *, top: int = 300
) -> np.ndarray:
    """Returns the scores after adaptive symmetric score normalisation, float64 [N].

    Each side of a trial is compared with every cohort utterance; the mean and (biased) standard deviation of its
    `top` highest cosines standardise the score; the result is the average over both sides. The cohort consists of
    utterances, since there are no speaker labels to average over: it must not contain the trial recordings.

    Args:
      scores: cosines [N].
      embeddings: [M, D], or [M, R, D].
      pairs: int [N, 2], rows of the embeddings.
      cohort: embeddings [C, D], treated (mean subtraction) exactly like `embeddings`.
      top: how many of the nearest cohort utterances count, 2 to C.

    Raises:
      ValueError: `top` out of its range, a cohort whose nearest scores are all equal, or embeddings without a
        direction.

    Source: s-norm1 with per-side selection in Matejka et al., "Analysis of Score Normalization in Multilingual
    Speaker Recognition", Interspeech 2017.
    """
    if not 2 <= top <= len(cohort):
        raise ValueError(
            f"AS-norm with the {top:,} nearest of a cohort of {len(cohort):,} recordings: choose from 2 to "
            f"{len(cohort):,}"
        )
    rows, inverse = np.unique(np.asarray(pairs), return_inverse=True)
    sides, cohort_units = _directions(np.asarray(embeddings)[rows]), _directions(cohort)
    mean, std = np.empty(len(rows)), np.empty(len(rows))
    for start in range(0, len(rows), 1024):
        block = sides[start : start + 1024] @ cohort_units.T
        nearest = np.partition(block, -top, axis=1)[:, -top:].astype(np.float64)
        mean[start : start + 1024], std[start : start + 1024] = nearest.mean(axis=1), nearest.std(axis=1)
    if not np.all(std > 1e-7):
        row = rows[np.argmin(std)]
        raise ValueError(
            f"the {top:,} highest cohort scores of embedding row {row} are equal: does the cohort hold copies?"
        )
    inverse = inverse.reshape(len(pairs), 2)
    return ((np.asarray(scores)[:, None] - mean[inverse]) / std[inverse]).mean(axis=1)


def average_scores(systems: Sequence[np.ndarray]) -> np.ndarray:
    """Averages the scores [N] of several systems, such as both branches, on the same trials; scales must be alike.

    Raises:
      ValueError: no systems, or scores of different shapes.
    """
    shapes = {np.shape(scores) for scores in systems}
    if len(shapes) != 1 or len(min(shapes)) != 1:
        raise ValueError(f"systems to average must have scores [N] of the same trials, not shapes {sorted(shapes)}")
    return np.mean(np.stack(systems), axis=0, dtype=np.float64)


# -------------------------------------------------------------------------------------------------------- metrics


class ErrorRates(NamedTuple):
    """`fnr` and `fpr` at each threshold [P], thresholds ascending: from accept-all (0, 1) to reject-all (1, 0)."""

    thresholds: np.ndarray
    fnr: np.ndarray
    fpr: np.ndarray


class OperatingPoint(NamedTuple):
    """A metric's value and the threshold on the scores that belongs to it."""

    value: float
    threshold: float


def cumulative_counts(scores: ArrayLike, target: ArrayLike) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the distinct scores, ascending [P], and how many targets and nontargets there are up to each, int64.

    Those of the score itself are included. Tied trials fall together: no threshold can tell them apart, so no order
    among them may count.

    Raises:
      ValueError: on no trials, lengths that differ, NaN scores, labels that are not true or false, and when there are
        only targets or only nontargets.
    """
    scores, target = np.asarray(scores), np.asarray(target)
    if scores.shape != target.shape or scores.ndim != 1:
        raise ValueError(f"scores and target must be arrays of one length [N], not {scores.shape} and {target.shape}")
    if not scores.size:
        raise ValueError("there are no trials to score")
    if target.dtype != bool:
        if not np.isin(target, (0, 1)).all():
            raise ValueError("target must hold true (or 1) for target trials and false (or 0) for nontarget trials")
        target = target.astype(bool)
    order = np.argsort(scores)
    scores, target = scores[order], target[order]
    if np.isnan(scores[-1]):  # NaN sorts last
        raise ValueError(f"{np.isnan(scores).sum():,} of {len(scores):,} scores are NaN")
    last = np.append(np.flatnonzero(scores[1:] > scores[:-1]), len(scores) - 1)  # the last trial of each group of ties
    targets = np.cumsum(target)[last]
    nontargets = last + 1 - targets
    for total, kind, other in ((targets[-1], "target", "nontarget"), (nontargets[-1], "nontarget", "target")):
        if not total:
            raise ValueError(f"all {len(scores):,} trials are {other} trials: error rates need {kind} trials as well")
    return scores[last], targets, nontargets


def error_rates(scores: ArrayLike, target: ArrayLike) -> ErrorRates:
    """Returns the rates of misses and of false alarms at every distinct score, and above all of them.

    These are the points of the ROC and DET curves. `fnr[i]` is the share of targets scoring below `thresholds[i]`,
    `fpr[i]` the share of nontargets at or above it; the last threshold is +inf.

    Args:
      scores: [N].
      target: bool [N].

    Raises:
      ValueError: see `cumulative_counts`.
    """
    thresholds, targets, nontargets = cumulative_counts(scores, target)
    fnr = np.append(0.0, targets / targets[-1])
    fpr = np.append(1.0, 1.0 - nontargets / nontargets[-1])
    return ErrorRates(np.append(thresholds, np.inf), fnr, fpr)


def eer_point(scores: ArrayLike, target: ArrayLike) -> OperatingPoint:
    """Returns the equal error rate (see `eer`) and its threshold: of the two next to it, that with closer rates."""
    thresholds, fnr, fpr = error_rates(scores, target)
    after = int(np.searchsorted(fnr - fpr, 0.0))  # the difference rises from -1 to 1
    before = after - 1
    value, share = _meeting_point(fnr[before], fpr[before], fnr[after], fpr[after])
    nearer = after if share >= 0.5 and np.isfinite(thresholds[after]) else before
    return OperatingPoint(float(value), float(thresholds[nearer]))


def eer(scores: ArrayLike, target: ArrayLike) -> float:
    """Returns the equal error rate, a fraction: where the ROC, its points joined by straight lines, meets FNR = FPR.

    This is the linear interpolation of the NIST SRE scoring tools and of `roc_curve` with a root finder (scikit-learn
    users); tied scores make one point. It is not the ROC convex hull's (ROCCH) EER, which is never larger. Below 0.5 is
    better than chance; a system with its sign wrong goes up to 1. Arguments and errors as for `error_rates`.
    """
    return eer_point(scores, target).value


def _meeting_point(fnr_before, fpr_before, fnr_after, fpr_after) -> tuple[float, float]:
    """Where the line between two points of the ROC meets FNR = FPR: (that rate, how far along the line it is)."""
    difference = fnr_before - fpr_before
    share = -difference / ((fnr_after - fpr_after) - difference)
    return fnr_before + share * (fnr_after - fnr_before), share


class WeightedTrials:
    """Metrics of the same trials under changing weights: sorted once, and rates are computed only where needed.

    A weight that is a whole number counts as so many copies of its trial: the results equal `eer` and `min_dcf` of the
    copies bit for bit. All weights are 1 at first. Errors as for `error_rates`.

    Attributes:
      targets, nontargets: rows of these trials in the order that their weights are given in.
    """

    def __init__(self, scores: ArrayLike, target: ArrayLike):
        scores, target = np.asarray(scores), np.asarray(target, bool)
        _, *counts = cumulative_counts(scores, target)
        self._below = [np.append(0, count) for count in counts]  # targets and nontargets below each threshold
        rows = np.argsort(scores)
        self.targets, self.nontargets = rows[target[rows]], rows[~target[rows]]
        self._sums = [np.arange(len(rows) + 1.0) for rows in (self.targets, self.nontargets)]

    def weigh(self, target_weights: np.ndarray, nontarget_weights: np.ndarray) -> None:
        """Takes weights that leave some targets and some nontargets."""
        for sums, weights in zip(self._sums, (target_weights, nontarget_weights)):
            np.cumsum(weights, out=sums[1:])

    def eer(self) -> float:
        """Returns the equal error rate, a fraction."""
        points = range(len(self._below[0]))
        after = bisect.bisect_left(points, 0.0, key=lambda i: np.subtract(*self._rates(i)))
        return float(_meeting_point(*self._rates(after - 1), *self._rates(after))[0])

    def min_dcf(self, p_target: float) -> float:
        """Returns the least detection cost at a prior."""
        return float(np.min(detection_cost(*self._rates(slice(None)), p_target)))

    def _rates(self, index):
        (targets, nontargets), (targets_below, nontargets_below) = self._sums, self._below
        fnr = targets[targets_below[index]] / targets[-1]
        return fnr, 1.0 - nontargets[nontargets_below[index]] / nontargets[-1]


def min_dcf_point(scores: ArrayLike, target: ArrayLike, p_target: float) -> OperatingPoint:
    """Returns the minimum detection cost and the threshold that reaches it; arguments and errors as of `min_dcf`."""
    thresholds, fnr, fpr = error_rates(scores, target)
    costs = detection_cost(fnr, fpr, p_target)
    best = int(np.argmin(costs))
    return OperatingPoint(float(costs[best]), float(thresholds[best]))


def min_dcf(scores: ArrayLike, target: ArrayLike, p_target: float) -> float:
    """Returns the least normalised detection cost of any threshold, in [0, 1]; 1 is the cost of not listening at all.

    Args:
      scores: [N].
      target: bool [N].
      p_target: prior probability of a target, strictly between 0 and 1 (VoxCeleb: 0.05; NIST SRE10: 0.01 or 0.001). A
        miss costs as much as a false alarm; a ratio r of their costs is the prior r p / (r p + 1 - p).

    Raises:
      ValueError: see `error_rates` and `detection_cost`.

    Source: min over thresholds of (p FNR + (1-p) FPR) / min(p, 1-p); NIST SRE plans.
    """
    return min_dcf_point(scores, target, p_target).value


def detection_cost(fnr: np.ndarray | float, fpr: np.ndarray | float, p_target: float) -> np.ndarray | float:
    """Returns the normalised detection cost at given error rates.

    Raises:
      ValueError: a prior that is not strictly between 0 and 1.
    """
    if not 0 < p_target < 1:
        raise ValueError(f"p_target={p_target} is not a probability strictly between 0 and 1")
    return (p_target * fnr + (1 - p_target) * fpr) / min(p_target, 1 - p_target)
