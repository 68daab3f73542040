"""Training as a user types it: what it writes and refuses, and that config, seed and audio alone decide a run."""

import contextlib
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
import soundfile

import tiny
from memo_jax.config import read_config
from memo_jax.data.batches import Utterances
from memo_jax.inference.model_file import write_model
from memo_jax.inference.workdir import starting_backbones, workdir_model
from memo_jax.log import read_metrics
from memo_jax.training import monitor
from memo_jax.training import train as training
from memo_jax.training.checkpoint import load_raw, saved_steps
from memo_jax.training.gate import GateRule, initial_gate
from memo_jax.training.program import create_state
from memo_jax.training.recipe import build_branches, build_recipe
from memo_jax.training.state import TrainState, backbone_variables
from memo_jax.xla import sharding

TIMES = {"seconds_per_step", "utterances_per_second", "cpu_seconds"}

# orbax leaves futures of a failed operation behind, which complain of a closed event loop when they end.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The workdir of an uninterrupted run of 12 steps, with checkpoints at 8 and 12 and the gate closing after 7."""
    workdir = tmp_path_factory.mktemp("reference") / "run"
    status, text = tiny.train_here(workdir)
    assert status == 0, text
    assert "augmentation: no bank of noise or rooms; other utterances are added as babble\n" in text
    return workdir


def arrays(workdir, step=None):
    """{path: array} of everything in a checkpoint's state."""
    state = load_raw(workdir, step)[0]
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]}


def assert_same_state(one, other, step=None):
    one, other = arrays(one, step), arrays(other, step)
    assert one.keys() == other.keys() and len(one) > 100
    for name, value in one.items():
        np.testing.assert_array_equal(value, other[name], err_msg=name, strict=True)


def rows_without_times(workdir):
    return [{name: value for name, value in row.items() if name not in TIMES} for row in read_metrics(workdir)]


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*")) if folder.exists() else []


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
            "total_steps=3",
            f"augment.noise={tmp_path / 'noise'}",
            f"augment.rirs={tmp_path / 'rirs'}",
            "augment.bank_megabytes=0.1",
            "augment.clean=0.0",
        )
        assert status == 0 and "augmentation: 6 noise, 3 rir" in text, text
    assert isinstance(placed["noise"], jax.Array) and placed["noise"].dtype == np.int16
    assert_same_state(tmp_path / "one", tmp_path / "two")
    assert rows_without_times(tmp_path / "one") == rows_without_times(tmp_path / "two")


def test_training_without_any_augmentation_is_announced(tmp_path):
    """No bank, and no babble from the batch either (`reference` is the run with babble)."""
    status, text = tiny.train_here(tmp_path / "none", "total_steps=1", "augment.babble_from_batch=False")
    assert status == 0 and "augmentation: no bank of noise or rooms\n" in text


def test_another_seed_is_another_run(reference, tmp_path):
    assert tiny.train_here(tmp_path / "run", "seed=1", "--stop-at-step=1")[0] == 0
    assert read_metrics(tmp_path / "run")[0]["loss"] != read_metrics(reference)[0]["loss"]


KILLED = """
import os, signal, sys, threading, time
from pathlib import Path
from memo_jax import cli, log
from memo_jax.training import checkpoint

point, step, arguments = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
die = lambda: os.kill(os.getpid(), signal.SIGKILL)
write, save = log.MetricsLog.write, checkpoint.Checkpointer.save

def write_or_die(self, number, values):
    if (point, number) == ("row", step):
        self._file.write('{"step": %d, "lo' % step)
        self._file.flush()
        die()
    write(self, number, values)

def save_or_die(self, number, *rest):
    def watch():
        while not list(Path(self.folder).glob(f"{number}.orbax-checkpoint-tmp*")):
            time.sleep(1e-4)
        die()
    if (point, number) == ("save", step):
        threading.Thread(target=watch, daemon=True).start()
    save(self, number, *rest)
    if (point, number) == ("save", step):
        self.wait()
        die()

log.MetricsLog.write, checkpoint.Checkpointer.save = write_or_die, save_or_die
sys.exit(cli.main(arguments))
"""


