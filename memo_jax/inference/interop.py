"""Conversion of weights from and to PyTorch: which of its tensors corresponds to which of ours.

A *kind* is a toolkit: speechbrain, wespeaker, 3dspeaker, or speaker-net, the MeMo authors' program. 3D-Speaker names an
ECAPA-TDNN as speechbrain does, and a ResNet and a CAM++ as wespeaker does. Speaker-net names all of them as 3D-Speaker
does, after "backbone.".
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from memo_jax.models import build_backbone

MELS = 80  # of the input of every network here
NORM = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
COUNTER = "num_batches_tracked"  # of a batch norm in PyTorch; computes nothing

# Their names for our modules. "#" stands for a number in our name; {0}, {1} … are these numbers, then each plus one,
# then each plus two. "parent/module" takes precedence over "module".
SPEECHBRAIN_ECAPA = {
    "stem": "blocks.0",
    "block_#": "blocks.{1}",
    "reduce": "tdnn1",
    "expand": "tdnn2",
    "shortcut": "shortcut.conv",
    "res2": "res2net_block",
    "chunk_#": "blocks.{0}",
    "conv": "conv.conv",
    "norm": "norm.norm",
    "se": "se_block",
    "squeeze": "conv1.conv",
    "excite": "conv2.conv",
    "aggregate": "mfa",
    "pool": "asp",
    "hidden": "tdnn.conv.conv",
    "pool/norm": "tdnn.norm.norm",
    "attention": "conv.conv",
    "pool_norm": "asp_bn.norm",
    "embedding": "fc.conv",
}
WESPEAKER_ECAPA = {
    "stem": "layer1",
    "block_#": "layer{2}.se_res2block",
    "reduce": "0",
    "res2": "1",
    "expand": "2",
    "se": "3",
    "conv": "conv",
    "norm": "bn",
    "chunk_#": "",
    "chunk_#/conv": "convs.{0}",
    "chunk_#/norm": "bns.{0}",
    "squeeze": "linear1",
    "excite": "linear2",
    "aggregate": "conv",
    "pool": "pool",
    "hidden": "linear1",
    "attention": "linear2",
    "pool_norm": "bn",
    "embedding": "linear",
    "embedding_norm": "bn2",
}
RESIDUAL_BLOCK = {
    "conv_#": "conv{1}",
    "norm_#": "bn{1}",
    "shortcut": "shortcut.0",
    "shortcut_norm": "shortcut.1",
    "stage_#_block_#": "layer{2}.{1}",
}
RESNET = RESIDUAL_BLOCK | {
    "stem": "conv1",
    "stem_norm": "bn1",
    "embedding": "seg_1",
    "embedding_norm": "seg_bn_1",
    "embedding_#": "seg_2",
}
CAMPPLUS = RESIDUAL_BLOCK | {
    "front_end": "head",
    "front_end/stem": "conv1",
    "front_end/stem_norm": "bn1",
    "front_end/reduce": "conv2",
    "front_end/reduce_norm": "bn2",
    "stem": "xvector.tdnn.linear",
    "stem_norm": "xvector.tdnn.nonlinear.batchnorm",
    "block_#_layer_#": "xvector.block{2}.tdnnd{3}",
    "reduce": "",
    "reduce/norm": "nonlinear1.batchnorm",
    "reduce/conv": "linear1",
    "block_#_layer_#/norm": "nonlinear2.batchnorm",
    "masking": "cam_layer",
    "local": "linear_local",
    "squeeze": "linear1",
    "excite": "linear2",
    "transit_#": "xvector.transit{1}",
    "transit_#/norm": "nonlinear.batchnorm",
    "transit_#/conv": "linear",
    "norm": "xvector.out_nonlinear.batchnorm",
    "embedding": "xvector.dense.linear",
    "embedding_norm": "xvector.dense.nonlinear.batchnorm",
}
HEAD_MODULES = {"linear_0": "mlp.0", "norm_0": "mlp.1", "linear_1": "mlp.3", "norm_1": "mlp.4", "linear_2": "mlp.6"}
# In these modules our kernels have a time axis of length one, and theirs have none.
SQUEEZED = {"squeeze", "excite", "embedding"}

MODULES: dict[str, dict[str, dict[str, str]]] = {
    "speechbrain": {"ecapa": SPEECHBRAIN_ECAPA},
    "wespeaker": {"ecapa": WESPEAKER_ECAPA, "resnet": RESNET, "campplus": CAMPPLUS},
    "3dspeaker": {"ecapa": SPEECHBRAIN_ECAPA, "resnet": RESNET, "campplus": CAMPPLUS},
    "speaker-net": {"ecapa": SPEECHBRAIN_ECAPA, "resnet": RESNET, "campplus": CAMPPLUS},
}
TOOLKITS = tuple(MODULES)
BACKBONE_PREFIX = {"speaker-net": "backbone."}
FRONT_END_OF_KIND = {  # how each toolkit computes its networks' input: a name in `features.FRONT_ENDS`
    "speechbrain": "speechbrain_fbank",
    "wespeaker": "wespeaker_fbank",
    "3dspeaker": "kaldi_fbank",
    "speaker-net": "log_mel",
}
# Patterns of names that only one of the networks has, and the toolkit that introduced the network.
MARKERS = (
    (r"layer\d\.se_res2block\.", WESPEAKER_ECAPA, "wespeaker"),
    (r"xvector\.", CAMPPLUS, "3dspeaker"),
    (r"blocks\.\d\.(tdnn|res2net_block)", SPEECHBRAIN_ECAPA, "speechbrain"),
    (r"layer\d\.\d+\.(conv|bn|shortcut)", RESNET, "wespeaker"),
)


def torch_name(path: tuple[str, ...], modules: Mapping[str, str]) -> str:
    """Returns PyTorch's name of the tensor at our path. Raises KeyError for a module that has no counterpart."""
    *ours, leaf = path
    parts = []
    for parent, module in zip(["", *ours], ours):
        within = f"{parent}/{module}"
        key = next((key for key in (_numberless(within), module, _numberless(module)) if key in modules), module)
        numbers = [int(number) for number in re.findall(r"\d+", within if "/" in key else module)]
        parts.append(modules[key].format(*numbers, *(n + 1 for n in numbers), *(n + 2 for n in numbers)))
    return ".".join([*filter(None, parts), "weight" if leaf == "kernel" else NORM[leaf]])


