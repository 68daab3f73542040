"""Metrics and progress: each step once, whatever is killed; nothing heavy imported."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from memo_jax import log
from memo_jax.log import MetricsLog, Progress, progress, read_metrics


class Console(io.StringIO):
    """A console that is or is not a terminal."""

    def __init__(self, tty):
        super().__init__()
        self.isatty = lambda: tty


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test advances by hand: clock["now"] += seconds."""
    now = {"now": 100.0}
    monkeypatch.setattr(log.time, "monotonic", lambda: now["now"])
    return now


def rows_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def tensorboard_scalars(workdir):
    """{tag: {step: value}} as readers see it: a start event hides that step and later ones in earlier files."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    found = {}
    for file in sorted((workdir / "tensorboard").iterdir()):
        content, position = file.read_bytes(), 0
        while position < len(content):
            length = int.from_bytes(content[position : position + 8], "little")
            event = Event.FromString(content[position + 12 : position + 12 + length])
            position += length + 16
            if event.session_log.status == SessionLog.START:
                found = {
                    tag: {step: value for step, value in values.items() if step < event.step}
                    for tag, values in found.items()
                }
            for value in event.summary.value:
                found.setdefault(value.tag, {})[event.step] = value.simple_value
    return found


def test_rows_are_plain_json_at_once(tmp_path):
    jnp = pytest.importorskip("jax.numpy")
    metrics = MetricsLog(tmp_path / "new" / "run")
    metrics.write(
        1,
        {
            "loss": jnp.float32(0.5),
            "gate/open": np.bool_(True),
            "epoch": 0.25,
            "count": np.int64(3),
            "lr": np.array(0.1),
        },
    )
    assert rows_of(tmp_path / "new" / "run") == [
        {"step": 1, "loss": 0.5, "gate/open": True, "epoch": 0.25, "count": 3, "lr": 0.1}
    ]
    metrics.close()


def test_nan_and_infinity_are_null(tmp_path):
    """NaN is not JSON: one such value would make the file unreadable to other tools."""
    with MetricsLog(tmp_path) as metrics:
        metrics.write(1, {"loss": float("nan"), "kl": np.float32("inf"), "lr": 1.0})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=lambda name: pytest.fail(name)) == {
        "step": 1,
        "loss": None,
        "kl": None,
        "lr": 1.0,
    }


def test_resumed_run_has_every_step_once(tmp_path):
    """Killed at step 7 with a checkpoint of step 4, a run writes 5, 6, 7 again: the file must not show it."""
    with MetricsLog(tmp_path) as metrics:
        for step in range(1, 8):
            metrics.write(step, {"loss": 10.0 + step})
    with MetricsLog(tmp_path) as metrics:
        metrics.truncate_after(4)
        for step in range(5, 10):
            metrics.write(step, {"loss": float(step)})
    expected = {step: step + 10.0 if step <= 4 else float(step) for step in range(1, 10)}
    assert [(row["step"], row["loss"]) for row in rows_of(tmp_path)] == list(expected.items())
    assert read_metrics(tmp_path) == rows_of(tmp_path)
    assert tensorboard_scalars(tmp_path) == {"loss": expected}
    assert sorted(os.listdir(tmp_path)) == ["metrics.jsonl", "tensorboard"]


def test_half_written_last_line_is_dropped(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 2.0}]
    with MetricsLog(tmp_path) as metrics:
        metrics.write(2, {"loss": 3.0})
    assert rows_of(tmp_path) == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 3.0}]


@pytest.mark.parametrize(
    "line",
    ["rubbish", "[1, 2]", '{"loss": 1}', '{"step": null}', "3"]
    + ['{"step": Infinity}', '{"step": -1}', '{"step": 1e300}', "[" * 100_000],
)
def test_foreign_line_is_named(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n' + line + "\n")
    with pytest.raises(ValueError, match="metrics.jsonl, line 2"):
        MetricsLog(tmp_path).truncate_after(1)
    with pytest.raises(ValueError, match="metrics.jsonl, line 2"):
        read_metrics(tmp_path)


def test_missing_metrics_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        read_metrics(tmp_path)


def test_failed_write_names_the_file(tmp_path):
    """A limit on the size of files stands in for a full disk. The torn line it leaves is gone after the next start."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    metrics = MetricsLog(tmp_path)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(OSError, match="cannot write metrics.*metrics.jsonl"):
            for step in range(100):
                metrics.write(step, {"loss": 1.0})
        with pytest.raises(OSError, match="metrics.jsonl"):
            metrics.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    MetricsLog(tmp_path).close()
    rows = rows_of(tmp_path)
    assert rows and rows == [{"step": step, "loss": 1.0} for step in range(len(rows))]


