"""The train step: every student descends MeMo's objective, every teacher follows its student.

Branch b of M (an ECAPA-TDNN, say, or a ResNet34) has a student and a teacher of one architecture. The students see V
views of an utterance and the teachers W: the first of the students', the global crops, or views of their own (`Views`).
Let e_b(v) be the student's embedding of view v, z_b^h(v) the projection of head h and s_b^h(v) its logits; with a bar
they are the teacher's, through which no gradient flows. The objective (`objective`) is

    L = Σ_b [ σ · D_bb^self + λ/(M−1) · Σ_{c≠b} D_bc^cross + g · w · C_b + R_b ]
    R_b = u · S_b + κ · N_b + Σ_h [ ρ · E_b^h + r · (ν · A_b^h + ξ · X_b^h) ]

with, over the batch and the pairs of a teacher's view i and a student's view v (v≠i where they share views),

    D_bc^h = mean_{i≤W, v≠i} −⟨ softmax((s̄_c^h(i) − center_c^h) / τ_t), log softmax(s_b^h(v) / τ_s) ⟩   distillation
             or, with loss.targets = "sinkhorn", balanced targets: Sinkhorn(softmax(s̄_c^h / τ_t))
    C_b    = NT-Xent of e_b and ē_b over the global views                                             contrastive
    g      = 1 while the gate is open, then 0                                                         (gate.py)

and, of configs that ask for them (u, κ, ρ, ν and ξ are 0 otherwise, and nothing is computed),

    S_b    = AAM-softmax of e_b over all views, by labels                                             supervised
    N_b    = Σ_v −mean_n ln(‖x_n − x_nearest(n)‖ + 1e-8), with x = e_b(v) / ‖e_b(v)‖                  KoLeo
    E_b^h  = ln K − H(mean softmax(s_b^h(v) / τ_s))                                                   mean entropy
    A_b^h, X_b^h = VICReg's variance and covariance terms of z_b^h, the mean over views; r warms up

Then, with the momenta m and μ and the student's new parameters θ_b, in this order:

    θ̄_b      ← m · θ̄_b + (1 − m) · θ_b; shared prototypes, those of the student: θ̄_b ← θ_b
    center_b^h ← μ · center_b^h + (1 − μ) · mean of the teacher's logits of this step

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

from memo_jax.models import SPEAKER_HEAD, Branch, Variables, head_part
from memo_jax.training import losses
from memo_jax.training.front_end import Views
from memo_jax.training.gate import GateRule, updated_gate
from memo_jax.training.loss_gate import with_losses
from memo_jax.training.optim import Schedules, is_prototypes
from memo_jax.training.state import TrainState
from memo_jax.training.supervision import GatedBatch, Supervision, learned_labels, supervised_loss
from memo_jax.xla.compiler import finish_sums_over_processes, materialize_on_cpu
from memo_jax.xla.reductions import squared_norm

Metrics = dict[str, jax.Array]  # scalars by the names that metrics.jsonl uses


class LossWeights(NamedTuple):
    """Temperatures and weights of the objective.

    Attributes:
      student_temp: τ_s.
      center_momentum: decay of the centres per step.
      self: σ, the weight of self-distillation.
      cross: λ, shared evenly by the teachers of the other branches.
      cross_head: the head of cross-distillation; with "self", one head serves both.
      contrastive: w, the weight of NT-Xent.
      contrastive_temperature: of NT-Xent.
      contrastive_margin: of AM-NT-Xent; 0 for NT-Xent.
      contrastive_mask_same_speaker: leave other utterances of an anchor's speaker out of its negatives, by labels.
      targets: how teachers' logits become targets: "centered" or "sinkhorn".
      mean_entropy: ρ.
      koleo: κ.
      variance, covariance: ν and ξ.
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
    targets: str = "centered"
    mean_entropy: float = 0.0
    koleo: float = 0.0
    variance: float = 0.0
    covariance: float = 0.0


