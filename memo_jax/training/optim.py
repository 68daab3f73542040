"""Schedules and the optimiser: clip per tensor, masked weight decay, momentum or Adam, frozen prototypes."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from memo_jax.xla.compiler import materialize_on_cpu
from memo_jax.xla.reductions import squared_norm


class Schedules(NamedTuple):
    """What changes from step to step.

    Attributes:
      learning_rate, momentum, teacher_temp, margin, regularization: functions of the step (from 0) that return float32
        scalars.
      prototypes_from: the first step that trains the prototypes.
    """

    learning_rate: optax.Schedule
    momentum: optax.Schedule
    teacher_temp: optax.Schedule
    prototypes_from: int
    margin: optax.Schedule = optax.constant_schedule(0.0)
    regularization: optax.Schedule = optax.constant_schedule(1.0)


def cosine_learning_rate(peak: float, end: float, warmup_steps: int, total_steps: int) -> optax.Schedule:
    """Returns linear warm-up from 0 to `peak` (both reached), then a cosine to `end` at step `total_steps`.

    The schedule of the DINO recipes, step for step; `end` is not scaled with the batch.

    Raises:
      ValueError: the warm-up is negative or longer than the run.
    """
    if not 0 <= warmup_steps <= total_steps:
        raise ValueError(f"{warmup_steps} warm-up steps do not fit into {total_steps} steps")
    warmup = optax.linear_schedule(0.0, peak, max(warmup_steps - 1, 1))
    decay = optax.cosine_decay_schedule(peak, max(total_steps - warmup_steps, 1), alpha=end / peak)
    return optax.join_schedules([warmup, decay], [warmup_steps])


def cosine_momentum(start: float, end: float, total_steps: int) -> optax.Schedule:
    """Returns the teacher's momentum: a cosine from `start` at step 0 to `end` at step `total_steps`."""
    remaining = optax.cosine_decay_schedule(1.0, total_steps)
    return lambda step: end + (start - end) * remaining(step)


