"""How certain a metric is: bootstrap over speakers, for one system and for the difference of two."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from memo_jax.scoring.metrics import WeightedTrials, eer, min_dcf

Metric = Callable[[np.ndarray, np.ndarray, np.ndarray], float]  # (scores, target, weights) -> lower is better


class MinDcf(NamedTuple):
    """`min_dcf` at a prior, with costs of 1, as a metric."""

    p_target: float

    def __call__(self, scores: np.ndarray, target: np.ndarray, weights: np.ndarray) -> float:
        """Returns the cost of weighted trials."""
        return min_dcf(scores, target, self.p_target, weights=weights)


class Interval(NamedTuple):
    """Ends of a confidence interval, in the metric's unit."""

    low: float
    high: float


class Comparison(NamedTuple):
    """Metric of A minus metric of B (negative: A is better), its interval, and the p-value of "A is not better"."""

    difference: float
    interval: Interval
    p_value: float


def bootstrap_interval(
    metric: Metric,
    scores: ArrayLike,
    target: ArrayLike,
    speaker_pairs: ArrayLike,
    *,
    replicates: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Returns the confidence interval of a metric by the bootstrap over speakers (percentile interval).

    Trials are not independent: one difficult speaker spoils all trials it takes part in, so resampling trials yields
    intervals far too narrow. The independent units are speakers. A replicate draws as many speakers as there are, with
    replacement; m_s is how often speaker s was drawn, and stands for m_s different people with the same recordings. A
    nontarget trial between s and t then occurs once for every pair of such people, weight m_s·m_t. A target trial
    compares a person with themselves, so it occurs once per person, weight m_s: not m_s², since trials between two
    copies of one speaker are neither target trials (different people) nor honest nontarget trials. The expected weight
    of every target trial is 1 and of every nontarget trial 1 - 1/S, so each class keeps its proportions. A draw without
    any target or nontarget trial has no error rates and is drawn again.

    Args:
      metric: (scores, target, weights) -> number: `eer`, `MinDcf(0.01)`, `cllr`, ….
      scores: [N], or [R, N] of R runs of one system (its seeds): then the interval of their mean metric, which says how
        certain it is for other speakers and not for other seeds.
      target: bool [N].
      speaker_pairs: int [N, 2], the two speakers of each trial (`trials.speaker_pairs`).
      replicates: how many draws of speakers, at least 1.
      level: share of the replicates that the interval holds, strictly between 0 and 1.
      seed: of the draws.

    Raises:
      ValueError: fewer than two speakers, draws that never have both kinds of trial, pairs of another shape, or
        `replicates` or `level` out of range.

    Source: the subsets bootstrap of Bolle, Ratha and Pankanti, "Error analysis of pattern recognition systems", 2004.
    """
    values = _replicates(metric, [*np.atleast_2d(scores)], target, speaker_pairs, replicates, seed).mean(axis=1)
    return _percentiles(values, level)


def paired_bootstrap(
    metric: Metric,
    scores_a: ArrayLike,
    scores_b: ArrayLike,
    target: ArrayLike,
    speaker_pairs: ArrayLike,
    *,
    replicates: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Comparison:
    """Compares system A with B on the same trials and the same resampled speakers: is A better?

    What makes a draw of speakers hard makes it hard for both systems, so the difference is known better than either
    metric. `p_value` is one-sided, (1 + replicates in which A is not better) / (1 + replicates): when it is small, A is
    better. Arguments and errors as for `bootstrap_interval`: of several runs of a system, the mean metric counts.
    """
    target, ones = np.asarray(target, bool), np.ones(len(target))
    runs_a, runs_b = np.atleast_2d(scores_a), np.atleast_2d(scores_b)
    values = _replicates(metric, [*runs_a, *runs_b], target, speaker_pairs, replicates, seed)
    mean_a, mean_b = (np.mean([metric(run, target, ones) for run in runs]) for runs in (runs_a, runs_b))
    difference = mean_a - mean_b
    differences = values[:, : len(runs_a)].mean(axis=1) - values[:, len(runs_a) :].mean(axis=1)
    p_value = (1 + np.sum(differences >= 0)) / (1 + replicates)
    return Comparison(float(difference), _percentiles(differences, level), float(p_value))


def _replicates(metric, systems, target, speaker_pairs, replicates, seed) -> np.ndarray:
    """The metric of each system in each replicate [replicates, systems]."""
    target, pairs = np.asarray(target, bool), np.asarray(speaker_pairs)
    if pairs.shape != (len(target), 2):
        raise ValueError(f"speaker_pairs must be [N, 2] for the {len(target):,} trials, not {list(pairs.shape)}")
    if replicates < 1:
        raise ValueError(f"replicates={replicates} must be at least 1")
    speakers, numbers = np.unique(pairs, return_inverse=True)
    if len(speakers) < 2:
        raise ValueError("the bootstrap over speakers needs trials of at least 2 speakers")
    first, second = numbers.reshape(pairs.shape).T
    second = np.where(first == second, len(speakers), second)  # the extra slot of `drawn` holds 1
    evaluated = [_evaluator(metric, np.asarray(scores), target, first, second) for scores in systems]
    kinds = [(first[kind], second[kind]) for kind in (target, ~target)]
    rng = np.random.default_rng(seed)
    drawn = np.ones(len(speakers) + 1)
    values = np.empty((replicates, len(systems)))
    for row in values:
        for _ in range(1000):
            draw = rng.integers(len(speakers), size=len(speakers))
            drawn[:-1] = np.bincount(draw, minlength=len(speakers))
            if all(_any_weight(drawn, *kind) for kind in kinds):
                break
        else:
            raise ValueError("1000 draws of speakers in a row had no target or no nontarget trial: too few speakers")
        row[:] = [value(drawn) for value in evaluated]
    return values


def _evaluator(metric, scores, target, first, second) -> Callable[[np.ndarray], float]:
    """The metric as a function of how often each speaker was drawn; trials are sorted once for all draws."""
    if metric is eer or isinstance(metric, MinDcf):  # up to ten times as fast as the metric itself, and equal
        trials = WeightedTrials(scores, target)
        (a, b), (c, d) = ((first[rows], second[rows]) for rows in (trials.targets, trials.nontargets))

        def value(drawn):
            trials.weigh(drawn[a] * drawn[b], drawn[c] * drawn[d])
            return trials.eer() if metric is eer else trials.min_dcf(metric.p_target)

        return value
    rows = np.argsort(scores)
    scores, target, first, second = scores[rows], target[rows], first[rows], second[rows]
    return lambda drawn: metric(scores, target, drawn[first] * drawn[second])


def _any_weight(drawn, first, second) -> bool:
    """Whether a trial of these pairs has weight; mostly the first few tell."""
    return any(np.any(drawn[first[i : i + 1024]] * drawn[second[i : i + 1024]]) for i in range(0, len(first), 1024))


def _percentiles(values, level) -> Interval:
    if not 0 < level < 1:
        raise ValueError(f"level={level} must be between 0 and 1, for example 0.95")
    return Interval(*(float(v) for v in np.quantile(values, [(1 - level) / 2, (1 + level) / 2])))
