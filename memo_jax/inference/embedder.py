"""What users import: a trained network that embeds recordings, compares them, and recognises enrolled people."""

import numbers
import os
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from memo_jax.audio import as_audio, check_speech, read_excerpt, speech_of
from memo_jax.audio.error import check_rate
from memo_jax.audio.speech import check_installed
from memo_jax.files import as_path, check_bucket, in_bucket, is_zip
from memo_jax.inference.batches import apply_to_recordings
from memo_jax.inference.gallery import Gallery, changing_gallery
from memo_jax.inference.hub import is_hub_name, read_hub_model
from memo_jax.inference.model_file import (
    DEFAULT_MODEL,
    Model,
    ModelFileError,
    NoGraphError,
    check_finite,
    check_threshold,
    members_of,
    other_precision,
    read_decision,
    read_model,
)
from memo_jax.inference.runtime import cached_graph, chosen_runtime, onnx_function
from memo_jax.scoring.metrics import unit_norm

# A path, an array, or an array with its rate in Hz.
AnyRecording = str | os.PathLike | np.ndarray | tuple[np.ndarray, int]

MIN_SECONDS = 0.5  # shorter recordings are refused: they say too little about a voice
DEFAULT_THRESHOLD = 0.5  # cosine, if none has been tuned
UNTUNED = (
    "the default, not tuned for this model: tune it on a trial list of recordings like yours with "
    "`memo-jax eval --save-threshold`"
)


class Verification(NamedTuple):
    """`score`: cosine in [-1, 1]; `decision`: whether it is the same speaker, score >= threshold; `threshold`."""

    score: float
    decision: bool
    threshold: float


class Identification(NamedTuple):
    """`name`: the nearest person, None if the score is below the threshold; `score`; `threshold`; `nearest`."""

    name: str | None
    score: float
    threshold: float
    nearest: str


