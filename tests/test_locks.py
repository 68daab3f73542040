"""Locks: one owner at a time, none left by a killed process, and leases where the file system has no locks."""

import errno
import json
import os
import signal
import subprocess
import sys
import time

import pytest

import fake_bucket
import tiny
from memo_jax import locks
from memo_jax.locks import LockedError, exclusive

HOLDS = """
import sys, time
from memo_jax.locks import exclusive
with exclusive(sys.argv[1], inside=bool(int(sys.argv[2]))):
    print("held", flush=True)
    time.sleep(60)
"""


def holder(path, inside=False):
    command = [sys.executable, "-c", HOLDS, str(path), str(int(inside))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=tiny.environment())
    assert process.stdout.readline() == "held\n"
    return process


@pytest.mark.parametrize("inside", [False, True])
def test_another_owner_is_named_and_a_killed_one_leaves_nothing_locked(tmp_path, inside):
    output = tmp_path / "new" / "output"
    with holder(output, inside) as process:
        with pytest.raises(LockedError, match=f"{output} is in use by process {process.pid} on "):
            with exclusive(output, inside=inside):
                pass
        process.send_signal(signal.SIGKILL)
    with exclusive(output, inside=inside) as lock:
        lock.check()
        with pytest.raises(LockedError, match=f"process {os.getpid()}"), exclusive(output, inside=inside):
            pass
    with exclusive(output, inside=inside):
        pass


@pytest.mark.parametrize("inside", [False, True])
def test_nothing_is_left_behind(tmp_path, inside):
    with exclusive(tmp_path / "a" / "b", inside=inside):
        assert (tmp_path / "a").is_dir()
    assert list(tmp_path.iterdir()) == []
    with exclusive(tmp_path / "a", inside=True):
        (tmp_path / "a" / "kept").write_text("")
    assert os.listdir(tmp_path / "a") == ["kept"]


@pytest.mark.parametrize("inside", [False, True])
def test_a_full_disk_leaves_no_lock_behind(tmp_path, monkeypatch, inside):
    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(OSError, match="run: No space left|No space left.*run"):
            with exclusive(tmp_path / "new" / "run", inside=inside):
                pytest.fail("it is held although its file could not be written")
    assert os.listdir(tmp_path) == []


def test_of_many_that_begin_at_once_each_goes_alone(tmp_path):
    """Six processes increment a count in a file, each trying until it has the lock."""
    code = """
import sys, time
from pathlib import Path
from memo_jax.locks import LockedError, exclusive
path, done = Path(sys.argv[1]), 0
while done < 10:
    try:
        with exclusive(path):
            number = int(path.read_text())
            time.sleep(0.001)
            path.write_text(str(number + 1))
            done += 1
    except LockedError:
        time.sleep(0.002)
"""
    (tmp_path / "count").write_text("0")
    command = [sys.executable, "-c", code, str(tmp_path / "count")]
    running = [subprocess.Popen(command, env=tiny.environment()) for _ in range(6)]
    assert [process.wait() for process in running] == [0] * 6
    assert (tmp_path / "count").read_text() == "60" and os.listdir(tmp_path) == ["count"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"), exclusive(tmp_path / "file" / "output"):
        pass


@pytest.fixture
def quick(monkeypatch):
    """Leases that go stale within a second."""
    for name, seconds in (("RENEWAL_SECONDS", 0.1), ("STALE_SECONDS", 1.0), ("POLL_SECONDS", 0.3)):
        monkeypatch.setattr(locks, name, seconds)


@pytest.fixture(scope="module")
def bucket():
    pytest.importorskip("gcsfs", reason="needs the extra `gcs`")
    with pytest.MonkeyPatch.context() as patch, fake_bucket.running("locks") as (bucket, environment):
        for name, value in environment.items():
            patch.setenv(name, value)
        import fsspec

        fsspec.filesystem("gs").clear_instance_cache()
        yield bucket
        fsspec.filesystem("gs").clear_instance_cache()


@pytest.fixture(params=["file system without flock", "bucket"])
def leased(request, tmp_path, monkeypatch, quick):
    """A path where only leases work."""
    if request.param == "bucket":
        request.getfixturevalue("bucket").objects.clear()
        return "gs://locks/run"

    def flock(descriptor, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", flock)
    return tmp_path / "run"


def test_a_link_and_what_it_leads_to_have_one_lock(tmp_path):
    (tmp_path / "set").symlink_to(tmp_path / "big")
    with exclusive(tmp_path / "set"), pytest.raises(LockedError), exclusive(tmp_path / "big"):
        pass


def test_a_lease_begins_at_once(leased, capfd):
    """Where there is no flock, trying it leaves nothing behind that the lease would wait for."""
    began = time.monotonic()
    with exclusive(leased, inside=True):
        assert time.monotonic() - began < 0.5
    assert not capfd.readouterr().err


def test_a_lease_survives_a_request_that_fails(leased, monkeypatch):
    """A bucket's library raises errors that are no OSError."""
    owner, calls = locks._owner, []

    def failing_once(token=""):
        calls.append(token)
        if len(calls) == 2:
            raise RuntimeError("a gateway timed out")
        return owner(token)

    monkeypatch.setattr(locks, "_owner", failing_once)
    with exclusive(leased, inside=True) as lock:
        time.sleep(0.6)
        lock.check()
    assert len(calls) > 2


def test_a_lease_is_kept_while_renewed_and_removed_at_the_end(leased):
    with exclusive(leased, inside=True) as lock:
        time.sleep(1.5)
        with pytest.raises(LockedError, match=f"is in use by process {os.getpid()} on "):
            with exclusive(leased, inside=True):
                pass
        lock.check()
    with exclusive(leased, inside=True):
        pass


def test_a_lease_of_a_process_that_is_gone_is_taken_over_and_its_owner_told(leased, capfd):
    """Another machine's once it has not been renewed for a while; that of a dead process here at once. An owner that
    was suspended, and finds another's lease, stops."""
    file = locks.as_path(leased) / ".lock"
    with subprocess.Popen(["true"]) as process:
        pass
    for machine, waits in (["elsewhere"], True), (locks._machine(), False):
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(json.dumps({"pid": process.pid, "host": "far", "machine": machine, "token": "x"}).encode())
        began = time.monotonic()
        with exclusive(leased, inside=True) as lock:
            assert (time.monotonic() - began >= 1.0) == waits
            lock.check()
        assert ("process" in capfd.readouterr().err) == waits
    with exclusive(leased, inside=True) as lock:
        file.write_bytes(json.dumps({"pid": 1, "host": "far", "token": "x"}).encode())
        time.sleep(0.5)
        with pytest.raises(LockedError, match="the lock was lost.*process 1 on far"):
            lock.check()
    assert b"far" in file.read_bytes()
