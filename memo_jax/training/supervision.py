"""Labels in the objective: AAM-softmax, and which labels a step with a loss gate trains on."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from memo_jax.models import SPEAKER_HEAD, Branch
from memo_jax.models.heads import SpeakerHead
from memo_jax.training import losses
from memo_jax.training.loss_gate import passes
from memo_jax.training.state import TrainState, Variables


class Supervision(NamedTuple):
    """How labels enter the objective.

    Attributes:
      weight: u, the weight of AAM-softmax; 0 for training without labels.
      scale: of the cosines.
      gated_utterances: how many utterances the dataset has, for training with a loss gate (`loss_gate`); 0 without.
      correct_from: number of steps after which utterances that the gate leaves out are trained on with the label that
        the student is sure of; None for never.
      correction_temperature: of the probabilities of labels.
      correction_probability: above which the student counts as sure.
    """

    weight: float = 0.0
    scale: float = 30.0
    gated_utterances: int = 0
    correct_from: int | None = None
    correction_temperature: float = 0.1
    correction_probability: float = 0.5


def supervised_loss(
    head_params: dict[str, Any],
    embeddings: Sequence[jax.Array],
    labels: jax.Array,
    margin: jax.Array,
    *,
    branch: Branch,
    supervision: Supervision,
    given: jax.Array | None = None,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array | None]]:
    """Returns u · S of a student's embeddings, [V, B, D] for each crop length, and what else is computed with it.

    Args:
      head_params: of the speaker head.
      embeddings: of all views.
      labels: int32 [B], the number of each utterance's speaker, negative where it is not known.
      margin: of this step.
      branch: of the student.
      supervision: of the recipe.
      given: int32 [B], the labels before the loss gate, for training with one.

    Returns:
      (u · S, (the accuracy of the speaker head, the loss of each utterance [B] for the given labels or None)).
    """
    with jax.named_scope("supervised"):
        rows = jnp.concatenate([crops.reshape(-1, crops.shape[-1]) for crops in embeddings])
        views = len(rows) // len(labels)
        row_labels = jnp.tile(labels, views)
        cosines = SpeakerHead(branch.speakers).apply({"params": head_params}, rows)
        loss = losses.aam_softmax(cosines, row_labels, supervision.scale, margin)
        utterance_losses = None
        if given is not None:
            given_losses = losses.aam_softmax_rows(cosines, jnp.tile(given, views), supervision.scale, margin)
            utterance_losses = given_losses.reshape(views, -1).mean(axis=0)
        return supervision.weight * loss, (losses.accuracy(cosines, row_labels), utterance_losses)


class GatedBatch(NamedTuple):
    """What a step with a loss gate reads of a batch.

    Attributes:
      index: int32 [B], the numbers of the utterances.
      clean: features [B, T, F] of a crop as it was recorded; None without label correction.
    """

    index: jax.Array
    clean: jax.Array | None = None


@jax.named_scope("loss_gate")
def learned_labels(
    state: TrainState,
    variables: Variables,
    labels: jax.Array,
    gated: GatedBatch,
    branch: Branch,
    supervision: Supervision,
) -> tuple[jax.Array, jax.Array]:
    """Returns the labels int32 [B] that a step with a loss gate trains a branch on, −1 for none, and which it corrects.

    An utterance keeps its label if the gate lets it pass. One that it leaves out is trained on with the label that the
    student is sure of, by a crop as it was recorded and with running statistics; without one, it is not trained on.

    Args:
      state: before the step.
      variables: of the student.
      labels: int32 [B], as given.
      gated: of the batch.
      branch: of the student.
      supervision: of the recipe.
    """
    left_out = ~passes(state.loss_gate, gated.index)
    none = jnp.full_like(labels, -1)
    if supervision.correct_from is None:
        return jnp.where(left_out, none, labels), jnp.zeros_like(left_out)

    def likeliest(clean):
        backbone = {kind: variables[kind]["backbone"] for kind in ("params", "batch_stats")}
        return losses.confident_labels(
            branch.backbone.apply(backbone, clean),
            variables["params"][SPEAKER_HEAD]["directions"],
            supervision.correction_temperature,
            supervision.correction_probability,
        )

    sure = jax.lax.cond(state.step >= supervision.correct_from, likeliest, lambda clean: none, gated.clean)
    return jnp.where(left_out, sure, labels), left_out & (sure >= 0)
