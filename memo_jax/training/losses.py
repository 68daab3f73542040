"""The losses: distillation between views, NT-Xent on embeddings, AAM-softmax, regularisers. Arrays in, arrays out."""

import functools

import jax
import jax.numpy as jnp

from memo_jax.models.layers import l2_normalize
from memo_jax.xla.reductions import logsumexp, over_last_axis

SINKHORN_ITERATIONS = 3


def teacher_distributions(
    teacher_logits: jax.Array, center: jax.Array, temperature: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns a teacher's softmax((logits − center)/temperature), the students' targets, and its entropies.

    Args:
      teacher_logits: [W, B, K] float32; no gradient flows into them.
      center: [K] float32, from before this step.
      temperature: positive.

    Returns:
      Probabilities [W, B, K], and in nats `teacher_entropy` (mean entropy of a distribution) and `mean_teacher_entropy`
      (entropy of the mean distribution): with K prototypes, collapse shows as a teacher entropy of ln K (uniform) or as
      a mean-teacher entropy of 0 (one prototype for all).
    """
    logs = jax.lax.stop_gradient((teacher_logits - center) / temperature)
    return _with_entropies(logs - logsumexp(logs)[..., None])


def sinkhorn_distributions(teacher_logits: jax.Array, temperature: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns balanced targets: the rows of softmax(logits/temperature) after Sinkhorn's iterations (Cuturi, 2013).

    Each of the three iterations divides every column (a prototype) by its sum over views and batch, then every row by
    its sum: all prototypes end up being used about equally, without a centre. As in SwAV (Caron et al., 2020) and SDPN.

    Args:
      teacher_logits: [W, B, K] float32; no gradient flows into them.
      temperature: positive. A softmax that is raised to the power 4 and normalised equals one at a quarter of the
        temperature.

    Returns:
      As for `teacher_distributions`.
    """
    # In logarithms: at low temperatures, all numbers of a column may be too small for float32.
    logs = jax.lax.stop_gradient(teacher_logits / temperature)
    logs = logs - logsumexp(logs)[..., None]
    for _ in range(SINKHORN_ITERATIONS):
        logs = logs - jax.nn.logsumexp(logs, axis=(0, 1))
        logs = logs - logsumexp(logs)[..., None]
    return _with_entropies(logs)


def _with_entropies(logs: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns the distributions of these logarithms [W, B, K], and their entropies."""
    probabilities = jnp.exp(logs)
    mean = probabilities.mean(axis=(0, 1))
    return probabilities, {
        "teacher_entropy": -over_last_axis(jnp.sum, probabilities * logs).mean(),
        "mean_teacher_entropy": -jnp.sum(mean * jnp.log(jnp.maximum(mean, 1e-30))),
    }


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def distillation(
    student_logits: jax.Array, probabilities: jax.Array, temperature: float, shared_views: bool = True
) -> jax.Array:
    """Returns the DINO loss, in nats (Caron et al., 2021, eq. 2–3): the mean over the batch and over pairs of views.

    A pair is a teacher's view i and a student's view v, with the loss −⟨p_i, log_softmax(s_v / temperature)⟩; a view
    is not paired with itself. Nothing of size pairs × B × K is built. The gradient is written out, and keeps nothing of
    size V × B × K but the logits.

    Args:
      student_logits: s [V, B, K] float32.
      probabilities: p [W, B, K] of `teacher_distributions`; no gradient flows into them.
      temperature: the student's, positive.
      shared_views: whether the student's first W views are those of the teacher; if not, they share none.
    """
    return _distillation_and_residuals(student_logits, probabilities, temperature, shared_views)[0]


def _partners(views: int, teacher_views: int, shared_views: bool) -> jax.Array:
    """Returns how many teacher views each student view is compared with, [V]."""
    return teacher_views - (jnp.arange(views) < teacher_views) if shared_views else jnp.full(views, teacher_views)


def _distillation_and_residuals(student_logits, probabilities, temperature, shared_views):
    (views, batch, _), teacher_views = student_logits.shape, probabilities.shape[0]
    # The cross-entropy is logsumexp(s) − ⟨p, s⟩, and the views are summed before the product.
    normalizers = logsumexp(student_logits / temperature)
    if shared_views:
        others = student_logits.sum(axis=0) - student_logits[:teacher_views]
    else:
        others = student_logits.sum(axis=0)
    products = over_last_axis(jnp.sum, probabilities * others).sum()
    total = jnp.vdot(_partners(views, teacher_views, shared_views), normalizers.sum(axis=-1)) - products / temperature
    pairs = (views - shared_views) * teacher_views
    return total / (pairs * batch), (student_logits, probabilities, normalizers)


def _distillation_gradient(temperature, shared_views, residuals, gradient):
    student_logits, probabilities, normalizers = residuals
    (views, batch, _), teacher_views = student_logits.shape, probabilities.shape[0]
    others = all_views = probabilities.sum(axis=0)
    if shared_views:
        others = jnp.concatenate(
            [all_views - probabilities, jnp.broadcast_to(all_views, (views - teacher_views, *all_views.shape))]
        )
    student = jnp.exp(student_logits / temperature - normalizers[:, :, None])
    scale = gradient / (temperature * (views - shared_views) * teacher_views * batch)
    return scale * (_partners(views, teacher_views, shared_views)[:, None, None] * student - others), None


distillation.defvjp(_distillation_and_residuals, _distillation_gradient)


def mean_entropy_gap(logits: jax.Array, temperature: float) -> jax.Array:
    """Returns ln K − H(p̄), in nats, with p̄ the mean of softmax(logits [V, B, K] / temperature) over views and batch.

    It is 0 when all prototypes are used equally, and ln K when one is used by all (Assran et al., 2022: me-max).
    """
    mean = jax.nn.softmax(logits / temperature, axis=-1).mean(axis=(0, 1))
    return jnp.log(jnp.float32(mean.size)) + jnp.sum(mean * jnp.log(jnp.maximum(mean, 1e-30)))


def koleo(embeddings: jax.Array) -> jax.Array:
    """Returns KoLeo of embeddings [V, B, D], summed over views: −mean ln(‖x_i − x_n(i)‖ + 1e-8) over the batch of each.

    x are the embeddings at unit length, and x_n(i) is the nearest other one of the same view. It spreads them over
    the sphere (Sablayrolles et al., 2019, eq. 2).
    """

    def of_view(x):
        cosines = jnp.matmul(x, x.T, precision="highest")
        nearest = jnp.where(jnp.eye(len(x), dtype=bool), -jnp.inf, cosines).argmax(axis=1)
        squares = jnp.square(x - x[nearest]).sum(axis=1)
        # Equal embeddings have no direction to move apart in.
        return -jnp.log(jnp.sqrt(jnp.maximum(squares, 1e-16)) + 1e-8).mean()

    return jax.vmap(of_view)(l2_normalize(embeddings.astype(jnp.float32))).sum()


def variance_and_covariance(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns VICReg's regularisers of x [V, B, D], the means over views (Bardes et al., 2022, eq. 1–4).

    With C the covariance of the dimensions over the batch of a view (divided by B − 1), these are the mean of
    max(0, 1 − √(C_jj + 1e-4)), and the sum of C_ij² over i ≠ j, divided by D.
    """

    def of_view(x):
        centered = x - x.mean(axis=0)
        covariance = jnp.matmul(centered.T, centered, precision="highest") / (len(x) - 1)
        variances = jnp.diagonal(covariance)
        others = jnp.square(covariance).sum() - jnp.square(variances).sum()
        return jax.nn.relu(1 - jnp.sqrt(variances + 1e-4)).mean(), others / x.shape[1]

    variance, covariance = jax.vmap(of_view)(x)
    return variance.mean(), covariance.mean()


def updated_center(center: jax.Array, teacher_logits: jax.Array, momentum: float) -> jax.Array:
    """Returns momentum·center + (1 − momentum)·mean of the raw teacher logits [W, B, K] over views and batch."""
    return momentum * center + (1 - momentum) * teacher_logits.mean(axis=(0, 1))


def contrastive(
    student: jax.Array,
    teacher: jax.Array,
    temperature: float,
    margin: float = 0.0,
    speakers: jax.Array | None = None,
    shared_views: bool = True,
) -> jax.Array:
    """Returns NT-Xent between student and teacher embeddings of different views (Chen et al., 2020, eq. 1).

    For every pair of different views i, j the 2B rows [teacher view i; student view j] are compared by cosine; each row
    is an anchor whose positive is the same utterance in the other half and whose negatives are all other rows, its own
    half included. Negatives come from the whole (global) batch.

    Args:
      student: [V, B, D].
      teacher: [W, B, D]; no gradient flows into them.
      temperature: positive.
      margin: subtracted from the cosine of every positive pair: AM-NT-Xent (Lepage and Dehak, 2024, arXiv 2404.14913).
      speakers: int32 [B], the speaker of each utterance, negative where unknown. If given, other utterances of an
        anchor's speaker are not among its negatives.
      shared_views: whether the views are the same, so that view i is not compared with itself; if not, they share none.
    """
    batch = student.shape[1]
    student = l2_normalize(student.astype(jnp.float32))
    teacher = jax.lax.stop_gradient(l2_normalize(teacher.astype(jnp.float32)))
    half, utterance = jnp.eye(2, dtype=bool)[:, None, :, None], jnp.eye(batch, dtype=bool)[:, None]
    left_out = half & utterance  # the anchor itself
    if speakers is not None:
        same_speaker = (speakers[:, None] == speakers) & (speakers >= 0)
        left_out = left_out | (same_speaker[:, None] & ~utterance)
    losses = []
    for i in range(len(teacher)):
        for j in range(len(student)):
            if not shared_views or i != j:
                # The halves keep an axis of their own: concatenated, a sharded batch would have to be resharded.
                rows = jnp.stack([teacher[i], student[j]])  # [2, B, D]
                similarity = jnp.einsum("abd,ced->abce", rows, rows, precision="highest") / temperature
                if margin:
                    similarity = jnp.where(~half & utterance, similarity - margin / temperature, similarity)
                others = jax.nn.logsumexp(jnp.where(left_out, -jnp.inf, similarity), axis=(2, 3))
                positive = ((rows[0] * rows[1]).sum(axis=-1) - margin) / temperature
                losses.append((others - positive).mean())
    return jnp.stack(losses).mean()


def aam_softmax(cosines: jax.Array, labels: jax.Array, scale: float, margin: jax.Array | float) -> jax.Array:
    """Returns AAM-softmax in nats: the mean of `aam_softmax_rows` over rows with a label, 0 if there are none.

    Args:
      cosines: float32 [N, speakers] of embeddings and speakers.
      labels: int32 [N], the speaker of each row; negative where there is none.
      scale: factor of the cosines, positive.
      margin: in radians, 0 to π/2.
    """
    losses = aam_softmax_rows(cosines, labels, scale, margin)
    labelled = labels >= 0
    return jnp.where(labelled, losses, 0.0).sum() / jnp.maximum(labelled.sum(), 1)


def aam_softmax_rows(cosines: jax.Array, labels: jax.Array, scale: float, margin: jax.Array | float) -> jax.Array:
    """Returns the ArcFace loss (Deng et al., 2019, eq. 3) of each row in nats, [N]; without a label, any number.

    The cross-entropy of softmax(scale · [cos θ_1, …, cos(θ_y + margin), …]) with the true speaker y. Where θ_y + margin
    exceeds π, so that its cosine would rise again, cos θ_y − margin · sin(margin) takes its place, as is usual.

    Args:
      cosines: float32 [N, speakers] of embeddings and speakers.
      labels: int32 [N], the speaker of each row; negative where there is none.
      scale: positive.
      margin: in radians, 0 to π/2.
    """
    own = jnp.take_along_axis(cosines, jnp.maximum(labels, 0)[:, None], axis=1)[:, 0]
    sine = jnp.sqrt(jnp.maximum(1 - own**2, 1e-12))
    with_margin = own * jnp.cos(margin) - sine * jnp.sin(margin)
    with_margin = jnp.where(own > -jnp.cos(margin), with_margin, own - margin * jnp.sin(margin))
    is_own = jnp.arange(cosines.shape[1]) == labels[:, None]
    logits = scale * jnp.where(is_own, with_margin[:, None], cosines)
    return jax.nn.logsumexp(logits, axis=1) - scale * with_margin


def confident_labels(
    embeddings: jax.Array, directions: jax.Array, temperature: float, least_probability: float
) -> jax.Array:
    """Returns the likeliest label of each embedding where its probability is above a limit, else −1: int32 [N].

    The probabilities are softmax(embeddings · directions / temperature), of vectors that are not scaled to unit length.

    Args:
      embeddings: [N, D].
      directions: [D, labels].
      temperature: positive.
      least_probability: in [0, 1].
    """
    products = jnp.matmul(embeddings.astype(jnp.float32), directions, precision="highest")
    probabilities = jax.nn.softmax(products / temperature)
    return jnp.where(probabilities.max(axis=1) > least_probability, probabilities.argmax(axis=1), -1).astype(jnp.int32)


def accuracy(cosines: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the share of the rows with a label, cosines [N, speakers] and labels [N], whose speaker is nearest."""
    labelled = labels >= 0
    right = labelled & (cosines.argmax(axis=1) == labels)
    return right.sum() / jnp.maximum(labelled.sum(), 1)


def embedding_deviation(embeddings: jax.Array) -> jax.Array:
    """Returns the spread of L2-normalised embeddings [N, D]: 1 when uniform on the sphere, 0 when all are equal."""
    unit = l2_normalize(embeddings.astype(jnp.float32))
    return jnp.sqrt(jnp.maximum(unit.var(axis=0).sum(), 0.0))


def alignment(a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns the mean cosine between matching rows of two gradients [..., D]; a row of zeros counts as 0."""
    return (l2_normalize(a) * l2_normalize(b)).sum(axis=-1).mean()
