"""The train step: what it optimises, what it leaves alone, and in which order.

None of this depends on the backbone, so the tests use one that compiles in a moment.
"""

import functools
import itertools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from memo_jax.models import Branch, build_backbone
from memo_jax.models.heads import DINOHead
from memo_jax.models.layers import BatchNorm, Linear
from memo_jax.training import optim
from memo_jax.training.front_end import Views
from memo_jax.training.gate import GateRule
from memo_jax.training.state import initial_state, state_from_students, student_params
from memo_jax.training.step import (
    LossWeights,
    Recipe,
    distillation_pairs,
    objective,
    train_step,
    train_step_on_features,
)
from memo_jax.xla.compiler import compiler_options

BATCH, MELS, PROTOTYPES, RATE = 5, 6, 24, 0.05
ALWAYS = GateRule("always")


class Pooling(nn.Module):
    """Backbone: a linear layer on every frame, batch norm, tanh, mean over time, a linear layer."""

    width: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, lengths=None, train=False):
        x = BatchNorm(name="norm")(Linear(self.width, dtype=self.dtype, name="hidden")(x), train)
        return Linear(8, name="embedding")(jnp.tanh(x).mean(axis=1))


def branches(*names, heads=("self", "cross")):
    return {n: Branch(Pooling({"ecapa": 12, "resnet": 7}[n]), DINOHead(PROTOTYPES, 16, 9), heads) for n in names}


@functools.cache
def recipe_of(
    names=("ecapa", "resnet"),
    rule=ALWAYS,
    *,
    heads=("self", "cross"),
    frozen_steps=0,
    clip=0.0,
    decay=0.0,
    sgd_momentum=0.0,
    **weights,
):
    schedules = optim.Schedules(
        optax.constant_schedule(RATE),
        optim.cosine_momentum(0.9, 1.0, 10),
        optim.epoch_teacher_temp(0.04, 0.07, 4, 2),
        frozen_steps,
    )
    optimizer = optim.build_optimizer("sgd", schedules, weight_decay=decay, clip_norm=clip, sgd_momentum=sgd_momentum)
    return Recipe(branches(*names, heads=heads), optimizer, schedules, LossWeights(**weights), rule)


@functools.cache
def students_of(names, heads):
    """Returns the jitted function seed → students of these branches."""

    def make(seed):
        recipe = recipe_of(names, heads=heads)
        student = initial_state(jax.random.key(seed), recipe.branches, MELS, recipe.optimizer, recipe.gate_rule).student
        # Small initial linear layers leave the heads near uniform: scale them up to give every loss a clear gradient.
        return jax.tree_util.tree_map_with_path(
            lambda path, x: 20 * x if path[2].key.endswith("head") and path[-1].key == "kernel" else x, student
        )

    return jax.jit(make)


def begin(recipe, students):
    return state_from_students(students, recipe.branches, recipe.optimizer, recipe.gate_rule)


def start(recipe, seed=0):
    heads = next(iter(recipe.branches.values())).head_names
    return begin(recipe, students_of(tuple(recipe.branches), tuple(heads))(seed))


def views_of_step(step):
    random = np.random.default_rng(100 + step)
    speakers = random.normal(0, 1, (BATCH, 1, 1, MELS))
    return Views(
        tuple(
            jnp.asarray(speakers + random.normal(0, 1, (BATCH, v, t, MELS)), jnp.float32) for v, t in ((2, 11), (4, 6))
        )
    )


COMPILED = {}


def jitted(recipe):
    """Returns the jitted step; recipes are cached, so each compiles once."""
    return COMPILED.setdefault(id(recipe), jax.jit(lambda state, views: train_step_on_features(state, views, recipe)))


def losses_of(recipe, state, views):
    """Returns the losses of a step alone: no backward pass is compiled."""
    step = jax.jit(lambda s, v: {k: x for k, x in train_step_on_features(s, v, recipe)[1].items() if "loss" in k})
    return {name: float(x) for name, x in step(state, views).items()}


def run(recipe, steps, state=None):
    """Returns the states, including the first, and the metrics of some steps."""
    states, metrics, step = [start(recipe) if state is None else state], [], jitted(recipe)
    for i in range(steps):
        state, row = step(states[-1], views_of_step(i))
        states.append(state)
        metrics.append({name: float(x) for name, x in row.items()})
    return states, metrics


def assert_trees_close(a, b, atol):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, atol=atol, rtol=0, err_msg=jax.tree_util.keystr(path))


def assert_trees_equal(a, b):
    assert_trees_close(a, b, 0.0)


MEMO = {"cross": 0.7, "contrastive": 2.0}


