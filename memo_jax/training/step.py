"""The train step: every student descends MeMo's objective, every teacher follows its student.

Branch b (an ECAPA-TDNN, say, or a ResNet34) has a student and a teacher of one architecture. Of V views of an utterance
the teachers see the first W, the global crops. Let e_b(v) be the student's embedding of view v and s_b^h(v) its logits
by head h; with a bar they are the teacher's, through which no gradient flows. The objective (`objective`) is

    L = Σ_b [ D_bb^self + λ/(B−1) · Σ_{c≠b} D_bc^cross + g · w · C_b + u · S_b ]

with, over the batch and the pairs of views,

    D_bc^h = mean_{i≤W, v≠i} −⟨ softmax((s̄_c^h(i) − center_c^h) / τ_t), log softmax(s_b^h(v) / τ_s) ⟩   distillation
    C_b    = NT-Xent of e_b and ē_b over the global views                                             contrastive
    g      = 1 while the gate is open, then 0                                                         (gate.py)
    S_b    = AAM-softmax of e_b over all views, of configs that train with labels; else u = 0         supervised

Then, with the momentum m and the student's new parameters θ_b, in this order:

    θ̄_b      ← m · θ̄_b + (1 − m) · θ_b
    center_b^h ← 0.9 · center_b^h + 0.1 · mean of the teacher's logits of this step

Everything here is pure and un-jitted; `program` compiles it. The method: Jin, Tu, Mak, "Self-Supervised Learning with
Multi-Head Multi-Mode Knowledge Distillation for Speaker Verification", Interspeech 2024.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from memo_jax.models import SPEAKER_HEAD, Branch, head_part
from memo_jax.models.heads import SpeakerHead
from memo_jax.training import losses
from memo_jax.training.front_end import Views
from memo_jax.training.gate import GateRule, updated_gate
from memo_jax.training.optim import Schedules
from memo_jax.training.state import TrainState, Variables
from memo_jax.xla.compiler import materialize_on_cpu
from memo_jax.xla.reductions import squared_norm

Metrics = dict[str, jax.Array]  # scalars by the names that metrics.jsonl uses


class LossWeights(NamedTuple):
    """Temperatures and weights of the objective.

    Attributes:
      student_temp: τ_s.
      center_momentum: decay of the centres per step.
      self: weight of self-distillation.
      cross: λ, shared evenly by the teachers of the other branches.
      cross_head: the head of cross-distillation; with "self", one head serves both.
      contrastive: w, the weight of NT-Xent.
      contrastive_temperature: of NT-Xent.
      contrastive_margin: of AM-NT-Xent; 0 for NT-Xent.
      contrastive_mask_same_speaker: leave other utterances of an anchor's speaker out of its negatives, by labels.
    """

    student_temp: float = 0.1
    center_momentum: float = 0.9
    self: float = 1.0
    cross: float = 1.0
    cross_head: str = "cross"
    contrastive: float = 1.0 / 0.07
    contrastive_temperature: float = 0.1
    contrastive_margin: float = 0.0
    contrastive_mask_same_speaker: bool = False


class Supervision(NamedTuple):
    """How labels enter the objective.

    Attributes:
      weight: u, the weight of AAM-softmax; 0 for training without labels.
      scale: of the cosines.
    """

    weight: float = 0.0
    scale: float = 30.0


class Recipe(NamedTuple):
    """What the steps of a run have in common; static under jit.

    With `remat`, the backward pass recomputes the backbones' activations of all crop lengths but the last. `partners`
    is the number of utterances that have partners in the state, 0 in runs without.
    """

    branches: dict[str, Branch]
    optimizer: optax.GradientTransformation
    schedules: Schedules
    weights: LossWeights
    gate_rule: GateRule
    supervision: Supervision = Supervision()
    remat: bool = True
    partners: int = 0

    @property
    def is_contrastive(self) -> bool:
        """Whether any step may use the contrastive term."""
        return self.gate_rule.name != "never" and self.weights.contrastive != 0


class Pair(NamedTuple):
    """A student that learns from a teacher by a head, with the weight of this loss in the objective."""

    student: str
    teacher: str
    head: str
    weight: float

    @property
    def kind(self) -> str:
        """Whether this is self- or cross-distillation."""
        return "self" if self.student == self.teacher else "cross"


def distillation_pairs(names: Sequence[str], weights: LossWeights) -> list[Pair]:
    """Returns all pairs of branches whose weight is not zero: the diagonal is self-, the rest cross-distillation."""
    pairs = []
    for student in names:
        for teacher in names:
            if student == teacher:
                pairs.append(Pair(student, teacher, "self", weights.self))
            else:
                pairs.append(Pair(student, teacher, weights.cross_head, weights.cross / (len(names) - 1)))
    return [pair for pair in pairs if pair.weight != 0]


# The forward pass.


def apply_in_train_mode(module: nn.Module, params, batch_stats, x: jax.Array, method: str = "__call__"):
    """Returns a module's output for x in train mode, and its updated batch statistics."""
    out, updated = module.apply(
        {"params": params, "batch_stats": batch_stats}, x, train=True, method=method, mutable=["batch_stats"]
    )
    return out, updated["batch_stats"]


