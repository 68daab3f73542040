"""Layers shared by the backbones: convolutions over time, batch norm as PyTorch keeps it, length masks."""

import functools
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from memo_jax.models.packed import packed_convolution
from memo_jax.xla.compiler import materialize_on_cpu
from memo_jax.xla.products import pointwise_convolution
from memo_jax.xla.reductions import channel_sums, mean_and_variance, side_by_side

# U(±1/√fan_in): PyTorch's default for the weights of Linear and Conv.
torch_uniform = nn.initializers.variance_scaling(1.0 / 3.0, "fan_in", "uniform")

CONVOLUTION, STATISTICS = "convolution", "statistics"  # checkpoint names that remat="norms" keeps (blocks.py)


def parameter(module: nn.Module, name: str, init: nn.initializers.Initializer, shape: tuple[int, ...]) -> jax.Array:
    """Returns a module's parameter; init(key, shape) makes it if the module has none yet.

    `module.param` would trace the initialiser at every application, a sixth of the time it takes to trace a step.

    Raises:
      ValueError: the parameter has another shape; the message names it.
    """
    if not module.has_variable("params", name):
        return module.param(name, init, shape)
    value = module.get_variable("params", name)
    if value.shape != shape:
        raise ValueError(f"parameter {'/'.join((*module.path, name))} has shape {value.shape} where {shape} is needed")
    return value


def bias_uniform(fan_in: int) -> nn.initializers.Initializer:
    """Returns PyTorch's default bias initialiser, U(±1/√fan_in)."""
    bound = fan_in**-0.5
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


def l2_normalize(x: jax.Array, axis: int = -1, epsilon: float = 1e-12) -> jax.Array:
    """Returns x / max(‖x‖, epsilon) along an axis, with a finite gradient at zero."""
    squared = jnp.square(x).sum(axis=axis, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(squared, epsilon**2))


def valid_frames(lengths: jax.Array, frames: int) -> jax.Array:
    """Returns a boolean mask [N, T], true for the frames inside each utterance."""
    return jnp.arange(frames)[None, :] < lengths[:, None]


def mask_time(x: jax.Array, lengths: jax.Array | None) -> jax.Array:
    """Returns x [N, T, ...] with zeros after each utterance's length [N]; x itself without lengths."""
    if lengths is None:
        return x
    mask = valid_frames(lengths, x.shape[1])
    return x * mask.reshape(mask.shape + (1,) * (x.ndim - 2)).astype(x.dtype)


def reflect_pad_time(x: jax.Array, pad: int, lengths: jax.Array | None) -> jax.Array:
    """Returns x [N, T, C] padded by `pad` mirrored frames on both sides, each utterance at its own end.

    Raises:
      ValueError: fewer than pad + 1 frames.
    """
    if x.shape[1] <= pad:
        raise ValueError(f"{x.shape[1]} frames are too few for reflect padding by {pad}: need at least {pad + 1}")
    padded = jnp.pad(x, ((0, 0), (pad, pad), (0, 0)), mode="reflect")
    if lengths is None:
        return padded
    time = jnp.arange(-pad, x.shape[1] + pad)[None, :]
    last = lengths[:, None] - 1
    mirrored = jnp.where(time > last, 2 * last - time, jnp.abs(time))
    index = jnp.clip(mirrored, 0, x.shape[1] - 1)
    return jnp.take_along_axis(x, index[:, :, None], axis=1)


def strided_lengths(lengths: jax.Array | None, stride: int) -> jax.Array | None:
    """Returns the lengths [N] after a 'same' convolution with this stride."""
    return None if lengths is None else (lengths - 1) // stride + 1


def mean_time(x: jax.Array, lengths: jax.Array | None) -> jax.Array:
    """Returns the mean [N, ...] of x [N, T, ...] over the frames of each utterance."""
    if lengths is None:
        return x.mean(axis=1)
    # In float32, like the mean above: bfloat16 cannot even represent the number of frames.
    count = lengths.reshape((-1,) + (1,) * (x.ndim - 2)).astype(jnp.float32)
    return (mask_time(x, lengths).astype(jnp.float32).sum(axis=1) / count).astype(x.dtype)