@pytest.fixture(scope="module")
def memo():
    """Three steps of a MeMo recipe: its recipe, states and metrics."""
    recipe = recipe_of(**MEMO)
    return recipe, *run(recipe, 3)


# Explicit forms.


@functools.partial(jax.jit, static_argnames=("branch", "passes"))
def forward(branch, params, batch_stats, features, passes):
    """Returns embedding and logits [B, V, …] in train mode and the statistics, with one pass per array of features."""
    embeddings, logits = [], {head: [] for head in branch.head_names}
    apply = functools.partial(branch.apply, train=True, mutable=["batch_stats"])
    for x in features[:passes]:
        rows = x.reshape((-1,) + x.shape[2:])
        embedding, new = apply({"params": params, "batch_stats": batch_stats}, rows, method="embed")
        batch_stats = {**batch_stats, **new["batch_stats"]}
        out, new = apply({"params": params, "batch_stats": batch_stats}, embedding, method="project")
        batch_stats = {**batch_stats, **new["batch_stats"]}
        embeddings.append(embedding.reshape(x.shape[:2] + (-1,)))
        for head, values in out.items():
            logits[head].append(values.reshape(x.shape[:2] + (-1,)))
    join = functools.partial(jnp.concatenate, axis=1)
    return join(embeddings), {head: join(parts) for head, parts in logits.items()}, batch_stats


def cross_entropy_over_pairs(student, teacher, center, temp):
    terms = []
    for i, v in itertools.product(range(2), range(6)):
        if i != v:
            target = jax.nn.softmax((teacher[:, i] - center) / temp)
            terms.append(-(target * jax.nn.log_softmax(student[:, v] / 0.1)).sum(-1).mean())
    return sum(terms) / 10


def nt_xent(student, teacher):
    unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
    terms = []
    for i, j in ((0, 1), (1, 0)):
        rows = jnp.concatenate([unit(teacher[:, i]), unit(student[:, j])])
        similarity = jnp.exp(rows @ rows.T / 0.1)
        positive = jnp.concatenate([jnp.diag(similarity, BATCH), jnp.diag(similarity, -BATCH)])
        terms.append(-jnp.log(positive / (similarity.sum(axis=1) - jnp.diag(similarity))).mean())
    return sum(terms) / 2


def written_out(state, views, recipe, temp):
    """MeMo's objective pair by pair and row by row: the sum over branches of self, λ·cross and w·contrastive."""
    teacher = {
        n: forward(b, state.teacher[n]["params"], state.teacher[n]["batch_stats"], views, 1)
        for n, b in recipe.branches.items()
    }
    total = 0.0
    for name, other in (("ecapa", "resnet"), ("resnet", "ecapa")):
        embedding, logits, _ = forward(recipe.branches[name], **state.student[name], features=views, passes=2)
        total += cross_entropy_over_pairs(logits["self"], teacher[name][1]["self"], state.center[name]["self"], temp)
        total += MEMO["cross"] * cross_entropy_over_pairs(
            logits["cross"], teacher[other][1]["cross"], state.center[other]["cross"], temp
        )
        total += MEMO["contrastive"] * nt_xent(embedding[:, :2], teacher[name][0])
    return total


# In step 1 teachers differ from students and centres from zero, so no term can be mistaken for another.


@pytest.fixture(scope="module")
def value_and_gradient(memo):
    """Returns the jitted function state → (objective of step 1, its gradient), by `jax.grad` alone."""
    recipe, views = memo[0], views_of_step(1)
    return jax.jit(
        lambda state: jax.value_and_grad(objective)(student_params(state), state, views=views, recipe=recipe)
    )


def test_objective_is_the_sum_over_branches_pairs_of_views_and_rows(memo, value_and_gradient):
    recipe, states, metrics = memo
    temp = 0.04  # first epoch of two steps
    expected = float(jax.jit(lambda state: written_out(state, views_of_step(1).students, recipe, temp))(states[1]))
    assert float(value_and_gradient(states[1])[0]) == pytest.approx(expected, rel=1e-5)
    assert metrics[1]["loss"] == pytest.approx(expected, rel=1e-5)


def test_objective_loses_its_contrastive_term_when_the_gate_closes(memo, value_and_gradient):
    recipe, states, metrics = memo
    closed = states[1].replace(gate=states[1].gate.replace(closed=jnp.asarray(True)))
    contrastive = sum(metrics[1][f"loss/contrastive/{name}"] for name in recipe.branches)
    assert float(value_and_gradient(closed)[0]) == pytest.approx(metrics[1]["loss"] - contrastive, rel=1e-5)


