"""The train step, pure and un-jitted: (state, batch) → (state, metrics)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from memo_jax import losses
from memo_jax.compiler import cpu_barrier
from memo_jax.gate import GateRule, updated_gate
from memo_jax.models import Branch
from memo_jax.optim import Schedules
from memo_jax.reductions import squared_norm
from memo_jax.state import TrainState, student_params

Views = tuple[jax.Array, jax.Array]  # normalised log-mel [B, V, T, F] of the global and of the local views


class LossWeights(NamedTuple):
    """Temperatures and weights of the losses.

    `cross` is λ; `cross_head` names the head that cross-distillation uses ("self": one head shared by both). With
    more than two branches, λ is shared evenly by the other branches' teachers. `contrastive` multiplies NT-Xent.
    """

    student_temp: float = 0.1
    center_momentum: float = 0.9
    self: float = 1.0
    cross: float = 1.0
    cross_head: str = "cross"
    contrastive: float = 1.0 / 0.07
    contrastive_temperature: float = 0.1


class Recipe(NamedTuple):
    """What a run's steps have in common; static under jit."""

    branches: dict[str, Branch]
    optimizer: optax.GradientTransformation
    schedules: Schedules
    weights: LossWeights
    gate_rule: GateRule


def distillation_pairs(names: list[str], weights: LossWeights) -> list[tuple[str, str, str, float]]:
    """Returns (student branch, teacher branch, head, weight): the diagonal is self-, the rest cross-distillation."""
    pairs = []
    for student in names:
        for teacher in names:
            if student == teacher:
                pairs.append((student, teacher, "self", weights.self))
            else:
                pairs.append((student, teacher, weights.cross_head, weights.cross / (len(names) - 1)))
    return [pair for pair in pairs if pair[3] != 0]


def train_mode(branch: Branch, method: str, params, batch_stats, *inputs):
    """Returns what a branch's method gives in train mode, and the batch statistics it has updated."""
    out, updated = branch.apply(
        {"params": params, "batch_stats": batch_stats}, *inputs, train=True, method=method, mutable=["batch_stats"]
    )
    return out, {**batch_stats, **updated["batch_stats"]}


# Rows are utterance-major, so that a batch sharded over devices stays so when views join and part.
def merge_views(x: jax.Array) -> jax.Array:
    """Returns [B, V, …] as rows [B·V, …]."""
    return x.reshape((-1,) + x.shape[2:])


def by_view(x: jax.Array, views: int) -> jax.Array:
    """Returns rows [B·V, …] as [V, B, …]."""
    return x.reshape((-1, views) + x.shape[1:]).swapaxes(0, 1)


def student_embeddings(branch: Branch, params, batch_stats, views: Views):
    """Returns the embeddings [V, B, D] of global and of local views, and batch statistics updated by both in turn."""
    embeddings = []
    for features in views:
        embedding, batch_stats = train_mode(branch, "embed", params, batch_stats, merge_views(features))
        embeddings.append(by_view(embedding, features.shape[1]))
    return tuple(embeddings), batch_stats


def logits_by_view(branch: Branch, params, batch_stats, embeddings):
    """Returns logits {head: [V, B, K]} of embeddings, each [V', B, D], and updated batch statistics.

    The layers with batch norm run on each array in turn; all views are compared with the prototypes at once.
    """
    units = []
    for embedding in embeddings:
        rows = merge_views(embedding.swapaxes(0, 1))
        heads, batch_stats = train_mode(branch, "unit_vectors", params, batch_stats, rows)
        units.append({head: by_view(x, embedding.shape[0]) for head, x in heads.items()})
    together = jax.tree.map(lambda *parts: jnp.concatenate(parts), *units)
    return branch.apply({"params": params}, together, method="compare"), batch_stats


def teacher_outputs(branch: Branch, variables, features):
    """Returns the teacher's embedding [W, B, D], its logits {head: [W, B, K]} and its updated batch statistics."""
    params, batch_stats = variables["params"], variables["batch_stats"]
    embedding, batch_stats = train_mode(branch, "embed", params, batch_stats, merge_views(features))
    embedding = by_view(embedding, features.shape[1])
    logits, batch_stats = logits_by_view(branch, params, batch_stats, [embedding])
    return embedding, logits, batch_stats