def test_inactive_log_writes_nothing(tmp_path):
    with MetricsLog(tmp_path / "run", active=False) as metrics:
        metrics.truncate_after(0)
        metrics.write(1, {"loss": 1.0})
    assert list(tmp_path.iterdir()) == []


def test_no_heavy_import(tmp_path):
    code = (
        "import sys; from memo_jax.log import MetricsLog; log = MetricsLog(sys.argv[1]); "
        "assert 'tensorboardX' not in sys.modules; "
        "log.write(1, {'loss': 1.0}); assert not {'jax', 'tensorflow', 'torch'} & sys.modules.keys()"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, tmp_path], capture_output=True, text=True, cwd=Path(__file__).parents[1]
    )
    assert result.returncode == 0, result.stderr


def test_plain_progress_gives_rate_and_time_left(monkeypatch, clock):
    """50 units in 100 s, a line every ten seconds; 5 resumed units count as done but not in the rate."""
    console = Console(tty=False)
    monkeypatch.setattr(sys, "stderr", console)
    shown = Progress(total=65, label="train", unit="step", initial=5)
    for _ in range(50):
        clock["now"] += 2.0
        shown.update(loss=np.float32(1.23456))
    lines = console.getvalue().splitlines()
    assert len(lines) == 10
    assert lines[0] == "train: 10/65 step (15.4%), 2 s/step, 0:01:50 left, 0:00:10 elapsed, loss 1.235"
    assert "55/65" in lines[-1] and "0:00:20 left" in lines[-1]
    shown.write("eer 5.0")
    shown.close()
    shown.close()
    assert console.getvalue().splitlines()[10:] == ["eer 5.0"]


def test_rate_leaves_out_a_slow_start(monkeypatch, clock):
    """The first step compiles and an evaluation precedes the second; only later steps predict the time left."""
    console = Console(tty=False)
    monkeypatch.setattr(sys, "stderr", console)
    shown = Progress(total=101, unit="step")
    for seconds in [60, 20] + [1] * 10:
        clock["now"] += seconds
        shown.update()
    first, second, third = console.getvalue().splitlines()
    assert first == "1/101 step (1.0%), 0:01:00 elapsed"
    assert second == "2/101 step (2.0%), 0:01:20 elapsed"
    assert "0:01:29 left" in third


def test_progress_yields_everything_and_ends_with_a_line(monkeypatch, clock):
    console = Console(tty=False)
    monkeypatch.setattr(sys, "stderr", console)
    assert list(progress([3, 1, 2], label="files", unit="file")) == [3, 1, 2]
    assert "files: 3/3 file (100.0%)" in console.getvalue()
    assert list(progress(iter("ab"))) == ["a", "b"]
    assert list(progress([], label="none")) == []


def test_bar_on_a_terminal(monkeypatch):
    console = Console(tty=True)
    monkeypatch.setattr(sys, "stderr", console)
    with Progress(total=4, label="train", initial=1) as shown:
        shown.update(loss=0.5)
        shown.write("a line of text")
        shown.update(2)
    last = console.getvalue().split("\r")[-1]
    assert "train: 100%" in last and "4/4" in last and "loss=0.5" in last
    assert "a line of text\n" in console.getvalue()


def test_inactive_progress_prints_nothing(monkeypatch, clock):
    for tty in (True, False):
        console = Console(tty)
        monkeypatch.setattr(sys, "stderr", console)
        assert list(progress(range(3), active=False)) == [0, 1, 2]
        with Progress(total=3, active=False) as shown:
            clock["now"] += 100
            shown.update()
            shown.write("text")
        assert console.getvalue() == ""
