"""Datasets of TFDS with an Audio feature become ours; and nothing else ever imports TensorFlow.

Making and reading one needs TensorFlow: `make test-tfds` runs this file where the extra `tfds` is installed.
"""

import functools
import importlib.util
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

import tiny
from memo_jax.audio import AudioError
from memo_jax.data import tfds_audio
from memo_jax.data.batches import Utterances

needs_tensorflow = pytest.mark.skipif(
    importlib.util.find_spec("tensorflow") is None, reason="TensorFlow is not installed: make test-tfds"
)
SPLITS = {"train": 5, "test": 3}


def samples_of(split, number):
    """Sound of 0.6 to 1.0 s, and one that is too short."""
    rng = np.random.default_rng([len(split), number])
    length = 100 if (split, number) == ("train", 4) else 9600 + 1600 * number
    return rng.integers(-9999, 9999, length).astype(np.int16)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """TFDS's folder with three datasets: one like librispeech, stereo floats at 8 kHz without names, and no sound."""
    import tensorflow_datasets as tfds

    def build(dataset, audio, example):
        features = {"audio": audio} if audio else {}

        class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
            name = dataset
            VERSION = tfds.core.Version("1.0.0")

            def _info(self):
                given = {
                    key: tfds.features.Text() if isinstance(value, str) else np.int64
                    for key, value in example("train", 0).items()
                    if key != "audio"
                }
                return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features | given))

            def _split_generators(self, dl_manager):
                return {split: self._generate_examples(split) for split in SPLITS}

            def _generate_examples(self, split):
                yield from ((number, example(split, number)) for number in range(SPLITS[split]))

        Builder(data_dir=folder).download_and_prepare()

    folder = tmp_path_factory.mktemp("tensorflow_datasets")
    build(
        "spoken",
        tfds.features.Audio(sample_rate=16000),
        lambda split, number: {
            "audio": samples_of(split, number),
            "id": f"{split}-{9 - number}",
            "speaker_id": number % 2,
        },
    )
    build(
        "nameless",
        tfds.features.Audio(sample_rate=8000, dtype=np.float32, shape=(None, 2)),
        lambda split, number: {"audio": np.stack([samples_of(split, 1)[:8000]] * 2, 1) / np.float32(32768)},
    )
    build("silent", None, lambda split, number: {"text": "no sound"})
    return folder


@needs_tensorflow
def test_examples_become_utterances(data_dir, tmp_path):
    """From the command line: names, speakers and samples of a split; in the files' order, in one process or two."""
    for output, workers in (("one", 1), ("two", 2)):
        done = tiny.memo_jax(
            "prepare",
            "--tfds=spoken:train",
            f"--tfds-dir={data_dir}",
            f"--output={tmp_path / output}",
            f"--workers={workers}",
        )
        assert done.returncode == 0 and "left out 1 file (1 × shorter than 0.5 s)" in done.stdout, done.stderr
    utterances = Utterances(tmp_path / "one")
    assert sorted(utterances.names) == [f"train-{9 - number}" for number in range(3, -1, -1)]
    for name, speaker, samples in zip(utterances.names, utterances.speakers, utterances):
        number = 9 - int(name[-1])
        assert speaker == str(number % 2)
        np.testing.assert_array_equal(samples, samples_of("train", number))
    files = [{path.name: path.read_bytes() for path in (tmp_path / output).iterdir()} for output in ("one", "two")]
    assert files[0] == files[1]


@needs_tensorflow
def test_other_rates_channels_and_types_are_converted(data_dir, tmp_path):
    from memo_jax.data.prepare import prepare
    from memo_jax.data.tfds_audio import TfdsInput

    prepare([TfdsInput("nameless:test", str(data_dir))], tmp_path / "set", workers=1)
    utterances = Utterances(tmp_path / "set")
    assert utterances.names == [f"test/{number:08d}" for number in range(3)] and utterances.speakers == [""] * 3
    assert [len(samples) for samples in utterances] == [16000] * 3


