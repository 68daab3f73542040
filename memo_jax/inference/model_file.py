"""Model files: a single network that embeds recordings, with all that is needed to use it, in one safetensors file.

The tensors are the backbone's variables, float32 or float16, named by their path ("params/block_0/reduce/conv/kernel").
The file's metadata has one entry, "memo_jax": JSON with `format`, `backbone`, `arguments`, `front_end`, `decision`,
`provenance`, `fingerprint` (of the network and its weights) and `checksum` (of the JSON itself). Both are checked when
a file is read, so any damage that would change a result is noticed. Reading a model file runs none of its content.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from memo_jax.files import one_line, parse_json, replacing, write_text

if TYPE_CHECKING:
    import flax.linen as nn
    import jax

# JAX, Flax and the networks are imported where they are needed: a model that onnxruntime runs is read without them.

FILE_FORMAT = 2
METADATA_KEY = "memo_jax"
ENSEMBLE = "ensemble"  # the name by which `models.build_backbone` builds several backbones as one
STORED_WEIGHTS = {"float32": "<f4", "float16": "<f2"}  # how a file may hold them
MOST_VALUES, LARGEST_SIZE = 64, 1 << 20  # of an argument of a backbone
DEFAULT_MODEL = Path(__file__).with_name("default_model.safetensors")  # comes with the package; see its card


class ModelFileError(ValueError):
    """A file that is not a model file or exported program of ours, or is damaged; the message names it."""


class NoGraphError(ValueError):
    """Only JAX can run this network: its backbone has no ONNX graph."""


@dataclasses.dataclass(frozen=True)
class Decision:
    """The rule by which two recordings count as the same speaker.

    Attributes:
      threshold: smallest cosine score that is accepted, in [-1, 1].
      scale, offset: calibration; scale · score + offset is the natural-log likelihood ratio.
      source: where this comes from, for people: the trial list, the criterion, the error rates there.

    Raises:
      ValueError: a threshold outside [-1, 1], or numbers that are not finite.
    """

    threshold: float
    scale: float
    offset: float
    source: str = ""

    def __post_init__(self):
        check_threshold(self.threshold)
        for name in ("scale", "offset"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"the {name} of the calibration is {getattr(self, name)}: it must be finite")

    def probability(self, score: float, prior: float = 0.5) -> float:
        """Returns the probability that two recordings with this cosine score have the same speaker.

        Args:
          score: cosine in [-1, 1].
          prior: the probability before the score is known, strictly between 0 and 1.

        Raises:
          ValueError: the prior is out of that range.
        """
        if not 0 < prior < 1:
            raise ValueError(f"the prior is {prior:g}: it must be a probability strictly between 0 and 1")
        log_odds = self.scale * score + self.offset + math.log(prior) - math.log1p(-prior)
        return 0.5 * (1 + math.tanh(log_odds / 2))


def check_threshold(threshold: float) -> float:
    """Returns a threshold on cosine scores; raises ValueError unless it is in [-1, 1]."""
    if not -1 <= threshold <= 1:
        raise ValueError(f"the threshold is {threshold:g}: scores are cosines, so it must be in [-1, 1]")
    return threshold


def write_decision(path: str | os.PathLike, decision: Decision, fingerprint: str) -> None:
    """Writes a decision to a file of its own, JSON, with the fingerprint of the model that it belongs to."""
    write_text(path, json.dumps(dataclasses.asdict(decision) | {"model": fingerprint}, indent=2) + "\n")


def read_decision(path: str | os.PathLike, fingerprint: str) -> Decision:
    """Reads what `write_decision` wrote.

    Raises:
      OSError: naming the file, if it cannot be read.
      ValueError: naming the file: other content, or a decision of a model with another fingerprint.
    """
    text = Path(path).read_bytes()
    try:
        fields = parse_json(text)
        model = fields.pop("model")
        decision = Decision(**fields)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{path}: not a calibration that `eval --save-calibration` wrote ({one_line(error)})"
        ) from None
    if model != fingerprint:
        raise ValueError(
            f"{path} is the calibration of another model ({model}, not {fingerprint}): scores of this one mean "
            "something else"
        )
    return decision


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A network that embeds recordings.

    Attributes:
      backbone: its name in `models.BACKBONES`, or "ensemble" for several of them as one network.
      arguments: what the backbone is built with: plain numbers, texts and tuples; {member: arguments} of an ensemble.
      variables: {"params", "batch_stats"} of the backbone alone, arrays of float32.
      front_end: how waves become the network's input: a name in `features.FRONT_ENDS`.
      provenance: where the network comes from, for people and reports; JSON.
      decision: None if no threshold has been tuned.
    """

    backbone: str
    arguments: Mapping[str, Any]
    variables: Mapping[str, Any]
    front_end: str = "log_mel"
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    decision: Decision | None = None

    @functools.cached_property
    def module(self) -> nn.Module:
        """The backbone: `module.apply(variables, x, lengths)` maps its input [N, T, 80] to embeddings [N, D]."""
        from memo_jax.models import build_backbone

        return build_backbone(self.backbone, **self.arguments)

    @property
    def name(self) -> str:
        """What to call the network in tables: "ecapa teacher, step 600", or the name that it was given."""
        known = self.provenance
        if {"branch", "role", "step"} <= known.keys():
            return f"{known['branch']} {known['role']}, step {known['step']}"
        return str(known.get("name", "network"))

    @property
    def dimension(self) -> int:
        """D, the length of an embedding."""
        stated = [arguments.get("embedding_dim") for arguments in self.member_arguments.values()]
        return self.module.embedding_dim if None in stated else sum(stated)

    @property
    def member_arguments(self) -> Mapping[str, Mapping[str, Any]]:
        """{backbone: arguments} of an ensemble's members, or of the only network."""
        return self.arguments if self.backbone == ENSEMBLE else {self.backbone: self.arguments}

    def embed_waves(self, waves: jax.Array, lengths: jax.Array) -> jax.Array:
        """Waves float [N, L] in [-1, 1] at 16 kHz, zeros after lengths [N] → embeddings [N, D]; can be traced."""
        from memo_jax.inference.network import embed_waves

        return embed_waves(self.module, self.front_end, self.variables, waves, lengths)

    @functools.cached_property
    def function(self) -> Callable[[np.ndarray, np.ndarray], jax.Array]:
        """The compiled function from int16 waves [N, L], zeros after lengths [N], to embeddings [N, D].

        It raises ModelFileError if the variables are not those that the backbone needs.
        """
        import flax.errors

        from memo_jax.inference.network import embedding_function

        apply = embedding_function(self.module, self.variables, self.front_end)

        def function(waves, lengths):
            try:
                return apply(waves, lengths)
            except flax.errors.FlaxError as error:
                raise ModelFileError(
                    f"the model's tensors are not those of a {self.backbone}: {one_line(error)}"
                ) from error

        return function

    @functools.cached_property
    def fingerprint(self) -> str:
        """32 hexadecimal digits: equal for two models exactly if they have the same front end, network and weights.

        It says which model embeddings are from: those of models with different fingerprints must not be compared.
        """
        digest = hashlib.sha256(
            json.dumps([self.backbone, _json_ready(self.arguments), self.front_end], sort_keys=True).encode()
        )
        for name, array in sorted(flattened(self.variables).items()):
            digest.update(f"\n{name} {list(array.shape)}\n".encode())
            digest.update(np.ascontiguousarray(array, "<f4").data)
        return digest.hexdigest()[:32]


