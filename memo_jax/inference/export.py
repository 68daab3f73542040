"""Networks for use elsewhere: model files, and programs in JAX's export format, from waveforms to embeddings."""

import dataclasses
import os
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from memo_jax.files import check_writable, one_line, replacing
from memo_jax.inference.model_file import (
    Decision,
    Model,
    ModelFileError,
    check_finite,
    header_text,
    parsed_header,
    write_model,
)
from memo_jax.inference.onnx_file import write_onnx

PLATFORMS = ("cpu", "cuda", "tpu")
PROGRAM, HEADER = "program.jaxexport", "model.json"  # members of an exported program, which is a zip file
SHORTEST = 8000  # samples of a batch: half a second
# Custom calls run code that is registered in the process, some of it by an address that the program chooses. Ours have
# only the checks of shapes, which the compiler removes.
ALLOWED_CUSTOM_CALLS = frozenset({"shape_assertion"})
# What waits for another device or for the host, and so for ever.
COMMUNICATION = frozenset(
    f"stablehlo.{name}"
    for name in ("infeed", "outfeed", "send", "recv", "all_gather", "all_reduce", "all_to_all", "collective_broadcast")
    + ("collective_permute", "reduce_scatter", "cross-replica-sum", "partition_id", "replica_id")
)


@dataclasses.dataclass(frozen=True, eq=False)
class Artifact:
    """An exported program: what `embedder.Embedder` needs of a `Model`, without its layers and weights."""

    function: Callable[[np.ndarray, np.ndarray], jax.Array]
    dimension: int
    fingerprint: str
    provenance: Mapping[str, Any]
    decision: Decision | None


def check_outputs(outputs: Iterable[str | os.PathLike]) -> None:
    """Raises ValueError for a name whose ending is no format, OSError for a file that cannot be written."""
    for output in map(Path, outputs):
        if output.suffix.lower() not in WRITERS:
            raise ValueError(f"{output}: the ending of the name is no known format: choose one of {', '.join(WRITERS)}")
        check_writable(output)


def export(
    model: Model | Artifact, outputs: Iterable[str | os.PathLike], weights: str = "float32", **onnx_options
) -> list[Path]:
    """Writes a model to files, each in the format that its ending names; returns their paths.

    name.safetensors is a model file (`model_file`), name.zip an exported program (`write_artifact`), name.onnx an
    ONNX file (`onnx_file.write_onnx`, which takes `onnx_options`). `weights` is how model files and ONNX files hold them.

    Raises:
      ValueError: an ending that is no known format, a model without weights, weights that are not finite, or options that
        `write_onnx` refuses.
      ImportError: an ONNX file without the extra `onnx`.
      OSError: naming the file, if it cannot be written.
    """
    if not isinstance(model, Model):
        raise ValueError("an exported program has no weights to export: give the workdir or model file it is from")
    outputs = [Path(output) for output in outputs]
    check_outputs(outputs)
    if weights != "float32" and any(output.suffix.lower() == ".zip" for output in outputs):
        raise ValueError(f"an exported program (.zip) has float32 weights: {weights} is for .safetensors and .onnx")
    for output in outputs:
        output.parent.mkdir(parents=True, exist_ok=True)
        kind = output.suffix.lower()
        options = {} if kind == ".zip" else {"weights": weights}
        WRITERS[kind](output, model, **options, **(onnx_options if kind == ".onnx" else {}))
    return outputs


def write_artifact(path: str | os.PathLike, model: Model) -> Path:
    """Writes a zip file with the network as a program that runs with JAX alone, on CPU, CUDA or TPU; returns its path.

    The member "program.jaxexport" is for `jax.export.deserialize`: (waves float32 [N, L] in [-1, 1] at 16 kHz, zeros
    after lengths int32 [N]) → embeddings float32 [N, D], for any N and any L from 8,000 up; the weights are inside.
    The member "model.json" describes it: backbone and arguments, front end, decision threshold, provenance.

    Once compiled, a program is as fast as the network it is from. Every new shape of a batch takes some seconds to
    compile, which a workdir's network often need not: training has compiled the same shapes for its evaluations.

    Raises:
      ValueError: weights that are not finite. OSError: naming the file, if it cannot be written.
    """
    check_finite(model)
    count, samples = jax.export.symbolic_shape("n, l", constraints=["n >= 1", f"l >= {SHORTEST}"])
    exported = jax.export.export(jax.jit(model.embed_waves), platforms=PLATFORMS)(
        jax.ShapeDtypeStruct((count, samples), jnp.float32), jax.ShapeDtypeStruct((count,), jnp.int32)
    )
    with replacing(path) as partial, zipfile.ZipFile(partial, "w") as file:
        file.writestr(PROGRAM, bytes(exported.serialize()))
        file.writestr(HEADER, header_text(model, dimension=model.dimension))
    return Path(path)


