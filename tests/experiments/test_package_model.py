"""The one command that makes the package's network: its steps fit together, and each runs once."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

import tiny
from memo_jax import cli

sys.path.insert(0, str(tiny.ROOT / "experiments"))
import package_model  # noqa: E402


def result_of(command: list[str]) -> str:
    """The file or folder that a command writes, and at the end of the commands the one that it reads."""
    names = ("--workdir", "--output", "--package")
    return command[command.index(next(name for name in names if name in command)) + 1]


@pytest.fixture
def taken(monkeypatch):
    """The commands that were run; running one makes its output file or folder."""
    commands = []

    def run(command, check):
        commands.append(command)
        Path(result_of(command)).mkdir(parents=True, exist_ok=True)
        for name in ("results.json", "trials.txt"):  # the last file of an evaluation, of a list
            Path(result_of(command), name).touch()
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(package_model.subprocess, "run", run)
    monkeypatch.setattr(package_model, "saved_at", lambda workdir: 0.0)
    return commands


def test_every_command_is_understood_and_reads_what_those_before_it_wrote(taken, tmp_path):
    speech, output = tmp_path / "speech", tmp_path / "package"
    assert package_model.main(["--speech", str(speech), "--output", str(output), "--config.total_steps=5"]) == 0
    written = {"lists/trials.txt", "lists/train", "lists/validation"}  # by validation.py
    written |= {"degraded/trials.txt", "degraded/recordings"}  # by degrade.py
    for command in taken:
        if command[1] == "-m":
            _, rest = cli.build_parser().parse_known_args(command[3:])
            assert all(argument.startswith("--config.") for argument in rest)
        else:
            known = re.findall(r'"(--[a-z]+)"', Path(command[1]).read_text())
            assert {argument for argument in command if argument.startswith("--")} <= set(known)
        results = {result_of(command)}
        paths = [argument.rpartition("=")[2] for argument in command if str(output) in argument]
        for path in set(paths) - results:
            name = str(Path(path).relative_to(output))
            assert name in written, f"{name} is read before it is written"
        written |= {str(Path(path).relative_to(output)) for path in results & set(paths)}
    assert {"run/results/validation", "default_model.safetensors", "results/librispeech-test"} <= written
    (train,) = (command for command in taken if "train" in command[3:4])
    assert "--config.total_steps=5" in train


def test_existing_outputs_are_not_remade_and_a_failure_ends_it(taken, tmp_path, monkeypatch, capsys):
    arguments = ["--speech", str(tmp_path / "speech"), "--output", str(tmp_path / "package")]
    assert package_model.main(arguments) == 0
    first = list(taken)
    taken.clear()
    assert package_model.main(arguments) == 0
    expected = [command for command in first if "train" in command[3:4] or "--package" in command]
    assert taken == expected, "training finds out by itself, and the numbers of the card are printed again"
    taken.clear()
    monkeypatch.setattr(package_model, "saved_at", lambda workdir: time.time() + 1)
    assert package_model.main(arguments) == 0
    begins = next(number for number, command in enumerate(first) if "train" in command[3:4])
    assert taken == first[begins:], "training went on: what was made of the earlier network is made again"
    monkeypatch.setattr(package_model.subprocess, "run", lambda command, check: subprocess.CompletedProcess(command, 7))
    assert package_model.main(arguments) == 7 and "run the same command again" in capsys.readouterr().out


def test_an_unknown_argument_is_refused(tmp_path):
    with pytest.raises(SystemExit) as refused:
        package_model.main(["--speech", "s", "--output", str(tmp_path / "o"), "--seed", "1"])
    assert refused.value.code == 2