def epoch_teacher_temp(start: float, end: float, warmup_epochs: int, steps_per_epoch: int) -> optax.Schedule:
    """Returns the teacher's temperature, constant within an epoch: linear from `start` to `end`, then `end`.

    Args:
      start: temperature of the first epoch.
      end: temperature of the last epoch of the warm-up, and of all after it.
      warmup_epochs: epochs of the warm-up; 1 is the first epoch at `start` alone, 0 none: always `end`.
      steps_per_epoch: at least 1.
    """
    if warmup_epochs < 1:
        return optax.constant_schedule(end)
    by_epoch = optax.linear_schedule(start, end, max(warmup_epochs - 1, 1))
    return lambda step: by_epoch(step // steps_per_epoch)


def rising_margin(margin: float, warmup_steps: int) -> optax.Schedule:
    """Returns the margin of AAM-softmax: linear from 0 at step 0 to `margin` at step `warmup_steps`, then constant."""
    if warmup_steps < 1:
        return optax.constant_schedule(margin)
    return optax.linear_schedule(0.0, margin, warmup_steps)


def rising_regularization(start: float, warmup_steps: int) -> optax.Schedule:
    """Returns the factor of variance and covariance: linear from `start` at step 0 to 1 at `warmup_steps`, then 1."""
    return optax.linear_schedule(start, 1.0, warmup_steps) if warmup_steps else optax.constant_schedule(1.0)


def clip_each_tensor(max_norm: float) -> optax.GradientTransformation:
    """Scales each tensor by max_norm / (‖g‖ + 1e-6) where that is below 1: the DINO recipes clip per tensor."""

    def clip(g):
        coefficient = max_norm / (jnp.sqrt(squared_norm(g)) + 1e-6)
        return g * jnp.minimum(coefficient, 1.0).astype(g.dtype)

    return optax.stateless(lambda updates, params: jax.tree.map(clip, updates))


def is_prototypes(path: tuple[Any, ...]) -> bool:
    """Returns whether a pytree path leads to a head's prototypes, or to the optimiser's state for them."""
    return "prototypes" in jax.tree_util.keystr(path, simple=True, separator="/").split("/")


def freeze_prototypes(inner: optax.GradientTransformation, until_step: int) -> optax.GradientTransformation:
    """Leaves prototypes, and the state that `inner` keeps for them, untouched before `until_step`.

    As if they had no gradient: no update, no decay, no momentum. `inner` sees zeros for their gradients and for
    themselves, because a gradient of zero alone would still decay them; given zeros, its state must stay zero.
    """

    def init(params):
        return {"step": jnp.zeros((), jnp.int32), "inner": inner.init(params)}

    def update(updates, state, params=None):
        frozen = state["step"] < until_step

        def masked(path, x):
            return jnp.where(frozen, jnp.zeros_like(x), x) if is_prototypes(path) else x

        updates, params = jax.tree_util.tree_map_with_path(masked, (updates, params))
        updates, inner_state = inner.update(updates, state["inner"], params)
        return updates, {"step": state["step"] + 1, "inner": inner_state}

    return optax.GradientTransformation(init, update)


def scale_by_adam(prototypes_from: int) -> optax.GradientTransformation:
    """Returns Adam whose bias correction starts, for prototypes, at step `prototypes_from`."""
    adam = optax.scale_by_adam()

    def update(updates, state, params=None):
        late = state._replace(count=jnp.maximum(state.count - prototypes_from, 0))
        of_prototypes, _ = adam.update(updates, late, params)
        of_others, state = adam.update(updates, state, params)
        updates = jax.tree_util.tree_map_with_path(
            lambda path, late, other: late if is_prototypes(path) else other, of_prototypes, of_others
        )
        return updates, state

    return optax.GradientTransformation(adam.init, update)


def has_decay(params: Any) -> Any:
    """Returns a mask that is true where weight decay applies: not on biases and other 1-D parameters."""
    return jax.tree.map(lambda p: p.ndim > 1, params)


def build_optimizer(
    name: str, schedules: Schedules, *, weight_decay: float, clip_norm: float, sgd_momentum: float = 0.9
) -> optax.GradientTransformation:
    """Returns the optimiser of the students.

    Args:
      name: "sgd" (clip, coupled decay, momentum, learning rate: the authors' recipe) or "adamw" (clip, Adam, decoupled
        decay, learning rate: for small data and short runs).
      schedules: its `learning_rate` and `prototypes_from` are used.
      weight_decay: coefficient of the decay of matrices.
      clip_norm: largest norm of each tensor's gradient; 0 turns clipping off.
      sgd_momentum: decay of the momentum of "sgd".

    Raises:
      ValueError: an unknown name.
    """
    clip = clip_each_tensor(clip_norm) if clip_norm > 0 else optax.identity()
    decay = optax.add_decayed_weights(weight_decay, mask=has_decay)
    if name == "sgd":
        body = [decay, optax.trace(sgd_momentum)]
    elif name == "adamw":
        body = [scale_by_adam(schedules.prototypes_from), decay]
    else:
        raise ValueError(f"unknown optimizer {name!r}: choose sgd or adamw")
    # Computed once, not for each array: a step of small networks would take 9 % longer.
    rate = optax.scale_by_learning_rate(lambda step: materialize_on_cpu(schedules.learning_rate(step)))
    return freeze_prototypes(optax.chain(clip, *body, rate), schedules.prototypes_from)


def scaled_learning_rate(base: float, batch_size: int) -> float:
    """Returns base · batch_size / 256, the linear scaling rule; `batch_size` is the global one.

    Raises:
      ValueError: a base that is not positive and finite.
    """
    if not (base > 0 and math.isfinite(base)):
        raise ValueError(f"learning rate {base}: must be positive")
    return base * batch_size / 256
