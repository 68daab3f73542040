"""Training in several real processes over gloo: as in one process, stopped, killed, and resumed in other numbers.

All runs train a one-layer network with an equally small front end, since the tests are about what surrounds them;
`test_sharding.py` has the real ones on several devices.
"""

import importlib.util
import os
import shutil
import signal
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import tiny
from memo_jax.log import read_metrics
from memo_jax.training import processes, saved_checkpoint
from memo_jax.training.checkpoint import load_state
from memo_jax.training.saved_checkpoint import saved_steps
from tiny_processes import GONE, KILLED_AT, SAVED, STEPS, command, patch_for_tests, start

pytestmark = pytest.mark.usefixtures("compiled_once")

STOPPED_SECONDS = float(os.environ.get("MEMO_JAX_STOPPED_SECONDS", "3"))  # 60 shows more
INPUT_SECONDS = 0.2


def losses(workdir):
    rows = read_metrics(workdir)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1)), "each step once, in order: one process writes"
    return np.array([row["loss"] for row in rows])


def assert_same_losses(one, other):
    """Float32 noise, which training amplifies; a different crop makes 1e-2 at once.

    At the first step 3e-6: processes sum in a different order, which moves an embedding by a few roundings of 1.2e-7,
    and NT-Xent, most of this loss, divides by a temperature of 0.1.
    """
    one, other = losses(one), losses(other)
    np.testing.assert_allclose(one[0], other[0], rtol=3e-6)
    np.testing.assert_allclose(one, other, rtol=2e-4)


