"""ResNet34 with temporal statistics pooling in the form of wespeaker and of the MeMo authors."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from memo_jax.models.layers import BatchNorm, Linear, PlaneConv, mask_time, mean_and_variance_time, strided_lengths


class BasicBlock(nn.Module):
    """Two 3×3 convolutions with batch norm and a shortcut, projected when the shape changes."""

    features: int
    strides: tuple[int, int]  # of time, of frequency
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, lengths, train):
        shortcut = x
        if tuple(self.strides) != (1, 1) or x.shape[-1] != self.features:
            shortcut = PlaneConv(self.features, 1, self.strides, self.dtype, name="shortcut")(x)
            shortcut = BatchNorm(name="shortcut_norm")(shortcut, train)
        x = PlaneConv(self.features, 3, self.strides, self.dtype, name="conv_0")(x)
        lengths = strided_lengths(lengths, self.strides[0])
        x = mask_time(jax.nn.relu(BatchNorm(name="norm_0")(x, train)), lengths)
        x = BatchNorm(name="norm_1")(PlaneConv(self.features, dtype=self.dtype, name="conv_1")(x), train)
        return mask_time(jax.nn.relu(x + shortcut), lengths), lengths


class TemporalStatistics(nn.Module):
    """Mean and deviation over time of [N, T, F, C], flattened channel-major: [N, 2·C·F] float32 (TSTP)."""

    epsilon: float = 1e-7  # added to the variance before the root

    @nn.compact
    def __call__(self, x, lengths=None):
        mean, variance = mean_and_variance_time(x, lengths)
        statistics = (mean, jnp.sqrt(variance + self.epsilon))
        return jnp.concatenate([s.transpose(0, 2, 1).reshape(s.shape[0], -1) for s in statistics], axis=-1)


class ResNet34(nn.Module):
    """ResNet34: normalised log-mel [N, T, F] → embedding [N, embedding_dim] float32.

    1,988,656 parameters by default, 6,634,336 at base width 32. `second_embedding` adds ReLU, batch norm without affine
    and another linear layer, an option of wespeaker's and 3D-Speaker's ResNets. 3D-Speaker's `pool_epsilon` is 1e-8.
    `lengths` [N] in frames as in ECAPA.
    """

    base_channels: int = 16
    embedding_dim: int = 256
    blocks: Sequence[int] = (3, 4, 6, 3)
    dtype: jnp.dtype = jnp.float32
    second_embedding: bool = False
    pool_epsilon: float = 1e-7

    @nn.compact
    def __call__(self, x, lengths=None, train=False):
        x = mask_time(x, lengths)[..., None]
        x = PlaneConv(self.base_channels, dtype=self.dtype, name="stem")(x)
        x = mask_time(jax.nn.relu(BatchNorm(name="stem_norm")(x, train)), lengths)
        for stage, count in enumerate(self.blocks):
            for i in range(count):
                stride = 2 if stage > 0 and i == 0 else 1
                width, name = self.base_channels * 2**stage, f"stage_{stage}_block_{i}"
                block = BasicBlock(width, (stride, stride), self.dtype, name=name)
                x, lengths = block(x, lengths, train)
        pooled = TemporalStatistics(self.pool_epsilon, name="pool")(x, lengths)
        embedding = Linear(self.embedding_dim, name="embedding")(pooled)
        if self.second_embedding:
            embedding = BatchNorm(affine=False, name="embedding_norm")(jax.nn.relu(embedding), train)
            embedding = Linear(self.embedding_dim, name="embedding_1")(embedding)
        return embedding
