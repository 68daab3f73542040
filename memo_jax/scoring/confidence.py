"""How certain a metric is: bootstrap over speakers, for one system and for the difference of two."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from memo_jax.scoring.metrics import WeightedTrials

Metric = Callable[[WeightedTrials], float]  # lower is better


class Interval(NamedTuple):
    """Bounds of a 95 % confidence interval, in the metric's unit."""

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
    seed: int = 0,
) -> Interval:
    """Returns the 95 % confidence interval of a metric by the bootstrap over speakers (percentile interval).

    Trials are not independent: one difficult speaker spoils all trials it takes part in, so resampling trials yields
    intervals far too narrow. The independent units are speakers. A replicate draws as many speakers as there are, with
    replacement; m_s is how often speaker s was drawn, and stands for m_s different people with the same recordings. A
    nontarget trial between s and t then occurs once for every pair of such people, weight m_s·m_t. A target trial
    compares a person with themselves, so it occurs once per person, weight m_s: not m_s², since trials between two
    copies of one speaker are neither target trials (different people) nor honest nontarget trials. The expected weight
    of every target trial is 1 and of every nontarget trial 1 - 1/S, so each class keeps its proportions. A draw without
    any target or nontarget trial has no error rates and is drawn again.

    Args:
      metric: `WeightedTrials.eer`, or for example `lambda trials: trials.min_dcf(0.01)`.
      scores: [N], or [R, N] of R runs of one system (its seeds): then the interval of their mean metric, which says how
        certain it is for other speakers and not for other seeds.
      target: bool [N].
      speaker_pairs: int [N, 2], the two speakers of each trial (`trials.speaker_pairs`).
      replicates: how many draws of speakers, at least 1.
      seed: of the draws.

    Raises:
      ValueError: fewer than two speakers, only one kind of trial, pairs of another shape, or `replicates` below 1.

    Source: the subsets bootstrap of Bolle, Ratha and Pankanti, "Error analysis of pattern recognition systems", 2004.
    """
    systems = [WeightedTrials(run, target) for run in np.atleast_2d(scores)]
    return _interval(_replicates(metric, systems, target, speaker_pairs, replicates, seed).mean(axis=1))


def paired_bootstrap(
    metric: Metric,
    scores_a: ArrayLike,
    scores_b: ArrayLike,
    target: ArrayLike,
    speaker_pairs: ArrayLike,
    *,
    replicates: int = 1000,
    seed: int = 0,
) -> Comparison:
    """Compares system A with B on the same trials and the same resampled speakers: is A better?

    What makes a draw of speakers hard makes it hard for both systems, so the difference is known better than either
    metric. `p_value` is one-sided, (1 + replicates in which A is not better) / (1 + replicates): when it is small, A is
    better. Arguments and errors as for `bootstrap_interval`: of several runs of a system, the mean metric counts.
    """
    a, b = ([WeightedTrials(run, target) for run in np.atleast_2d(scores)] for scores in (scores_a, scores_b))
    difference = np.mean([metric(run) for run in a]) - np.mean([metric(run) for run in b])
    values = _replicates(metric, [*a, *b], target, speaker_pairs, replicates, seed)
    differences = values[:, : len(a)].mean(axis=1) - values[:, len(a) :].mean(axis=1)
    p_value = (1 + np.sum(differences >= 0)) / (1 + replicates)
    return Comparison(float(difference), _interval(differences), float(p_value))


def _replicates(metric, systems, target, speaker_pairs, replicates, seed) -> np.ndarray:
    """The metric of each system in each replicate [replicates, systems]."""
    pairs = np.asarray(speaker_pairs)
    if pairs.shape != (len(target), 2):
        raise ValueError(f"speaker_pairs must be [N, 2] for the {len(target):,} trials, not {list(pairs.shape)}")
    if replicates < 1:
        raise ValueError(f"replicates={replicates} must be at least 1")
    speakers, numbers = np.unique(pairs, return_inverse=True)
    if len(speakers) < 2:
        raise ValueError("the bootstrap over speakers needs trials of at least 2 speakers")
    first, second = numbers.reshape(pairs.shape).T
    second = np.where(first == second, len(speakers), second)  # the extra slot of `drawn` holds 1
    # Per system, the two speakers of its target trials and those of its nontarget trials, in the order of its weights.
    speakers_of = [[(first[rows], second[rows]) for rows in (system.targets, system.nontargets)] for system in systems]
    rng = np.random.default_rng(seed)
    drawn = np.ones(len(speakers) + 1)
    values = np.empty((replicates, len(systems)))
    for row in values:
        while True:
            draw = rng.integers(len(speakers), size=len(speakers))
            drawn[:-1] = np.bincount(draw, minlength=len(speakers))
            if all(_any_weight(drawn, *kind) for kind in speakers_of[0]):
                break
        for index, (system, kinds) in enumerate(zip(systems, speakers_of)):
            system.weigh(*(drawn[one] * drawn[other] for one, other in kinds))
            row[index] = metric(system)
    return values


def _any_weight(drawn, first, second) -> bool:
    """Whether a trial of these pairs has weight; mostly the first few tell."""
    return any(np.any(drawn[first[i : i + 1024]] * drawn[second[i : i + 1024]]) for i in range(0, len(first), 1024))


def _interval(values) -> Interval:
    return Interval(*(float(end) for end in np.quantile(values, [0.025, 0.975])))
