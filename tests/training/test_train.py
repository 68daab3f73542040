"""Training as a user starts it: what it writes, and that config, seed and audio alone determine a run."""

import json

import jax
import numpy as np
import pytest
import soundfile

import tiny
import tiny_processes
from memo_jax.config import read_config
from memo_jax.data.batches import Utterances
from memo_jax.inference.workdir import workdir_model
from memo_jax.log import read_metrics
from memo_jax.training import recipe as recipes
from memo_jax.training import train as training
from memo_jax.training.checkpoint import load_state
from memo_jax.training.recipe import build_branches, build_recipe
from runs import assert_same_state, rows_without_times

pytestmark = pytest.mark.usefixtures("compiled_once")


@pytest.fixture(scope="module")
def reference():
    return tiny.whole_run()


def test_labels_never_reach_training_and_a_seed_decides_all(reference, tmp_path):
    """A second run, on a dataset whose speaker labels are scrambled, is bit-identical: in all parameters, statistics,
    centres, optimiser, gate, and in every logged number."""
    names = Utterances(tiny.material().dataset).names
    speakers = dict(zip(names, np.random.default_rng(1).permutation([f"x{i % 3}" for i in range(len(names))]).tolist()))
    dataset = tiny.write_dataset(tmp_path / "scrambled", tiny.material().corpus, speakers=speakers)
    assert Utterances(dataset).speakers == list(speakers.values())
    assert tiny.train_here(tmp_path / "run", f"data.train={dataset}")[0] == 0
    assert_same_state(tmp_path / "run", reference)
    assert rows_without_times(tmp_path / "run") == rows_without_times(reference)


def test_a_run_with_banks_repeats_itself_and_keeps_them_as_int16_on_the_device(tmp_path, monkeypatch):
    """Twice the same three steps with noise and rooms, whose number the run announces."""
    rng = np.random.default_rng(0)
    for kind, seconds in (("noise", 1.0), ("rirs", 0.1)):
        (tmp_path / kind).mkdir()
        for number in range(3):
            decay = np.exp(-np.arange(int(16000 * seconds)) / 200) if kind == "rirs" else 0.2
            sound = 0.9 * decay * rng.uniform(-1, 1, int(16000 * seconds))
            soundfile.write(tmp_path / kind / f"{number}.wav", sound, 16000)
    placed, replicate = {}, training.sharding.replicate

    def watched(mesh, tree):
        result = replicate(mesh, tree)
        if isinstance(tree, dict) and "noise" in tree:
            placed.update(result)
        return result

    monkeypatch.setattr(training.sharding, "replicate", watched)
    for name in ("one", "two"):
        status, text = tiny.train_here(
            tmp_path / name,
            "--stop-at-step=3",
            f"augment.noise={tmp_path / 'noise'}",
            f"augment.rirs={tmp_path / 'rirs'}",
            "augment.bank_megabytes=0.1",
            "augment.clean=0.0",
        )
        assert status == 0 and "augmentation: noise 6 × 0.5 s, 3 room responses" in text, text
    assert isinstance(placed["noise"], jax.Array) and placed["noise"].dtype == np.int16
    assert_same_state(tmp_path / "one", tmp_path / "two")
    assert rows_without_times(tmp_path / "one") == rows_without_times(tmp_path / "two")


def test_training_without_any_augmentation_is_announced(tmp_path):
    """No bank, and no babble from the batch either (`reference` is the run with babble)."""
    status, text = tiny.train_here(tmp_path / "none", "--stop-at-step=0", "augment.babble_from_batch=False")
    assert status == 0 and "augmentation: no bank of noise or rooms\n" in text


def test_another_seed_is_another_run(reference, tmp_path):
    assert tiny.train_here(tmp_path / "run", "seed=1", "--stop-at-step=1")[0] == 0
    assert read_metrics(tmp_path / "run")[0]["loss"] != read_metrics(reference)[0]["loss"]


