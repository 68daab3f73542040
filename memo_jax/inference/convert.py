"""Checkpoints of PyTorch to model files and back: what `memo-jax convert` does."""

import os
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import numpy as np

from memo_jax.features import FRONT_ENDS
from memo_jax.files import check_writable, is_zip, one_line, replacing
from memo_jax.inference import interop
from memo_jax.inference.model_file import ENSEMBLE, Model, model_of_backbone, write_model
from memo_jax.models import SPEAKER_HEAD, parameter_count
from memo_jax.version import __version__

TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")
# Of training, not of the network that embeds.
UNUSED_PREFIXES = {"wespeaker": ("projection.",), "speaker-net": ("self_head.", "cross_head.", "head.")}
PREFERRED_PARTS = ("teacher_ecapa", "teacher", "teacher_resnet", "teacher_campplus")
# Names that wrappers put before a network's own: DataParallel, torch.compile, Lightning and most trainers. They do not
# distinguish the networks of a checkpoint, so the names of parts omit them.
WRAPPERS = frozenset({"module", "_orig_mod", "model", "state_dict", "model_state_dict", "network", "net", "encoder"})
FRONT_END_KEY = "memo_jax_front_end"  # in the metadata of safetensors that we write

Tensors = dict[str, np.ndarray]


class Unusable(NamedTuple):
    """A tensor of a checkpoint that is not read, and why not: an error only if a network needs it."""

    reason: str


def torch_to_model(
    path: str | os.PathLike, kind: str | None = None, part: str | None = None, front_end: str | None = None
) -> Model:
    """Returns the model of a network in a PyTorch checkpoint.

    Args:
      path: a safetensors file or what `torch.save` wrote; of the latter only tensors and plain values are read, and no
        code in it runs.
      kind: one of `interop.TOOLKITS`; recognised by the names of the parameters by default.
      part: which network of a checkpoint with several, such as "teacher_ecapa" of Speaker-net's (the default there).
      front_end: how the network's input is computed, a name in `features.FRONT_ENDS`; by default what `convert_back`
        has noted in a safetensors file, or else that of the toolkit.

    Raises:
      FileNotFoundError: no such file.
      ImportError: torch is needed and not installed.
      ValueError: naming the file: not a checkpoint, not of that kind, no such part or front end, names that are missing
        or have no place, tensors of a wrong shape or type, NaN or infinite weights, negative variances.
    """
    if kind is not None and kind not in interop.TOOLKITS:
        raise ValueError(f"unknown kind {kind!r}: choose one of {', '.join(interop.TOOLKITS)}")
    path = Path(path)
    content, noted = _content(path)
    part, tensors = _chosen_part(networks_of(content), content, part, path)
    front_end = front_end or noted
    if front_end is not None and front_end not in FRONT_ENDS:
        raise ValueError(f"unknown front end {front_end!r}: choose one of {', '.join(FRONT_ENDS)}")
    found = [fit for fit in interop.recognised(tensors) if kind in (None, fit[0])]
    where = f"{path}, {part}" if part else f"{path}"
    if not found:
        raise ValueError(
            f"{where}: the names are not those of {kind or 'any network known here'}; they begin with "
            f"{', '.join(list(tensors)[:3])}; kinds are {', '.join(interop.TOOLKITS)}"
        )
    kind, backbone = found[0]
    prefixes = UNUSED_PREFIXES.get(kind, ())
    network = {name: tensor for name, tensor in tensors.items() if not name.startswith(prefixes)}
    for name, tensor in network.items():
        if isinstance(tensor, Unusable):
            raise ValueError(f"{where}: tensor {name!r} {tensor.reason}")
        if not name.endswith(interop.COUNTER) and tensor.dtype.kind != "f":
            raise ValueError(f"{where}: tensor {name!r} holds {tensor.dtype}, weights are floats: is it quantised?")
        if not tensor.size:
            raise ValueError(f"{where}: tensor {name!r} is empty: its shape is {list(tensor.shape)}")
    try:
        module, variables = interop.backbone_from_torch(network, kind, backbone)
    except Exception as error:  # whatever Flax raises for names and shapes no program would write
        raise ValueError(f"{where}: as a {backbone} of {kind}: {one_line(error, longest=2000)}") from None
    provenance: dict[str, Any] = {
        "source": path.name,
        "kind": kind,
        "memo_jax": __version__,
        "parameters": parameter_count(variables["params"]),
        "left_out": len(tensors) - len(network),
    }
    if part:
        provenance["part"] = part
    if len(found) > 1:
        provenance["also_names_of"] = [other for other, _ in found[1:]]
    counts = {
        name: int(np.ravel(x)[0])
        for name, x in network.items()
        if name.endswith(interop.COUNTER) and np.size(x) == 1 and np.isfinite(x).all()
    }
    if counts:
        all_equal = len(set(counts.values())) == 1
        provenance[interop.COUNTER] = next(iter(counts.values())) if all_equal else counts
    return model_of_backbone(
        module, variables, front_end=front_end or interop.FRONT_END_OF_KIND[kind], provenance=provenance
    )


