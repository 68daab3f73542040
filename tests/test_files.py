"""Files that appear whole or not at all, wherever an output leads."""

import errno
import os
import subprocess
import sys
import threading

import pytest

import tiny
from memo_jax.files import check_writable, replacing, write_text


def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "a.txt").symlink_to("disk/there.txt")
    for text in ("new", "newer"):
        check_writable(tmp_path / "a.txt")
        write_text(tmp_path / "a.txt", text)
        assert (tmp_path / "a.txt").is_symlink() and (tmp_path / "disk" / "there.txt").read_text() == text
    assert os.listdir(tmp_path / "disk") == ["there.txt"]
    (tmp_path / "b.txt").symlink_to("nowhere/b.txt")
    with pytest.raises(FileNotFoundError, match="b.txt"):
        write_text(tmp_path / "b.txt", "lost")
    assert sorted(os.listdir(tmp_path)) == ["a.txt", "b.txt", "disk"]


def test_a_pipe_is_written_and_not_replaced(tmp_path):
    """Likewise devices: with the permissions, a file could otherwise replace /dev/null."""
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    thread = threading.Thread(target=lambda: read.append(pipe.read_text()))
    thread.start()
    check_writable(pipe)
    write_text(pipe, "scores")
    thread.join(60)
    assert read == ["scores"] and pipe.is_fifo() and os.listdir(tmp_path) == ["pipe"]


def test_standard_output_in_a_file_is_written_and_not_replaced(tmp_path):
    """Else what is in that file, and what the command prints, would be lost."""
    (tmp_path / "log").write_text("old\n")
    program = (
        "from memo_jax.files import write_text; print('before'); write_text('/dev/stdout', 'scores\\n'); print('after')"
    )
    with open(tmp_path / "log", "ab") as log:
        subprocess.run([sys.executable, "-c", program], stdout=log, check=True)
    assert (tmp_path / "log").read_text() == "old\nbefore\nscores\nafter\n" and os.listdir(tmp_path) == ["log"]


def test_a_failure_keeps_what_was_there(tmp_path):
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "a.txt") as partial:
        partial.write_text("half")
        raise ZeroDivisionError
    assert (tmp_path / "a.txt").read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("number", [errno.ENOSPC, None], ids=["with its number", "without"])
def test_an_error_names_the_output_whatever_name_a_library_gives(number, tmp_path):
    """Like Arrow, whose errors carry a number and name the file that it was given to write."""
    with pytest.raises(OSError) as raised, replacing(tmp_path / "e.parquet") as partial:
        text = f"Failed to open local file '{partial}'"
        raise OSError(number, text) if number else OSError(text)
    said = f"{raised.value}"
    assert str(tmp_path / "e.parquet") in said and partial.name not in said
    assert (os.strerror(errno.ENOSPC) if number else "Failed to open") in said


@pytest.mark.parametrize("again", ["t.txt", "link.txt", "./t.txt", "hard.txt"])
def test_an_output_that_is_an_input_is_refused(again, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.txt").write_text("1 a b\n")
    (tmp_path / "link.txt").symlink_to("t.txt")
    (tmp_path / "hard.txt").hardlink_to("t.txt")
    (tmp_path / "e.npz").touch()
    status, text = tiny.here("score", "--embeddings", "e.npz", "--trials", "t.txt", "--scores", again)
    assert status == 2 and "is also an input (trials): choose another name" in text
    status, text = tiny.here("convert", "t.txt", "--output", again)
    assert status == 2 and "is also an input (input)" in text
    status, text = tiny.here("export", "--model", "t.txt", "--output", "new.safetensors", again)
    assert status == 2 and "is also an input (model)" in text
    more = ("--model", "e.npz", "--data", "data", "--output", "results", "--save-calibration", again)
    status, text = tiny.here("eval", "--trials", "t.txt", *more)
    assert status == 2 and "is also an input (trials)" in text and "--save-calibration" in text
    assert (tmp_path / "t.txt").read_text() == "1 a b\n"


def test_the_root_folder_and_folders_in_place_of_files_are_no_outputs(tmp_path):
    for arguments in (["prepare", "--input", tmp_path, "--output", "/"], ["score", "--scores", tmp_path]):
        arguments += [] if arguments[0] == "prepare" else ["--embeddings", "e.npz", "--trials", "t.txt"]
        status, text = tiny.here(*arguments)
        assert status == 2 and ("/ cannot be replaced" in text or f"{tmp_path} is a folder" in text), text