def model_of_backbone(backbone: nn.Module, variables: Mapping[str, Any], **fields: Any) -> Model:
    """Returns the model of a backbone given as a module; `fields` are the other attributes of `Model`."""
    from memo_jax.models import BACKBONES, EXECUTION_FIELDS

    name = next(name for name, kind in BACKBONES.items() if type(backbone) is kind)
    arguments = {
        field.name: getattr(backbone, field.name)
        for field in dataclasses.fields(backbone)
        if field.name not in ("parent", "name", *EXECUTION_FIELDS)
    }
    return Model(name, {key: _argument(value) for key, value in arguments.items()}, variables, **fields)


def ensemble_of(models: Sequence[Model], provenance: Mapping[str, Any]) -> Model:
    """Returns several models as one, whose cosine is the mean of theirs (`models.ensemble`).

    Raises:
      ValueError: two of the same backbone, one that is an ensemble itself, or different front ends.
    """
    names = [model.backbone for model in models]
    if len(set(names)) < len(names) or ENSEMBLE in names:
        raise ValueError(f"an ensemble needs different backbones: these are {', '.join(names)}")
    front_ends = sorted({model.front_end for model in models})
    if len(front_ends) > 1:
        raise ValueError(f"the networks of an ensemble must take the same input: these take {' and '.join(front_ends)}")
    variables: dict[str, Any] = {}
    for model in models:
        for kind, tree in model.variables.items():
            variables.setdefault(kind, {})[f"members_{model.backbone}"] = tree
    arguments = {model.backbone: dict(model.arguments) for model in models}
    return Model(ENSEMBLE, arguments, variables, front_ends[0], provenance)