# Rows are utterance-major: a batch sharded over devices stays sharded when views are merged and separated again.
def merge_views(x: jax.Array) -> jax.Array:
    """Returns [B, V, …] as rows [B·V, …]."""
    return x.reshape((-1,) + x.shape[2:])


def by_view(x: jax.Array, views: int) -> jax.Array:
    """Returns rows [B·V, …] as [V, B, …]."""
    return x.reshape((-1, views) + x.shape[1:]).swapaxes(0, 1)


@jax.named_scope("backbone")
def embeddings_by_view(backbone: nn.Module, params, batch_stats, features: jax.Array):
    """Returns a backbone's embeddings [V, B, D] of features [B, V, T, F], and its updated batch statistics."""
    embeddings, batch_stats = apply_in_train_mode(backbone, params, batch_stats, merge_views(features))
    return by_view(embeddings, features.shape[1]), batch_stats


@jax.named_scope("head")
def logits_by_view(head: nn.Module, params, batch_stats, embeddings: Sequence[jax.Array]):
    """Returns a head's logits [V, B, K] of the embeddings of each crop length, and its updated batch statistics.

    The layers with batch norm run on one crop length after the other, as the authors do; the cosines with the
    prototypes are computed for all views at once.
    """
    units = []
    for of_views in embeddings:
        rows = merge_views(of_views.swapaxes(0, 1))
        of_rows, batch_stats = apply_in_train_mode(head, params, batch_stats, rows, "unit_vectors")
        units.append(by_view(of_rows, of_views.shape[0]))
    return head.apply({"params": params}, jnp.concatenate(units), method="cosines"), batch_stats


def student_embeddings(backbone: nn.Module, params, batch_stats, views: Sequence[jax.Array], *, remat: bool = True):
    """Returns a student's embeddings [V, B, D] of the views of each crop length, and its updated batch statistics.

    With `remat`, only the last crop length keeps its activations for the backward pass; the others' are recomputed. At
    the authors' sizes and a batch of 4 on a CPU, the step then takes 8 % more time and half the temporary memory (0.38
    GB instead of 0.73).
    """
    embeddings = []
    for i, features in enumerate(views):
        embed = functools.partial(embeddings_by_view, backbone)
        if remat and i < len(views) - 1:
            embed = jax.checkpoint(embed)
        of_views, batch_stats = embed(params, batch_stats, features)
        # One crop length after the other, in the backward pass in the reverse order: their activations are never held
        # at the same time (0.38 GB of temporaries instead of 0.55).
        params, of_views = materialize_on_cpu((params, of_views))
        embeddings.append(of_views)
    return embeddings, batch_stats


class TeacherOutputs(NamedTuple):
    """A teacher's outputs for its views, and the statistics and centres that its forward pass updated."""

    embeddings: jax.Array  # [W, B, D]
    distributions: dict[str, jax.Array]  # {head: [W, B, K]}
    entropies: dict[str, Metrics]  # {head: those of `losses.teacher_distributions`}
    batch_stats: dict[str, Any]
    centers: dict[str, jax.Array]  # {head: [K]}


