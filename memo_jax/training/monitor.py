"""Watches a run from beside its loop: reads and logs metrics, evaluates, and stops a run that cannot continue."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np

from memo_jax.config import ConfigDict
from memo_jax.log import MetricsLog, Progress
from memo_jax.training.goodput import GOODPUT_METRICS, Goodput
from memo_jax.training.state import TrainState
from memo_jax.training.step import Recipe
from memo_jax.xla.sharding import parts_here

# Metrics that depend on the speed of the machine, not on the course of the run.
TIMES = ("seconds_per_step", "utterances_per_second", "cpu_seconds", *GOODPUT_METRICS)
TO_TRY = (
    "Try a lower optimizer.learning_rate, a longer warm-up (optimizer.warmup_epochs or optimizer.warmup_steps), a "
    "smaller optimizer.clip_norm, or model.dtype=float32"
)

# (recipe, {branch: variables of the teacher's backbone}) → {"eer/BRANCH": percent, "min_dcf_0.01/BRANCH": cost, …}
Evaluation = Callable[[Recipe, dict], dict[str, float]]


class TrainingStopped(ValueError):
    """The run cannot continue: it has collapsed, or a value is not finite."""

    exit_status = 3


class Monitor:
    """Follows a run step by step.

    The metrics of a step are read while the next step runs on the device, so that neither waits for the other: `record`
    reads those of the previous step, `settle` also those of the step just taken.

    Args:
      config: of the run.
      recipe: of the same config.
      log: where rows of metrics are written.
      progress: counts the steps and shows messages.
      goodput: measures where time goes; its metrics are part of every row.
      end: the last step of this start, which is always logged.
      epoch_steps: steps in an epoch.
      evaluation: see `Evaluation`; None for none.
    """

    def __init__(
        self,
        config: ConfigDict,
        recipe: Recipe,
        log: MetricsLog,
        progress: Progress,
        goodput: Goodput,
        *,
        end: int,
        epoch_steps: int,
        evaluation: Evaluation | None = None,
    ):
        self.config, self.recipe, self.log, self.progress = config, recipe, log, progress
        self.goodput = goodput
        self.end, self.epoch_steps, self.evaluation = end, epoch_steps, evaluation
        self.untrained = None  # the teachers' backbones before the first step, until they are evaluated
        self.last: dict[str, float] = {}  # the latest metrics that were read
        self._lasting: dict[str, float] = {}  # metrics of every row until they are replaced
        self._gate_closed = False
        self._pending = None  # number and metrics of the step whose metrics have not been read yet
        self._collapse = CollapseWatch(config.collapse, config.model.prototypes, config.loss.targets)
        self._mark = time.perf_counter()

    def start(self, state: TrainState, untrained: dict | None, saved: dict) -> None:
        """Records the state that the run begins or resumes with.

        Args:
          state: its gate is read.
          untrained: the teachers' backbones of a new run. They are evaluated after the first step, so that the two
            programs are not compiled at the same time. None for a run that resumes.
          saved: what `to_save` returned when the checkpoint was saved; empty for a new run.
        """
        self.goodput.end_start()
        self._gate_closed = bool(state.gate.closed)
        self.untrained = untrained if self.evaluation else None
        self._collapse.steps = dict(saved.get("collapse", {}))

    def to_save(self) -> dict:
        """Returns, as JSON, the counts that a resumed run needs to go on watching."""
        return {"collapse": {name: steps for name, steps in self._collapse.steps.items() if steps}}

    @property
    def running(self) -> dict[str, jax.Array] | None:
        """Metrics of the step dispatched last, which may still be running; None before the first."""
        return self._pending and self._pending[1]

    def record(self, number: int, metrics: dict[str, jax.Array]) -> None:
        """Records that a step was dispatched; checks and logs the previous step."""
        if self._pending:
            self._log(self._read())
        self._pending = number, metrics

    def add_to_rows(self, metrics: dict[str, float]) -> None:
        """Makes these metrics part of every row, until others take their place."""
        self._lasting = metrics

    @contextlib.contextmanager
    def between_steps(self, part: str) -> Iterator[None]:
        """Returns a context whose time counts for a part of the goodput, not for a step; logs the step before it."""
        if self._pending:
            self._log(self._read())
        with self.goodput.counting(part):
            yield
        self._mark = time.perf_counter()

    def settle(self, state: TrainState, backbones: dict | None = None) -> None:
        """Waits for the step just taken, checks its metrics and its state, evaluates `backbones` if given, and logs."""
        number = self._read()
        check_finite_state(number, state)
        if self.untrained:
            self.log.write(0, {"epoch": 0.0} | self._evaluate(0, self.untrained))
            self.untrained = None
        self._log(number, self._evaluate(number, backbones) if backbones else {})

    def _read(self) -> int:
        """Waits for the pending step and checks its metrics; returns its number."""
        (number, metrics), self._pending = self._pending, None
        last = {name: float(value) for name, value in jax.device_get(metrics).items()}
        if not last["gate/open"]:
            last = {k: v for k, v in last.items() if not k.startswith(("loss/contrastive", "alignment"))}
            rule = self.recipe.gate_rule.name
            if not self._gate_closed and rule != "never" and self.config.loss.contrastive:
                self.progress.write(f"step {number - 1}: the gate has closed ({rule}); distillation continues alone")
            self._gate_closed = True
        self._collapse.check(number, last)
        now = time.perf_counter()
        last["seconds_per_step"], self._mark = now - self._mark, now
        last["utterances_per_second"] = self.config.data.batch_size / last["seconds_per_step"]
        self.last = last
        self.progress.update(1, loss=last["loss"])
        return number

    def _log(self, number: int, evaluated: dict[str, float] | None = None) -> None:
        """Logs the latest metrics where a row is due."""
        if number % self.config.log_every_steps == 0 or number in (1, self.end) or evaluated:
            times = {"epoch": number / self.epoch_steps, "cpu_seconds": time.process_time()} | self.goodput.row()
            self.log.write(number, self.last | self._lasting | (evaluated or {}) | times)

    def _evaluate(self, number: int, backbones: dict) -> dict[str, float]:
        """Evaluates in every process, so that none waits for another."""
        with self.goodput.counting("evaluation"):
            result = self.evaluation(self.recipe, backbones)
        self._mark = time.perf_counter()
        self.progress.write(f"step {number}: " + ", ".join(map(_error_rate_text, result, result.values())))
        return result


def _error_rate_text(name: str, value: float) -> str:
    return f"{name} {value:.2f} %" if name.startswith("eer") else f"{name} {value:.3f}"


@dataclasses.dataclass
class CollapseWatch:
    """Counts for how many steps in a row each indicator has been beyond its limit."""

    limits: object  # config.collapse
    prototypes: int
    targets: str = "centered"  # config.loss.targets; without a centre its momentum is no remedy
    steps: dict[str, int] = dataclasses.field(default_factory=dict)

    def check(self, step: int, metrics: dict[str, float]) -> None:
        """Raises TrainingStopped, saying what to try, if a loss is not finite or an indicator is bad for too long."""
        for name, value in metrics.items():
            if name.startswith(("loss", "gradient_norm")) and not math.isfinite(value):
                raise TrainingStopped(f"step {step}: {name} is {value}. {TO_TRY}")
        uniform, has_center = math.log(self.prototypes), self.targets == "centered"
        for name, value in metrics.items():
            kind = name.split("/")[0]
            bad, advice = {
                "teacher_entropy": (
                    value > (1 - self.limits.min_entropy_gap) * uniform,
                    "the teacher is uniform over the prototypes: lower teacher.temp"
                    + (" or raise loss.center_momentum" if has_center else ""),
                ),
                "mean_teacher_entropy": (
                    value < self.limits.min_mean_entropy * uniform,
                    "the teacher gives all utterances one prototype: raise teacher.temp"
                    + (" or lower loss.center_momentum" if has_center else ""),
                ),
                "embedding_std": (
                    value < self.limits.min_embedding_std,
                    "all embeddings are alike: lower optimizer.learning_rate or keep the contrastive term longer",
                ),
            }.get(kind, (False, ""))
            self.steps[name] = self.steps.get(name, 0) + 1 if bad else 0
            if bad and self.steps[name] >= self.limits.patience_steps:
                raise TrainingStopped(
                    f"step {step}: collapsed; {name} is {value:.4g} (ln K = {uniform:.4g}) and has been beyond its "
                    f"limit for {self.steps[name]} steps: {advice}"
                )


def check_finite_state(step: int, state: TrainState) -> None:
    """Raises TrainingStopped unless parameters and optimiser state are finite. The gate may hold an infinity."""
    # On the host, to which a state is copied anyway when it is saved: a check on the device would take long to compile.
    leaves = jax.tree.leaves((state.student, state.teacher, state.center, state.opt_state))
    if not all(np.isfinite(part).all() for part in jax.device_get([part for x in leaves for part in parts_here(x)])):
        raise TrainingStopped(f"step {step}: the updated parameters are not finite. {TO_TRY}")