@pytest.mark.parametrize("kind", [np.int64, np.float32])
def test_samples_of_any_type_and_number_of_channels(monkeypatch, kind):
    """As TFDS returns them: 16-bit samples in wider integers, or floats. Needs no TensorFlow: there is no dataset."""
    scale = 1 if kind is np.int64 else 32768
    mono = np.random.default_rng(0).integers(-9999, 9999, 16000)
    examples = [mono, np.stack([mono, mono[::-1]], axis=1), mono[:0], np.tile(mono, 3)]
    feature = SimpleNamespace(sample_rate=16000)
    builder = SimpleNamespace(info=SimpleNamespace(features={"audio": feature}))
    monkeypatch.setattr(tfds_audio, "_builder_of", lambda text: (None, builder, "train", "audio"))
    made = [{"audio": (samples / scale).astype(kind)} for samples in examples]
    monkeypatch.setattr(tfds_audio, "_walk", lambda text: made)
    read = functools.partial(tfds_audio.read_example, "tfds:made")
    monkeypatch.setattr(tfds_audio, "MAX_SECONDS", 2)
    np.testing.assert_array_equal(read(0), mono)
    np.testing.assert_array_equal(read(1, channel=2), mono[::-1])
    np.testing.assert_allclose(read(1), (mono + mono[::-1]) / 2, atol=1)
    for number, message in ((2, "no samples"), (3, "longer than 2 s")):
        with pytest.raises(AudioError, match=f"tfds:made/{number}: {message}"):
            read(number)
    if kind is np.int64:
        made[0] = {"audio": mono + 70_000}
        with pytest.raises(AudioError, match="integer samples beyond 16 bits"):
            read(0)


@needs_tensorflow
@pytest.mark.parametrize(
    "name, message",
    [
        ("spoken", "has the splits test, train: name one, as in --tfds spoken:test"),
        ("spoken:dev", "has the splits"),
        ("silent:train", "has 0 Audio features among text"),
        ("unheard_of:train", "unheard_of: no such dataset of TFDS"),
        ("librispeech:test_clean", "run `tfds build librispeech`"),
    ],
)
def test_what_cannot_be_read_is_explained(data_dir, tmp_path, name, message):
    status, printed = tiny.here("prepare", f"--tfds={name}", f"--tfds-dir={data_dir}", f"--output={tmp_path / 'set'}")
    assert status == 2 and message in printed
    assert os.listdir(tmp_path) == []


@pytest.fixture
def without_tensorflow(tmp_path):
    """An environment where importing TensorFlow fails and leaves a trace."""
    folder = tmp_path / "blocked"
    (folder / "tensorflow").mkdir(parents=True)
    (folder / "tensorflow" / "__init__.py").write_text(
        f"open({str(folder / 'asked')!r}, 'a').close()\nraise ImportError('no TensorFlow here')\n"
    )
    return folder, tiny.environment() | {"PYTHONPATH": os.pathsep.join((str(folder), tiny.environment()["PYTHONPATH"]))}


def test_without_tensorflow_the_extra_is_named(without_tensorflow, tmp_path):
    folder, environment = without_tensorflow
    command = ["prepare", "--tfds=librispeech:test_clean", "--output", tmp_path / "set"]
    done = subprocess.run([sys.executable, "-m", "memo_jax", *command], env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "pip install 'memo-jax[tfds]'" in done.stderr and (folder / "asked").exists()


def test_nothing_else_imports_tensorflow(without_tensorflow, tmp_path):
    """Preparing, training and evaluating where importing TensorFlow fails: nothing tries to."""
    folder, environment = without_tensorflow
    material, dataset, workdir = tiny.material(), tmp_path / "set", tmp_path / "run"
    commands = [
        ["prepare", "--input", material.corpus, "--output", dataset, "--workers=1"],
        tiny.train_arguments(workdir, "--stop-at-step=2", "data.workers=1", f"data.train={dataset}"),
        ["eval", "--workdir", workdir, "--data", dataset, "--trials", material.trials]
        + ["--output", tmp_path / "results", "--branch=resnet"],
    ]
    script = "import json, sys; from memo_jax import cli; sys.exit(max(map(cli.main, json.loads(sys.argv[1]))))"
    command = [sys.executable, "-c", script, json.dumps(commands, default=str)]
    done = subprocess.run(command, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "results" / "results.json").exists()
    assert not (folder / "asked").exists()