def test_step_descends_the_gradient_of_the_objective(memo, value_and_gradient):
    """With SGD without momentum, decay and clip, (old − new parameters)/rate is the gradient.

    The step cuts its backward pass at the embedding and takes one head after the other; `jax.grad` does neither.
    """
    _, states, metrics = memo
    state, after = states[1], states[2]
    _, gradient = value_and_gradient(state)
    scale = max(float(np.abs(g).max()) for g in jax.tree.leaves(gradient))
    ours = jax.tree.map(lambda old, new: np.subtract(old, new) / RATE, student_params(state), student_params(after))
    assert_trees_close(ours, gradient, 2e-5 * scale)
    norm = np.sqrt(sum(np.square(g).sum() for g in jax.tree.leaves(gradient)))
    assert metrics[1]["gradient_norm"] == pytest.approx(float(norm), rel=1e-4)


def test_losses_add_up(memo):
    for row in memo[2]:
        for name in ("ecapa", "resnet"):
            terms = row[f"loss/self/{name}"] + 0.7 * row[f"loss/cross/{name}"] + row[f"loss/contrastive/{name}"]
            assert row[f"loss/{name}"] == pytest.approx(terms, rel=1e-5)
        assert row["loss"] == pytest.approx(row["loss/ecapa"] + row["loss/resnet"], rel=1e-6)


def test_student_statistics_see_global_then_local_views_and_the_teacher_keeps_its_own(memo):
    recipe, states, _ = memo
    state, after, views = states[1], states[2], views_of_step(1).students

    @jax.jit
    def expected(state, views):
        stats = {}
        for n, branch in recipe.branches.items():
            student, teacher = state.student[n], state.teacher[n]
            stats[n] = (
                forward(branch, student["params"], student["batch_stats"], views, 2)[2],
                forward(branch, student["params"], student["batch_stats"], views[::-1], 2)[2],
                forward(branch, teacher["params"], teacher["batch_stats"], views, 1)[2],
            )
        return stats

    for n, (of_student, other_order, of_teacher) in expected(state, views).items():
        assert_trees_close(after.student[n]["batch_stats"], of_student, 1e-6)
        assert_trees_close(after.teacher[n]["batch_stats"], of_teacher, 1e-6)
        # The tolerance distinguishes the two orders.
        differences = jax.tree.map(lambda a, b: float(np.abs(np.subtract(a, b)).max()), of_student, other_order)
        assert min(jax.tree.leaves(differences)) > 1e-5


def test_centers_follow_raw_logits_of_their_teacher_and_are_four(memo):
    recipe, states, _ = memo
    assert all(not np.any(c) for c in jax.tree.leaves(states[0].center))
    state, after = states[1], states[2]
    assert len(jax.tree.leaves(state.center)) == 4
    for n, branch in recipe.branches.items():
        teacher = state.teacher[n]
        _, logits, _ = forward(branch, teacher["params"], teacher["batch_stats"], views_of_step(1).students, 1)
        for head, values in logits.items():
            expected = 0.9 * state.center[n][head] + 0.1 * values.reshape(-1, PROTOTYPES).mean(0)
            np.testing.assert_allclose(after.center[n][head], expected, atol=1e-6)


def test_teacher_starts_as_a_copy_and_follows_the_new_parameters(memo):
    _, states, metrics = memo
    assert_trees_equal(states[0].teacher, states[0].student)
    for i, (before, after) in enumerate(itertools.pairwise(states)):
        m = 1 - 0.1 * (1 + math.cos(math.pi * i / 10)) / 2
        assert metrics[i]["momentum"] == pytest.approx(m, rel=1e-6)
        for n in before.teacher:
            average = lambda t, s: m * t + (1 - m) * s  # noqa: E731, B023
            expected = jax.tree.map(average, before.teacher[n]["params"], after.student[n]["params"])
            assert_trees_close(after.teacher[n]["params"], expected, 1e-6)
    # A teacher that followed the old parameters would not have moved in the first step.
    moved = jax.tree.map(lambda a, b: float(np.abs(np.subtract(a, b)).max()), states[1].teacher, states[0].teacher)
    assert moved["ecapa"]["params"]["backbone"]["embedding"]["kernel"] > 1e-5


def test_schedules_are_reported_by_step(memo):
    _, states, metrics = memo
    assert [int(s.step) for s in states] == [0, 1, 2, 3]
    assert [row["teacher_temp"] for row in metrics] == pytest.approx([0.04, 0.04, 0.05])
    assert [row["lr"] for row in metrics] == pytest.approx([RATE] * 3)