class Embedder:
    """A network that maps recordings of any length to embeddings: D numbers whose direction characterises the speaker.

    A recording is the path of a file that `memo_jax.audio.read_audio` reads (wav, flac, ogg, opus, mp3, …), or an array
    [L] or [L, channels] (floating point in [-1, 1], or int16) with its rate in Hz. All are converted to 16 kHz mono.
    "a.wav:12.5-20" is the excerpt from second 12.5 to second 20, unless a file really has that name.

        embedder = Embedder.load("runs/small")
        embedder.embed("a.wav")                      # float32 [D]
        embedder.embed(samples, 16000)               # float32 [D]
        embedder.embed(["a.wav", "b.wav"])           # float32 [2, D]
        score, decision, threshold = embedder.verify("a.wav", "b.wav")
        embedder.enroll("Ada", ["a.wav", "b.wav"])
        embedder.identify("c.wav").name              # "Ada", or None

    The embedding of a recording longer than two minutes is the mean over equal windows of at most two minutes.

    Args:
      model: the network.
      gallery: file (npz or parquet) of enrolled people; read if it exists, written at every enrolment.
      channel: of recordings with several: "mean", or a number from 1.
      calibration: file that `memo-jax eval --save-calibration` wrote, to use instead of what the model holds.
      runtime: what runs the network: "jax", "onnx" for onnxruntime, which needs the extra `onnx`, or "auto":
        onnxruntime where it is installed, JAX has nothing but the CPU, and the network has an ONNX graph and computes
        in float32. The embeddings agree to 1e-4 of their norm.
      vad: embed only the parts of a recording that are speech (`audio.speech`), joined; needs the extra `vad`.

    Attributes:
      model: network, weights, provenance.
      runtime: "jax" or "onnx".
      apply: the function below: int16 waves [N, L] at 16 kHz, zeros after lengths [N] → embeddings [N, D].
      gallery: the people enrolled.
      threshold: cosine score from which two recordings count as the same speaker; may be set.
      threshold_source: where the threshold comes from, for people.
      decision: threshold and calibration as they were tuned, None if they were not.
      channel, vad: as given; may be set.
    """

    def __init__(
        self,
        model: Model,
        gallery: str | os.PathLike | None = None,
        channel: str | int = "mean",
        runtime: str = "auto",
        calibration: str | os.PathLike | None = None,
        vad: bool = False,
    ):
        if vad:
            check_installed()
        self.model, self.vad = model, vad
        self.runtime = chosen_runtime(runtime)
        if runtime == "auto" and other_precision(model):
            self.runtime = "jax"
        self.channel = channel
        self.decision = model.decision if calibration is None else read_decision(calibration, model.fingerprint)
        self.threshold = DEFAULT_THRESHOLD if self.decision is None else self.decision.threshold
        self.threshold_source = UNTUNED if self.decision is None else self.decision.source
        if self.runtime == "onnx":
            try:
                self.apply = onnx_function(model)
            except NoGraphError:
                if runtime != "auto":
                    raise
                self.runtime = "jax"
        if self.runtime == "jax":
            self.apply = model.function
        self._gallery_path = gallery
        self.gallery = Gallery(self.fingerprint)
        self.reload_gallery()

    @classmethod
    def load(
        cls,
        path: str | os.PathLike | None = None,
        *,
        branch: str | None = None,
        role: str | None = None,
        step: int | None = None,
        gallery: str | os.PathLike | None = None,
        channel: str | int = "mean",
        runtime: str = "auto",
        calibration: str | os.PathLike | None = None,
        vad: bool = False,
    ) -> "Embedder":
        """Loads a network: that of the package, a training workdir, a model file, an exported program, or the Hub.

        Args:
          path: workdir, possibly gs://…, a file that `memo-jax export` or `memo-jax convert` wrote, or
            "hf:org/name@revision" (`hub`). None is the network that comes with the package.
          branch: of a workdir: which backbone; "ecapa" by default, or the first. "ecapa,resnet" is both as one
            network, whose score is the mean of theirs. Of a file with such a network: one of its backbones.
          role: of a workdir: "teacher" (the moving average, default) or "student".
          step: of a workdir: which checkpoint; the latest by default, 0 is the untrained network.
          gallery: file (npz or parquet) of enrolled people; read if it exists, written at every enrolment.
          channel: of recordings with several: "mean", or a number from 1.
          calibration: file that `memo-jax eval --save-calibration` wrote, to use instead of what the model holds.
          runtime: what runs the network: "auto", "jax" or "onnx"; see the class.
          vad: embed only what is speech; see the class.

        Raises:
          FileNotFoundError: nothing there, or a workdir without checkpoints.
          ModelFileError: (a ValueError) a file that is not a model, or is damaged.
          ValueError: no such branch, weights that are not finite, a gallery of another model, a role or step
            given with a file, or a branch that it does not hold.
          ImportError: an extra that is needed is not installed.
        """
        onnx = chosen_runtime(runtime) == "onnx"
        is_known = (lambda fingerprint: cached_graph(fingerprint) is not None) if onnx else None
        model = load_model(path, branch=branch, role=role, step=step, is_known=is_known)
        return cls(model, gallery, channel, runtime, calibration, vad)

    def __repr__(self) -> str:
        front_end = f"front end {self.model.front_end}, {self.model.backbone}, {self.dimension} dimensions"
        return f"<Embedder: {self.model.name} ({self.fingerprint[:8]}…): {front_end}, {self.runtime} on {self.device}>"

    @property
    def device(self) -> str:
        """What computes: "cpu:0", "cuda:1"."""
        if self.runtime == "onnx":
            return "cpu:0"
        from memo_jax.xla.devices import device_name

        return device_name()

    @property
    def threshold(self) -> float:
        """The cosine score from which two recordings count as the same speaker; ValueError if set outside [-1, 1]."""
        return self._threshold

    @threshold.setter
    def threshold(self, threshold: float) -> None:
        self._threshold = check_threshold(threshold)

    @property
    def fingerprint(self) -> str:
        """The model's: embeddings can only be compared if their models have the same fingerprint."""
        return self.model.fingerprint

    @property
    def dimension(self) -> int:
        """D, the length of an embedding."""
        return self.model.dimension

    def embed(
        self, recordings: AnyRecording | Iterable[AnyRecording], rate: int | None = None, *, quiet: bool = True
    ) -> np.ndarray:
        """Returns the embedding float32 [D] of a recording, or [N, D] of a list of N, in its order.

        Args:
          recordings: a path, an array with its `rate`, a tuple (array, rate), or a list of these.
          rate: sample rate of arrays, Hz.
          quiet: False shows progress through a list.

        Raises:
          AudioError: (a ValueError) a recording that is missing, damaged, silent, under half a second, or holds NaN, or
            with `vad` has less than half a second of speech; the message names the file, or the place in the list.
          ValueError: a rate that is no number; or the network returns numbers that are not finite for a recording,
            which is named likewise.
        """
        if rate is not None and not isinstance(rate, numbers.Real):
            raise ValueError(f"the rate is {rate!r}, not a number of Hz: give several recordings as a list")
        if _is_one(recordings):
            return self.embed([recordings], rate)[0]
        recordings = list(recordings)
        waves = [self._samples(one, rate, f"recording {i}") for i, one in enumerate(recordings)]
        if not waves:
            return np.zeros((0, self.dimension), np.float32)
        embeddings = apply_to_recordings(self.apply, waves, quiet=quiet)
        for i, row in enumerate(embeddings):
            one = recordings[i]
            check_embedding(os.fspath(one) if isinstance(one, (str, os.PathLike)) else f"recording {i}", row)
        return embeddings

    def verify(
        self, a: AnyRecording, b: AnyRecording, rate: int | None = None, *, threshold: float | None = None
    ) -> Verification:
        """Compares two recordings: are they of the same speaker?

        Args:
          a: a path, an array with its `rate`, or a tuple (array, rate).
          b: the other recording, likewise.
          rate: sample rate of arrays, Hz.
          threshold: cosine in [-1, 1] to decide by instead of `self.threshold`.

        Raises:
          AudioError: see `embed`. ValueError: a threshold outside [-1, 1].
        """
        threshold = self.threshold if threshold is None else check_threshold(threshold)
        one, other = unit_norm(self.embed([a, b], rate))
        score = float(np.clip(one @ other, -1, 1))
        return Verification(score, score >= threshold, threshold)

    def probability(self, score: float, prior: float = 0.5) -> float | None:
        """Returns the probability that recordings with this score have the same speaker, None without a calibration.

        It is that of two recordings like those of the calibration's trial list. For a person enrolled with several,
        scores are higher, so it is slightly overconfident.

        Args:
          score: cosine, as `verify` and `identify` return it.
          prior: the probability before the score is known, strictly between 0 and 1.

        Raises:
          ValueError: the prior is out of that range.
        """
        return None if self.decision is None else self.decision.probability(score, prior)

    def reload_gallery(self) -> None:
        """Reads the gallery's file again, if it has one: others may have changed it.

        Raises:
          OSError, ValueError: as for `Gallery.load`.
        """
        if self._gallery_path is None:
            return
        if os.path.exists(self._gallery_path):
            self.gallery = Gallery.load(self._gallery_path, self.fingerprint, self.dimension)
        else:
            self.gallery = Gallery(self.fingerprint)

    def enroll(self, name: str, recordings: AnyRecording | Iterable[AnyRecording], rate: int | None = None) -> None:
        """Adds a person to the gallery with one recording or several.

        If the gallery has a file, the person is added to its current contents in a single locked step: others who enrol
        at the same time lose nothing. If that fails, the file is unchanged.

        Raises:
          ValueError: the name is taken or not possible, there is no recording, or one cannot be used (see `embed`).
          OSError: the file cannot be read or written, or another process holds it (LockedError).
        """
        self.reload_gallery()
        self.gallery.check_new_name(name)
        embeddings = np.atleast_2d(self.embed(recordings, rate))
        if self._gallery_path is None:
            self.gallery.add(name, embeddings)
            return
        with changing_gallery(self._gallery_path, self.fingerprint, self.dimension) as gallery:
            gallery.add(name, embeddings)
        self.gallery = gallery

    def remove(self, name: str) -> None:
        """Removes a person from the gallery, and from its file, if it has one, in a single locked step.

        Raises:
          ValueError: nobody of that name is enrolled. OSError: as for `enroll`.
        """
        if self._gallery_path is None:
            self.gallery.remove(name)
            return
        with changing_gallery(self._gallery_path, self.fingerprint, self.dimension) as gallery:
            gallery.remove(name)
        self.gallery = gallery

    def identify(
        self, recording: AnyRecording, rate: int | None = None, *, threshold: float | None = None
    ) -> Identification:
        """Says who in the gallery speaks in a recording (as for `embed`), if anybody.

        Args:
          recording: a path, an array with its `rate`, or a tuple (array, rate).
          rate: sample rate of arrays, Hz.
          threshold: cosine in [-1, 1] to decide by instead of `self.threshold`.

        Raises:
          ValueError: nobody is enrolled, the recording cannot be used, or a threshold outside [-1, 1].
        """
        threshold = self.threshold if threshold is None else check_threshold(threshold)
        nearest, score = self.gallery.ranking(self.embed([recording], rate)[0])[0]
        return Identification(nearest if score >= threshold else None, score, threshold, nearest)

    def _samples(self, recording, rate, name) -> np.ndarray:
        if isinstance(recording, (str, os.PathLike)):
            name, samples = os.fspath(recording), read_excerpt(recording, channel=self.channel)
            if rate is not None:
                check_rate(name, rate)
        else:
            samples, rate = recording if isinstance(recording, tuple) else (recording, rate)
            if rate is None:
                raise ValueError(f"{name} is not a path, and an array needs its rate: embed(samples, 16000)")
            samples = as_audio(samples, rate, name, self.channel)
        check_speech(name, samples, MIN_SECONDS)
        if self.vad:
            samples = speech_of(samples, name)
            check_speech(name, samples, MIN_SECONDS)
        return samples


