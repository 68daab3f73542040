"""Model files: what is written comes back, and what is not a whole model file is refused by name."""

import dataclasses
import hashlib
import json
import re

import jax
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import tiny
from memo_jax.inference.model_file import (
    DEFAULT_MODEL,
    Decision,
    Model,
    ModelFileError,
    flattened,
    header_text,
    read_model,
    save_decision_in_file,
    write_model,
)

ARGUMENTS = {"embedding_dim": 8, "base_channels": 2, "blocks": (1, 1, 1, 1)}


def test_a_model_comes_back_as_it_was_written(tmp_path):
    model = tiny.untrained_model()
    assert model.backbone == "resnet" and model.arguments["blocks"] == (1, 1, 1, 1)
    path = write_model(tmp_path / "model.safetensors", model)
    read = read_model(path)
    assert [path.name] == [left.name for left in tmp_path.iterdir()]
    for field in ("backbone", "arguments", "front_end", "provenance", "decision", "fingerprint", "module"):
        assert getattr(read, field) == getattr(model, field), field
    jax.tree.map(np.testing.assert_array_equal, read.variables, dict(model.variables))


def test_a_fingerprint_tells_networks_apart_and_nothing_else():
    model = tiny.untrained_model()
    assert len(model.fingerprint) == 32
    other = jax.tree.map(lambda leaf: leaf, model.variables)
    other["params"]["embedding"]["bias"] = np.nextafter(other["params"]["embedding"]["bias"], np.float32(9))
    for changed in ({"variables": other}, {"front_end": "none"}, {"arguments": {**model.arguments, "dtype": "int8"}}):
        assert dataclasses.replace(model, **changed).fingerprint != model.fingerprint
    for same in ({"decision": None}, {"provenance": {}}, {"arguments": dict(reversed(model.arguments.items()))}):
        assert dataclasses.replace(model, **same).fingerprint == model.fingerprint


def test_what_does_not_fit_its_network_is_not_written(tmp_path):
    model = tiny.untrained_model()
    for arguments, named in (
        ({**ARGUMENTS, "embedding_dim": 9}, r"params/embedding/bias has shape \(8,\), the resnet needs \(9,\)"),
        ({**ARGUMENTS, "blocks": (2, 1, 1, 1)}, "stage_0_block_1.* has shape missing"),
    ):
        with pytest.raises(ValueError, match=named):
            write_model(tmp_path / "model", Model("resnet", arguments, model.variables))
    with pytest.raises(ValueError, match="unknown front end 'cepstrum'"):
        write_model(tmp_path / "model", dataclasses.replace(model, front_end="cepstrum"))
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        write_model(tmp_path / "file" / "model", model)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_is_no_whole_model_file_is_named(tmp_path):
    path = tmp_path / "model.safetensors"
    whole = write_model(path, tiny.untrained_model()).read_bytes()
    with pytest.raises(FileNotFoundError, match="no such model file"):
        read_model(tmp_path / "none")
    for content, reason in (
        (b"", "not a model file"),
        (b"text that is no model", "not a model file"),
        (whole[:5000], "not a model file"),
        (whole[:-200], "not a model file"),
        (whole[:-9] + b"\1" + whole[-8:], "not a model file, or damaged .its weights"),
    ):
        path.write_bytes(content)
        with pytest.raises(ModelFileError, match=f"{path}: {reason}"):
            read_model(path)
    save_file({"conv1.weight": np.zeros(3, np.float32)}, path)
    with pytest.raises(ModelFileError, match="memo-jax convert"):
        read_model(path)
    path.rename(tmp_path / "model.onnx")
    with pytest.raises(ModelFileError, match="model.onnx: ONNX files are for other runtimes: give the model file"):
        read_model(tmp_path / "model.onnx")


