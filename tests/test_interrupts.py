"""Ctrl-C: remembered where an exception is lost, and the end at the second."""

import signal
import subprocess
import sys
import time

import pytest

import tiny
from memo_jax import interrupts


def test_a_request_lost_in_a_callback_is_raised_at_the_next_stage(capfd):
    """As in a callback of JAX on the garbage collector: the exception is ignored, and nothing printed."""

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


def test_where_it_is_ignored_it_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interrupts.handled():
            signal.raise_signal(signal.SIGINT)
            interrupts.check()
    finally:
        signal.signal(signal.SIGINT, before)
