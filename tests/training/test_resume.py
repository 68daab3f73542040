"""A run that is killed, stopped, starved of disk or started again ends as if nothing had happened."""

import contextlib
import shutil
import signal
import subprocess
import sys
import types

import pytest

import tiny
from memo_jax.config import read_config
from memo_jax.log import MetricsLog, read_metrics
from memo_jax.training import program
from memo_jax.training import train as training
from memo_jax.training.recipe import build_recipe
from memo_jax.training.run_record import read_run
from memo_jax.training.saved_checkpoint import saved_steps
from runs import KILLED, arrays, assert_same_state, files, rows_without_times

# orbax leaves futures of a failed operation behind, which complain of a closed event loop when they end.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.usefixtures("compiled_once"),
]


@pytest.fixture(scope="module")
def reference():
    return tiny.whole_run()


def test_a_run_killed_again_and_again_ends_as_if_it_had_not_been(reference, tmp_path):
    """SIGKILL in the middle of the first save, in the middle of a row of metrics between two checkpoints, and during
    the last save; each time the same command resumes. In the end checkpoints and rows are those of the uninterrupted
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


def test_a_run_stopped_on_purpose_resumes_exactly(reference, tmp_path):
    """At a step without a checkpoint: one is made there. The schedules still span the whole run."""
    assert tiny.train_here(tmp_path, "--stop-at-step=9")[0] == 0
    assert saved_steps(tmp_path)[-1] == 9
    status, text = tiny.train_here(tmp_path)
    assert status == 0 and "resumed after step 9" in text
    assert_same_state(tmp_path, reference, 12)


def test_a_run_killed_before_its_first_checkpoint_logs_the_untrained_network_once(tmp_path, monkeypatch):
    lowered_step = program.lowered_step

    def of_one_step(*arguments):
        programs = [lowered_step(*arguments).compile()]

        def step(*arguments):
            if not programs:
                raise KeyboardInterrupt
            return programs.pop()(*arguments)

        return types.SimpleNamespace(compile=lambda: step)

    monkeypatch.setattr(program, "lowered_step", of_one_step)
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


def test_a_finished_run_is_extended_and_its_schedules_span_the_new_length(reference, tmp_path, monkeypatch):
    """Nothing earlier changes, what follows is bit-identical as ever, and the run says that it is a different one."""
    straight, stopped = (shutil.copytree(reference, tmp_path / name) for name in ("straight", "stopped"))
    status, text = tiny.train_here(straight, "total_steps=15")
    assert status == 0 and "extended from 12 to 15 steps: the schedules span the new length from step 13 on" in text
    rows = rows_without_times(straight)
    assert rows[:12] == rows_without_times(reference) and [row["step"] for row in rows] == list(range(1, 16))
    config = tiny.tiny_config("total_steps=15")
    schedules = build_recipe(config, tiny.STEPS_PER_EPOCH).schedules
    for row in rows[12:]:
        assert row["lr"] == pytest.approx(float(schedules.learning_rate(row["step"] - 1)), rel=1e-5)
        assert row["momentum"] == pytest.approx(float(schedules.momentum(row["step"] - 1)))
    assert rows[12]["lr"] > rows[11]["lr"]  # back up, on the longer cosine

    assert tiny.train_here(stopped, "total_steps=15", "--stop-at-step=13")[0] == 0
    status, text = tiny.train_here(stopped, "total_epochs=3", "total_steps=-1")  # the same length
    assert status == 0 and "resumed after step 13" in text and "extended" not in text
    assert_same_state(stopped, straight, 15)
    assert rows_without_times(stopped) == rows
    starts = read_run(stopped)["starts"]
    assert [start["total_steps"] for start in starts] == [12, 15, 15]
    assert [start.get("extended_from") for start in starts] == [None, 12, None]

    # A start that ended before its first checkpoint has extended nothing: the length may be what it was.
    def interrupt(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training, "take_step", interrupt)
        assert tiny.train_here(straight, "total_steps=20")[0] == 130
    status, text = tiny.train_here(straight, "total_steps=15")
    assert status == 0 and "nothing to do: " in text and "extended" not in text

    status, text = tiny.train_here(straight, "total_steps=14")
    assert status == 2 and "is a run of 15 steps and cannot become one of 14" in text and "--stop-at-step 14" in text
    status, text = tiny.here("reproduce", straight)
    assert status == 2 and "was extended from 12 to 15 steps before step 13" in text


def test_a_workdir_belongs_to_its_config(reference, tmp_path):
    workdir = shutil.copytree(reference, tmp_path / "run")
    before = files(workdir)
    status, text = tiny.train_here(workdir, "optimizer.learning_rate=0.1", "data.batch_size=5")
    assert status == 2 and "optimizer.learning_rate: 0.2 → 0.1" in text and "data.batch_size: 4 → 5" in text
    assert "another workdir" in text and files(workdir) == before
    # Settings that only monitor or save may change.
    status, text = tiny.train_here(workdir, "log_every_steps=3", "checkpoint.keep=1", "collapse.patience_steps=9")
    assert status == 0, text
    assert read_config(workdir).log_every_steps == 3


def test_a_changed_config_is_refused_before_banks_are_loaded(reference, tmp_path, monkeypatch):
    workdir = shutil.copytree(reference, tmp_path / "run")
    monkeypatch.setattr(training, "load_augmentation_banks", lambda config: pytest.fail("the banks are loaded"))
    status, text = tiny.train_here(workdir, "optimizer.learning_rate=0.1", f"augment.noise={tmp_path}")
    assert status == 2 and "optimizer.learning_rate: 0.2 → 0.1" in text


def test_a_second_run_in_a_workdir_is_refused_and_the_first_ends_undisturbed(reference, tmp_path, monkeypatch):
    """A second one starts while the first saves its first checkpoint, and another while it is between two."""
    workdir, write, refused = tmp_path / "run", MetricsLog.write, []

    def write_and_start_another(self, number, values):
        if number in (5, 6):
            refused.append(tiny.train_here(workdir))
        write(self, number, values)

    monkeypatch.setattr(MetricsLog, "write", write_and_start_another)
    status, text = tiny.train_here(workdir)
    assert status == 0, text
    assert len(refused) == 2
    for status, text in refused:
        assert status == 2 and f"{workdir} is in use by process " in text and text.count("\n") == 1
    assert_same_state(workdir, reference, 12)
    assert rows_without_times(workdir) == rows_without_times(reference)


def test_a_workdir_belongs_to_its_data(reference, tmp_path):
    """The same dataset elsewhere will do; a different one will not, wherever it is."""
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


def test_a_workdir_belongs_to_its_banks(tmp_path, monkeypatch):
    """A folder of noise in which a recording has changed since the run began is named, and nothing is trained."""
    noise = tmp_path / "noise"
    shutil.copytree(tiny.material().corpus / "s0", noise)
    workdir, settings = tmp_path / "run", (f"augment.noise={noise}", "augment.bank_seconds=1.0")
    compared, check_agreement = set(), training.processes.check_agreement
    with monkeypatch.context() as patch:
        patch.setattr(
            training.processes, "check_agreement", lambda texts: compared.update(texts) or check_agreement(texts)
        )
        assert tiny.train_here(workdir, *settings, "--stop-at-step=1")[0] == 0
    assert "the bank of noise" in compared, "by all processes, which must have the same"
    shutil.copy(tiny.material().corpus / "s1" / "0.wav", noise / "0.wav")
    before = files(workdir)
    status, text = tiny.train_here(workdir, *settings)
    assert status == 2 and f"augment.noise: the recordings there are not those that {workdir} was trained" in text
    assert files(workdir) == before


def test_a_full_disk_is_named_and_costs_no_checkpoint(small_disk, reference):
    """The disk fills up after step 4; with space again, the same command ends like the run that had enough."""
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
