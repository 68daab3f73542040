"""Positives from other recordings: every utterance has a partner, whose crops the teachers see in its place.

Once an interval, a teacher embeds one crop of every utterance without augmentation, k-means clusters the embeddings,
and each utterance draws its partner from a cluster near it, which is often of the same speaker, in another recording.
This is the positive sampling SSPS of Lepage and Dehak, as in their toolkit sslsv, with partners drawn once an interval.
Labels are read only to report how often a partner has the same speaker.
"""

import functools
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from memo_jax import config as configs
from memo_jax.data.batches import Utterances, reference_batches
from memo_jax.features import FRONT_ENDS
from memo_jax.models import Variables
from memo_jax.models.layers import l2_normalize
from memo_jax.training.kmeans import MAX_ROWS, nearest_other_centroid, spherical_kmeans
from memo_jax.training.state import TrainState, backbone_variables
from memo_jax.training.step import Recipe
from memo_jax.xla import sharding

ROWS = 32  # utterances that a device embeds at once, whatever their number: the same program yields the same bits


class Positives:
    """The table of partners of a run: when it is drawn, and how.

    Args:
      config: of the run, with `positives.clusters` above 0.
      utterances: of its dataset.
      epoch_steps: steps in an epoch.

    Attributes:
      first: steps taken when partners are first drawn; until then, every utterance is its own, and the step is the same
        as without partners.
      every: steps from one draw to the next.

    Raises:
      ValueError: a value that cannot work; the message names its key.
    """

    def __init__(self, config: configs.ConfigDict, utterances: Utterances, epoch_steps: int):
        self.config, self.utterances = config, utterances
        self.first = configs.duration_in_steps(config, "positives.from", epoch_steps)
        self.every = configs.interval_in_steps(config, "positives.every", epoch_steps)
        self._embed = None
        if config.positives.clusters > len(utterances):
            raise ValueError(
                f"positives.clusters is {config.positives.clusters}: more than the {len(utterances)} utterances of "
                f"{utterances.path}"
            )
        if len(utterances) > MAX_ROWS:
            raise ValueError(
                f"positives.clusters: {utterances.path} has {len(utterances)} utterances, and at most {MAX_ROWS} can "
                "be clustered"
            )
        self._references(ROWS, 0).close()  # checks the length

    def active(self, taken: int) -> bool:
        """Returns whether the step after `taken` steps uses partners."""
        return taken >= self.first

    def due(self, taken: int) -> bool:
        """Returns whether partners are drawn between `taken` steps and the next."""
        return self.active(taken) and (taken - self.first) % self.every == 0

    def draw(self, state: TrainState, recipe: Recipe, mesh: Mesh, taken: int) -> np.ndarray:
        """Returns new partners, int32 [N], found by the teacher of the first branch; all processes call this together.

        They depend on the dataset, the seed, `taken` and that teacher alone, whatever the number of processes.
        """
        settings, seed = self.config.positives, self.config.seed
        embeddings = self._embeddings(state, recipe, mesh, taken)
        centroids, own = spherical_kmeans(embeddings, settings.clusters, settings.iterations, [4, seed, taken], mesh)
        chosen = nearest_other_centroid(centroids, mesh)[own] if settings.cluster == "nearest" else own
        return draw_partners(own, chosen, settings.keep_own, [5, seed, taken])

    def metrics(self, partners: np.ndarray) -> dict[str, float]:
        """Returns metrics that describe partners, by name.

        `positives/other` is the share of utterances with a partner other than themselves, `positives/same_speaker` the
        share of these whose partner has the same speaker. It counts where both speakers are known, and is missing if
        they never are.
        """
        others = np.flatnonzero(partners != np.arange(len(partners)))
        metrics = {"positives/other": len(others) / len(partners)}
        speakers = np.asarray(self.utterances.speakers)
        mine, theirs = speakers[others], speakers[partners[others]]
        known = (mine != "") & (theirs != "")
        return metrics | ({"positives/same_speaker": float((mine == theirs)[known].mean())} if known.any() else {})

    def _references(self, rows: int, taken: int):
        return reference_batches(
            self.utterances,
            rows=rows,
            seconds=self.config.positives.reference_seconds,
            seed=self.config.seed,
            draw=taken,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            workers=self.config.data.workers,
        )

    def _embeddings(self, state: TrainState, recipe: Recipe, mesh: Mesh, taken: int) -> np.ndarray:
        """Returns the reference embedding of every utterance, float32 [N, D] of unit length."""
        name = next(iter(recipe.branches))
        variables, rows, count = backbone_variables(state.teacher[name]), ROWS * mesh.size, len(self.utterances)
        if self._embed is None:
            embed = functools.partial(
                embed_crops, recipe.branches[name].backbone, FRONT_ENDS[self.config.features.front_end]
            )
            self._embed = jax.jit(
                embed,
                in_shardings=(sharding.replicated(mesh), sharding.shard_batch(mesh)),
                out_shardings=sharding.replicated(mesh),
            )
        found, pending = [], None
        batches = self._references(rows, taken)
        try:
            for _ in range(-(-count // rows)):
                embedded = self._embed(variables, sharding.global_batch(mesh, next(batches))["crops"])
                if pending is not None:  # read while the next batch is embedded
                    found.append(np.asarray(pending.addressable_data(0)))
                pending = embedded
        finally:
            batches.close()
        return np.concatenate([*found, np.asarray(pending.addressable_data(0))])[:count]


def embed_crops(backbone: nn.Module, front_end: Callable, variables: Variables, crops: jax.Array) -> jax.Array:
    """Returns the embeddings of crops in evaluation mode, float32 [N, D] of unit length.

    Args:
      backbone: the network.
      front_end: a function of `features.FRONT_ENDS`, from waves float32 [N, L] to (features, frames of each).
      variables: of the backbone alone.
      crops: int16 [N, L] at 16 kHz.
    """
    features, _ = front_end(crops.astype(jnp.float32) / 32768)
    return l2_normalize(backbone.apply(variables, features).astype(jnp.float32))


def draw_partners(own: np.ndarray, chosen: np.ndarray, keep_own: float, seed: int | Sequence[int]) -> np.ndarray:
    """Returns the partner of every utterance, int32 [N]: drawn uniformly from the members of its chosen cluster.

    No utterance draws itself. Where the cluster has no other, an utterance is its own partner.

    Args:
      own: int [N], the cluster of each utterance.
      chosen: int [N], the cluster that it draws from.
      keep_own: the probability with which it is its own partner anyway.
      seed: what `numpy.random.default_rng` takes.
    """
    count, random = len(own), np.random.default_rng(seed)
    keeps, fractions = random.random(count) < keep_own, random.random(count)
    members = np.argsort(own, kind="stable")  # by cluster, then by number
    sizes = np.bincount(own, minlength=int(chosen.max()) + 1)
    begins = np.cumsum(sizes) - sizes
    among = chosen == own
    candidates = sizes[chosen] - among
    places = (fractions * candidates).astype(np.int64)
    rank = np.empty(count, np.int64)
    rank[members] = np.arange(count)
    places += among & (places >= rank - begins[own])  # skips the utterance itself
    alone = keeps | (candidates == 0)
    partners = members[np.where(alone, 0, begins[chosen] + places)]
    return np.where(alone, np.arange(count), partners).astype(np.int32)
