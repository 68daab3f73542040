"""Training with labels: AAM-softmax against its definition, the step that descends it, and runs that use labels."""

import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny
from memo_jax.data.batches import Utterances, speaker_numbers, table_numbers, training_batches
from memo_jax.features import MEL_BINS
from memo_jax.inference.workdir import workdir_model
from memo_jax.log import read_metrics
from memo_jax.training import losses, optim
from memo_jax.training import recipe as training_recipe
from memo_jax.training.checkpoint import load_state
from memo_jax.training.front_end import Views
from memo_jax.training.recipe import build_recipe
from memo_jax.training.state import initial_state, student_params
from memo_jax.training.step import objective, train_step_on_features
from runs import assert_same_state
from tiny_processes import layer

pytestmark = pytest.mark.usefixtures("compiled_once")


def definition(cosines, labels, scale, margin):
    """ArcFace, row by row in float64: the angle to the true speaker grows by the margin."""
    rows = []
    for row, label in zip(np.asarray(cosines, np.float64), labels):
        if label >= 0:
            angle = np.arccos(row[label])
            logits = scale * row
            wrong_side = angle + margin > np.pi
            logits[label] = scale * (row[label] - margin * np.sin(margin) if wrong_side else np.cos(angle + margin))
            rows.append(np.log(np.exp(logits).sum()) - logits[label])
    return np.mean(rows)


@pytest.mark.parametrize("margin", [0.0, 0.2, 0.5])
def test_aam_softmax_is_its_definition_with_its_slope(margin):
    random = np.random.default_rng(0)
    cosines, labels = random.uniform(-0.95, 0.95, (6, 5)), np.array([0, 3, -1, 4, 2, 1])
    cosines[1, 3] = -0.99  # beyond π with the margin
    loss = functools.partial(losses.aam_softmax, labels=jnp.asarray(labels), scale=30.0, margin=margin)
    single = jnp.asarray(cosines, jnp.float32)
    value, gradient = jax.jit(jax.value_and_grad(loss))(single)
    assert float(value) == pytest.approx(definition(cosines, labels, 30.0, margin), rel=1e-5)
    rows = jax.jit(losses.aam_softmax_rows)(single, jnp.asarray(labels), 30.0, margin)
    wanted = [definition([row], [y], 30.0, margin) for row, y in zip(cosines, labels) if y >= 0]
    np.testing.assert_allclose(rows[labels >= 0], wanted, rtol=1e-5, atol=1e-6)
    gradient, step = np.asarray(gradient), 1e-6
    assert not gradient[2].any(), "a row without a label"
    for place in np.ndindex(cosines.shape):
        ends = []
        for sign in (1, -1):
            moved = cosines.copy()
            moved[place] += sign * step
            ends.append(definition(moved, labels, 30.0, margin))
        assert gradient[place] == pytest.approx((ends[0] - ends[1]) / (2 * step), abs=2e-4), place


def test_accuracy_counts_rows_with_a_label():
    cosines = jnp.array([[0.9, 0.1], [0.2, 0.3], [0.5, 0.4]])
    assert float(losses.accuracy(cosines, jnp.array([0, 0, -1]))) == 0.5


def test_the_margin_rises_and_stays():
    schedule = optim.rising_margin(0.2, 4)
    assert [round(float(schedule(step)), 6) for step in (0, 1, 4, 9)] == [0, 0.05, 0.2, 0.2]
    assert float(optim.rising_margin(0.2, 0)(0)) == pytest.approx(0.2)


def test_the_step_descends_the_gradient_of_the_objective(monkeypatch):
    """With distillation and contrastive loss, too: the gradients of all terms meet at the embedding. The backbone is
    one layer, since none of this depends on it."""
    monkeypatch.setattr(training_recipe, "build_backbone", layer)
    plain = ("optimizer.clip_norm=0", "optimizer.weight_decay=0", "optimizer.sgd_momentum=0", "gate.rule=always")
    start = ("optimizer.warmup_steps=0", "optimizer.freeze_prototypes_steps=0", "model.branches=resnet,")
    config = tiny.tiny_config("supervised.weight=0.5", *plain, *start)
    recipe = build_recipe(config, tiny.STEPS_PER_EPOCH, speakers=3)
    random = np.random.default_rng(0)
    views = Views(tuple(jnp.asarray(random.normal(0, 1, (4, v, 12, MEL_BINS)), jnp.float32) for v in (2, 1)))
    labels = jnp.array([0, 2, 1, 2])

    @jax.jit
    def both(key):
        state = initial_state(key, recipe.branches, MEL_BINS, recipe.optimizer, recipe.gate_rule)
        gradient = jax.grad(objective)(student_params(state), state, views=views, recipe=recipe, labels=labels)
        after, metrics = train_step_on_features(state, views, recipe, labels)
        moved = jax.tree.map(lambda old, new: old - new, student_params(state), student_params(after))
        value = objective(student_params(state), state, views, recipe, labels)
        return moved, gradient, recipe.schedules.learning_rate(0), metrics, value

    moved, gradient, rate, metrics, value = jax.tree.map(np.asarray, both(jax.random.key(0)))
    assert "speaker_head" in gradient["resnet"]
    assert float(metrics["loss"]) == pytest.approx(float(value), rel=1e-5)
    largest = max(float(np.abs(b).max()) for b in jax.tree.leaves(gradient))
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(moved), jax.tree.leaves(gradient)):
        assert np.isfinite(b).all(), path
        if path[-2].key in ("linear_0", "linear_1") and path[-1].key == "bias":
            # Batch norm follows and subtracts it: its gradient is zero, and what is left is rounding.
            assert max(float(np.abs(a / rate).max()), float(np.abs(b).max())) < 1e-5 * largest, path
            continue
        scale = max(float(np.abs(b).max()), 1e-6)
        np.testing.assert_allclose(a / rate, b, atol=2e-3 * scale, err_msg=str(path))