def test_indicators_of_every_loss_and_branch_are_reported(memo):
    row = memo[2][0]
    for indicator in ("loss", "teacher_entropy", "kl", "mean_teacher_entropy"):
        for head, name in itertools.product(("self", "cross"), ("ecapa", "resnet")):
            assert math.isfinite(row[f"{indicator}/{head}/{name}"])
    for of in ("self/ecapa", "self/resnet", "cross/ecapa", "cross/resnet"):
        assert row[f"kl/{of}"] == pytest.approx(row[f"loss/{of}"] - row[f"teacher_entropy/{of}"], abs=1e-6)
    for name in ("ecapa", "resnet"):
        assert 0 < row[f"embedding_std/{name}"] < 1.1 and -1 <= row[f"alignment/{name}"] <= 1
    assert row["gate/open"] == 1 and row["gate/closed_at"] == -1


def test_uncoupled_students_learn_what_each_learns_alone():
    """Two students share no parameters: without cross-distillation a joint step is two separate ones.

    The gate must not couple them either, so it stays open. Clip, decay and momentum are on: per-tensor clipping keeps
    branches independent, clipping by global norm would not.
    """
    settings = {"heads": ("self",), "cross": 0.0, "clip": 0.2, "decay": 1e-2, "sgd_momentum": 0.9}
    together = recipe_of(**settings)
    first = start(together)
    states, metrics = run(together, 3, first)
    for name in ("ecapa", "resnet"):
        alone = recipe_of((name,), **settings)
        alone_states, alone_metrics = run(alone, 3, begin(alone, {name: first.student[name]}))
        for theirs, ours in zip(states, alone_states, strict=True):
            assert_trees_close(ours.student[name], theirs.student[name], 1e-5)
            assert_trees_close(ours.teacher[name], theirs.teacher[name], 1e-5)
            assert_trees_close(ours.center[name], theirs.center[name], 1e-5)
        for theirs, ours in zip(metrics, alone_metrics, strict=True):
            assert ours["loss"] == pytest.approx(theirs[f"loss/{name}"], rel=1e-4)


def test_cross_distillation_couples_the_branches(memo):
    """The counterpart of the test above: with λ > 0 a branch's update depends on the other's teacher."""
    recipe, states, _ = memo
    other = start(recipe, seed=9)
    mixed = {"ecapa": states[0].student["ecapa"], "resnet": other.student["resnet"]}
    after = run(recipe, 1, begin(recipe, mixed))[0][1]
    old, new = (s.student["ecapa"]["params"]["backbone"]["hidden"]["kernel"] for s in (states[1], after))
    assert float(np.abs(old - new).max()) > 1e-5


@pytest.mark.parametrize(
    "names, weights, expected",
    [
        (["a"], LossWeights(), {("a", "a", "self", 1.0)}),
        (
            ["a", "b"],
            LossWeights(self=2.0, cross=0.5),
            {("a", "a", "self", 2.0), ("b", "b", "self", 2.0), ("a", "b", "cross", 0.5), ("b", "a", "cross", 0.5)},
        ),
        (["a", "b"], LossWeights(cross=0.0), {("a", "a", "self", 1.0), ("b", "b", "self", 1.0)}),
        (["a", "b"], LossWeights(self=0.0, cross_head="self"), {("a", "b", "self", 1.0), ("b", "a", "self", 1.0)}),
        (
            ["a", "b", "c"],
            LossWeights(self=0.0, cross=3.0),
            {(s, t, "cross", 1.5) for s, t in itertools.permutations("abc", 2)},
        ),
    ],
)
def test_every_student_is_paired_with_every_teacher_of_weight(names, weights, expected):
    pairs = distillation_pairs(names, weights)
    assert len(pairs) == len(set(pairs)) and set(pairs) == expected


# Options beyond MeMo.


OPTIONS = {
    "sdpn": {"targets": "sinkhorn", "mean_entropy": 0.7, "koleo": 0.3},
    "regularised": {"variance": 2.0, "covariance": 0.5, "contrastive": 2.0, "contrastive_margin": 0.1},
}


@functools.cache
def with_options(name):
    """Returns a one-branch recipe with some of the options, and one without them."""
    rule = ALWAYS if name == "regularised" else GateRule("never")
    recipe = recipe_of(("ecapa",), rule, heads=("self",), **OPTIONS[name])
    schedules = recipe.schedules._replace(regularization=optim.rising_regularization(0.25, 4))
    # The recipe of MeMo recomputes crops; these do not.
    return recipe._replace(schedules=schedules, shared_prototypes=name == "sdpn", remat=False)


def own_views(step):
    """Views for a teacher that sees none of the students' views."""
    views = views_of_step(step)
    return Views(views.students, views_of_step(50 + step).students[0][:, :1] + views.students[0][:, :1])


