"""ResNet34 with temporal statistics pooling in the form of wespeaker and of the MeMo authors."""

import functools
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from memo_jax.models.blocks import run_blocks, run_with_remat
from memo_jax.models.layers import BatchNorm, Linear, PlaneConv, mask_time, mean_and_variance_time, strided_lengths
from memo_jax.models.packed import pack, packing


class BasicBlock(nn.Module):
    """Two 3×3 convolutions with batch norm and a shortcut, which is projected where the shape changes.

    `packed_channels` are those of a packed input (packed.py); the output is then packed, too.
    """

    features: int
    strides: tuple[int, int]  # of time, of frequency
    dtype: jnp.dtype = jnp.float32
    packed_channels: int | None = None

    @nn.compact
    def __call__(self, x: jax.Array, lengths: jax.Array | None, train: bool) -> jax.Array:
        """Planes [N, T, F, C] → [N, T', F', features]."""
        inside = self.features if self.packed_channels else None
        conv = functools.partial(PlaneConv, self.features, dtype=self.dtype)
        norm = functools.partial(BatchNorm, packed_channels=inside)
        shortcut = x
        if tuple(self.strides) != (1, 1) or (self.packed_channels or x.shape[-1]) != self.features:
            shortcut = conv(1, self.strides, packed_channels=self.packed_channels, name="shortcut")(x)
            shortcut = norm(name="shortcut_norm")(shortcut, train)
        x = conv(3, self.strides, packed_channels=self.packed_channels, name="conv_0")(x)
        lengths = strided_lengths(lengths, self.strides[0])
        x = mask_time(jax.nn.relu(norm(name="norm_0")(x, train)), lengths)
        x = norm(name="norm_1")(conv(packed_channels=inside, name="conv_1")(x), train)
        return mask_time(jax.nn.relu(x + shortcut), lengths)


class TemporalStatistics(nn.Module):
    """Mean and standard deviation over time of [N, T, F, C], flattened channel-major: [N, 2·C·F] float32 (TSTP)."""

    epsilon: float = 1e-7  # added to the variance before the root
    packed_channels: int | None = None  # of a packed input (packed.py)

    @nn.compact
    def __call__(self, x: jax.Array, lengths: jax.Array | None = None) -> jax.Array:
        """[N, T, F, C] → [N, 2·C·F] float32."""
        mean, variance = mean_and_variance_time(x, lengths)
        statistics = (mean, jnp.sqrt(variance + self.epsilon))
        if self.packed_channels:
            statistics = [s.reshape(s.shape[0], -1, self.packed_channels) for s in statistics]
        return jnp.concatenate([s.transpose(0, 2, 1).reshape(s.shape[0], -1) for s in statistics], axis=-1)


class ResNet34(nn.Module):
    """ResNet34: normalised log-mel [N, T, F] → embedding [N, embedding_dim] float32.

    1,988,656 parameters by default, 6,634,336 at base width 32. `second_embedding` adds ReLU, batch norm without affine
    part and another linear layer, an option of wespeaker's and 3D-Speaker's ResNets; 3D-Speaker's has a
    `pool_epsilon` of 1e-8. `stride` is that of the first convolution, over time and over frequency. `lengths` [N] are
    valid frames, as in `ECAPATDNN`.

    The other fields change neither parameters nor, up to rounding, results: `packed` lays planes out for TPUs
    (packed.py), `scan` loops over blocks of the same shape, which are then compiled once, `remat` is one of `REMATS`.
    """

    base_channels: int = 16
    embedding_dim: int = 256
    blocks: Sequence[int] = (3, 4, 6, 3)
    stride: int = 1
    dtype: jnp.dtype = jnp.float32
    second_embedding: bool = False
    pool_epsilon: float = 1e-7
    packed: bool = False
    scan: bool = False
    remat: str = "none"

    @nn.compact
    def __call__(self, x: jax.Array, lengths: jax.Array | None = None, train: bool = False) -> jax.Array:
        """Normalised log-mel [N, T, F] → embedding [N, embedding_dim] float32."""
        x = mask_time(x, lengths)[..., None]
        if self.packed:
            x = pack(x, packing(x.shape[2], self.base_channels))
        # Norms are recomputed a whole stage at a time: only the planes between stages are kept.
        by_stage = self.remat == "norms" and not self.scan
        for stage in range(len(self.blocks)):
            run = functools.partial(
                ResNet34.run_stage, stage=stage, lengths=lengths, train=train, remat="none" if by_stage else self.remat
            )
            x = run_with_remat(run, self, x, "norms" if by_stage and train else "none")
            lengths = strided_lengths(lengths, 2 if stage else self.stride)
        pooled = TemporalStatistics(self.pool_epsilon, self.packed_channels(len(self.blocks) - 1), name="pool")(
            x, lengths
        )
        embedding = Linear(self.embedding_dim, name="embedding")(pooled)
        if self.second_embedding:
            embedding = BatchNorm(affine=False, name="embedding_norm")(jax.nn.relu(embedding), train)
            embedding = Linear(self.embedding_dim, name="embedding_1")(embedding)
        return embedding

    def packed_channels(self, stage: int) -> int | None:
        """Returns the channels after a stage if planes are packed, else None."""
        return self.base_channels * 2**stage if self.packed else None

    def run_stage(self, x: jax.Array, *, stage: int, lengths: jax.Array | None, train: bool, remat: str) -> jax.Array:
        """Returns the planes after a stage; the stem belongs to the first one."""
        packed = self.packed_channels(max(stage - 1, 0))
        if stage == 0:
            of_input = 1 if self.packed else None
            strides = (self.stride, self.stride)
            x = PlaneConv(self.base_channels, 3, strides, self.dtype, packed_channels=of_input, name="stem")(x)
            lengths = strided_lengths(lengths, self.stride)
            x = mask_time(jax.nn.relu(BatchNorm(packed_channels=packed, name="stem_norm")(x, train)), lengths)
        names = [f"stage_{stage}_block_{i}" for i in range(self.blocks[stage])]
        width, halving = self.base_channels * 2**stage, min(stage, 1)  # how many blocks halve the plane
        for alike, stride in ((names[:halving], 2), (names[halving:], 1)):
            block = functools.partial(BasicBlock, width, (stride, stride), self.dtype, packed)
            x = run_blocks(self, block, alike, x, lengths, train, scan=self.scan, remat=remat)
            lengths = strided_lengths(lengths, stride if alike else 1)
            packed = self.packed_channels(stage)
        return x
