"""When contrastive learning stops: the rules of the gate, pure functions of a small state that checkpoints keep."""

from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

RULES = ("plateau", "conflict", "step", "always", "never")


class GateRule(NamedTuple):
    """Which rule closes the gate, and its settings.

    Attributes:
      name: one of RULES. `always` never closes the gate, `never` starts with it closed.
      smoothing: decay per step of the running means of contrastive loss and alignment, in [0, 1).
      window: steps over which `plateau` compares, and for which `conflict` must last.
      min_steps: `plateau` and `conflict` keep the gate open for at least this many steps.
      min_improvement: `plateau` closes below this relative improvement of the smoothed loss over a window.
      min_alignment: `conflict` closes below this smoothed cosine between the gradients of the contrastive and the
        distillation loss with respect to the embedding.
      stop_step: the first step without the term under `step`; 0 starts with the gate closed.
    """

    name: str = "plateau"
    smoothing: float = 0.99
    window: int = 1000
    min_steps: int = 1000
    min_improvement: float = 0.01
    min_alignment: float = 0.0
    stop_step: int = 0


@flax.struct.dataclass
class Gate:
    """State of the gate; all leaves are scalars.

    Attributes:
      closed: whether the contrastive term is off; once true it stays true.
      closed_at: the first step without the term; −1 while the gate is open, and under the rule `never`.
      loss, alignment: running means of contrastive loss and alignment, each averaged over branches.
      reference: the smoothed loss at the start of the current window.
      conflicting: for how many steps in a row the smoothed alignment has been below the threshold.
      steps: how many steps the gate has been open.
    """

    closed: jax.Array
    closed_at: jax.Array
    loss: jax.Array
    alignment: jax.Array
    reference: jax.Array
    conflicting: jax.Array
    steps: jax.Array


def check_rule(rule: GateRule) -> None:
    """Raises ValueError, naming the setting, for a rule that cannot work."""
    if rule.name not in RULES:
        raise ValueError(f"gate.rule is {rule.name!r}: choose one of {', '.join(RULES)}")
    if not 0 <= rule.smoothing < 1:
        raise ValueError(f"gate.smoothing is {rule.smoothing}: must lie in [0, 1)")
    if rule.name in ("plateau", "conflict") and rule.window < 1:
        raise ValueError(f"gate.window is {rule.window} steps: must be at least 1")


def initial_gate(rule: GateRule) -> Gate:
    """Returns the gate before the first step: open unless the rule is `never`, or `step` with stop_step 0.

    Raises:
      ValueError: a rule that cannot work; the message names the setting.
    """
    check_rule(rule)
    stopped = rule.name == "step" and rule.stop_step <= 0
    return Gate(  # each leaf has a buffer of its own, since the state is donated
        closed=jnp.asarray(rule.name == "never" or stopped),
        closed_at=jnp.full((), 0 if stopped else -1, jnp.int32),
        loss=jnp.zeros((), jnp.float32),
        alignment=jnp.zeros((), jnp.float32),
        reference=jnp.full((), jnp.inf, jnp.float32),
        conflicting=jnp.zeros((), jnp.int32),
        steps=jnp.zeros((), jnp.int32),
    )


def updated_gate(gate: Gate, step: jax.Array, loss: jax.Array, alignment: jax.Array, rule: GateRule) -> Gate:
    """Returns the gate for the next step. A closed gate stays as it is.

    Args:
      gate: of this step.
      step: the number of this step, from 0.
      loss: this step's weighted contrastive loss, averaged over branches.
      alignment: this step's cosine between the gradients of the two losses, averaged over branches.
      rule: the rule of the run.
    """
    steps = gate.steps + 1
    # Running means, corrected for their start at zero as in Adam.
    decay = jnp.float32(rule.smoothing)
    weight = (1 - decay) / (1 - decay**steps)
    smooth_loss = gate.loss + weight * (loss - gate.loss)
    smooth_alignment = gate.alignment + weight * (alignment - gate.alignment)

    window_ends = steps % max(rule.window, 1) == 0
    # The first window has nothing to compare with: its reference is inf, and the NaN that results compares false.
    improvement = (gate.reference - smooth_loss) / jnp.abs(gate.reference)
    plateau = window_ends & jnp.isfinite(gate.reference) & (improvement < rule.min_improvement)
    reference = jnp.where(window_ends, smooth_loss, gate.reference)
    conflicting = jnp.where(smooth_alignment < rule.min_alignment, gate.conflicting + 1, 0)

    old_enough = steps >= rule.min_steps
    closes = {
        "plateau": plateau & old_enough,
        "conflict": (conflicting >= rule.window) & old_enough,
        "step": step + 1 >= rule.stop_step,
        "always": jnp.asarray(False),
        "never": jnp.asarray(True),
    }[rule.name]
    after = Gate(
        closed=closes,
        closed_at=jnp.where(closes, jnp.int32(step + 1), -1),
        loss=smooth_loss,
        alignment=smooth_alignment,
        reference=reference,
        conflicting=conflicting.astype(jnp.int32),
        steps=steps,
    )
    return jax.tree.map(lambda old, new: jnp.where(gate.closed, old, new), gate, after)
