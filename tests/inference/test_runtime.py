"""onnxruntime inside `Embedder`: JAX's embeddings, a cache that survives damage, and a start without JAX."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

import tiny
from memo_jax import cli
from memo_jax.inference import batches, runtime
from memo_jax.inference.embedder import Embedder
from memo_jax.inference.model_file import ModelFileError, write_model

pytest.importorskip("onnxruntime", reason="needs the extra onnx")
pytest.importorskip("spox", reason="needs the extra onnx")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of graphs of its own for every test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "memo_jax" / "onnx"


def waves_of(*seconds):
    rng = np.random.default_rng(0)
    return [rng.normal(0, 3000, round(s * 16000)).astype(np.int16) for s in seconds]


def relative(a, b):
    return (np.linalg.norm(a - b, axis=-1) / np.linalg.norm(b, axis=-1)).max()


def test_the_embeddings_are_those_of_jax():
    """For recordings alone, and in a padded batch; test_onnx_file compares the graphs of other networks."""
    model = tiny.untrained_model()
    jax, onnx = Embedder(model, runtime="jax"), Embedder(model, runtime="onnx")
    assert (jax.runtime, onnx.runtime) == ("jax", "onnx")
    waves = waves_of(0.5, 0.9, 0.93)
    recordings = [(wave, 16000) for wave in waves]
    assert relative(onnx.embed(recordings), jax.embed(recordings)) < 1e-4
    padded, lengths = np.zeros((3, 16000), np.int16), np.array([len(wave) for wave in waves], np.int32)
    for row, wave in zip(padded, waves):
        row[: len(wave)] = wave
    assert relative(onnx.apply(padded, lengths), np.asarray(jax.apply(padded, lengths))) < 1e-4


def test_a_long_recording_is_the_mean_of_its_windows(monkeypatch):
    monkeypatch.setattr(batches, "LONGEST_SECONDS", 1.0)
    model = tiny.untrained_model()
    (wave,) = waves_of(2.6)
    jax, onnx = (Embedder(model, runtime=name).embed(wave, 16000) for name in ("jax", "onnx"))
    parts = Embedder(model, runtime="onnx").embed([(part, 16000) for part in batches.windows(wave)])
    assert len(parts) == 3
    assert relative(onnx, jax) < 1e-4 and relative(onnx, parts.mean(0)) < 1e-6


def test_few_recordings_are_read_ahead():
    """A stream of any length needs little memory."""
    function = runtime.onnx_function(tiny.untrained_model())
    read = []

    def stream():
        for i in range(200):
            read.append(i)
            yield i, np.full(8000, i, np.int16)

    rows = function.stream(stream())
    assert next(rows)[0] == 0
    assert len(read) <= runtime.READ_AHEAD * len(os.sched_getaffinity(0)) + 1
    assert [key for key, _ in rows] == list(range(1, 200))


def test_an_error_of_a_recording_ends_the_stream():
    def broken():
        yield 0, np.ones(8000, np.int16)
        raise ValueError("no such recording")

    with pytest.raises(ValueError, match="no such recording"):
        list(runtime.onnx_function(tiny.untrained_model()).stream(broken()))


CODE = """
import sys
from memo_jax import cli
status = cli.main(sys.argv[1:])
print(*sorted({"jax", "flax", "spox", "scipy"} & set(sys.modules)), file=sys.stderr)
sys.exit(status)
"""


def test_verify_starts_without_jax_once_the_graph_is_cached(cache):
    corpus = tiny.material().corpus
    pair = [str(corpus / "s0" / "0.wav"), str(corpus / "s0" / "1.wav")]

    def verify(*options):
        command = [sys.executable, "-c", CODE, "verify", *pair, "--model", str(tiny.model_file()), "--json", *options]
        done = subprocess.run(command, capture_output=True, text=True, env=tiny.environment() | dict(os.environ))
        assert done.returncode in (0, 1), done.stderr
        return json.loads(done.stdout), done.stderr.split()

    first, imported = verify()
    assert {"jax", "flax", "spox"} <= set(imported) and len(list(cache.iterdir())) == 1
    second, imported = verify()
    assert imported == [] and second == first
    by_jax, imported = verify("--runtime=jax")
    assert "jax" in imported and by_jax["score"] == pytest.approx(first["score"], abs=1e-4)


@pytest.mark.parametrize(
    "damage", [lambda content: content[:-1], lambda content: content[:-9] + b"\0" * 9, lambda _: b""]
)
def test_a_damaged_graph_is_rebuilt(cache, damage):
    path = tiny.model_file()
    wanted = Embedder.load(path, runtime="onnx").embed(waves_of(0.7)[0], 16000)
    (graph,) = cache.iterdir()
    content = graph.read_bytes()
    graph.write_bytes(damage(content))
    np.testing.assert_array_equal(Embedder.load(path, runtime="onnx").embed(waves_of(0.7)[0], 16000), wanted)
    assert graph.read_bytes() == content


def test_a_graph_of_other_code_is_replaced(cache, monkeypatch):
    model = tiny.untrained_model()
    Embedder(model, runtime="onnx")
    (before,) = cache.iterdir()
    monkeypatch.setattr(runtime, "__version__", "another")
    assert runtime.cached_graph(model.fingerprint) is None
    Embedder(model, runtime="onnx")
    (after,) = cache.iterdir()
    assert after != before


def test_a_cache_that_cannot_be_written_only_costs_time(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert Embedder(tiny.untrained_model(), runtime="onnx").embed(waves_of(0.6)[0], 16000).shape == (8,)


def test_a_damaged_model_is_refused_although_its_graph_is_cached(tmp_path):
    model = tiny.untrained_model()
    path = write_model(tmp_path / "m.safetensors", model)
    Embedder.load(path, runtime="onnx")
    content = bytearray(path.read_bytes())
    content[-5] ^= 64
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match="its weights are not those that were written"):
        Embedder.load(path, runtime="onnx")


def test_what_runs_a_network(monkeypatch, capsys):
    assert runtime.chosen_runtime("jax") == "jax"
    assert runtime.chosen_runtime("auto") == runtime.chosen_runtime("onnx") == "onnx"
    with pytest.raises(ValueError, match="runtime 'tensorrt': choose one of auto, jax, onnx"):
        Embedder.load(tiny.model_file(), runtime="tensorrt")
    monkeypatch.setattr(runtime, "_has_accelerator", lambda: True)
    assert runtime.chosen_runtime("auto") == "jax"
    find = runtime.importlib.util.find_spec
    monkeypatch.setattr(runtime.importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else find(name))
    assert runtime.chosen_runtime("auto") == "jax"
    recording = str(tiny.material().corpus / "s0" / "0.wav")
    assert cli.main(["verify", recording, recording, "--model", str(tiny.model_file()), "--runtime=onnx"]) == 2
    assert "pip install 'memo-jax[onnx]'" in capsys.readouterr().err


def test_a_network_of_lower_precision_stays_with_jax():
    import dataclasses

    model = tiny.untrained_model()
    model = dataclasses.replace(model, arguments=model.arguments | {"dtype": "bfloat16"})
    assert Embedder(model).runtime == "jax"
    with pytest.raises(ValueError, match="computes in bfloat16"):
        Embedder(model, runtime="onnx")


def test_a_backbone_without_a_graph_stays_with_jax(monkeypatch, cache, capsys):
    """As a new one does until somebody writes its graph."""
    from memo_jax.inference import onnx_graph
    from memo_jax.models.resnet import ResNet34

    monkeypatch.delitem(onnx_graph.BACKBONES, ResNet34)
    embedder = Embedder(tiny.untrained_model())
    assert embedder.runtime == "jax" and embedder.embed(waves_of(0.7)[0], 16000).shape == (8,)
    assert not cache.exists()
    recording = str(tiny.material().corpus / "s0" / "0.wav")
    verify = ["verify", recording, recording, "--model", str(tiny.model_file())]
    assert cli.main(verify) == 0
    assert cli.main([*verify, "--runtime=onnx"]) == 2
    assert "the backbone ResNet34 has no ONNX graph yet" in capsys.readouterr().err


def test_onnxruntime_reports_nothing_to_its_makers(monkeypatch):
    from memo_jax.inference.telemetry import import_onnxruntime

    pytest.importorskip("onnxruntime")
    monkeypatch.delenv("ORT_DISABLE_TELEMETRY", raising=False)
    import_onnxruntime()
    assert os.environ["ORT_DISABLE_TELEMETRY"] == "1"
