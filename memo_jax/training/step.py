"""The train step, pure and un-jitted: (state, batch) → (state, metrics)."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from memo_jax.models import Branch, head_part
from memo_jax.training import losses
from memo_jax.training.gate import GateRule, updated_gate
from memo_jax.training.optim import Schedules
from memo_jax.training.state import TrainState
from memo_jax.xla.compiler import cpu_barrier
from memo_jax.xla.reductions import squared_norm

Views = tuple[jax.Array, jax.Array]  # normalised log-mel [B, V, T, F] of the global and of the local views


class LossWeights(NamedTuple):
    """Temperatures and weights of the losses.

    `cross` is λ; `cross_head` names the head that cross-distillation uses ("self": one head shared by both). With
    more than two branches, λ is shared evenly by the other branches' teachers. `contrastive` multiplies NT-Xent, of
    which `contrastive_margin` makes AM-NT-Xent.
    """

    student_temp: float = 0.1
    center_momentum: float = 0.9
    self: float = 1.0
    cross: float = 1.0
    cross_head: str = "cross"
    contrastive: float = 1.0 / 0.07
    contrastive_temperature: float = 0.1
    contrastive_margin: float = 0.0


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


def train_mode(module, params, batch_stats, x: jax.Array, method: str = "__call__"):
    """Returns what a module makes of x in train mode, and the batch statistics it has updated."""
    out, updated = module.apply(
        {"params": params, "batch_stats": batch_stats}, x, train=True, method=method, mutable=["batch_stats"]
    )
    return out, updated["batch_stats"]


# Rows are utterance-major, so that a batch sharded over devices stays so when views join and part.
def merge_views(x: jax.Array) -> jax.Array:
    """Returns [B, V, …] as rows [B·V, …]."""
    return x.reshape((-1,) + x.shape[2:])


def by_view(x: jax.Array, views: int) -> jax.Array:
    """Returns rows [B·V, …] as [V, B, …]."""
    return x.reshape((-1, views) + x.shape[1:]).swapaxes(0, 1)


def embeddings_by_view(backbone, params, batch_stats, features: jax.Array):
    """Returns a backbone's embeddings [V, B, D] of features [B, V, T, F], and its updated batch statistics."""
    embeddings, batch_stats = train_mode(backbone, params, batch_stats, merge_views(features))
    return by_view(embeddings, features.shape[1]), batch_stats


def logits_by_view(head, params, batch_stats, embeddings: Sequence[jax.Array]):
    """Returns a head's logits [V, B, K] of embeddings, each [V', B, D], and its updated batch statistics.

    The layers with batch norm run on each array in turn; all views are compared with the prototypes at once.
    """
    units = []
    for of_views in embeddings:
        rows = merge_views(of_views.swapaxes(0, 1))
        of_rows, batch_stats = train_mode(head, params, batch_stats, rows, "unit_vectors")
        units.append(by_view(of_rows, of_views.shape[0]))
    return head.apply({"params": params}, jnp.concatenate(units), method="cosines"), batch_stats


class TeacherOutputs(NamedTuple):
    """What a branch's teacher shows of the global views, and what its own forward pass has updated."""

    embeddings: jax.Array  # [W, B, D]
    distributions: dict[str, jax.Array]  # {head: [W, B, K]}
    entropies: dict[str, dict[str, jax.Array]]  # {head: those of `losses.teacher_distributions`}
    batch_stats: dict[str, Any]
    centers: dict[str, jax.Array]


def teacher_outputs(
    branch: Branch, variables, centers, features, temperature, center_momentum: float
) -> TeacherOutputs:
    """Returns the lesson of a branch's teacher on features [B, W, T, F]."""
    params, stats = variables["params"], dict(variables["batch_stats"])
    embeddings, stats["backbone"] = embeddings_by_view(branch.backbone, params["backbone"], stats["backbone"], features)
    distributions, entropies, new_centers = {}, {}, {}
    for head in branch.head_names:
        part = head_part(head)
        logits, stats[part] = logits_by_view(branch.head, params[part], stats[part], [embeddings])
        distributions[head], entropies[head] = losses.teacher_distributions(logits, centers[head], temperature)
        new_centers[head] = losses.updated_center(centers[head], logits, center_momentum)
    return TeacherOutputs(embeddings, distributions, entropies, stats, new_centers)


