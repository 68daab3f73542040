"""What the page answers: comparisons, enrolments, identifications, and one clear sentence where something is wrong."""

import html
import os
import threading

import numpy as np

from memo_jax.app.people_map import Voice, map_html
from memo_jax.audio import AudioError, read_audio, speech_of
from memo_jax.files import one_line
from memo_jax.inference.embedder import Embedder
from memo_jax.inference.gallery import Gallery
from memo_jax.log import plural
from memo_jax.scoring.metrics import unit_norm

LOWEST_SHOWN = -0.5  # cosine at the left end of the scale of scores
Current = dict[str, np.ndarray]  # embeddings of the recordings on one visitor's page, by what they are called there


class Answers:
    """The functions behind the buttons. They never raise for bad input: the sentence they return says what is wrong.

    Args:
      embedder: the network with its gallery.
      prior: probability of the same person before anything is heard, strictly between 0 and 1.
      check_speech: refuse recordings without speech; needs the extra `vad`.
    """

    def __init__(self, embedder: Embedder, prior: float = 0.5, check_speech: bool = False):
        self.embedder, self.prior, self.check_speech = embedder, prior, check_speech
        self._changing = threading.Lock()  # several tabs may change the gallery at once

    def description(self) -> str:
        """Returns HTML: which network answers, and by what threshold."""
        model = self.embedder.model
        runs = {"onnx": "onnxruntime", "jax": "JAX"}[self.embedder.runtime]
        return (
            f'<p class="memo-model">Model <b>{html.escape(model.name)}</b> ({html.escape(model.backbone)}, fingerprint '
            f"<code>{model.fingerprint}</code>), run by {runs} on this machine. No recording leaves it.</p>"
        )

    def compare(self, first: str | None, second: str | None, current: Current) -> tuple[str, Current]:
        """Returns, for two paths of recordings, (HTML of the answer, the page's recordings)."""
        given = {"First recording": first, "Second recording": second}
        kept = {name: row for name, row in current.items() if name not in given}
        rows = {}
        for name, path in given.items():
            row, problem = self._embedded(path, name)
            if problem:
                return problem, kept
            rows[name] = row
        one, other = unit_norm(np.stack(list(rows.values())))
        score = float(np.clip(one @ other, -1, 1))
        same = score >= self.embedder.threshold
        return self._scored("Same person" if same else "Different people", score, same), kept | rows

    def identify(self, path: str | None, current: Current) -> tuple[str, Current]:
        """Returns, for the path of a recording, (HTML of who speaks, the page's recordings)."""
        name = "Unknown voice"
        kept = {key: row for key, row in current.items() if key != name}
        gallery, problem = self._gallery()
        if problem:
            return problem, kept
        if not len(gallery):
            return notice("Nobody is enrolled yet. Enrol people first, then ask who speaks."), kept
        row, problem = self._embedded(path, "Recording")
        if problem:
            return problem, kept
        nearest, score = gallery.ranking(row)[0]
        known = score >= self.embedder.threshold
        verdict = f"This is {nearest}" if known else "Nobody who is enrolled"
        return self._scored(verdict, score, known, "" if known else f"nearest: {nearest}"), kept | {name: row}

    def enroll(self, name: str, paths: list[str] | None) -> tuple[str, bool]:
        """Returns, for a name and paths of recordings, (HTML of what happened, whether the person is enrolled)."""
        name = (name or "").strip()
        if not name:
            return notice("Type the person's name first."), False
        if not paths:
            return notice(f"Record or drop at least one recording of {name}."), False
        try:
            for path in paths:
                self._check_speech(path)
            with self._changing:
                self.embedder.enroll(name, paths)
        except AudioError as error:
            return notice(f"{os.path.basename(error.name)}: {error.reason}."), False
        except (ValueError, OSError) as error:
            return notice(one_line(error)), False
        count = plural(len(paths), "recording")
        return notice(f"{name} is enrolled from {count}.", good=True), True

    def remove(self, name: str | None) -> str:
        """Removes a person by name; returns HTML of what happened."""
        if not name:
            return notice("Choose whom to remove.")
        try:
            with self._changing:
                self.embedder.reload_gallery()
                self.embedder.remove(name)
        except (ValueError, OSError) as error:
            return notice(one_line(error))
        return notice(f"{name} is removed.", good=True)

    def people(self) -> list[str]:
        """Names of everybody enrolled."""
        return list(self._gallery()[0].names)

    def map(self, current: Current) -> str:
        """Returns HTML of the map of people and of the page's recordings."""
        gallery = self._gallery()[0]
        voices = [Voice(name, row, True) for name, row in zip(gallery.names, gallery.directions)]
        return map_html(voices + [Voice(name, row, False) for name, row in current.items()])

    def _gallery(self) -> tuple[Gallery, str | None]:
        """Returns the gallery as its file has it now, and None; or as it was, and HTML of why it cannot be read."""
        try:
            self.embedder.reload_gallery()
        except (ValueError, OSError) as error:
            return self.embedder.gallery, notice(one_line(error))
        return self.embedder.gallery, None

    def _embedded(self, path, name) -> tuple[np.ndarray | None, str | None]:
        """Returns (embedding, None), or (None, HTML of what is wrong with the recording)."""
        if not path:
            return None, notice(f"{name}: record something, or drop a file.")
        try:
            self._check_speech(path)
            return self.embedder.embed([path])[0], None
        except AudioError as error:
            return None, notice(f"{name}: {error.reason}.")
        except (ValueError, OSError) as error:
            return None, notice(f"{name}: {one_line(error)}")

    def _check_speech(self, path) -> None:
        """Raises AudioError for a recording without speech, if that is to be checked."""
        if self.check_speech:
            speech_of(read_audio(path, channel=self.embedder.channel), path)

    def _scored(self, verdict, score, good, more="") -> str:
        """HTML of a verdict with its score on a scale, its probability, and the threshold and its source."""
        threshold = self.embedder.threshold
        probability = self.embedder.probability(score, self.prior)
        facts = [("score", f"{score:.3f}"), ("threshold", f"{threshold:.3f}")]
        if probability is not None:
            facts.insert(0, ("probability", percent(probability)))
        shown = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts)
        notes = [f"Threshold: {self.embedder.threshold_source}."]
        if probability is None:
            notes.append("This model has no calibration, so there is no probability.")
        else:
            notes.append(f"Before listening, the probability is taken to be {percent(self.prior)}.")
        return (
            f'<div class="memo-answer {"yes" if good else "no"}"><h3>{html.escape(verdict)}</h3>'
            + (f'<p class="memo-more">{html.escape(more)}</p>' if more else "")
            + f"<dl>{shown}</dl>"
            f'<div class="memo-scale"><span class="memo-limit" style="left:{along(threshold):.1f}%"></span>'
            f'<span class="memo-score" style="left:{along(score):.1f}%"></span></div>'
            '<p class="memo-ends"><span>less alike</span><span>more alike</span></p>'
            f'<p class="memo-hint">{html.escape(" ".join(notes))}</p></div>'
        )


def along(score: float) -> float:
    """Returns where a cosine lies on the scale, percent of its length."""
    return float(np.clip((score - LOWEST_SHOWN) / (1 - LOWEST_SHOWN), 0, 1)) * 100


def percent(probability: float) -> str:
    """Returns a probability for people; never rounded to certainty."""
    return (
        "over 99.9 %" if probability > 0.999 else "under 0.1 %" if probability < 0.001 else f"{100 * probability:.1f} %"
    )


def notice(text: str, good: bool = False) -> str:
    """Returns HTML of a sentence that is not an answer."""
    return f'<div class="memo-notice {"good" if good else "bad"}" role="status">{html.escape(text)}</div>'