def test_labels_follow_their_utterances():
    utterances = Utterances(tiny.material().dataset)
    labels = speaker_numbers(utterances)
    names = sorted(set(utterances.speakers))
    assert [names[label] for label in labels] == utterances.speakers
    options = {"batch_size": 4, "seed": 0, "global_seconds": 0.32, "local_crops": 0, "labels": labels}
    whole = training_batches(utterances, **options)
    parts = [training_batches(utterances, **options, process_index=index, process_count=2) for index in range(2)]
    by_content = {utterance.tobytes(): label for utterance, label in zip(utterances, labels)}
    for _ in range(6):
        batch = next(whole)
        np.testing.assert_array_equal(batch["label"], np.concatenate([next(part)["label"] for part in parts]))
        for crop, label in zip(batch["global"][:, 0], batch["label"]):
            assert {known for content, known in by_content.items() if crop.tobytes() in content} == {label}


# The tiny ECAPA-TDNN learns in twelve steps, the tiny ResNet does not.
SUPERVISED = (*tiny.SUPERVISED, "model.branches=ecapa", "data.local_crops=0")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("supervised") / "run"
    status, text = tiny.train_here(workdir, *SUPERVISED)
    assert status == 0, text
    return workdir


def test_a_run_learns_the_speakers_and_resumes_exactly(run, tmp_path):
    rows = read_metrics(run)
    first, last = (np.mean([row["loss/supervised/ecapa"] for row in part]) for part in (rows[:4], rows[-4:]))
    assert last < first and 0 <= rows[-1]["accuracy/ecapa"] <= 1
    assert load_state(run)["student"]["ecapa"]["params"]["speaker_head"]["directions"].shape == (16, tiny.SPEAKERS)
    assert workdir_model(run).dimension == 16
    assert tiny.train_here(tmp_path / "run", *SUPERVISED, "--stop-at-step=5")[0] == 0
    assert tiny.train_here(tmp_path / "run", *SUPERVISED)[0] == 0
    assert_same_state(tmp_path / "run", run)


MASKED = ("loss.contrastive_mask_same_speaker=True", "gate.rule=always")


def test_a_run_with_masked_negatives_reads_labels_and_resumes_exactly(tmp_path, monkeypatch):
    monkeypatch.setattr(training_recipe, "build_backbone", layer)
    status, text = tiny.train_here(tmp_path / "run", *MASKED, "--stop-at-step=5")
    assert status == 0, text
    assert tiny.train_here(tmp_path / "resumed", *MASKED, "--stop-at-step=2")[0] == 0
    assert tiny.train_here(tmp_path / "resumed", *MASKED, "--stop-at-step=5")[0] == 0
    assert_same_state(tmp_path / "resumed", tmp_path / "run", least=20)
    assert "speaker_head" not in load_state(tmp_path / "run")["student"]["resnet"]["params"]
    names = Utterances(tiny.material().dataset).names
    speakers = {name: f"x{i % tiny.SPEAKERS}" for i, name in enumerate(names)}
    dataset = tiny.write_dataset(tmp_path / "other", tiny.material().corpus, speakers=speakers)
    status, text = tiny.train_here(tmp_path / "scrambled", *MASKED, f"data.train={dataset}", "--stop-at-step=5")
    assert status == 0, text
    ours, theirs = (
        [row["loss/contrastive/resnet"] for row in read_metrics(tmp_path / run)] for run in ("run", "scrambled")
    )
    assert len(ours) == len(theirs) and ours != theirs


def test_other_labels_are_another_dataset(run, tmp_path):
    names = Utterances(tiny.material().dataset).names
    speakers = {name: f"x{i % 3}" for i, name in enumerate(names)}
    dataset = tiny.write_dataset(tmp_path / "other", tiny.material().corpus, speakers=speakers)
    status, text = tiny.train_here(run, *SUPERVISED, f"data.train={dataset}")
    assert status == 2 and "its speakers differ" in text


def write_table(path, labels):
    path.write_text("".join(f"{name}\t{label}\n" for name, label in labels.items()))
    return path