@pytest.fixture(scope="module", params=list(OPTIONS))
def beyond(request):
    """Two steps of a recipe with options: its name, recipe, states and metrics."""
    recipe = with_options(request.param)
    states, metrics = [start(recipe)], []
    for step in range(2):
        state, row = jitted(recipe)(states[-1], own_views(step))
        states.append(state)
        metrics.append({name: float(x) for name, x in row.items()})
    return request.param, recipe, states, metrics


def test_step_with_options_descends_the_gradient_of_the_objective(beyond):
    _, recipe, states, metrics = beyond
    state, after = states[1], states[2]
    value, gradient = jax.jit(
        lambda state: jax.value_and_grad(objective)(student_params(state), state, views=own_views(1), recipe=recipe)
    )(state)
    assert metrics[1]["loss"] == pytest.approx(float(value), rel=1e-5)
    scale = max(float(np.abs(g).max()) for g in jax.tree.leaves(gradient))
    ours = jax.tree.map(lambda old, new: np.subtract(old, new) / RATE, student_params(state), student_params(after))
    assert_trees_close(ours, gradient, 2e-5 * scale)


def test_terms_with_options_are_those_of_the_student_and_the_teachers_own_views(beyond):
    """Written out in NumPy from the networks' outputs: targets, terms and their weights."""
    name, recipe, states, metrics = beyond
    state, views, branch, row = states[1], own_views(1), recipe.branches["ecapa"], metrics[1]
    student, teacher = state.student["ecapa"], state.teacher["ecapa"]
    as_float64 = functools.partial(jax.tree.map, lambda x: np.asarray(x, np.float64))
    embeddings, logits, _ = as_float64(forward(branch, **student, features=views.students, passes=2))
    of_teacher, targets, _ = as_float64(forward(branch, **teacher, features=[views.teachers], passes=1))
    logits, targets = logits["self"], targets["self"][:, 0]
    p = np.exp(logits / 0.1)
    p /= p.sum(axis=-1, keepdims=True)
    if name == "sdpn":
        q = np.exp(targets / 0.04)
        q /= q.sum(axis=1, keepdims=True)
        for _ in range(3):
            q /= q.sum(axis=0)
            q /= q.sum(axis=1, keepdims=True)
        units = embeddings / np.linalg.norm(embeddings, axis=-1, keepdims=True)
        koleo = 0.0
        for view in units.swapaxes(0, 1):
            distances = np.linalg.norm(view[:, None] - view, axis=-1) + np.diag([np.inf] * BATCH)
            koleo -= np.log(distances.min(axis=1) + 1e-8).mean()
        mean = p.mean(axis=(0, 1))
        expected = {"mean_entropy": 0.7 * (np.log(PROTOTYPES) + (mean * np.log(mean)).sum()), "koleo": 0.3 * koleo}
        assert not np.any(state.center["ecapa"]["self"]), "balanced targets have no centre"
    else:
        q = np.exp((targets - np.asarray(state.center["ecapa"]["self"])) / 0.04)
        q /= q.sum(axis=1, keepdims=True)
        head, of_head = branch.head, {kind: tree["self_head"] for kind, tree in student.items()}
        variances, covariances, seen = [], [], 0
        for count in (2, 4):  # batch norms see one crop length after another
            rows = embeddings[:, seen : seen + count].reshape(BATCH * count, -1)
            (z, _), new = head.apply(of_head, jnp.float32(rows), train=True, method="project", mutable=["batch_stats"])
            of_head, seen = of_head | new, seen + count
            for view in np.asarray(z, np.float64).reshape(BATCH, count, -1).swapaxes(0, 1):
                covariance = np.cov(view.T)
                variances.append(np.maximum(0, 1 - np.sqrt(np.diag(covariance) + 1e-4)).mean())
                covariances.append((covariance**2)[~np.eye(len(covariance), dtype=bool)].sum() / len(covariance))
        rise = 0.25 + 0.75 / 4  # after one of four steps
        expected = {"variance": rise * 2.0 * np.mean(variances), "covariance": rise * 0.5 * np.mean(covariances)}
    expected["self"] = -(q[:, None] * np.log(p)).sum(axis=-1).mean()
    for kind, value in expected.items():
        assert row[f"loss/{kind}/ecapa"] == pytest.approx(value, rel=2e-4), kind
    others = row.get("loss/contrastive/ecapa", 0.0)
    assert row["loss"] == pytest.approx(sum(expected.values()) + others, rel=1e-4)