class Recipe(NamedTuple):
    """What the steps of a run have in common; static under jit.

    With `remat`, the backward pass recomputes the backbones' activations of all crop lengths but the last. `partners`
    is the number of utterances that have partners in the state, 0 in runs without. With `shared_prototypes`, teachers
    use the students' prototypes.
    """

    branches: dict[str, Branch]
    optimizer: optax.GradientTransformation
    schedules: Schedules
    weights: LossWeights
    gate_rule: GateRule
    supervision: Supervision = Supervision()
    remat: bool = True
    partners: int = 0
    shared_prototypes: bool = False

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


def pairs_of(student: str, head: str, recipe: Recipe) -> list[Pair]:
    """Returns the pairs in which this branch's student learns by this head."""
    pairs = distillation_pairs(list(recipe.branches), recipe.weights)
    return [pair for pair in pairs if (pair.student, pair.head) == (student, head)]


# The forward pass.


def apply_in_train_mode(
    module: nn.Module, params: dict[str, Any], batch_stats: dict[str, Any], x: jax.Array, method: str = "__call__"
) -> tuple[Any, dict[str, Any]]:
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
    """Returns rows as views: the inverse of `merge_views`, with the views first.

    Args:
      x: [B·V, …], the V rows of an utterance one after the other.
      views: V.

    Returns:
      [V, B, …].
    """
    return x.reshape((-1, views) + x.shape[1:]).swapaxes(0, 1)


@jax.named_scope("backbone")
def embeddings_by_view(
    backbone: nn.Module, params: dict[str, Any], batch_stats: dict[str, Any], features: jax.Array
) -> tuple[jax.Array, dict[str, Any]]:
    """Returns a backbone's embeddings [V, B, D] of features [B, V, T, F], and its updated batch statistics."""
    embeddings, batch_stats = apply_in_train_mode(backbone, params, batch_stats, merge_views(features))
    return by_view(embeddings, features.shape[1]), batch_stats


@jax.named_scope("head")
def logits_by_view(
    head: nn.Module, params: dict[str, Any], batch_stats: dict[str, Any], embeddings: Sequence[jax.Array]
) -> tuple[jax.Array, tuple[list[jax.Array], dict[str, Any]]]:
    """Returns a head's logits [V, B, K] of the embeddings of each crop length, and (projections, batch statistics).

    The layers with batch norm run on one crop length after the other, as the authors do; the cosines with the
    prototypes are computed for all views at once. The projections, which are the outputs of those layers, are rows
    [B·V, P] of each crop length.
    """
    units, projections = [], []
    for embedded in embeddings:
        rows = merge_views(embedded.swapaxes(0, 1))
        (projected, normalized), batch_stats = apply_in_train_mode(head, params, batch_stats, rows, "project")
        projections.append(projected)
        units.append(by_view(normalized, len(embedded)))
    return head.apply({"params": params}, jnp.concatenate(units), method="cosines"), (projections, batch_stats)


def student_embeddings(
    backbone: nn.Module,
    params: dict[str, Any],
    batch_stats: dict[str, Any],
    views: Sequence[jax.Array],
    *,
    remat: bool = False,
) -> tuple[list[jax.Array], dict[str, Any]]:
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
        embedded, batch_stats = embed(params, batch_stats, features)
        # One crop length after the other, in reverse order in the backward pass: their activations are never held at
        # the same time (0.38 GB of temporaries instead of 0.55).
        params, embedded = materialize_on_cpu((params, embedded))
        embeddings.append(embedded)
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
    weights: LossWeights,
) -> TeacherOutputs:
    """Returns the outputs of a branch's teacher.

    Args:
      branch: of the teacher.
      variables: the teacher's, before this step.
      centers: {head: [K]}, the running means of its logits, before this step.
      features: [B, W, T, F], the views that it sees.
      temperature: τ_t of this step, positive.
      weights: of the recipe; `targets` and `center_momentum` are read.
    """
    params, stats = variables["params"], dict(variables["batch_stats"])
    embeddings, stats["backbone"] = embeddings_by_view(branch.backbone, params["backbone"], stats["backbone"], features)
    distributions, entropies, new_centers = {}, {}, {}
    for head in branch.head_names:
        part = head_part(head)
        logits, (_, stats[part]) = logits_by_view(branch.head, params[part], stats[part], [embeddings])
        with jax.named_scope("distributions"):
            if weights.targets == "sinkhorn":
                distributions[head], entropies[head] = losses.sinkhorn_distributions(logits, temperature)
                new_centers[head] = centers[head]
            else:
                distributions[head], entropies[head] = losses.teacher_distributions(logits, centers[head], temperature)
                new_centers[head] = losses.updated_center(centers[head], logits, weights.center_momentum)
    return TeacherOutputs(embeddings, distributions, entropies, stats, new_centers)


