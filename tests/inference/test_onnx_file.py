"""ONNX files: run by onnxruntime, they give JAX's embeddings, from waveforms and from features of any length."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny
from memo_jax import features
from memo_jax.inference import onnx_file
from memo_jax.inference.model_file import Model, write_model
from memo_jax.models import build_backbone

onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra onnx")
onnx = pytest.importorskip("onnx", reason="needs the extra onnx")
onnx_graph = pytest.importorskip("memo_jax.inference.onnx_graph", reason="needs the extra onnx")


@pytest.fixture(scope="module", autouse=True)
def traced_once():
    """Compiles each network for JAX once, however many files of it are checked against it."""
    make, kept = onnx_file._embed_with_features, {}

    def kept_or_made(model):
        return kept.setdefault(model.fingerprint, make(model))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_file, "_embed_with_features", kept_or_made)
        yield


NETWORKS = {
    "ecapa": ("ecapa", {"channels": (32, 32, 32, 32, 96), "stride": 2}, "log_mel"),
    "ecapa of wespeaker": (
        "ecapa",
        {"channels": (16, 16, 16, 16, 48), "form": "wespeaker", "embedding_norm": True},
        "wespeaker_fbank",
    ),
    "ecapa without context": (
        "ecapa",
        {"channels": (16, 16, 24, 16, 48), "global_context": False},
        "speechbrain_fbank",
    ),
    "resnet": (
        "resnet",
        {"base_channels": 4, "blocks": (2, 1, 1, 1), "second_embedding": True, "stride": 2},
        "kaldi_fbank",
    ),
    "campplus": (
        "campplus",
        {"layers": (2, 2, 2), "growth": 8, "stem_channels": 16, "plane_channels": 4},
        "sherpa_fbank",
    ),
    "ensemble": (
        "ensemble",
        {
            "resnet": {"base_channels": 4, "blocks": (1, 1), "embedding_dim": 8},
            "ecapa": {"channels": (16, 16, 48), "kernel_sizes": (5, 3), "dilations": (1, 2), "embedding_dim": 16},
        },
        "log_mel",
    ),
}


def model_of(name):
    """A network with weights and statistics unlike any default, on its front end."""
    backbone, arguments, front_end = NETWORKS[name]
    if backbone != "ensemble":
        arguments = arguments | {"embedding_dim": 16}
    shapes = jax.eval_shape(build_backbone(backbone, **arguments).init, jax.random.key(0), jnp.zeros((2, 100, 80)))
    rng = np.random.default_rng(0)

    def leaf(path, shape):
        values = rng.normal(size=shape.shape).astype(np.float32)
        if path[-1].key in ("var", "scale"):
            return 0.5 + np.abs(values)
        return values / np.sqrt(max(np.prod(shape.shape[:-1]), 1)) if path[-1].key == "kernel" else 0.1 * values

    return Model(backbone, arguments, jax.tree_util.tree_map_with_path(leaf, shapes), front_end)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("inputs", onnx_file.INPUTS)
def test_onnxruntime_gives_the_embeddings_of_jax_at_ten_lengths(name, inputs, tmp_path):
    model = model_of(name)
    path = onnx_file.write_onnx(tmp_path / "a.onnx", model, inputs=inputs)  # refuses a difference above 1e-4 itself
    assert onnx_file.check_against_jax(model, path.read_bytes(), inputs, tolerance=1e-4) < 1e-4
    graph = onnx.load(path)
    (opset,) = graph.opset_import
    assert 13 <= opset.version <= 17
    (given,), (found,) = graph.graph.input, graph.graph.output
    assert (given.name, found.name) == (inputs, "embs")
    axes = [axis.dim_param or axis.dim_value for axis in given.type.tensor_type.shape.dim]
    assert axes == (["B", "L"] if inputs == "waveform" else ["B", "T", 80])
    assert found.type.tensor_type.shape.dim[-1].dim_value == model.dimension
    session = onnxruntime.InferenceSession(path)
    assert session.get_modelmeta().custom_metadata_map["fingerprint"] == model.fingerprint


def test_a_wrong_graph_is_noticed():
    """The check compares with JAX: the file of another network does not pass it."""
    model, other = model_of("resnet"), tiny.untrained_model()
    content = onnx_file.onnx_bytes(other, "waveform", "float32", {})
    with pytest.raises(ValueError, match="differ from JAX's"):
        onnx_file.check_against_jax(
            Model("resnet", other.arguments, jax.tree.map(lambda x: 1.01 * x, other.variables), other.front_end),
            content,
            "waveform",
            tolerance=1e-4,
        )
    assert onnx_file.check_against_jax(other, content, "waveform", 1e-4) < 1e-4
    assert model.fingerprint != other.fingerprint


@pytest.mark.parametrize(("weights", "size", "deviation"), [("float16", 0.62, 2e-3), ("int8", 0.5, 0.2)])
def test_smaller_weights_give_nearly_the_same_embeddings(weights, size, deviation):
    model = model_of("ecapa")
    whole = onnx_file.onnx_bytes(model, "feats", "float32", {})
    smaller = onnx_file.onnx_bytes(model, "feats", weights, {})
    assert len(smaller) < size * len(whole)
    for inputs, content in (("feats", smaller), ("waveform", onnx_file.onnx_bytes(model, "waveform", weights, {}))):
        found = onnx_file.check_against_jax(model, content, inputs, tolerance=np.inf)
        assert 1e-6 < found < deviation, inputs


@pytest.mark.parametrize("front_end", features.FRONT_ENDS)
def test_no_front_end_is_quantised(front_end):
    """Eight bits cannot hold the range of a power spectrum."""
    model = dataclasses.replace(model_of("resnet"), front_end=front_end)
    graph = onnx.load_from_string(onnx_file.onnx_bytes(model, "waveform", "int8", {}))
    spectrum = list(itertools.takewhile(lambda node: node.op_type != "Log", graph.graph.node))
    assert {"Conv", "MatMul"} <= {node.op_type for node in spectrum}
    assert not [node.op_type for node in spectrum if "Integer" in node.op_type]
    assert [node.op_type for node in graph.graph.node if node.op_type == "ConvInteger"]


def test_a_runtime_with_another_front_end_is_refused_unless_that_is_accepted(tmp_path):
    path = tmp_path / "a.safetensors"
    write_model(path, model_of("resnet"))
    command = ["export", "--model", path, "--output", tmp_path / "a.onnx", "--onnx-runtime", "sherpa-onnx"]
    status, text = tiny.here(*command)
    assert status == 2 and "sherpa_fbank" in text and "cosine of" in text and not (tmp_path / "a.onnx").exists()
    status, text = tiny.here(*command[:-2], "--other-front-end")
    assert status == 2 and "--other-front-end is for --onnx-runtime" in text
    status, text = tiny.here(*command, "--other-front-end")
    assert status == 0 and "cosine of" in text
    metadata = onnxruntime.InferenceSession(tmp_path / "a.onnx").get_modelmeta().custom_metadata_map
    assert metadata["framework"] == "3d-speaker" and metadata["normalize_samples"] == "1"
    assert metadata["sample_rate"] == "16000" and metadata["output_dim"] == "16" and metadata["language"]
    same = dataclasses.replace(model_of("resnet"), front_end="sherpa_fbank")
    assert onnx_file.front_end_cosine(same, "sherpa_fbank") == pytest.approx(1, abs=1e-5)


def test_a_network_of_lower_precision_is_refused(tmp_path):
    model = model_of("resnet")
    model = dataclasses.replace(model, arguments=model.arguments | {"dtype": "bfloat16"})
    with pytest.raises(ValueError, match="computes in bfloat16, which JAX does"):
        onnx_file.write_onnx(tmp_path / "a.onnx", model)
    assert not list(tmp_path.iterdir())


def test_export_writes_an_onnx_file_beside_the_others(tmp_path):
    outputs = [tmp_path / "a.onnx", tmp_path / "a.safetensors"]
    status, text = tiny.here("export", "--model", tiny.model_file(), "--output", *outputs, "--json")
    assert status == 0 and json.loads(text)["files"] == [str(path) for path in outputs]
    wave = np.random.default_rng(0).uniform(-0.3, 0.3, 20_000).astype(np.float32)
    (found,) = onnxruntime.InferenceSession(outputs[0]).run(None, {"waveform": wave[None]})
    model = tiny.untrained_model()
    wanted = jax.jit(model.embed_waves)(wave[None], np.array([20_000]))
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4)


def test_features_of_a_file_are_those_of_its_front_end():
    """Normalising twice changes nothing: a runtime may have subtracted the mean already, or not."""
    model = model_of("campplus")
    session = onnxruntime.InferenceSession(onnx_file.onnx_bytes(model, "feats", "float32", {}))
    waves = np.random.default_rng(0).uniform(-0.3, 0.3, (1, 16_000)).astype(np.float32)
    x, _ = features.FRONT_ENDS["sherpa_fbank"](waves)
    (once,), (shifted,) = (session.run(None, {"feats": np.asarray(x) + shift}) for shift in (0, 3))
    np.testing.assert_allclose(once, shifted, atol=1e-3 * np.abs(once).max())
