"""A training so small that several real processes can do it together in a test, and ways to start and end them."""

import gc
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax._src import compiler

import tiny
from compiled_once import compiled_once
from memo_jax import cli
from memo_jax.data.batches import TrainingBatches
from memo_jax.training import processes, program, recipe
from memo_jax.training.front_end import Views

STEPS, SAVED, KILLED_AT = 12, 8, 10  # of the config: all, the last checkpoint but one
GONE = {76, -6}  # `cli.PROCESS_LOST`; SIGABRT, where jax ends the process itself


class Layer(nn.Module):
    """A backbone that compiles in no time, with batch norm and one matrix."""

    embedding_dim: int

    @nn.compact
    def __call__(self, x, lengths=None, train=False):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(jnp.abs(x).mean(axis=1))
        return nn.Dense(self.embedding_dim)(x)


def layer(name, embedding_dim, **_):
    """In place of `recipe.build_backbone`."""
    return Layer(embedding_dim)


def front_end(key, batch, banks):
    """Crops as frames, each with noise, and with the crop of the utterance before it in the batch."""

    def frames(crops):
        x = crops.astype(jnp.float32) / 3000
        x = x + 0.1 * jax.random.normal(key, x.shape) + 0.1 * jnp.roll(x, 1, axis=0)
        return x.reshape(*x.shape[:2], -1, 80)

    return Views((frames(batch["global"]),), frames(batch["teacher"]) if "teacher" in batch else None)


def front_end_of(config):
    """In place of `program.build_front_end`."""
    return front_end


def patch_for_tests(set_attribute, record=None, input_seconds=0):
    """Makes training use these, record what it reads of every batch in a file, and wait some time for each batch."""
    set_attribute(recipe, "build_backbone", layer)
    set_attribute(program, "build_front_end", front_end_of)
    following, kept = TrainingBatches.__next__, []

    def next_batch(self):
        time.sleep(input_seconds)
        batch = following(self)
        if record:
            kept.append(batch["global"])
            np.save(record, kept)
        return batch

    if record or input_seconds:
        set_attribute(TrainingBatches, "__next__", next_batch)


class Ended(NamedTuple):
    """A process's exit status, what it printed, and when it ended, in seconds of the monotonic clock."""

    status: int
    text: str
    at: float


def start(count, *commands, signals=(), record=None, stopped_seconds=0.0, input_seconds=0.0):
    """Runs command lines in `count` processes; returns how each ended.

    Args:
      count: how many.
      *commands: after `memo-jax`, one after the other.
      signals: (number, process, step) of signals that a process sends to itself during the last command, or with the
        command's place as a fourth number. One that SIGSTOP has stopped is sent SIGCONT after `stopped_seconds`.
      record: beginning of the names of files that keep what each process read.
      stopped_seconds: see `signals`.
      input_seconds: how long the last process waits for each batch.
    """
    with socket.socket() as free, tempfile.TemporaryDirectory() as texts:
        free.bind(("localhost", 0))
        plan = {
            "port": free.getsockname()[1],
            "processes": count,
            "signals": signals,
            "stopped_seconds": stopped_seconds,
            "input_seconds": input_seconds,
            "record": record and str(record),
            "commands": commands,
            "texts": texts,
        }
        free.close()
        environment = tiny.environment() | {"OPENBLAS_NUM_THREADS": "1"}  # NumPy would start one for each core
        done = subprocess.run(
            [sys.executable, __file__, json.dumps(plan)], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        ends = json.loads(done.stdout)
        return [Ended(status, Path(texts, str(index)).read_text(), at) for index, (status, at) in enumerate(ends)]


def fork(plan: dict) -> int | None:
    """Forks the processes of a plan and, when all have ended, prints [status, time of the end] of each.

    Returns the number of a process in that process, None in this one. A fork has what was imported, which would
    otherwise take each of them two seconds.
    """
    import memo_jax.inference.evaluate  # noqa: F401
    import memo_jax.training.train  # noqa: F401

    gc.set_threshold(50_000)  # as in conftest.py
    assert len(os.listdir("/proc/self/task")) == 1, "a fork has none of the other threads"
    children, ends = [], {}
    for index in range(plan["processes"]):
        children.append(os.fork())
        if children[-1] == 0:
            signal.alarm(600 + int(plan["stopped_seconds"]))  # ends one that hangs
            with open(Path(plan["texts"], str(index)), "w") as text:
                os.dup2(text.fileno(), 1)
                os.dup2(text.fileno(), 2)
            return index
    while len(ends) < len(children):
        child, status = os.waitpid(-1, os.WUNTRACED)
        if os.WIFSTOPPED(status):
            threading.Timer(plan["stopped_seconds"], os.kill, (child, signal.SIGCONT)).start()
        else:
            ends[child] = os.waitstatus_to_exitcode(status), time.monotonic()
    print(json.dumps([ends[child] for child in children]))


def run(plan: dict, index: int) -> int:
    """Runs the commands of a plan as one of its processes; returns the status of the last."""
    record = plan["record"] and f"{plan['record']}{index}.npy"
    patch_for_tests(setattr, record, plan["input_seconds"] if index == plan["processes"] - 1 else 0)
    reached, leave, last = processes.StopRequest.reached, processes.leave, len(plan["commands"]) - 1

    def with_signals(self, step):
        for number, of, at, *place in plan["signals"]:
            if of == index and at == step and (place or [last]) == [current]:
                os.kill(os.getpid(), number)
        return reached(self, step)

    processes.StopRequest.reached, processes.leave = with_signals, lambda: None
    # The programs of each process are others, and JAX would cache only those of the first.
    compiler.distributed = SimpleNamespace(global_state=SimpleNamespace(process_id=0, client=None))
    with compiled_once():
        for current, arguments in enumerate(plan["commands"]):
            if current == 1:
                processes.join = lambda **_: None
            if current == last:
                processes.leave = leave
            place = f"--coordinator=localhost:{plan['port']}", f"--process-id={index}"
            status = cli.main([*arguments, *place, f"--num-processes={plan['processes']}"])
    return status


def command(workdir, *settings):
    """For a run with one kind of crop, whose prototypes and momenta are sharded over the processes like large ones."""
    settings = ("data.local_crops=0", "log_every_steps=1", "split_above_megabytes=0.001", *settings)
    return tiny.train_arguments(workdir, *settings)


if __name__ == "__main__":
    plan = json.loads(sys.argv[1])
    index = fork(plan)
    sys.exit(0 if index is None else run(plan, index))