def test_a_run_killed_again_and_again_ends_as_if_it_had_not_been(reference, tmp_path):
    """SIGKILL in the middle of the first save, in the middle of a row of metrics between two checkpoints, and during
    the last save; each time the same command goes on. In the end checkpoints and rows are those of the uninterrupted
    run, bit for bit, each row once."""
    workdir = tmp_path / "run"
    arguments = tiny.train_arguments(workdir)
    texts = []
    for point, step in (("save", 4), ("row", 7), ("save", 12)):
        command = [sys.executable, "-c", KILLED, point, str(step), *arguments]
        done = subprocess.run(command, env=tiny.environment(), capture_output=True, text=True)
        assert done.returncode == -signal.SIGKILL, done.stderr
        texts.append(done.stderr)
    done = tiny.memo_jax(*arguments)
    assert done.returncode == 0, done.stderr
    assert_same_state(workdir, reference, 12)
    assert_same_state(workdir, reference, 8)
    assert rows_without_times(workdir) == rows_without_times(reference)
    assert [row["step"] for row in read_metrics(workdir)] == list(range(1, 13))
    assert "has closed" in texts[2] and "resumed after step" in done.stderr
    assert "has closed" not in done.stderr, "the gate closed before the kill"


def test_a_run_stopped_on_purpose_goes_on_exactly(reference, tmp_path):
    """At a step that is no checkpoint's: one is made there. The schedules still span the whole run."""
    assert tiny.train_here(tmp_path, "--stop-at-step=9")[0] == 0
    assert saved_steps(tmp_path)[-1] == 9
    status, text = tiny.train_here(tmp_path)
    assert status == 0 and "resumed after step 9" in text
    assert_same_state(tmp_path, reference, 12)


def test_a_run_killed_before_its_first_checkpoint_logs_the_untrained_network_once(tmp_path, monkeypatch):
    lowered_step = training.lowered_step

    def of_one_step(*arguments):
        programs = [lowered_step(*arguments).compile()]

        def step(*arguments):
            if not programs:
                raise KeyboardInterrupt
            return programs.pop()(*arguments)

        return types.SimpleNamespace(compile=lambda: step)

    monkeypatch.setattr(training, "lowered_step", of_one_step)
    data = tiny.material()
    for _ in range(2):
        status, text = tiny.train_here(tmp_path, f"evaluation.data={data.dataset}", f"evaluation.trials={data.trials}")
        assert status == 130 and "step 0: eer/resnet" in text
    assert [row["step"] for row in read_metrics(tmp_path)] == [0, 1]


def test_a_finished_run_says_so_and_changes_nothing(reference, tmp_path):
    workdir = shutil.copytree(reference, tmp_path / "run")
    before = (workdir / "metrics.jsonl").read_text()
    status, text = tiny.train_here(workdir)
    assert status == 0 and "nothing to do" in text and "12 steps already" in text
    assert (workdir / "metrics.jsonl").read_text() == before
    assert_same_state(workdir, reference)


def test_a_workdir_belongs_to_its_config(reference, tmp_path):
    workdir = shutil.copytree(reference, tmp_path / "run")
    before = files(workdir)
    status, text = tiny.train_here(workdir, "optimizer.learning_rate=0.1", "data.batch_size=5")
    assert status == 2 and "optimizer.learning_rate: 0.2 → 0.1" in text and "data.batch_size: 4 → 5" in text
    assert "another workdir" in text and files(workdir) == before
    # What is only watched or kept may change.
    status, text = tiny.train_here(workdir, "log_every_steps=3", "checkpoint.keep=1", "collapse.patience_steps=9")
    assert status == 0, text
    assert read_config(workdir).log_every_steps == 3