def all_teacher_outputs(state: TrainState, views: Views, recipe: Recipe) -> dict[str, TeacherOutputs]:
    """Returns {branch: outputs of its teacher}."""
    temperature = recipe.schedules.teacher_temp(state.step)
    outputs = {}
    for name, branch in recipe.branches.items():
        with jax.named_scope(name):
            outputs[name] = teacher_outputs(
                branch, state.teacher[name], state.center[name], views.of_teachers, temperature, recipe.weights
            )
    return outputs


# The objective.


def head_loss(
    head_params: dict[str, Any],
    embeddings: Sequence[jax.Array],
    *,
    branch: Branch,
    batch_stats: dict[str, Any],
    pairs: Sequence[Pair],
    teachers: Mapping[str, TeacherOutputs],
    weights: LossWeights,
    regularization: jax.Array,
    shared_views: bool,
) -> tuple[jax.Array, tuple[dict[Pair, jax.Array], Metrics, dict[str, Any]]]:
    """Returns the loss of a student by one head, weighted: distillation and what regularises the head.

    Args:
      head_params: the head's parameters.
      embeddings: the student's, [V, B, D] for each crop length.
      branch: of the student.
      batch_stats: the head's batch statistics.
      pairs: the student's pairs with this head.
      teachers: their outputs.
      weights: of the recipe.
      regularization: r of this step.
      shared_views: whether the teachers' views are the first of the student's.

    Returns:
      The loss, and (distillation losses {pair: loss} before their weights, weighted regularisers by name, batch
      statistics).
    """
    logits, (projections, batch_stats) = logits_by_view(branch.head, head_params, batch_stats, embeddings)
    with jax.named_scope("distillation"):
        terms = {
            pair: losses.distillation(
                logits, teachers[pair.teacher].distributions[pair.head], weights.student_temp, shared_views
            )
            for pair in pairs
        }
    regularizers = {}
    with jax.named_scope("regularizers"):
        if weights.mean_entropy:
            gap = losses.mean_entropy_gap(logits, weights.student_temp)
            regularizers["mean_entropy"] = weights.mean_entropy * gap
        if weights.variance or weights.covariance:
            views = [by_view(rows, len(embedded)) for rows, embedded in zip(projections, embeddings, strict=True)]
            variance, covariance = losses.variance_and_covariance(jnp.concatenate(views))
            regularizers["variance"] = regularization * weights.variance * variance
            regularizers["covariance"] = regularization * weights.covariance * covariance
    total = sum((pair.weight * term for pair, term in terms.items()), jnp.float32(0))
    return sum(regularizers.values(), total), (terms, regularizers, batch_stats)


def loss_by_head(
    name: str, head: str, state: TrainState, views: Views, teachers: Mapping[str, TeacherOutputs], recipe: Recipe
) -> Callable[..., tuple[jax.Array, tuple[dict[Pair, jax.Array], Metrics, dict[str, Any]]]]:
    """Returns `head_loss` of a branch's student by one head, a function of the head's parameters and the embeddings.

    Args:
      name: of the branch.
      head: name of the head, "self" or "cross".
      state: before the step; its batch statistics and step are read.
      views: of the batch; only whether students and teachers share them is read.
      teachers: {branch: outputs of its teacher}.
      recipe: of the run.
    """
    return functools.partial(
        head_loss,
        branch=recipe.branches[name],
        batch_stats=state.student[name]["batch_stats"][head_part(head)],
        pairs=pairs_of(name, head, recipe),
        teachers=teachers,
        weights=recipe.weights,
        regularization=recipe.schedules.regularization(state.step),
        shared_views=views.shared,
    )


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