def mean_and_variance_time(x: jax.Array, lengths: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Returns mean and unbiased variance [N, ...] of x [N, T, ...] over the frames of each utterance, float32."""
    x = x.astype(jnp.float32)
    mean = mean_time(x, lengths)
    count = x.shape[1] if lengths is None else lengths.reshape((-1,) + (1,) * (x.ndim - 2)).astype(jnp.float32)
    return mean, mean_time(jnp.square(x - mean[:, None]), lengths) * (count / jnp.maximum(count - 1, 1))


class TimeConv(nn.Module):
    """Convolution over time, 'same' length, [N, T, C] → [N, T', features], T' = ⌈T / stride⌉.

    At an utterance's ends the input is mirrored (`padding="reflect"`) or zero (`padding="zeros"`).
    """

    features: int
    kernel_size: int = 1
    dilation: int = 1
    dtype: jnp.dtype = jnp.float32
    stride: int = 1
    padding: str = "reflect"
    use_bias: bool = True
    kernel_init: nn.initializers.Initializer = torch_uniform
    bias_init: nn.initializers.Initializer | None = None

    @nn.compact
    def __call__(self, x: jax.Array, lengths: jax.Array | None = None) -> jax.Array:
        """[N, T, C] → [N, ⌈T / stride⌉, features]."""
        channels = x.shape[-1]
        kernel = parameter(self, "kernel", self.kernel_init, (self.kernel_size, channels, self.features))
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        if self.kernel_size == 1:
            out = x[:, :: self.stride] @ kernel[0]
        else:
            pad = self.dilation * (self.kernel_size - 1) // 2
            if self.padding == "reflect":
                x, pad = reflect_pad_time(x, pad, lengths), 0
            out = jax.lax.conv_general_dilated(
                mask_time(x, lengths) if pad else x,
                kernel,
                (self.stride,),
                ((pad, pad),),
                rhs_dilation=(self.dilation,),
                dimension_numbers=("NWC", "WIO", "NWC"),
            )
        if self.use_bias:
            init = self.bias_init or bias_uniform(self.kernel_size * channels)
            out = out + parameter(self, "bias", init, (self.features,)).astype(self.dtype)
        return checkpoint_name(out, CONVOLUTION)


class PlaneConv(nn.Module):
    """Convolution over time and frequency without bias, zero-padded: [N, T, F, C] → [N, T', F', features].

    `packed_channels` are those of a packed input (packed.py); the output is then packed, too.
    """

    features: int
    kernel_size: int = 3
    strides: Sequence[int] = (1, 1)
    dtype: jnp.dtype = jnp.float32
    packed_channels: int | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[N, T, F, C] → [N, T', F', features], each axis ⌈size / stride⌉ long."""
        shape = (self.kernel_size, self.kernel_size, self.packed_channels or x.shape[-1], self.features)
        kernel = parameter(self, "kernel", torch_uniform, shape)
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        if self.packed_channels:
            return checkpoint_name(packed_convolution(x, kernel, tuple(self.strides)), CONVOLUTION)
        # JAX cannot prove that a strided slice of a symbolic length (as in export) has the frames of a convolution.
        # Without a checkpoint name, like a convolution of one channel below: both are cheap to recompute.
        if self.kernel_size == 1 and isinstance(x.shape[1], int):
            return pointwise_convolution(x, kernel[0, 0], self.strides)
        pad = self.kernel_size // 2
        out = jax.lax.conv_general_dilated(
            x, kernel, tuple(self.strides), ((pad, pad), (pad, pad)), dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return out if x.shape[-1] == 1 else checkpoint_name(out, CONVOLUTION)


class Linear(nn.Module):
    """Affine map of the last axis, [..., D] → [..., features], initialised as in PyTorch unless told otherwise."""

    features: int
    kernel_init: nn.initializers.Initializer = torch_uniform
    bias_init: nn.initializers.Initializer | None = None
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] → [..., features]."""
        kernel = parameter(self, "kernel", self.kernel_init, (x.shape[-1], self.features))
        bias = parameter(self, "bias", self.bias_init or bias_uniform(x.shape[-1]), (self.features,))
        return x.astype(self.dtype) @ kernel.astype(self.dtype) + bias.astype(self.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _normalized_batch(
    x: jax.Array, scale: jax.Array, bias: jax.Array, near_mean: jax.Array, epsilon: float
) -> tuple[jax.Array, ...]:
    """Returns (normalised x, mean [C], biased variance [C]) of x [..., C]; no gradient flows into the statistics.

    C is the size of scale and bias; a last axis of p·C holds p values of each channel (packed.py). Statistics are
    float32, the result has the dtype of x. `near_mean` [C] is about the mean, as for `mean_and_variance`. The gradient
    is written out (Ioffe and Szegedy, 2015): two sums and one pass over x, less than automatic differentiation of the
    two-pass variance needs.
    """
    return _normalize(x, scale, bias, near_mean, epsilon)[0]


def _normalize(x, scale, bias, near_mean, epsilon):
    x32 = x.astype(jnp.float32)
    mean, var = mean_and_variance(x32, near_mean)
    mean = checkpoint_name(mean, STATISTICS)
    inverse = checkpoint_name(jax.lax.rsqrt(var + epsilon), STATISTICS)
    # Centred before scaling: x·gain − mean·gain would lose digits to cancellation, and in the gradient even more.
    out = (x32 - side_by_side(mean, x)) * side_by_side(inverse * scale, x) + side_by_side(bias, x)
    return (out.astype(x.dtype), mean, var), (x, scale, mean, inverse)


def _normalize_gradients(epsilon, residuals, gradients):
    x, scale, mean, inverse = residuals
    gradient = materialize_on_cpu(gradients[0].astype(jnp.float32))
    normalized = (x.astype(jnp.float32) - side_by_side(mean, x)) * side_by_side(inverse, x)
    bias_gradient = channel_sums(gradient, scale.size)
    scale_gradient = channel_sums(gradient * normalized, scale.size)
    count = x.size // scale.size
    centered = gradient - side_by_side(bias_gradient / count, x) - normalized * side_by_side(scale_gradient / count, x)
    x_gradient = side_by_side(inverse * scale, x) * centered
    return x_gradient.astype(x.dtype), scale_gradient, bias_gradient, jnp.zeros_like(mean)


_normalized_batch.defvjp(_normalize, _normalize_gradients)
normalized_batch = jax.jit(_normalized_batch, static_argnums=4)  # traced once for each shape


class BatchNorm(nn.Module):
    """Batch norm over all axes but the last, with statistics as PyTorch keeps them.

    The batch is normalised by its biased variance; the running variance is the unbiased one (n/(n−1)). Statistics are
    float32 whatever the compute dtype, and in a sharded program they are those of the global batch.
    """

    momentum: float = 0.9
    epsilon: float = 1e-5
    affine: bool = True
    packed_channels: int | None = None  # of a packed input (packed.py)

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """[..., C] → [..., C]; with `train`, uses and updates the statistics of the batch."""
        channels = self.packed_channels or x.shape[-1]
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,), jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, (channels,), jnp.float32)
        scale, bias = jnp.ones(channels), jnp.zeros(channels)
        if self.affine:
            scale = parameter(self, "scale", nn.initializers.ones, (channels,))
            bias = parameter(self, "bias", nn.initializers.zeros, (channels,))
        if not train:
            gain = jax.lax.rsqrt(running_var.value + self.epsilon) * scale
            mean, gain, bias = (side_by_side(values, x) for values in (running_mean.value, gain, bias))
            return ((x - mean) * gain + bias).astype(x.dtype)
        out, mean, var = normalized_batch(x, scale, bias, running_mean.value, self.epsilon)
        if not self.is_initializing():
            count = x.size // channels
            unbiased = var * (count / max(count - 1, 1))
            running_mean.value = self.momentum * running_mean.value + (1 - self.momentum) * mean
            running_var.value = self.momentum * running_var.value + (1 - self.momentum) * unbiased
        return out
