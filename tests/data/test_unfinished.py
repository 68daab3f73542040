"""Preparing that is interrupted, however: finished work is kept, and the same command ends with the same bytes."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

import tiny
from memo_jax.data import prepare as prepare_module
from memo_jax.data import records
from memo_jax.data.batches import Utterances
from memo_jax.data.prepare import prepare
from memo_jax.data.recordings import Kind
from memo_jax.data.unfinished import PLAN, Unfinished
from memo_jax.locks import LockedError, exclusive
from recording_files import WRITERS

RATE, COUNT, PER_PART = 16000, 24, 3


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(prepare_module, "RECORDINGS_PER_SHARD", PER_PART)


@pytest.fixture
def speech(tmp_path):
    """Four speakers of six recordings."""
    rng = np.random.default_rng(0)
    for number in range(COUNT):
        path = tmp_path / "speech" / f"s{number % 4}" / f"{number}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, rng.integers(-9999, 9999, 9000 + 300 * number).astype(np.int16), RATE)
    return tmp_path / "speech"


def files_of(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def parts_of(output):
    return sorted(path.name for path in (output.parent / f".{output.name}.partial").glob("part-*.json"))


def interrupted(monkeypatch, inputs, output, after, error=KeyboardInterrupt, **options):
    """Prepares until `after` recordings were read, then raises the error."""
    read, calls = prepare_module.read_recording, []

    def failing(*arguments, **keywords):
        calls.append(1)
        if len(calls) > after:
            raise error
        return read(*arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "read_recording", failing)
        with pytest.raises(error):
            prepare(inputs, output, workers=1, **options)


def read_again(monkeypatch, *arguments, **options):
    """How many recordings a call of `prepare` reads, and its report."""
    read, calls = prepare_module.read_recording, []
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "read_recording", lambda *a, **k: (calls.append(1), read(*a, **k))[1])
        report = prepare(*arguments, workers=1, **options)
    return len(calls), report


@pytest.mark.parametrize("victim", ["group", "parent"])
def test_killed_processes_leave_whole_parts_from_which_the_same_command_resumes(
    speech, tmp_path, monkeypatch, victim, capfd
):
    """SIGKILL, to all processes or to the parent only (whose workers must not continue), with two at work.

    Each recording is the output of a command that takes a while, so that the kill comes in the middle.
    """
    slow = tmp_path / "slow"
    slow.mkdir()
    (slow / "wav.scp").write_text(
        "".join(f"{path.stem:0>2} sleep 0.1; cat {path} |\n" for path in speech.rglob("*.wav"))
    )
    output = tmp_path / "set"
    program = (
        "import sys; from memo_jax.data import prepare\n"
        f"prepare.RECORDINGS_PER_SHARD = {PER_PART}\n"
        "if __name__ == '__main__': prepare.prepare(sys.argv[1], sys.argv[2], workers=2, run_commands=True)\n"
    )
    (tmp_path / "program.py").write_text(program)
    process = subprocess.Popen(
        [sys.executable, tmp_path / "program.py", slow, output], env=tiny.environment(), start_new_session=True
    )
    deadline = time.monotonic() + 120
    while not parts_of(output) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    (os.killpg if victim == "group" else os.kill)(process.pid, signal.SIGKILL)
    process.wait()
    while time.monotonic() < deadline:  # until no process of the group is left
        try:
            os.killpg(process.pid, 0)
            time.sleep(0.05)
        except ProcessLookupError:
            break
    else:
        pytest.fail("workers outlive the process that they work for")
    done = parts_of(output)
    assert 1 <= len(done) < COUNT // PER_PART and not output.exists()
    capfd.readouterr()
    shards = {
        path.stat().st_ino: path.stat().st_mtime_ns
        for path in tmp_path.glob(".set.partial/dataset/*")
        if f"{path.name.rpartition('-')[0]}.json" in done
    }
    again, report = read_again(monkeypatch, slow, output, run_commands=True)
    assert again == COUNT - PER_PART * len(done) and report["utterances"] == COUNT
    assert f"continuing an earlier run: {PER_PART * len(done)} of {COUNT} recordings" in capfd.readouterr().err
    kept = {path.stat().st_ino: path.stat().st_mtime_ns for path in output.glob("*array_record*")}
    assert shards.items() <= kept.items()  # not written again
    prepare(slow, tmp_path / "whole", workers=1, run_commands=True)
    assert files_of(output) == files_of(tmp_path / "whole")
    assert not (tmp_path / ".set.partial").exists()


@pytest.mark.parametrize("suffix", ["", ".zip", ".tar", ".tar.gz"])
@pytest.mark.parametrize("after", [2, 10])
def test_every_kind_of_input_resumes_anywhere(speech, tmp_path, monkeypatch, suffix, after):
    inputs = speech
    if suffix:
        content = {str(path.relative_to(speech)): path.read_bytes() for path in speech.rglob("*.wav")}
        inputs = WRITERS[suffix](tmp_path / f"in{suffix}", content)
    whole = prepare(inputs, tmp_path / "whole", workers=1)
    interrupted(monkeypatch, inputs, tmp_path / "set", after)
    again, report = read_again(monkeypatch, inputs, tmp_path / "set")
    assert again == COUNT - after // PER_PART * PER_PART
    assert report | {"output": ""} == whole | {"output": ""}
    assert files_of(tmp_path / "set") == files_of(tmp_path / "whole")


@pytest.mark.parametrize("after", [0, 1, 5, 8])
def test_a_kill_while_the_dataset_is_put_together_loses_nothing(speech, tmp_path, monkeypatch, after):
    """After some or all shards have been given their final names."""
    prepare(speech, tmp_path / "whole", workers=1)
    rename, calls = os.rename, []

    def failing(*arguments):
        calls.append(1)
        if len(calls) > after:
            raise KeyboardInterrupt
        rename(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(records.os, "rename", failing)
        with pytest.raises(KeyboardInterrupt):
            prepare(speech, tmp_path / "set", workers=1)
    again, _ = read_again(monkeypatch, speech, tmp_path / "set")
    assert again == 0 and files_of(tmp_path / "set") == files_of(tmp_path / "whole")


def test_a_killed_worker_is_reported_and_finished_work_is_kept(speech, tmp_path):
    """One recording is a command that kills the process which runs it."""
    (tmp_path / "kaldi").mkdir()
    lines = [f"{path.stem:0>2} {path}\n" for path in speech.rglob("*.wav")] + [f"99 kill -9 $PPID; cat {speech} |\n"]
    (tmp_path / "kaldi" / "wav.scp").write_text("".join(lines))
    with pytest.raises(OSError, match="set: a worker process was killed.*; what is done is kept"):
        prepare(tmp_path / "kaldi", tmp_path / "set", workers=2, run_commands=True)
    assert parts_of(tmp_path / "set") and not (tmp_path / "set").exists()


def test_another_command_is_refused_and_starts_over_when_told(speech, tmp_path, monkeypatch, capsys):
    interrupted(monkeypatch, speech, tmp_path / "set", 10)
    before = parts_of(tmp_path / "set")
    for options in ({"min_seconds": 0.1}, {"speakers": {"s0/0.wav": "x"}}, {"run_commands": True}):
        with pytest.raises(FileExistsError, match="set is unfinished, and it was started with .*--overwrite"):
            prepare(speech, tmp_path / "set", workers=1, **options)
    with pytest.raises(FileExistsError, match="started with inputs .*speech'] and not .*s0'].*--overwrite"):
        prepare(speech / "s0", tmp_path / "set", workers=1)
    assert parts_of(tmp_path / "set") == before
    report = prepare(speech / "s0", tmp_path / "set", workers=1, overwrite=True)
    assert "starting" in capsys.readouterr().err and report["utterances"] == 6
    assert Utterances(tmp_path / "set").names == sorted(path.name for path in (speech / "s0").iterdir())
    assert not (tmp_path / ".set.partial").exists()


def test_paths_are_relative_to_the_folder_in_which_it_was_begun(speech, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    interrupted(monkeypatch, "speech", "out", 7)
    monkeypatch.chdir("/")
    with pytest.raises(FileExistsError, match=f"started in the folder {tmp_path}, to which its inputs are relative"):
        prepare(speech, tmp_path / "out", workers=1)
    monkeypatch.chdir(tmp_path)
    assert prepare("speech", "out", workers=1)["utterances"] == COUNT


def test_what_was_begun_with_whole_paths_resumes_with_relative_ones(speech, tmp_path, monkeypatch):
    interrupted(monkeypatch, speech, tmp_path / "out", 7)
    monkeypatch.chdir(tmp_path)
    again, _ = read_again(monkeypatch, "speech", "out")
    assert again == COUNT - 6


def test_a_link_to_a_dataset_stays_a_link(speech, tmp_path):
    prepare(speech, tmp_path / "big" / "set", workers=1)
    (tmp_path / "set").symlink_to(tmp_path / "big" / "set")
    prepare(speech / "s0", tmp_path / "set", workers=1, overwrite=True)
    assert (tmp_path / "set").is_symlink() and len(Utterances(tmp_path / "big" / "set")) == COUNT // 4


def test_overwriting_resumes_too_and_the_earlier_dataset_stays_until_the_end(speech, tmp_path, monkeypatch):
    prepare(speech / "s1", tmp_path / "set", workers=1)
    interrupted(monkeypatch, speech, tmp_path / "set", 10, overwrite=True)
    assert len(Utterances(tmp_path / "set")) == 6
    again, _ = read_again(monkeypatch, speech, tmp_path / "set", overwrite=True)
    assert again == COUNT - 9 and len(Utterances(tmp_path / "set")) == COUNT


def test_files_that_came_or_went_in_between_are_reported(speech, tmp_path, monkeypatch, capsys):
    """The list of the first run stands. What vanished before it was read is left out, as is what was added."""
    interrupted(monkeypatch, speech, tmp_path / "set", 10)
    shutil.copy(speech / "s0" / "0.wav", speech / "s0" / "00.wav")
    (speech / "s0" / "0.wav").unlink()  # was done
    (speech / "s3" / "23.wav").unlink()  # was not
    report = prepare(speech, tmp_path / "set", workers=1)
    names = Utterances(tmp_path / "set").names
    assert len(names) == COUNT - 1 and "s0/0.wav" in names and "s0/00.wav" not in names
    assert report["left_out"] == [
        (str(speech / "s0" / "00.wav"), "added too late: after preparation had started"),
        (str(speech / "s3" / "23.wav"), "no such file"),
    ]
    assert "left out 1 recording added after" in capsys.readouterr().err


def test_an_input_that_goes_away_ends_the_work_and_leaves_out_nothing(speech, tmp_path, monkeypatch):
    """A disk that is unmounted must not look like a million recordings that cannot be read."""
    read = prepare_module.read_recording

    def read_and_lose(item, **options):
        if item.name == "s1/5.wav":
            os.rename(speech, tmp_path / "gone")
        return read(item, **options)

    monkeypatch.setattr(prepare_module, "read_recording", read_and_lose)
    with pytest.raises(ValueError, match="speech is no longer there: make it available"):
        prepare(speech, tmp_path / "set", workers=1)
    monkeypatch.setattr(prepare_module, "read_recording", read)
    with pytest.raises(FileNotFoundError, match="speech: no such folder"):
        prepare(speech, tmp_path / "set", workers=1)
    os.rename(tmp_path / "gone", speech)
    again, report = read_again(monkeypatch, speech, tmp_path / "set")
    assert 0 < again < COUNT and report["left_out"] == [] and report["utterances"] == COUNT


def test_an_archive_that_changed_between_is_refused(speech, tmp_path, monkeypatch):
    content = {str(path.relative_to(speech)): path.read_bytes() for path in speech.rglob("*.wav")}
    archive = WRITERS[".zip"](tmp_path / "in.zip", content)
    interrupted(monkeypatch, archive, tmp_path / "set", 10)
    WRITERS[".zip"](tmp_path / "in.zip", {"first.wav": content["s0/0.wav"]} | content)
    with pytest.raises(FileExistsError, match="in.zip has changed since.*--overwrite"):
        prepare(archive, tmp_path / "set", workers=1)
    assert prepare(archive, tmp_path / "set", workers=1, overwrite=True)["utterances"] == COUNT + 1


def test_two_at_once_do_not_write_the_same_dataset(speech, tmp_path, monkeypatch):
    interrupted(monkeypatch, speech, tmp_path / "set", 10)
    with exclusive(tmp_path / "set"), pytest.raises(LockedError, match="set is in use by process"):
        prepare(speech, tmp_path / "set", workers=1)
    assert prepare(speech, tmp_path / "set", workers=1)["utterances"] == COUNT


def test_a_disk_that_fills_keeps_what_is_done(speech, tmp_path, monkeypatch):
    """On a file system of 500 kB for 600 kB of shards, which then gets larger."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounting = ["mount", "-t", "tmpfs", "-o", "size=500k", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(mounting, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        with pytest.raises(OSError, match="cannot write .*set: No space left on device; what is done is kept"):
            prepare(speech, folder / "set", workers=1)
        done = len(parts_of(folder / "set"))
        assert 0 < done < COUNT // PER_PART and os.listdir(folder) == [".set.partial"]
        subprocess.run(["mount", "-o", "remount,size=4m", str(folder)], check=True)
        again, _ = read_again(monkeypatch, speech, folder / "set")
        assert again == COUNT - PER_PART * done
        prepare(speech, tmp_path / "whole", workers=1)
        assert files_of(folder / "set") == files_of(tmp_path / "whole")
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_folder_that_appeared_meanwhile_is_not_replaced(speech, tmp_path, monkeypatch):
    """Whoever made it, and whatever is in it; the work is kept until that folder has been moved away."""
    read = prepare_module.read_recording

    def read_and_appear(item, **options):
        (tmp_path / "set").mkdir(exist_ok=True)
        (tmp_path / "set" / "thesis.tex").write_text("years of work")
        return read(item, **options)

    for overwrite in (False, True):
        with (
            monkeypatch.context() as patch,
            pytest.raises(FileExistsError, match="set appeared while it was being prepared"),
        ):
            patch.setattr(prepare_module, "read_recording", read_and_appear)
            prepare(speech, tmp_path / "set", workers=1, overwrite=overwrite)
        assert os.listdir(tmp_path / "set") == ["thesis.tex"]
        if not overwrite:
            os.rename(tmp_path / "set", tmp_path / "away")
            again, report = read_again(monkeypatch, speech, tmp_path / "set")
            assert again == 0 and report["utterances"] == COUNT
            shutil.rmtree(tmp_path / "set")


