"""ECAPA-TDNN (Desplanques et al., Interspeech 2020) in the form that speechbrain and the MeMo authors use."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from memo_jax.models.layers import BatchNorm, TimeConv, bias_uniform, mean_time, torch_uniform, valid_frames


class ConvReluNorm(nn.Module):
    """Convolution over time, ReLU, batch norm, in this order."""

    features: int
    kernel_size: int = 1
    dilation: int = 1
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, lengths=None, train=False):
        x = TimeConv(self.features, self.kernel_size, self.dilation, self.dtype, name="conv")(x, lengths)
        return BatchNorm(name="norm")(jax.nn.relu(x), train)


class Res2Block(nn.Module):
    """Res2 convolution: the first chunk passes; each further one is convolved with what the last one gave."""

    features: int
    kernel_size: int
    dilation: int
    scale: int = 8
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, lengths=None, train=False):
        first, *rest = jnp.split(x, self.scale, axis=-1)
        outputs = [first]
        for i, chunk in enumerate(rest):
            conv = ConvReluNorm(
                self.features // self.scale, self.kernel_size, self.dilation, self.dtype, name=f"chunk_{i}"
            )
            outputs.append(conv(chunk if i == 0 else chunk + outputs[-1], lengths, train))
        return jnp.concatenate(outputs, axis=-1)


class SqueezeExcitation(nn.Module):
    """Scales each channel by a gate computed from its mean over time."""

    bottleneck: int = 128
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, lengths=None):
        squeezed = mean_time(x, lengths)[:, None, :]
        hidden = jax.nn.relu(TimeConv(self.bottleneck, dtype=self.dtype, name="squeeze")(squeezed))
        return x * jax.nn.sigmoid(TimeConv(x.shape[-1], dtype=self.dtype, name="excite")(hidden))


class SERes2Block(nn.Module):
    """1×1 convolution, Res2 block, 1×1 convolution, squeeze-excitation, residual."""

    features: int
    kernel_size: int
    dilation: int
    scale: int = 8
    se_bottleneck: int = 128
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, lengths=None, train=False):
        residual = x
        if x.shape[-1] != self.features:
            residual = TimeConv(self.features, dtype=self.dtype, name="shortcut")(x, lengths)
        x = ConvReluNorm(self.features, dtype=self.dtype, name="reduce")(x, lengths, train)
        x = Res2Block(self.features, self.kernel_size, self.dilation, self.scale, self.dtype, name="res2")(
            x, lengths, train
        )
        x = ConvReluNorm(self.features, dtype=self.dtype, name="expand")(x, lengths, train)
        return SqueezeExcitation(self.se_bottleneck, self.dtype, name="se")(x, lengths) + residual


def weighted_statistics(x: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns mean and deviation [N, C] of x [N, T, C] under weights that sum to one over time (two passes)."""
    mean = (weights * x).sum(axis=1)
    variance = (weights * jnp.square(x - mean[:, None, :])).sum(axis=1)
    return mean, jnp.sqrt(jnp.maximum(variance, 1e-12))


class AttentiveStatistics(nn.Module):
    """Attentive statistics pooling with global context: [N, T, C] → [N, 2C] in float32."""

    bottleneck: int = 128
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, lengths=None, train=False):
        channels, frames = x.shape[-1], x.shape[1]
        x32 = x.astype(jnp.float32)
        if lengths is None:
            valid, uniform = None, jnp.full((1, frames, 1), 1.0 / frames)
        else:
            valid = valid_frames(lengths, frames)[:, :, None]
            uniform = valid / lengths[:, None, None].astype(jnp.float32)
        mean, std = weighted_statistics(x32, uniform)
        context = jnp.concatenate([mean, std], axis=-1)[:, None, :]
        hidden = ContextConv(self.bottleneck, dtype=self.dtype, name="hidden")(x, context)
        hidden = jnp.tanh(BatchNorm(name="norm")(jax.nn.relu(hidden), train))
        scores = TimeConv(channels, dtype=self.dtype, name="attention")(hidden).astype(jnp.float32)
        if valid is not None:
            scores = jnp.where(valid, scores, -jnp.inf)
        return jnp.concatenate(weighted_statistics(x32, jax.nn.softmax(scores, axis=1)), axis=-1)


class ContextConv(nn.Module):
    """1×1 convolution of [x; context] whose context part, constant over time, is computed once an utterance."""

    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, context):
        channels = x.shape[-1] + context.shape[-1]
        kernel = self.param("kernel", torch_uniform, (1, channels, self.features)).astype(self.dtype)[0]
        bias = self.param("bias", bias_uniform(channels), (self.features,)).astype(self.dtype)
        of_frames, of_context = kernel[: x.shape[-1]], kernel[x.shape[-1] :]
        return x.astype(self.dtype) @ of_frames + (context.astype(self.dtype) @ of_context + bias)


class ECAPATDNN(nn.Module):
    """ECAPA-TDNN: normalised log-mel [N, T, F] → embedding [N, embedding_dim] float32; 6,390,720 parameters by default.

    `channels` are those of the first convolution, of the SE-Res2 blocks and of the aggregation. `lengths` [N], in
    frames, makes an utterance padded inside a batch give what it gives alone (evaluation only).
    """

    channels: Sequence[int] = (512, 512, 512, 512, 1536)
    embedding_dim: int = 256
    kernel_sizes: Sequence[int] = (5, 3, 3, 3)
    dilations: Sequence[int] = (1, 2, 3, 4)
    scale: int = 8
    se_bottleneck: int = 128
    attention_bottleneck: int = 128
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, lengths=None, train=False):
        x = ConvReluNorm(self.channels[0], self.kernel_sizes[0], self.dilations[0], self.dtype, name="stem")(
            x, lengths, train
        )
        outputs = []
        for i, (width, kernel_size, dilation) in enumerate(
            zip(self.channels[1:-1], self.kernel_sizes[1:], self.dilations[1:], strict=True)
        ):
            block = SERes2Block(
                width, kernel_size, dilation, self.scale, self.se_bottleneck, self.dtype, name=f"block_{i}"
            )
            x = block(x, lengths, train)
            outputs.append(x)
        x = ConvReluNorm(self.channels[-1], dtype=self.dtype, name="aggregate")(
            jnp.concatenate(outputs, axis=-1), lengths, train
        )
        pooled = AttentiveStatistics(self.attention_bottleneck, self.dtype, name="pool")(x, lengths, train)
        pooled = BatchNorm(name="pool_norm")(pooled, train)
        return TimeConv(self.embedding_dim, name="embedding")(pooled[:, None, :])[:, 0, :]