@jax.named_scope("teacher")
def teacher_outputs(
    branch: Branch,
    variables: Variables,
    centers: Mapping[str, jax.Array],
    features: jax.Array,
    temperature: jax.Array,
    center_momentum: float,
) -> TeacherOutputs:
    """Returns the outputs of a branch's teacher for features [B, W, T, F]."""
    params, stats = variables["params"], dict(variables["batch_stats"])
    embeddings, stats["backbone"] = embeddings_by_view(branch.backbone, params["backbone"], stats["backbone"], features)
    distributions, entropies, new_centers = {}, {}, {}
    for head in branch.head_names:
        part = head_part(head)
        logits, stats[part] = logits_by_view(branch.head, params[part], stats[part], [embeddings])
        with jax.named_scope("distributions"):
            distributions[head], entropies[head] = losses.teacher_distributions(logits, centers[head], temperature)
            new_centers[head] = losses.updated_center(centers[head], logits, center_momentum)
    return TeacherOutputs(embeddings, distributions, entropies, stats, new_centers)


def all_teacher_outputs(state: TrainState, views: Views, recipe: Recipe) -> dict[str, TeacherOutputs]:
    """Returns {branch: outputs of its teacher}."""
    temperature, momentum = recipe.schedules.teacher_temp(state.step), recipe.weights.center_momentum
    outputs = {}
    for name, branch in recipe.branches.items():
        with jax.named_scope(name):
            outputs[name] = teacher_outputs(
                branch, state.teacher[name], state.center[name], views.of_teachers, temperature, momentum
            )
    return outputs


# The objective.


def distillation_loss(
    head_params,
    embeddings: Sequence[jax.Array],
    *,
    branch: Branch,
    batch_stats,
    pairs: Sequence[Pair],
    teachers: Mapping[str, TeacherOutputs],
    temperature: float,
    shared_views: bool,
):
    """Returns the weighted distillation loss of a student by one head, and (its terms {pair: loss}, batch statistics).

    Args:
      head_params: the head's parameters.
      embeddings: the student's, [V, B, D] for each crop length.
      branch: of the student.
      batch_stats: the head's batch statistics.
      pairs: the student's pairs with this head.
      teachers: their outputs.
      temperature: τ_s.
      shared_views: whether the teachers' views are the first of the student's.
    """
    logits, batch_stats = logits_by_view(branch.head, head_params, batch_stats, embeddings)
    with jax.named_scope("distillation"):
        terms = {
            pair: losses.distillation(
                logits, teachers[pair.teacher].distributions[pair.head], temperature, shared_views
            )
            for pair in pairs
        }
    total = sum((pair.weight * term for pair, term in terms.items()), jnp.float32(0))
    return total, (terms, batch_stats)


@jax.named_scope("contrastive")
def contrastive_loss(
    embeddings: jax.Array,
    teacher_embeddings: jax.Array,
    weights: LossWeights,
    shared_views: bool,
    labels: jax.Array | None = None,
) -> jax.Array:
    """Returns w · C of a student's embeddings of its first kind of crop, [V, B, D], and its teacher's, [W, B, D].

    `labels`, int32 [B], are read only if the weights say that negatives of the same speaker are masked.
    """
    return weights.contrastive * losses.contrastive(
        embeddings,
        teacher_embeddings,
        weights.contrastive_temperature,
        weights.contrastive_margin,
        labels if weights.contrastive_mask_same_speaker else None,
        shared_views,
    )


