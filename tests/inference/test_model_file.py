"""Model files: what is written comes back, and what is not a whole model file is refused by name."""

import dataclasses

import jax
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

import tiny
from memo_jax.inference.model_file import Model, ModelFileError, header_text, read_model, write_model

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
    with pytest.raises(OSError, match="gone"):
        write_model(tmp_path / "gone" / "model", model)
    assert not list(tmp_path.iterdir())


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


def test_another_version_and_another_description_are_named(tmp_path):
    model = tiny.untrained_model()
    path = write_model(tmp_path / "model.safetensors", model)
    with safe_open(path, framework="numpy") as file:
        text, arrays = file.metadata()["memo_jax"], {name: file.get_tensor(name) for name in file.keys()}
    for changed, said in (
        (text.replace('"format": 2', '"format": 99'), "format 99"),
        (text.replace("resnet", "ecapa"), "description is not the one that was written"),
        (header_text(dataclasses.replace(model, backbone="transformer")), "has no transformer with log_mel"),
    ):
        assert changed != text
        save_file(arrays, path, {"memo_jax": changed})
        with pytest.raises(ModelFileError, match=said):
            read_model(path)


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