def _is_one(recordings) -> bool:
    """Whether this is a single recording and not a list of them."""
    if isinstance(recordings, tuple):
        return len(recordings) == 2 and isinstance(recordings[1], numbers.Real)  # (array, rate)
    if isinstance(recordings, np.ndarray):
        return recordings.dtype.kind not in "UO"  # else paths
    return (
        isinstance(recordings, (str, os.PathLike))
        or not isinstance(recordings, Iterable)
        or hasattr(recordings, "__array__")
    )


def load_model(
    path: str | os.PathLike | None = None,
    *,
    branch: str | None = None,
    role: str | None = None,
    step: int | None = None,
    is_known: Callable[[str], bool] | None = None,
) -> Model:
    """Returns the network of a workdir, a file, the Hub or the package.

    Arguments and errors as for `Embedder.load`; `is_known` as for `read_model`.
    """
    given = [name for name, value in (("branch", branch), ("role", role), ("step", step)) if value is not None]
    path = DEFAULT_MODEL if path is None else path
    if is_hub_name(path):
        return _chosen_member(read_hub_model(path, is_known), path, given, branch)
    path = as_path(path)
    check_bucket(path)
    if in_bucket(path) or os.path.isdir(path):
        from memo_jax.inference.workdir import workdir_model  # only here: it imports all that training needs

        model = workdir_model(path, branch, role or "teacher", step)
        try:
            check_finite(model)
        except ValueError as error:
            raise ModelFileError(f"{path}: {error}") from None
        return model
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path}: no such workdir or model file")
    if is_zip(path):
        from memo_jax.inference.export import read_program

        model = read_program(path)
    else:
        model = read_model(path, is_known)
    return _chosen_member(model, path, given, branch)


def _chosen_member(model: Model, path, given: list[str], branch: str | None) -> Model:
    """Returns the network of a file that the options `given` choose: all of it, or a member of an ensemble."""
    members = {member.backbone: member for member in members_of(model)}
    if not given or (given == ["branch"] and set(branch.split(",")) == set(members)):
        return model
    if given == ["branch"] and branch in members:
        return members[branch]
    wrong = [name for name in given if name != "branch"] or (given if len(members) == 1 else [])
    if wrong:
        raise ValueError(f"{path} is a file of {' and '.join(members)}: --{wrong[0]} is for workdirs, which have more")
    raise ValueError(f"{path} holds {' and '.join(members)}: choose one of them with --branch, or leave it out")


def check_embedding(name: str, embedding: np.ndarray) -> None:
    """Raises ValueError, naming the recording, if the network returned an embedding [D] that is not finite."""
    if not np.isfinite(embedding).all():
        raise ValueError(f"{name}: its embedding is not finite: the network overflows or is damaged")