def model_to_torch(model: Model, kind: str) -> Tensors:
    """Returns a model's network as {PyTorch name: array} of that kind, with the batch norms' counters.

    Raises ValueError if the toolkit has no such network.
    """
    if model.backbone == ENSEMBLE:
        raise ValueError(f"{kind} has no ensembles: convert each of {', '.join(model.arguments)} on its own (--branch)")
    _check_stride(kind, model.backbone, model.module)
    tensors = interop.backbone_to_torch(
        model.variables, kind, model.backbone, model.arguments.get("form", "speechbrain")
    )
    counts = model.provenance.get(interop.COUNTER, 0)
    counters = [name.removesuffix("running_var") + interop.COUNTER for name in tensors if name.endswith("running_var")]
    return tensors | {
        name: np.array(counts.get(name, 0) if isinstance(counts, dict) else counts, np.int64) for name in counters
    }


def _check_stride(kind: str, name: str, backbone: nn.Module) -> None:
    """Raises ValueError for a backbone with a stride in its first convolution, which no toolkit has."""
    if getattr(backbone, "stride", 1) != 1:
        raise ValueError(f"{kind} has no {name} whose first convolution has a stride")


def speaker_net_of_branches(variables: Mapping[str, Mapping[str, Any]]) -> dict[str, Tensors]:
    """Returns {role: {backbone: variables}} as the MeMo authors save it: {"teacher_ecapa": {name: array}, …}.

    Heads that compare embeddings with known speakers are left out: the authors have none.
    """
    networks = {}
    for role, branches in variables.items():
        for backbone, branch in branches.items():
            params = {part: tree for part, tree in branch["params"].items() if part != SPEAKER_HEAD}
            named = interop.branch_to_torch(dict(branch) | {"params": params}, backbone)
            networks[f"{role}_{backbone}"] = {f"module.{name}": x for name, x in named.items()}
    return networks


