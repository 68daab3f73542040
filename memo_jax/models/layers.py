"""Layers shared by the backbones: convolutions over time, batch norm as PyTorch keeps it, length masks."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

# U(±1/√fan_in): PyTorch's default for the weights of Linear and Conv.
torch_uniform = nn.initializers.variance_scaling(1.0 / 3.0, "fan_in", "uniform")


def bias_uniform(fan_in: int):
    """Returns PyTorch's default bias initialiser, U(±1/√fan_in)."""
    bound = fan_in**-0.5
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


def valid_frames(lengths: jax.Array, frames: int) -> jax.Array:
    """Returns a boolean mask [N, T], true where a frame lies inside its utterance."""
    return jnp.arange(frames)[None, :] < lengths[:, None]


def mask_time(x: jax.Array, lengths: jax.Array | None) -> jax.Array:
    """Zeroes the frames of x [N, T, ...] behind each utterance's length; the identity without lengths."""
    if lengths is None:
        return x
    mask = valid_frames(lengths, x.shape[1])
    return x * mask.reshape(mask.shape + (1,) * (x.ndim - 2)).astype(x.dtype)


def reflect_pad_time(x: jax.Array, pad: int, lengths: jax.Array | None) -> jax.Array:
    """Pads x [N, T, C] by `pad` mirrored frames on both sides, each utterance at its own end.

    Raises ValueError when the input is too short to be mirrored that far.
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
    """Returns how many frames a 'same' convolution with this stride leaves of each length."""
    return None if lengths is None else (lengths - 1) // stride + 1


def mean_time(x: jax.Array, lengths: jax.Array | None) -> jax.Array:
    """Returns the mean [N, ...] of x [N, T, ...] over the frames of each utterance."""
    if lengths is None:
        return x.mean(axis=1)
    # In float32, as the mean above adds up: a bfloat16 cannot even hold the number of frames.
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
        channels = x.shape[-1]
        kernel = self.param("kernel", self.kernel_init, (self.kernel_size, channels, self.features))
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        if self.kernel_size == 1:
            out = x[:, :: self.stride] @ kernel[0]
        else:
            pad = self.dilation * (self.kernel_size - 1) // 2
            if self.padding == "reflect":
                x, pad = reflect_pad_time(x, pad, lengths), 0
            out = jax.lax.conv_general_dilated(
                mask_time(x, lengths) if pad else x, kernel, (self.stride,), ((pad, pad),),
                rhs_dilation=(self.dilation,), dimension_numbers=("NWC", "WIO", "NWC"),
            )
        if self.use_bias:
            init = self.bias_init or bias_uniform(self.kernel_size * channels)
            out = out + self.param("bias", init, (self.features,)).astype(self.dtype)
        return out


class PlaneConv(nn.Module):
    """Convolution over time and frequency without bias, zero-padded: [N, T, F, C] → [N, T', F', features]."""

    features: int
    kernel_size: int = 3
    strides: Sequence[int] = (1, 1)
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (self.kernel_size, self.kernel_size, x.shape[-1], self.features)
        kernel = self.param("kernel", torch_uniform, shape)
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        # As a matrix product, since XLA takes the gradient of a strided 1×1 convolution at 1 GFLOP/s on a CPU. Of a length
        # that is a symbol, as in export, JAX could not prove that the slice has the frames that a convolution leaves.
        if self.kernel_size == 1 and isinstance(x.shape[1], int):
            return x[:, :: self.strides[0], :: self.strides[1]] @ kernel[0, 0]
        pad = self.kernel_size // 2
        return jax.lax.conv_general_dilated(
            x, kernel, tuple(self.strides), ((pad, pad), (pad, pad)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )


class Linear(nn.Module):
    """Affine map of the last axis with PyTorch's default initialisation unless others are given."""

    features: int
    use_bias: bool = True
    kernel_init: nn.initializers.Initializer = torch_uniform
    bias_init: nn.initializers.Initializer | None = None
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        out = x.astype(self.dtype) @ kernel.astype(self.dtype)
        if self.use_bias:
            init = self.bias_init or bias_uniform(x.shape[-1])
            out = out + self.param("bias", init, (self.features,)).astype(self.dtype)
        return out


@jax.custom_vjp
def normalized_batch(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float) -> tuple[jax.Array, ...]:
    """Returns (normalised x, mean [C], biased variance [C]) of x [..., C]; no gradient flows into the statistics.

    Statistics are float32, the result has the type of x. The gradient is written out (Ioffe and Szegedy, 2015): two
    sums and one pass over x, which is less than what differentiating the two-pass variance gives.
    """
    return _normalize(x, scale, bias, epsilon)[0]


def channel_sums(x: jax.Array) -> jax.Array:
    """Returns the sums [C] of x [..., C] over all axes but the last."""

    def in_wide_rows(x):
        # Many sums at once, each of few numbers, which is three times as fast and rounds less than XLA's own order. The
        # barrier keeps it from joining both sums again.
        return jax.lax.optimization_barrier(x.reshape(-1, *x.shape[-2:]).sum(axis=0)).sum(axis=0)

    def in_its_own_order(x):
        return x.sum(axis=tuple(range(x.ndim - 1)))

    if x.ndim < 3:
        return in_its_own_order(x)
    return jax.lax.platform_dependent(x, cpu=in_wide_rows, default=in_its_own_order)


def _normalize(x, scale, bias, epsilon):
    x32, count = x.astype(jnp.float32), x.size // x.shape[-1]
    mean = channel_sums(x32) / count
    centered = x32 - mean
    var = channel_sums(jnp.square(centered)) / count
    inverse = jax.lax.rsqrt(var + epsilon)
    # Centred before it is scaled: x·gain − mean·gain would cancel, in the gradient even more than here.
    out = centered * (inverse * scale) + bias
    return (out.astype(x.dtype), mean, var), (x, scale, mean, inverse)


def _normalize_gradients(residuals, gradients):
    x, scale, mean, inverse = residuals
    gradient = gradients[0].astype(jnp.float32)
    normalized = (x.astype(jnp.float32) - mean) * inverse
    of_bias, of_scale = channel_sums(gradient), channel_sums(gradient * normalized)
    count = x.size // x.shape[-1]
    of_x = (inverse * scale) * (gradient - of_bias / count - normalized * (of_scale / count))
    return of_x.astype(x.dtype), of_scale, of_bias, None


normalized_batch.defvjp(_normalize, _normalize_gradients)


class BatchNorm(nn.Module):
    """Batch norm over all axes but the last, with statistics as PyTorch keeps them.

    The batch is normalised by its biased variance, the running variance is the unbiased one (n/(n−1)); statistics are
    float32 whatever the compute dtype. Under a sharded `jit` the batch is the global one.
    """

    momentum: float = 0.9
    epsilon: float = 1e-5
    affine: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        channels = x.shape[-1]
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,), jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, (channels,), jnp.float32)
        scale, bias = jnp.ones(channels), jnp.zeros(channels)
        if self.affine:
            scale = self.param("scale", nn.initializers.ones, (channels,))
            bias = self.param("bias", nn.initializers.zeros, (channels,))
        if not train:
            gain = jax.lax.rsqrt(running_var.value + self.epsilon) * scale
            return ((x - running_mean.value) * gain + bias).astype(x.dtype)
        out, mean, var = normalized_batch(x, scale, bias, self.epsilon)
        if not self.is_initializing():
            count = x.size // channels
            unbiased = var * (count / max(count - 1, 1))
            running_mean.value = self.momentum * running_mean.value + (1 - self.momentum) * mean
            running_var.value = self.momentum * running_var.value + (1 - self.momentum) * unbiased
        return out