@pytest.mark.parametrize("after", [0, 1, 5])
def test_ended_after_the_dataset_was_in_its_place_the_same_command_is_done(
    speech, tmp_path, monkeypatch, capsys, after
):
    """Killed while it removed its intermediate files: only that is left to do, and the report is the same."""
    whole = prepare(speech, tmp_path / "whole", workers=1)
    discard = prepare_module.Unfinished.discard

    def dying(self):
        unlink, calls = os.unlink, []

        def failing(*given, **named):
            calls.append(1)
            if len(calls) > after:
                raise KeyboardInterrupt
            unlink(*given, **named)

        with monkeypatch.context() as patch:
            patch.setattr(os, "unlink", failing)
            discard(self)

    with monkeypatch.context() as patch:
        patch.setattr(prepare_module.Unfinished, "discard", dying)
        with pytest.raises(KeyboardInterrupt):
            prepare(speech, tmp_path / "set", workers=1)
    with pytest.raises(FileExistsError, match="set exists already"):
        prepare(speech / "s0", tmp_path / "set", workers=1)
    again, report = read_again(monkeypatch, speech, tmp_path / "set")
    assert again == 0 and report | {"output": ""} == whole | {"output": ""}
    assert "set was already finished" in capsys.readouterr().err
    assert files_of(tmp_path / "set") == files_of(tmp_path / "whole")
    assert sorted(os.listdir(tmp_path)) == ["set", "speech", "whole"]
    (tmp_path / ".set.partial").mkdir()  # as if the kill came when all but this was removed
    with pytest.raises(FileExistsError, match="set exists already"):
        prepare(speech, tmp_path / "set", workers=1)
    assert sorted(os.listdir(tmp_path)) == ["set", "speech", "whole"]


