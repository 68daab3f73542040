"""DINO projection head: from an embedding to logits over prototypes."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from memo_jax.losses import l2_normalize
from memo_jax.models.layers import BatchNorm, Linear


def cut_normal(key, shape, dtype=jnp.float32):
    """Normal of deviation 0.02 truncated at ±2 (absolute), as the DINO recipes initialise their linears."""
    return 0.02 * jax.random.truncated_normal(key, -100.0, 100.0, shape, dtype)


def prototype_uniform(key, shape, dtype=jnp.float32):
    """U(±1/√bottleneck), PyTorch's default for a linear layer of that input."""
    bound = shape[0] ** -0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)


class DINOHead(nn.Module):
    """Embedding [N, D] → float32 logits [N, prototypes] in [−1, 1]: three linears, L2 norm, weight-normed prototypes.

    The gain of the weight norm is fixed at one, so the logits are cosines and no gain is stored: of the
    22,098,176 parameters that PyTorch counts for a head, 65,536 are gains that never change, and 22,032,640 are here.
    """

    prototypes: int = 65536
    hidden: int = 2048
    bottleneck: int = 256
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, train=False):
        zeros = nn.initializers.zeros
        for i in range(2):
            x = Linear(self.hidden, kernel_init=cut_normal, bias_init=zeros, dtype=self.dtype, name=f"linear_{i}")(x)
            # The references use the exact GELU; JAX defaults to the tanh approximation.
            x = jax.nn.gelu(BatchNorm(name=f"norm_{i}")(x, train), approximate=False)
        x = Linear(self.bottleneck, kernel_init=cut_normal, bias_init=zeros, dtype=self.dtype, name="linear_2")(x)
        x = l2_normalize(x.astype(jnp.float32))
        directions = self.param("prototypes", prototype_uniform, (self.bottleneck, self.prototypes))
        return jnp.matmul(x, l2_normalize(directions, axis=0), precision="highest")