def contrastive_term(embeddings, teacher_embeddings, distill_grad, closed, weights: LossWeights):
    """Returns the weighted contrastive loss, its gradient and that gradient's alignment with distillation's.

    All are zero once the gate has closed: then the term is skipped, not multiplied by zero.
    """

    def contrast(embeddings):
        loss = losses.contrastive(
            embeddings, teacher_embeddings, weights.contrastive_temperature, weights.contrastive_margin
        )
        return weights.contrastive * loss

    def open_gate(embeddings, distill_grad):
        loss, gradient = jax.value_and_grad(contrast)(embeddings)
        return loss, gradient, losses.alignment(gradient, distill_grad)

    def closed_gate(embeddings, distill_grad):
        return jnp.float32(0), jnp.zeros_like(embeddings), jnp.float32(0)

    return jax.lax.cond(closed, closed_gate, open_gate, embeddings, distill_grad)


class BranchUpdate(NamedTuple):
    """What a step makes of a branch."""

    student: Any
    teacher: Any
    opt_state: Any
    metrics: dict[str, jax.Array]
    squared_gradient: jax.Array


def update_branch(
    name: str, state: TrainState, views: Views, outputs: dict[str, TeacherOutputs], recipe: Recipe
) -> BranchUpdate:
    """Takes a step of one branch's student and teacher.

    So that little is there at a time, one crop length comes after the other, then one head after the other, and each
    head is updated before the backbone's last backward pass. The backward pass is cut at the embedding: there the
    gradients of both kinds of loss meet, and their cosine (which the `conflict` gate reads) comes for free.
    """
    branch, weights = recipe.branches[name], recipe.weights
    momentum = cpu_barrier(recipe.schedules.momentum(state.step))
    params, averages = state.student[name]["params"], state.teacher[name]["params"]
    stats = dict(state.student[name]["batch_stats"])
    new_params, new_averages, new_opt_state, squares = {}, {}, {}, []
    pairs = [pair for pair in distillation_pairs(list(recipe.branches), weights) if pair[0] == name]
    shares = losses.shares_of_pairs([x.shape[1] for x in views])
    embeddings, backbone_grads, distilled, metrics = [], None, {}, {}

    def distill(head, head_params, embeddings, seen):
        """Returns a head's loss on embeddings, each [V', B, D], (its terms, and its updated batch statistics)."""
        logits, new_stats = logits_by_view(branch.head, head_params, stats[head_part(head)], embeddings)
        terms = {
            pair: losses.distillation(logits, outputs[pair[1]].distributions[head], weights.student_temp, seen)
            for pair in pairs
            if pair[2] == head
        }
        return sum((pair[3] * term for pair, term in terms.items()), jnp.float32(0)), (terms, new_stats)

    def update(part, grads):
        """Updates student and teacher of a part by its gradients."""
        squares.extend(squared_norm(leaf) for leaf in jax.tree.leaves(grads))
        updates, new_opt_state[part] = recipe.optimizer.update(grads, state.opt_state[name][part], params[part])
        new_params[part] = optax.apply_updates(params[part], updates)
        new_averages[part] = jax.tree.map(
            lambda t, s: momentum * t + (1 - momentum) * s, averages[part], new_params[part]
        )

    for i, features in enumerate(views):
        backbone_grads, features = cpu_barrier((backbone_grads, features))
        of_views, backbone_vjp, stats["backbone"] = jax.vjp(
            lambda p: embeddings_by_view(branch.backbone, p, stats["backbone"], features),  # noqa: B023
            params["backbone"],
            has_aux=True,
        )
        gradient = jnp.zeros_like(of_views)
        for head in branch.head_names:
            part = head_part(head)
            gradient, of_views = cpu_barrier((gradient, of_views))
            if i < len(views) - 1:
                # Of these views the loss is a sum of its own. The head's gradient, as large as the prototypes, is
                # taken later, for all views at once, at the price of a second forward pass of these through the head.
                seen = of_views.shape[0] if i == 0 else 0
                of_head = jax.grad(
                    lambda x: shares[i] * distill(head, params[part], [x], seen)[0]  # noqa: B023
                )(of_views)
            else:
                (_, (terms, stats[part])), (head_grads, of_head) = jax.value_and_grad(
                    lambda p, x: distill(head, p, [*embeddings, x], views[0].shape[1]),
                    argnums=(0, 1),  # noqa: B023
                    has_aux=True,
                )(params[part], of_views)
                distilled |= terms
                # All that is computed from parameters comes before their update, which so needs no copies of them.
                head_grads, of_head = cpu_barrier((head_grads, of_head))
                update(part, head_grads)
            gradient = gradient + of_head
        if i == 0 and recipe.gate_rule.name != "never" and weights.contrastive != 0:
            loss, of_contrast, cosine = contrastive_term(
                of_views, outputs[name].embeddings, gradient, state.gate.closed, weights
            )
            gradient = gradient + of_contrast
            metrics |= {f"loss/contrastive/{name}": loss, f"alignment/{name}": cosine}
        embeddings.append(of_views)
        (of_backbone,) = backbone_vjp(gradient)
        backbone_grads = jax.tree.map(jnp.add, backbone_grads, of_backbone) if i else of_backbone
    update("backbone", *cpu_barrier((backbone_grads,)))

    for (_, teacher, head, _), loss in distilled.items():
        kind = "self" if teacher == name else "cross"
        suffix = name if len(recipe.branches) <= 2 or kind == "self" else f"{name}-{teacher}"
        entropies = outputs[teacher].entropies[head]
        metrics |= {f"loss/{kind}/{suffix}": loss, f"kl/{kind}/{suffix}": loss - entropies["teacher_entropy"]}
        metrics |= {f"{entropy}/{kind}/{suffix}": value for entropy, value in entropies.items()}
    metrics[f"loss/{name}"] = sum(pair[3] * loss for pair, loss in distilled.items()) + metrics.get(
        f"loss/contrastive/{name}", 0.0
    )
    metrics[f"embedding_std/{name}"] = losses.embedding_deviation(outputs[name].embeddings[0])
    return BranchUpdate(
        {"params": new_params, "batch_stats": stats},
        {"params": new_averages, "batch_stats": outputs[name].batch_stats},
        new_opt_state,
        metrics,
        sum(squares),
    )