def members_of(model: Model) -> list[Model]:
    """Returns the members of an ensemble, or the model itself if it is none."""
    if model.backbone != ENSEMBLE:
        return [model]
    return [
        Model(
            name,
            arguments,
            {kind: tree[f"members_{name}"] for kind, tree in model.variables.items() if f"members_{name}" in tree},
            model.front_end,
            {**model.provenance, "branch": name},
        )
        for name, arguments in model.arguments.items()
    ]


def _argument(value):
    """An argument of a backbone as JSON can hold it; array types by name."""
    if isinstance(value, (list, tuple)):
        return tuple(map(_argument, value))
    import jax.numpy as jnp

    return value if isinstance(value, (bool, int, float, str, type(None))) else jnp.dtype(value).name


def write_model(path: str | os.PathLike, model: Model, weights: str = "float32") -> Path:
    """Writes a model file, whole or not at all; returns its path.

    Args:
      path: of the file.
      model: the network.
      weights: "float32", or "float16" for half the size. Weights are rounded then, which makes it another model, with
        another fingerprint. Reading yields float32 in either case.

    Raises:
      ValueError: the variables are not those of the backbone or are not finite (names the tensor), or the backbone or
        front end is unknown.
      OSError: naming the file, if it cannot be written.
    """
    if weights not in STORED_WEIGHTS:
        raise ValueError(f"weights {weights!r}: choose {' or '.join(STORED_WEIGHTS)}")
    if weights == "float16":
        import jax

        rounded = jax.tree.map(lambda x: np.asarray(x, np.float16).astype(np.float32), model.variables)
        model = dataclasses.replace(model, variables=rounded)
    check_model(model)
    arrays = {
        name: np.ascontiguousarray(array, STORED_WEIGHTS[weights]) for name, array in flattened(model.variables).items()
    }
    from safetensors.numpy import save

    content = save(arrays, {METADATA_KEY: header_text(model)})
    with replacing(path) as partial:
        partial.write_bytes(content)
    return Path(path)


def check_holds_only(path: str | os.PathLike, model: Model) -> None:
    """Raises ValueError if a model file holds other networks beside a model: its one threshold is that of them all."""
    if read_model(path).fingerprint != model.fingerprint:
        raise ValueError(
            f"{path} keeps one threshold, that of all its networks together: leave out --branch, or use "
            "--save-calibration FILE"
        )


def save_decision_in_file(path: str | os.PathLike, decision: Decision) -> None:
    """Replaces the decision in a model file, whole or not at all; its tensors stay the same, bit for bit.

    Raises:
      OSError, ModelFileError: as for `read_model`.
    """
    from safetensors import safe_open
    from safetensors.numpy import save

    model = dataclasses.replace(read_model(path), decision=decision)
    with safe_open(os.fspath(path), framework="numpy") as file:
        content = save({name: file.get_tensor(name) for name in file.keys()}, {METADATA_KEY: header_text(model)})
    with replacing(path) as partial:
        partial.write_bytes(content)


