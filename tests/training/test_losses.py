"""Losses against their definitions, pair by pair and row by row, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memo_jax.training import losses

STUDENT_TEMP, TEACHER_TEMP = 0.1, 0.05

# One program each: operation by operation they would be fifteen.
teacher_distributions = jax.jit(losses.teacher_distributions)
contrastive = jax.jit(losses.contrastive, static_argnames=("margin", "shared_views"))
sinkhorn_distributions = jax.jit(losses.sinkhorn_distributions, static_argnames="temperature")


def draw(seed, *shapes, scale=1.0):
    random = np.random.default_rng(seed)
    return [random.normal(0, scale, shape) for shape in shapes]


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def assert_slope(loss, definition, x, atol=1e-4):
    """The value is the definition's, and the gradient in float32 is its slope, by central differences in float64."""
    value, gradient = jax.jit(jax.value_and_grad(loss))(jnp.asarray(x, jnp.float32))
    assert float(value) == pytest.approx(definition(x), rel=1e-5, abs=1e-6)
    slopes, step = np.empty_like(x), 1e-6
    for place in np.ndindex(x.shape):
        ends = []
        for sign in (1, -1):
            moved = x.copy()
            moved[place] += sign * step
            ends.append(definition(moved))
        slopes[place] = (ends[0] - ends[1]) / (2 * step)
    np.testing.assert_allclose(gradient, slopes, atol=atol * np.abs(slopes).max())


def pairwise_distillation(student, teacher, center, xp=np, shared_views=True):
    """The definition: one cross-entropy per pair, averaged."""
    terms = []
    for i in range(teacher.shape[0]):
        for v in range(student.shape[0]):
            if v != i or not shared_views:
                target = xp.exp((teacher[i] - center) / TEACHER_TEMP)
                e = xp.exp(student[v] / STUDENT_TEMP)
                terms.append(-(target / target.sum(-1, keepdims=True) * xp.log(e / e.sum(-1, keepdims=True))).sum(-1))
    return sum(term.mean() for term in terms) / len(terms)


@functools.partial(jax.jit, static_argnames="student_temp")
def distillation(student, teacher, center, student_temp=STUDENT_TEMP, teacher_temp=TEACHER_TEMP):
    """Returns the loss and the indicators, the student's first views being the teacher's."""
    distributions, entropies = losses.teacher_distributions(teacher, center, teacher_temp)
    loss = losses.distillation(student, distributions, student_temp)
    return loss, entropies


