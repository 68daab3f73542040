"""What users import: a trained network that embeds recordings, compares them, and knows people by name."""

import os
import zipfile
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from memo_jax import features
from memo_jax.audio import as_audio, check_speech, read_audio
from memo_jax.files import as_path, check_bucket, in_bucket
from memo_jax.inference.batches import apply_to_recordings
from memo_jax.inference.gallery import Gallery
from memo_jax.inference.hub import is_hub_name, read_hub_model
from memo_jax.inference.model_file import Model, read_model
from memo_jax.scoring.metrics import unit_norm

if TYPE_CHECKING:
    from memo_jax.inference.export import Artifact

MIN_SECONDS = 0.5  # shorter recordings are refused: they tell nothing of a voice
DEFAULT_THRESHOLD = 0.5  # cosine, where nobody has tuned one
UNTUNED = (
    f"the default {DEFAULT_THRESHOLD}, not tuned for this model: tune it on a trial list of recordings like "
    "yours with `memo-jax eval --save-threshold`"
)


class Verification(NamedTuple):
    """`score`: cosine in [-1, 1]; `decision`: True for one speaker, score >= threshold; `threshold`."""

    score: float
    decision: bool
    threshold: float


class Identification(NamedTuple):
    """`name`: of the nearest person, None when the score is below the threshold; `score`; `threshold`; `nearest`."""

    name: str | None
    score: float
    threshold: float
    nearest: str


class Embedder:
    """A network that maps recordings of any length to embeddings, D numbers whose direction tells the speaker.

    A recording is a path of a file that `memo_jax.audio.read_audio` reads (wav, flac, ogg, opus, mp3, …), or an array
    [L] or [L, channels] (floating point in [-1, 1], or int16) with its rate in Hz. All become 16 kHz mono.

        embedder = Embedder.load("runs/small")
        embedder.embed("a.wav")                      # float32 [D]
        embedder.embed(samples, 16000)               # float32 [D]
        embedder.embed(["a.wav", "b.wav"])           # float32 [2, D]
        score, decision, threshold = embedder.verify("a.wav", "b.wav")
        embedder.enroll("Ada", ["a.wav", "b.wav"])
        embedder.identify("c.wav").name              # "Ada", or None

    Recordings longer than two minutes give the mean of the embeddings of equal windows of at most two minutes.

    Attributes:
      model: network, weights, provenance.
      apply: the compiled function below: int16 waves [N, L] at 16 kHz, zeros behind lengths [N] → embeddings [N, D].
      gallery: the people enrolled.
      threshold: cosine score from which on two recordings count as of one speaker; may be set.
      threshold_source: where it comes from, for people.
    """

    def __init__(self, model: "Model | Artifact", gallery: str | os.PathLike | None = None):
        self.model = model
        self.threshold = DEFAULT_THRESHOLD if model.decision is None else model.decision.threshold
        self.threshold_source = UNTUNED if model.decision is None else model.decision.source
        self.apply = model.function
        self._gallery_path = gallery
        if gallery is not None and os.path.exists(gallery):
            self.gallery = Gallery.load(gallery, self.fingerprint)
        else:
            self.gallery = Gallery(self.fingerprint)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike,
        *,
        branch: str | None = None,
        role: str | None = None,
        step: int | None = None,
        gallery: str | os.PathLike | None = None,
    ) -> "Embedder":
        """Loads the network of a training workdir, or what was exported, or converted from PyTorch weights.

        Args:
          path: workdir, perhaps gs://…, or a file that `memo-jax export` or `memo-jax convert` wrote.
          branch: of a workdir: which backbone; "ecapa" by default, or the only one.
          role: of a workdir: "teacher" (the moving average, default) or "student".
          step: of a workdir: which checkpoint; the latest by default, 0 is the untrained network.
          gallery: file (npz or parquet) of enrolled people; read if it is there, written at every enrolment.

        Raises:
          FileNotFoundError: nothing there, or a workdir without checkpoints.
          ModelFileError: (a ValueError) a file that is no whole model file.
          ValueError: no such branch, a gallery of another model, or a branch, role or step of a model file.
        """
        return cls(load_model(path, branch=branch, role=role, step=step), gallery)

    @property
    def fingerprint(self) -> str:
        """Of the model: embeddings of models with other fingerprints cannot be compared with these."""
        return self.model.fingerprint

    @property
    def dimension(self) -> int:
        """D, how many numbers an embedding has."""
        return self.model.dimension

    def embed(self, recordings, rate: int | None = None, *, quiet: bool = True) -> np.ndarray:
        """Returns the embedding float32 [D] of a recording, or [N, D] of a list of N, in its order.

        Args:
          recordings: a path, an array with its `rate`, a tuple (array, rate), or a list of such.
          rate: samples a second of arrays, Hz.
          quiet: False shows the progress of a list.

        Raises:
          AudioError: (a ValueError) a recording that is missing, damaged, silent, under half a second, or holds NaN;
            the message names the file, or the place in the list.
        """
        if _is_one(recordings):
            return self.embed([recordings], rate)[0]
        waves = [self._samples(one, rate, f"recording {i}") for i, one in enumerate(recordings)]
        if not waves:
            return np.zeros((0, self.dimension), np.float32)
        return apply_to_recordings(self.apply, waves, quiet=quiet)

    def verify(self, a, b, rate: int | None = None, *, threshold: float | None = None) -> Verification:
        """Compares two recordings (each as for `embed`): are they of one speaker?

        Args:
          a, b: a path, an array with its `rate`, a tuple (array, rate).
          threshold: to decide by instead of `self.threshold`, a cosine.

        Raises:
          AudioError: see `embed`.
        """
        one, other = unit_norm(self.embed([a, b], rate))
        threshold = self.threshold if threshold is None else threshold
        score = float(np.clip(one @ other, -1, 1))
        return Verification(score, score >= threshold, threshold)

    def enroll(self, name: str, recordings, rate: int | None = None) -> None:
        """Adds a person to the gallery by one recording or several, and saves the gallery when it has a file.

        Raises:
          ValueError: the name is taken or empty, there is no recording, or one cannot be used (see `embed`).
        """
        embeddings = np.atleast_2d(self.embed(recordings, rate))
        self.gallery.add(name, embeddings)
        if self._gallery_path is not None:
            try:
                self.gallery.save(self._gallery_path)
            except BaseException:
                self.gallery.remove(name)  # what is in memory and in the file stays the same
                raise

    def identify(self, recording, rate: int | None = None, *, threshold: float | None = None) -> Identification:
        """Who of the gallery speaks in a recording (as for `embed`), if anybody.

        Raises:
          ValueError: nobody is enrolled, or the recording cannot be used.
        """
        threshold = self.threshold if threshold is None else threshold
        nearest, score = self.gallery.ranking(self.embed([recording], rate)[0])[0]
        return Identification(nearest if score >= threshold else None, score, threshold, nearest)

    def _samples(self, recording, rate, name) -> np.ndarray:
        if isinstance(recording, (str, os.PathLike)):
            name, samples = os.fspath(recording), read_audio(recording)
        else:
            samples, rate = recording if isinstance(recording, tuple) else (recording, rate)
            if rate is None:
                raise ValueError(f"{name} is an array, so it needs its rate: embed(samples, 16000)")
            samples = as_audio(samples, rate, name)
        check_speech(name, samples, MIN_SECONDS)
        return samples


