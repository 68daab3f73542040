"""Faults while a network is trained: kills and write errors, after which the same command ends as if there were none.

* Write errors: at a random change of a file below the workdir, made by this program or by a library in C, the disk is
  full, broken or read-only, for this change alone or from then on. The latter is also what the disk sees of a kill at
  this change. The command must end in one line that names the workdir, or end well where nothing was lost.
* Kills: SIGKILL at a random change of a file, or at a random moment.

After one or two of them in a row, the same command must end with the checkpoints of an undisturbed run, bit for bit,
and with each row of its metrics once.
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
from pathlib import Path

import jax

import tiny
from memo_jax.log import read_metrics
from memo_jax.training import program
from memo_jax.training import train as training
from memo_jax.training.saved_checkpoint import saved_steps
from runs import assert_same_state, rows_without_times
from soak.faults import ERRORS, FOR_EVER, KILL, check_told, command, failing

STEPS = 12


@functools.cache
def train_quickly() -> None:
    """Makes all runs of this process, which are of one config, use one compiled step and one initial state."""
    lowered, create, kept = program.lowered_step, training.create_state, {}

    def lowered_once(*arguments):
        if "step" not in kept:
            kept["step"] = lowered(*arguments).compile()
        return types.SimpleNamespace(compile=lambda: kept["step"])

    def created_once(*arguments):
        if "state" not in kept:
            kept["state"] = create(*arguments)
        return jax.tree.map(lambda x: jax.device_put(jax.numpy.array(x, copy=True), x.sharding), kept["state"])

    program.lowered_step, training.create_state = lowered_once, created_once
    program.jax = types.SimpleNamespace(**vars(jax) | {"clear_caches": lambda: None})


def train(workdir) -> tuple[int, str]:
    return command(*tiny.train_arguments(workdir))


@functools.cache
def reference() -> tuple[Path, int]:
    """The workdir of an undisturbed run, and how many changes of files it made."""
    train_quickly()
    workdir = new_folder() / "run"
    with failing(workdir.parent) as changes:
        status, text = train(workdir)
    assert status == 0, text
    return workdir, changes.count


def new_folder() -> Path:
    return Path(tempfile.mkdtemp(dir=tiny.temporary_folder()))


def check_ends_as_undisturbed(workdir) -> None:
    status, text = train(workdir)
    assert status == 0, text
    whole = reference()[0]
    assert saved_steps(workdir) == saved_steps(whole)
    for step in saved_steps(whole):
        assert_same_state(workdir, whole, step)
    assert [row["step"] for row in read_metrics(workdir)] == list(range(1, STEPS + 1))
    assert rows_without_times(workdir) == rows_without_times(whole)
    left = {path.name for path in workdir.iterdir()}
    assert left == {path.name for path in whole.iterdir()}, left
    shutil.rmtree(workdir.parent)


def write_errors(trials, rng):
    """Returns how many changes of files a run makes, and how many runs ended with an error."""
    changes, told = reference()[1], 0
    for number in trials:
        workdir = new_folder() / "run"
        for _ in range(1 + number % 2):
            code, times = rng.choice(ERRORS), rng.choice((1, FOR_EVER))
            with failing(workdir.parent, rng.randrange(changes), code, times) as made:
                status, text = train(workdir)
            if status:
                check_told(status, text, workdir, code)
                told += 1
            elif times > 1 and made.failed:
                assert saved_steps(workdir) == saved_steps(reference()[0]), made.failed
        check_ends_as_undisturbed(workdir)
    return {"changes": changes, "told": told}


def _train_and_be_killed(workdir, at) -> None:
    sys.stdout = sys.stderr = open(os.devnull, "w")
    if at is None:
        tiny.here(*tiny.train_arguments(workdir))
    else:
        with failing(workdir.parent, at, KILL):
            tiny.here(*tiny.train_arguments(workdir))
    os._exit(0)


def kills(trials, rng):
    """Returns how many runs were killed: every other at a change of a file, the others at a random moment."""
    changes, killed = reference()[1], 0
    start = multiprocessing.get_context("forkserver")  # of processes that have all imported and no device yet
    start.set_forkserver_preload(["soak.training"])
    tiny.material()
    for number in trials:
        workdir = new_folder() / "run"
        for _ in range(1 + number % 4 // 3):
            at = None if number % 2 else rng.randrange(changes)
            process = start.Process(target=_train_and_be_killed, args=(workdir, at))
            process.start()
            if at is None:
                while process.is_alive() and not (workdir / "metrics.jsonl").exists():
                    time.sleep(0.01)
                time.sleep(rng.uniform(0, 2))
                process.kill()
            process.join()
            killed += process.exitcode == -signal.SIGKILL
        check_ends_as_undisturbed(workdir)
    return {"changes": changes, "killed": killed}