def header_text(model: Model, **more: Any) -> str:
    """Returns what a file says about its model besides the weights, as JSON; `more` are further entries."""
    header = {
        "format": FILE_FORMAT,
        "backbone": model.backbone,
        "arguments": _json_ready(model.arguments),
        "front_end": model.front_end,
        "decision": None if model.decision is None else dataclasses.asdict(model.decision),
        "provenance": dict(model.provenance),
        "fingerprint": model.fingerprint,
    } | more
    return json.dumps(header | {"checksum": _checksum(header)}, indent=1, ensure_ascii=False, allow_nan=False)


def parsed_header(text: str | bytes) -> dict[str, Any]:
    """Returns what `header_text` wrote, with the decision as `Decision` or None.

    Raises:
      ValueError: another version, or a checksum that does not match. KeyError, TypeError, …: it is something else.
    """
    header = json.loads(text)
    if header["format"] != FILE_FORMAT:
        raise ValueError(f"written by another version of memo-jax, format {header['format']!r} and not {FILE_FORMAT}")
    if header.pop("checksum") != _checksum(header):
        raise ValueError("its description is not the one that was written")
    decision = header["decision"]
    return header | {"decision": None if decision is None else Decision(**decision)}


def _checksum(header) -> str:
    return hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()[:32]


def read_model(path: str | os.PathLike, is_known: Callable[[str], bool] | None = None) -> Model:
    """Reads a model file that `write_model` wrote.

    Args:
      path: of the file.
      is_known: says whether a model with a fingerprint has been checked before. Such a model is read without building
        its network, which needs JAX.

    Raises:
      FileNotFoundError: no such file.
      OSError: naming the file, if it cannot be read.
      ModelFileError: not a model file, damaged, or of another version; the message names the file.
    """
    from safetensors import safe_open

    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such model file")
    if Path(path).suffix.lower() == ".onnx":
        raise ModelFileError(
            f"{path}: ONNX files are for other runtimes: give the model file or workdir that it was exported from"
        )
    with damage_named(path, "a model file"), safe_open(os.fspath(path), framework="numpy") as file:
        text = (file.metadata() or {}).get(METADATA_KEY)
        if text is None:
            raise ModelFileError(
                f"{path} has tensors but no description of a network: turn weights of another toolkit into a model "
                "file with `memo-jax convert`"
            )
        header = parsed_header(text)
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        return described_model(header, tensors, checked=is_known is not None and is_known(header["fingerprint"]))


@contextlib.contextmanager
def damage_named(path: str | os.PathLike, kind: str) -> Iterator[None]:
    """Turns whatever a library raises for content that makes no sense into a ModelFileError that names the file."""
    try:
        yield
    except (ModelFileError, OSError):
        raise
    except Exception as error:
        raise ModelFileError(f"{path}: not {kind}, or damaged ({one_line(error)})") from error


def described_model(header: Mapping[str, Any], tensors: Mapping[str, np.ndarray], checked: bool = False) -> Model:
    """Returns the model of a description (`parsed_header`) and its tensors {"params/…/kernel": array}.

    `checked` says that a model with this fingerprint has passed all checks before: it is enough that it is the same.

    Raises:
      ValueError: an unknown backbone, front end or argument, tensors that are not those that were described, or weights
        that are not finite. KeyError, TypeError, …: something else.
    """
    arguments = {key: _tuples(value) for key, value in header["arguments"].items()}
    if not checked:
        from memo_jax.features import FRONT_ENDS
        from memo_jax.models import BACKBONES

        members = arguments if header["backbone"] == ENSEMBLE else {header["backbone"]: arguments}
        if not members or not BACKBONES.keys() >= members.keys() or header["front_end"] not in FRONT_ENDS:
            kinds = ", ".join(members) or "empty ensemble"
            raise ValueError(f"this version of memo-jax has no {kinds} with {header['front_end']}")
        for name, fields in members.items():
            _check_arguments(name, fields)
    variables: dict[str, Any] = {}
    for name, tensor in tensors.items():
        *parents, leaf = name.split("/")
        place = variables
        for part in parents:
            place = place.setdefault(part, {})
        place[leaf] = tensor.astype(np.float32, copy=False)
    model = Model(
        header["backbone"], arguments, variables, header["front_end"], dict(header["provenance"]), header["decision"]
    )
    # The variables were checked against the network when they were written: it is enough that they are still the same.
    if model.fingerprint != header["fingerprint"]:
        raise ValueError("its weights are not those that were written")
    if not checked:
        check_finite(model)
    return model


