"""The losses of MeMo: distillation between views, contrastive on embeddings, the centre. Arrays in, arrays out."""

import functools

import jax
import jax.numpy as jnp

from memo_jax.reductions import logsumexp, over_last_axis


def l2_normalize(x: jax.Array, axis: int = -1, epsilon: float = 1e-12) -> jax.Array:
    """Returns x / max(‖x‖, epsilon) along an axis, with a finite gradient at zero."""
    squared = jnp.square(x).sum(axis=axis, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(squared, epsilon**2))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def cross_entropy_of_pairs(student_logits: jax.Array, probabilities: jax.Array, temperature: float) -> jax.Array:
    """Returns −⟨p_i, log_softmax(s_v / temperature)⟩, the mean over the batch and over all pairs of views i and v ≠ i.

    `student_logits` s are [V, B, K], `probabilities` p [W, B, K], W ≤ V; no gradient flows into the latter. Nothing of
    size pairs × B × K is made, and the gradient, written out, keeps nothing of size V × B × K beside the logits.
    """
    return _cross_entropy_and_residuals(student_logits, probabilities, temperature)[0]


def _partners(views, teacher_views):
    """How many teacher views each student view is compared with, [V], and the number of pairs."""
    return jnp.where(jnp.arange(views) < teacher_views, teacher_views - 1, teacher_views), teacher_views * (views - 1)


def _cross_entropy_and_residuals(student_logits, probabilities, temperature):
    (views, batch, _), teacher_views = student_logits.shape, probabilities.shape[0]
    partners, pairs = _partners(views, teacher_views)
    # The cross-entropy is logsumexp(s) − ⟨p, s⟩, and the views are summed before the product.
    normalizers = logsumexp(student_logits / temperature)
    others = student_logits.sum(axis=0) - student_logits[:teacher_views]
    products = over_last_axis(jnp.sum, probabilities * others).sum()
    total = jnp.vdot(partners, normalizers.sum(axis=-1)) - products / temperature
    return total / (pairs * batch), (student_logits, probabilities, normalizers)


def _cross_entropy_gradient(temperature, residuals, gradient):
    student_logits, probabilities, normalizers = residuals
    (views, batch, _), teacher_views = student_logits.shape, probabilities.shape[0]
    partners, pairs = _partners(views, teacher_views)
    everybody = probabilities.sum(axis=0)
    others = jnp.concatenate([
        everybody - probabilities, jnp.broadcast_to(everybody, (views - teacher_views, *everybody.shape))
    ])
    student = jnp.exp(student_logits / temperature - normalizers[:, :, None])
    scale = gradient / (temperature * pairs * batch)
    return scale * (partners[:, None, None] * student - others), None


cross_entropy_of_pairs.defvjp(_cross_entropy_and_residuals, _cross_entropy_gradient)


def distillation(
    student_logits: jax.Array, teacher_logits: jax.Array, center: jax.Array, student_temp: float,
    teacher_temp: jax.Array,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns the DINO loss and its indicators.

    The loss is the cross-entropy between the teacher's softmax((logits − center)/teacher_temp) and the student's
    softmax(logits/student_temp), averaged over the batch and over all pairs of a teacher view i and a student view
    v ≠ i (Caron et al., 2021, eq. 2–3).

    Args:
      student_logits: [V, B, K] float32, the teacher's views first.
      teacher_logits: [W, B, K] float32, W ≤ V; no gradient flows into them.
      center: [K] float32, from before this step.
      student_temp, teacher_temp: positive temperatures.

    Returns:
      The loss, in nats, and `teacher_entropy` (mean entropy of a teacher distribution), `kl` (loss − entropy) and
      `mean_teacher_entropy` (entropy of the teacher's mean distribution), all in nats: with K prototypes, collapse
      shows as a teacher entropy of ln K (uniform) or as a mean-teacher entropy of 0 (one prototype for everybody).
    """
    teacher = jax.lax.stop_gradient((teacher_logits - center) / teacher_temp)
    teacher = teacher - logsumexp(teacher)[..., None]
    probabilities = jnp.exp(teacher)
    loss = cross_entropy_of_pairs(student_logits, probabilities, student_temp)
    entropy = -over_last_axis(jnp.sum, probabilities * teacher).mean()
    mean = probabilities.mean(axis=(0, 1))
    indicators = {
        "teacher_entropy": entropy,
        "kl": jax.lax.stop_gradient(loss) - entropy,
        "mean_teacher_entropy": -jnp.sum(mean * jnp.log(jnp.maximum(mean, 1e-30))),
    }
    return loss, indicators


def updated_center(center: jax.Array, teacher_logits: jax.Array, momentum: float) -> jax.Array:
    """Returns momentum·center + (1 − momentum)·mean of the raw teacher logits [W, B, K] over views and batch."""
    return momentum * center + (1 - momentum) * teacher_logits.mean(axis=(0, 1))


def contrastive(student: jax.Array, teacher: jax.Array, temperature: float) -> jax.Array:
    """Returns NT-Xent between student and teacher embeddings of different views (Chen et al., 2020, eq. 1).

    For every pair of views i ≠ j the 2B rows [teacher view i; student view j] are compared by cosine; each row is an
    anchor whose positive is the same utterance in the other half and whose negatives are all other rows, its own half
    included. Negatives come from the whole (global) batch.

    Args:
      student: [V, B, D] embeddings of the views that the teacher has seen, too.
      teacher: [V, B, D]; no gradient flows into them.
      temperature: positive.
    """
    views, batch, _ = student.shape
    student = l2_normalize(student.astype(jnp.float32))
    teacher = jax.lax.stop_gradient(l2_normalize(teacher.astype(jnp.float32)))
    itself = jnp.eye(2, dtype=bool)[:, None, :, None] & jnp.eye(batch, dtype=bool)[:, None]
    losses = []
    for i in range(views):
        for j in range(views):
            if i != j:
                # Halves keep an axis of their own: joined, a batch split over many devices would have to be dealt anew.
                rows = jnp.stack([teacher[i], student[j]])  # [2, B, D]
                similarity = jnp.einsum("abd,ced->abce", rows, rows, precision="highest") / temperature
                others = jax.nn.logsumexp(jnp.where(itself, -jnp.inf, similarity), axis=(2, 3))
                positive = (rows[0] * rows[1]).sum(axis=-1) / temperature
                losses.append((others - positive).mean())
    return jnp.stack(losses).mean()


def embedding_deviation(embeddings: jax.Array) -> jax.Array:
    """Returns how far L2-normalised embeddings [N, D] spread: 1 when uniform on the sphere, 0 when all are alike."""
    unit = l2_normalize(embeddings.astype(jnp.float32))
    return jnp.sqrt(jnp.maximum(unit.var(axis=0).sum(), 0.0))


def alignment(a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns the mean cosine between matching rows of two gradients [..., D]; a row without gradient counts as 0."""
    return (l2_normalize(a) * l2_normalize(b)).sum(axis=-1).mean()
