"""Scores against direct formulas; error rates against brute force, scikit-learn, and properties they must have."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_curve

from memo_jax.scoring import metrics
from memo_jax.scoring.metrics import WeightedTrials, eer, eer_point, error_rates, min_dcf, min_dcf_point
from memo_jax.scoring.trials import read_trials, trial_pairs


@st.composite
def scored_trials(draw):
    """Few scores with few values, so that ties are common, with both classes present."""
    size = draw(st.integers(2, 40))
    scores = draw(st.lists(st.integers(-6, 6), min_size=size, max_size=size))
    target = draw(st.lists(st.booleans(), min_size=size, max_size=size))
    target[:2] = [True, False]
    return np.array(scores, float), np.array(target)


def gaussian_trials(seed=0, targets=400, nontargets=1500, separation=2.0):
    rng = np.random.default_rng(seed)
    target = rng.permutation(np.arange(targets + nontargets) < targets)
    return rng.normal(size=len(target)) + separation * target, target


def brute_force_rates(scores, target):
    """FNR and FPR at every threshold by counting, O(n²)."""
    thresholds = [*np.unique(scores), np.inf]
    fnr = np.array([np.mean(scores[target] < t) for t in thresholds])
    fpr = np.array([np.mean(scores[~target] >= t) for t in thresholds])
    return fnr, fpr


def brute_force_eer(scores, target):
    """The crossing of the polyline through all (FPR, FNR) points with FNR = FPR, segment by segment."""
    fnr, fpr = brute_force_rates(scores, target)
    for i in range(len(fnr) - 1):
        before, after = fnr[i] - fpr[i], fnr[i + 1] - fpr[i + 1]
        if before <= 0 <= after:
            share = -before / (after - before)
            return fnr[i] + share * (fnr[i + 1] - fnr[i])
    raise AssertionError("the curve runs from FNR 0 to FNR 1, so it must cross")


@given(scored_trials())
@settings(max_examples=200, deadline=None)
def test_error_rates_agree_with_counting(trials):
    fnr, fpr = brute_force_rates(*trials)
    rates = error_rates(*trials)
    np.testing.assert_allclose(rates.fnr, fnr, atol=1e-12)
    np.testing.assert_allclose(rates.fpr, fpr, atol=1e-12)
    assert eer(*trials) == pytest.approx(brute_force_eer(*trials), abs=1e-12)
    assert min_dcf(*trials, 0.05) == pytest.approx(np.min(0.05 * fnr + 0.95 * fpr) / 0.05, abs=1e-12)


@pytest.mark.parametrize("decimals", [1, 2, 16])
def test_metrics_agree_with_scikit_learn(decimals):
    """`roc_curve` with the usual linear interpolation; few decimals make many ties."""
    scores, target = gaussian_trials()
    scores = np.round(scores, decimals)
    fpr, tpr, _ = roc_curve(target, scores, drop_intermediate=False)
    theirs = np.interp(0, fpr + tpr - 1, fpr)  # fpr - fnr rises along the curve
    assert eer(scores, target) == pytest.approx(theirs, abs=1e-9)
    for p_target in (0.01, 0.05, 0.5, 0.9):
        cost = np.min(p_target * (1 - tpr) + (1 - p_target) * fpr) / min(p_target, 1 - p_target)
        assert min_dcf(scores, target, p_target) == pytest.approx(cost, abs=1e-9)


def test_eer_of_two_gaussians_is_known():
    """Two unit normal densities 2 apart cross half-way, where each class errs with probability Phi(-1) = 0.15866."""
    scores, target = gaussian_trials(targets=100_000, nontargets=100_000)
    point = eer_point(scores, target)
    assert point.value == pytest.approx(0.15866, abs=0.003)
    assert point.threshold == pytest.approx(1.0, abs=0.03)


@given(scored_trials())
@settings(max_examples=100, deadline=None)
def test_only_the_order_of_scores_counts(trials):
    """A strictly increasing transform keeps every comparison with a threshold, hence every error rate."""
    scores, target = trials
    for transformed in (3 * scores - 7, np.exp(scores), scores**3, scores.astype(np.float32)):
        assert eer(transformed, target) == eer(scores, target)
        assert min_dcf(transformed, target, 0.01) == min_dcf(scores, target, 0.01)


@given(scored_trials(), st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
def test_the_order_of_trials_does_not_count(trials, random):
    scores, target = trials
    order = list(range(len(scores)))
    random.shuffle(order)
    assert eer(scores[order], target[order]) == eer(scores, target)


@given(scored_trials())
@settings(max_examples=100, deadline=None)
def test_exchanging_the_classes_exchanges_the_errors(trials):
    """With classes and sign exchanged, misses are false alarms, so the EER stays and the prior becomes its complement.

    With only the sign reversed, the curve is mirrored: the EER becomes its complement.
    """
    scores, target = trials
    assert eer(-scores, ~target) == pytest.approx(eer(scores, target), abs=1e-12)
    assert eer(-scores, target) == pytest.approx(1 - eer(scores, target), abs=1e-12)
    assert min_dcf(-scores, ~target, 0.9) == pytest.approx(min_dcf(scores, target, 0.1), abs=1e-12)


@given(scored_trials(), st.floats(0.001, 0.999))
@settings(max_examples=100, deadline=None)
def test_ranges(trials, p_target):
    """Accepting or rejecting everything costs 1 after normalisation, so the minimum cannot cost more."""
    assert 0 <= eer(*trials) <= 1
    assert 0 <= min_dcf(*trials, p_target) <= 1 + 1e-12


@given(scored_trials(), st.lists(st.integers(0, 3), min_size=40, max_size=40))
@settings(max_examples=100, deadline=None)
def test_a_weight_is_a_number_of_copies(trials, weights):
    scores, target = trials
    weights = np.array(weights[: len(scores)])
    weights[:2] = np.maximum(weights[:2], 1)  # keeps both classes
    copies = np.repeat(np.arange(len(scores)), weights)
    weighted = WeightedTrials(scores, target)
    assert weighted.eer() == eer(scores, target)
    weighted.weigh(weights[weighted.targets], weights[weighted.nontargets])
    assert weighted.eer() == eer(scores[copies], target[copies])
    assert weighted.min_dcf(0.05) == min_dcf(scores[copies], target[copies], 0.05)


def test_thresholds_reach_what_they_promise():
    scores, target = gaussian_trials()
    cost, threshold = min_dcf_point(scores, target, 0.05)
    fnr, fpr = np.mean(scores[target] < threshold), np.mean(scores[~target] >= threshold)
    assert metrics.detection_cost(fnr, fpr, 0.05) == pytest.approx(cost, abs=1e-12)
    equal = eer_point(scores, target)
    assert np.mean(scores[target] < equal.threshold) == pytest.approx(equal.value, abs=1 / 400)
    assert np.mean(scores[~target] >= equal.threshold) == pytest.approx(equal.value, abs=1 / 400)


def test_extremes():
    target = np.array([True, True, False, False])
    assert eer(np.array([3.0, 4, 1, 2]), target) == 0
    assert eer(np.array([1.0, 2, 3, 4]), target) == 1
    assert eer_point(np.zeros(4), target) == (0.5, 0.0)  # one tie: the middle of the chance line
    assert min_dcf(np.zeros(4), target, 0.01) == 1
    assert eer(np.array([np.inf, 1, 0, -np.inf]), target) == 0


@pytest.mark.parametrize(
    "scores, target, said",
    [
        ([1.0, 2], [True, True], "all 2 trials are target trials"),
        ([1.0, 2], [False, False], "all 2 trials are nontarget trials"),
        ([], [], "no trials"),
        ([1.0, np.nan, 0.0], [True, False, True], "1 of 3 scores are NaN"),
        ([np.nan], [True], "NaN"),
        ([1.0, 2], [True], "one length"),
        ([1.0, 2], [1, 2], "target must hold"),
    ],
)
def test_impossible_trials_are_refused(scores, target, said):
    for metric in (eer, lambda s, t: min_dcf(s, t, 0.01)):
        with pytest.raises(ValueError, match=said):
            metric(np.array(scores), np.array(target))


def test_impossible_settings_are_refused():
    scores, target = gaussian_trials()
    with pytest.raises(ValueError, match="p_target=1"):
        min_dcf(scores, target, 1)


def test_cosine_scores_and_crops():
    rng = np.random.default_rng(0)
    embeddings = rng.normal(size=(6, 3, 8))
    pairs = rng.integers(6, size=(20_000, 2))  # more than one block
    units = embeddings / np.linalg.norm(embeddings, axis=-1, keepdims=True)
    plain = np.einsum("nd,nd->n", units[pairs[:, 0], 0], units[pairs[:, 1], 0])
    np.testing.assert_allclose(metrics.cosine_scores(embeddings[:, 0], pairs), plain, atol=1e-6)
    crops = np.einsum("nrd,nsd->nrs", units[pairs[:, 0]], units[pairs[:, 1]]).mean(axis=(1, 2))
    np.testing.assert_allclose(metrics.cosine_scores(embeddings, pairs), crops, atol=1e-6)
    same = metrics.cosine_scores(embeddings[:, 0] * 1e3, np.array([[2, 2]]))
    assert same == pytest.approx(1, abs=1e-6) and same <= 1


@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf])
def test_embeddings_without_direction_are_refused(bad):
    embeddings = np.ones((3, 4))
    embeddings[1] = bad
    with pytest.raises(ValueError, match="row 1 is zero or not finite"):
        metrics.cosine_scores(embeddings, np.array([[0, 2]]))
    with pytest.raises(ValueError, match=r"must be \[recordings, D\]"):
        metrics.cosine_scores(np.ones(4), np.array([[0, 2]]))


def test_mean_subtraction_removes_a_common_offset():
    rng = np.random.default_rng(0)
    embeddings, offset = rng.normal(size=(50, 8)), 10 * rng.normal(size=8)
    centered = metrics.subtract_mean(embeddings, embeddings)
    np.testing.assert_allclose(centered.mean(axis=0), 0, atol=1e-12)
    np.testing.assert_allclose(metrics.subtract_mean(embeddings + offset, embeddings + offset), centered, atol=1e-12)


def test_as_norm_agrees_with_its_definition():
    rng = np.random.default_rng(0)
    embeddings, cohort = rng.normal(size=(7, 8)), rng.normal(size=(30, 8))
    pairs = np.array([[0, 1], [5, 2], [2, 2], [1, 0]])
    scores = metrics.cosine_scores(embeddings, pairs)
    cosine = lambda a, b: a @ b / np.linalg.norm(a) / np.linalg.norm(b)  # noqa: E731
    expected = []
    for score, pair in zip(scores, pairs):
        nearest = [sorted(cosine(embeddings[row], c) for c in cohort)[-10:] for row in pair]
        expected.append(np.mean([(score - np.mean(near)) / np.std(near) for near in nearest]))
    normalised = metrics.as_norm(scores, embeddings, pairs, cohort, top=10)
    np.testing.assert_allclose(normalised, expected, rtol=1e-4)
    assert normalised[0] == pytest.approx(normalised[3], rel=1e-6)  # symmetric
    with pytest.raises(ValueError, match="31 nearest of a cohort of 30 recordings: choose from 2 to 30"):
        metrics.as_norm(scores, embeddings, pairs, cohort, top=31)
    with pytest.raises(ValueError, match="copies"):
        metrics.as_norm(scores, embeddings, pairs, np.tile(cohort[:1], (10, 1)), top=5)


def test_average_of_systems():
    np.testing.assert_allclose(metrics.average_scores([np.array([1.0, 2]), np.array([3.0, 6])]), [2, 4])
    with pytest.raises(ValueError, match="same trials"):
        metrics.average_scores([np.zeros(2), np.zeros(3)])
    with pytest.raises(ValueError, match="same trials"):
        metrics.average_scores([])


def test_a_large_list_scores_quickly(tmp_path):
    """100,000 trials are a sixth of VoxCeleb1-E; the limit is generous and on CPU time, not wall time."""
    rng = np.random.default_rng(0)
    names = [f"id{10000 + i // 20}/{i * 7919:011d}/{i % 20:05d}.wav" for i in range(20_000)]
    enrol = np.arange(100_000) // 5
    same, other = enrol // 20 * 20 + rng.integers(20, size=100_000), rng.integers(20_000, size=100_000)
    test = np.where(np.arange(100_000) % 2, same, other)
    lines = (f"{int(a // 20 == b // 20)} {names[a]} {names[b]}" for a, b in zip(enrol, test))
    (tmp_path / "large.txt").write_text("\n".join(lines))
    embeddings = rng.normal(size=(20_000, 64)).astype(np.float32)
    start = time.thread_time()
    trials = read_trials(tmp_path / "large.txt")
    scores = metrics.cosine_scores(embeddings, trial_pairs(trials, names))
    assert 0.45 < eer(scores, trials.target) < 0.55
    assert time.thread_time() - start < 1.5
