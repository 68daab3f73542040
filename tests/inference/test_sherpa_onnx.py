"""An exported network in sherpa-onnx, with its Python package and its own front end in C++: `make test-onnx`."""

import numpy as np
import pytest

from memo_jax.audio import read_audio
from memo_jax.inference.embedder import Embedder
from memo_jax.inference.model_file import Model
from memo_jax.inference.onnx_file import write_onnx
from memo_jax.models import build_backbone
from memo_jax.scoring.metrics import eer

sherpa_onnx = pytest.importorskip("sherpa_onnx", reason="sherpa-onnx has an environment of its own: make test-onnx")

SPEAKERS, UTTERANCES = 12, 4


@pytest.fixture(scope="module")
def embedder():
    """An untrained network on sherpa-onnx's front end: the comparison needs no training."""
    import jax

    backbone, arguments = "ecapa", {"channels": (64, 64, 64, 64, 192), "embedding_dim": 32}
    variables = jax.jit(build_backbone(backbone, **arguments).init)(
        jax.random.key(0), np.zeros((1, 100, 80), np.float32)
    )
    return Embedder(Model(backbone, arguments, variables, "sherpa_fbank"))


@pytest.fixture(scope="module")
def extractor(embedder, tmp_path_factory):
    path = write_onnx(
        tmp_path_factory.mktemp("onnx") / "model.onnx", embedder.model, inputs="feats", runtime="sherpa-onnx"
    )
    return sherpa_onnx.SpeakerEmbeddingExtractor(sherpa_onnx.SpeakerEmbeddingExtractorConfig(model=str(path)))


@pytest.fixture(scope="module")
def recordings(shared):
    """Real speech: {speaker: int16 arrays}."""
    folders = sorted((shared / "speech" / "speechocean762" / "test").iterdir())[:SPEAKERS]
    return {
        folder.name: [read_audio(path) for path in sorted(folder.rglob("*.opus"))[:UTTERANCES]] for folder in folders
    }


def embedded_by(extractor, samples):
    stream = extractor.create_stream()
    stream.accept_waveform(sample_rate=16_000, waveform=samples.astype(np.float32) / 32768)
    stream.input_finished()
    return np.array(extractor.compute(stream))


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def equal_error_rate(embeddings, speakers):
    first, second = np.triu_indices(len(embeddings), 1)
    scores = (unit(embeddings) @ unit(embeddings).T)[first, second]
    return eer(scores, np.array(speakers)[first] == np.array(speakers)[second])


def test_embeddings_and_error_rate_are_ours(embedder, extractor, recordings):
    assert extractor.dim == embedder.dimension
    waves = [wave for waves in recordings.values() for wave in waves]
    speakers = [name for name, waves in recordings.items() for _ in waves]
    ours = embedder.embed([(wave, 16_000) for wave in waves])
    theirs = np.stack([embedded_by(extractor, wave) for wave in waves])
    assert (unit(ours) * unit(theirs)).sum(axis=1).min() > 0.999
    assert equal_error_rate(theirs, speakers) == pytest.approx(equal_error_rate(ours, speakers), abs=0.01)


def test_its_manager_identifies_whom_it_knows(extractor, recordings):
    manager = sherpa_onnx.SpeakerEmbeddingManager(extractor.dim)
    for name, waves in recordings.items():
        assert manager.add(name, embedded_by(extractor, waves[0]))
    for name, waves in recordings.items():
        assert manager.search(embedded_by(extractor, waves[0]), threshold=0.99) == name
