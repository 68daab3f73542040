"""Residual blocks one after another: as they are, as a loop, or made again in the backward pass to save memory."""

import functools
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from memo_jax.models.layers import CONVOLUTION, STATISTICS
from memo_jax.xla.compiler import cpu_barrier

# What the backward pass makes again rather than keep it: nothing; norms, activations and cheap convolutions, from the
# outputs of the others; or all of a block, from its input.
REMATS = {
    "none": None,
    "norms": jax.checkpoint_policies.save_only_these_names(CONVOLUTION, STATISTICS),
    "blocks": jax.checkpoint_policies.nothing_saveable,
}


def run_with_remat(run, module: nn.Module, x: jax.Array, remat: str) -> jax.Array:
    """Returns run(module, x), in whose backward pass is made again what `remat`, one of REMATS, does not keep."""
    if remat != "none" and not module.is_initializing():
        run = nn.remat(run, policy=REMATS[remat])
    return run(module, x)


def run_blocks(
    parent: nn.Module,
    block,
    names: Sequence[str],
    x: jax.Array,
    lengths: jax.Array | None,
    train: bool,
    *,
    scan: bool = False,
    remat: str = "none",
) -> jax.Array:
    """Runs blocks (x, lengths, train) → x that are alike one after another.

    Args:
      parent: whose submodules by these names they are.
      block: makes one of them, given `name` or `parent`.
      x, lengths, train: what the first one takes.
      scan: in train mode they become a loop, whose body is compiled once for all of them.
      remat: which of REMATS holds of each block in train mode.
    """
    if scan and len(names) > 1 and train and lengths is None and not parent.is_initializing():
        return _run_in_a_loop(parent, block, names, x, remat)

    def run(parent, x, name):
        x = block(name=name)(x, lengths, train)
        return cpu_barrier(x) if train else x

    for name in names:
        x = run_with_remat(functools.partial(run, name=name), parent, x, remat if train else "none")
    return x


def _run_in_a_loop(parent: nn.Module, block, names: Sequence[str], x: jax.Array, remat: str) -> jax.Array:
    """As `run_blocks` with `scan`, in train mode."""

    def run(x, variables):
        out, updated = block(parent=None).apply(variables, x, None, True, mutable=["batch_stats"])
        return cpu_barrier(out), updated["batch_stats"]

    if remat != "none":
        run = jax.checkpoint(run, prevent_cse=False, policy=REMATS[remat])
    variables = [{kind: parent.get_variable(kind, name) for kind in ("params", "batch_stats")} for name in names]
    x, updated = jax.lax.scan(run, x, jax.tree.map(lambda *parts: jnp.stack(parts), *variables))
    for i, name in enumerate(names):
        parent.put_variable("batch_stats", name, jax.tree.map(lambda part: part[i], updated))  # noqa: B023
    return x
