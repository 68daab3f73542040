"""ResNet34 with temporal statistics pooling in the form of wespeaker and of the MeMo authors."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from memo_jax.models.layers import BatchNorm, Linear, PlaneConv, mask_time, mean_time


class BasicBlock(nn.Module):
    """Two 3×3 convolutions with batch norm and a shortcut, projected when the shape changes."""

    features: int
    stride: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, lengths, train):
        strides = (self.stride, self.stride)
        shortcut = x
        if self.stride != 1 or x.shape[-1] != self.features:
            shortcut = PlaneConv(self.features, 1, strides, self.dtype, name="shortcut")(x)
            shortcut = BatchNorm(name="shortcut_norm")(shortcut, train)
        x = PlaneConv(self.features, 3, strides, self.dtype, name="conv_0")(x)
        lengths = strided_lengths(lengths, self.stride)
        x = mask_time(jax.nn.relu(BatchNorm(name="norm_0")(x, train)), lengths)
        x = BatchNorm(name="norm_1")(PlaneConv(self.features, dtype=self.dtype, name="conv_1")(x), train)
        return mask_time(jax.nn.relu(x + shortcut), lengths), lengths


def strided_lengths(lengths: jax.Array | None, stride: int) -> jax.Array | None:
    """Returns how many frames a 'same' convolution with this stride leaves of each length."""
    return None if lengths is None else (lengths - 1) // stride + 1


class TemporalStatistics(nn.Module):
    """Mean and deviation over time of [N, T, F, C], flattened channel-major: [N, 2·C·F] float32 (TSTP)."""

    @nn.compact
    def __call__(self, x, lengths=None):
        x = x.astype(jnp.float32)
        mean = mean_time(x, lengths)
        count = x.shape[1] if lengths is None else lengths[:, None, None].astype(jnp.float32)
        variance = mean_time(jnp.square(x - mean[:, None]), lengths) * (count / jnp.maximum(count - 1, 1))
        statistics = (mean, jnp.sqrt(variance + 1e-7))
        return jnp.concatenate([s.transpose(0, 2, 1).reshape(s.shape[0], -1) for s in statistics], axis=-1)


class ResNet34(nn.Module):
    """ResNet34: normalised log-mel [N, T, F] → embedding [N, embedding_dim] float32.

    1,988,656 parameters by default, 6,634,336 at base width 32. `lengths` [N] in frames as in ECAPA.
    """

    base_channels: int = 16
    embedding_dim: int = 256
    blocks: Sequence[int] = (3, 4, 6, 3)
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, lengths=None, train=False):
        x = mask_time(x, lengths)[..., None]
        x = PlaneConv(self.base_channels, dtype=self.dtype, name="stem")(x)
        x = mask_time(jax.nn.relu(BatchNorm(name="stem_norm")(x, train)), lengths)
        for stage, count in enumerate(self.blocks):
            for i in range(count):
                stride = 2 if stage > 0 and i == 0 else 1
                block = BasicBlock(self.base_channels * 2**stage, stride, self.dtype, name=f"stage_{stage}_block_{i}")
                x, lengths = block(x, lengths, train)
        pooled = TemporalStatistics(name="pool")(x, lengths)
        return Linear(self.embedding_dim, name="embedding")(pooled)
