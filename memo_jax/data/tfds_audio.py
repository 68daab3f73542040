"""Datasets of TFDS made by others, with an Audio feature (librispeech, …) → names, speakers and samples.

Reading them needs TensorFlow, which the extra `tfds` installs and nothing else in the package imports.
"""

import contextlib
import functools
import os
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from memo_jax.audio import MAX_SECONDS, SAMPLE_RATE, AudioError, as_audio
from memo_jax.files import one_line

TFDS_PREFIX = "tfds:"
NAME_FEATURES, SPEAKER_FEATURES = ("id", "utterance_id"), ("speaker_id", "speaker")


class TfdsInput(NamedTuple):
    """An input of `prepare` that is not a path: a dataset of TFDS.

    Attributes:
      name: NAME[/CONFIG][:SPLIT].
      data_dir: where TFDS keeps its datasets; "" for its own default.
    """

    name: str
    data_dir: str = ""

    @property
    def text(self) -> str:
        """The input in one line, as the other functions here take it."""
        return f"{TFDS_PREFIX}{self.name}" + (f"@{os.path.abspath(self.data_dir)}" if self.data_dir else "")

    def __str__(self) -> str:
        return self.text


def utterance_names(text: str) -> Iterator[tuple[str, str]]:
    """Yields (name, speaker) of every example of an input (`TfdsInput.text`), in the order of the files.

    A name is the feature "id" if there is one, otherwise SPLIT/number; a speaker is "speaker_id", or "" if unknown.

    Raises:
      ImportError: TensorFlow is missing. ValueError: no such dataset, not built, no or several Audio features, or the
        split is not named and there are several.
    """
    tfds, builder, split, _ = _builder_of(text)
    features = builder.info.features
    name, speaker = (next((key for key in keys if key in features), None) for keys in (NAME_FEATURES, SPEAKER_FEATURES))
    wanted = {key: True for key in (name, speaker) if key}
    if not wanted:
        yield from ((f"{split}/{number:08d}", "") for number in range(builder.info.splits[split].num_examples))
        return
    for number, example in enumerate(_examples(tfds, builder, split, tfds.decode.PartialDecoding(wanted))):
        yield _text(example[name]) if name else f"{split}/{number:08d}", _text(example[speaker]) if speaker else ""


def read_example(text: str, number: int, *, channel: str | int = "mean") -> np.ndarray:
    """Returns the samples of an example, int16 [L] at 16 kHz; fast for examples that follow one another.

    Raises:
      AudioError: as for `audio.as_audio`, naming INPUT/number; or longer than `audio.MAX_SECONDS`.
    """
    _, builder, _, audio = _builder_of(text)
    source, rate = f"{text}/{number}", builder.info.features[audio].sample_rate or SAMPLE_RATE
    samples = np.asarray(_walk(text)[number][audio])
    if np.issubdtype(samples.dtype, np.integer):  # TFDS keeps 16-bit samples in wider integers
        if samples.size and (samples.min() < -(2**15) or samples.max() >= 2**15):
            raise AudioError(source, "integer samples beyond 16 bits")
        samples = samples.astype(np.int16)
    if len(samples) > MAX_SECONDS * rate:
        raise AudioError(source, f"longer than {MAX_SECONDS:g} s: cut it into shorter recordings")
    return as_audio(samples, rate, source, channel)


@functools.lru_cache(maxsize=1)
def _builder_of(text):
    """(tfds, builder, split, name of the Audio feature) of an input."""
    try:
        import tensorflow as tf
    except ImportError as error:
        raise ImportError(
            "datasets of TFDS are read with TensorFlow, which is not installed: pip install 'memo-jax[tfds]'"
        ) from error
    import tensorflow_datasets as tfds

    with contextlib.suppress(RuntimeError, ValueError):
        tf.config.set_visible_devices([], "GPU")  # it would take all memory of an accelerator
    name, _, data_dir = text.removeprefix(TFDS_PREFIX).partition("@")
    name, _, split = name.partition(":")
    try:
        builder = tfds.builder(name, data_dir=data_dir or None)
    except Exception as error:  # not found, ambiguous, bad config, …: all kinds
        raise ValueError(f"{name}: no such dataset of TFDS ({one_line(error)})") from error
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
    return _Walk(text)


class _Walk:
    """The examples of an input by their numbers; gets from one to the next without a search."""

    def __init__(self, text):
        self._tfds, self._builder, self._split, _ = _builder_of(text)
        self._next, self._examples = None, None

    def __getitem__(self, number):
        if number != self._next:
            self._examples = _examples(self._tfds, self._builder, f"{self._split}[{number}:]")
        self._next = number + 1
        return next(self._examples)


def _text(value):
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)
