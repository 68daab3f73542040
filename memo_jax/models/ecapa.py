"""ECAPA-TDNN (Desplanques et al., Interspeech 2020) in speechbrain's (and the MeMo authors') and wespeaker's form."""

import functools
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from memo_jax.models.blocks import run_blocks
from memo_jax.models.layers import (
    BatchNorm,
    TimeConv,
    bias_uniform,
    mean_and_variance_time,
    mean_time,
    parameter,
    strided_lengths,
    torch_uniform,
    valid_frames,
)

ECAPA_FORMS = ("speechbrain", "wespeaker")


class ConvReluNorm(nn.Module):
    """Convolution over time, ReLU, batch norm, in this order."""

    features: int
    kernel_size: int = 1
    dilation: int = 1
    dtype: jnp.dtype = jnp.float32
    padding: str = "reflect"
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, lengths: jax.Array | None = None, train: bool = False) -> jax.Array:
        """[N, T, C] → [N, T, features]."""
        x = TimeConv(
            self.features, self.kernel_size, self.dilation, self.dtype, self.stride, self.padding, name="conv"
        )(x, lengths)
        return BatchNorm(name="norm")(jax.nn.relu(x), train)


class Res2Block(nn.Module):
    """Res2 convolution: a chunk of channels passes unchanged; each other one, plus the last output, is convolved.

    The first chunk passes in speechbrain's form, the last one in wespeaker's.
    """

    features: int
    kernel_size: int
    dilation: int
    scale: int = 8
    dtype: jnp.dtype = jnp.float32
    form: str = "speechbrain"

    @nn.compact
    def __call__(self, x: jax.Array, lengths: jax.Array | None = None, train: bool = False) -> jax.Array:
        """[N, T, features] → [N, T, features]."""
        chunks = jnp.split(x, self.scale, axis=-1)
        passed = chunks.pop(0 if self.form == "speechbrain" else -1)
        outputs = []
        for i, chunk in enumerate(chunks):
            conv = ConvReluNorm(
                self.features // self.scale,
                self.kernel_size,
                self.dilation,
                self.dtype,
                padding_of(self.form),
                name=f"chunk_{i}",
            )
            outputs.append(conv(chunk + outputs[-1] if outputs else chunk, lengths, train))
        outputs.insert(0 if self.form == "speechbrain" else len(outputs), passed)
        return jnp.concatenate(outputs, axis=-1)


def padding_of(form: str) -> str:
    """Returns the padding at an utterance's ends in this form of the network."""
    return "reflect" if form == "speechbrain" else "zeros"


class SqueezeExcitation(nn.Module):
    """Scales each channel by a gate computed from its mean over time."""

    bottleneck: int = 128
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, lengths: jax.Array | None = None) -> jax.Array:
        """[N, T, C] → [N, T, C]."""
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
    form: str = "speechbrain"

    @nn.compact
    def __call__(self, x: jax.Array, lengths: jax.Array | None = None, train: bool = False) -> jax.Array:
        """[N, T, C] → [N, T, features]."""
        residual = x
        if x.shape[-1] != self.features:
            residual = TimeConv(self.features, dtype=self.dtype, name="shortcut")(x, lengths)
        x = ConvReluNorm(self.features, dtype=self.dtype, name="reduce")(x, lengths, train)
        x = Res2Block(self.features, self.kernel_size, self.dilation, self.scale, self.dtype, self.form, name="res2")(
            x, lengths, train
        )
        x = ConvReluNorm(self.features, dtype=self.dtype, name="expand")(x, lengths, train)
        return SqueezeExcitation(self.se_bottleneck, self.dtype, name="se")(x, lengths) + residual


def weighted_statistics(x: jax.Array, weights: jax.Array, floor: float) -> tuple[jax.Array, jax.Array]:
    """Returns mean and standard deviation [N, C] of x [N, T, C] under weights that sum to one over time."""
    mean = (weights * x).sum(axis=1)
    variance = (weights * jnp.square(x - mean[:, None, :])).sum(axis=1)
    return mean, jnp.sqrt(jnp.maximum(variance, floor))


class AttentiveStatistics(nn.Module):
    """Attentive statistics pooling, with global context or without: [N, T, C] → [N, 2C] in float32."""

    bottleneck: int = 128
    dtype: jnp.dtype = jnp.float32
    form: str = "speechbrain"
    global_context: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, lengths: jax.Array | None = None, train: bool = False) -> jax.Array:
        """[N, T, C] → weighted mean and standard deviation over time, [N, 2C] float32."""
        channels, frames = x.shape[-1], x.shape[1]
        x32 = x.astype(jnp.float32)
        valid = None if lengths is None else valid_frames(lengths, frames)[:, :, None]
        floor = 1e-12 if self.form == "speechbrain" else 1e-7
        if self.global_context:
            context = self.context(x32, lengths, valid, floor)[:, None, :]
            hidden = ContextConv(self.bottleneck, dtype=self.dtype, name="hidden")(x, context)
        else:
            hidden = TimeConv(self.bottleneck, dtype=self.dtype, name="hidden")(x)
        if self.form == "speechbrain":
            hidden = BatchNorm(name="norm")(jax.nn.relu(hidden), train)
        scores = TimeConv(channels, dtype=self.dtype, name="attention")(jnp.tanh(hidden)).astype(jnp.float32)
        if valid is not None:
            scores = jnp.where(valid, scores, -jnp.inf)
        return jnp.concatenate(weighted_statistics(x32, jax.nn.softmax(scores, axis=1), floor), axis=-1)

    def context(self, x: jax.Array, lengths: jax.Array | None, valid: jax.Array | None, floor: float) -> jax.Array:
        """Returns the mean and standard deviation over time, [N, 2C], which enter every frame's weight."""
        if self.form == "wespeaker":
            mean, variance = mean_and_variance_time(x, lengths)
            return jnp.concatenate([mean, jnp.sqrt(variance + floor)], axis=-1)
        if lengths is None:
            uniform = jnp.full((1, x.shape[1], 1), 1.0 / x.shape[1])
        else:
            uniform = valid / lengths[:, None, None].astype(jnp.float32)
        return jnp.concatenate(weighted_statistics(x, uniform, floor), axis=-1)