def train_step_on_features(state: TrainState, views: Views, recipe: Recipe) -> tuple[TrainState, dict[str, Any]]:
    """Takes one step on normalised log-mel features of the global and the local views.

    Returns the new state and metrics, scalars by the names that metrics.jsonl uses. `gate/open` tells whether this
    step used the contrastive term; `gate/closed_at` is −1 or the first step without it.
    """
    weights, rule, names = recipe.weights, recipe.gate_rule, list(recipe.branches)
    teacher_temp = recipe.schedules.teacher_temp(state.step)
    metrics: dict[str, Any] = {}

    teacher_embedding, teacher_logits, teacher_stats = {}, {}, {}
    for name, branch in recipe.branches.items():
        teacher_embedding[name], teacher_logits[name], teacher_stats[name] = teacher_outputs(
            branch, state.teacher[name], views[0]
        )

    grads, student_stats, contrastive_losses, alignments = {}, {}, [], []
    for name, branch in recipe.branches.items():
        params, stats = state.student[name]["params"], state.student[name]["batch_stats"]
        if grads:  # one branch after the other: what the backward pass of one needs is large
            grads, params, views = cpu_barrier((grads, params, views))
        backbone = {"backbone": params["backbone"]}
        heads = {part: of_part for part, of_part in params.items() if part != "backbone"}
        # The backward pass is cut at the embedding: there the gradients of both kinds of loss meet, and their cosine
        # (which the `conflict` gate reads) comes for free.
        embeddings, backbone_vjp, stats = jax.vjp(
            lambda p: student_embeddings(branch, p, stats, views), backbone, has_aux=True  # noqa: B023
        )

        def distill(heads, embeddings):
            logits, new_stats = logits_by_view(branch, heads, stats, embeddings)  # noqa: B023
            total, terms = 0.0, {}
            for student, teacher, head, weight in distillation_pairs(names, weights):
                if student == name:  # noqa: B023
                    loss, indicators = losses.distillation(
                        logits[head], teacher_logits[teacher][head], state.center[teacher][head],
                        weights.student_temp, teacher_temp,
                    )
                    total = total + weight * loss
                    terms[teacher] = (loss, indicators)
            return total, (terms, new_stats)

        (total, (terms, student_stats[name])), gradients = jax.value_and_grad(
            distill, argnums=(0, 1), has_aux=True
        )(heads, embeddings)
        # All of a branch's gradients come before its updates, which so need no copies of parameters that are still read.
        head_grads, embedding_grads = cpu_barrier(gradients)
        for teacher, (loss, indicators) in terms.items():
            kind = "self" if teacher == name else "cross"
            suffix = name if len(names) <= 2 or kind == "self" else f"{name}-{teacher}"
            metrics[f"loss/{kind}/{suffix}"] = loss
            for indicator, value in indicators.items():
                metrics[f"{indicator}/{kind}/{suffix}"] = value

        if rule.name != "never" and weights.contrastive != 0:
            global_embedding, distill_grad = embeddings[0], embedding_grads[0]

            def contrast(global_embedding):
                return weights.contrastive * losses.contrastive(
                    global_embedding, teacher_embedding[name], weights.contrastive_temperature  # noqa: B023
                )

            def open_gate(embedding, distill_grad):
                loss, grad = jax.value_and_grad(contrast)(embedding)
                return loss, grad, losses.alignment(grad, distill_grad)

            def closed_gate(embedding, distill_grad):
                return jnp.float32(0), jnp.zeros_like(embedding), jnp.float32(0)

            # Once closed, the term is skipped, not multiplied by zero.
            loss, grad, cosine = jax.lax.cond(
                state.gate.closed, closed_gate, open_gate, global_embedding, distill_grad
            )
            total = total + loss
            embedding_grads = (distill_grad + grad, *embedding_grads[1:])
            metrics[f"loss/contrastive/{name}"] = loss
            metrics[f"alignment/{name}"] = cosine
            contrastive_losses.append(loss)
            alignments.append(cosine)

        (backbone_grads,) = cpu_barrier(backbone_vjp(embedding_grads))
        grads[name] = {**backbone_grads, **head_grads}
        metrics[f"loss/{name}"] = total
        metrics[f"embedding_std/{name}"] = losses.embedding_deviation(teacher_embedding[name][0])

    params = student_params(state)
    updates, opt_state = recipe.optimizer.update(grads, state.opt_state, params)
    params = optax.apply_updates(params, updates)
    momentum = recipe.schedules.momentum(state.step)
    ema = lambda teacher, student: momentum * teacher + (1 - momentum) * student  # noqa: E731
    center = {
        name: {
            head: losses.updated_center(old, teacher_logits[name][head], weights.center_momentum)
            for head, old in heads.items()
        }
        for name, heads in state.center.items()
    }
    gate = state.gate
    if contrastive_losses:
        gate = updated_gate(
            gate, state.step, jnp.stack(contrastive_losses).mean(), jnp.stack(alignments).mean(), rule
        )
    new_state = TrainState(
        step=state.step + 1,
        student={name: {"params": params[name], "batch_stats": student_stats[name]} for name in names},
        teacher={
            name: {
                "params": jax.tree.map(ema, state.teacher[name]["params"], params[name]),
                "batch_stats": teacher_stats[name],
            }
            for name in names
        },
        center=center,
        opt_state=opt_state,
        gate=gate,
    )
    metrics |= {
        "loss": sum(metrics[f"loss/{name}"] for name in names),
        "lr": recipe.schedules.learning_rate(state.step),
        "momentum": momentum,
        "teacher_temp": teacher_temp,
        "gate/open": 1 - state.gate.closed.astype(jnp.int32) if contrastive_losses else jnp.int32(0),
        "gate/closed_at": gate.closed_at,
        "gate/loss": gate.loss,
        "gate/alignment": gate.alignment,
        "gradient_norm": jnp.sqrt(sum(squared_norm(g) for g in jax.tree.leaves(grads))),
    }
    return new_state, metrics


def train_step(
    state: TrainState, batch: Any, banks: dict[str, jax.Array], key: jax.Array, *, recipe: Recipe,
    front_end: Callable[[jax.Array, Any, dict[str, jax.Array]], Views],
) -> tuple[TrainState, dict[str, Any]]:
    """Takes one step on a batch of int16 crops: augmentation, log-mel, then `train_step_on_features`.

    Every random draw comes from `key` and the state's step, so a resumed run needs no saved generator.
    """
    views = front_end(jax.random.fold_in(key, state.step), batch, banks)
    return train_step_on_features(state, views, recipe)
