"""Several backbones as one network, whose score is the mean of theirs."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict

from memo_jax.models.layers import l2_normalize


class Ensemble(nn.Module):
    """Embeddings of several backbones, each of length one, side by side: normalised log-mel [N, T, F] → [N, D] float32.

    The cosine of two such embeddings is the mean of the members' cosines. For averages of such embeddings (recordings
    over two minutes, speakers enrolled with several recordings) this holds only approximately. `members` are backbones
    by their names, in any order: embeddings stand in the order of the names.
    """

    members: FrozenDict[str, nn.Module]

    @property
    def embedding_dim(self) -> int:
        """D, the sum of the members' dimensions."""
        return sum(member.embedding_dim for member in self.members.values())

    def __call__(self, x: jax.Array, lengths: jax.Array | None = None, train: bool = False) -> jax.Array:
        """Normalised log-mel [N, T, F], valid frames [N] → embedding [N, D] float32."""
        parts = [l2_normalize(member(x, lengths, train)) for _, member in sorted(self.members.items())]
        return jnp.concatenate(parts, axis=-1)
