"""Model files: one network that embeds recordings, with all that is needed to use it, in one safetensors file.

The tensors are the backbone's variables, float32, named by their path ("params/block_0/reduce/conv/kernel"). The file's
metadata has one entry, "memo_jax", JSON with `format`, `backbone`, `arguments`, `front_end`, `decision`, `provenance`
and `fingerprint`. No code runs when a model file is read.
"""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from memo_jax.features import FRONT_ENDS, MEL_BINS
from memo_jax.files import one_line, replacing
from memo_jax.models import BACKBONES, EXECUTION_FIELDS, build_backbone

FORMAT = 1
METADATA_KEY = "memo_jax"


class ModelFileError(ValueError):
    """A file that is no model file of ours, or is damaged, or is of a version that we do not know; names the file."""


@dataclasses.dataclass(frozen=True)
class Decision:
    """From when on two recordings count as of one speaker.

    Attributes:
      threshold: smallest cosine score that is accepted, in [-1, 1].
      scale, offset: calibration; scale · score + offset is the natural-log likelihood ratio.
      source: where this comes from, for people: the trial list, the criterion, the error rates there.
    """

    threshold: float
    scale: float
    offset: float
    source: str = ""


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A network that embeds recordings.

    Attributes:
      backbone: its name in `models.BACKBONES`.
      arguments: what the backbone is built with, beside its defaults; plain numbers, texts and tuples.
      variables: {"params", "batch_stats"} of the backbone alone, arrays of float32.
      front_end: how waves become its input: a name in `features.FRONT_ENDS`.
      provenance: what the model is of, for people and reports; JSON.
      decision: None while nobody has tuned one.
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
        return build_backbone(self.backbone, **self.arguments)

    @property
    def dimension(self) -> int:
        """D, how many numbers an embedding has."""
        return self.module.embedding_dim

    def embed_waves(self, waves: jax.Array, lengths: jax.Array) -> jax.Array:
        """Waves float [N, L] in [-1, 1] at 16 kHz, zeros behind lengths [N] → embeddings [N, D]; to be traced."""
        return embed_waves(self.module, self.front_end, self.variables, waves, lengths)

    @functools.cached_property
    def function(self) -> Callable[[np.ndarray, np.ndarray], jax.Array]:
        """The compiled function from int16 waves [N, L], zeros behind lengths [N], to embeddings [N, D]."""
        return embedding_function(self.module, self.variables, self.front_end)

    @functools.cached_property
    def fingerprint(self) -> str:
        """32 hexadecimal digits: equal for two models exactly when they have the same front end, network and weights.

        Names what embeddings are of: those of models with different fingerprints must not be compared.
        """
        digest = hashlib.sha256(
            json.dumps([self.backbone, _json_ready(self.arguments), self.front_end], sort_keys=True).encode()
        )
        for name, array in sorted(flattened(self.variables).items()):
            digest.update(f"\n{name} {list(array.shape)}\n".encode())
            digest.update(np.ascontiguousarray(array, "<f4").data)
        return digest.hexdigest()[:32]


def embed_waves(backbone: nn.Module, front_end: str, variables, waves: jax.Array, lengths: jax.Array) -> jax.Array:
    """Waves float [N, L] in [-1, 1] → embeddings [N, D] in evaluation mode; to be traced."""
    x, frames = FRONT_ENDS[front_end](waves, lengths)
    return backbone.apply(variables, x, frames)


# Of the module, so that each evaluation of a training run finds what the first one compiled.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _embed_integers(backbone, front_end, variables, waves, lengths):
    return embed_waves(backbone, front_end, variables, waves.astype(jnp.float32) / 32768, lengths)


def embedding_function(backbone: nn.Module, variables, front_end: str = "log_mel"):
    """Returns the compiled function from int16 waves [N, L], lengths [N] to embeddings [N, D] in evaluation mode."""
    variables = jax.device_put(variables)  # once: arrays of NumPy would travel to the device at every call
    return functools.partial(_embed_integers, backbone, front_end, variables)