def test_a_workdir_belongs_to_its_data(reference, tmp_path):
    """The same dataset elsewhere will do; another one will not, whatever its place."""
    workdir = shutil.copytree(reference, tmp_path / "run")
    moved = shutil.copytree(tiny.material().dataset, tmp_path / "moved")
    status, text = tiny.train_here(workdir, f"data.train={moved}")
    assert status == 0 and "nothing to do" in text
    other = shutil.copytree(tiny.material().corpus, tmp_path / "corpus")
    (other / "s0" / "0.wav").unlink()
    dataset = tiny.write_dataset(tmp_path / "other", other)
    status, text = tiny.train_here(workdir, f"data.train={dataset}")
    assert status == 2 and str(dataset) in text and "not the dataset" in text and "fingerprint" in text
    assert_same_state(workdir, reference)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["data.batch_sise=8"], "nearest: data.batch_size"),
        (["data.batch_size=many"], "config.data.batch_size takes an int, not 'many'"),
        (["data.train="], "data.train is empty"),
        (["data.train=nowhere"], "nowhere is not a dataset"),
        (["data.batch_size=21"], "batch_size is 21; expected 1 to 20"),
        (["data.global_crops=1"], "data.global_crops is 1"),
        (["data.global_seconds=0.0"], "global_seconds is 0.0"),
        (["total_steps=0"], "total_epochs or total_steps"),
        (["total_epochs=2"], "exactly one of total_epochs, total_steps"),
        (["log_every_steps=0"], "log_every_steps is 0"),
        (["model.branches=xvector"], "unknown backbone 'xvector': choose one of ecapa, resnet"),
        (["model.branches=ecapa", "model.ecapa_channels=16,16"], "model.ecapa_channels is (16, 16)"),
        (["model.resnet_blocks=1,1"], "model.resnet_blocks is (1, 1)"),
        (["model.campplus_layers=1,0,1"], "model.campplus_layers is (1, 0, 1)"),
        (["model.ecapa_form=kaldi"], "model.ecapa_form is 'kaldi': choose speechbrain or wespeaker"),
        (["model.resnet_remat=all"], "model.resnet_remat is 'all': choose one of none, norms, blocks"),
        (["model.prototypes=0"], "model.prototypes is 0"),
        (["model.ecapa_stride=0"], "model.ecapa_stride is 0"),
        (["augment.masked_bins=81"], "augment.masked_bins is 81: must be 0 to 80"),
        (["loss.contrastive_margin=-0.1"], "loss.contrastive_margin is -0.1"),
        (["init=nowhere.safetensors"], "nowhere.safetensors"),
        (["model.dtype=float16"], "choose float32 or bfloat16"),
        (["teacher.momentum=1.5"], "teacher.momentum is 1.5"),
        (["teacher.temp=0.0"], "teacher.temp is 0.0"),
        (["optimizer.name=lamb"], "unknown optimizer 'lamb'"),
        (["optimizer.learning_rate=-1"], "learning rate -1.0"),
        (["gate.rule=often"], "gate rule 'often': choose one of plateau"),
        (["augment.noise=nowhere"], "nowhere: no such folder"),
        (["seed=-1"], "seed is -1"),
        (["evaluation.data=somewhere"], "evaluation.trials is not"),
        (["evaluation.trials=somewhere"], "evaluation.data is not"),
    ],
)
def test_a_config_that_cannot_work_is_refused_and_leaves_nothing(settings, message, tmp_path):
    status, text = tiny.train_here(tmp_path / "run", *settings)
    assert status == 2 and "memo-jax: error: " in text and message in text
    assert not (tmp_path / "run").exists()


def test_a_config_file_that_is_none_is_refused(tmp_path):
    wrong = (("gone.py", None, "no such config file"), ("a.py", "import nothing_of_that_name", "line 1"))
    for name, content, message in wrong:
        if content:
            (tmp_path / name).write_text(content)
        status, text = tiny.here("train", "--config", tmp_path / name, "--workdir", tmp_path / "run")
        assert status == 2 and name in text and message in text


def test_any_two_backbones_learn_together(tmp_path):
    """CAM++ with another: each moves, learns from the other, and is found again in the workdir."""
    status, text = tiny.train_here(
        tmp_path / "run", "model.branches=resnet,campplus", "total_steps=2", "checkpoint.every_steps=2"
    )
    assert status == 0, text
    losses = [row for row in read_metrics(tmp_path / "run") if "loss" in row]
    for name in ("resnet", "campplus"):
        assert losses and all(np.isfinite(row[f"loss/cross/{name}"]) for row in losses)
        start, end = (workdir_model(tmp_path / "run", name, "student", step).variables for step in (0, 2))
        moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), start, end)
        assert all(jax.tree.leaves(moved["batch_stats"])) and np.mean(jax.tree.leaves(moved["params"])) > 0.9


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


@pytest.fixture
def model_file(reference, tmp_path):
    """The resnet teacher of the reference run as a file, and its model."""
    model = workdir_model(reference)
    return write_model(tmp_path / "resnet.safetensors", model), model


