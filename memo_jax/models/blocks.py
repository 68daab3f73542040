"""How residual blocks are run: one after another, as a loop, or rematerialised in the backward pass."""

import functools
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from memo_jax.models.layers import CONVOLUTION, STATISTICS
from memo_jax.xla.compiler import materialize_on_cpu

# What the backward pass recomputes to save memory: nothing; norms, activations and cheap convolutions, from the outputs
# of the other convolutions; or all of a block, from its input.
REMATS = {
    "none": None,
    "norms": jax.checkpoint_policies.save_only_these_names(CONVOLUTION, STATISTICS),
    "blocks": jax.checkpoint_policies.nothing_saveable,
}


def run_with_remat(
    run: Callable[[nn.Module, jax.Array], jax.Array], module: nn.Module, x: jax.Array, remat: str
) -> jax.Array:
    """Returns run(module, x), rematerialised in the backward pass as `remat`, one of REMATS, says."""
    if remat != "none" and not module.is_initializing():
        run = nn.remat(run, policy=REMATS[remat])
    return run(module, x)


def run_blocks(
    parent: nn.Module,
    block: Callable[..., nn.Module],
    names: Sequence[str],
    x: jax.Array,
    lengths: jax.Array | None,
    train: bool,
    *,
    scan: bool = False,
    remat: str = "none",
) -> jax.Array:
    """Runs blocks of the same shape one after another and returns the output [N, ...] of the last.

    Args:
      parent: the module that they belong to.
      block: makes one of them, a module (x, lengths, train) → x, given `name` or `parent`.
      names: of the submodules.
      x: [N, ...], input of the first block.
      lengths: [N] valid frames, or None.
      train: whether batch norms use and update the statistics of the batch.
      scan: in train mode, run them as a loop, whose body is compiled once.
      remat: which of REMATS applies to each block in train mode.
    """
    if scan and len(names) > 1 and train and lengths is None and not parent.is_initializing():
        return _run_in_a_loop(parent, block, names, x, remat)

    def run(parent, x, name):
        x = block(name=name)(x, lengths, train)
        return materialize_on_cpu(x) if train else x

    for name in names:
        x = run_with_remat(functools.partial(run, name=name), parent, x, remat if train else "none")
    return x


def _run_in_a_loop(parent: nn.Module, block, names: Sequence[str], x: jax.Array, remat: str) -> jax.Array:
    """Does what `run_blocks` does with `scan` in train mode."""

    def run(x, variables):
        out, updated = block(parent=None).apply(variables, x, None, True, mutable=["batch_stats"])
        return materialize_on_cpu(out), updated["batch_stats"]

    if remat != "none":
        run = jax.checkpoint(run, prevent_cse=False, policy=REMATS[remat])
    variables = [{kind: parent.get_variable(kind, name) for kind in ("params", "batch_stats")} for name in names]
    x, updated = jax.lax.scan(run, x, jax.tree.map(lambda *parts: jnp.stack(parts), *variables))
    for i, name in enumerate(names):
        parent.put_variable("batch_stats", name, jax.tree.map(lambda part, i=i: part[i], updated))
    return x