def _check_arguments(backbone, arguments) -> None:
    """Raises ValueError for arguments that no program of ours has written: a network of them could be of any size."""
    from memo_jax.models import BACKBONES, EXECUTION_FIELDS

    defaults = {field.name: field.default for field in dataclasses.fields(BACKBONES[backbone])}
    for name, value in arguments.items():
        like = defaults.get(name, dataclasses.MISSING) if name not in EXECUTION_FIELDS else dataclasses.MISSING
        values, likes = (value, like) if isinstance(like, tuple) else ((value,), (like,))
        kind = type(likes[0]) if isinstance(likes[0], (bool, int, float, str)) else str  # array types are named
        fits = isinstance(values, tuple) and len(values) <= MOST_VALUES and all(type(one) is kind for one in values)
        if (
            like is dataclasses.MISSING
            or not fits
            or kind is int
            and not all(0 <= one <= LARGEST_SIZE for one in values)
        ):
            raise ValueError(f"a {backbone} cannot have {name} {one_line(ValueError(str(value)), 100)}")


def check_model(model: Model) -> None:
    """Raises ValueError, naming the tensor, unless the variables are those that the backbone needs, and finite."""
    import jax
    import jax.numpy as jnp

    from memo_jax.features import FRONT_ENDS, MEL_BINS

    if model.front_end not in FRONT_ENDS:
        raise ValueError(f"unknown front end {model.front_end!r}: choose one of {', '.join(FRONT_ENDS)}")
    shapes = jax.eval_shape(model.module.init, jax.random.key(0), jax.ShapeDtypeStruct((2, 200, MEL_BINS), jnp.float32))
    wanted = {name: leaf.shape for name, leaf in flattened(shapes).items()}
    given = {name: np.shape(leaf) for name, leaf in flattened(model.variables).items()}
    for name in [*wanted, *given]:
        if wanted.get(name) != given.get(name):
            raise ValueError(
                f"tensor {name} has shape {given.get(name, 'missing')}, the {model.backbone} needs "
                f"{wanted.get(name, 'no such tensor')}"
            )
    check_finite(model)


def other_precision(model: Model) -> str | None:
    """Returns the first type other than float32 that a network computes in, if there is one."""
    types = (arguments.get("dtype", "float32") for arguments in model.member_arguments.values())
    return next((name for name in types if name != "float32"), None)


def check_precision(model: Model) -> None:
    """Raises ValueError unless the network computes in float32, as it would in ONNX files."""
    if other := other_precision(model):
        raise ValueError(
            f"this network computes in {other}, which JAX does and ONNX files do not: use --runtime jax, push --no-onnx"
        )


def check_finite(model: Model) -> None:
    """Raises ValueError, naming the tensor, for NaN, infinity or a negative variance: embeddings would be NaN."""
    for name, leaf in flattened(model.variables).items():
        bad = np.size(leaf) - int(np.isfinite(leaf).sum())
        if bad:
            raise ValueError(f"tensor {name} has {bad:,} of {np.size(leaf):,} values that are NaN or infinite")
        if name.endswith("/var") and (np.asarray(leaf) < 0).any():
            raise ValueError(f"tensor {name} has negative values, which no variance has")


def flattened(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Returns {"params/…/kernel": leaf} of nested variables, in the order of their names at every level.

    As `flax.traverse_util.flatten_dict` does, but Flax imports JAX, without which a model file can be read.
    """
    found = {}
    for name, value in sorted(variables.items()):
        if isinstance(value, Mapping):
            found |= {f"{name}/{inner}": leaf for inner, leaf in flattened(value).items()}
        else:
            found[name] = value
    return found


def _json_ready(arguments):
    """Arguments as JSON returns them, lists instead of tuples, so that equal arguments give equal text."""
    return json.loads(json.dumps(dict(arguments)))


def _tuples(value):
    if isinstance(value, dict):
        return {key: _tuples(inner) for key, inner in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