def networks_of(tensors: Mapping[str, np.ndarray | Unusable]) -> dict[str, Tensors]:
    """Returns {part: {name: array}} of the networks that are recognised among a checkpoint's tensors.

    A network is recognised after any prefix ("module.", "_orig_mod.", "model.", "resnet.", "state_dict.teacher.", …),
    which is stripped; its part is named by the prefix without `WRAPPERS`, "" if nothing is left. Whatever lies beside
    the networks (optimisers, "n_averaged", criteria) is passed over.
    """
    prefixes = {name[: match.end()] for name in tensors for match in re.finditer(r"\.", name)}
    found: list[str] = []
    for prefix in sorted(prefixes | {""}, key=lambda prefix: (prefix.count("."), prefix)):
        if not prefix.startswith(tuple(found)):
            within = [name.removeprefix(prefix) for name in tensors if name.startswith(prefix)]
            if interop.recognised(within):
                found.append(prefix)
    networks: dict[str, Tensors] = {}
    for prefix in found:
        part = ".".join(word for word in prefix.split(".") if word and word not in WRAPPERS)
        if len(found) == 1:
            part = part if part.startswith(("student", "teacher")) else ""
        network = {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
        networks[part if part not in networks else prefix.rstrip(".")] = network
    return networks


def _chosen_part(
    networks: Mapping[str, Tensors], content: Mapping[str, Any], part: str | None, path: Path
) -> tuple[str, Tensors]:
    """The network of that name; by default the only one, or a teacher."""
    names = ", ".join(name or "(the file itself)" for name in networks) or "no network known here"
    if part is not None:
        if part not in networks:
            raise ValueError(f"{path}: has no part {part!r}; choose one of {names}")
        return part, networks[part]
    if not networks:
        return "", dict(content)
    for name in ("", *PREFERRED_PARTS):
        if name in networks:
            return name, networks[name]
    if len(networks) > 1:
        raise ValueError(f"{path}: several networks: choose a part of {names}")
    return next(iter(networks.items()))


def _content(path: Path) -> tuple[dict[str, np.ndarray | Unusable], str | None]:
    """The tensors of a checkpoint by their full names, and the front end if it is noted."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    with path.open("rb") as file:
        start = file.read(9)
    # The length of a safetensors header may begin as a zip file or a pickle does.
    is_safetensors = start[8:] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size
    if not is_safetensors and start.startswith((b"PK", b"\x80")):
        tensors, noted = _torch_content(path), None
    else:
        tensors, noted = _safetensors_content(path)
    if not tensors:
        raise ValueError(f"{path}: holds no tensors")
    return tensors, noted


def _safetensors_content(path):
    from safetensors import safe_open

    tensors: dict[str, np.ndarray | Unusable] = {}
    try:
        with safe_open(os.fspath(path), framework="numpy") as file:
            noted = (file.metadata() or {}).get(FRONT_END_KEY)
            for name in file.keys():
                try:
                    tensor = file.get_tensor(name)
                    # bfloat16 and the like, which are not types of NumPy
                    tensors[name] = tensor if tensor.dtype.kind in "fiub" else tensor.astype(np.float32)
                except (TypeError, KeyError, AttributeError, ValueError) as error:
                    tensors[name] = Unusable(f"has a type that cannot be read ({one_line(error)})")
    except OSError:
        raise
    except Exception as error:  # SafetensorError, and what NumPy raises for absurd shapes
        raise ValueError(f"{path}: neither safetensors nor a PyTorch checkpoint ({one_line(error)})") from None
    return tensors, noted


def _torch_content(path) -> dict[str, np.ndarray | Unusable]:
    import pickle

    if is_zip(path):  # torch itself does not check the checksums
        try:
            with zipfile.ZipFile(path) as file:
                wrong = file.testzip()
        except Exception as error:
            raise ValueError(f"{path}: not a PyTorch checkpoint, or damaged ({one_line(error)})") from None
        if wrong is not None:
            raise ValueError(
                f"{path}: damaged: {wrong} in it does not match its checksum (if torch.save was told to write none, "
                "save the file again)"
            )
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
    except Exception as error:  # IndexError, KeyError, RuntimeError, struct.error, … of a damaged file
        raise ValueError(f"{path}: not a PyTorch checkpoint, or damaged ({one_line(error)})") from None
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: holds a {type(content).__name__}, not a dictionary of tensors")
    try:
        return {".".join(names): _array(torch, x) for names, x in _leaves(content) if isinstance(x, torch.Tensor)}
    except RecursionError:
        raise ValueError(f"{path}: not a PyTorch checkpoint: its dictionaries are nested too deeply") from None


def _array(torch, tensor) -> np.ndarray | Unusable:
    """A tensor as an array. Kinds whose content or size is not what the file holds are not read."""
    try:
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
            return Unusable(f"is not a plain array but {tensor.layout}, {tensor.device.type}")
        if tensor.is_complex():
            return Unusable("has complex numbers")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            return Unusable("is larger than what the file holds of it (an expanded tensor): save a contiguous copy")
        tensor = tensor.detach()
        if tensor.is_floating_point() and tensor.dtype not in (torch.float32, torch.float64):
            tensor = tensor.float()
        return tensor.contiguous().numpy()
    except Exception as error:
        return Unusable(f"cannot be read ({one_line(error)})")


def _torch(purpose: str):
    try:
        import torch
    except ImportError:
        raise ImportError(f"{purpose} needs PyTorch: pip install torch, or save as safetensors there") from None
    return torch


def check_tensors_output(path: str | os.PathLike) -> Path:
    """Returns the path; raises ValueError for an ending that `write_tensors` does not know, OSError if not writable."""
    path = Path(path)
    if path.suffix not in (".safetensors", *TORCH_SUFFIXES):
        raise ValueError(f"{path}: the name must end in .safetensors or {', '.join(TORCH_SUFFIXES)}")
    check_writable(path)
    return path


def write_tensors(
    path: str | os.PathLike, tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None
) -> Path:
    """Writes {name: array}, or {network: {name: array}}, whole or not at all; shapes stay as they are, even [].

    A name that ends in .pt, .pth, .ckpt or .bin is written by torch.save, nested as given; .safetensors without torch,
    with the name of a network before those of its tensors, and with the metadata.

    Raises:
      ValueError: another ending. ImportError: torch is needed and not installed. OSError: naming the file.
    """
    path = check_tensors_output(path)
    torch = None if path.suffix == ".safetensors" else _torch(f"writing {path}")

    def converted(value):
        if isinstance(value, Mapping):
            return {name: converted(inner) for name, inner in value.items()}
        return torch.from_numpy(np.array(value))

    with replacing(path) as partial:
        if torch is None:
            from safetensors.numpy import save

            flat = {".".join(filter(None, names)): np.array(x, order="C") for names, x in _leaves(tensors)}
            partial.write_bytes(save(flat, dict(metadata or {})))
        else:
            torch.save(converted(tensors), partial)
    return path


def _leaves(tensors: Mapping[Any, Any], names: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, value in tensors.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*names, str(name)))
        else:
            yield (*names, str(name)), value


def convert(
    source: str | os.PathLike,
    output: str | os.PathLike,
    kind: str | None = None,
    part: str | None = None,
    front_end: str | None = None,
) -> str:
    """Converts a PyTorch checkpoint to a model file; returns a summary for the user.

    Arguments and errors as for `torch_to_model`; OSError if the output cannot be written.
    """
    check_writable(output)
    model = torch_to_model(source, kind, part, front_end)
    write_model(output, model)
    about = model.provenance
    lines = [
        f"{about['kind']} {model.backbone}, {about['parameters']:,} parameters, embeddings of "
        f"{model.module.embedding_dim}, front end {model.front_end}",
        f"{output}",
    ]
    if "also_names_of" in about and kind is None and model.front_end == interop.FRONT_END_OF_KIND[about["kind"]]:
        others = " and ".join(about["also_names_of"])
        lines.insert(1, f"{others} would have the same names but another front end: if it is from there, give --kind")
    if part is None and "part" in about:
        lines.insert(1, f"this is the part {about['part']} of the checkpoint; choose another with --part")
    if about["left_out"]:
        lines.insert(1, f"left out tensors of heads and classifiers: {about['left_out']}")
    return "\n".join(lines)


def convert_back(
    source: str | os.PathLike,
    output: str | os.PathLike,
    kind: str,
    branch: str | None = None,
    role: str | None = None,
    step: int | None = None,
) -> str:
    """Converts the network of a model file or a workdir to PyTorch's names; returns a summary for the user.

    From a workdir, speaker-net gets students and teachers with their heads, unless a branch or role is chosen. A
    safetensors file notes the front end that the weights need, for converting it back.

    Raises:
      ValueError: an unknown kind, or a network that the toolkit lacks. Others as for `Embedder.load`, `write_tensors`.
    """
    from memo_jax.config import workdir_config
    from memo_jax.inference.embedder import load_model
    from memo_jax.training.checkpoint import load_state
    from memo_jax.training.recipe import build_branches

    if kind not in interop.TOOLKITS:
        raise ValueError(f"unknown kind {kind!r}: choose one of {', '.join(interop.TOOLKITS)}")
    check_tensors_output(output)
    whole = kind == "speaker-net" and os.path.isdir(source) and branch is None and role is None
    if whole and step == 0:
        raise ValueError(f"{source}: of the untrained networks, only one can be converted: add --branch")
    if whole:
        config, loaded = workdir_config(source), load_state(source, step, only=["student", "teacher"])
        front_end = config.features.front_end
    else:
        loaded = load_model(source, branch=branch, role=role, step=step)
        front_end = loaded.front_end
    try:
        if whole:
            for name, one in build_branches(config).items():
                _check_stride(kind, name, one.backbone)
            tensors = speaker_net_of_branches(loaded)
        else:
            tensors = model_to_torch(loaded, kind)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    path = write_tensors(output, tensors, {FRONT_END_KEY: front_end})
    if whole:
        lines = [
            f"speaker-net {', '.join(tensors)}, with their projection heads; their input is {front_end}",
            f"{output}",
        ]
    else:
        lines = [f"{kind} {loaded.backbone}, {len(tensors)} tensors; its input is {front_end}", f"{output}"]
    theirs = interop.FRONT_END_OF_KIND[kind]
    if theirs != front_end:
        lines.insert(1, f"{kind} itself computes {theirs}: embeddings there need {front_end} as input")
        if path.suffix != ".safetensors":
            lines.insert(2, f"such a file cannot note that: to convert it back, add --front-end {front_end}")
    return "\n".join(lines)