@jax.named_scope("koleo")
def koleo_loss(embeddings: Sequence[jax.Array], weights: LossWeights) -> jax.Array:
    """Returns κ · N of a student's embeddings, [V, B, D] for each crop length."""
    return weights.koleo * losses.koleo(jnp.concatenate(embeddings))


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
      labels: int32 [B], for recipes that read labels; with a loss gate, those that remain after it.
    """
    teachers, weights = all_teacher_outputs(state, views, recipe), recipe.weights
    total = jnp.float32(0)
    for name, branch in recipe.branches.items():
        params, stats = students[name], state.student[name]["batch_stats"]["backbone"]
        embeddings, _ = student_embeddings(
            branch.backbone, params["backbone"], stats, views.students, remat=recipe.remat
        )
        for head in branch.head_names:
            by_head = loss_by_head(name, head, state, views, teachers, recipe)
            total += by_head(params[head_part(head)], embeddings)[0]
        if recipe.is_contrastive:
            gate = 1 - state.gate.closed
            total += gate * contrastive_loss(embeddings[0], teachers[name].embeddings, weights, views.shared, labels)
        if weights.koleo:
            total += koleo_loss(embeddings, weights)
        if recipe.supervision.weight:
            margin = recipe.schedules.margin(state.step)
            total += supervised_loss(
                params[SPEAKER_HEAD], embeddings, labels, margin, branch=branch, supervision=recipe.supervision
            )[0]
    return total


# The update.


def contrastive_gradient(
    embeddings: jax.Array,
    teacher_embeddings: jax.Array,
    distillation_gradient: jax.Array,
    closed: jax.Array,
    weights: LossWeights,
    shared_views: bool,
    labels: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the contrastive loss, its gradient at the embeddings [V, B, D], and the alignment of the two gradients.

    `distillation_gradient` is that of the distillation loss, with the regularisers of its heads, at the same
    embeddings. Once the gate has closed, all three are zero and nothing is computed: the term is skipped, not
    multiplied by zero.
    """

    def open_gate(embeddings, distillation_gradient):
        loss, gradient = jax.value_and_grad(contrastive_loss)(
            embeddings, teacher_embeddings, weights, shared_views, labels
        )
        return loss, gradient, losses.alignment(gradient, distillation_gradient)

    def closed_gate(embeddings, distillation_gradient):
        return jnp.float32(0), jnp.zeros_like(embeddings), jnp.float32(0)

    return jax.lax.cond(closed, closed_gate, open_gate, embeddings, distillation_gradient)


class SupervisedGradient(NamedTuple):
    """The supervised loss of a step, weighted, its gradients, and what else is computed with it."""

    loss: jax.Array
    gradient: Any  # at the parameters of the speaker head
    at_embeddings: Sequence[jax.Array]
    metrics: Metrics
    utterance_losses: jax.Array | None  # [B], with a loss gate


def supervised_gradient(
    name: str,
    state: TrainState,
    embeddings: Sequence[jax.Array],
    labels: jax.Array,
    gated: GatedBatch | None,
    recipe: Recipe,
) -> SupervisedGradient:
    """Returns the supervised loss of a branch at the student's embeddings, with its gradients.

    With a loss gate, the labels are those that `learned_labels` returns.
    """
    branch, student, shares, learned = recipe.branches[name], state.student[name], {}, labels
    if gated is not None:
        learned, corrected = learned_labels(state, student, labels, gated, branch, recipe.supervision)
        shares = {f"labels/corrected/{name}": corrected.mean(), f"labels/learned/{name}": (learned >= 0).mean()}
    loss = functools.partial(
        supervised_loss,
        labels=learned,
        margin=recipe.schedules.margin(state.step),
        branch=branch,
        supervision=recipe.supervision,
        given=labels if gated is not None else None,
    )
    (value, (accuracy, utterance_losses)), (gradient, at_embeddings) = jax.value_and_grad(
        loss, argnums=(0, 1), has_aux=True
    )(student["params"][SPEAKER_HEAD], embeddings)
    return SupervisedGradient(value, gradient, at_embeddings, {f"accuracy/{name}": accuracy} | shares, utterance_losses)


class BranchUpdate(NamedTuple):
    """A branch after a step, the metrics of the step, and with a loss gate the losses of the utterances [B]."""

    student: Variables
    teacher: Variables
    opt_state: dict[str, optax.OptState]
    metrics: Metrics
    squared_gradient: jax.Array
    utterance_losses: jax.Array | None


