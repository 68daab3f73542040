"""People known by name: one embedding each, and who is nearest to a new one."""

import os

import numpy as np

from memo_jax.scoring.embedding_file import Embeddings, check_same_model, read_embeddings, write_embeddings
from memo_jax.scoring.metrics import unit_norm


class Gallery:
    """Enrolled people with one unit embedding each, all of one model; saved as a file of embeddings.

    Attributes:
      model: fingerprint of the model.
      names: of the people, in the order of their enrolment.
    """

    def __init__(self, model: str):
        self.model = model
        self.names: list[str] = []
        self._directions: list[np.ndarray] = []

    @classmethod
    def load(cls, path: str | os.PathLike, model: str) -> "Gallery":
        """Reads a gallery that `save` wrote; raises OtherModelError when it is of another model than that."""
        content = read_embeddings(path)
        check_same_model(content.model, path, model, "the model in use")
        gallery = cls(model)
        gallery.names, gallery._directions = content.names, list(content.embeddings)
        return gallery

    def save(self, path: str | os.PathLike) -> None:
        """Writes the gallery as a file of embeddings (npz or parquet), whole or not at all."""
        write_embeddings(path, Embeddings(self.names, np.stack(self._directions), self.model))

    def __len__(self) -> int:
        return len(self.names)

    def add(self, name: str, embeddings: np.ndarray) -> None:
        """Enrols a person by embeddings [R, D] of R recordings: what stands for him is their mean direction.

        Raises:
          ValueError: no name, a name that is taken, no recordings, or an embedding without direction.
        """
        if not name or set(name) & set("\t\r\n"):
            raise ValueError(f"{name!r} is no name for a person: it is empty or has a tab or line break")
        if name in self.names:
            raise ValueError(f"{name!r} is enrolled already: choose another name, or remove the old one first")
        if len(embeddings) == 0:
            raise ValueError(f"no recordings of {name!r} to enrol")
        self._directions.append(unit_norm(unit_norm(embeddings).mean(axis=0, keepdims=True))[0])
        self.names.append(name)

    def remove(self, name: str) -> None:
        """Forgets a person; raises ValueError when there is none of that name."""
        if name not in self.names:
            raise ValueError(f"nobody is enrolled as {name!r}")
        del self._directions[self.names.index(name)]
        self.names.remove(name)

    def ranking(self, embedding: np.ndarray) -> list[tuple[str, float]]:
        """Returns (name, cosine score) of everybody enrolled, the best first, for an embedding [D]."""
        if not self.names:
            raise ValueError("nobody is enrolled yet: enrol people first")
        scores = np.stack(self._directions) @ unit_norm(np.asarray(embedding)[None])[0]
        return [(self.names[i], float(scores[i])) for i in np.argsort(-scores, kind="stable")]
