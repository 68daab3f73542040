"""Files of torch.save to model files and back, including tensors that none of our networks has."""

import numpy as np
import pytest
import torch

import tiny
from memo_jax.inference import convert
from memo_jax.inference.model_file import read_model


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """The tiny model as wespeaker's state_dict."""
    path = tmp_path_factory.mktemp("torch") / "theirs.pt"
    status, printed = tiny.here("convert", tiny.model_file(), "--to", "wespeaker", "--output", path)
    assert status == 0 and "add --front-end log_mel" in printed, printed
    return path


def test_there_and_back_is_exact(theirs, tmp_path):
    """Counters stay scalars, as PyTorch needs; the front end is given, since such a file cannot record it."""
    content = torch.load(theirs, weights_only=True)
    assert content["bn1.num_batches_tracked"].shape == () and content["bn1.num_batches_tracked"].dtype == torch.int64
    output = tmp_path / "model.safetensors"
    status, printed = tiny.here("convert", theirs, "--output", output, "--front-end", "log_mel")
    assert status == 0, printed
    assert read_model(output).fingerprint == tiny.untrained_model().fingerprint
    status, printed = tiny.here("convert", theirs, "--output", output)
    assert status == 0 and read_model(output).front_end == "wespeaker_fbank"


def wrapped(content):
    averaged = torch.optim.swa_utils.AveragedModel(torch.nn.Linear(2, 2)).state_dict()
    return {
        "epoch": 3,
        "optimizer": {
            "state": {0: {"step": torch.tensor(4.0), "exp_avg": torch.zeros(3).to_sparse()}},
            "param_groups": [],
        },
        "model": {f"_orig_mod.module.{name}": x for name, x in content.items()}
        | {"n_averaged": averaged["n_averaged"]},
    }


@pytest.mark.parametrize(
    "wrap", [wrapped, lambda content: {"state_dict": {f"resnet.{n}": x for n, x in content.items()}}]
)
def test_what_trainers_put_around_a_network_is_ignored(wrap, theirs, tmp_path):
    torch.save(wrap(torch.load(theirs, weights_only=True)), tmp_path / "a.ckpt")
    found = convert.torch_to_model(tmp_path / "a.ckpt", front_end="log_mel")
    assert found.fingerprint == tiny.untrained_model().fingerprint


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda x: x.to_sparse(), "is not a plain array but torch.sparse_coo"),
        (lambda x: torch.zeros(1, dtype=x.dtype).expand(x.shape), "larger than what the file holds"),
        (lambda x: torch.zeros(1).expand(1 << 40), "larger than what the file holds"),
        (lambda x: x.to(torch.complex64), "has complex numbers"),
        (lambda x: torch.empty(x.shape, device="meta"), "is not a plain array but torch.strided, meta"),
        (lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), "is not a plain array"),
        (lambda x: x * float("nan"), "values that are NaN or infinite"),
        (lambda x: x[:, :, :2], "has shape [2, 1, 2, 3], expected [2, 1, 3, 3]"),
    ],
)
def test_a_tensor_that_is_no_plain_array_is_named(change, said, theirs, tmp_path):
    content = torch.load(theirs, weights_only=True)
    content["conv1.weight"] = change(content["conv1.weight"])
    torch.save(content, tmp_path / "a.pt")
    status, printed = tiny.here("convert", tmp_path / "a.pt", "--output", tmp_path / "m.safetensors")
    assert status == 2 and "tensor 'conv1.weight'" in printed and said in printed and printed.count("\n") == 1, printed
    assert not (tmp_path / "m.safetensors").exists()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float64])
def test_other_precisions_are_read(dtype, theirs, tmp_path):
    content = torch.load(theirs, weights_only=True)
    content["conv1.weight"] = content["conv1.weight"].to(dtype)
    torch.save(content, tmp_path / "a.pt")
    found = convert.model_to_torch(convert.torch_to_model(tmp_path / "a.pt"), "wespeaker")["conv1.weight"]
    np.testing.assert_array_equal(found, content["conv1.weight"].float().numpy())


def test_damaged_files_are_one_line(theirs, tmp_path):
    """Bytes changed at random, or the end missing: refused, or harmless."""
    whole, rng = theirs.read_bytes(), np.random.default_rng(0)
    path, refused = tmp_path / "a.pt", 0
    for _ in range(150):
        damaged = bytearray(whole)
        for place in rng.integers(0, len(whole), rng.integers(1, 9)):
            damaged[place] = rng.integers(256)
        path.write_bytes(damaged[: rng.integers(1, len(whole))] if rng.random() < 0.2 else damaged)
        try:
            assert convert.torch_to_model(path, front_end="log_mel").fingerprint == tiny.untrained_model().fingerprint
        except ValueError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused >= 100
