"""A few trials of every campaign of faults: see tests/soak."""

import json
import os
import shutil
import subprocess
import sys

import pytest

import tiny


def soak(*arguments):
    if sys.platform != "linux" or not shutil.which("cc"):
        pytest.skip("faults of the file system need Linux and a C compiler")
    environment = tiny.environment()
    environment["PYTHONPATH"] = os.pathsep.join((str(tiny.ROOT / "tests"), environment["PYTHONPATH"]))
    command = [sys.executable, "-m", "soak", *arguments]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-5000:]
    return json.loads(run.stdout)


def test_faults_of_prepare_lose_nothing_and_damage_is_noticed_or_harmless():
    report = soak("--count", "5", "prepare")
    assert report["prepare.write_errors"]["told"] >= 3 and report["prepare.kills"]["killed"] >= 8
    assert report["prepare.dataset_damage"]["noticed when read"] >= 20
    assert report["prepare.archive_damage"]["noticed"] >= 50


def test_faults_of_training_and_of_what_it_leaves_lose_nothing_and_are_reported():
    report = soak("--count", "1", "training.write_errors", "training.kills", "damage")
    assert report["training.write_errors"]["told"] + report["training.kills"]["killed"] >= 1
    assert min(report["damage.files"]["noticed"].values()) >= 2
    assert report["damage.checkpoints"]["noticed"] >= 3 and report["damage.checkpoints"]["refusals of commands"] >= 5


def test_write_errors_of_commands_are_one_line_and_leave_nothing_half_written():
    report = soak("--count", "2", "commands")
    assert sum(report["commands.write_errors"]["told"].values()) >= 5
