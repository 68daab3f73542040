"""Networks as ONNX files, for runtimes on phones, in browsers and in other toolkits.

Two forms: `feats` [B, T, 80] → `embs` [B, D], which sherpa-onnx and wespeaker's runtime load, and `waveform` [B, L] →
`embs` with the front end inside. Needs the extra `onnx`.
"""

import itertools
import os
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np

from memo_jax.audio import SAMPLE_RATE
from memo_jax.features import FRONT_ENDS
from memo_jax.files import replacing
from memo_jax.inference.model_file import Model, ModelFileError, check_model, check_precision
from memo_jax.inference.network import embed_waves
from memo_jax.inference.telemetry import import_onnxruntime
from memo_jax.version import __version__

INPUTS = ("waveform", "feats")
ONNX_WEIGHTS = ("float32", "float16", "int8")
TOLERANCE = 1e-4  # largest deviation from JAX's embedding, relative to its norm, of float32 weights
CHECKED_SECONDS = (0.5, 0.63, 0.9, 1.0, 1.37, 2.0, 2.51, 3.0, 4.2, 6.0)

# What sherpa-onnx reads: `framework` and `normalize_samples` (1: samples in [-1, 1]; 0: times 32,768). Its front end in
# C++ is fixed; wespeaker's runtime computes its own. Both subtract the mean over time.
OTHER_RUNTIMES = {
    "sherpa-onnx": ("sherpa_fbank", {"framework": "3d-speaker", "normalize_samples": "1"}),
    "wespeaker": ("wespeaker_fbank", {"framework": "wespeaker", "normalize_samples": "0"}),
}


def write_onnx(
    path: str | os.PathLike,
    model: Model,
    *,
    inputs: str = "waveform",
    weights: str = "float32",
    runtime: str | None = None,
    other_front_end: bool = False,
) -> Path:
    """Writes a network as an ONNX file, whole or not at all, and checks it with onnxruntime; returns its path.

    Args:
      path: of the file.
      model: network, weights and front end.
      inputs: "waveform": float32 [B, L] in [-1, 1] at 16 kHz, with the model's front end in the graph. "feats":
        float32 [B, T, 80], the front end's spectrum; the graph normalises it over time, which changes nothing where a
        runtime has done so before.
      weights: "float32"; "float16": kept as float16 and computed in float32; "int8": quantised dynamically, for matrix
        products and convolutions of the network.
      runtime: of "feats": "sherpa-onnx" or "wespeaker", whose metadata the file gets.
      other_front_end: let a runtime compute other features than the model was trained with; prints the cosine that
        results.

    Raises:
      ImportError: the extra `onnx` is not installed.
      ValueError: an unknown form, a runtime that does not compute the model's front end, a backbone without an ONNX
        graph, or a network that does not compute in float32.
    """
    if inputs not in INPUTS or weights not in ONNX_WEIGHTS:
        raise ValueError(f"inputs {inputs!r} with weights {weights!r}: choose from {INPUTS} and {ONNX_WEIGHTS}")
    if runtime is not None and (runtime not in OTHER_RUNTIMES or inputs != "feats"):
        raise ValueError(
            f"runtime {runtime!r} with inputs {inputs!r}: choose one of {tuple(OTHER_RUNTIMES)}, with feats"
        )
    check_precision(model)
    needed, metadata = OTHER_RUNTIMES.get(runtime, (model.front_end, {}))
    if needed != model.front_end:
        difference = (
            f"{runtime} computes {needed} and this model was trained with {model.front_end}: the embeddings have a "
            f"cosine of {front_end_cosine(model, needed):.3f} to the right ones"
        )
        if not other_front_end:
            raise ValueError(
                f"{difference}. Train with --config.features.front_end={needed}, export waveforms as the input, or "
                "accept it with --other-front-end"
            )
        print(f"memo-jax: {difference}", file=sys.stderr)
    content = onnx_bytes(model, inputs, weights, metadata)
    with replacing(path) as partial:
        partial.write_bytes(content)
    return Path(path)


