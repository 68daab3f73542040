"""Networks for use elsewhere: model files, and programs in JAX's export format, from waveforms to embeddings."""

import hashlib
import os
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memo_jax.files import check_writable, replacing
from memo_jax.inference.model_file import (
    STORED_WEIGHTS,
    Model,
    ModelFileError,
    check_model,
    damage_named,
    described_model,
    flattened,
    header_text,
    parsed_header,
    write_model,
)
from memo_jax.inference.onnx_file import write_onnx

EXPORT_PLATFORMS = ("cpu", "cuda", "tpu")
# Members of an exported program, which is a zip file.
PROGRAM_FILE, WEIGHTS_FILE, HEADER_FILE = "program.jaxexport", "weights.safetensors", "model.json"
SHORTEST = 8000  # samples of a batch: half a second


def check_outputs(outputs: Iterable[str | os.PathLike]) -> None:
    """Raises ValueError for a name whose ending is not a known format, OSError for a file that cannot be written."""
    for output in map(Path, outputs):
        if output.suffix.lower() not in WRITERS:
            raise ValueError(f"{output}: the name's ending is not a known format: choose one of {', '.join(WRITERS)}")
        check_writable(output)


def export(
    model: Model, outputs: Iterable[str | os.PathLike], weights: str = "float32", **onnx_options: Any
) -> list[Path]:
    """Writes a model to files, each in the format that its ending names; returns their paths.

    name.safetensors is a model file (`model_file`), name.zip an exported program (`write_program`), name.onnx an
    ONNX file (`onnx_file.write_onnx`, which takes `onnx_options`). `weights` says how model files and ONNX files store
    the weights.

    Raises:
      ValueError: an ending that is not a known format, weights that are not finite, or options that `write_onnx`
        refuses.
      ImportError: an ONNX file without the extra `onnx`.
      OSError: naming the file, if it cannot be written.
    """
    outputs = [Path(output) for output in outputs]
    check_outputs(outputs)
    kinds = {output.suffix.lower() for output in outputs}
    if weights != "float32" and ".zip" in kinds:
        others = ".safetensors and .onnx" if weights in STORED_WEIGHTS else ".onnx"
        raise ValueError(f"an exported program (.zip) has float32 weights: {weights} is for {others}")
    if ".safetensors" in kinds and weights not in STORED_WEIGHTS:
        raise ValueError(f"a model file has {' or '.join(STORED_WEIGHTS)} weights: {weights} is for .onnx")
    for output in outputs:
        kind = output.suffix.lower()
        options = {} if kind == ".zip" else {"weights": weights}
        WRITERS[kind](output, model, **options, **(onnx_options if kind == ".onnx" else {}))
    return outputs


def write_program(path: str | os.PathLike, model: Model) -> Path:
    """Writes a zip file with the network as a program that runs with JAX alone, on CPU, CUDA or TPU; returns its path.

    The member "program.jaxexport" is for `jax.export.deserialize`: (waves float32 [N, L] in [-1, 1] at 16 kHz, zeros
    after lengths int32 [N]) → embeddings float32 [N, D], for any N and any L from 8,000 up; the weights are inside.
    "model.json" describes it as a model file does (`model_file`), with the SHA-256 of the program, and
    "weights.safetensors" has the weights again, for `read_program`.

    Raises:
      ValueError: weights that are not those of the backbone, or not finite. OSError: naming the file, if it cannot be
        written.
    """
    from safetensors.numpy import save

    check_model(model)
    count, samples = jax.export.symbolic_shape("n, l", constraints=["n >= 1", f"l >= {SHORTEST}"])
    exported = jax.export.export(jax.jit(model.embed_waves), platforms=EXPORT_PLATFORMS)(
        jax.ShapeDtypeStruct((count, samples), jnp.float32), jax.ShapeDtypeStruct((count,), jnp.int32)
    )
    program = bytes(exported.serialize())
    tensors = {name: np.ascontiguousarray(array, "<f4") for name, array in flattened(model.variables).items()}
    with replacing(path) as partial, zipfile.ZipFile(partial, "w") as file:
        file.writestr(PROGRAM_FILE, program)
        file.writestr(WEIGHTS_FILE, save(tensors))
        file.writestr(
            HEADER_FILE, header_text(model, dimension=model.dimension, program=hashlib.sha256(program).hexdigest())
        )
    return Path(path)


WRITERS = {".safetensors": write_model, ".zip": write_program, ".onnx": write_onnx}


def read_program(path: str | os.PathLike) -> Model:
    """Returns the model that `write_program` wrote.

    It is built from the description and the weights, and the program is left alone: running, or merely parsing, a
    stranger's program lets it crash the process or worse (custom calls reach into the process, and MLIR's parser aborts
    on some damaged ones). So nothing in the file is executed, and the model is as fast as the one that was exported.
    All members have checksums, and a program that is not the one that was written is refused.

    Raises:
      OSError: naming the file, if it cannot be read.
      ModelFileError: it is something else, or is damaged; the message names the file.
    """
    from safetensors.numpy import load

    with damage_named(path, "an exported program of memo-jax"), zipfile.ZipFile(path) as file:
        names = set(file.namelist())
        if not {PROGRAM_FILE, WEIGHTS_FILE, HEADER_FILE} <= names:
            torch = any(name.endswith("data.pkl") for name in names)
            raise ModelFileError(
                f"{path}: not an exported program of memo-jax"
                + ("; turn a PyTorch checkpoint into a model file with `memo-jax convert`" if torch else "")
            )
        header = parsed_header(_stored(file, HEADER_FILE))
        if hashlib.sha256(_stored(file, PROGRAM_FILE)).hexdigest() != header["program"]:
            raise ValueError("its program is not the one that was written")
        return described_model(header, load(_stored(file, WEIGHTS_FILE)))


def _stored(file: zipfile.ZipFile, name: str) -> bytes:
    """A member that is not compressed, as ours are: it cannot unpack to more than the file has."""
    if file.getinfo(name).compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{name} is compressed, which memo-jax export does not do")
    return file.read(name)
