"""Schedules and the optimiser chain: per-tensor clip, coupled masked decay, momentum or Adam, prototype freeze."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from memo_jax.xla.compiler import cpu_barrier
from memo_jax.xla.reductions import squared_norm


class Schedules(NamedTuple):
    """Functions of the step (from 0) that return float32 scalars, and the first step with trained prototypes."""

    learning_rate: optax.Schedule
    momentum: optax.Schedule
    teacher_temp: optax.Schedule
    prototypes_from: int


def cosine_learning_rate(peak: float, end: float, warmup_steps: int, total_steps: int) -> optax.Schedule:
    """Returns linear warm-up from 0 to `peak` (both reached), then cosine to `end` at step `total_steps`.

    The DINO recipes' schedule, step for step; `end` is not scaled with the batch.
    """
    if not 0 <= warmup_steps <= total_steps:
        raise ValueError(f"{warmup_steps} warm-up steps do not fit into {total_steps} steps")

    def schedule(step):
        warm = peak * step / max(warmup_steps - 1, 1)
        progress = jnp.clip((step - warmup_steps) / max(total_steps - warmup_steps, 1), 0, 1)
        return jnp.where(step < warmup_steps, warm, cosine(peak, end, progress))

    return schedule


def cosine(start: float, end: float, progress):
    """Returns half a cosine from `start` (progress 0) to `end` (progress 1)."""
    return end + 0.5 * (start - end) * (1 + jnp.cos(jnp.pi * progress))


def cosine_momentum(start: float, end: float, total_steps: int) -> optax.Schedule:
    """Returns the teacher's momentum, a cosine from `start` to `end` over all steps."""
    return lambda step: cosine(start, end, jnp.clip(step / total_steps, 0, 1))


def epoch_teacher_temp(start: float, end: float, warmup_epochs: int, steps_per_epoch: int) -> optax.Schedule:
    """Returns the teacher's temperature: linear over `warmup_epochs` epochs, both ends reached, then `end`."""

    def schedule(step):
        epoch = step // steps_per_epoch
        return (
            start + (end - start) * jnp.clip(epoch / max(warmup_epochs - 1, 1), 0, 1)
            if warmup_epochs > 1
            else (jnp.where(epoch < warmup_epochs, jnp.float32(start), jnp.float32(end)))
        )

    return schedule


def clip_each_tensor(max_norm: float) -> optax.GradientTransformation:
    """Scales every tensor by max_norm / (‖g‖ + 1e-6) where that is below 1: the DINO recipes clip per tensor."""

    def clip(g):
        coefficient = max_norm / (jnp.sqrt(squared_norm(g)) + 1e-6)
        return g * jnp.minimum(coefficient, 1.0).astype(g.dtype)

    return optax.stateless(lambda updates, params: jax.tree.map(clip, updates))


def is_prototypes(path) -> bool:
    """Says whether a pytree path ends at (or leads through) a head's prototypes."""
    return any(getattr(entry, "key", getattr(entry, "name", None)) == "prototypes" for entry in path)


def freeze_prototypes(inner: optax.GradientTransformation, until_step: int) -> optax.GradientTransformation:
    """Leaves prototypes and whatever `inner` keeps for them untouched before `until_step`.

    As if they had no gradient: no update, no decay, no momentum. `inner` sees zeros in place of their gradients and of
    themselves, since a gradient of zero alone would still decay them; what it keeps of zeros has to stay zero.
    """

    def init(params):
        return {"step": jnp.zeros((), jnp.int32), "inner": inner.init(params)}

    def update(updates, state, params=None):
        frozen = state["step"] < until_step

        def shown(path, x):
            return jnp.where(frozen, jnp.zeros_like(x), x) if is_prototypes(path) else x

        updates, params = jax.tree_util.tree_map_with_path(shown, (updates, params))
        updates, inner_state = inner.update(updates, state["inner"], params)
        return updates, {"step": state["step"] + 1, "inner": inner_state}

    return optax.GradientTransformation(init, update)


def momentum_in_place(decay: float) -> optax.GradientTransformation:
    """Returns optax.trace, whose momenta on a CPU are computed once for both the state and the update.

    Computed for each, they would read what the other has to write, so that parameters and momenta would be copied.
    """
    trace = optax.trace(decay)

    def update(updates, state, params=None):
        updates, state = trace.update(updates, state, params)
        return jax.tree.map(cpu_barrier, updates), state

    return optax.GradientTransformation(trace.init, update)


def has_decay(params):
    """Returns a mask that is true where weight decay applies: not on biases and other 1-D parameters."""
    return jax.tree.map(lambda p: p.ndim > 1, params)


def build_optimizer(
    name: str, schedules: Schedules, *, weight_decay: float, clip_norm: float, sgd_momentum: float = 0.9
) -> optax.GradientTransformation:
    """Returns the chain that turns gradients into updates to add.

    `sgd`: clip, coupled decay (added to the gradient), momentum, learning rate: the authors' recipe. `adamw`: clip,
    Adam, decoupled decay, learning rate: for small data and short runs. `clip_norm` 0 switches the clip off. Raises
    ValueError for another name.
    """
    clip = clip_each_tensor(clip_norm) if clip_norm > 0 else optax.identity()
    decay = optax.add_decayed_weights(weight_decay, mask=has_decay)
    if name == "sgd":
        body = [decay, momentum_in_place(sgd_momentum)]
    elif name == "adamw":
        body = [optax.scale_by_adam(), decay]
    else:
        raise ValueError(f"unknown optimizer {name!r}: choose sgd or adamw")
    # Behind a barrier it is computed once, not again in the update of every parameter.
    rate = optax.scale_by_learning_rate(lambda step: cpu_barrier(schedules.learning_rate(step)))
    chain = optax.chain(clip, *body, rate)
    return freeze_prototypes(chain, schedules.prototypes_from)


def scaled_learning_rate(base: float, batch_size: int) -> float:
    """Returns base·batch_size/256, the linear scaling rule; `batch_size` is the global one."""
    if not (base > 0 and math.isfinite(base)):
        raise ValueError(f"learning rate {base}: must be positive")
    return base * batch_size / 256