def test_shared_prototypes_are_the_students(beyond):
    name, _, states, metrics = beyond
    for after in states[1:]:
        teacher, student = (side["ecapa"]["params"] for side in (after.teacher, after.student))
        same = np.array_equal(teacher["self_head"]["prototypes"], student["self_head"]["prototypes"])
        assert same == (name == "sdpn")
        moved = [np.abs(s - t).max() for s, t in zip(*(jax.tree.leaves(x["backbone"]) for x in (student, teacher)))]
        assert max(moved) > 1e-6, "all else is averaged"


def test_options_that_are_off_leave_the_program_as_it_is():
    """Set explicitly to zero or to their defaults, they leave the same jaxpr; each one switched on changes it."""
    plain = recipe_of(("ecapa",), GateRule("never"), heads=("self",))
    state = jax.eval_shape(lambda: start(plain))

    def program(recipe):
        return str(jax.make_jaxpr(lambda s, v: train_step_on_features(s, v, recipe))(state, views_of_step(0)))

    def with_weights(**weights):
        return plain._replace(weights=plain.weights._replace(**weights))

    expected = program(plain)
    rising = plain.schedules._replace(regularization=optim.rising_regularization(0.25, 4))
    off = with_weights(mean_entropy=0.0, koleo=0.0, variance=0.0, covariance=0.0, targets="centered")
    assert program(off) == expected
    assert program(with_weights(variance=1.0)._replace(schedules=rising)) != program(with_weights(variance=1.0))
    for weights in ({"targets": "sinkhorn"}, {"mean_entropy": 1.0}, {"koleo": 1.0}, {"covariance": 1.0}):
        assert program(with_weights(**weights)) != expected
    assert program(plain._replace(shared_prototypes=True)) != expected


# The gate inside the step.


def equations(jaxpr, inside_cond=False):
    """Yields (equation, whether a `cond` surrounds it) of a jaxpr and all those it holds."""
    for equation in jaxpr.eqns:
        yield equation, inside_cond
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner, inside_cond or equation.primitive.name == "cond")


def similarity_matrices(recipe):
    """Returns (number outside, number inside a `cond`) of products in the step of NT-Xent's shape, [2, B, 2, B]."""
    state = jax.eval_shape(lambda: start(recipe))
    jaxpr = jax.make_jaxpr(lambda s, v: train_step_on_features(s, v, recipe))(state, views_of_step(0)).jaxpr
    found = [
        inside
        for equation, inside in equations(jaxpr)
        if equation.primitive.name == "dot_general" and equation.outvars[0].aval.shape == (2, BATCH, 2, BATCH)
    ]
    return found.count(False), found.count(True)


def test_contrastive_term_lies_under_a_cond_and_is_absent_when_never_on():
    """Nothing else here has the shape of the similarities, [2, B, 2, B], so they show where the term is computed."""
    outside, inside = similarity_matrices(recipe_of(rule=GateRule("plateau")))
    assert outside == 0 and inside >= 4  # two pairs of views for each branch
    assert similarity_matrices(recipe_of(rule=GateRule("never"))) == (0, 0)
    assert similarity_matrices(recipe_of(contrastive=0.0)) == (0, 0)


def test_closed_gate_does_not_run_the_term():
    """A weight that is not a number poisons the loss wherever it is multiplied in, by zero, too: NaN·0 is NaN.

    Thus finite numbers behind a closed gate mean that the term did not enter any result, and they must be those of
    a run that never had it.
    """
    poisoned = recipe_of(("ecapa",), GateRule("step", stop_step=1), heads=("self",), contrastive=math.nan)
    never = recipe_of(("ecapa",), GateRule("never"), heads=("self",))
    open_state = start(poisoned)
    step = jitted(poisoned)
    assert math.isnan(float(step(open_state, views_of_step(0))[1]["loss"]))
    closed_state = open_state.replace(gate=open_state.gate.replace(closed=jnp.asarray(True)))
    ours, metrics = step(closed_state, views_of_step(0))
    expected, plain_metrics = jitted(never)(start(never), views_of_step(0))
    assert float(metrics["loss"]) == pytest.approx(float(plain_metrics["loss"]), rel=1e-6)
    assert_trees_close(ours.student, expected.student, 1e-6)
    assert float(metrics["gate/open"]) == float(plain_metrics["gate/open"]) == 0


@pytest.fixture(scope="module")
def stopping():
    """Four steps with a gate that closes and prototypes that thaw after two."""
    rule = GateRule("step", stop_step=2)
    return run(recipe_of(("ecapa",), rule, heads=("self",), frozen_steps=2, decay=0.1, sgd_momentum=0.9), 4)


