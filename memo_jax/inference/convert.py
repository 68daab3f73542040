"""Checkpoints of PyTorch to model files and back: what `memo-jax convert` does."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import memo_jax
from memo_jax.files import one_line, replacing
from memo_jax.inference import interop
from memo_jax.inference.model_file import Model, model_of_backbone, write_model
from memo_jax.models import parameter_count

TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")
# Of training, not of the network that embeds.
LEFT_OUT = {"wespeaker": ("projection.",), "speaker-net": ("self_head.", "cross_head.", "head.")}
PREFERRED_PARTS = ("teacher_ecapa", "teacher", "teacher_resnet", "teacher_campplus")

Tensors = dict[str, np.ndarray]


def torch_to_model(path: str | os.PathLike, kind: str | None = None, part: str | None = None) -> Model:
    """Returns the model of a PyTorch checkpoint's network, its front end that of the toolkit.

    Args:
      path: a safetensors file or what `torch.save` wrote; of the latter only tensors and plain values are read, and no
        code in it runs.
      kind: one of `interop.KINDS`; recognised by the parameters' names by default.
      part: which network of a checkpoint of several, as "teacher_ecapa" of Speaker-net's (the default there).

    Raises:
      FileNotFoundError: no such file.
      ImportError: torch is needed and is not there.
      ValueError: naming the file: not a checkpoint, not of that kind, no such part, names that are missing or have no
        place, tensors of a wrong shape.
    """
    if kind is not None and kind not in interop.KINDS:
        raise ValueError(f"unknown kind {kind!r}: choose one of {', '.join(interop.KINDS)}")
    path = Path(path)
    part, tensors = _chosen_part(networks_in(path), part, path)
    found = [fit for fit in interop.recognised(tensors) if kind in (None, fit[0])]
    where = f"{path}, {part}" if part else f"{path}"
    if not found:
        raise ValueError(
            f"{where}: the names are not those of {kind or 'any network known here'}; they begin with "
            f"{', '.join(list(tensors)[:3])}; kinds are {', '.join(interop.KINDS)}"
        )
    kind, backbone = found[0]
    prefixes = LEFT_OUT.get(kind, ())
    network = {name: tensor for name, tensor in tensors.items() if not name.startswith(prefixes)}
    try:
        module, variables = interop.backbone_from_torch(network, kind, backbone)
    except ValueError as error:
        raise ValueError(f"{where}: as a {backbone} of {kind}: {error}") from None
    provenance: dict[str, Any] = {
        "source": path.name,
        "kind": kind,
        "memo_jax": memo_jax.__version__,
        "parameters": parameter_count(variables["params"]),
        "left_out": len(tensors) - len(network),
    }
    if part:
        provenance["part"] = part
    if len(found) > 1:
        provenance["also_names_of"] = [other for other, _ in found[1:]]
    counts = {name: int(x) for name, x in network.items() if name.endswith(interop.COUNTER)}
    if counts:
        one = len(set(counts.values())) == 1
        provenance[interop.COUNTER] = next(iter(counts.values())) if one else counts
    return model_of_backbone(module, variables, front_end=interop.FRONT_END_OF_KIND[kind], provenance=provenance)


def model_to_torch(model: Model, kind: str) -> Tensors:
    """Returns a model's network as {PyTorch name: array} of that kind, the batch norms' counters included.

    Raises ValueError when the toolkit has no such network.
    """
    if model.arguments.get("stride", 1) != 1:
        raise ValueError(f"{kind} has no ecapa whose first convolution has a stride")
    tensors = interop.backbone_to_torch(
        model.variables, kind, model.backbone, model.arguments.get("form", "speechbrain")
    )
    counts = model.provenance.get(interop.COUNTER, 0)
    counters = [name.removesuffix("running_var") + interop.COUNTER for name in tensors if name.endswith("running_var")]
    return tensors | {
        name: np.array(counts.get(name, 0) if isinstance(counts, dict) else counts, np.int64) for name in counters
    }


def speaker_net_of_branches(variables: Mapping[str, Mapping[str, Any]]) -> dict[str, Tensors]:
    """Returns {role: {backbone: variables}} as the MeMo authors' program saves it: {"teacher_ecapa": {name: array}, …}."""
    return {
        f"{role}_{backbone}": {f"module.{name}": x for name, x in interop.branch_to_torch(branch, backbone).items()}
        for role, branches in variables.items()
        for backbone, branch in branches.items()
    }


