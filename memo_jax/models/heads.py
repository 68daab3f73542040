"""Heads: from an embedding to logits over prototypes (DINO's), or to cosines with speakers."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from memo_jax.models.layers import BatchNorm, Linear, bias_uniform, l2_normalize, parameter
from memo_jax.xla.reductions import sum_from_first_axis

LENGTH_EPSILON = 1e-12  # the least norm of a prototype
# Of the DINO recipes' linear layers: deviation 0.02, cut at ±2.
cut_normal = nn.initializers.truncated_normal(0.02, lower=-100.0, upper=100.0)


class DINOHead(nn.Module):
    """Embedding [N, D] → float32 logits [N, prototypes] in [−1, 1]: three linears, L2 norm, weight-normed prototypes.

    The gain of the weight norm is fixed at one: the logits are cosines, and no gain is stored. Of the 22,098,176
    parameters that PyTorch counts for a head, 65,536 are such gains; the other 22,032,640 are here.
    """

    prototypes: int = 65536
    hidden: int = 2048
    bottleneck: int = 256
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        """Makes the layers before the prototypes."""

        def linear(features, name):
            return Linear(
                features, kernel_init=cut_normal, bias_init=nn.initializers.zeros, dtype=self.dtype, name=name
            )

        self.hidden_layers = [(linear(self.hidden, f"linear_{i}"), BatchNorm(name=f"norm_{i}")) for i in range(2)]
        self.last_linear = linear(self.bottleneck, "linear_2")

    def project(self, x: jax.Array, train: bool = False) -> tuple[jax.Array, jax.Array]:
        """Returns the output of the linears for embeddings [N, D], and its direction; each float32 [N, bottleneck]."""
        for linear, norm in self.hidden_layers:
            # The references use the exact GELU; JAX defaults to the tanh approximation.
            x = jax.nn.gelu(norm(linear(x), train), approximate=False)
        projections = self.last_linear(x).astype(jnp.float32)
        return projections, l2_normalize(projections)

    @nn.compact
    def cosines(self, units: jax.Array) -> jax.Array:
        """Returns the cosines of unit vectors [..., bottleneck] with the prototypes, [..., prototypes]."""
        directions = parameter(self, "prototypes", bias_uniform(self.bottleneck), (self.bottleneck, self.prototypes))
        # The products are divided by the norms of the prototypes. Normalised prototypes would be a copy as large as
        # they are, with as large a gradient: larger than all else here.
        inverse = jax.lax.rsqrt(jnp.maximum(sum_from_first_axis(jnp.square(directions), 0), LENGTH_EPSILON**2))
        return jnp.matmul(units, directions, precision="highest") * inverse

    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Embedding [N, D] → logits float32 [N, prototypes]."""
        return self.cosines(self.project(x, train)[1])


class SpeakerHead(nn.Module):
    """Embedding [N, D] → its cosines with one direction per speaker, float32 [N, speakers]."""

    speakers: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Compares embeddings with all speakers."""
        directions = parameter(self, "directions", nn.initializers.xavier_uniform(), (x.shape[-1], self.speakers))
        units = l2_normalize(x.astype(jnp.float32))
        return jnp.matmul(units, l2_normalize(directions, axis=0), precision="highest")