def _numberless(text: str) -> str:
    return re.sub(r"\d+", "#", text)


def recognised(names: Iterable[str]) -> list[tuple[str, str]]:
    """Returns every (kind, backbone) that has tensors of these names, the toolkit that introduced the network first.

    Empty for names that no toolkit here uses.
    """
    found = []
    for kind in TOOLKITS:
        prefix = re.escape(BACKBONE_PREFIX.get(kind, ""))
        for marker, modules, origin in MARKERS:
            if any(re.match(prefix + marker, name) for name in names):
                fits = [(kind, backbone) for backbone, theirs in MODULES[kind].items() if theirs is modules]
                found = fits + found if kind == origin else found + fits
                break
    return found


def backbone_of(tensors: Mapping[str, np.ndarray], kind: str, backbone: str) -> nn.Module:
    """Returns the backbone with the sizes that these tensors have; the usual size where a tensor is missing."""
    prefix = BACKBONE_PREFIX.get(kind, "")

    def size(name: str, axis: int, usual: int) -> int:
        shape = np.shape(tensors.get(prefix + name, ()))
        return shape[axis] if len(shape) > axis else usual

    def count(pattern: str) -> int:
        """Returns how many different numbers stand in the place of the pattern's group, among names that match it."""
        matches = (re.match(re.escape(prefix) + pattern, name) for name in tensors)
        return len({match[1] for match in matches if match})

    if backbone == "resnet":
        return build_backbone(
            "resnet",
            base_channels=size("conv1.weight", 0, 32),
            embedding_dim=size("seg_1.weight", 0, 256),
            blocks=tuple(count(rf"layer{stage}\.(\d+)\.") for stage in range(1, 5)),
            second_embedding=prefix + "seg_2.weight" in tensors,
            pool_epsilon=1e-8 if kind == "3dspeaker" else 1e-7,
        )
    if backbone == "campplus":
        growth = size("xvector.block1.tdnnd1.cam_layer.linear_local.weight", 0, 32)
        return build_backbone(
            "campplus",
            embedding_dim=size("xvector.dense.linear.weight", 0, 512),
            growth=growth,
            layers=tuple(count(rf"xvector\.block{block}\.tdnnd(\d+)\.") for block in range(1, 4)),
            stem_channels=size("xvector.tdnn.linear.weight", 0, 128),
            plane_channels=size("head.conv1.weight", 0, 32),
            plane_blocks=tuple(count(rf"head\.layer{stage}\.(\d+)\.") for stage in (1, 2)),
            kernel_size=size("xvector.block1.tdnnd1.cam_layer.linear_local.weight", 2, 3),
            bottleneck=size("xvector.block1.tdnnd1.linear1.weight", 0, 128) // growth,
        )
    if MODULES[kind]["ecapa"] is WESPEAKER_ECAPA:
        width, wide = size("layer1.conv.weight", 0, 512), size("conv.weight", 0, 1536)
        return build_backbone(
            "ecapa",
            channels=(width,) * 4 + (wide,),
            embedding_dim=size("linear.weight", 0, 192),
            form="wespeaker",
            scale=count(r"layer2\.se_res2block\.1\.convs\.(\d+)\.") + 1,
            se_bottleneck=size("layer2.se_res2block.3.linear1.weight", 0, 128),
            attention_bottleneck=size("pool.linear1.weight", 0, 128),
            global_context=size("pool.linear1.weight", 1, 3 * wide) != wide,
            embedding_norm=prefix + "bn2.weight" in tensors,
        )
    blocks = max(count(r"blocks\.(\d+)\."), 2) - 1
    wide = size("mfa.conv.conv.weight", 0, 1536)
    return build_backbone(
        "ecapa",
        embedding_dim=size("fc.conv.weight", 0, 192),
        channels=(
            size("blocks.0.conv.conv.weight", 0, 512),
            *(size(f"blocks.{i}.tdnn1.conv.conv.weight", 0, 512) for i in range(1, blocks + 1)),
            wide,
        ),
        kernel_sizes=(
            size("blocks.0.conv.conv.weight", 2, 5),
            *(size(f"blocks.{i}.res2net_block.blocks.0.conv.conv.weight", 2, 3) for i in range(1, blocks + 1)),
        ),
        dilations=tuple(range(1, blocks + 2)),
        scale=count(r"blocks\.1\.res2net_block\.blocks\.(\d+)\.") + 1,
        se_bottleneck=size("blocks.1.se_block.conv1.conv.weight", 0, 128),
        attention_bottleneck=size("asp.tdnn.conv.conv.weight", 0, 128),
        global_context=size("asp.tdnn.conv.conv.weight", 1, 3 * wide) != wide,
    )