def networks_in(path: Path) -> dict[str, Tensors]:
    """Returns the tensors of a checkpoint's networks by the networks' names; that of a file of one network is "".

    Optimisers and whatever else is no dictionary of tensors is passed over. Raises as `torch_to_model`.
    """
    networks: dict[str, Tensors] = {}
    for name, value in _content(path).items():
        if isinstance(value, np.ndarray):
            # A safetensors file of several networks has their names in front.
            part, _, rest = name.partition(".")
            if part.startswith(("student_", "teacher_")):
                networks.setdefault(part, {})[rest] = value
            else:
                networks.setdefault("", {})[name] = value
        elif isinstance(value, Mapping):
            tensors = {str(inner): x for inner, x in value.items() if isinstance(x, np.ndarray)}
            if tensors:
                networks[str(name)] = tensors
    for part, tensors in networks.items():
        if all(name.startswith("module.") for name in tensors):  # torch's DistributedDataParallel
            networks[part] = {name.removeprefix("module."): x for name, x in tensors.items()}
    if not networks:
        raise ValueError(f"{path}: holds no tensors")
    return networks


def _chosen_part(networks: Mapping[str, Tensors], part: str | None, path: Path) -> tuple[str, Tensors]:
    """The network of that name; by default the only one that is recognised, or a teacher."""
    names = ", ".join(name or "(the file itself)" for name in networks)
    if part is not None:
        if part not in networks:
            raise ValueError(f"{path}: has no part {part!r}; there is {names}")
        return part, networks[part]
    known = [name for name, tensors in networks.items() if interop.recognised(tensors)] or list(networks)
    for name in ("", *PREFERRED_PARTS):
        if name in known:
            return name, networks[name]
    if len(known) > 1:
        raise ValueError(f"{path}: several networks: choose a part of {names}")
    return known[0], networks[known[0]]


