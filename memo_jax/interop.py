"""Weights from and to PyTorch: which of their tensors is which of ours."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

# Our names of a batch norm's variables and theirs.
NORM = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}


def speechbrain_ecapa_name(path: tuple[str, ...]) -> str:
    """Returns speechbrain's name of the tensor at our path inside an ECAPA-TDNN."""
    *modules, leaf = path

    def block(name):
        return f"blocks.{int(name.removeprefix('block_')) + 1}"

    names = {
        "stem": "blocks.0", "aggregate": "mfa", "reduce": "tdnn1", "expand": "tdnn2", "shortcut": "shortcut",
        "conv": "conv.conv", "norm": "norm.norm", "se": "se_block", "squeeze": "conv1.conv", "excite": "conv2.conv",
        "res2": "res2net_block", "pool": "asp", "pool_norm": "asp_bn.norm", "embedding": "fc.conv",
        "hidden": "tdnn.conv.conv", "attention": "conv.conv",
    }
    parts = []
    for i, module in enumerate(modules):
        if module.startswith("block_"):
            parts.append(block(module))
        elif module.startswith("chunk_"):
            parts.append(f"blocks.{module.removeprefix('chunk_')}")
        elif module == "norm" and modules[:i] == ["pool"]:
            parts.append("tdnn.norm.norm")
        elif module == "shortcut":
            parts.append("shortcut.conv")
        else:
            parts.append(names[module])
    return ".".join(parts + [torch_leaf(leaf)])


def wespeaker_resnet_name(path: tuple[str, ...]) -> str:
    """Returns wespeaker's name of the tensor at our path inside a ResNet."""
    *modules, leaf = path
    names = {
        "stem": "conv1", "stem_norm": "bn1", "conv_0": "conv1", "norm_0": "bn1", "conv_1": "conv2", "norm_1": "bn2",
        "shortcut": "shortcut.0", "shortcut_norm": "shortcut.1", "embedding": "seg_1",
    }
    parts = []
    for module in modules:
        if module.startswith("stage_"):
            _, stage, _, index = module.split("_")
            parts.append(f"layer{int(stage) + 1}.{index}")
        else:
            parts.append(names[module])
    return ".".join(parts + [torch_leaf(leaf)])


def speaker_net_head_name(path: tuple[str, ...]) -> str:
    """Returns the MeMo authors' name of the tensor at our path inside a DINO head."""
    *modules, leaf = path
    if leaf == "prototypes":
        return "last_layer.weight_v"
    names = {"linear_0": "mlp.0", "norm_0": "mlp.1", "linear_1": "mlp.3", "norm_1": "mlp.4", "linear_2": "mlp.6"}
    return f"{names[modules[0]]}.{torch_leaf(leaf)}"


def torch_leaf(leaf: str) -> str:
    """Returns PyTorch's name of one of our variables inside its module."""
    return "weight" if leaf == "kernel" else NORM[leaf]


NAMES: dict[str, Callable[[tuple[str, ...]], str]] = {
    "ecapa": speechbrain_ecapa_name,
    "resnet": wespeaker_resnet_name,
    "head": speaker_net_head_name,
}


def transposed_kernel(leaf: str, value: np.ndarray) -> np.ndarray:
    """Returns a kernel or prototypes with their axes reversed, anything else as it is.

    PyTorch's [out, in, (frequency,) time] is ours backwards, so this leads both ways.
    """
    return value.T if leaf in ("kernel", "prototypes") else value


def torch_names(variables: Mapping[str, Any], backbone: str) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yields (our path, Speaker-net's name) for every array of a branch's variables.

    Our paths begin with "params" or "batch_stats", then "backbone", "self_head" or "cross_head".
    """
    for path, _ in jax.tree_util.tree_leaves_with_path(variables):
        ours = tuple(entry.key for entry in path)
        part, rest = ours[1], ours[2:]
        name = NAMES[backbone if part == "backbone" else "head"](rest)
        yield ours, f"{part}.{name}"


def branch_from_torch(tensors: Mapping[str, np.ndarray], like: Any, backbone: str) -> Any:
    """Returns a branch's variables with the values of torch-named tensors.

    Args:
      tensors: {Speaker-net name: array}.
      like: variables of the same shape (`jax.eval_shape` of an initialisation will do).
      backbone: "ecapa" or "resnet".

    Raises:
      ValueError: a tensor is missing or has another shape; the message names it.
    """
    flat = {}
    for ours, theirs in torch_names(like, backbone):
        if theirs not in tensors:
            raise ValueError(f"no tensor {theirs!r} among the {len(tensors)} given")
        flat[ours] = transposed_kernel(ours[-1], np.asarray(tensors[theirs], np.float32))

    def value(path, leaf):
        ours = tuple(entry.key for entry in path)
        if flat[ours].shape != leaf.shape:
            theirs = dict(torch_names(like, backbone))[ours]
            raise ValueError(f"tensor {theirs!r} has shape {flat[ours].shape} in our layout, expected {leaf.shape}")
        return flat[ours]

    return jax.tree_util.tree_map_with_path(value, like)


def branch_to_torch(variables: Any, backbone: str) -> dict[str, np.ndarray]:
    """Returns a branch's variables as {Speaker-net name: array}; the weight norms' gains, all one, are included."""
    leaves = {tuple(e.key for e in path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(variables)}
    tensors = {}
    for ours, theirs in torch_names(variables, backbone):
        tensors[theirs] = transposed_kernel(ours[-1], leaves[ours])
        if ours[-1] == "prototypes":
            prototypes = tensors[theirs].shape[0]
            tensors[theirs.replace("weight_v", "weight_g")] = np.ones((prototypes, 1), np.float32)
    return tensors