def test_a_run_starts_from_the_network_of_a_model_file(model_file, tmp_path):
    """Student and teacher of its branch begin as it; heads and the other branch begin as they would have without."""
    path, model = model_file
    both = "model.branches=ecapa,resnet"
    status, text = tiny.train_here(tmp_path / "run", f"init={path}", both, "--stop-at-step=2")
    assert status == 0, text
    config = read_config(tmp_path / "run")
    recipe, mesh = build_recipe(config, tiny.STEPS_PER_EPOCH), sharding.data_mesh()
    plain, begun = (create_state(config, recipe, mesh, start) for start in (None, starting_backbones(config)))
    equal = functools.partial(jax.tree.map, np.testing.assert_array_equal)
    for old, new in ((plain.student, begun.student), (plain.teacher, begun.teacher)):
        equal(backbone_variables(new["resnet"]), dict(model.variables))
        equal(old["ecapa"], new["ecapa"])
        equal(old["resnet"]["params"]["self_head"], new["resnet"]["params"]["self_head"])
    assert workdir_model(tmp_path / "run", "resnet", step=0).fingerprint == model.fingerprint
    trained = [workdir_model(tmp_path / "run", "resnet", "student", step) for step in (0, 2)]
    moved = [np.abs(a - b).max() for a, b in zip(*(jax.tree.leaves(m.variables["params"]) for m in trained))]
    assert 0 < max(moved) < 0.1, "the run took its first steps from there"


def test_a_model_file_of_another_network_is_refused(model_file, tmp_path):
    for setting, said in (
        ("model.embedding_dim=8", "'embedding_dim': 8"),
        ("model.branches=ecapa", "(ecapa {"),
        ("features.front_end=kaldi_fbank", "takes log_mel, but features.front_end is kaldi_fbank"),
    ):
        status, text = tiny.train_here(tmp_path / "run", f"init={model_file[0]}", setting)
        assert status == 2 and f"init: {model_file[0]} " in text and said in text
    assert not (tmp_path / "run").exists()


def test_durations_may_be_epochs(tmp_path):
    status, text = tiny.train_here(tmp_path, "total_epochs=2.0", "total_steps=-1", "--stop-at-step=0")
    assert status == 0 and "5 steps an epoch, 10 steps in all" in text
    warmup = ("optimizer.warmup_epochs=0.4", "optimizer.warmup_steps=-1")
    config = tiny.tiny_config(*warmup, "optimizer.learning_rate=64.0")
    rates = [float(build_recipe(config, 10).schedules.learning_rate(step)) for step in range(5)]
    assert rates[:4] == pytest.approx([0, 1 / 3, 2 / 3, 1]) and rates[4] <= 1, "4 steps, peak 64·4/256"


def test_numbers_that_are_not_finite_stop_the_run_and_are_never_saved(tmp_path):
    """Plain DINO at a learning rate of 1e30. Its first row is like any other's; the gate is not talked about."""
    status, text = tiny.train_here(
        tmp_path,
        "gate.rule=never",
        "loss.cross=0",
        "data.local_crops=0",
        "optimizer.learning_rate=1e30",
        "optimizer.warmup_steps=0",
        "checkpoint.every_steps=1",
    )
    assert status == 3 and "memo-jax: error: step 2: " in text and " is nan" in text
    assert "optimizer.learning_rate" in text
    (row,) = read_metrics(tmp_path)
    assert row["step"] == 1 and row["loss"] == row["loss/self/resnet"] and row["gate/open"] == 0
    assert not [name for name in row if "contrastive" in name or "cross" in name]
    assert "has closed" not in text
    for step in saved_steps(tmp_path):
        assert all(np.isfinite(value).all() for name, value in arrays(tmp_path, step).items() if "gate" not in name)


def test_a_state_that_is_not_finite_is_refused_whatever_its_losses():
    """Wherever in it the number is; only the gate, before its first window, rightly holds an infinity."""
    parts = ("student", "teacher", "center", "opt_state")
    gate = initial_gate(GateRule())
    for bad in (None, *parts):
        leaves = {part: {"a": {"x": np.float32([1, np.nan if part == bad else 2])}} for part in parts}
        state = TrainState(step=np.int32(7), gate=gate, **leaves)
        if bad is None:
            monitor.check_finite(7, state)
        else:
            with pytest.raises(monitor.TrainingStopped, match="step 7: .*not finite.*learning_rate"):
                monitor.check_finite(7, state)


def test_a_collapse_stops_the_run_and_says_what_to_try(tmp_path):
    status, text = tiny.train_here(tmp_path, "collapse.min_embedding_std=1.5", "collapse.patience_steps=2")
    assert status == 3 and "step 2: collapsed; embedding_std/resnet is 0." in text and "for 2 steps" in text
    assert "lower optimizer.learning_rate" in text
    assert saved_steps(tmp_path) == []


