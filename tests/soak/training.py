"""Faults while `train` and `pseudo-label` run: kills and write errors, after which a rerun ends as if undisturbed.

* Write errors: at a random change of a file below the workdir, made by this program or by a library in C, the disk is
  full, broken or read-only, for this change alone or from then on. To the disk, the latter looks like a kill at this
  change. The command must end in one line that names the workdir, or succeed where nothing was lost.
* Kills: SIGKILL at a random change of a file, or at a random moment.

After one or two of them in a row, the same command must end with the checkpoints of an undisturbed run, bit for bit,
and with each row of its metrics once; rounds of pseudo-labels with the same networks, table and verdicts.
"""

import functools
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax

import tiny
from memo_jax.config import with_overrides
from memo_jax.inference.model_file import read_model
from memo_jax.log import read_metrics
from memo_jax.training import program
from memo_jax.training import train as training
from memo_jax.training.saved_checkpoint import saved_steps
from runs import assert_same_state, rows_without_times
from soak.faults import ERRORS, FOR_EVER, KILL, check_told, command, failing

STEPS = 12


class Subject(NamedTuple):
    """A command that trains.

    Attributes:
      arguments: its command line for a workdir.
      check: asserts that a workdir ended up like another one of the same command.
    """

    arguments: Callable[[Path], list[str]]
    check: Callable[[Path, Path], None]


def check_run(workdir, whole) -> None:
    assert saved_steps(workdir) == saved_steps(whole)
    for step in saved_steps(whole):
        assert_same_state(workdir, whole, step)
    assert [row["step"] for row in read_metrics(workdir)] == list(range(1, STEPS + 1))
    assert rows_without_times(workdir) == rows_without_times(whole)


def check_rounds(workdir, whole) -> None:
    for name in ("rounds.tsv", "round_1/clusters.tsv", "round_2/clusters.tsv"):
        assert (workdir / name).read_bytes() == (whole / name).read_bytes(), name
    for name in ("best.safetensors", *(f"round_{number}/model.safetensors" for number in range(3))):
        assert read_model(workdir / name).fingerprint == read_model(whole / name).fingerprint, name
    for number in (1, 2):
        assert names_in(workdir / f"round_{number}") == names_in(whole / f"round_{number}")


TRAIN, ROUNDS = Subject(tiny.train_arguments, check_run), Subject(tiny.round_arguments, check_rounds)


@functools.cache
def train_quickly() -> None:
    """Makes all runs of a config in this process use one compiled step and one initial state."""
    lowered, create, kept = program.lowered_step, training.create_state, {}

    def kept_for(kind, config, make):
        key = kind, repr(with_overrides(config, ["--config.init=", "--config.supervised.labels="]))
        if key not in kept:
            kept[key] = make()
        return kept[key]

    def lowered_once(config, *arguments):
        compiled = kept_for("step", config, lambda: lowered(config, *arguments).compile())
        return types.SimpleNamespace(compile=lambda: compiled)

    def created_once(config, recipe, mesh, start=None):
        state = kept_for("state", config, lambda: create(config, recipe, mesh))
        state = jax.tree.map(lambda x: jax.device_put(jax.numpy.array(x, copy=True), x.sharding), state)
        return program.with_parts(state, start) if start else state

    program.lowered_step, training.create_state = lowered_once, created_once
    program.jax = types.SimpleNamespace(**vars(jax) | {"clear_caches": lambda: None})


@functools.cache
def reference(subject: Subject) -> tuple[Path, int]:
    """The workdir of an undisturbed run, and how many changes to files it made."""
    train_quickly()
    workdir = new_folder() / "run"
    with failing(workdir.parent) as changes:
        status, text = command(*subject.arguments(workdir))
    assert status == 0, text
    return workdir, changes.count


def new_folder() -> Path:
    return Path(tempfile.mkdtemp(dir=tiny.temporary_folder()))


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def check_ends_as_undisturbed(subject: Subject, workdir: Path) -> None:
    status, text = command(*subject.arguments(workdir))
    assert status == 0, text
    whole = reference(subject)[0]
    subject.check(workdir, whole)
    assert names_in(workdir) == names_in(whole)
    shutil.rmtree(workdir.parent)


def _write_errors(subject, trials, rng):
    changes, told = reference(subject)[1], 0
    for number in trials:
        workdir = new_folder() / "run"
        for _ in range(1 + number % 2):
            code, times = rng.choice(ERRORS), rng.choice((1, FOR_EVER))
            with failing(workdir.parent, rng.randrange(changes), code, times) as made:
                status, text = command(*subject.arguments(workdir))
            if status:
                check_told(status, text, workdir, code)
                told += 1
            elif times > 1 and made.failed:
                subject.check(workdir, reference(subject)[0])
        check_ends_as_undisturbed(subject, workdir)
    return {"changes": changes, "told": told}


def _run_and_be_killed(arguments, folder, at) -> None:
    sys.stdout = sys.stderr = open(os.devnull, "w")
    if at is None:
        tiny.here(*arguments)
    else:
        with failing(folder, at, KILL):
            tiny.here(*arguments)
    os._exit(0)


def _kills(subject, trials, rng):
    changes, killed = reference(subject)[1], 0
    start = multiprocessing.get_context("forkserver")  # for processes with everything imported and no device yet
    start.set_forkserver_preload(["soak.training"])
    for number in trials:
        workdir = new_folder() / "run"
        for _ in range(1 + number % 4 // 3):
            at = None if number % 2 else rng.randrange(changes)
            arguments = subject.arguments(workdir)
            process = start.Process(target=_run_and_be_killed, args=(arguments, workdir.parent, at))
            process.start()
            if at is None:
                while process.is_alive() and not next(workdir.glob("**/metrics.jsonl"), None):
                    time.sleep(0.01)
                time.sleep(rng.uniform(0, 2))
                process.kill()
            process.join()
            killed += process.exitcode == -signal.SIGKILL
        check_ends_as_undisturbed(subject, workdir)
    return {"changes": changes, "killed": killed}


def write_errors(trials, rng):
    """Returns how many changes to files a run of `train` makes, and how many runs ended with an error."""
    return _write_errors(TRAIN, trials, rng)


def kills(trials, rng):
    """Returns how many runs of `train` were killed, half of them at a change of a file, the rest at a random moment."""
    return _kills(TRAIN, trials, rng)


def round_write_errors(trials, rng):
    """As `write_errors`, of `pseudo-label`."""
    return _write_errors(ROUNDS, trials, rng)


def round_kills(trials, rng):
    """As `kills`, of `pseudo-label`."""
    return _kills(ROUNDS, trials, rng)