def shapes_of(module: nn.Module) -> Any:
    """Returns the variables of a backbone or a branch as shapes (`jax.ShapeDtypeStruct`)."""
    return dict(jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros((2, 32, MELS)), train=True)))


def torch_tensors(
    variables: Any, name: Callable[[tuple[str, ...]], str], squeezed: bool = False
) -> Iterator[tuple[tuple[str, ...], str, tuple[int, ...]]]:
    """Yields our path, their name and their shape for every array in a tree of variables."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
        ours = tuple(entry.key for entry in path)
        shape = np.shape(leaf)
        # PyTorch's [out, in, (frequency,) time] is ours in reverse.
        if ours[-1] in ("kernel", "prototypes"):
            shape = shape[::-1]
            if squeezed and ours[-2] in SQUEEZED:
                shape = shape[:-1]
        yield ours, name(ours[1:]), shape


def from_torch(tensors: Mapping[str, np.ndarray], like: Any, name: Callable, squeezed: bool = False) -> Any:
    """Returns variables of the shapes of `like` with the values of PyTorch's tensors.

    Args:
      tensors: {their name: array}.
      like: variables, or their shapes.
      name: the function from our path to their name.
      squeezed: whether their kernels omit our time axis of length one in the modules of `SQUEEZED`.

    Raises:
      ValueError: lists the names that are missing and those that have no place, or the tensors of a wrong shape with
        both shapes, or names a tensor with NaN or infinite values or negative variances.
    """
    places = {theirs: (ours, shape) for ours, theirs, shape in torch_tensors(like, name, squeezed)}
    missing = [theirs for theirs in places if theirs not in tensors]
    unknown = [theirs for theirs in tensors if theirs not in places and not theirs.endswith(COUNTER)]
    if missing or unknown:
        raise ValueError(
            "; ".join(
                f"{len(names)} {what}: {_some(names)}"
                for what, names in (("missing", missing), ("unmatched", unknown))
                if names
            )
        )
    wrong = [
        f"tensor {theirs!r} has shape {list(np.shape(tensors[theirs]))}, expected {list(shape)}"
        for theirs, (_, shape) in places.items()
        if np.shape(tensors[theirs]) != shape
    ]
    if wrong:
        raise ValueError(_some(wrong, "; "))
    with np.errstate(over="ignore"):  # of doubles beyond float32: reported in the next lines
        values = {ours: np.asarray(tensors[theirs], np.float32) for theirs, (ours, _) in places.items()}
    for theirs, (ours, _) in places.items():
        bad = values[ours].size - int(np.isfinite(values[ours]).sum())
        if bad:
            raise ValueError(f"tensor {theirs!r} has {bad:,} of {values[ours].size:,} values that are NaN or infinite")
        if ours[-1] == "var" and (values[ours] < 0).any():
            raise ValueError(f"tensor {theirs!r} has negative values, which no variance has")

    def value(ours, leaf):
        transposed = values[ours].T if ours[-1] in ("kernel", "prototypes") else values[ours]
        return np.ascontiguousarray(transposed).reshape(leaf.shape)

    return traverse_util.path_aware_map(value, like)


def _some(texts, separator: str = ", ") -> str:
    return separator.join([*texts[:8], *([f"and {len(texts) - 8} more"] if len(texts) > 8 else [])])


def to_torch(variables: Any, name: Callable, squeezed: bool = False) -> dict[str, np.ndarray]:
    """Returns variables as {their name: array}; raises ValueError if the toolkit lacks one of our modules."""
    leaves = {path: np.asarray(x) for path, x in traverse_util.flatten_dict(variables).items()}
    tensors = {}
    try:
        for ours, theirs, shape in torch_tensors(variables, name, squeezed):
            transposed = leaves[ours].T if ours[-1] in ("kernel", "prototypes") else leaves[ours]
            tensors[theirs] = np.ascontiguousarray(transposed).reshape(shape)
    except KeyError as error:
        raise ValueError(f"the toolkit has no counterpart of our module {error.args[0]!r}") from None
    return tensors


def backbone_from_torch(tensors: Mapping[str, np.ndarray], kind: str, backbone: str) -> tuple[nn.Module, Any]:
    """Returns a backbone, with the sizes that the tensors have, and its variables.

    Args:
      tensors: {name: array} of a single network and nothing else.
      kind: one of `TOOLKITS`.
      backbone: "ecapa", "resnet" or "campplus".

    Raises:
      ValueError: as for `from_torch`.
    """
    module = backbone_of(tensors, kind, backbone)
    modules, prefix = MODULES[kind][backbone], BACKBONE_PREFIX.get(kind, "")
    variables = from_torch(
        tensors, shapes_of(module), lambda path: prefix + torch_name(path, modules), modules is WESPEAKER_ECAPA
    )
    return module, variables


def backbone_to_torch(variables: Any, kind: str, backbone: str, form: str = "speechbrain") -> dict[str, np.ndarray]:
    """Returns a backbone's variables as {name: array} of that kind.

    Args:
      variables: of the backbone alone.
      kind: one of `TOOLKITS`.
      backbone: "ecapa", "resnet" or "campplus".
      form: of an ECAPA-TDNN: "speechbrain" or "wespeaker".

    Raises:
      ValueError: the toolkit has no such network.
    """
    modules, prefix = MODULES[kind].get(backbone), BACKBONE_PREFIX.get(kind, "")
    if modules is None or (backbone == "ecapa" and (modules is WESPEAKER_ECAPA) != (form == "wespeaker")):
        network = f"ecapa in {form}'s form" if backbone == "ecapa" else backbone
        raise ValueError(f"{kind} has no {network}: choose another of {', '.join(TOOLKITS)}")
    return to_torch(variables, lambda path: prefix + torch_name(path, modules), modules is WESPEAKER_ECAPA)


def branch_torch_name(backbone: str) -> Callable[[tuple[str, ...]], str]:
    """Returns the function from a path inside a branch's variables to Speaker-net's name."""

    def name(path: tuple[str, ...]) -> str:
        part, *rest = path
        if part == "backbone":
            return f"backbone.{torch_name(tuple(rest), MODULES['speaker-net'][backbone])}"
        if rest[-1] == "prototypes":
            return f"{part}.last_layer.weight_v"
        return f"{part}.{torch_name(tuple(rest), HEAD_MODULES)}"

    return name


def branch_from_torch(tensors: Mapping[str, np.ndarray], like: Any, backbone: str) -> Any:
    """Returns a branch's variables with the values of torch-named tensors.

    Args:
      tensors: {Speaker-net name: array}.
      like: variables of the same shape (`jax.eval_shape` of an initialisation will do).
      backbone: "ecapa", "resnet" or "campplus".

    Raises:
      ValueError: as for `from_torch`, or a gain of the weight-normed prototypes is not one.
    """
    for theirs, gains in tensors.items():
        if theirs.endswith("weight_g") and not np.all(np.asarray(gains) == 1):
            raise ValueError(f"tensor {theirs!r} has gains other than 1; ours are fixed there")
    network = {theirs: tensor for theirs, tensor in tensors.items() if not theirs.endswith("weight_g")}
    return from_torch(network, like, branch_torch_name(backbone))


def branch_to_torch(variables: Any, backbone: str) -> dict[str, np.ndarray]:
    """Returns a branch's variables as {Speaker-net name: array}; the weight norms' gains, all one, are included.

    Raises ValueError for an ECAPA-TDNN in wespeaker's form, which Speaker-net does not have.
    """
    if "kernel" in variables["params"]["backbone"].get("aggregate", ()):
        raise ValueError("speaker-net has no ecapa in wespeaker's form")
    tensors = to_torch(variables, branch_torch_name(backbone))
    gains = {
        name.replace("weight_v", "weight_g"): np.ones((directions.shape[0], 1), np.float32)
        for name, directions in tensors.items()
        if name.endswith("last_layer.weight_v")
    }
    return tensors | gains
