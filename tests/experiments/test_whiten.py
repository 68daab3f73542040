"""Whitening without labels: its effect on embeddings, and that the network it writes yields whitened ones."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny

sys.path.insert(0, str(tiny.ROOT / "experiments"))
import whiten  # noqa: E402
from memo_jax.data.batches import Utterances  # noqa: E402
from memo_jax.inference.batches import apply_to_recordings  # noqa: E402
from memo_jax.inference.embedder import load_model  # noqa: E402
from memo_jax.inference.model_file import model_of_backbone, write_model  # noqa: E402
from memo_jax.models import build_backbone  # noqa: E402
from memo_jax.scoring.metrics import eer  # noqa: E402


def speakers_and_nuisance(rng, count, noise):
    """Embeddings [count, 8] of pairs of halves: speakers differ in the first four numbers, halves in the last four."""
    speaker = np.concatenate([rng.normal(size=(count, 4)), np.zeros((count, 4))], axis=1)
    spread = np.repeat([0.1, noise], 4)
    return [3 + speaker + spread * rng.normal(size=(count, 8)) for _ in range(2)]


def rate(first, second):
    """Equal error rate of all pairs of a first and a second half, by cosine."""
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (first, second))
    return eer((a @ b.T).ravel(), np.eye(len(a), dtype=bool).ravel())


def test_what_differs_between_halves_counts_less_afterwards():
    rng = np.random.default_rng(0)
    mean, matrix = whiten.whitening(*speakers_and_nuisance(rng, 500, noise=2.0), power=0.5, floor=0.1)
    others = speakers_and_nuisance(rng, 100, noise=2.0)
    before, after = rate(*others), rate(*((half - mean) @ matrix for half in others))
    assert after < before / 2


def test_full_whitening_leaves_unit_covariance():
    halves = speakers_and_nuisance(np.random.default_rng(1), 4000, noise=0.5)
    mean, matrix = whiten.whitening(*halves, power=1.0, floor=1e-6)
    unit = np.concatenate(halves) - mean
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    np.testing.assert_allclose(np.cov((unit @ matrix).T), np.eye(8), atol=0.02)


SIZES = {
    "ecapa": {"channels": (16, 16, 48), "kernel_sizes": (5, 3), "dilations": (1, 2), "scale": 2, "stride": 2},
    "resnet": {"base_channels": 4, "blocks": (1, 1)},
}


def written_network(path, name, **more):
    """Writes a network of random weights with embeddings of 8 numbers; returns its file."""
    backbone, random = build_backbone(name, embedding_dim=8, **SIZES[name], **more), np.random.default_rng(0)
    shapes = jax.eval_shape(functools.partial(backbone.init, train=True), jax.random.key(0), jnp.zeros((2, 32, 80)))
    params = jax.tree.map(lambda x: random.normal(0, 0.3, x.shape).astype(np.float32), shapes["params"])
    statistics = jax.tree.map(lambda x: np.ones(x.shape, np.float32), shapes["batch_stats"])
    return write_model(path, model_of_backbone(backbone, {"params": params, "batch_stats": statistics}))


@pytest.fixture(params=SIZES)
def network(tmp_path, request):
    """A file of an untrained network of each kind, and the dataset."""
    return written_network(tmp_path / "m.safetensors", request.param), tiny.material().dataset


def test_the_network_it_writes_gives_whitened_embeddings(network, tmp_path, capsys):
    path, dataset = network
    given = ["--model", str(path), "--data", str(dataset), "--output", str(tmp_path / "w.safetensors")]
    assert whiten.main([*given, "--recordings", "15"]) == 0, capsys.readouterr().err
    old, new, data = load_model(path), load_model(tmp_path / "w.safetensors"), Utterances(dataset)
    rows = np.sort(np.random.default_rng(0).permutation(len(data))[:15])
    halves = [apply_to_recordings(old.function, whiten.Halves(data, second), rows) for second in (False, True)]
    mean, matrix = whiten.whitening(*halves, 0.25, 0.1)
    before, after = (apply_to_recordings(model.function, data) for model in (old, new))
    expected = (before - mean) @ matrix
    np.testing.assert_allclose(after, expected, atol=1e-3 * np.abs(expected).max())
    assert new.provenance["whitened"]["recordings"] == 15 and new.fingerprint != old.fingerprint


def test_what_cannot_be_whitened_is_named(tmp_path, capsys):
    path, dataset = written_network(tmp_path / "m.safetensors", "ecapa"), tiny.material().dataset
    normed = written_network(tmp_path / "n.safetensors", "ecapa", embedding_norm=True)
    output = tmp_path / "w.safetensors"
    for model, more, said in (
        (path, ["--recordings", "8"], "8 recordings are too few for embeddings of 8 numbers"),
        (tmp_path / "nowhere", [], "nowhere"),
        (normed, [], "only an ecapa without embedding_norm or a resnet without second_embedding"),
    ):
        assert whiten.main(["--model", str(model), "--data", str(dataset), "--output", str(output), *more]) == 2
        assert said in capsys.readouterr().err and not output.exists()