def test_gate_closes_inside_the_training_state_and_says_when(stopping):
    states, metrics = stopping
    assert [row["gate/open"] for row in metrics] == [1, 1, 0, 0]
    assert [row["gate/closed_at"] for row in metrics] == [-1, 2, 2, 2]
    assert [bool(s.gate.closed) for s in states] == [False, False, True, True, True]
    assert [row["loss/contrastive/ecapa"] > 0 for row in metrics] == [True, True, False, False]
    # The rules' input: at the first step, the smoothed weighted loss and alignment are the unsmoothed ones.
    assert metrics[0]["gate/loss"] == pytest.approx(metrics[0]["loss/contrastive/ecapa"], rel=1e-5)
    assert metrics[0]["gate/alignment"] == pytest.approx(metrics[0]["alignment/ecapa"], rel=1e-4, abs=1e-6)


def test_prototypes_are_frozen_until_their_step(stopping):
    params = [s.student["ecapa"]["params"]["self_head"] for s in stopping[0]]
    np.testing.assert_array_equal(params[1]["prototypes"], params[0]["prototypes"])
    np.testing.assert_array_equal(params[2]["prototypes"], params[0]["prototypes"])
    assert float(np.abs(params[3]["prototypes"] - params[0]["prototypes"]).max()) > 1e-5
    # The other parameters of the head learn from the first step.
    assert float(np.abs(params[1]["linear_2"]["kernel"] - params[0]["linear_2"]["kernel"]).max()) > 1e-5


# Plain DINO, the key, the state.


def test_plain_dino_is_the_same_step_with_one_branch_one_head_and_no_term():
    """Its whole loss is the cross-entropy over pairs of views, with one centre and nothing of MeMo beside it."""
    dino = recipe_of(("ecapa",), GateRule("never"), heads=("self",))
    states, metrics = run(dino, 2)
    assert len(jax.tree.leaves(states[0].center)) == 1
    assert {k for k in metrics[0] if k.startswith("loss")} == {"loss", "loss/ecapa", "loss/self/ecapa"}
    state, views, branch = states[1], views_of_step(1).students, dino.branches["ecapa"]

    @jax.jit
    def expected(student, teacher, center):
        logits = [
            forward(branch, v["params"], v["batch_stats"], views, passes)[1]["self"]
            for v, passes in ((student, 2), (teacher, 1))
        ]
        return cross_entropy_over_pairs(*logits, center, 0.04)

    loss = expected(state.student["ecapa"], state.teacher["ecapa"], state.center["ecapa"]["self"])
    assert metrics[1]["loss"] == pytest.approx(float(loss), rel=1e-5)


def test_one_head_can_serve_self_and_cross_distillation():
    recipe = recipe_of(heads=("self",), cross_head="self", cross=0.5)
    state, views = start(recipe), views_of_step(0)
    assert len(jax.tree.leaves(state.center)) == 2
    row = losses_of(recipe, state, views)
    logits = {
        n: [forward(b, **state.student[n], features=views.students, passes=p)[1]["self"] for p in (2, 1)]
        for n, b in recipe.branches.items()
    }
    for n, other in (("ecapa", "resnet"), ("resnet", "ecapa")):
        cross = cross_entropy_over_pairs(logits[n][0], logits[other][1], jnp.zeros(PROTOTYPES), 0.04)
        assert row[f"loss/cross/{n}"] == pytest.approx(float(cross), rel=1e-5)


def test_draws_depend_on_the_key_and_the_step_alone():
    """A resumed run repeats the draws of an uninterrupted one, since the front end's key follows from run and step."""
    recipe = recipe_of(("ecapa",), GateRule("never"), heads=("self",))

    def front_end(key, batch, banks):
        return Views(tuple(x + jax.random.normal(jax.random.fold_in(key, i), x.shape) for i, x in batch.items()))

    step = functools.partial(train_step, recipe=recipe, front_end=front_end)
    only_loss = jax.jit(lambda *inputs: step(*inputs)[1]["loss"])
    state, batch = start(recipe), dict(enumerate(views_of_step(0).students))
    later = state.replace(step=state.step + 1)
    loss = lambda state, seed: float(only_loss(state, batch, {}, jax.random.key(seed)))  # noqa: E731
    assert loss(state, 0) == loss(state, 0)
    assert len({loss(state, 0), loss(state, 1), loss(later, 0)}) == 3


def test_step_keeps_types_and_structure_of_the_state(memo):
    """Input and output states have the same types: nothing recompiles, and a donated buffer can be overwritten."""
    _, states, _ = memo
    for before, after in itertools.pairwise(states):
        assert jax.tree.structure(before) == jax.tree.structure(after)
        assert [(x.shape, x.dtype) for x in jax.tree.leaves(before)] == [
            (x.shape, x.dtype) for x in jax.tree.leaves(after)
        ]


