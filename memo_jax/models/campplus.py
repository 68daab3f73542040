"""CAM++ (Wang et al., Interspeech 2023): a densely connected TDNN with context-aware masking, in 3D-Speaker's form."""

import functools
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from memo_jax.models.layers import (
    BatchNorm,
    PlaneConv,
    TimeConv,
    mask_time,
    mean_and_variance_time,
    mean_time,
    strided_lengths,
)
from memo_jax.models.resnet import BasicBlock

SEGMENT = 100  # frames whose mean is one part of the context

# How the reference initialises the convolutions over time; their biases are zero.
he_normal = nn.initializers.variance_scaling(2.0, "fan_in", "normal")
conv_without_bias = functools.partial(TimeConv, use_bias=False, kernel_init=he_normal)


def segment_means(x: jax.Array, lengths: jax.Array | None) -> jax.Array:
    """Returns the means [N, S, C] of x [N, T, C] over segments of 100 frames; the last segment may be shorter."""
    frames = x.shape[1]
    segments = -(-frames // SEGMENT)
    x = jnp.pad(mask_time(x, lengths), ((0, 0), (0, segments * SEGMENT - frames), (0, 0)))
    last = jnp.full((1,), frames) if lengths is None else lengths
    count = jnp.clip(last[:, None] - SEGMENT * jnp.arange(segments), 1, SEGMENT).astype(jnp.float32)
    sums = x.reshape(x.shape[0], segments, SEGMENT, x.shape[-1]).astype(jnp.float32).sum(axis=2)
    return (sums / count[:, :, None]).astype(x.dtype)


class FrontEndConvolution(nn.Module):
    """Residual convolutions over time and frequency that divide the mel bins by eight: [N, T, F] → [N, T, 4·F].

    The paper's front-end convolution module (FCM).
    """

    features: int = 32
    blocks: Sequence[int] = (2, 2)
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, lengths: jax.Array | None = None, train: bool = False) -> jax.Array:
        """Mel frames [N, T, F] → [N, T, 4·F]. For `lengths` and `train` see `CAMPPlus`."""
        x = mask_time(x, lengths)[..., None]
        x = PlaneConv(self.features, dtype=self.dtype, name="stem")(x)
        x = mask_time(jax.nn.relu(BatchNorm(name="stem_norm")(x, train)), lengths)
        for stage, count in enumerate(self.blocks):
            for i in range(count):
                strides = (1, 2 if i == 0 else 1)
                x = BasicBlock(self.features, strides, self.dtype, name=f"stage_{stage}_block_{i}")(x, lengths, train)
        x = PlaneConv(self.features, 3, (1, 2), self.dtype, name="reduce")(x)
        x = mask_time(jax.nn.relu(BatchNorm(name="reduce_norm")(x, train)), lengths)
        return x.swapaxes(2, 3).reshape(x.shape[0], x.shape[1], -1)  # channel-major


class ContextAwareMasking(nn.Module):
    """Convolution over time, each output scaled by a gate computed from the utterance's and the segment's mean."""

    features: int
    kernel_size: int
    dilation: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, lengths: jax.Array | None = None) -> jax.Array:
        """[N, T, C] → [N, T, features]."""
        frames, channels = x.shape[1:]
        local = conv_without_bias(
            self.features, self.kernel_size, self.dilation, self.dtype, padding="zeros", name="local"
        )(x, lengths)
        # The context is constant within a segment, so the gate is computed once for each.
        context = mean_time(x, lengths)[:, None] + segment_means(x, lengths)
        conv = functools.partial(TimeConv, dtype=self.dtype, kernel_init=he_normal, bias_init=nn.initializers.zeros)
        context = jax.nn.relu(conv(channels // 2, name="squeeze")(context))
        gate = jax.nn.sigmoid(conv(self.features, name="excite")(context))
        return local * jnp.repeat(gate, SEGMENT, axis=1)[:, :frames]


class DenseLayer(nn.Module):
    """BN, ReLU, 1×1 convolution, BN, ReLU, context-aware masking: what a layer of a dense block adds to its input."""

    growth: int
    bottleneck: int
    kernel_size: int
    dilation: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, lengths: jax.Array | None = None, train: bool = False) -> jax.Array:
        """[N, T, C] → [N, T, growth]."""
        x = NormReluConv(self.bottleneck, self.dtype, name="reduce")(x, train)
        x = jax.nn.relu(BatchNorm(name="norm")(x, train))
        return ContextAwareMasking(self.growth, self.kernel_size, self.dilation, self.dtype, name="masking")(x, lengths)


class NormReluConv(nn.Module):
    """Batch norm, ReLU, 1×1 convolution without bias."""

    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """[N, T, C] → [N, T, features]."""
        x = jax.nn.relu(BatchNorm(name="norm")(x, train))
        return conv_without_bias(self.features, dtype=self.dtype, name="conv")(x)


class CAMPPlus(nn.Module):
    """CAM++: log-mel [N, T, F] → embedding [N, embedding_dim] float32; 7,176,224 parameters by default.

    `layers` are those of the three dense blocks; each layer adds `growth` channels, and its inner width is `bottleneck`
    times that. `lengths` [N] are valid frames, as in `ECAPATDNN`. The last batch norm has no affine part.
    """

    embedding_dim: int = 512
    layers: Sequence[int] = (12, 24, 16)
    growth: int = 32
    stem_channels: int = 128
    plane_channels: int = 32
    plane_blocks: Sequence[int] = (2, 2)
    dilations: Sequence[int] = (1, 2, 2)
    kernel_size: int = 3
    bottleneck: int = 4
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, lengths: jax.Array | None = None, train: bool = False) -> jax.Array:
        """Normalised log-mel [N, T, F] → embedding [N, embedding_dim] float32."""
        x = FrontEndConvolution(self.plane_channels, self.plane_blocks, self.dtype, name="front_end")(x, lengths, train)
        stem = conv_without_bias(self.stem_channels, 5, dtype=self.dtype, stride=2, padding="zeros", name="stem")
        x = stem(x, lengths)
        lengths = strided_lengths(lengths, 2)
        x = jax.nn.relu(BatchNorm(name="stem_norm")(x, train))
        dense = functools.partial(DenseLayer, self.growth, self.bottleneck * self.growth, self.kernel_size)
        for block, (count, dilation) in enumerate(zip(self.layers, self.dilations, strict=True)):
            for i in range(count):
                layer = dense(dilation, self.dtype, name=f"block_{block}_layer_{i}")
                x = jnp.concatenate([x, layer(x, lengths, train)], axis=-1)
            x = NormReluConv(x.shape[-1] // 2, self.dtype, name=f"transit_{block}")(x, train)
        x = jax.nn.relu(BatchNorm(name="norm")(x, train))
        mean, variance = mean_and_variance_time(x, lengths)
        # A channel that ReLU keeps at zero has no variance. The square root's gradient is infinite there; it is set to
        # zero.
        varies = variance > 0
        deviation = jnp.where(varies, jnp.sqrt(jnp.where(varies, variance, 1)), 0)
        statistics = jnp.concatenate([mean, deviation], axis=-1)
        embedding = conv_without_bias(self.embedding_dim, name="embedding")(statistics[:, None])[:, 0]
        return BatchNorm(affine=False, name="embedding_norm")(embedding, train)