def test_a_table_gives_labels_by_name(tmp_path):
    utterances = Utterances(tiny.material().dataset)
    names = utterances.names
    table = write_table(tmp_path / "t", {names[3]: "b", "unknown.wav": "z", names[0]: "a", names[7]: "b"})
    numbers, unused = table_numbers(utterances, table)
    assert {names[i]: n for i, n in enumerate(numbers.tolist()) if n >= 0} == {names[0]: 0, names[3]: 1, names[7]: 1}
    assert unused == 1 and numbers.dtype == np.int32
    for labels, said in (
        ({"unknown.wav": "z"}, "has a label for none of the 20 utterances"),
        (dict.fromkeys(names, "a"), "all utterances have the same label"),
    ):
        with pytest.raises(ValueError, match=said):
            table_numbers(utterances, write_table(tmp_path / "t", labels))


def test_a_run_learns_the_labels_of_a_table(run, tmp_path):
    """A table of the speakers yields the run with speakers; utterances without a label are reported; the table may
    move, but not change."""
    utterances = Utterances(tiny.material().dataset)
    same = write_table(tmp_path / "same", dict(zip(utterances.names, utterances.speakers)))
    status, text = tiny.train_here(tmp_path / "run", *SUPERVISED, f"supervised.labels={same}")
    assert status == 0 and f"\nlabels: 5 of {same}\n" in text, text
    assert_same_state(tmp_path / "run", run)
    some = {name: f"c{i % 5}" for i, name in enumerate(utterances.names) if i > 1} | {"other.wav": "c0"}
    some = write_table(tmp_path / "some", some)
    part = (*SUPERVISED, f"supervised.labels={some}")
    status, text = tiny.train_here(tmp_path / "part", *part, "--stop-at-step=5")
    assert status == 0, text
    assert "2 utterances without a label: not part of the loss on labels; 1 name of the table not in" in text
    some.rename(tmp_path / "moved")
    part = (*SUPERVISED, f"supervised.labels={tmp_path / 'moved'}")
    status, text = tiny.train_here(tmp_path / "part", *part, "--stop-at-step=6")
    assert status == 0, text
    status, text = tiny.train_here(tmp_path / "part", *SUPERVISED, f"supervised.labels={same}")
    assert status == 2 and f"supervised.labels: {same} does not have the labels" in text


def test_a_run_from_a_workdir_keeps_the_directions_of_the_same_labels(run, tmp_path):
    """The first step, whose learning rate is zero, shows what a run starts from; how often it is logged may differ.

    Other people who are numbered alike are other labels.
    """
    teacher = load_state(run)["teacher"]["ecapa"]["params"]
    names = Utterances(tiny.material().dataset).names
    other = write_table(tmp_path / "other", {name: f"c{i % 5}" for i, name in enumerate(names)})
    corpus = shutil.copytree(tiny.material().corpus, tmp_path / "corpus")
    shutil.copy(corpus / "s0" / "0.wav", corpus / "s1" / "0.wav")
    strangers = tiny.write_dataset(tmp_path / "strangers", corpus)
    others = f"the labels are not those of {run}: the speaker heads start from random values\n"
    for number, (settings, same, said) in enumerate(
        (
            (("log_every_steps=2",), True, f"the labels are those of {run}: the speaker heads are kept\n"),
            ((f"supervised.labels={other}",), False, others),
            ((f"data.train={strangers}",), False, others),
        )
    ):
        workdir = tmp_path / str(number)
        status, text = tiny.train_here(workdir, *SUPERVISED, *settings, f"--init={run}", "--stop-at-step=1")
        assert status == 0 and said in text, text
        begun = load_state(workdir)["student"]["ecapa"]["params"]
        for ours, theirs in zip(jax.tree.leaves(begun["backbone"]), jax.tree.leaves(teacher["backbone"])):
            np.testing.assert_array_equal(ours, theirs)
        directions, theirs = (params["speaker_head"]["directions"] for params in (begun, teacher))
        assert (directions == theirs).all() == same
    status, text = tiny.train_here(tmp_path / "no", f"--init={run}", "model.branches=resnet")
    assert status == 2 and f"init: {run} holds ecapa" in text


def test_a_table_that_nothing_reads_is_refused(tmp_path):
    status, text = tiny.train_here(tmp_path / "run", "supervised.labels=table.tsv")
    assert status == 2 and "supervised.labels is set, but nothing reads labels" in text
    status, text = tiny.train_here(tmp_path / "run", *SUPERVISED, f"supervised.labels={tmp_path / 'table.tsv'}")
    assert status == 2 and "table.tsv: No such file" in text and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "speaker, said", [("", "20 of 20 utterances have no speaker"), ("one", "all utterances come from one speaker")]
)
def test_uninformative_labels_are_refused(speaker, said, tmp_path):
    names = Utterances(tiny.material().dataset).names
    dataset = tiny.write_dataset(tmp_path / "set", tiny.material().corpus, speakers=dict.fromkeys(names, speaker))
    status, text = tiny.train_here(tmp_path / "run", *SUPERVISED, f"data.train={dataset}")
    assert status == 2 and said in text and not (tmp_path / "run").exists()


def test_settings_out_of_range_are_named(tmp_path):
    for setting in ("supervised.margin=2.0", "supervised.weight=-1.0", "supervised.scale=0"):
        status, text = tiny.train_here(tmp_path / "run", setting)
        assert status == 2 and setting.split("=")[0] in text, text