def state(workdir, step):
    return {
        jax.tree_util.keystr(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(load_state(workdir, step))
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same run by one process, and by four, one of which is suspended while another has a slow input; a run of four
    of which one is sent SIGTERM; and the last one resumed, before a run whose first process is killed."""
    folder = tmp_path_factory.mktemp("processes")
    with pytest.MonkeyPatch.context() as patch:
        patch_for_tests(patch.setattr, record=folder / "alone.npy")
        status, text = tiny.here(*command(folder / "alone"))
    assert status == 0, text
    four = start(
        4,
        command(folder / "four"),
        command(folder / "stopped"),
        signals=[(signal.SIGSTOP, 1, 6, 0), (signal.SIGTERM, 1, 5, 1)],
        stopped_seconds=STOPPED_SECONDS,
        input_seconds=INPUT_SECONDS,
        record=folder / "four",
    )
    stopped_at = saved_steps(folder / "stopped")[-1]
    shutil.copytree(folder / "stopped", folder / "resumed")
    cut = start(4, command(folder / "resumed"), command(folder / "cut"), signals=[(signal.SIGKILL, 0, KILLED_AT)])
    return SimpleNamespace(folder=folder, four=four, stopped_at=stopped_at, cut=cut)


def test_four_processes_train_as_one_does(runs):
    """The losses are those of one process, to float32 noise; so are the batches, of which each reads its quarter. Only
    one process prints."""
    assert [one.status for one in runs.four] == [75] * 4, runs.four
    assert_same_losses(runs.folder / "four", runs.folder / "alone")
    alone = np.load(runs.folder / "alone.npy")
    quarters = [np.load(runs.folder / f"four{index}.npy")[:STEPS] for index in range(4)]
    np.testing.assert_array_equal(np.concatenate(quarters, axis=1), alone)
    assert (
        len(np.unique(alone[: tiny.STEPS_PER_EPOCH].reshape(-1, alone.shape[-1]), axis=0))
        == 2 * tiny.SPEAKERS * tiny.UTTERANCES
    ), "each utterance once in an epoch"
    first, *others = (one.text for one in runs.four)
    assert "on 4 cpu devices of 4 processes" in first and "training: 12/12 step" in first
    assert not [text for text in others if "training" in text or "utterances" in text]


def test_a_suspended_and_a_slow_process_are_waited_for(runs):
    """As when a machine is moved to another host, and when a disk is slow."""
    seconds = {row["step"]: row["seconds_per_step"] for row in read_metrics(runs.folder / "four")}
    assert sum(seconds[step] for step in (6, 7, 8)) > STOPPED_SECONDS
    # Two batches are read ahead, so the slower input shows only once those read during the stop are used up.
    assert sum(seconds[step] for step in (10, 11, 12)) > 2 * INPUT_SECONDS, seconds


def test_sigterm_to_one_process_stops_all_at_one_step_with_a_checkpoint(runs):
    """All say at which step and end with a status of its own; resumed, the run ends as if it had not been stopped, bit
    for bit."""
    assert 5 <= runs.stopped_at < STEPS
    for one in runs.four:
        assert f"SIGTERM: stopped after step {runs.stopped_at}, which is saved" in one.text
    assert f"resumed after step {runs.stopped_at}" in runs.cut[0].text
    whole, resumed = (state(runs.folder / name, STEPS) for name in ("four", "resumed"))
    assert whole.keys() == resumed.keys() and len(whole) > 20
    for name, value in whole.items():
        np.testing.assert_array_equal(value, resumed[name], err_msg=name, strict=True)
    np.testing.assert_array_equal(losses(runs.folder / "resumed"), losses(runs.folder / "four"))


def assert_ended_with(killed, others):
    """All end within a minute of the one that was killed, with a status of its own, and say why."""
    assert killed.status == -9, killed
    assert all(one.status in GONE for one in others), others
    assert any("another process is lost, so this one ends too" in one.text for one in others) or all(
        "another task died" in one.text for one in others
    ), others
    assert max(one.at for one in others) - killed.at < 60


def test_the_end_of_the_first_process_which_coordinates_ends_all(runs):
    first, *others = runs.cut
    assert_ended_with(first, others)
    assert saved_steps(runs.folder / "cut")[-1] in (4, SAVED)  # it may have been killed while it wrote the second


def test_another_number_of_processes_resumes_and_a_killed_one_ends_all(runs):
    """Four resume the run of one. SIGKILL of one of them ends the others. One process resumes from the last checkpoint,
    and the losses are those of one that did it all."""
    workdir = shutil.copytree(runs.folder / "alone", runs.folder / "killed")
    shutil.rmtree(workdir / "checkpoints" / str(STEPS))
    (workdir / "checkpoints" / f"{STEPS}.orbax-checkpoint-tmp").mkdir()  # half-written, never to be chosen
    results = start(4, command(workdir), signals=[(signal.SIGKILL, 2, KILLED_AT)])
    assert_ended_with(results[2], results[:2] + results[3:])
    assert f"resumed after step {SAVED}" in results[0].text
    assert saved_steps(workdir)[-1] == SAVED
    with pytest.MonkeyPatch.context() as patch:
        patch_for_tests(patch.setattr)
        status, text = tiny.here(*command(workdir))
    assert status == 0 and f"resumed after step {SAVED}" in text
    assert_same_losses(workdir, runs.folder / "alone")


def test_sigterm_to_a_process_that_trains_alone_saves_and_ends_it(runs, monkeypatch):
    """With the same status, and resumed as exactly; the previous signal handler is restored."""
    patch_for_tests(monkeypatch.setattr)
    reached, before = processes.StopRequest.reached, signal.getsignal(signal.SIGTERM)

    def with_signal(self, step):
        if step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return reached(self, step)

    workdir = runs.folder / "alone-stopped"
    with monkeypatch.context() as patch:
        patch.setattr(processes.StopRequest, "reached", with_signal)
        status, text = tiny.here(*command(workdir))
    assert status == 75 and "SIGTERM: stopped after step 5, which is saved" in text
    assert saved_steps(workdir)[-1] == 5 and signal.getsignal(signal.SIGTERM) is before
    status, text = tiny.here(*command(workdir))
    assert status == 0 and "resumed after step 5" in text
    whole, resumed = state(runs.folder / "alone", STEPS), state(workdir, STEPS)
    for name, value in whole.items():
        np.testing.assert_array_equal(value, resumed[name], err_msg=name, strict=True)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--coordinator=localhost:1234", "--num-processes=2", "--process-id=2"], "--process-id is 2: must be 0 to 1"),
        (
            ["--coordinator=localhost", "--num-processes=2", "--process-id=1"],
            "give host and port, such as 10.0.0.1:1234",
        ),
    ],
)
def test_impossible_process_numbers_and_coordinators_are_refused(flags, message, tmp_path):
    status, text = tiny.here(*command(tmp_path / "run"), *flags)
    assert status == 2 and message in text and not (tmp_path / "run").exists()


def test_without_a_cluster_the_flags_that_are_missing_are_named(tmp_path):
    done = tiny.memo_jax(*command(tmp_path / "run", "--distributed"), "--num-processes=2")
    assert done.returncode == 2 and "give --coordinator, --process-id" in done.stderr
    assert not (tmp_path / "run").exists()


def test_what_differs_between_processes_is_named_in_all(monkeypatch):
    """Two processes with the same config and different banks."""
    from jax.experimental import multihost_utils

    def gathered(mine):
        theirs = mine.copy()
        theirs[1] += 1
        return np.stack([mine, theirs])

    monkeypatch.setattr(processes.jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "process_allgather", gathered)
    with pytest.raises(ValueError, match="the bank of noise differs between processes 0 and 1: "):
        processes.check_agreement({"the config": "{}", "the bank of noise": "17"})
    monkeypatch.setattr(multihost_utils, "process_allgather", lambda mine: np.stack([mine, mine]))
    processes.check_agreement({"the config": "{}", "the bank of noise": "17"})


def test_a_jax_without_what_several_processes_need_trains_in_one(monkeypatch):
    """Both modules are imported anew, as when a command starts."""
    monkeypatch.setitem(sys.modules, "jax.experimental.multihost_utils", None)
    monkeypatch.delattr("jax.experimental.multihost_utils")
    for module in (processes, saved_checkpoint):
        spec = importlib.util.spec_from_file_location("alone", module.__file__)
        alone = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(alone)
    assert processes.on_first_process(lambda: 3) == 3
    assert processes.broadcast_from_first(np.arange(2)).tolist() == [0, 1]
    processes.check_agreement({"the config": "{}"})
    with processes.StopRequest() as stop:
        assert not stop.reached(1)
    with pytest.raises(ImportError, match=f"needs jax.experimental.multihost_utils, which jax {jax.__version__} does"):
        processes.join("localhost:1234", 2, 0)