class ContextConv(nn.Module):
    """1×1 convolution of [x; context] whose context part, constant over time, is computed once per utterance."""

    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array) -> jax.Array:
        """[N, T, C] and context [N, 1, D] → [N, T, features]."""
        channels = x.shape[-1] + context.shape[-1]
        kernel = parameter(self, "kernel", torch_uniform, (1, channels, self.features)).astype(self.dtype)[0]
        bias = parameter(self, "bias", bias_uniform(channels), (self.features,)).astype(self.dtype)
        of_frames, of_context = kernel[: x.shape[-1]], kernel[x.shape[-1] :]
        return x.astype(self.dtype) @ of_frames + (context.astype(self.dtype) @ of_context + bias)


class ECAPATDNN(nn.Module):
    """ECAPA-TDNN: normalised log-mel [N, T, F] → embedding [N, embedding_dim] float32; 6,390,720 parameters by default.

    Attributes:
      channels: of the first convolution, of the SE-Res2 blocks and of the aggregation.
      form: "speechbrain", or "wespeaker", which pads with zeros, passes the last chunk of a Res2 block, and has no
        batch norm after the aggregation or in the attention (6,190,720 parameters at embedding 192).
      global_context: whether the attention also sees mean and standard deviation over the utterance.
      embedding_norm: whether a batch norm follows the embedding.
      stride: of the first convolution; with 2, the rest of the network computes on half the frames.
      remat: one of `REMATS`.

    Raises:
      ValueError: an unknown form.
    """

    channels: Sequence[int] = (512, 512, 512, 512, 1536)
    embedding_dim: int = 256
    kernel_sizes: Sequence[int] = (5, 3, 3, 3)
    dilations: Sequence[int] = (1, 2, 3, 4)
    scale: int = 8
    se_bottleneck: int = 128
    attention_bottleneck: int = 128
    dtype: jnp.dtype = jnp.float32
    form: str = "speechbrain"
    global_context: bool = True
    embedding_norm: bool = False
    stride: int = 1
    remat: str = "none"

    @nn.compact
    def __call__(self, x: jax.Array, lengths: jax.Array | None = None, train: bool = False) -> jax.Array:
        """Log-mel [N, T, F] → embedding [N, embedding_dim] float32.

        With `lengths` [N], in frames, an utterance padded in a batch gets the embedding it has alone (evaluation only).
        With `train`, batch norms use and update the statistics of the batch.
        """
        if self.form not in ECAPA_FORMS:
            raise ValueError(f"unknown form of ECAPA-TDNN {self.form!r}: choose one of {', '.join(ECAPA_FORMS)}")
        x = ConvReluNorm(
            self.channels[0],
            self.kernel_sizes[0],
            self.dilations[0],
            self.dtype,
            padding_of(self.form),
            self.stride,
            name="stem",
        )(x, lengths, train)
        lengths = strided_lengths(lengths, self.stride)
        outputs = []
        for i, (width, kernel_size, dilation) in enumerate(
            zip(self.channels[1:-1], self.kernel_sizes[1:], self.dilations[1:], strict=True)
        ):
            block = functools.partial(
                SERes2Block, width, kernel_size, dilation, self.scale, self.se_bottleneck, self.dtype, self.form
            )
            x = run_blocks(self, block, [f"block_{i}"], x, lengths, train, remat=self.remat)
            outputs.append(x)
        x = jnp.concatenate(outputs, axis=-1)
        if self.form == "speechbrain":
            x = ConvReluNorm(self.channels[-1], dtype=self.dtype, name="aggregate")(x, lengths, train)
        else:
            x = jax.nn.relu(TimeConv(self.channels[-1], dtype=self.dtype, name="aggregate")(x))
        pooled = AttentiveStatistics(
            self.attention_bottleneck, self.dtype, self.form, self.global_context, name="pool"
        )(x, lengths, train)
        pooled = BatchNorm(name="pool_norm")(pooled, train)
        embedding = TimeConv(self.embedding_dim, name="embedding")(pooled[:, None, :])[:, 0, :]
        return BatchNorm(name="embedding_norm")(embedding, train) if self.embedding_norm else embedding