def onnx_bytes(model: Model, inputs: str, weights: str, metadata: dict[str, str]) -> bytes:
    """Returns the content of an ONNX file, checked; arguments as for `write_onnx`."""
    graph = _graph(model, inputs)
    if weights == "float16":
        _keep_as_float16(graph)
    elif weights == "int8":
        graph = _quantized(graph, keep=_front_end_nodes(graph) if inputs == "waveform" else [])
    import onnx

    graph.producer_name, graph.producer_version = "memo_jax", __version__
    onnx.helper.set_model_props(graph, metadata_of(model) | metadata)
    content = graph.SerializeToString()
    check_against_jax(model, content, inputs, tolerance=TOLERANCE if weights == "float32" else np.inf)
    return content


def waveform_graph(model: Model) -> bytes:
    """Returns a float32 network with `waveform` as its input, checked by itself but not against JAX.

    Raises:
      ImportError: the extra `onnx` is not installed.
      ModelFileError: (a ValueError) the variables are not those that the backbone needs.
    """
    try:
        check_model(model)
    except ValueError as error:
        raise ModelFileError(f"the model's tensors are not those of a {model.backbone}: {error}") from error
    return _graph(model, "waveform").SerializeToString()


def _graph(model, inputs):
    """Returns the float32 network as an ONNX graph."""
    try:
        import onnx
        import spox

        from memo_jax.inference import onnx_graph
    except ImportError as error:
        raise ImportError(f"ONNX files need the extra `onnx`: pip install 'memo-jax[onnx]' ({error})") from error
    variables = jax.device_get(model.variables)
    build = onnx_graph.of_waveforms if inputs == "waveform" else onnx_graph.of_features
    given, embeddings = build(model.module, model.front_end, variables)
    graph = spox.build({inputs: given}, {"embs": embeddings})
    onnx.checker.check_model(graph, full_check=True)
    _move_constants_to_initializers(graph)
    return graph


def metadata_of(model: Model) -> dict[str, str]:
    """Returns the metadata that every file has."""
    return {
        "language": "any",
        "sample_rate": str(SAMPLE_RATE),
        "output_dim": str(model.dimension),
        "feature_normalize_type": "global-mean",
        "front_end": model.front_end,
        "backbone": model.backbone,
        "fingerprint": model.fingerprint,
        "url": "",
        "comment": f"{model.backbone} of memo_jax {__version__}",
    } | ({} if model.decision is None else {"threshold": repr(model.decision.threshold)})


def check_against_jax(model: Model, content: bytes, inputs: str, tolerance: float) -> float:
    """Runs an ONNX file with onnxruntime on ten lengths; returns its largest deviation from JAX's embeddings.

    The deviation is that of an embedding, relative to its norm. Raises ValueError where it is above `tolerance` or not
    finite.
    """
    onnxruntime = import_onnxruntime()
    rng = np.random.default_rng(0)
    lengths = np.array([round(seconds * SAMPLE_RATE) for seconds in CHECKED_SECONDS], np.int32)
    waves = rng.uniform(-0.5, 0.5, (len(lengths), lengths.max())).astype(np.float32)
    waves *= np.arange(waves.shape[1]) < lengths[:, None]
    wanted, features, frames = map(np.asarray, _embed_with_features(model)(waves, lengths))
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    worst = 0.0
    for wave, length, x, count, embedding in zip(waves, lengths, features, frames, wanted, strict=True):
        (found,) = session.run(None, {inputs: (wave[:length] if inputs == "waveform" else x[:count])[None]})
        deviation = np.linalg.norm(found[0] - embedding) / np.linalg.norm(embedding)
        worst = max(worst, float(np.nan_to_num(deviation, nan=np.inf)))
    if not worst <= tolerance or not np.isfinite(worst):
        raise ValueError(f"onnxruntime's embeddings differ from JAX's by {worst:.1e} of their norm: this is a bug")
    return worst


