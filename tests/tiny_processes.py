"""A training so small that several real processes can do it together in a test, and ways to start and end them."""

import concurrent.futures
import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import tiny
from memo_jax.data.batches import TrainingBatches
from memo_jax.training import program, recipe
from memo_jax.training.front_end import Views

STEPS, SAVED, KILLED_AT = 12, 8, 10  # of the config: all, the last checkpoint but one
GONE = {76, -6}  # `cli.PROCESS_LOST`; SIGABRT, where jax ends the process itself

# A process of a training run; plans are JSON: what happens in which process at which step, and the commands to run.
PROCESS = """
import json, os, signal, sys, time
sys.path.insert(0, sys.argv[1])
import tiny_processes
from memo_jax import cli
from memo_jax.training import processes
plan, index = json.loads(sys.argv[2]), int(sys.argv[3])
tiny_processes.patch_for_tests(
    setattr, record=plan["record"] and f"{plan['record']}{index}.npy",
    input_seconds=plan["input_seconds"] if index == plan["processes"] - 1 else 0)
reached, last = processes.StopRequest.reached, len(plan["commands"]) - 1

def with_events(self, step):
    for number, of, at, *command in plan["signals"]:
        if of == index and at == step and (command or [last]) == [current]:
            os.kill(os.getpid(), number)
    if plan["slow"] and current == last:
        time.sleep(0.2)
    return reached(self, step)

processes.StopRequest.reached = with_events
leave, processes.leave = processes.leave, lambda: None
for current, arguments in enumerate(plan["commands"]):
    if current == 1:
        processes.join = lambda **_: None
    if current == last:
        processes.leave = leave
    status = cli.main([*arguments, f"--coordinator=localhost:{plan['port']}", f"--process_id={index}",
                       f"--num_processes={plan['processes']}"])
sys.exit(status)
"""


class Layer(nn.Module):
    """A backbone that compiles in no time, with batch norm and one matrix."""

    embedding_dim: int

    @nn.compact
    def __call__(self, x, lengths=None, train=False):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(jnp.abs(x).mean(axis=1))
        return nn.Dense(self.embedding_dim)(x)


def front_end(key, batch, banks):
    """Crops as frames, each with noise, and with the crop of the utterance before it in the batch."""

    def frames(crops):
        x = crops.astype(jnp.float32) / 3000
        x = x + 0.1 * jax.random.normal(key, x.shape) + 0.1 * jnp.roll(x, 1, axis=0)
        return x.reshape(*x.shape[:2], -1, 80)

    return Views((frames(batch["global"]),), frames(batch["teacher"]) if "teacher" in batch else None)


def patch_for_tests(set_attribute, record=None, input_seconds=0):
    """Makes training use these, record what it reads of every batch in a file, and wait some time for each batch."""
    set_attribute(recipe, "build_backbone", lambda name, embedding_dim, **_: Layer(embedding_dim))
    set_attribute(program, "build_front_end", lambda config: front_end)
    following, kept = TrainingBatches.__next__, []

    def kept_batch(self):
        kept.append(following(self)["global"])
        np.save(record, kept)
        return {"global": kept[-1]}

    def slow_batch(self):
        time.sleep(input_seconds)
        return following(self)

    if record:
        set_attribute(TrainingBatches, "__next__", kept_batch)
    elif input_seconds:
        set_attribute(TrainingBatches, "__next__", slow_batch)


class Ended(NamedTuple):
    """A process's exit status, what it printed, and when it ended, in seconds of the monotonic clock."""

    status: int
    text: str
    at: float


def start(count, *commands, signals=(), slow=False, record=None, stopped_seconds=0.0, input_seconds=0.0):
    """Runs command lines in `count` processes; returns how each ended.

    Args:
      count: how many.
      *commands: after `memo-jax`, one after the other.
      signals: (number, process, step) of signals that a process sends to itself during the last command, or with the
        command's place as a fourth number. One that SIGSTOP has stopped is sent SIGCONT after `stopped_seconds`.
      slow: steps of the last command take a fifth of a second.
      record: beginning of the names of files that keep what each process read.
      stopped_seconds: see `signals`.
      input_seconds: how long the last process waits for each batch.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        plan = {
            "port": free.getsockname()[1],
            "processes": count,
            "signals": signals,
            "slow": slow,
            "input_seconds": input_seconds,
            "record": record and str(record),
            "commands": commands,
        }
    code = [sys.executable, "-c", PROCESS, str(tiny.ROOT / "tests"), json.dumps(plan)]
    environment = tiny.environment()
    running = [
        subprocess.Popen(
            [*code, str(index)], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        for index in range(count)
    ]

    def ended(process):
        text, _ = process.communicate(timeout=300)
        return Ended(process.returncode, text, time.monotonic())

    def go_on(process):
        while process.poll() is None:
            if Path(f"/proc/{process.pid}/stat").read_text().rpartition(") ")[2].startswith("T"):
                time.sleep(stopped_seconds)
                process.send_signal(signal.SIGCONT)
                return
            time.sleep(0.1)

    with concurrent.futures.ThreadPoolExecutor(2 * count) as threads:  # all at once, so that each end is noticed
        for number, index, *_ in signals:
            if number == signal.SIGSTOP:
                threads.submit(go_on, running[index])
        return list(threads.map(ended, running))


def command(workdir, *settings):
    """For a run with one kind of crop, whose prototypes and momenta are sharded over the processes like large ones."""
    settings = ("data.local_crops=0", "log_every_steps=1", "split_above_megabytes=0.001", *settings)
    return tiny.train_arguments(workdir, *settings)