WRITERS = {".safetensors": write_model, ".zip": write_artifact, ".onnx": write_onnx}


def read_artifact(path: str | os.PathLike) -> Artifact:
    """Reads what `write_artifact` wrote.

    Both members have checksums, so damage is noticed. Before anything of a program is compiled or run, it is checked to
    have the signature of ours, no custom call but those in `ALLOWED_CUSTOM_CALLS`, no communication and no recursion.
    So it computes numbers from the waves and nothing else; that it does so in reasonable time and memory, and that the
    numbers are good for anything, no check can tell: take programs only from people whom you trust that far.

    Raises:
      OSError: naming the file, if it cannot be read.
      ModelFileError: it is something else, is damaged, or may not run; the message names the file.
    """
    try:
        with zipfile.ZipFile(path) as file:
            names = file.namelist()
            if not {PROGRAM, HEADER} <= set(names):
                torch = any(name.endswith("data.pkl") for name in names)
                raise ModelFileError(
                    f"{path}: not an exported network"
                    + ("; turn a PyTorch checkpoint into a model file with `memo-jax convert`" if torch else "")
                )
            header = parsed_header(_stored(file, HEADER))
            exported = jax.export.deserialize(bytearray(_stored(file, PROGRAM)))
        _check_signature(exported, header["dimension"])
        check_program(exported.mlir_module_serialized)
        fields = header["dimension"], str(header["fingerprint"]), dict(header["provenance"])
    except (ModelFileError, OSError):
        raise
    except Exception as error:  # whatever zipfile, json, flatbuffers and MLIR raise for content that makes no sense
        raise ModelFileError(f"{path}: not an exported network, or damaged ({one_line(error)})") from error
    call = jax.jit(exported.call)

    def function(waves, lengths):
        waves = np.asarray(waves, np.float32) / np.float32(32768)
        try:
            return call(waves, np.asarray(lengths, np.int32))
        except Exception as error:  # of JAX for another platform, of XLA for a program that makes no sense
            raise ModelFileError(f"{path}: its program cannot run here ({one_line(error)})") from error

    return Artifact(function, *fields, header["decision"])


def _stored(file: zipfile.ZipFile, name: str) -> bytes:
    """A member that is not compressed, as ours are: it cannot unpack to more than the file has."""
    if file.getinfo(name).compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{name} is compressed, which memo-jax export does not do")
    return file.read(name)


def _check_signature(exported: jax.export.Exported, dimension: int) -> None:
    """Raises ValueError unless a program is one of arrays, from waves and lengths to embeddings, on one device."""
    given = [(aval.dtype.name, aval.ndim) for aval in (*exported.in_avals, *exported.out_avals)]
    if given != [("float32", 2), ("int32", 1), ("float32", 2)] or exported.out_avals[0].shape[1] != dimension:
        raise ValueError(f"its program is not one from waves to embeddings of {dimension} numbers")
    if exported.nr_devices != 1 or exported.ordered_effects or exported.unordered_effects:
        raise ValueError("its program needs more than one device, or has effects")


def check_program(module: bytes) -> None:
    """Raises ValueError, naming the operation, if a StableHLO module may do more than compute.

    Args:
      module: a portable artifact, `jax.export.Exported.mlir_module_serialized`.
    """
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import stablehlo

    calls: dict[str, set[str]] = {}  # of each function, the names of the functions it calls
    refused: list[str] = []

    def visit(operation):
        name, attributes = operation.name, operation.attributes
        if name == "stablehlo.custom_call":
            target = ir.StringAttr(attributes["call_target_name"]).value
            if target not in ALLOWED_CUSTOM_CALLS:
                refused.append(f"the custom call {target[:100]!r}")
        elif name in COMMUNICATION or name.split(".")[0] not in ("stablehlo", "func", "builtin"):
            refused.append(f"the operation {name[:100]!r}")
        elif name == "func.func":
            called = calls.setdefault(ir.StringAttr(attributes["sym_name"]).value, set())

            def visit_call(inner):
                # Whatever refers to a function may call it.
                references = (value for value in inner.attributes.values() if isinstance(value, ir.FlatSymbolRefAttr))
                called.update(reference.value for reference in references)
                return ir.WalkResult.ADVANCE

            operation.walk(visit_call)
        return ir.WalkResult.ADVANCE

    with ir.Context() as context:
        stablehlo.register_dialect(context)
        context.attach_diagnostic_handler(lambda diagnostic: True)  # nothing on stderr: the exception says enough
        stablehlo.deserialize_portable_artifact(context, module).operation.walk(visit)
    if refused:
        raise ValueError(f"its program may not run: it holds {refused[0]}, which programs of memo-jax never do")
    finished: set[str] = set()
    while ready := {name for name in calls.keys() - finished if calls[name] <= finished}:
        finished |= ready
    if finished != calls.keys():
        raise ValueError("its program may not run: a function in it calls itself, or one that is not there")