@pytest.mark.parametrize("renames", [0, 1])
def test_overwriting_that_ends_between_its_two_renames_loses_neither_dataset(speech, tmp_path, monkeypatch, renames):
    prepare(speech / "s1", tmp_path / "set", workers=1)
    before = files_of(tmp_path / "set")
    rename = os.rename

    def failing(old, new):
        if "set" in (os.path.basename(old), os.path.basename(new)):
            if failing.left == 0:
                raise OSError(5, "Input/output error")
            failing.left -= 1
        rename(old, new)

    failing.left = renames
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", failing)
        with pytest.raises(OSError, match="cannot write .*set: Input/output error; what is done is kept"):
            prepare(speech, tmp_path / "set", workers=1, overwrite=True)
    if renames == 0:
        assert files_of(tmp_path / "set") == before
    with pytest.raises(FileExistsError, match="set exists already"):  # the earlier one is back in its place
        prepare(speech, tmp_path / "set", workers=1)
    assert files_of(tmp_path / "set") == before
    again, _ = read_again(monkeypatch, speech, tmp_path / "set", overwrite=True)
    assert again == 0 and len(Utterances(tmp_path / "set")) == COUNT


@pytest.mark.parametrize("name", [PLAN, "part-00001.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_what_an_ended_run_left_is_used_only_if_it_is_sound(speech, tmp_path, monkeypatch, name, damage):
    prepare(speech, tmp_path / "whole", workers=1)
    interrupted(monkeypatch, speech, tmp_path / "set", 10)
    path = tmp_path / ".set.partial" / name
    content = path.read_bytes()
    if damage == "flip":  # in a name, where it is JSON as before
        content = content.replace(b"wav", b"vaw", 1)
    path.write_bytes(content if damage == "flip" else content[: 200 * (damage == "cut")])
    again, _ = read_again(monkeypatch, speech, tmp_path / "set")
    assert again == (COUNT if name == PLAN else COUNT - 2 * PER_PART)
    assert files_of(tmp_path / "set") == files_of(tmp_path / "whole")


def test_a_plan_runs_no_commands_that_the_call_does_not_allow(speech, tmp_path, monkeypatch):
    """A plan that somebody else left beside the output, whose recordings are commands."""
    interrupted(monkeypatch, speech, tmp_path / "set", 10)
    header, recordings, left_out = Unfinished(tmp_path / "set").plan()
    recordings = [item._replace(kind=Kind.COMMAND, path=f"touch {tmp_path}/ran") for item in recordings]
    Unfinished(tmp_path / "set").begin(header, recordings, left_out)
    assert prepare(speech, tmp_path / "set", workers=1)["utterances"] == COUNT
    assert not (tmp_path / "ran").exists()