def _embed_with_features(model: Model):
    """Returns the compiled function from waves, lengths to (embeddings, features, frames)."""

    def embed(waves, lengths):
        x, frames = FRONT_ENDS[model.front_end](waves, lengths)
        return model.module.apply(model.variables, x, frames), x, frames

    return jax.jit(embed)


def front_end_cosine(model: Model, front_end: str) -> float:
    """Returns the mean cosine between a model's embeddings with its own front end and with another.

    Over ten synthetic recordings of three seconds: voiced pulses through moving resonances, with a little noise.
    """
    waves = np.stack([_speech_like(3 * SAMPLE_RATE, np.random.default_rng((0, i))) for i in range(10)])
    lengths = np.full(len(waves), waves.shape[1], np.int32)
    embed = jax.jit(embed_waves, static_argnums=(0, 1))
    own, other = (
        np.asarray(embed(model.module, name, model.variables, waves, lengths)) for name in (model.front_end, front_end)
    )
    return float(np.mean((own * other).sum(1) / (np.linalg.norm(own, axis=1) * np.linalg.norm(other, axis=1))))


def _speech_like(samples: int, rng: np.random.Generator) -> np.ndarray:
    """Returns pulses of a moving pitch through slowly moving resonances, float32 [samples]."""
    time = np.arange(samples) / SAMPLE_RATE
    pitch = rng.uniform(90, 220) * (1 + 0.1 * np.sin(2 * np.pi * rng.uniform(0.5, 2) * time))
    phase = 2 * np.pi * np.cumsum(pitch) / SAMPLE_RATE
    wave = np.zeros(samples)
    for harmonic in range(1, 30):
        formants = [(500, 150), (1500, 300), (2500, 400)]
        gain = sum(
            np.exp(-0.5 * ((harmonic * pitch - f * (1 + 0.2 * np.sin(2 * np.pi * 3 * time + f))) / w) ** 2)
            for f, w in formants
        )
        wave += gain * np.sin(harmonic * phase)
    wave = wave * (0.6 + 0.4 * np.sin(2 * np.pi * 4 * time)) + 0.01 * rng.standard_normal(samples)
    return (0.3 * wave / np.abs(wave).max()).astype(np.float32)


def _move_constants_to_initializers(graph) -> None:
    """Makes constants initializers, where runtimes and quantisers look for weights."""
    constants = [node for node in graph.graph.node if node.op_type == "Constant"]
    for node in constants:
        tensor = graph.graph.initializer.add()
        tensor.CopyFrom(node.attribute[0].t)
        tensor.name = node.output[0]
        graph.graph.node.remove(node)


def _keep_as_float16(graph) -> None:
    """Keeps weights of more than 1,000 numbers as float16, which the graph casts to float32."""
    import onnx

    for weights in graph.graph.initializer:
        array = onnx.numpy_helper.to_array(weights)
        if array.dtype == np.float32 and array.size > 1000:
            name = weights.name
            weights.CopyFrom(onnx.numpy_helper.from_array(array.astype(np.float16), f"{name}_float16"))
            cast = onnx.helper.make_node("Cast", [weights.name], [name], to=onnx.TensorProto.FLOAT)
            graph.graph.node.insert(0, cast)


def _front_end_nodes(graph) -> list[str]:
    """Returns the nodes from a graph's waveforms to its spectrum, which ends with the only logarithm there is."""
    return [node.name for node in itertools.takewhile(lambda node: node.op_type != "Log", graph.graph.node)]


def _quantized(graph, keep: list[str]):
    """Returns the graph with int8 weights in matrix products and convolutions, their inputs quantised at run time.

    Nodes to `keep` stay in float32: eight bits cannot hold the range of a power spectrum, and a front end of eight bits
    makes the embeddings useless.
    """
    import onnx

    import_onnxruntime()
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "quantized.onnx"
        quantize_dynamic(
            graph,
            path,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=keep,
            extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
        )
        return onnx.load(path)