@jax.named_scope("student")
def update_branch(
    name: str,
    state: TrainState,
    views: Views,
    teachers: Mapping[str, TeacherOutputs],
    recipe: Recipe,
    labels: jax.Array | None = None,
    gated: GatedBatch | None = None,
) -> BranchUpdate:
    """Updates one branch's student by the gradient of the objective, then its teacher.

    The backward pass is cut at the embedding, where the gradients of both kinds of loss meet: their cosine, which the
    `conflict` gate reads, costs nothing. Each head is updated before the next one's gradient is computed. On a CPU the
    gradient of the whole objective takes twice the temporary memory (0.79 GB, not 0.38, at the authors' sizes and a
    batch of 4) and 5 % more time, for small networks 13 %. For TPUs and GPUs the same time is planned for both, and up
    to 16 % less memory for the whole gradient (experiments/README.md).
    """
    branch, weights = recipe.branches[name], recipe.weights
    params, averages = state.student[name]["params"], state.teacher[name]["params"]
    stats = dict(state.student[name]["batch_stats"])
    momentum = materialize_on_cpu(recipe.schedules.momentum(state.step))  # one cosine, not one for each array
    new_params, new_averages, new_opt_state, squares = {}, {}, {}, []

    def average(path, teacher, student):
        shared = recipe.shared_prototypes and is_prototypes(path)
        return student if shared else momentum * teacher + (1 - momentum) * student

    @jax.named_scope("update")
    def update(part, gradient):
        """Updates student and teacher of a part: the backbone, or a head."""
        squares.extend(squared_norm(leaf) for leaf in jax.tree.leaves(gradient))
        updates, new_opt_state[part] = recipe.optimizer.update(gradient, state.opt_state[name][part], params[part])
        new_params[part] = optax.apply_updates(params[part], updates)
        new_averages[part] = jax.tree_util.tree_map_with_path(average, averages[part], new_params[part])

    embeddings, backbone_vjp, stats["backbone"] = jax.vjp(
        lambda p: student_embeddings(branch.backbone, p, stats["backbone"], views.students, remat=recipe.remat),
        params["backbone"],
        has_aux=True,
    )
    cotangent, terms, others = jax.tree.map(jnp.zeros_like, embeddings), {}, {}
    for head in branch.head_names:
        part, by_head = head_part(head), loss_by_head(name, head, state, views, teachers, recipe)
        (_, (head_terms, regularizers, stats[part])), (gradient, at_embeddings) = jax.value_and_grad(
            by_head, argnums=(0, 1), has_aux=True
        )(params[part], embeddings)
        cotangent, terms = jax.tree.map(jnp.add, cotangent, at_embeddings), terms | head_terms
        others = {kind: others.get(kind, 0.0) + value for kind, value in regularizers.items()}
        # Each head is updated, in place, before the next one's gradient (as large as the prototypes) is computed.
        gradient, cotangent, embeddings = materialize_on_cpu((gradient, cotangent, embeddings))
        update(part, gradient)

    head_cotangent = cotangent[0]  # of the distillation loss, with the regularisers of its heads
    if weights.koleo:
        others["koleo"], at_embeddings = jax.value_and_grad(koleo_loss)(embeddings, weights)
        cotangent = jax.tree.map(jnp.add, cotangent, at_embeddings)
    supervised = None
    if recipe.supervision.weight:
        supervised = supervised_gradient(name, state, embeddings, labels, gated, recipe)
        others["supervised"] = supervised.loss
        cotangent = jax.tree.map(jnp.add, cotangent, supervised.at_embeddings)
        update(SPEAKER_HEAD, supervised.gradient)

    contrastive = None
    if recipe.is_contrastive:
        if supervised:
            embeddings, cotangent, head_cotangent, others, supervised = finish_sums_over_processes(
                (embeddings, cotangent, head_cotangent, others, supervised)
            )
        loss, gradient, cosine = contrastive_gradient(
            embeddings[0], teachers[name].embeddings, head_cotangent, state.gate.closed, weights, views.shared, labels
        )
        contrastive = loss, cosine
        cotangent[0] = cotangent[0] + gradient
    (gradient,) = backbone_vjp(cotangent)
    update("backbone", gradient)
    return BranchUpdate(
        {"params": new_params, "batch_stats": stats},
        {"params": new_averages, "batch_stats": teachers[name].batch_stats},
        new_opt_state,
        branch_metrics(name, terms, contrastive, others, teachers, several=len(recipe.branches) > 2)
        | (supervised.metrics if supervised else {}),
        sum(squares),
        supervised.utterance_losses if supervised else None,
    )


