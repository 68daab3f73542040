"""When a run must stop: numbers that are not finite, or a teacher that has collapsed."""

import dataclasses
import math

import jax
import numpy as np

from memo_jax.training.state import TrainState
from memo_jax.xla.sharding import parts_here

TO_TRY = (
    "Try a lower optimizer.learning_rate, a longer optimizer.warmup, a smaller optimizer.clip_norm, or "
    "model.dtype=float32"
)


class TrainingStopped(ValueError):
    """The run cannot go on: its numbers are not finite, or it has collapsed."""

    exit_status = 3


@dataclasses.dataclass
class CollapseWatch:
    """Counts for how many steps in a row each indicator has been beyond its limit."""

    limits: object  # config.collapse
    prototypes: int
    steps: dict[str, int] = dataclasses.field(default_factory=dict)

    def check(self, step: int, metrics: dict[str, float]) -> None:
        """Raises TrainingStopped when a loss is not finite or an indicator has been bad for long; says what to try."""
        for name, value in metrics.items():
            if name.startswith(("loss", "gradient_norm")) and not math.isfinite(value):
                raise TrainingStopped(f"step {step}: {name} is {value}. {TO_TRY}")
        uniform = math.log(self.prototypes)
        for name, value in metrics.items():
            kind = name.split("/")[0]
            bad, advice = {
                "teacher_entropy": (
                    value > (1 - self.limits.min_entropy_gap) * uniform,
                    "the teacher is uniform over the prototypes: lower teacher.temp or raise loss.center_momentum",
                ),
                "mean_teacher_entropy": (
                    value < self.limits.min_mean_entropy * uniform,
                    "the teacher puts everybody on one prototype: raise teacher.temp or lower loss.center_momentum",
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


def check_finite(step: int, state: TrainState) -> None:
    """Raises TrainingStopped when a state must not be kept. (A gate that has seen no window yet holds an infinity.)"""
    # On the host, where the state goes to be saved anyway: a compiled check would take longer to compile than to run.
    leaves = jax.tree.leaves((state.student, state.teacher, state.center, state.opt_state))
    if not all(np.isfinite(part).all() for part in jax.device_get([part for x in leaves for part in parts_here(x)])):
        raise TrainingStopped(f"step {step}: the updated parameters are not finite. {TO_TRY}")
