"""The loss gate and the correction of labels: their definitions, the step that uses them, and runs that are killed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm
from sklearn.mixture import GaussianMixture

import tiny
from memo_jax.data.batches import Utterances, training_batches
from memo_jax.features import FRONT_ENDS, MEL_BINS
from memo_jax.log import read_metrics
from memo_jax.training import losses, program, recipe
from memo_jax.training.checkpoint import load_state
from memo_jax.training.front_end import Views, clean_features
from memo_jax.training.loss_gate import LossGate, crossing_point, fitted_mixture, gate_threshold, passes
from memo_jax.training.state import student_params
from memo_jax.training.step import train_step_on_features
from memo_jax.training.supervision import GatedBatch
from memo_jax.xla import sharding
from runs import rows_without_times
from tiny_processes import command, layer, patch_for_tests, start

pytestmark = pytest.mark.usefixtures("compiled_once")
GATED = (
    *tiny.SUPERVISED,
    "supervised.loss_gate_after_epochs=1",
    "supervised.correct_labels_after_epochs=2",
    "supervised.correction_probability=0.3",
)


@pytest.fixture
def two_modes():
    random = np.random.default_rng(0)
    return np.concatenate([random.normal(-2, 0.7, 3000), random.normal(1.5, 0.4, 1000)])


def test_the_mixture_is_that_of_scikit_learn(two_modes):
    ours = fitted_mixture(two_modes)
    theirs = GaussianMixture(2, tol=1e-9, max_iter=1000, random_state=0).fit(two_modes[:, None])
    order = np.argsort(theirs.means_[:, 0])
    np.testing.assert_allclose(ours.weights, theirs.weights_[order], rtol=1e-3)
    np.testing.assert_allclose(ours.means, theirs.means_[order, 0], rtol=1e-3)
    np.testing.assert_allclose(ours.deviations, np.sqrt(theirs.covariances_[order, 0, 0]), rtol=1e-3)


def test_the_threshold_is_where_the_weighted_densities_cross(two_modes):
    mixture = fitted_mixture(two_modes)
    threshold = gate_threshold(np.concatenate([np.exp(two_modes), [-1, -1]]).astype(np.float32))
    point = np.log(threshold)
    assert mixture.means[0] < point < mixture.means[1]
    low, high = mixture.weights * norm.pdf(point, mixture.means, mixture.deviations)
    assert low == pytest.approx(high, rel=1e-4)
    wrong = (np.exp(two_modes) > threshold) != (np.arange(4000) >= 3000)
    assert wrong.mean() < 0.01


def test_without_a_crossing_point_nothing_is_left_out(two_modes):
    mixture = fitted_mixture(two_modes)
    rare = mixture._replace(weights=np.array([1 - 1e-30, 1e-30]))
    assert np.isfinite(crossing_point(mixture)) and crossing_point(rare) == np.inf
    for few in ([], [0.5], [-1.0, -1.0], [0.3] * 5):
        assert gate_threshold(np.array(few)) == np.inf
    assert np.isfinite(gate_threshold(np.array([0.0, 1e-3, 1.1e-3, 3.0, 3.3])))


def test_utterances_pass_by_their_latest_loss():
    gate = LossGate(jnp.array([0.5, 2.0, -1.0, 1.0]), jnp.float32(1.0))
    assert passes(gate, jnp.array([3, 1, 2])).tolist() == [True, False, True]


def test_confident_labels_are_their_definition():
    random = np.random.default_rng(0)
    embeddings, directions = random.normal(size=(40, 8)), 0.03 * random.normal(size=(8, 5))
    exponents = np.exp(embeddings @ directions / 0.1)
    q = exponents / exponents.sum(axis=1, keepdims=True)
    found = losses.confident_labels(jnp.asarray(embeddings), jnp.asarray(directions), 0.1, 0.5)
    np.testing.assert_array_equal(found, np.where(q.max(axis=1) > 0.5, q.argmax(axis=1), -1))
    assert 0 < (np.asarray(found) >= 0).sum() < 40 and found.dtype == jnp.int32


def test_the_correction_uses_the_crop_as_it_was_recorded():
    batch = training_batches(tiny.material().dataset, batch_size=4, seed=0, global_seconds=0.32, local_crops=0)
    crops = next(batch)["global"]
    batch.close()
    found = clean_features({"global": jnp.asarray(crops)}, front_end="log_mel")
    alone = FRONT_ENDS["log_mel"](jnp.asarray(crops[:, 0], jnp.float32) / 32768)[0]
    np.testing.assert_array_equal(found, alone)


def test_a_step_learns_what_passes_and_what_is_corrected(monkeypatch):
    """It updates the student like a step that is given the labels by definition, and records the losses of all."""
    monkeypatch.setattr(recipe, "build_backbone", layer)
    config = tiny.tiny_config(*GATED, "model.branches=resnet,", "supervised.correction_temperature=0.5")
    gated, plain = (recipe.build_recipe(config, tiny.STEPS_PER_EPOCH, 3, count) for count in (10, 0))
    random = np.random.default_rng(0)
    views = Views(tuple(jnp.asarray(random.normal(0, 1, (6, v, 12, MEL_BINS)), jnp.float32) for v in (2, 1)))
    clean = jnp.asarray(random.normal(0, 1, (6, 12, MEL_BINS)), jnp.float32)
    labels, index = np.array([0, 2, 1, 2, -1, 0]), np.array([7, 1, 4, 2, 9, 3])
    state = program.create_state(config, gated, sharding.data_mesh())
    before = np.full(10, -1, np.float32)
    before[[7, 1, 4, 2, 9]] = 0.5, 3.0, 4.0, 0.9, 5.0
    state = state.replace(loss_gate=LossGate(jnp.asarray(before), jnp.float32(0.9)))
    with_gate, without = (jax.jit(functools.partial(train_step_on_features, recipe=one)) for one in (gated, plain))

    variables = state.student["resnet"]
    x = layer("resnet", 16).apply({kind: tree["backbone"] for kind, tree in variables.items()}, clean)
    products = np.asarray(x, np.float64) @ np.asarray(variables["params"]["speaker_head"]["directions"], np.float64)
    q = np.exp(products / 0.5) / np.exp(products / 0.5).sum(axis=1, keepdims=True)
    sure = np.where(q.max(axis=1) > 0.3, q.argmax(axis=1), -1)
    assert (sure[[1, 2, 4]] >= 0).any()
    for number, corrected in ((0, np.full(6, -1)), (2 * tiny.STEPS_PER_EPOCH, sure)):
        learned = np.where([True, False, False, True, False, True], labels, corrected)
        now = state.replace(step=jnp.int32(number))
        after, metrics = with_gate(now, views, labels=jnp.asarray(labels), gated=GatedBatch(jnp.asarray(index), clean))
        wanted, _ = without(now.replace(loss_gate=None), views, labels=jnp.asarray(learned))
        for ours, theirs in zip(jax.tree.leaves(student_params(after)), jax.tree.leaves(student_params(wanted))):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)
        assert float(metrics["labels/learned/resnet"]) == pytest.approx((learned >= 0).mean())
        replaced = np.array([False, True, True, False, True, False]) & (corrected >= 0)
        assert float(metrics["labels/corrected/resnet"]) == pytest.approx(replaced.mean())
        noted = np.asarray(after.loss_gate.losses)
        assert noted[9] == -1 and (noted[[7, 1, 4, 2, 3]] > 0).all()
        np.testing.assert_array_equal(noted[[0, 5, 6, 8]], -1)
        alone = [
            without(now.replace(loss_gate=None), views, labels=jnp.asarray(np.where(index == i, labels, -1)))[1]
            for i in (7, 1, 4, 2, 3)
        ]
        np.testing.assert_allclose(
            noted[[7, 1, 4, 2, 3]], [float(m["loss/supervised/resnet"]) for m in alone], rtol=1e-5
        )


@pytest.fixture(scope="module")
def labels(tmp_path_factory):
    """A table in which three utterances have a wrong speaker."""
    utterances = Utterances(tiny.material().dataset)
    speakers = list(utterances.speakers)
    speakers[2], speakers[9], speakers[17] = speakers[9], speakers[17], speakers[2]
    table = tmp_path_factory.mktemp("labels") / "table.tsv"
    table.write_text("".join(f"{name}\t{speaker}\n" for name, speaker in zip(utterances.names, speakers)))
    return f"supervised.labels={table}"


@pytest.fixture(scope="module")
def run(labels, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("gated") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch_for_tests(patch.setattr)
        status, text = tiny.here(*command(workdir, *GATED, labels))
    assert status == 0, text
    return workdir, text


def test_a_run_sets_its_gate_after_every_epoch_and_resumes_exactly_from_any_step(run, labels, tmp_path, monkeypatch):
    """Before, at and after the end of an epoch, where the gate is set, and among the steps that correct labels."""
    workdir, text = run
    assert text.count("the loss gate is at") == 2 and "epoch 1: the loss gate is at" in text
    rows = read_metrics(workdir)
    assert [row["labels/threshold"] for row in rows[:5]] == [None] * 5
    assert len({row["labels/threshold"] for row in rows[5:10]} - {None}) == 1
    assert min(row["labels/learned/resnet"] for row in rows) < 1
    assert [max(row["labels/corrected/resnet"] for row in part) > 0 for part in (rows[:10], rows[10:])] == [False, True]
    state = load_state(workdir)
    assert state["loss_gate"]["losses"].shape == (20,) and (state["loss_gate"]["losses"] >= 0).all()
    patch_for_tests(monkeypatch.setattr)
    for step in (4, 5, 6, 10, 11):
        assert tiny.here(*command(tmp_path / "run", *GATED, labels, f"--stop-at-step={step}"))[0] == 0
    assert tiny.here(*command(tmp_path / "run", *GATED, labels))[0] == 0
    for name, value in state["loss_gate"].items():
        np.testing.assert_array_equal(value, load_state(tmp_path / "run")["loss_gate"][name])
    assert rows_without_times(tmp_path / "run") == rows_without_times(workdir)


def test_two_processes_gate_as_one_does(run, labels, tmp_path):
    two = start(2, command(tmp_path / "two", *GATED, labels))
    assert [one.status for one in two] == [0, 0], two
    ours, theirs = (load_state(workdir)["loss_gate"] for workdir in (tmp_path / "two", run[0]))
    # A loss is a difference of logits of up to 30, in which float32 noise has been amplified by training.
    for name, value in ours.items():
        np.testing.assert_allclose(value, theirs[name], rtol=2e-4, atol=1e-3)
    for name in ("labels/learned/resnet", "labels/corrected/resnet"):
        assert [row[name] for row in read_metrics(tmp_path / "two")] == [row[name] for row in read_metrics(run[0])]


def test_two_processes_add_the_contrastive_loss_as_one_does(labels, tmp_path, monkeypatch):
    """Both losses sum over the processes; where they did so at the same time, gloo mixed up the sums."""
    correcting = ("supervised.loss_gate_after_epochs=1", "supervised.correct_labels_after_epochs=1")
    settings = ("supervised.weight=1", *correcting, "--stop-at-step=3")
    two = start(2, command(tmp_path / "two", *settings, labels))
    assert [one.status for one in two] == [0, 0], two
    patch_for_tests(monkeypatch.setattr)
    assert tiny.here(*command(tmp_path / "one", *settings, labels))[0] == 0
    for ours, theirs in zip(read_metrics(tmp_path / "two"), read_metrics(tmp_path / "one"), strict=True):
        for name in ("loss", "loss/contrastive/resnet", "gradient_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3), (ours["step"], name)


def test_when_off_it_is_not_part_of_state_and_batch(monkeypatch):
    monkeypatch.setattr(recipe, "build_backbone", layer)
    config, mesh = tiny.tiny_config(*tiny.SUPERVISED, "model.branches=resnet,"), sharding.data_mesh()
    built = recipe.build_recipe(config, tiny.STEPS_PER_EPOCH, 5, 20)
    assert program.abstract_state(config, built, mesh).loss_gate is None
    text = program.lowered_step(config, built, mesh, {}).as_text()
    assert "tensor<20xf32>" not in text
    gated = tiny.tiny_config(*GATED, "model.branches=resnet,")
    built = recipe.build_recipe(gated, tiny.STEPS_PER_EPOCH, 5, 20)
    assert "tensor<20xf32>" in program.lowered_step(gated, built, mesh, {}).as_text()


@pytest.mark.parametrize(
    "settings, said",
    [
        (("supervised.loss_gate_after_epochs=1",), "supervised.weight is 0"),
        (("supervised.weight=1", "supervised.correct_labels_after_epochs=1"), "loss_gate_after_epochs 0: only"),
        (
            ("supervised.weight=1", "supervised.loss_gate_after_epochs=3", "supervised.correct_labels_after_epochs=2"),
            "set the latter to 1 to 2",
        ),
        (("supervised.weight=1", "supervised.loss_gate_after_epochs=-1"), "must be at least 0"),
        (("supervised.correction_temperature=0",), "supervised.correction_temperature"),
        (("supervised.correction_probability=1.5",), "supervised.correction_probability"),
    ],
)
def test_impossible_settings_are_named(settings, said, tmp_path):
    status, text = tiny.train_here(tmp_path / "run", *settings)
    assert status == 2 and said in text and not (tmp_path / "run").exists()
