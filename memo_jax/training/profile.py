"""A profile of a few steps of a run, for XProf and TensorBoard, and of the device's memory, for pprof."""

import os
import re
from typing import Any, NamedTuple

import jax

from memo_jax.files import as_path, in_bucket

PROFILE_FOLDER = "profile"
MEMORY_FILE = "memory.prof"
SKIPPED_STEPS = 10  # first steps that a plain number of steps skips: they fill caches and memory pools


class ProfiledSteps(NamedTuple):
    """The first and the last step to profile; the first step that the command takes is 1."""

    first: int
    last: int


def profiled_steps(text: str) -> ProfiledSteps:
    """Parses "FIRST:LAST", or a number of steps after the first ten; raises ValueError for any other text."""
    found = re.fullmatch(r"(?:(\d+):)?(\d+)", text)
    first, last = (int(found[1] or SKIPPED_STEPS + 1), int(found[2])) if found else (0, 0)
    if found and found[1] is None:
        last += SKIPPED_STEPS
    if not 1 <= first <= last:
        raise ValueError(f"--profile {text}: give FIRST:LAST, such as 20:25, or how many steps to profile, such as 5")
    return ProfiledSteps(first, last)


def tracing_options() -> jax.profiler.ProfileOptions:
    """Returns options that leave out Python's calls: hundreds of thousands, which slow the steps that are measured."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    return options


class Profiler:
    """Profiles the devices of this process during some steps, into <workdir>/profile.

    Args:
      workdir: of the run.
      steps: the steps to profile; None for none.
      begin: the step that this start resumes after.
      end: its last step.
      active: whether to profile; if not, only checks the arguments (every process but the first).

    Raises:
      ValueError: too few steps are left, or the workdir is in a bucket.
    """

    def __init__(
        self, workdir: str | os.PathLike, steps: ProfiledSteps | None, begin: int, end: int, active: bool = True
    ):
        self._folder, self._running = as_path(workdir) / PROFILE_FOLDER, False
        self._steps = None
        if steps is None:
            return
        if in_bucket(workdir):
            raise ValueError(f"--profile: {workdir} is in a bucket, and profiles are written to a disk")
        if begin + steps.last > end:
            raise ValueError(
                f"--profile: step {steps.last} of this command is to be profiled, but it takes {end - begin} steps"
            )
        if active:
            self._steps = ProfiledSteps(begin + steps.first, begin + steps.last)

    def start_if_due(self, number: int) -> None:
        """Starts the profile if this step is its first."""
        if self._steps and number == self._steps.first:
            jax.profiler.start_trace(str(self._folder), profiler_options=tracing_options())
            self._running = True

    def stop_if_due(self, number: int, results: Any) -> str | None:
        """Ends the profile if this step was its last, once its results are ready; returns a message if so."""
        if not (self._running and number == self._steps.last):
            return None
        jax.block_until_ready(results)
        self.close()
        jax.profiler.save_device_memory_profile(str(self._folder / MEMORY_FILE))
        return f"steps {self._steps.first} to {number} are profiled in {self._folder}"

    def close(self) -> None:
        """Ends a profile that is running."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
