"""`memo-jax export` as users run it; what it writes, used in a fresh process."""

import dataclasses
import json
import struct
import subprocess
import sys
import zipfile

import jax
import numpy as np
import pytest

import tiny
from memo_jax.inference.embedder import Embedder, load_model
from memo_jax.inference.export import read_program
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
    embed = jax.jit(tiny.untrained_model().embed_waves)
    found = in_another_process(WITH_JAX_ALONE, exported[1])
    for got, (count, samples) in zip(found, ((1, 8000), (3, 24000)), strict=True):
        waves = 0.1 * np.random.default_rng(samples).normal(size=(count, samples)).astype(np.float32)
        wanted = np.asarray(embed(waves, np.full(count, samples - 80, np.int32)))
        assert got.shape == (count, 8)
        np.testing.assert_allclose(got, wanted, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("number", [0, 1])
def test_the_embedder_takes_what_was_exported(number, exported):
    recording = tiny.material().corpus / "s0" / "0.wav"
    wanted = Embedder.load(tiny.model_file()).embed(recording)
    (got,) = in_another_process(WITH_THE_EMBEDDER, exported[number], recording)
    np.testing.assert_allclose(got, wanted, atol=1e-5 * np.linalg.norm(wanted))


def test_what_it_is_of_is_inside(exported):
    origin = tiny.untrained_model()
    for model in (read_model(exported[0]), read_program(exported[1])):
        for field in ("backbone", "arguments", "front_end", "provenance", "decision", "fingerprint", "dimension"):
            assert getattr(model, field) == getattr(origin, field), field


def test_a_program_can_be_exported_again(exported, tmp_path):
    status, text = tiny.here("export", "--model", exported[1], "--output", tmp_path / "b.safetensors")
    assert status == 0, text
    assert (tmp_path / "b.safetensors").read_bytes() == exported[0].read_bytes()


def test_what_cannot_be_exported_or_read_is_named(exported, tmp_path):
    for model, output, message in (
        (tiny.model_file(), "a.tflite", "is not a known format: choose one of .safetensors, .zip, .onnx"),
        (tmp_path / "gone", "a.zip", "no such workdir or model file"),
    ):
        status, text = tiny.here("export", "--model", model, "--output", tmp_path / output)
        assert status == 2 and message in text, text
    assert not list(tmp_path.iterdir())
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as file:
        file.writestr("text", "no network")
    with pytest.raises(ModelFileError, match="other.zip: not an exported program"):
        Embedder.load(tmp_path / "other.zip")
    with zipfile.ZipFile(tmp_path / "torch.zip", "w") as file:
        file.writestr("archive/data.pkl", "what torch.save writes")
    with pytest.raises(ModelFileError, match="torch.zip: .* PyTorch checkpoint .* `memo-jax convert`"):
        Embedder.load(tmp_path / "torch.zip")


def rewritten(source, target, **members):
    """Copies a zip with other contents in some members, and all checksums of the zip itself correct."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            new.writestr(name, members.get(name.split(".")[0], old.read(name)))
    return target


def program_with_a_custom_call():
    """A program with the signature of ours that calls Python callback number 7 in whatever process runs it."""
    import jax
    import jax.export
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import stablehlo

    like = (jax.ShapeDtypeStruct((1, 8000), "float32"), jax.ShapeDtypeStruct((1,), "int32"))
    exported = jax.export.export(jax.jit(lambda waves, lengths: waves[:, :8] * lengths[:, None].astype("float32")))(
        *like
    )
    text = """module @jit_f attributes {mhlo.num_partitions = 1 : i32, mhlo.num_replicas = 1 : i32} {
      func.func public @main(%a: tensor<1x8000xf32>, %b: tensor<1xi32>) -> tensor<1x8xf32> {
        %0 = stablehlo.custom_call @xla_ffi_python_cpu_callback(%a) {api_version = 4 : i32, backend_config =
          {index = 7 : ui64}} : (tensor<1x8000xf32>) -> tensor<1x8xf32>
        return %0 : tensor<1x8xf32> } }"""
    with ir.Context() as context:
        stablehlo.register_dialect(context)
        module = stablehlo.serialize_portable_artifact_str(text, stablehlo.get_current_version())
    return bytes(dataclasses.replace(exported, mlir_module_serialized=module).serialize())


def test_a_strangers_program_never_runs(exported, tmp_path):
    """A custom call, bytes that may crash MLIR's parser, an endless program: none is parsed, all are refused."""
    with zipfile.ZipFile(exported[1]) as file:
        program = file.read("program.jaxexport")
    cut = program[: len(program) // 2] + bytes(100) + program[len(program) // 2 + 100 :]
    for other in (program_with_a_custom_call(), cut, b"", b"\xff" * 100):
        path = rewritten(exported[1], tmp_path / "other.zip", program=other)
        status, text = tiny.here(
            "embed", tiny.material().corpus / "s0" / "0.wav", "--model", path, "--output", tmp_path / "a.npz"
        )
        assert status == 2 and "other.zip: not an exported program of memo-jax, or damaged (its program" in text
    assert not (tmp_path / "a.npz").exists()


def test_other_members_that_make_no_sense_are_one_line(exported, tmp_path):
    deep = "[" * 100_000 + "]" * 100_000
    for members in (
        {"model": deep},
        {"model": "{}"},
        {"model": '{"format": 2, "checksum": 7}'},
        {"model": b"\xff\xfe"},
        {"weights": b""},
        {"weights": b"\xff" * 64},
    ):
        path = rewritten(exported[1], tmp_path / "other.zip", **members)
        with pytest.raises(ModelFileError, match=r"other.zip: not an exported program of memo-jax, or damaged \(.+\)$"):
            Embedder.load(path)


def test_a_zip_whose_end_cannot_be_right_is_named(tmp_path):
    """zipfile raises when asked whether this is a zip: its end record names seven more disks."""
    path = tmp_path / "odd.zip"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a", "b")
    content = path.read_bytes()
    end = content.index(b"PK\x05\x06")
    path.write_bytes(content[:end] + struct.pack("<4sLQL", b"PK\x06\x07", 7, 0, 9) + content[end:])
    with pytest.raises(ValueError, match=f"{path}: not an exported program of memo-jax, or damaged"):
        load_model(path)
