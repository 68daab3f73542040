"""`memo-jax export` as it is typed; what it writes, used in a fresh process."""

import json
import subprocess
import sys
import zipfile

import numpy as np
import pytest

import tiny
from memo_jax.inference.embedder import Embedder
from memo_jax.inference.export import read_artifact
from memo_jax.inference.model_file import ModelFileError, read_model

WITH_JAX_ALONE = """
import json, sys, zipfile
import jax.export, numpy as np
with zipfile.ZipFile(sys.argv[1]) as file:
    program = jax.export.deserialize(bytearray(file.read("program.jaxexport")))
    assert json.loads(file.read("model.json"))["backbone"] == "resnet"
for count, samples in ((1, 8000), (3, 24000)):
    waves = 0.1 * np.random.default_rng(samples).normal(size=(count, samples)).astype(np.float32)
    print(json.dumps(np.asarray(program.call(waves, np.full(count, samples - 80, np.int32))).tolist()))
assert not [name for name in sys.modules if name.split(".")[0] in ("memo_jax", "flax")]
assert program.platforms == ("cpu", "cuda", "tpu")
"""
WITH_THE_EMBEDDER = """
import json, sys
from memo_jax import Embedder
print(json.dumps(Embedder.load(sys.argv[1]).embed(sys.argv[2]).tolist()))
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("new") / "folder"
    outputs = [folder / "a.safetensors", folder / "a.zip"]
    status, text = tiny.here("export", "--model", tiny.model_file(), "--output", *outputs)
    assert status == 0 and text.split() == [str(path) for path in outputs]
    return outputs


def in_another_process(code, *arguments):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, env=tiny.environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [np.array(json.loads(line)) for line in done.stdout.splitlines()]


def test_the_program_runs_with_jax_alone_for_any_batch_and_length(exported):
    model = tiny.untrained_model()
    found = in_another_process(WITH_JAX_ALONE, exported[1])
    for got, (count, samples) in zip(found, ((1, 8000), (3, 24000)), strict=True):
        waves = 0.1 * np.random.default_rng(samples).normal(size=(count, samples)).astype(np.float32)
        wanted = np.asarray(model.embed_waves(waves, np.full(count, samples - 80, np.int32)))
        assert got.shape == (count, 8)
        np.testing.assert_allclose(got, wanted, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("number", [0, 1])
def test_the_embedder_takes_what_was_exported(number, exported):
    recording = tiny.material().corpus / "s0" / "0.wav"
    wanted = Embedder.load(tiny.model_file()).embed(recording)
    (got,) = in_another_process(WITH_THE_EMBEDDER, exported[number], recording)
    np.testing.assert_allclose(got, wanted, atol=1e-5 * np.linalg.norm(wanted))


def test_what_it_is_of_is_inside(exported):
    model, artifact, origin = read_model(exported[0]), read_artifact(exported[1]), tiny.untrained_model()
    assert model.fingerprint == artifact.fingerprint == origin.fingerprint
    assert model.decision == artifact.decision == origin.decision
    assert model.provenance == artifact.provenance == origin.provenance and artifact.dimension == 8


def test_what_cannot_be_exported_or_read_is_named(exported, tmp_path):
    for model, output, message in (
        (tiny.model_file(), "a.pt", "no known format: choose one of .safetensors, .zip, .onnx"),
        (exported[1], "b.safetensors", "has no weights to export"),
        (tmp_path / "gone", "a.zip", "no such workdir or model file"),
    ):
        status, text = tiny.here("export", "--model", model, "--output", tmp_path / output)
        assert status == 2 and message in text, text
    assert not list(tmp_path.iterdir())
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as file:
        file.writestr("text", "no network")
    with pytest.raises(ModelFileError, match="other.zip: not an exported network"):
        Embedder.load(tmp_path / "other.zip")
