"""A backbone and its front end as a single JAX function, from waveforms to embeddings."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from memo_jax import features
from memo_jax.features import FRONT_ENDS
from memo_jax.models import Variables


def embed_waves(
    backbone: nn.Module, front_end: str, variables: Variables, waves: jax.Array, lengths: jax.Array
) -> jax.Array:
    """Returns the embeddings [N, D] of waves float [N, L] in [-1, 1] in evaluation mode; can be traced."""
    x, frames = FRONT_ENDS[front_end](waves, lengths)
    return backbone.apply(variables, x, frames)


# A function of the module, so that every evaluation of a training run reuses what the first one compiled.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _embed_integers(backbone, front_end, variables, waves, lengths):
    return embed_waves(backbone, front_end, variables, waves.astype(jnp.float32) / 32768, lengths)


def embedding_function(
    backbone: nn.Module, variables: Variables, front_end: str = "log_mel"
) -> Callable[[np.ndarray, np.ndarray], jax.Array]:
    """Returns the compiled function from int16 waves [N, L], lengths [N] to embeddings [N, D] in evaluation mode."""
    variables = jax.device_put(variables)  # only once: NumPy arrays would be copied to the device in every call
    return functools.partial(_embed_integers, backbone, front_end, variables)


@jax.jit
def statistics_of_waves(waves: jax.Array, lengths: jax.Array) -> jax.Array:
    """Returns mean and standard deviation over time of the log-mel frames, [N, 2F]: the channel baseline."""
    mel = features.mel_power(waves.astype(jnp.float32) / 32768, lengths)
    return features.log_mel_statistics(mel, features.frame_count(lengths))