def test_step_copies_no_parameters_and_holds_gradients_of_few_heads(monkeypatch):
    """Nearly all of this donated state is prototypes and their momenta: copies of both would be twice as large as the
    students, gradients of all four heads as large; a step needs neither, only logits and one head's gradient. The
    momentum's cosine is computed once. Without `materialize_on_cpu` neither holds."""
    recipe = recipe_of(sgd_momentum=0.9, clip=3.0, decay=1e-4)
    head = DINOHead(32768, 16, 64)
    recipe = recipe._replace(branches={name: branch.copy(head=head) for name, branch in recipe.branches.items()})
    state = jax.eval_shape(
        lambda: initial_state(jax.random.key(0), recipe.branches, MELS, recipe.optimizer, recipe.gate_rule)
    )
    views = Views(tuple(jax.ShapeDtypeStruct((BATCH, v, 8, MELS), jnp.float32) for v in (2, 2)))
    students = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.student))

    def compiled():
        """Returns the temporary memory of a step, in sizes of the students, and how many cosines it computes."""
        step = jax.jit(functools.partial(train_step_on_features, recipe=recipe), donate_argnums=0)
        program = step.lower(state, views).compile(compiler_options(jax.default_backend()))
        return program.memory_analysis().temp_size_in_bytes / students, program.as_text().count(" cosine(")

    memory, cosines = compiled()
    assert memory < 1 and cosines == 1
    monkeypatch.setattr("memo_jax.training.step.materialize_on_cpu", lambda tree: tree)
    memory, cosines = compiled()
    assert memory > 1 and cosines > 1, "materialize_on_cpu is no longer needed in training/step.py: delete it there"


def test_bfloat16_step_learns_about_the_same_and_keeps_its_state_in_float32():
    settings = {"names": ("ecapa",), "heads": ("self",), "rule": GateRule("never")}
    exact = recipe_of(**settings)
    branch = Branch(Pooling(12, jnp.bfloat16), DINOHead(PROTOTYPES, 16, 9, jnp.bfloat16), ("self",))
    coarse = exact._replace(branches={"ecapa": branch})
    state = start(exact)
    expected, exact_metrics = jitted(exact)(state, views_of_step(0))
    after, metrics = jitted(coarse)(state, views_of_step(0))
    assert [x.dtype for x in jax.tree.leaves(after)] == [x.dtype for x in jax.tree.leaves(state)]
    assert float(metrics["loss"]) == pytest.approx(float(exact_metrics["loss"]), rel=0.02)
    assert float(metrics["loss"]) != float(exact_metrics["loss"])
    flat = lambda tree: np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])  # noqa: E731
    start_params = flat(student_params(state))
    ours, theirs = (flat(student_params(s)) - start_params for s in (after, expected))
    assert ours @ theirs / (np.linalg.norm(ours) * np.linalg.norm(theirs)) > 0.99


@pytest.mark.parametrize("name", ["ecapa", "resnet"])
def test_backbones_in_bfloat16_leave_the_types_of_the_state(name):
    arguments = {"ecapa": {"channels": (16, 16, 16, 16, 48)}, "resnet": {"base_channels": 2, "blocks": (1, 1, 1, 1)}}
    backbone = build_backbone(name, embedding_dim=8, dtype=jnp.bfloat16, **arguments[name])
    recipe = recipe_of()._replace(branches={name: Branch(backbone, DINOHead(PROTOTYPES, 16, 9, jnp.bfloat16))})
    views = Views((jnp.zeros((4, 2, 32, 16)), jnp.zeros((4, 4, 20, 16))))

    def both():
        state = initial_state(jax.random.key(0), recipe.branches, 16, recipe.optimizer, recipe.gate_rule)
        return state, train_step_on_features(state, views, recipe)[0]

    before, after = jax.eval_shape(both)
    assert [x.dtype for x in jax.tree.leaves(after)] == [x.dtype for x in jax.tree.leaves(before)]
    assert jnp.bfloat16 not in {x.dtype for x in jax.tree.leaves(after)}


def test_branches_start_from_different_numbers_and_the_seed():
    make = students_of(("ecapa", "resnet"), ("self", "cross"))
    a, b, again = make(0), make(1), make(0)
    assert_trees_equal(a, again)
    head = lambda student, n: student[n]["params"]["self_head"]["prototypes"]  # noqa: E731
    assert not np.array_equal(head(a, "ecapa"), head(a, "resnet"))
    assert not np.array_equal(head(a, "ecapa"), head(b, "ecapa"))