def test_each_indicator_of_collapse_must_be_bad_for_long_without_a_break():
    limits = tiny.tiny_config("collapse.patience_steps=3").collapse
    uniform = np.log(64)
    good = {
        "loss": 4.0,
        "teacher_entropy/self/a": 0.5 * uniform,
        "mean_teacher_entropy/self/a": 0.9 * uniform,
        "embedding_std/a": 0.5,
    }
    for name, bad in (
        ("teacher_entropy/self/a", 0.9999 * uniform),
        ("mean_teacher_entropy/self/a", 0.001),
        ("embedding_std/a", 0.001),
    ):
        watch = monitor.CollapseWatch(limits, 64)
        for step, value in enumerate((good[name], bad, bad, good[name], bad, bad)):
            watch.check(step, good | {name: value})
        with pytest.raises(monitor.TrainingStopped, match=f"step 6: collapsed; {name}"):
            watch.check(6, good | {name: bad})
    for name in ("loss", "loss/self/a", "gradient_norm"):
        with pytest.raises(monitor.TrainingStopped, match=f"step 1: {name} is inf"):
            monitor.CollapseWatch(limits, 64).check(1, good | {name: np.inf})


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 8 MB."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("needs the right to mount a small file system")
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("cannot mount a small file system here")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


def test_a_full_disk_is_named_and_costs_no_checkpoint(small_disk, reference):
    """The disk fills up after step 4; with space again, the same command ends as the run that had enough."""
    workdir = small_disk / "run"
    status, text = tiny.train_here(workdir, "--stop-at-step=4")
    assert status == 0, text
    with open(small_disk / "ballast", "wb", buffering=0) as ballast, contextlib.suppress(OSError):
        while ballast.write(bytes(4096)):
            pass
    status, text = tiny.train_here(workdir)
    assert status == 2 and "memo-jax: error: " in text and "No space left on device" in text and str(workdir) in text
    assert saved_steps(workdir) == [4] and arrays(workdir)
    (small_disk / "ballast").unlink()
    status, text = tiny.train_here(workdir)
    assert status == 0, text
    assert_same_state(workdir, reference, 12)
    assert [row["step"] for row in read_metrics(workdir)] == list(range(1, 13))


def test_a_workdir_that_cannot_be_written_is_named(small_disk, tmp_path):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    status, text = tiny.train_here(small_disk / "run")
    assert status == 2 and "memo-jax: error: " in text and "Read-only file system" in text and str(small_disk) in text
    (tmp_path / "file").write_text("")
    status, text = tiny.train_here(tmp_path / "file")
    assert status == 2 and f"{tmp_path / 'file'}" in text


def test_damaged_remains_of_a_run_are_named(reference, tmp_path):
    """A checkpoint cut short, a config cut short, and a broken line of metrics."""
    for number, damage in enumerate(("checkpoints", "config.json", "metrics.jsonl")):
        workdir = shutil.copytree(reference, tmp_path / str(number))
        if damage == "checkpoints":
            data = max((workdir / damage / "12").rglob("*"), key=lambda path: path.stat().st_size)
            data.write_bytes(data.read_bytes()[:100])
            named = f"{workdir / damage / '12'}: the checkpoint is damaged or cut short"
        else:
            text = (workdir / damage).read_text()
            (workdir / damage).write_text(text[: len(text) // 2] + "\n" + text[len(text) // 2 :])
            if damage == "config.json":
                (workdir / damage).write_text(text[: len(text) // 2])
            named = str(workdir / damage)
        status, text = tiny.train_here(workdir)
        assert status == 2 and named in text, text


def test_what_a_run_reports_is_what_it_used(reference):
    """The rows tell the schedules, and the config beside the checkpoints is the one that was typed."""
    rows = read_metrics(reference)
    config = read_config(reference)
    recipe = build_recipe(config, tiny.STEPS_PER_EPOCH)
    for row in rows:
        for name, schedule in (("lr", recipe.schedules.learning_rate), ("momentum", recipe.schedules.momentum)):
            assert row[name] == pytest.approx(float(schedule(row["step"] - 1)), rel=1e-5)
    assert json.loads((reference / "config.json").read_text())["data"]["train"] == str(tiny.material().dataset)