def _is_one(recordings) -> bool:
    """Whether this is one recording and not a list of them."""
    if isinstance(recordings, tuple):
        second = recordings[1] if len(recordings) == 2 else None  # the rate of (array, rate)
        return np.ndim(second) == 0 and not isinstance(second, (str, os.PathLike, type(None)))
    return (
        isinstance(recordings, (str, os.PathLike))
        or not isinstance(recordings, Iterable)
        or (hasattr(recordings, "__array__"))
    )


def load_model(
    path: str | os.PathLike, *, branch: str | None = None, role: str | None = None, step: int | None = None
) -> "Model | Artifact":
    """Returns the network of a workdir, a model file or an exported artifact; arguments and errors as `Embedder.load`.

    That of an artifact has no layers and weights to look at (`export.Artifact`).
    """
    given = [name for name, value in (("branch", branch), ("role", role), ("step", step)) if value is not None]
    if is_hub_name(path):
        if given:
            raise ValueError(f"{path} holds one network: choose a {given[0]} in a workdir")
        return read_hub_model(path)
    path = as_path(path)
    check_bucket(path)
    if not in_bucket(path) and not os.path.isdir(path):
        if not os.path.exists(path):
            raise FileNotFoundError(f"{path}: no such workdir or model file")
        if given:
            raise ValueError(f"{path} is a model file, which holds one network: choose a {given[0]} in a workdir")
        if zipfile.is_zipfile(path):
            from memo_jax.inference.export import read_artifact

            return read_artifact(path)
        return read_model(path)
    from memo_jax.inference.workdir import (
        workdir_model,  # here because it imports all that training needs
    )

    return workdir_model(path, branch, role or "teacher", step)


@jax.jit
def log_mel_statistics(waves: jax.Array, lengths: jax.Array) -> jax.Array:
    """Returns mean and deviation over time of the log-mel frames, [N, 2F]: the channel baseline."""
    mel = features.mel_power(waves.astype(jnp.float32) / 32768, lengths)
    return features.log_mel_statistics(mel, features.frame_count(lengths))