def test_another_version_and_another_description_are_named(tmp_path):
    model = tiny.untrained_model()
    path = write_model(tmp_path / "model.safetensors", model)
    with safe_open(path, framework="numpy") as file:
        text, arrays = file.metadata()["memo_jax"], {name: file.get_tensor(name) for name in file.keys()}
    for changes, said in (
        ({"format": 99}, "format 99 and not 2"),
        ({"backbone": "transformer"}, "has no transformer with log_mel"),
        ({"arguments": {"embedding_dim": "8"}}, "a resnet cannot have embedding_dim 8"),
        ({"arguments": {"blocks": [1] * 1000}}, "a resnet cannot have blocks"),
        ({"arguments": {"base_channels": 1 << 40}}, "a resnet cannot have base_channels"),
        ({"arguments": {"remat": True}}, "a resnet cannot have remat"),
        ({"decision": {"threshold": 2.0, "scale": 1, "offset": 0, "source": ""}}, "the threshold is 2: .* in .-1, 1."),
        ({"decision": {"threshold": 0.5, "scale": float("inf"), "offset": 0, "source": ""}}, "scale .* must be finite"),
        ({"arguments": 7}, "damaged"),
        ({"provenance": [[[]]]}, "damaged"),
    ):
        header = json.loads(text) | changes
        del header["checksum"]
        digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()[:32]
        save_file(arrays, path, {"memo_jax": json.dumps(header | {"checksum": digest})})
        with pytest.raises(ModelFileError, match=f"{path}: .*{said}"):
            read_model(path)
    save_file(arrays, path, {"memo_jax": text.replace("0.4", "0.5")})  # the threshold
    with pytest.raises(ModelFileError, match="its description is not the one that was written"):
        read_model(path)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_named_when_written_and_when_read(value, tmp_path):
    """Even where all checksums are right, as in a file from a program that does not check."""
    model = tiny.untrained_model()
    variables = jax.tree.map(np.array, model.variables)
    variables["params"]["embedding"]["bias"][3] = value
    damaged = dataclasses.replace(model, variables=variables)
    said = "tensor params/embedding/bias has 1 of 8 values that are NaN or infinite"
    with pytest.raises(ValueError, match=said):
        write_model(tmp_path / "a.safetensors", damaged)
    save_file(flattened(variables), tmp_path / "b.safetensors", {"memo_jax": header_text(damaged)})
    with pytest.raises(ModelFileError, match=f"b.safetensors: .*{said}"):
        read_model(tmp_path / "b.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["b.safetensors"]
    variables = jax.tree.map(lambda x: -np.ones_like(x), model.variables["batch_stats"])
    with pytest.raises(ValueError, match=r"tensor batch_stats/\S*/var has negative values, which no variance has"):
        write_model(
            tmp_path / "c.safetensors",
            dataclasses.replace(model, variables=model.variables | {"batch_stats": variables}),
        )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"embedding_dim": 9}, r"embedding/kernel has shape \(320, 8\) where \(320, 9\) is needed"),
        ({"blocks": (2, 1, 1, 1)}, "the model's tensors are not those of a resnet"),
    ],
)
def test_tensors_of_another_network_are_one_line_when_it_is_used(arguments, said, tmp_path):
    model = tiny.untrained_model()
    other = dataclasses.replace(model, arguments=model.arguments | arguments)
    path = tmp_path / "a.safetensors"
    save_file(flattened(model.variables), path, {"memo_jax": header_text(other)})
    recording = tiny.material().corpus / "s0" / "0.wav"
    status, text = tiny.here("verify", recording, recording, "--model", path, "--runtime=jax")
    assert status == 2 and re.search(said, text) and text.count("\n") == 1, text
    status, text = tiny.here("verify", recording, recording, "--model", path, "--runtime=auto")
    assert status == 2 and "the model's tensors are not those of a resnet" in text and text.count("\n") == 1, text


def test_half_the_size_is_another_model_that_reads_back_as_written(tmp_path):
    model = tiny.untrained_model()
    whole, half = (
        write_model(tmp_path / "a.safetensors", model),
        write_model(tmp_path / "b.safetensors", model, "float16"),
    )
    assert half.stat().st_size < 0.75 * whole.stat().st_size
    read = read_model(half)
    assert read.fingerprint != model.fingerprint
    for given, found in zip(jax.tree.leaves(model.variables), jax.tree.leaves(read.variables), strict=True):
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, np.asarray(given, np.float16).astype(np.float32))
    with pytest.raises(ValueError, match="weights 'int8': choose float32 or float16"):
        write_model(tmp_path / "c.safetensors", model, "int8")


def test_a_decision_is_replaced_and_the_tensors_stay_bit_by_bit(tmp_path):
    """Even those of a float16 file, which would be twice as large if it were rewritten."""
    path = write_model(tmp_path / "m.safetensors", tiny.untrained_model(), "float16")
    before, whole = load_file(path), path.read_bytes()
    decision = Decision(0.3, 5.0, -2.0, "another list")
    save_decision_in_file(path, decision)
    after = load_file(path)
    assert read_model(path).decision == decision and before.keys() == after.keys()
    for name, tensor in before.items():
        np.testing.assert_array_equal(tensor, after[name], strict=True)
    assert abs(path.stat().st_size - len(whole)) < 200
    path.write_bytes(whole[:-8])
    with pytest.raises(ModelFileError, match="m.safetensors: not a model file, or damaged"):
        save_decision_in_file(path, decision)
    assert path.read_bytes() == whole[:-8]


def test_the_card_describes_the_network_of_the_package():
    """Size, fingerprint, threshold and calibration on the card are those of the file, which stays below 8 MB."""
    model, size = read_model(DEFAULT_MODEL), DEFAULT_MODEL.stat().st_size
    card = " ".join(DEFAULT_MODEL.with_suffix(".md").read_text().split())
    decision = model.decision
    assert size < 8e6 and f"float16, {size / 1e6:.1f} MB; fingerprint {model.fingerprint}" in card
    assert f"Threshold {decision.threshold:.3f} (" in card
    sign = "−" if decision.offset < 0 else "+"
    assert f"calibration {decision.scale:.3f} · score {sign} {abs(decision.offset):.3f} " in card
