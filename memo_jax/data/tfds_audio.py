"""Datasets of TFDS made by others, with an Audio feature (librispeech, …) → names, speakers and samples.

Reading them needs TensorFlow, which the extra `tfds` brings and nothing else in the package imports.
"""

import contextlib
import functools
import io
import os
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import soundfile

from memo_jax.audio import SAMPLE_RATE, AudioError, read_audio

PREFIX = "tfds:"
NAME_FEATURES, SPEAKER_FEATURES = ("id", "utterance_id"), ("speaker_id", "speaker")


class TfdsInput(NamedTuple):
    """An input of `prepare` that is no path: the dataset NAME[/CONFIG][:SPLIT], in TFDS's folder `data_dir` ("": its own)."""

    name: str
    data_dir: str = ""

    @property
    def text(self) -> str:
        """The input in one line, as the other functions here take it."""
        return f"{PREFIX}{self.name}" + (f"@{os.path.abspath(self.data_dir)}" if self.data_dir else "")

    def __str__(self) -> str:
        return self.text


def utterance_names(text: str):
    """Yields (name, speaker) of every example of an input, in the order of the files.

    A name is the feature "id" where there is one, and else SPLIT/number; a speaker is "speaker_id", or "" unknown.

    Raises:
      ImportError: TensorFlow is missing. ValueError: no such dataset, not built, no or several Audio features, or the
        split is not named and there are several.
    """
    tfds, builder, split, _ = _opened(text)
    features = builder.info.features
    name, speaker = (next((key for key in keys if key in features), None) for keys in (NAME_FEATURES, SPEAKER_FEATURES))
    wanted = {key: True for key in (name, speaker) if key}
    if not wanted:
        yield from ((f"{split}/{number:08d}", "") for number in range(builder.info.splits[split].num_examples))
        return
    for number, example in enumerate(_examples(tfds, builder, split, tfds.decode.PartialDecoding(wanted))):
        yield _text(example[name]) if name else f"{split}/{number:08d}", _text(example[speaker]) if speaker else ""


def read_example(text: str, number: int, *, max_seconds: float) -> np.ndarray:
    """The samples of an example, int16 [L] at 16 kHz; fast for examples that follow one another.

    Raises AudioError as `audio.read_audio`, with "INPUT/number" for a name.
    """
    _, builder, _, audio = _opened(text)
    source, rate = f"{text}/{number}", builder.info.features[audio].sample_rate or SAMPLE_RATE
    samples = np.asarray(_walk(text)(number)[audio])
    if np.issubdtype(samples.dtype, np.integer):  # TFDS keeps 16-bit samples in wider integers
        if samples.size and (samples.min() < -(2**15) or samples.max() >= 2**15):
            raise AudioError(source, "integer samples beyond 16 bits")
        samples, subtype = samples.astype(np.int16), "PCM_16"
    else:
        subtype = "FLOAT"
    if not samples.size:
        raise AudioError(source, "no samples")
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="WAV", subtype=subtype)
    file.seek(0)
    file.name = source + ".wav"
    try:
        return read_audio(file, max_seconds=max_seconds)
    except AudioError as error:
        raise AudioError(source, error.reason) from None


@functools.lru_cache(maxsize=1)
def _opened(text):
    """(tfds, builder, split, name of the Audio feature) of an input."""
    try:
        import tensorflow as tf
    except ImportError as error:
        raise ImportError(
            "datasets of TFDS are read with TensorFlow, which is not installed: pip install 'memo-jax[tfds]'"
        ) from error
    import tensorflow_datasets as tfds

    with contextlib.suppress(RuntimeError, ValueError):
        tf.config.set_visible_devices([], "GPU")  # it would take all memory of the accelerator
    name, _, data_dir = text.removeprefix(PREFIX).partition("@")
    name, _, split = name.partition(":")
    try:
        builder = tfds.builder(name, data_dir=data_dir or None)
    except Exception as error:  # not found, ambiguous, bad config, …: all kinds
        raise ValueError(f"{name}: no such dataset of TFDS ({str(error).splitlines()[0]})") from error
    if not os.path.isfile(os.path.join(builder.data_dir, "dataset_info.json")):
        raise ValueError(
            f"{name} has not been built in {builder.data_dir}: run `tfds build {name}`, or say with "
            "--tfds-dir where it is"
        )
    splits = sorted(builder.info.splits)
    if not split and len(splits) == 1:
        (split,) = splits
    if split not in splits:
        raise ValueError(f"{name} has the splits {', '.join(splits)}: name one, as in --tfds {name}:{splits[0]}")
    audio = [key for key, feature in builder.info.features.items() if isinstance(feature, tfds.features.Audio)]
    if len(audio) != 1:
        raise ValueError(
            f"{name} has {len(audio)} Audio features among {', '.join(builder.info.features)}; expected one"
        )
    return tfds, builder, split, audio[0]


def _examples(tfds, builder, split, decoders=None):
    """Examples as dicts of numpy arrays, file after file."""
    config = tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False, add_tfds_id=False)
    dataset = builder.as_dataset(split=split, read_config=config, decoders=decoders, shuffle_files=False)
    return dataset.as_numpy_iterator()


@functools.lru_cache(maxsize=1)
def _walk(text):
    """A function number → example, which goes on from one example to the next without looking for it."""
    tfds, builder, split, _ = _opened(text)
    position, examples = None, None

    def example(number):
        nonlocal position, examples
        if number != position:
            examples = _examples(tfds, builder, f"{split}[{number}:]")
        position = number + 1
        return next(examples)

    return example


def _text(value):
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)