def _content(path: Path) -> Mapping[str, Any]:
    """What a checkpoint holds, its tensors as NumPy arrays."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    with path.open("rb") as file:
        start = file.read(2)
    if start == b"PK" or start[:1] == b"\x80":  # a zip file or a pickle
        return _torch_content(path)
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(path)
    except (SafetensorError, TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{path}: neither safetensors nor a PyTorch checkpoint ({error})") from None


def _torch_content(path: Path) -> Mapping[str, Any]:
    import pickle

    torch = _torch(f"{path} was written by torch.save, and reading it")
    # Plain numbers of NumPy, which schedules leave in the state of an optimiser; nothing here can run code.
    scalar = np._core.multiarray.scalar
    allowed = [np.dtype, np.dtypes.Float64DType, np.dtypes.Float32DType, np.dtypes.Int64DType]
    allowed += [(scalar, "numpy.core.multiarray.scalar"), (scalar, "numpy._core.multiarray.scalar")]
    try:
        with torch.serialization.safe_globals(allowed):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path}: holds more than tensors and plain values, which is not loaded since it could run code "
            f"({one_line(error)})"
        ) from None
    except (RuntimeError, EOFError, OSError, KeyError) as error:
        raise ValueError(f"{path}: not a PyTorch checkpoint, or damaged ({one_line(error)})") from None

    def converted(value):
        if isinstance(value, torch.Tensor):
            value = value.detach()
            return (value.float() if value.dtype in (torch.bfloat16, torch.float16) else value).contiguous().numpy()
        if isinstance(value, Mapping):
            return {key: converted(inner) for key, inner in value.items()}
        return value

    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: holds a {type(content).__name__}, not a dictionary of tensors")
    return converted(content)


def _torch(purpose: str):
    try:
        import torch
    except ImportError:
        raise ImportError(f"{purpose} needs PyTorch: pip install torch, or save as safetensors there") from None
    return torch


def write_tensors(path: str | os.PathLike, tensors: Mapping[str, Any]) -> Path:
    """Writes {name: array}, or {network: {name: array}}, whole or not at all.

    A name that ends in .pt, .pth, .ckpt or .bin is written by torch.save, nested as given; .safetensors without torch,
    a network's name in front of its tensors'. Raises ValueError for another ending and ImportError without torch.
    """
    path = Path(path)
    if path.suffix not in (".safetensors", *TORCH_SUFFIXES):
        raise ValueError(f"{path}: the name must end in .safetensors or {', '.join(TORCH_SUFFIXES)}")
    torch = None if path.suffix == ".safetensors" else _torch(f"writing {path}")

    def converted(value):
        if isinstance(value, Mapping):
            return {name: converted(inner) for name, inner in value.items()}
        return torch.from_numpy(np.array(value))

    with replacing(path) as partial:
        if torch is None:
            from safetensors.numpy import save

            flat = {".".join(filter(None, names)): np.ascontiguousarray(x) for names, x in _leaves(tensors)}
            partial.write_bytes(save(flat))
        else:
            torch.save(converted(tensors), partial)
    return path


def _leaves(tensors: Mapping[str, Any], names: tuple[str, ...] = ()):
    for name, value in tensors.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*names, name))
        else:
            yield (*names, name), value


def convert(source, output, kind: str | None = None, part: str | None = None) -> str:
    """Converts a PyTorch checkpoint to a model file; returns what a user wants to know about it."""
    model = torch_to_model(source, kind, part)
    write_model(output, model)
    about = model.provenance
    lines = [
        f"{about['kind']} {model.backbone}, {about['parameters']:,} parameters, embeddings of "
        f"{model.module.embedding_dim}, front end {model.front_end}",
        f"{output}",
    ]
    if "also_names_of" in about and kind is None:
        others = " and ".join(about["also_names_of"])
        lines.insert(1, f"{others} would give the same names but another front end: if it is from there, say --kind")
    if part is None and "part" in about:
        lines.insert(1, f"the checkpoint's part {about['part']}; choose another by --part")
    if about["left_out"]:
        lines.insert(1, f"{about['left_out']} tensors of heads and classifiers left out")
    return "\n".join(lines)


def convert_back(
    source, output, kind: str, branch: str | None = None, role: str | None = None, step: int | None = None
) -> str:
    """Converts a model file or a workdir's network to PyTorch's names; returns what a user wants to know about it.

    Of a workdir, speaker-net gets students and teachers with their heads, unless a branch or role is chosen.
    """
    from memo_jax.inference.embedder import load_model
    from memo_jax.training.checkpoint import load_raw

    if kind not in interop.KINDS:
        raise ValueError(f"unknown kind {kind!r}: choose one of {', '.join(interop.KINDS)}")
    whole = kind == "speaker-net" and os.path.isdir(source) and branch is None and role is None
    if whole:
        loaded = load_raw(source, step, only=["student", "teacher"])[0]
    else:
        loaded = load_model(source, branch=branch, role=role, step=step)
    try:
        tensors = speaker_net_of_branches(loaded) if whole else model_to_torch(loaded, kind)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    write_tensors(output, tensors)
    if whole:
        return f"speaker-net {', '.join(tensors)}, with heads\n{output}"
    lines = [f"{kind} {loaded.backbone}, {len(tensors)} tensors", f"{output}"]
    if interop.FRONT_END_OF_KIND[kind] != loaded.front_end:
        lines.insert(1, f"its input is {loaded.front_end}, while {kind} computes {interop.FRONT_END_OF_KIND[kind]}")
    return "\n".join(lines)