def model_of_backbone(backbone: nn.Module, variables: Mapping[str, Any], **fields) -> Model:
    """Returns the model of a backbone that is an object; `fields` as those of `Model`."""
    name = next(name for name, kind in BACKBONES.items() if type(backbone) is kind)
    arguments = {
        field.name: getattr(backbone, field.name)
        for field in dataclasses.fields(backbone)
        if field.name not in ("parent", "name", *EXECUTION_FIELDS)
    }
    return Model(name, {key: _argument(value) for key, value in arguments.items()}, variables, **fields)


def _argument(value):
    """An argument of a backbone as JSON can hold it; types of arrays by name."""
    if isinstance(value, (list, tuple)):
        return tuple(map(_argument, value))
    return value if isinstance(value, (bool, int, float, str, type(None))) else jnp.dtype(value).name


def write_model(path: str | os.PathLike, model: Model) -> Path:
    """Writes a model file, whole or not at all; returns its path.

    Raises:
      ValueError: the variables are not those of the backbone (names the tensor), an unknown backbone or front end.
      OSError: naming the file, when it cannot be written.
    """
    check_model(model)
    arrays = {name: np.ascontiguousarray(array, "<f4") for name, array in flattened(model.variables).items()}
    from safetensors.numpy import save

    content = save(arrays, {METADATA_KEY: json.dumps(header_of(model), ensure_ascii=False)})
    with replacing(path) as partial:
        partial.write_bytes(content)
    return Path(path)


def header_of(model: Model) -> dict:
    """Returns what a model file says of its model, beside the weights; JSON."""
    return {
        "format": FORMAT,
        "backbone": model.backbone,
        "arguments": _json_ready(model.arguments),
        "front_end": model.front_end,
        "decision": None if model.decision is None else dataclasses.asdict(model.decision),
        "provenance": dict(model.provenance),
        "fingerprint": model.fingerprint,
    }


def read_model(path: str | os.PathLike) -> Model:
    """Reads a model file that `write_model` wrote.

    Raises:
      FileNotFoundError: no such file.
      ModelFileError: not a model file, damaged, or of another version; the message names the file.
    """
    from safetensors import SafetensorError, safe_open

    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such model file")
    try:
        with safe_open(os.fspath(path), framework="numpy") as file:
            text = (file.metadata() or {}).get(METADATA_KEY)
            if text is None:
                raise ModelFileError(
                    f"{path} has tensors but no description of a network: weights of another toolkit "
                    "become a model file by `memo-jax convert`"
                )
            header = json.loads(text)
            if header.get("format") != FORMAT:
                raise ModelFileError(f"{path}: written by another version of memo-jax (format {header.get('format')})")
            variables: dict[str, Any] = {}
            for name in file.keys():
                *parents, leaf = name.split("/")
                place = variables
                for part in parents:
                    place = place.setdefault(part, {})
                place[leaf] = file.get_tensor(name)
            model = Model(
                header["backbone"],
                {key: _tuples(value) for key, value in header["arguments"].items()},
                variables,
                header["front_end"],
                header["provenance"],
                None if header["decision"] is None else Decision(**header["decision"]),
            )
    except (SafetensorError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ModelFileError(f"{path}: not a model file, or damaged ({one_line(error)})") from error
    if model.backbone not in BACKBONES or model.front_end not in FRONT_ENDS:
        raise ModelFileError(f"{path}: this version of memo-jax has no {model.backbone} on {model.front_end}")
    # What was written was checked against the network, so it is enough that nothing has changed since.
    if model.fingerprint != header["fingerprint"]:
        raise ModelFileError(f"{path}: damaged: its weights are not those that were written")
    return model


def check_model(model: Model) -> None:
    """Raises ValueError, naming the tensor, unless the variables are exactly those that the backbone needs."""
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


def flattened(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Returns {"params/…/kernel": leaf} of nested variables."""
    leaves = jax.tree_util.tree_leaves_with_path(variables)
    return {"/".join(str(entry.key) for entry in path): leaf for path, leaf in leaves}


def _json_ready(arguments):
    """Arguments as reading gives them back before lists become tuples: the same text for the same arguments."""
    return json.loads(json.dumps(dict(arguments)))


def _tuples(value):
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
