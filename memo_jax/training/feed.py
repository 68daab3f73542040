"""Supplies each step with its batch and its compiled program; both change when partners are first drawn."""

import contextlib
from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import Mesh

from memo_jax import interrupts
from memo_jax.config import ConfigDict
from memo_jax.log import Progress
from memo_jax.training.inputs import Inputs, batches_of
from memo_jax.training.monitor import Monitor
from memo_jax.training.program import StepCompiledInBackground, augmentation_key
from memo_jax.training.recipe import crop_numbers
from memo_jax.training.state import TrainState
from memo_jax.training.step import Metrics
from memo_jax.xla import sharding


class Feed:
    """The batches of a run from a given step on, the program that takes them, and the table of partners in use.

    It begins to compile when it is made; call `open` before the first step. Use it as a context manager.

    Args:
      config: of the run.
      inputs: of the config.
      mesh: the devices.
      banks: of augmentation.
      begin: steps taken before.
      compiles: False for a run that takes no step.
    """

    def __init__(
        self,
        config: ConfigDict,
        inputs: Inputs,
        mesh: Mesh,
        banks: Mapping[str, np.ndarray],
        begin: int,
        compiles: bool = True,
    ):
        self._config, self._inputs, self._mesh, self._begin = config, inputs, mesh, begin
        self._banks, self._key = sharding.replicate(mesh, banks), augmentation_key(config, mesh)
        self._open, self._batches, self._step = contextlib.ExitStack(), None, None
        if compiles:
            self._compile(inputs.positives is not None and inputs.positives.active(begin))

    def open(self, state: TrainState, monitor: Monitor) -> None:
        """Starts reading batches, with the state's partners if they are in use."""
        partners, positives = None, self._inputs.positives
        if positives and positives.active(self._begin) and not positives.due(self._begin):
            partners = np.asarray(state.partners.addressable_data(0))
            monitor.add_to_rows(positives.metrics(partners))
        self._batches = batches_of(self._config, self._inputs, self._begin, partners)

    def prepare(self, number: int, state: TrainState, monitor: Monitor, progress: Progress) -> TrainState:
        """Returns the state that step `number` takes: with new partners, where they are due."""
        positives, taken = self._inputs.positives, number - 1
        if positives is None or not positives.due(taken):
            return state
        with monitor.between_steps("positives"):
            self._batches.close()  # it has read ahead with the previous partners
            first = taken == positives.first != self._begin
            if first and crop_numbers(self._config, True) != crop_numbers(self._config):
                self._compile(True)
            partners = positives.draw(state, self._inputs.recipe, self._mesh, taken)
            interrupts.check()
            self._batches = batches_of(self._config, self._inputs, taken, partners)
            found = positives.metrics(partners)
            monitor.add_to_rows(found)
            progress.write(partners_text(taken, found))
        return state.replace(partners=sharding.replicate(self._mesh, partners))

    def batch(self) -> dict[str, jax.Array]:
        """Returns the next batch, on the devices."""
        return sharding.global_batch(self._mesh, next(self._batches))

    @property
    def compiles_next(self) -> bool:
        """Whether the next step waits for the compiler."""
        return self._step.is_new

    def step(self, state: TrainState, batch: Mapping[str, jax.Array]) -> tuple[TrainState, Metrics]:
        """Takes a step, and returns the new state and metrics; the old state is donated."""
        return self._step(state, batch, self._banks, self._key)

    def _compile(self, partnered: bool) -> None:
        compiled = StepCompiledInBackground(self._config, self._inputs.recipe, self._mesh, self._banks, partnered)
        self._step = self._open.enter_context(compiled)

    def __enter__(self) -> "Feed":
        return self

    def __exit__(self, *exception) -> None:
        if self._batches is not None:
            self._batches.close()
        self._open.close()


def partners_text(step: int, metrics: Mapping[str, float]) -> str:
    """Returns the message about new partners."""
    same = metrics.get("positives/same_speaker")
    return f"step {step}: drew partners; {metrics['positives/other']:.1%} have a recording other than their own" + (
        "" if same is None else f", {same:.1%} of these from the same speaker"
    )