def train_step_on_features(state: TrainState, views: Views, recipe: Recipe) -> tuple[TrainState, dict[str, Any]]:
    """Takes one step on normalised log-mel features of the global and the local views.

    Returns the new state and metrics, scalars by the names that metrics.jsonl uses. `gate/open` tells whether this
    step used the contrastive term; `gate/closed_at` is −1 or the first step without it.
    """
    names, schedules = list(recipe.branches), recipe.schedules
    teacher_temp = schedules.teacher_temp(state.step)
    outputs = {
        name: teacher_outputs(
            branch, state.teacher[name], state.center[name], views[0], teacher_temp, recipe.weights.center_momentum
        )
        for name, branch in recipe.branches.items()
    }
    trained: dict[str, BranchUpdate] = {}
    for name in names:
        # One branch after the other, and all after the outputs, whose teachers so need no copies to be updated.
        outputs, trained, views = cpu_barrier((outputs, trained, views))
        trained[name] = update_branch(name, state, views, outputs, recipe)

    metrics = {key: value for of_branch in trained.values() for key, value in of_branch.metrics.items()}
    gate, contrastive = state.gate, [f"loss/contrastive/{name}" in metrics for name in names]
    if any(contrastive):
        means = [
            jnp.stack([metrics[f"{kind}/{name}"] for name in names]).mean()
            for kind in ("loss/contrastive", "alignment")
        ]
        gate = updated_gate(gate, state.step, *means, recipe.gate_rule)
    new_state = TrainState(
        step=state.step + 1,
        student={name: trained[name].student for name in names},
        teacher={name: trained[name].teacher for name in names},
        center={name: outputs[name].centers for name in names},
        opt_state={name: trained[name].opt_state for name in names},
        gate=gate,
    )
    metrics |= {
        "loss": sum(metrics[f"loss/{name}"] for name in names),
        "lr": schedules.learning_rate(state.step),
        "momentum": schedules.momentum(state.step),
        "teacher_temp": teacher_temp,
        "gate/open": 1 - state.gate.closed.astype(jnp.int32) if any(contrastive) else jnp.int32(0),
        "gate/closed_at": gate.closed_at,
        "gate/loss": gate.loss,
        "gate/alignment": gate.alignment,
        "gradient_norm": jnp.sqrt(sum(of_branch.squared_gradient for of_branch in trained.values())),
    }
    return new_state, metrics


def train_step(
    state: TrainState,
    batch: Any,
    banks: dict[str, jax.Array],
    key: jax.Array,
    *,
    recipe: Recipe,
    front_end: Callable[[jax.Array, Any, dict[str, jax.Array]], Views],
) -> tuple[TrainState, dict[str, Any]]:
    """Takes one step on a batch of int16 crops: augmentation, log-mel, then `train_step_on_features`.

    Every random draw comes from `key` and the state's step, so a resumed run needs no saved generator.
    """
    views = front_end(jax.random.fold_in(key, state.step), batch, banks)
    return train_step_on_features(state, views, recipe)
