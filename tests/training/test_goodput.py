"""Where the wall time of training goes."""

from types import SimpleNamespace

import pytest

import tiny
import tiny_processes
from memo_jax.log import read_metrics
from memo_jax.training import goodput
from memo_jax.training.monitor import TIMES


@pytest.fixture
def clock(monkeypatch):
    """A clock that is set by hand."""
    now = SimpleNamespace(time=100.0)
    monkeypatch.setattr(goodput.time, "perf_counter", lambda: now.time)
    return now


def results(ready):
    return {"loss": SimpleNamespace(is_ready=lambda: ready)}


def test_time_that_nothing_else_counts_goes_to_the_steps(clock):
    counted = goodput.Goodput()
    clock.time += 10
    counted.end_start()
    for part, seconds in {"compile": 30, "evaluation": 4, "checkpoint": 5, "positives": 2}.items():
        with counted.counting(part):
            clock.time += seconds
    clock.time += 49
    assert counted.shares() == pytest.approx(
        {
            "steps": 0.49,
            "start": 0.1,
            "compile": 0.3,
            "input": 0,
            "checkpoint": 0.05,
            "evaluation": 0.04,
            "positives": 0.02,
        }
    )
    assert str(counted) == (
        "wall time: 49.0 % steps, 10.0 % start, 30.0 % compile, 5.0 % checkpoint, 4.0 % evaluation, 2.0 % positives"
    )


def test_only_batches_that_the_devices_have_waited_for_count_as_stalls(clock):
    counted = goodput.Goodput()
    for running in (None, results(True), results(False)):
        with counted.waiting_for_input(running):
            clock.time += 2
    clock.time += 4
    assert counted.shares()["input"] == pytest.approx(0.4)
    assert counted.row()["input_seconds"] == 4.0
    assert counted.row()["input_seconds"] == 0.0, "since the row before"


def test_a_checkpoint_that_fails_counts_too(clock):
    counted = goodput.Goodput()
    assert "checkpoint_seconds" not in counted.row()
    with pytest.raises(OSError), counted.counting("checkpoint"):
        clock.time += 3
        raise OSError
    assert counted.row()["checkpoint_seconds"] == 3.0


def test_every_row_of_a_run_has_its_shares(tmp_path, monkeypatch):
    tiny_processes.patch_for_tests(monkeypatch.setattr)
    status, text = tiny.here(*tiny_processes.command(tmp_path))
    assert status == 0 and "\nwall time: " in text
    rows = read_metrics(tmp_path)
    for row in rows:
        assert sum(value for name, value in row.items() if name.startswith("goodput/")) == pytest.approx(1)
        assert all(name in TIMES for name in row if name.startswith(("goodput", "input", "checkpoint")))
    assert rows[0]["goodput/compile"] > 0 and rows[-1]["checkpoint_seconds"] > 0
    assert "checkpoint_seconds" not in rows[0]
