"""When a run must stop: numbers that are not finite, and collapse."""

import numpy as np
import pytest

import tiny
from memo_jax.log import read_metrics
from memo_jax.training import monitor
from memo_jax.training.gate import GateRule, initial_gate
from memo_jax.training.saved_checkpoint import saved_steps
from memo_jax.training.state import TrainState
from runs import arrays

pytestmark = pytest.mark.usefixtures("compiled_once")


def test_numbers_that_are_not_finite_stop_the_run_and_are_never_saved(tmp_path):
    """Plain DINO at a learning rate of 1e30. Its first row is like any other's; the gate is not mentioned."""
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
            monitor.check_finite_state(7, state)
        else:
            with pytest.raises(monitor.TrainingStopped, match="step 7: .*not finite.*learning_rate"):
                monitor.check_finite_state(7, state)


def test_a_collapse_stops_the_run_and_says_what_to_try(tmp_path):
    status, text = tiny.train_here(tmp_path, "collapse.min_embedding_std=1.5", "collapse.patience_steps=2")
    assert status == 3 and "step 2: collapsed; embedding_std/resnet is 0." in text and "for 2 steps" in text
    assert "lower optimizer.learning_rate" in text
    assert saved_steps(tmp_path) == []


def test_a_resumed_run_goes_on_counting(tmp_path):
    """Else a run that is interrupted often enough would never be stopped."""
    settings = ("collapse.min_embedding_std=1.5", "collapse.patience_steps=4")
    assert tiny.train_here(tmp_path, *settings, "--stop-at-step=2")[0] == 0
    status, text = tiny.train_here(tmp_path, *settings)
    assert status == 3 and "step 4: collapsed" in text and "for 4 steps" in text, text


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
    watch = monitor.CollapseWatch(limits, 64, "sinkhorn", {"teacher_entropy/self/a": 2})  # as a resumed run
    with pytest.raises(monitor.TrainingStopped, match="lower teacher.temp$"):
        watch.check(6, good | {"teacher_entropy/self/a": 0.9999 * uniform})
    for name in ("loss", "loss/self/a", "gradient_norm"):
        with pytest.raises(monitor.TrainingStopped, match=f"step 1: {name} is inf"):
            monitor.CollapseWatch(limits, 64).check(1, good | {name: np.inf})
