"""Networks for use elsewhere: model files, and programs of JAX's export format, waveforms in and embeddings out."""

import dataclasses
import json
import os
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memo_jax.files import one_line, replacing
from memo_jax.inference.model_file import Decision, Model, ModelFileError, header_of, write_model

PLATFORMS = ("cpu", "cuda", "tpu")
PROGRAM, HEADER = "program.jaxexport", "model.json"  # members of an artifact, a zip file
SHORTEST = 8000  # samples of a batch: half a second


@dataclasses.dataclass(frozen=True, eq=False)
class Artifact:
    """A network read from an artifact: what `embedder.Embedder` needs of a `Model`, without its layers and weights."""

    function: Callable[[np.ndarray, np.ndarray], jax.Array]
    dimension: int
    fingerprint: str
    provenance: Mapping[str, Any]
    decision: Decision | None


def export(model: Model, outputs) -> list[Path]:
    """Writes a model to files, each in the format that its ending names; returns their paths.

    name.safetensors is a model file (`model_file`), name.zip an artifact (`write_artifact`).

    Raises:
      ValueError: an ending that names no format, a model that has no weights any more. OSError: cannot be written.
    """
    writers = {".safetensors": write_model, ".zip": write_artifact}
    if not isinstance(model, Model):
        raise ValueError("an exported program has no weights to export: give the workdir or model file that it is of")
    outputs = [Path(output) for output in outputs]
    for output in outputs:
        if output.suffix.lower() not in writers:
            raise ValueError(f"{output}: the ending of its name says no format: choose one of {', '.join(writers)}")
    for output in outputs:
        output.parent.mkdir(parents=True, exist_ok=True)
        writers[output.suffix.lower()](output, model)
    return outputs


def write_artifact(path: str | os.PathLike, model: Model) -> Path:
    """Writes a zip file with the network as one program that JAX alone runs, on CPU, CUDA or TPU; returns its path.

    Its member "program.jaxexport" is for `jax.export.deserialize`: (waves float32 [N, L] in [-1, 1] at 16 kHz, zeros
    behind lengths int32 [N]) → embeddings float32 [N, D], for any N and any L from 8,000 on; the weights are inside.
    Its member "model.json" says what it is: backbone and arguments, front end, decision threshold, provenance.
    """
    count, samples = jax.export.symbolic_shape("n, l", constraints=["n >= 1", f"l >= {SHORTEST}"])
    exported = jax.export.export(jax.jit(model.embed_waves), platforms=PLATFORMS)(
        jax.ShapeDtypeStruct((count, samples), jnp.float32), jax.ShapeDtypeStruct((count,), jnp.int32)
    )
    header = header_of(model) | {"dimension": model.dimension}
    with replacing(path) as partial, zipfile.ZipFile(partial, "w") as file:
        file.writestr(PROGRAM, bytes(exported.serialize()))
        file.writestr(HEADER, json.dumps(header, indent=2, ensure_ascii=False))
    return Path(path)


def read_artifact(path: str | os.PathLike) -> Artifact:
    """Reads what `write_artifact` wrote; raises ModelFileError, naming the file, when it is something else."""
    try:
        with zipfile.ZipFile(path) as file:
            header = json.loads(file.read(HEADER))
            exported = jax.export.deserialize(bytearray(file.read(PROGRAM)))
        decision = None if header["decision"] is None else Decision(**header["decision"])
        fields = header["dimension"], header["fingerprint"], header["provenance"]
    except (zipfile.BadZipFile, KeyError, ValueError, TypeError) as error:
        raise ModelFileError(f"{path}: not an exported network, or damaged ({one_line(error)})") from error
    call = jax.jit(exported.call)

    def function(waves, lengths):
        waves = np.asarray(waves, np.float32) / np.float32(32768)
        return call(waves, np.asarray(lengths, np.int32))

    return Artifact(function, *fields, decision)
