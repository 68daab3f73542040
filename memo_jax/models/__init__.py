"""Networks: a branch is a backbone with its projection heads.

Read `ecapa`, `resnet` or `campplus` first, the backbones, then `heads`. `layers` has what they share, `blocks` how
residual blocks are run and rematerialised, `packed` a layout of planes for TPUs, `ensemble` several backbones as one.
"""

from collections.abc import Sequence
from typing import Any

import flax.core
import flax.linen as nn
import jax

from memo_jax.models.campplus import CAMPPlus
from memo_jax.models.ecapa import ECAPATDNN
from memo_jax.models.ensemble import Ensemble
from memo_jax.models.heads import DINOHead, SpeakerHead
from memo_jax.models.resnet import ResNet34

BACKBONES = {"ecapa": ECAPATDNN, "resnet": ResNet34, "campplus": CAMPPlus}
EXECUTION_FIELDS = ("packed", "scan", "remat")  # fields of backbones that change how they compute, not what

Variables = dict[str, Any]  # {"params": …, "batch_stats": …} of a module


class Branch(nn.Module):
    """A backbone and its heads; a student and its teacher are two sets of variables of the same branch.

    With `speakers`, it also has a head that compares embeddings with this many speakers, for training with labels.
    """

    backbone: nn.Module
    head: DINOHead
    head_names: Sequence[str] = ("self", "cross")
    speakers: int = 0

    def setup(self) -> None:
        """Creates a projection head for each name, and the speaker head."""
        self.heads = {name: self.head.copy(name=head_part(name)) for name in self.head_names}
        if self.speakers:
            self.speaker_head = SpeakerHead(self.speakers)

    def embed(self, x: jax.Array, lengths: jax.Array | None = None, train: bool = False) -> jax.Array:
        """Returns the embeddings [N, D] of normalised log-mel [N, T, F]."""
        return self.backbone(x, lengths, train)

    def project(self, embedding: jax.Array, train: bool = False) -> dict[str, jax.Array]:
        """Returns the logits [N, K] of embeddings [N, D] by every head."""
        return {name: head(embedding, train) for name, head in self.heads.items()}

    def __call__(self, x: jax.Array, train: bool = False) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Normalised log-mel [N, T, F] → (embedding, logits of every head); for initialisation."""
        embedding = self.embed(x, train=train)
        if self.speakers:
            self.speaker_head(embedding)
        return embedding, self.project(embedding, train)


def head_part(name: str) -> str:
    """Returns the key of a head in the variables of its branch, such as "self_head"."""
    return f"{name}_head"


SPEAKER_HEAD = "speaker_head"  # its key in the parameters of a branch


def build_backbone(name: str, **arguments: Any) -> nn.Module:
    """Returns the backbone of this name with these fields; of an ensemble they are {backbone: its fields}.

    Raises:
      ValueError: an unknown name; the message lists the known ones.
    """
    if name == "ensemble":
        return Ensemble(flax.core.freeze({kind: build_backbone(kind, **fields) for kind, fields in arguments.items()}))
    if name not in BACKBONES:
        raise ValueError(f"unknown backbone {name!r}: choose one of {', '.join(BACKBONES)}")
    return BACKBONES[name](**arguments)


def parameter_count(params: Any) -> int:
    """Returns the number of scalars in a pytree of arrays or shapes."""
    return sum(int(leaf.size) for leaf in jax.tree.leaves(params))