def supervised_loss(
    head_params,
    embeddings: Sequence[jax.Array],
    labels: jax.Array,
    margin: jax.Array,
    *,
    branch: Branch,
    supervision: Supervision,
):
    """Returns u · S of a student's embeddings, [V, B, D] for each crop length, and the accuracy of its speaker head.

    Args:
      head_params: of the speaker head.
      embeddings: of all views.
      labels: int32 [B], the number of each utterance's speaker, negative where it is not known.
      margin: of this step.
      branch: of the student.
      supervision: of the recipe.
    """
    rows = jnp.concatenate([of_views.reshape(-1, of_views.shape[-1]) for of_views in embeddings])
    of_rows = jnp.tile(labels, len(rows) // len(labels))
    cosines = SpeakerHead(branch.speakers).apply({"params": head_params}, rows)
    loss = losses.aam_softmax(cosines, of_rows, supervision.scale, margin)
    return supervision.weight * loss, losses.accuracy(cosines, of_rows)


def objective(
    students: Mapping[str, Any], state: TrainState, views: Views, recipe: Recipe, labels: jax.Array | None = None
) -> jax.Array:
    """Returns L of the module's docstring.

    The step follows its gradient without calling it: `update_branch` cuts the backward pass at the embedding.

    Args:
      students: {branch: parameters}, the only argument that a gradient reaches.
      state: supplies everything else.
      views: of the batch.
      recipe: of the run.
      labels: int32 [B], for recipes that read labels.
    """
    teachers, weights = all_teacher_outputs(state, views, recipe), recipe.weights
    total = jnp.float32(0)
    for name, branch in recipe.branches.items():
        params, stats = students[name], state.student[name]["batch_stats"]
        embeddings, _ = student_embeddings(branch.backbone, params["backbone"], stats["backbone"], views.students)
        for head in branch.head_names:
            pairs = [
                p for p in distillation_pairs(list(recipe.branches), weights) if (p.student, p.head) == (name, head)
            ]
            total += distillation_loss(
                params[head_part(head)],
                embeddings,
                branch=branch,
                batch_stats=stats[head_part(head)],
                pairs=pairs,
                teachers=teachers,
                temperature=weights.student_temp,
                shared_views=views.shared,
            )[0]
        if recipe.is_contrastive:
            gate = 1 - state.gate.closed
            total += gate * contrastive_loss(embeddings[0], teachers[name].embeddings, weights, views.shared, labels)
        if recipe.supervision.weight:
            margin = recipe.schedules.margin(state.step)
            total += supervised_loss(
                params[SPEAKER_HEAD], embeddings, labels, margin, branch=branch, supervision=recipe.supervision
            )[0]
    return total


# The update.


def contrastive_gradient(
    embeddings, teacher_embeddings, distillation_gradient, closed, weights: LossWeights, shared_views: bool, labels=None
):
    """Returns the contrastive loss, its gradient at the embeddings [V, B, D], and the alignment of the two gradients.

    `distillation_gradient` is that of the distillation loss at the same embeddings. Once the gate has closed, all three
    are zero and nothing is computed: the term is skipped, not multiplied by zero.
    """

    def open_gate(embeddings, distillation_gradient):
        loss, gradient = jax.value_and_grad(contrastive_loss)(
            embeddings, teacher_embeddings, weights, shared_views, labels
        )
        return loss, gradient, losses.alignment(gradient, distillation_gradient)

    def closed_gate(embeddings, distillation_gradient):
        return jnp.float32(0), jnp.zeros_like(embeddings), jnp.float32(0)

    return jax.lax.cond(closed, closed_gate, open_gate, embeddings, distillation_gradient)


class BranchUpdate(NamedTuple):
    """A branch after a step, and the metrics of the step."""

    student: Variables
    teacher: Variables
    opt_state: dict[str, optax.OptState]
    metrics: Metrics
    squared_gradient: jax.Array


@jax.named_scope("student")
def update_branch(
    name: str,
    state: TrainState,
    views: Views,
    teachers: Mapping[str, TeacherOutputs],
    recipe: Recipe,
    labels: jax.Array | None = None,
) -> BranchUpdate:
    """Updates one branch's student by the gradient of the objective, then its teacher.

    The backward pass is cut at the embedding, where the gradients of both kinds of loss meet: their cosine, which the
    `conflict` gate reads, costs nothing.
    """
    branch, weights = recipe.branches[name], recipe.weights
    params, averages = state.student[name]["params"], state.teacher[name]["params"]
    stats = dict(state.student[name]["batch_stats"])
    momentum = materialize_on_cpu(recipe.schedules.momentum(state.step))
    new_params, new_averages, new_opt_state, squares = {}, {}, {}, []

    @jax.named_scope("update")
    def update(part, gradient):
        """Updates student and teacher of a part: the backbone, or a head."""
        squares.extend(squared_norm(leaf) for leaf in jax.tree.leaves(gradient))
        updates, new_opt_state[part] = recipe.optimizer.update(gradient, state.opt_state[name][part], params[part])
        new_params[part] = optax.apply_updates(params[part], updates)
        new_averages[part] = jax.tree.map(
            lambda t, s: momentum * t + (1 - momentum) * s, averages[part], new_params[part]
        )

    embeddings, backbone_vjp, stats["backbone"] = jax.vjp(
        lambda p: student_embeddings(branch.backbone, p, stats["backbone"], views.students, remat=recipe.remat),
        params["backbone"],
        has_aux=True,
    )
    cotangent, terms = jax.tree.map(jnp.zeros_like, embeddings), {}
    for head in branch.head_names:
        part = head_part(head)
        loss = functools.partial(
            distillation_loss,
            branch=branch,
            batch_stats=stats[part],
            pairs=[
                p for p in distillation_pairs(list(recipe.branches), weights) if (p.student, p.head) == (name, head)
            ],
            teachers=teachers,
            temperature=weights.student_temp,
            shared_views=views.shared,
        )
        (_, (of_head, stats[part])), (gradient, at_embeddings) = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(
            params[part], embeddings
        )
        cotangent, terms = jax.tree.map(jnp.add, cotangent, at_embeddings), terms | of_head
        # Each head is updated, in place, before the next one's gradient (as large as the prototypes) is computed.
        gradient, cotangent, embeddings = materialize_on_cpu((gradient, cotangent, embeddings))
        update(part, gradient)

    supervised = {}
    if recipe.supervision.weight:
        loss = functools.partial(
            supervised_loss,
            labels=labels,
            margin=recipe.schedules.margin(state.step),
            branch=branch,
            supervision=recipe.supervision,
        )
        (value, right), (gradient, at_embeddings) = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(
            params[SPEAKER_HEAD], embeddings
        )
        supervised = {f"loss/supervised/{name}": value, f"accuracy/{name}": right}
        cotangent = jax.tree.map(jnp.add, cotangent, at_embeddings)
        update(SPEAKER_HEAD, gradient)

    contrastive = None
    if recipe.is_contrastive:
        loss, gradient, cosine = contrastive_gradient(
            embeddings[0], teachers[name].embeddings, cotangent[0], state.gate.closed, weights, views.shared, labels
        )
        contrastive = loss, cosine
        cotangent[0] = cotangent[0] + gradient
    (gradient,) = backbone_vjp(cotangent)
    update("backbone", materialize_on_cpu(gradient))
    return BranchUpdate(
        {"params": new_params, "batch_stats": stats},
        {"params": new_averages, "batch_stats": teachers[name].batch_stats},
        new_opt_state,
        branch_metrics(name, terms, contrastive, supervised, teachers, several=len(recipe.branches) > 2),
        sum(squares),
    )


def branch_metrics(
    name: str,
    terms: Mapping[Pair, jax.Array],
    contrastive: tuple[jax.Array, jax.Array] | None,
    supervised: Metrics,
    teachers: Mapping[str, TeacherOutputs],
    *,
    several: bool,
) -> Metrics:
    """Returns a branch's metrics of a step.

    Args:
      name: of the branch.
      terms: its distillation losses, before their weights.
      contrastive: its weighted contrastive loss and the alignment of the two gradients; None without such a term.
      supervised: its weighted supervised loss and accuracy; {} without such a term.
      teachers: their outputs.
      several: whether there are more than two branches, so that a cross-distillation has to be named after both.
    """
    metrics = {}
    for pair, loss in terms.items():
        suffix = f"{name}-{pair.teacher}" if several and pair.kind == "cross" else name
        entropies = teachers[pair.teacher].entropies[pair.head]
        metrics[f"loss/{pair.kind}/{suffix}"] = loss
        metrics[f"kl/{pair.kind}/{suffix}"] = loss - entropies["teacher_entropy"]
        metrics |= {f"{entropy}/{pair.kind}/{suffix}": value for entropy, value in entropies.items()}
    metrics[f"loss/{name}"] = sum(pair.weight * loss for pair, loss in terms.items())
    if contrastive is not None:
        loss, cosine = contrastive
        metrics |= {f"loss/contrastive/{name}": loss, f"alignment/{name}": cosine}
        metrics[f"loss/{name}"] += loss
    if supervised:
        metrics |= supervised
        metrics[f"loss/{name}"] += supervised[f"loss/supervised/{name}"]
    metrics[f"embedding_std/{name}"] = losses.embedding_deviation(teachers[name].embeddings[0])
    return metrics


def train_step_on_features(
    state: TrainState, views: Views, recipe: Recipe, labels: jax.Array | None = None
) -> tuple[TrainState, Metrics]:
    """Takes one step on normalised features.

    Args:
      state: before the step.
      views: as `front_end.training_views` gives them.
      recipe: of the run.
      labels: int32 [B], the number of each utterance's speaker; only recipes that train with labels read it.

    Returns:
      The new state, and metrics. `gate/open` says whether this step used the contrastive term; `gate/closed_at` is −1,
      or the first step without it.
    """
    names, schedules = list(recipe.branches), recipe.schedules
    teachers = all_teacher_outputs(state, views, recipe)
    updates: dict[str, BranchUpdate] = {}
    for name in names:
        # One branch after the other, and all after the teachers' forward passes: parameters are updated in place.
        teachers, updates, views = materialize_on_cpu((teachers, updates, views))
        with jax.named_scope(name):
            updates[name] = update_branch(name, state, views, teachers, recipe, labels)

    metrics = {key: value for of_branch in updates.values() for key, value in of_branch.metrics.items()}
    gate = state.gate
    if recipe.is_contrastive:
        loss, alignment = (
            jnp.stack([metrics[f"{kind}/{name}"] for name in names]).mean()
            for kind in ("loss/contrastive", "alignment")
        )
        gate = updated_gate(gate, state.step, loss, alignment, recipe.gate_rule)
    new_state = TrainState(
        step=state.step + 1,
        student={name: updates[name].student for name in names},
        teacher={name: updates[name].teacher for name in names},
        center={name: teachers[name].centers for name in names},
        opt_state={name: updates[name].opt_state for name in names},
        gate=gate,
        partners=state.partners,
    )
    metrics |= {
        "loss": sum(metrics[f"loss/{name}"] for name in names),
        "lr": schedules.learning_rate(state.step),
        "momentum": schedules.momentum(state.step),
        "teacher_temp": schedules.teacher_temp(state.step),
        "gate/open": 1 - state.gate.closed.astype(jnp.int32) if recipe.is_contrastive else jnp.int32(0),
        "gate/closed_at": gate.closed_at,
        "gate/loss": gate.loss,
        "gate/alignment": gate.alignment,
        "gradient_norm": jnp.sqrt(sum(of_branch.squared_gradient for of_branch in updates.values())),
    }
    return new_state, metrics


def train_step(
    state: TrainState,
    batch: Mapping[str, jax.Array],
    banks: Mapping[str, jax.Array],
    key: jax.Array,
    *,
    recipe: Recipe,
    front_end: Callable[[jax.Array, Any, Any], Views],
) -> tuple[TrainState, Metrics]:
    """Takes one step on a batch of `training_batches`: the front end, then `train_step_on_features`.

    Every random draw comes from `key` and the state's step, so that a resumed run needs no saved generator.
    """
    views = front_end(jax.random.fold_in(key, state.step), batch, banks)
    return train_step_on_features(state, views, recipe, batch.get("label"))
