"""Calibration against scikit-learn and the properties that define proper scoring rules."""

import numpy as np
import pytest
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression

from memo_jax.scoring.calibration import act_dcf, cllr, fit_calibration, min_cllr
from memo_jax.scoring.metrics import min_dcf


def gaussian_llrs(seed=0, size=4000, share=0.3, separation=2.5):
    """Scores N(±d/2, 1): their natural log-likelihood ratio is exactly d times the score."""
    rng = np.random.default_rng(seed)
    target = rng.random(size) < share
    scores = rng.normal(size=size) + separation * (target - 0.5)
    return separation * scores, target


def test_calibration_agrees_with_scikit_learn():
    scores, target = gaussian_llrs()
    weights = np.where(target, 0.5 / target.sum(), 0.5 / (~target).sum()) * len(target)
    theirs = LogisticRegression(C=1e10, tol=1e-10, max_iter=1000).fit(scores[:, None], target, weights)
    ours = fit_calibration(scores, target)
    assert ours.scale == pytest.approx(theirs.coef_[0, 0], rel=1e-4)
    assert ours.offset == pytest.approx(theirs.intercept_[0], abs=1e-3)


def test_calibration_recovers_true_likelihood_ratios():
    """Gaussian classes of equal variance have a linear ratio: undoing 0.2·llr − 3 takes scale 5, offset 15."""
    llrs, target = gaussian_llrs(size=100_000)
    ours = fit_calibration(0.2 * llrs - 3, target)
    assert ours.scale == pytest.approx(5, rel=0.03)
    np.testing.assert_allclose(ours(0.2 * llrs - 3), ours.scale * (0.2 * llrs - 3) + ours.offset)
    assert ours(-3.0) == pytest.approx(0, abs=0.05)


def test_separated_classes_have_a_finite_calibration():
    scores = np.array([0.1, 0.2, 0.3, 0.7, 0.8])
    fit = fit_calibration(scores, scores > 0.5)
    assert np.isfinite(fit).all() and fit.scale > 0
    assert cllr(fit(scores), scores > 0.5) < 1e-3


def test_calibration_refuses_what_has_no_fit():
    target = np.array([True, False, True])
    with pytest.raises(ValueError, match="not all equal"):
        fit_calibration(np.ones(3), target)
    with pytest.raises(ValueError, match="finite"):
        fit_calibration(np.array([1, 2, np.inf]), target)


def test_cllr_is_its_formula():
    llrs, target = np.array([2.0, -1.0, 0.5, -3.0]), np.array([True, True, False, False])
    expected = (np.log2(1 + np.exp([-2.0, 1.0])).mean() + np.log2(1 + np.exp([0.5, -3.0])).mean()) / 2
    assert cllr(llrs, target) == pytest.approx(expected, rel=1e-12)
    assert cllr(np.zeros(4), target) == pytest.approx(1)  # knowing nothing costs one bit
    assert cllr(np.where(target, np.inf, -np.inf), target) == 0


def test_min_cllr_is_the_best_monotone_calibration():
    llrs, target = gaussian_llrs()
    best = min_cllr(llrs, target)
    assert 0 < best <= cllr(fit_calibration(llrs, target)(llrs), target) <= cllr(3 * llrs + 1, target)
    assert min_cllr(np.exp(llrs), target) == pytest.approx(best, abs=1e-12)
    # pool adjacent violators of another package, on classes weighted alike
    weights = np.where(target, 1 / target.sum(), 1 / (~target).sum())
    posterior = IsotonicRegression(y_min=0, y_max=1).fit(llrs, target, sample_weight=weights).predict(llrs)
    with np.errstate(divide="ignore"):
        assert cllr(np.log(posterior) - np.log1p(-posterior), target) == pytest.approx(best, abs=1e-9)


def test_min_cllr_of_extremes():
    target = np.array([True, True, False, False])
    assert min_cllr(np.array([3.0, 4, 1, 2]), target) == 0
    assert min_cllr(np.array([1.0, 2, 3, 4]), target) == pytest.approx(1)


@pytest.mark.parametrize("p_target", [0.01, 0.05, 0.5])
def test_actual_cost_is_at_least_the_minimum(p_target):
    llrs, target = gaussian_llrs(size=50_000)
    least = min_dcf(llrs, target, p_target)
    assert least <= act_dcf(llrs, target, p_target) < least + 0.05  # true ratios are calibrated
    assert act_dcf(llrs + 8, target, p_target) > least + 0.5  # a shift ruins decisions, not their order
    assert min_dcf(llrs + 8, target, p_target) == pytest.approx(least)


def test_actual_cost_uses_the_threshold_of_bayes():
    """At p 0.5 and equal costs the threshold is 0, and the boundary itself is accepted."""
    target = np.array([True, True, False, False])
    assert act_dcf(np.array([0.0, -0.1, 0.0, -5.0]), target, 0.5) == pytest.approx(1.0)
    assert act_dcf(np.array([0.0, 0.1, -0.1, -5.0]), target, 0.5) == 0
    assert act_dcf(np.array([0.0, 0.1, -0.1, -5.0]), target, 0.6) == pytest.approx(0.5)  # at −0.41: a false alarm
    assert act_dcf(np.array([0.0, 0.5, 0.1, -5.0]), target, 0.4) == pytest.approx(0.5)  # at 0.41: a miss
    with pytest.raises(ValueError, match="p_target=1"):
        act_dcf(np.zeros(4), target, 1)
