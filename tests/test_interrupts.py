"""Ctrl-C ends every command at any moment, is remembered where an exception is lost, and at once when repeated."""

import itertools
import signal
import subprocess
import sys
import time

import pytest

import tiny
from memo_jax import interrupts


def test_a_request_lost_in_a_callback_is_raised_at_the_next_stage(capfd):
    """As in JAX's callback for the garbage collector: the exception is ignored, and nothing printed."""

    class Lost:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt), interrupts.handled():
        interrupts.check()
        Lost()
        assert interrupts.requested()
        interrupts.check()
    assert interrupts.requested() and capfd.readouterr().err == ""
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with interrupts.handled():
        interrupts.check()


def test_a_request_is_raised_at_once_where_it_can_be():
    with pytest.raises(KeyboardInterrupt), interrupts.handled():
        signal.raise_signal(signal.SIGINT)
        pytest.fail("not reached")


SLOW = """
import hashlib, sys, time
from memo_jax import interrupts
with interrupts.handled():
    print("ready", flush=True)
    try:
        time.sleep(60)
    finally:
        if sys.argv[1] == "python":
            sum(iter(lambda: 1, 2))  # without end
        hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # minutes in C, as a compiler takes
"""


@pytest.mark.parametrize("code", ["python", "C"])
def test_a_second_request_ends_the_process_whatever_it_does(code):
    command = [sys.executable, "-c", SLOW, code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=tiny.environment()) as process:
        assert process.stdout.readline() == b"ready\n"
        for _ in range(2):
            time.sleep(0.3)
            assert process.poll() is None
            process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130


def test_an_import_is_not_interrupted_but_the_line_after_it_is(tmp_path, monkeypatch):
    """Also where one import is within another, and where no stage would check for a request."""
    (tmp_path / "imports_another.py").write_text("import asks_for_the_end\nwhole = True\n")
    (tmp_path / "asks_for_the_end.py").write_text("import signal\nsignal.raise_signal(signal.SIGINT)\nwhole = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    reached = False
    with interrupts.handled(), pytest.raises(KeyboardInterrupt):
        import imports_another  # noqa: F401

        reached = True
    assert not reached and sys.gettrace() is None
    assert sys.modules["imports_another"].whole and sys.modules["asks_for_the_end"].whole


def test_where_it_is_ignored_it_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interrupts.handled():
            signal.raise_signal(signal.SIGINT)
            interrupts.check()
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("seconds", [0.5, 4])
def test_a_request_early_in_training_ends_it(seconds, tmp_path):
    """While modules are imported, data are read, the step compiles, or the first steps run."""
    command = [sys.executable, "-m", "memo_jax", *tiny.train_arguments(tmp_path / "run", "total_steps=100000")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=tiny.environment()) as process:
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=60)[1]
        # Before the command has begun, Python itself ends; a shell reports that as 130, too.
        assert process.returncode in (interrupts.INTERRUPTED, -signal.SIGINT), said
    if process.returncode == interrupts.INTERRUPTED:  # a library in C that was being imported may say more before
        assert said.splitlines()[-1] == "memo-jax: interrupted"


COMMANDS = {
    "prepare": "--input {corpus} --workers 1 --output out/set",
    "prepare --check": "{dataset} --workers 1",
    "train": "--config {config} --workdir out/run --config.data.train={dataset} --config.model.branches=resnet",
    "embed": "{corpus} --model {model} --output out/e.npz",
    "verify": "{corpus}/s0/0.wav {corpus}/s0/1.wav --model {model}",
    "enroll": "Ada {corpus}/s0/0.wav --model {model} --gallery out/people.npz",
    "eval": "--model {model} --data {dataset} --trials {trials} --output out/ev",
    "score": "--embeddings {embeddings} --trials {trials} --scores out/scores.txt",
    "export": "--model {model} --output out/m.safetensors",
    "convert": "{model} --to wespeaker --output out/m.safetensors",
    "report": "{run} --data {dataset} --trials {trials} --output out/report.html",
}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    embeddings, material = tmp_path_factory.mktemp("interrupted") / "e.npz", tiny.material()
    status, text = tiny.here("embed", material.corpus, "--model", tiny.model_file(), "--output", embeddings)
    assert status == 0, text
    return material._asdict() | {"model": tiny.model_file(), "run": tiny.whole_run(), "embeddings": embeddings}


@pytest.mark.parametrize("calls", [100, 3000])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_request_at_any_moment_ends_a_command_which_leaves_nothing(command, calls, places, tmp_path, monkeypatch):
    """At the call of a function, one of the command's first: the arguments, the model, the first data."""
    count = itertools.count()

    def interrupt(frame, event, argument):
        if event == "call" and next(count) == calls:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.chdir(tmp_path)
    line = f"{command} {COMMANDS[command]}".format(**places).split()
    sys.setprofile(interrupt)
    try:
        status, text = tiny.here(*line)
    finally:
        sys.setprofile(None)
    assert next(count) > calls and status == interrupts.INTERRUPTED, text
    assert text.splitlines()[-1] == "memo-jax: interrupted" and "Traceback" not in text
    assert [path for path in tmp_path.rglob("*") if path.is_file() and ".set.partial" not in str(path)] == []
