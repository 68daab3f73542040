"""The bootstrap over speakers: its weights, its coverage, and what it says about two systems."""

import itertools

import numpy as np
import pytest

from memo_jax.scoring.confidence import bootstrap_interval, paired_bootstrap
from memo_jax.scoring.metrics import WeightedTrials, eer, min_dcf


def population(seed, speakers=30, recordings=3, spread=1.0):
    """All pairs of recordings; scores include an effect of each speaker, so that one speaker's trials fail together."""
    rng = np.random.default_rng(seed)
    owner = np.repeat(np.arange(speakers), recordings)
    first, second = np.array(list(itertools.combinations(range(len(owner)), 2))).T
    pairs = np.stack([owner[first], owner[second]], axis=1)
    target = pairs[:, 0] == pairs[:, 1]
    wolf, goat = spread * rng.normal(size=(2, speakers))
    effect = np.where(target, goat[pairs[:, 0]], wolf[pairs].mean(axis=1))
    return 2.5 * target + effect + rng.normal(size=len(target)), target, pairs


def test_interval_holds_the_metric_and_is_reproducible():
    scores, target, pairs = population(0)
    interval = bootstrap_interval(WeightedTrials.eer, scores, target, pairs, replicates=200)
    assert 0 < interval.low < eer(scores, target) < interval.high < 0.5
    assert interval == bootstrap_interval(WeightedTrials.eer, scores, target, pairs, replicates=200)
    assert interval != bootstrap_interval(WeightedTrials.eer, scores, target, pairs, replicates=200, seed=1)


def test_weights_follow_the_drawn_speakers(monkeypatch):
    """With two speakers, the only draw that keeps a nontarget trial takes both once, so every weight must be 1.

    With more, target trials weigh m and nontarget trials the product of both m's, whatever the labels of speakers.
    """
    seen, weigh = [], WeightedTrials.weigh

    def spy(trials, of_targets, of_nontargets):
        weights = np.empty(len(of_targets) + len(of_nontargets))
        weights[trials.targets], weights[trials.nontargets] = of_targets, of_nontargets
        seen.append(weights)
        weigh(trials, of_targets, of_nontargets)

    monkeypatch.setattr(WeightedTrials, "weigh", spy)
    pairs, target = np.array([[7, 7], [7, 3], [3, 3]]), np.array([True, False, True])
    bootstrap_interval(WeightedTrials.eer, np.arange(3.0), target, pairs, replicates=20)
    assert len(seen) == 20 and all((weights == 1).all() for weights in seen)
    seen.clear()
    speakers = 12
    pairs = np.array([(a, b) for a in range(speakers) for b in range(a, speakers)])
    target = pairs[:, 0] == pairs[:, 1]
    scores = np.random.default_rng(0).normal(size=len(pairs))
    bootstrap_interval(WeightedTrials.eer, scores, target, pairs, replicates=50)
    assert len(seen) == 50
    for weights in seen:
        drawn = weights[target]
        assert drawn.sum() == speakers
        one, other = drawn[pairs].T
        np.testing.assert_array_equal(weights, np.where(target, one, one * other))


def test_coverage():
    """Over freshly drawn populations, 95 % intervals cover the true rate mostly; trial-wise ones would not.

    60 populations at a true coverage of 0.9 fall below 75 % with probability under 1 in 1000.
    """
    truth = np.mean([eer(*population(seed, speakers=60)[:2]) for seed in range(1000, 1040)])
    held = held_by_trials = 0
    for seed in range(60):
        scores, target, pairs = population(seed)
        low, high = bootstrap_interval(WeightedTrials.eer, scores, target, pairs, replicates=100, seed=seed)
        held += low <= truth <= high
        rng = np.random.default_rng(seed)
        draws = (rng.integers(len(scores), size=len(scores)) for _ in range(40))
        low, high = np.quantile([eer(scores[d], target[d]) for d in draws], [0.025, 0.975])
        held_by_trials += low <= truth <= high
    assert held >= 45
    assert held_by_trials < held


def test_paired_test_finds_the_better_system():
    scores, target, pairs = population(0)
    noise = np.random.default_rng(1).normal(size=len(scores))
    better = paired_bootstrap(WeightedTrials.eer, scores, scores + 1.5 * noise, target, pairs, replicates=200)
    assert better.difference == pytest.approx(eer(scores, target) - eer(scores + 1.5 * noise, target))
    assert better.difference < 0 and better.interval.high < 0 and better.p_value < 0.02
    worse = paired_bootstrap(WeightedTrials.eer, scores + 1.5 * noise, scores, target, pairs, replicates=200)
    assert worse.difference == -better.difference and worse.p_value > 0.98


def test_paired_test_does_not_prefer_a_system_to_its_equal():
    scores, target, pairs = population(0)
    same = paired_bootstrap(WeightedTrials.eer, scores, 2 * scores + 1, target, pairs, replicates=50)
    assert (same.difference, same.interval, same.p_value) == (0, (0, 0), 1)


def test_any_metric_of_weighted_trials_will_do():
    scores, target, pairs = population(0)
    interval = bootstrap_interval(lambda trials: trials.min_dcf(0.05), scores, target, pairs, replicates=100)
    assert interval.low < min_dcf(scores, target, 0.05) < interval.high <= 1


def test_impossible_requests_are_refused():
    scores, target, pairs = population(0)
    with pytest.raises(ValueError, match="at least 2 speakers"):
        bootstrap_interval(WeightedTrials.eer, np.arange(2.0), [True, False], np.zeros((2, 2), int))
    with pytest.raises(ValueError, match=r"must be \[N, 2\]"):
        bootstrap_interval(WeightedTrials.eer, scores, target, pairs[:-1])
    with pytest.raises(ValueError, match="replicates=0"):
        bootstrap_interval(WeightedTrials.eer, scores, target, pairs, replicates=0)
    with pytest.raises(ValueError, match="need nontarget trials as well"):
        bootstrap_interval(WeightedTrials.eer, np.arange(2.0), [True, True], np.array([[0, 0], [1, 1]]))


def test_of_several_runs_of_a_system_the_mean_metric_counts():
    """The interval of two seeds' mean lies where theirs do; copies of a run change nothing; paired systems may differ
    in their numbers of runs."""
    rng = np.random.default_rng(0)
    pairs = rng.integers(12, size=(600, 2))
    pairs[:200, 1] = pairs[:200, 0]
    target = pairs[:, 0] == pairs[:, 1]
    runs = np.where(target, 1.0, 0.0) + rng.normal(0, 0.6, (2, 600))
    worse = np.where(target, 0.3, 0.0) + rng.normal(0, 0.6, 600)
    alone = bootstrap_interval(WeightedTrials.eer, runs[0], target, pairs, replicates=200)
    assert bootstrap_interval(WeightedTrials.eer, runs[[0, 0]], target, pairs, replicates=200) == pytest.approx(alone)
    mean = np.mean([eer(run, target) for run in runs])
    low, high = bootstrap_interval(WeightedTrials.eer, runs, target, pairs, replicates=200)
    assert low < mean < high
    found = paired_bootstrap(WeightedTrials.eer, runs, worse, target, pairs, replicates=200)
    assert found.difference == pytest.approx(mean - eer(worse, target)) and found.p_value < 0.01
    assert found.interval.low < found.difference < found.interval.high < 0
