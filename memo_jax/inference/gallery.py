"""People known by name: one embedding each, and who is nearest to a new one."""

import contextlib
import os
import time
from collections.abc import Iterator

import numpy as np

from memo_jax.files import is_text
from memo_jax.locks import LockedError, exclusive
from memo_jax.scoring.embedding_file import (
    Embeddings,
    check_output_name,
    check_same_model,
    read_embeddings,
    write_embeddings,
)
from memo_jax.scoring.metrics import unit_norm

LOCK_SECONDS = 30.0  # how long a change waits for another process to finish its own
LOCK_POLL_SECONDS = 0.05


class Gallery:
    """Enrolled people with a unit embedding each, all from one model; saved as a file of embeddings.

    Args:
      model: fingerprint of the model; "" if unknown.

    Attributes:
      model: as given.
      names: of the people, in the order of their enrolment.
      holds_windows: whether it was read from a file of windows of recordings, whose times it does not keep.
    """

    def __init__(self, model: str):
        self.model = model
        self.names: list[str] = []
        self.holds_windows = False
        self._directions: list[np.ndarray] = []

    @classmethod
    def load(cls, path: str | os.PathLike, model: str = "", dimension: int | None = None) -> "Gallery":
        """Reads a gallery: what `save` wrote, or any file of embeddings, which are scaled to unit length.

        Args:
          path: npz or parquet.
          model: fingerprint of the model in use; "" to take that of the file.
          dimension: length of the embeddings of the model in use; None to take that of the file.

        Raises:
          OtherModelError: the gallery is from another model.
          ValueError: naming the file: not a file of embeddings, another dimension, or a zero embedding.
          OSError: naming the file, if it cannot be read.
        """
        content = read_embeddings(path)
        check_same_model(content.model, path, model, "the model in use")
        if dimension is not None and len(content) and content.embeddings.shape[1] != dimension:
            raise ValueError(
                f"{path} has {content.embeddings.shape[1]}-dimensional embeddings, those of the model in use have "
                f"{dimension} dimensions: it is from another model"
            )
        gallery = cls(model or content.model)
        try:
            gallery._directions = list(unit_norm(content.embeddings)) if len(content) else []
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        gallery.names, gallery.holds_windows = list(content.names), content.times is not None
        return gallery

    def save(self, path: str | os.PathLike) -> None:
        """Writes the gallery as a file of embeddings (npz or parquet), whole or not at all."""
        write_embeddings(path, Embeddings(self.names, self.directions, self.model))

    def __len__(self) -> int:
        return len(self.names)

    @property
    def directions(self) -> np.ndarray:
        """The people's unit embeddings, float32 [N, D]."""
        return np.stack(self._directions) if self.names else np.zeros((0, 1), np.float32)

    def check_new_name(self, name: str) -> None:
        """Raises ValueError if a name is taken, empty, not valid UTF-8, or has a tab or line break."""
        if not name or set(name) & set("\t\r\n\0"):
            raise ValueError(f"{name!r} cannot be the name of a person: it is empty or has a tab or line break")
        if not is_text(name):
            raise ValueError(f"{name!r} cannot be the name of a person: it is not valid UTF-8")
        if name in self.names:
            raise ValueError(
                f"{name!r} is enrolled already: choose another name, or remove that person first (memo-jax remove)"
            )

    def add(self, name: str, embeddings: np.ndarray) -> None:
        """Enrols a person by the mean direction of embeddings [R, D] of R recordings.

        Raises:
          ValueError: a name that is taken or not possible, no recordings, or a zero or non-finite embedding.
        """
        self.check_new_name(name)
        if len(embeddings) == 0:
            raise ValueError(f"no recordings of {name!r} to enrol")
        self._directions.append(unit_norm(unit_norm(embeddings).mean(axis=0, keepdims=True))[0])
        self.names.append(name)

    def remove(self, name: str) -> None:
        """Removes a person; raises ValueError if nobody of that name is enrolled."""
        if name not in self.names:
            raise ValueError(f"nobody is enrolled as {name!r}")
        del self._directions[self.names.index(name)]
        self.names.remove(name)

    def ranking(self, embedding: np.ndarray) -> list[tuple[str, float]]:
        """Returns (name, cosine score in [-1, 1]) of everybody enrolled, the best first, for an embedding [D].

        Raises:
          ValueError: nobody is enrolled, or an embedding that is zero or not finite.
        """
        if not self.names:
            raise ValueError("nobody is enrolled yet: enrol people first")
        scores = np.clip(self.directions @ unit_norm(np.asarray(embedding)[None])[0], -1, 1)
        return [(self.names[i], float(scores[i])) for i in np.argsort(-scores, kind="stable")]


@contextlib.contextmanager
def changing_gallery(path: str | os.PathLike, model: str = "", dimension: int | None = None) -> Iterator[Gallery]:
    """Yields the gallery in a file, an empty one if there is none, and saves it if the block succeeds.

    Reading, changing and writing are a single locked step, so changes by several processes at once all persist: each
    waits for the others, up to LOCK_SECONDS.

    Raises:
      ValueError: a file of a kind that does not keep the model, or of windows of recordings.
      LockedError: another process holds the gallery for longer. Others as for `Gallery.load` and `Gallery.save`.
    """
    check_output_name(path, gallery=True)
    deadline = time.monotonic() + LOCK_SECONDS
    with contextlib.ExitStack() as stack:
        while True:
            try:
                lock = stack.enter_context(exclusive(path))
                break
            except LockedError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(LOCK_POLL_SECONDS)
        gallery = Gallery.load(path, model, dimension) if os.path.exists(path) else Gallery(model)
        if gallery.holds_windows:
            raise ValueError(f"{path} holds windows of recordings, whose times would be lost: choose another gallery")
        yield gallery
        lock.check()
        gallery.save(path)


def remove_person(path: str | os.PathLike, name: str) -> Gallery:
    """Removes a person from the gallery in a file; returns the gallery.

    Raises:
      FileNotFoundError: no such gallery. ValueError: nobody of that name. Others as for `changing_gallery`.
    """
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path}: no such gallery")
    with changing_gallery(path) as gallery:
        gallery.remove(name)
    return gallery