@pytest.mark.parametrize("views, teacher_views", [(6, 2), (4, 1), (3, 3)])
def test_distillation_is_the_mean_over_all_pairs_of_different_views(views, teacher_views):
    student, teacher, center = draw(0, (views, 3, 7), (teacher_views, 3, 7), (7,), scale=0.3)
    single = [jnp.asarray(x, jnp.float32) for x in (student, teacher, center)]
    loss, _ = distillation(*single)
    np.testing.assert_allclose(loss, pairwise_distillation(student, teacher, center), rtol=1e-5)

    gradient = jax.jit(jax.grad(lambda s: distillation(s, *single[1:])[0]))(single[0])
    expected = jax.jit(jax.grad(lambda s: pairwise_distillation(s, *single[1:], xp=jnp)))(single[0])
    np.testing.assert_allclose(gradient, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("views, teacher_views", [(4, 1), (2, 3)])
def test_a_teacher_with_views_of_its_own_is_paired_with_all_of_the_student(views, teacher_views):
    student, teacher, center = draw(0, (views, 3, 7), (teacher_views, 3, 7), (7,), scale=0.3)
    targets, _ = teacher_distributions(jnp.float32(teacher), jnp.float32(center), TEACHER_TEMP)
    assert_slope(
        lambda s: losses.distillation(s, targets, STUDENT_TEMP, False),
        lambda s: pairwise_distillation(s, teacher, center, shared_views=False),
        student,
    )


def test_distillation_subtracts_the_given_center_from_the_teacher_alone():
    """A constant added to teacher logits and centre cancels; one added to the centre of one prototype does not."""
    student, teacher, center = draw(1, (4, 3, 7), (2, 3, 7), (7,), scale=0.3)
    value = lambda t, c: float(distillation(*map(jnp.float32, (student, t, c)))[0])  # noqa: E731
    shift = np.arange(7) / 10
    assert value(teacher + shift, center + shift) == pytest.approx(value(teacher, center), rel=1e-5)
    assert abs(value(teacher, center + shift) - value(teacher, center)) > 1e-2


def test_no_gradient_reaches_teacher_or_center():
    student, teacher, center = map(jnp.float32, draw(2, (6, 3, 7), (2, 3, 7), (7,)))
    gradients = jax.grad(lambda t, c, temp: distillation(student, t, c, 0.1, temp)[0], argnums=(0, 1, 2))(
        teacher, center, jnp.float32(0.05)
    )
    assert all(not np.any(g) for g in gradients)
    a, b = map(jnp.float32, draw(3, (2, 3, 5), (2, 3, 5)))
    of_student, of_teacher = jax.grad(lambda s, t: contrastive(s, t, 0.1), argnums=(0, 1))(a, b)
    assert not np.any(of_teacher) and np.any(of_student)


def test_indicators_are_entropies_of_the_teacher_and_the_rest_of_the_loss():
    student, teacher, center = draw(4, (6, 3, 7), (2, 3, 7), (7,), scale=0.3)
    loss, indicators = distillation(*map(jnp.float32, (student, teacher, center)))
    p = softmax((teacher - center) / TEACHER_TEMP)
    entropy = -(p * np.log(p)).sum(-1).mean()
    mean = p.mean((0, 1))
    np.testing.assert_allclose(indicators["teacher_entropy"], entropy, rtol=1e-5)
    np.testing.assert_allclose(indicators["mean_teacher_entropy"], -(mean * np.log(mean)).sum(), rtol=1e-5)
    q = softmax(student / STUDENT_TEMP)
    kl = np.mean([(p[i] * np.log(p[i] / q[v])).sum(-1).mean() for i in range(2) for v in range(6) if v != i])
    np.testing.assert_allclose(loss - indicators["teacher_entropy"], kl, rtol=1e-4)
    np.testing.assert_allclose(loss, kl + entropy, rtol=1e-5)


def test_indicators_show_both_kinds_of_collapse():
    uniform = distillation(jnp.zeros((4, 3, 7)), jnp.zeros((2, 3, 7)), jnp.zeros(7))[1]
    assert float(uniform["teacher_entropy"]) == pytest.approx(np.log(7), rel=1e-5)
    one_hot = jnp.zeros((2, 3, 7)).at[..., 4].set(5.0)
    collapsed = distillation(jnp.zeros((4, 3, 7)), one_hot, jnp.zeros(7))[1]
    assert float(collapsed["mean_teacher_entropy"]) == pytest.approx(0, abs=1e-5)


def test_loss_of_many_prototypes_at_extreme_logits_is_finite():
    student = jnp.zeros((3, 2, 4096)).at[..., 0].set(1.0).at[..., 1].set(-1.0)
    loss, indicators = distillation(student, -student[:2], jnp.zeros(4096), 0.01, 0.001)
    assert np.isfinite(float(loss)) and all(np.isfinite(float(x)) for x in indicators.values())


def test_center_follows_the_mean_of_raw_teacher_logits():
    center, logits = draw(5, (7,), (2, 3, 7))
    updated = losses.updated_center(jnp.float32(center), jnp.float32(logits), 0.9)
    np.testing.assert_allclose(updated, 0.9 * center + 0.1 * logits.reshape(-1, 7).mean(0), atol=1e-6)


def nt_xent(student, teacher, temperature, margin=0.0, speakers=None):
    """The definition: every one of 2B rows is an anchor; its positive is the other row of its utterance.

    With a margin AM-NT-Xent: the positive's logit is (cos − m)/τ, above and below the fraction, negatives' cos/τ.
    With speakers, other utterances of the anchor's speaker are not negatives; a negative number means no speaker.
    """
    views, batch = student.shape[:2]
    unit = lambda x: x / np.linalg.norm(x)  # noqa: E731
    terms = []
    for i in range(views):
        for j in range(views):
            if i == j:
                continue
            rows = [unit(x) for x in teacher[i]] + [unit(x) for x in student[j]]
            for a, anchor in enumerate(rows):
                cosines = {b: anchor @ row for b, row in enumerate(rows) if b != a}
                if speakers is not None and speakers[a % batch] >= 0:
                    same = [b for b in cosines if speakers[b % batch] == speakers[a % batch] and b % batch != a % batch]
                    cosines = {b: cosine for b, cosine in cosines.items() if b not in same}
                cosines[(a + batch) % (2 * batch)] -= margin
                e = {b: np.exp(cosine / temperature) for b, cosine in cosines.items()}
                terms.append(-np.log(e[(a + batch) % (2 * batch)] / sum(e.values())))
    return np.mean(terms)


@pytest.mark.parametrize("margin", [0.0, 0.1])
@pytest.mark.parametrize("views, batch", [(2, 4), (3, 2), (2, 1)])
def test_contrastive_is_nt_xent_over_teacher_and_student_rows(views, batch, margin):
    student, teacher = draw(6, (views, batch, 5), (views, batch, 5))
    loss = contrastive(jnp.float32(student), jnp.float32(teacher), 0.1, margin)
    np.testing.assert_allclose(loss, nt_xent(student, teacher, 0.1, margin), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("margin", [0.0, 0.1])
def test_contrastive_gradient_is_the_slope_of_its_definition(margin):
    student, teacher = draw(7, (2, 3, 4), (2, 3, 4))
    gradient = np.asarray(jax.grad(contrastive)(jnp.float32(student), jnp.float32(teacher), 0.1, margin))
    slope = np.zeros_like(student)
    for index in np.ndindex(student.shape):
        step = np.zeros_like(student)
        step[index] = 1e-6
        above, below = (nt_xent(student + sign * step, teacher, 0.1, margin) for sign in (1, -1))
        slope[index] = (above - below) / 2e-6
    np.testing.assert_allclose(gradient, slope, atol=1e-5 * np.abs(slope).max() + 1e-6)


@pytest.mark.parametrize("margin", [0.0, 0.1])
def test_contrastive_masks_negatives_of_the_same_speaker_only(margin):
    """Against the definition, value and slope; unknown speakers (-1) are strangers to one another."""
    student, teacher = draw(10, (2, 5, 4), (2, 5, 4))
    speakers = [3, -1, 3, 0, -1]
    loss = lambda s: contrastive(s, jnp.float32(teacher), 0.1, margin, jnp.array(speakers))  # noqa: E731
    value, gradient = jax.value_and_grad(loss)(jnp.float32(student))
    np.testing.assert_allclose(value, nt_xent(student, teacher, 0.1, margin, speakers), rtol=1e-5)
    assert abs(value - nt_xent(student, teacher, 0.1, margin)) > 1e-3
    slope = np.zeros_like(student)
    for index in np.ndindex(student.shape):
        step = np.zeros_like(student)
        step[index] = 1e-6
        above, below = (nt_xent(student + sign * step, teacher, 0.1, margin, speakers) for sign in (1, -1))
        slope[index] = (above - below) / 2e-6
    np.testing.assert_allclose(gradient, slope, atol=1e-5 * np.abs(slope).max() + 1e-6)


def test_contrastive_with_a_batch_of_one_speaker_has_no_negatives():
    """Each anchor is left with its positive alone, whose share is 1."""
    student, teacher = (jnp.float32(x) for x in draw(11, (2, 3, 4), (2, 3, 4)))
    value, gradient = jax.value_and_grad(contrastive)(student, teacher, 0.1, 0.0, jnp.zeros(3, int))
    np.testing.assert_allclose(value, 0, atol=1e-5)
    np.testing.assert_allclose(gradient, 0, atol=1e-5)


def test_contrastive_sees_directions_only_and_equal_rows_leave_it_at_chance():
    student, teacher = draw(8, (2, 3, 5), (2, 3, 5))
    loss = contrastive(jnp.float32(student), jnp.float32(teacher), 0.1)
    scaled = contrastive(jnp.float32(7 * student), jnp.float32(teacher / 3), 0.1)
    np.testing.assert_allclose(loss, scaled, rtol=1e-5)
    same = jnp.ones((2, 3, 5))
    np.testing.assert_allclose(contrastive(same, same, 0.1), np.log(5), rtol=1e-5)


def test_contrastive_without_a_margin_is_the_program_that_it_was():
    """A margin that is off costs nothing: it is absent from the traced program."""
    x = jnp.ones((2, 3, 5))
    plain, off, on = (
        str(jax.make_jaxpr(lambda s, t: losses.contrastive(s, t, 0.1, *margin))(x, x))  # noqa: B023
        for margin in ((), (0.0,), (0.1,))
    )
    assert plain == off and len(on) > len(off)


def test_zero_embeddings_give_finite_gradients():
    gradient = jax.grad(contrastive)(jnp.zeros((2, 3, 5)), jnp.ones((2, 3, 5)), 0.1)
    assert np.all(np.isfinite(gradient))


def test_embedding_deviation_tells_spread_from_collapse():
    spread = np.random.default_rng(0).normal(0, 1, (2000, 32))
    assert float(losses.embedding_deviation(jnp.float32(spread))) == pytest.approx(1, abs=0.01)
    assert float(losses.embedding_deviation(jnp.ones((8, 32)))) == pytest.approx(0, abs=1e-3)


def test_alignment_is_the_mean_cosine_of_matching_rows():
    a, b = draw(9, (2, 3, 5), (2, 3, 5))
    a[0, 0] = 0
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    expected = np.divide((a * b).sum(-1), norms, out=np.zeros((2, 3)), where=norms > 0).mean()
    np.testing.assert_allclose(losses.alignment(jnp.float32(a), jnp.float32(b)), expected, rtol=1e-5)
    np.testing.assert_allclose(losses.alignment(jnp.float32(b), jnp.float32(-b)), -1, rtol=1e-5)


# Views of the teacher's own, balanced targets, regularisers.


def test_nt_xent_with_views_of_the_teachers_own_takes_all_pairs():
    student, teacher = draw(10, (3, 4, 5), (2, 4, 5))

    def definition(student):
        terms = []
        for i in range(2):
            for j in range(3):
                rows = np.concatenate([teacher[i], student[j]])
                rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
                similarity = np.exp((rows @ rows.T - 0.1 * (np.eye(8, k=4) + np.eye(8, k=-4))) / 0.2)
                positive = np.concatenate([np.diag(similarity, 4), np.diag(similarity, -4)])
                terms.append(-np.log(positive / (similarity.sum(axis=1) - np.diag(similarity))).mean())
        return np.mean(terms)

    assert_slope(lambda s: contrastive(s, jnp.float32(teacher), 0.2, 0.1, shared_views=False), definition, student)


def sinkhorn(logits, temperature, iterations=3):
    """SDPN's targets: sharpened to the power 4, then balanced: a prototype's weights sum to 1/K, a row's to 1."""
    p = softmax(logits.reshape(-1, logits.shape[-1]) / temperature) ** 4
    q = p / p.sum(axis=1, keepdims=True)
    q = q / q.sum()
    for _ in range(iterations):
        q = q / q.sum(axis=0) / q.shape[1]
        q = q / q.sum(axis=1, keepdims=True) / len(q)
    return (q * len(q)).reshape(logits.shape)


def test_balanced_targets_are_three_iterations_on_sharpened_probabilities():
    """Of cosines, with 0.1 / 4 for a power of 4. They lie between a softmax and equal use of all prototypes."""
    logits = np.clip(draw(11, (2, 5, 6), scale=0.4)[0], -1, 1)
    targets, entropies = sinkhorn_distributions(jnp.float32(logits), 0.1 / 4)
    expected = sinkhorn(logits, 0.1)
    np.testing.assert_allclose(targets, expected, rtol=1e-3, atol=1e-7)
    np.testing.assert_allclose(targets.sum(axis=-1), 1, rtol=1e-5)
    uses = expected.mean(axis=(0, 1))
    assert float(entropies["mean_teacher_entropy"]) == pytest.approx(-(uses * np.log(uses)).sum(), rel=1e-4)
    plain, _ = teacher_distributions(jnp.float32(logits), jnp.zeros(6), 0.1 / 4)
    assert np.ptp(uses) < np.ptp(plain.mean(axis=(0, 1)))
    gradient = jax.grad(lambda x: (sinkhorn_distributions(x, 0.1)[0] * logits).sum())(jnp.float32(logits))
    assert not np.any(gradient)


def test_balanced_targets_are_finite_where_probabilities_underflow():
    logits = jnp.ones((1, 8, 16)).at[..., 3:].set(-1.0)  # at this temperature e^-200 of the largest
    targets, entropies = sinkhorn_distributions(logits, 0.01)
    assert np.isfinite(targets).all() and np.isfinite(list(map(float, entropies.values()))).all()
    np.testing.assert_allclose(targets, 1 / 16, rtol=1e-3)  # all utterances are alike, so they use all equally


def test_the_gap_of_the_mean_entropy_is_its_definition():
    def definition(logits):
        mean = softmax(logits / 0.1).mean(axis=(0, 1))
        return np.log(7) + (mean * np.log(mean)).sum()

    (logits,) = draw(12, (3, 4, 7), scale=0.3)
    assert_slope(lambda x: losses.mean_entropy_gap(x, 0.1), definition, logits)
    assert float(losses.mean_entropy_gap(jnp.zeros((2, 3, 7)), 0.1)) == pytest.approx(0, abs=1e-6)
    one = jnp.zeros((2, 3, 7)).at[..., 4].set(5.0)
    assert float(losses.mean_entropy_gap(one, 0.1)) == pytest.approx(np.log(7), rel=1e-5)


def test_koleo_is_its_definition():
    def definition(embeddings):
        total = 0.0
        for view in embeddings / np.linalg.norm(embeddings, axis=-1, keepdims=True):
            distances = np.linalg.norm(view[:, None] - view, axis=-1) + np.diag([np.inf] * len(view))
            total -= np.log(distances.min(axis=1) + 1e-8).mean()
        return total

    (embeddings,) = draw(13, (2, 6, 4))
    assert_slope(losses.koleo, definition, embeddings)
    equal = jnp.ones((1, 3, 4))
    value, gradient = jax.jit(jax.value_and_grad(losses.koleo))(equal)
    assert np.isfinite(float(value)) and np.isfinite(gradient).all()


@pytest.mark.parametrize("term", [0, 1])
def test_variance_and_covariance_are_vicregs(term):
    def definition(x):
        terms = []
        for view in x:
            covariance = np.cov(view.T)
            deviations = np.sqrt(np.diag(covariance) + 1e-4)
            variance = np.maximum(0, 1 - deviations).mean()
            terms.append((variance, (covariance**2)[~np.eye(x.shape[2], dtype=bool)].sum() / x.shape[2]))
        return np.mean(terms, axis=0)[term]

    (x,) = draw(14, (2, 6, 4), scale=0.8)
    assert 0 < (x.std(axis=1, ddof=1) < 1).mean() < 1, "both sides of the hinge"
    assert_slope(lambda x: losses.variance_and_covariance(x)[term], definition, x)
