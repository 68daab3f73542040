"""The train state: what a step reads and writes, and what a checkpoint keeps."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from memo_jax.models import Branch, Variables
from memo_jax.training.gate import Gate, GateRule, initial_gate
from memo_jax.training.loss_gate import LossGate, initial_loss_gate


@flax.struct.dataclass
class TrainState:
    """Everything that training carries from step to step.

    Attributes:
      step: number of steps taken, int32.
      student, teacher: {branch: {"params", "batch_stats"}}.
      center: {branch: {head: [K]}}, the running means of the logits of that branch's teacher.
      opt_state: {branch: {part: the optimiser's state}}; the parts of a student, its backbone and each head, are
        updated one after the other.
      gate: the state of the contrastive gate.
      loss_gate: the state of the loss gate; None for training without one.
      partners: int32 [N], the utterance whose crops the teachers see in place of each; None in runs without.
    """

    step: jax.Array
    student: dict[str, Variables]
    teacher: dict[str, Variables]
    center: dict[str, dict[str, jax.Array]]
    opt_state: dict[str, dict[str, optax.OptState]]
    gate: Gate
    loss_gate: LossGate | None = None
    partners: jax.Array | None = None


def student_params(state: TrainState) -> dict[str, Any]:
    """Returns the students' parameters, {branch: params}."""
    return {name: variables["params"] for name, variables in state.student.items()}


def backbone_variables(variables: Variables) -> Variables:
    """Returns the backbone's part of a branch's variables."""
    return {kind: tree["backbone"] for kind, tree in variables.items()}


def initial_state(
    key: jax.Array,
    branches: dict[str, Branch],
    mels: int,
    optimizer: optax.GradientTransformation,
    rule: GateRule,
    gated_utterances: int = 0,
    partners: int = 0,
) -> TrainState:
    """Returns the state before the first step: teachers are exact copies of the students, centres are zero.

    Args:
      key: a jax.random key, from which all students are initialised.
      branches: by name.
      mels: F, the mel bins of the features.
      optimizer: of the students.
      rule: of the gate.
      gated_utterances: how many utterances the dataset has, for training with a loss gate; 0 without.
      partners: number of utterances, each of which is its own partner; 0 for a state without partners.
    """
    student = {}
    for i, (name, branch) in enumerate(branches.items()):
        variables = branch.init(jax.random.fold_in(key, i), jnp.zeros((2, 32, mels)), train=True)
        student[name] = {"params": variables["params"], "batch_stats": variables["batch_stats"]}
    state = state_from_students(student, branches, optimizer, rule)
    if gated_utterances:
        state = state.replace(loss_gate=initial_loss_gate(gated_utterances))
    return state.replace(partners=jnp.arange(partners, dtype=jnp.int32)) if partners else state


def state_from_students(
    student: dict[str, Variables], branches: dict[str, Branch], optimizer: optax.GradientTransformation, rule: GateRule
) -> TrainState:
    """Returns the state before the first step for students with these variables, {branch: variables}."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        student=student,
        teacher=jax.tree.map(jnp.copy, student),
        center={
            name: {head: jnp.zeros((branch.head.prototypes,), jnp.float32) for head in branch.head_names}
            for name, branch in branches.items()
        },
        opt_state={
            name: {part: optimizer.init(of_part) for part, of_part in variables["params"].items()}
            for name, variables in student.items()
        },
        gate=initial_gate(rule),
    )