def branch_metrics(
    name: str,
    terms: Mapping[Pair, jax.Array],
    contrastive: tuple[jax.Array, jax.Array] | None,
    others: Metrics,
    teachers: Mapping[str, TeacherOutputs],
    *,
    several: bool,
) -> Metrics:
    """Returns a branch's metrics of a step.

    Args:
      name: of the branch.
      terms: its distillation losses, before their weights.
      contrastive: its weighted contrastive loss and the alignment of the two gradients; None without such a term.
      others: its other losses by name, weighted.
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
    for kind, loss in others.items():
        metrics[f"loss/{kind}/{name}"] = loss
        metrics[f"loss/{name}"] += loss
    metrics[f"embedding_std/{name}"] = losses.embedding_deviation(teachers[name].embeddings[0])
    return metrics


def train_step_on_features(
    state: TrainState, views: Views, recipe: Recipe, labels: jax.Array | None = None, gated: GatedBatch | None = None
) -> tuple[TrainState, Metrics]:
    """Takes one step on normalised features.

    Args:
      state: before the step.
      views: as `front_end.training_views` returns them.
      recipe: of the run.
      labels: int32 [B], the number of each utterance's speaker; only recipes that train with labels read it.
      gated: of the same batch, for recipes with a loss gate.

    Returns:
      The new state, and metrics. `gate/open` says whether this step used the contrastive term; `gate/closed_at` is
      as in `gate.Gate`.
    """
    names, schedules = list(recipe.branches), recipe.schedules
    teachers = all_teacher_outputs(state, views, recipe)
    updates: dict[str, BranchUpdate] = {}
    for name in names:
        # One branch after the other, and all after the teachers' forward passes: parameters are updated in place.
        teachers, updates, views = materialize_on_cpu((teachers, updates, views))
        with jax.named_scope(name):
            updates[name] = update_branch(name, state, views, teachers, recipe, labels, gated)

    metrics = {key: value for update in updates.values() for key, value in update.metrics.items()}
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
        loss_gate=state.loss_gate,
        partners=state.partners,
    )
    if gated is not None:
        utterance_losses = jnp.stack([updates[name].utterance_losses for name in names]).mean(axis=0)
        new_state = new_state.replace(loss_gate=with_losses(state.loss_gate, gated.index, utterance_losses, labels))
        metrics["labels/threshold"] = state.loss_gate.threshold
    metrics |= {
        "loss": sum(metrics[f"loss/{name}"] for name in names),
        "lr": schedules.learning_rate(state.step),
        "momentum": schedules.momentum(state.step),
        "teacher_temp": schedules.teacher_temp(state.step),
        "gate/open": 1 - state.gate.closed.astype(jnp.int32) if recipe.is_contrastive else jnp.int32(0),
        "gate/closed_at": gate.closed_at,
        "gate/loss": gate.loss,
        "gate/alignment": gate.alignment,
        "gradient_norm": jnp.sqrt(sum(update.squared_gradient for update in updates.values())),
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
    clean: Callable[[Any], jax.Array] | None = None,
) -> tuple[TrainState, Metrics]:
    """Takes one step on a batch of `training_batches`: the front end, then `train_step_on_features`.

    Every random draw comes from `key` and the state's step, so that a resumed run needs no saved generator. For recipes
    with label correction, `clean` computes the features by which labels are corrected (`front_end.clean_features`).
    """
    views, gated = front_end(jax.random.fold_in(key, state.step), batch, banks), None
    if recipe.supervision.gated_utterances:
        gated = GatedBatch(batch["index"], None if recipe.supervision.correct_from is None else clean(batch))
    return train_step_on_features(state, views, recipe, batch.get("label"), gated)