def test_all_evaluations_of_a_run_use_the_same_programs(tmp_path):
    """Networks are passed as the same kind of arrays at every step, including the first, so nothing recompiles."""
    program, compiled = jax.jit(lambda variables: 0), []

    def evaluation(recipe, backbones):
        program(jax.device_put(backbones))
        compiled.append(program._cache_size())
        return {}

    config = tiny.tiny_config("evaluation.every_epochs=-1", "evaluation.every_steps=1", *tiny.one_branch())
    training.train(config, tmp_path / "run", evaluation=evaluation, stop_at_step=2)
    assert compiled == [1, 1, 1]


def test_any_two_backbones_learn_together(tmp_path, monkeypatch):
    """CAM++ with another, here of one layer, which compiles in no time: each changes, learns from the other, and can be
    loaded from the workdir."""
    build = recipes.build_backbone

    def other(name, embedding_dim, **sizes):
        if name == "campplus":
            return build(name, embedding_dim=embedding_dim, **sizes | {"plane_blocks": (1, 1)})
        return tiny_processes.layer(name, embedding_dim)

    monkeypatch.setattr(recipes, "build_backbone", other)
    status, text = tiny.train_here(
        tmp_path / "run",
        "model.branches=resnet,campplus",
        "data.local_crops=0",
        "checkpoint.every_steps=2",
        "--stop-at-step=4",
    )
    assert status == 0, text
    losses = [row for row in read_metrics(tmp_path / "run") if "loss" in row]
    for name in ("resnet", "campplus"):
        assert losses and all(np.isfinite(row[f"loss/cross/{name}"]) for row in losses)
        networks = (load_state(tmp_path / "run", step)["student"][name] for step in (2, 4))
        start, end = ({kind: parts["backbone"] for kind, parts in network.items()} for network in networks)
        moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), start, end)
        assert all(jax.tree.leaves(moved["batch_stats"])) and np.mean(jax.tree.leaves(moved["params"])) > 0.9
    assert workdir_model(tmp_path / "run", "campplus", "student").dimension == 16


def test_sizes_and_forms_of_the_config_are_those_of_the_backbones():
    config = tiny.tiny_config(
        "model.branches=ecapa,campplus",
        "model.ecapa_form=wespeaker",
        "model.ecapa_embedding_norm=true",
        "model.campplus_layers=1,2,3",
    )
    branches = build_branches(config)
    ecapa, campplus = branches["ecapa"].backbone, branches["campplus"].backbone
    assert (ecapa.form, ecapa.embedding_norm) == ("wespeaker", True)
    assert (campplus.layers, campplus.growth, campplus.embedding_dim) == ((1, 2, 3), 4, 16)
    assert (campplus.stem_channels, campplus.plane_channels) == (8, 4)


def test_durations_may_be_epochs(tmp_path):
    status, text = tiny.train_here(tmp_path, "total_epochs=2.0", "total_steps=-1", "--stop-at-step=0")
    assert status == 0 and "5 steps an epoch, 10 steps in all" in text
    warmup = ("optimizer.warmup_epochs=0.4", "optimizer.warmup_steps=-1")
    config = tiny.tiny_config(*warmup, "optimizer.learning_rate=64.0")
    rates = [float(build_recipe(config, 10).schedules.learning_rate(step)) for step in range(5)]
    assert rates[:4] == pytest.approx([0, 1 / 3, 2 / 3, 1]) and rates[4] <= 1, "4 steps, peak 64·4/256"


def test_what_a_run_reports_is_what_it_used(reference):
    """The rows report the schedules, and the config beside the checkpoints is the one that was given."""
    rows = read_metrics(reference)
    config = read_config(reference)
    recipe = build_recipe(config, tiny.STEPS_PER_EPOCH)
    for row in rows:
        for name, schedule in (("lr", recipe.schedules.learning_rate), ("momentum", recipe.schedules.momentum)):
            assert row[name] == pytest.approx(float(schedule(row["step"] - 1)), rel=1e-5)
    assert json.loads((reference / "config.json").read_text())["data"]["train"] == str(tiny.material().dataset)
