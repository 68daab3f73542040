"""Clusters of utterances by their embeddings: k-means, then agglomeration, to a table of labels for training."""

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from memo_jax.data.batches import Utterances
from memo_jax.files import check_writable, write_text
from memo_jax.inference.batches import apply_to_recordings
from memo_jax.inference.embedder import check_embedding
from memo_jax.inference.evaluate import crop_embeddings
from memo_jax.inference.model_file import Model
from memo_jax.log import plural
from memo_jax.scoring import clusters as scoring
from memo_jax.scoring.embedding_file import Embeddings, read_embeddings
from memo_jax.scoring.figures import plot_cluster_sizes
from memo_jax.scoring.metrics import unit_norm
from memo_jax.scoring.trials import read_table
from memo_jax.training.kmeans import spherical_kmeans
from memo_jax.xla import sharding

ITERATIONS = 20  # of k-means
# Defaults: as many utterances in a group and in a cluster as in the recipe for VoxCeleb2, 50,000 and 7,500 of 1,092,009
# (theolepage/wavlm_ssl_sv).
GROUP_UTTERANCES, CLUSTER_UTTERANCES = 22, 146
MOST_GROUPS_BY_DEFAULT = 50_000
MOST_WITHOUT_KMEANS = 5_000  # most utterances that are agglomerated without k-means first, by default


def default_numbers(utterances: int) -> tuple[int, int]:
    """Returns the groups of k-means, 0 for no k-means, and the clusters that this many utterances get by default."""
    clusters = max(round(utterances / CLUSTER_UTTERANCES), min(2, utterances))
    if utterances <= MOST_WITHOUT_KMEANS:
        return 0, clusters
    return min(round(utterances / GROUP_UTTERANCES), MOST_GROUPS_BY_DEFAULT), clusters


def cluster(
    embeddings: np.ndarray,
    kmeans: int = 0,
    clusters: int = 0,
    *,
    linkage: str = "ward",
    iterations: int = ITERATIONS,
    seed: int = 0,
) -> np.ndarray:
    """Clusters embeddings by their directions.

    Spherical k-means makes groups, and agglomeration merges them into clusters. Either can be left out: without k-means
    the embeddings themselves are agglomerated, without agglomeration the groups are the clusters.

    Args:
      embeddings: float [N, D]; only their directions count.
      kmeans: groups; 0 for no k-means.
      clusters: after agglomeration; 0 for none.
      linkage: of the agglomeration, "ward" or "average"; see `scoring.clusters.agglomerate`.
      iterations: of k-means.
      seed: of k-means.

    Returns:
      the number of each embedding's cluster, int32 [N]; 0 is the largest one. With k-means alone there may be fewer
      than asked for, since groups can be empty.

    Raises:
      ValueError: impossible numbers, or an embedding that is zero or not finite.
    """
    units = unit_norm(embeddings)
    count = len(units)
    if not (kmeans or clusters):
        raise ValueError("give a number of groups for k-means, a number of clusters, or both")
    for name, number in (("--kmeans", kmeans), ("--clusters", clusters)):
        if not 0 <= number <= count:
            raise ValueError(f"{name} {number:,}: there are {count:,} embeddings, so give at most as many")
    if kmeans and clusters > kmeans:
        raise ValueError(f"--clusters {clusters:,} is more than --kmeans {kmeans:,}, the groups to merge: give fewer")
    if not kmeans and clusters and count > scoring.MOST_GROUPS:
        raise ValueError(
            f"{count:,} embeddings are too many to agglomerate without k-means first: give --kmeans, at most "
            f"{scoring.MOST_GROUPS:,}"
        )
    groups = np.arange(count)
    if kmeans:
        groups = spherical_kmeans(units, kmeans, iterations, seed, sharding.data_mesh()).assignment
    if not clusters:
        return scoring.numbered_by_size(groups)
    _, groups, weights = np.unique(groups, return_inverse=True, return_counts=True)
    if clusters > len(weights):
        raise ValueError(
            f"--clusters {clusters:,} is more than the {len(weights):,} groups of k-means that are not empty: give "
            "fewer, or a larger --kmeans"
        )
    sums = np.zeros((len(weights), units.shape[1]), np.float64)
    np.add.at(sums, groups, units)
    merged = scoring.agglomerate(sums / weights[:, None], weights, clusters, linkage)
    return scoring.numbered_by_size(merged[groups])


def embeddings_of(model: Model, utterances: Utterances, crops: int = 0, crop_seconds: float = 4.0) -> Embeddings:
    """Embeds all utterances of a dataset.

    Args:
      model: the network.
      utterances: the dataset.
      crops: how many crops of an utterance, spread evenly, to take the mean direction of; 0 for whole utterances.
      crop_seconds: length of a crop.

    Raises:
      ValueError: naming the utterance, for an embedding that is zero or not finite.
      OSError: the dataset cannot be read.
    """
    if crops:
        rows = sum(map(unit_norm, crop_embeddings(model.function, utterances, crops, crop_seconds)))
    else:
        rows = apply_to_recordings(model.function, utterances)
    names = utterances.names
    for name, row in zip(names, rows):
        check_embedding(name, row)
        if not row.any():
            raise ValueError(f"{name}: its embedding is zero, so it has no direction to cluster by")
    return Embeddings(names, rows, model.fingerprint)


def known_labels(path: str | os.PathLike) -> Mapping[str, str]:
    """Returns {name: speaker} of a dataset's utterances with a known speaker, or of a table with lines `name speaker`.

    Raises:
      ValueError: the table is malformed, or no speaker of the dataset is known. OSError: it cannot be read.
    """
    if not Path(path).is_dir():
        return read_table(path, "name", "speaker")
    utterances = Utterances(path)
    known = {name: speaker for name, speaker in zip(utterances.names, utterances.speakers) if speaker}
    if not known:
        raise ValueError(f"{path}: no speaker of its utterances is known")
    return known


def write_clusters(path: str | os.PathLike, names: list[str], assignment: np.ndarray) -> None:
    """Writes lines `name<tab>cluster`, whole or not at all; whatever reads a utt2spk reads it, too."""
    write_text(path, "".join(f"{name}\t{number}\n" for name, number in zip(names, assignment.tolist(), strict=True)))


def cluster_to_table(
    embeddings: Embeddings | str | os.PathLike,
    output: str | os.PathLike,
    *,
    kmeans: int | None = None,
    clusters: int | None = None,
    linkage: str = "ward",
    iterations: int = ITERATIONS,
    seed: int = 0,
    labels: str | os.PathLike | None = None,
    figure: str | os.PathLike | None = None,
) -> dict:
    """Clusters embeddings, writes the table of clusters, and describes them.

    Args:
      embeddings: of utterances, or a file of them (`embedding_file.read_embeddings`).
      output: the table, lines `name<tab>cluster`.
      kmeans: groups of k-means. Without it and without `clusters`, both are those of `default_numbers`.
      clusters: clusters after agglomeration.
      linkage: as for `cluster`.
      iterations: likewise.
      seed: likewise.
      labels: the known speakers, for the report only: a dataset, or a table with lines `name speaker`.
      figure: file for a histogram of the sizes of clusters.

    Returns:
      {"output", "utterances", "kmeans" (0 without), "linkage" (None without agglomeration), "default_numbers" (whether
      they were used), "model", and those of `clusters.sizes_of`}, with labels also {"purity", "nmi", "labelled": how
      many of the utterances have a label, "speakers": how many labels there are}.

    Raises:
      ValueError: as for `cluster`, or no utterance has a label. OSError: a file cannot be read or written.
    """
    for path in filter(None, (output, figure)):
        check_writable(path)
    known = None if labels is None else known_labels(labels)
    if not isinstance(embeddings, Embeddings):
        source, embeddings = embeddings, read_embeddings(embeddings)
        if embeddings.times is not None:
            raise ValueError(f"{source} has embeddings of windows: cluster those of whole recordings, without --window")
    if not len(embeddings):
        raise ValueError("there are no embeddings to cluster")
    by_default = not (kmeans or clusters)
    if by_default:
        kmeans, clusters = default_numbers(len(embeddings))
    labelled = np.array([name in known for name in embeddings.names]) if known is not None else None
    if labelled is not None and not labelled.any():
        raise ValueError(f"{labels} has a speaker for none of the utterances, such as {embeddings.names[0]!r}")
    assignment = cluster(
        embeddings.embeddings, kmeans or 0, clusters or 0, linkage=linkage, iterations=iterations, seed=seed
    )
    report = {
        "output": str(output),
        "utterances": len(embeddings),
        "kmeans": kmeans or 0,
        "linkage": linkage if clusters else None,
        "default_numbers": by_default,
        "model": embeddings.model,
    } | scoring.sizes_of(assignment)
    if labelled is not None:
        speakers = [known[name] for name, has in zip(embeddings.names, labelled) if has]
        report |= {
            "purity": scoring.purity(assignment[labelled], speakers),
            "nmi": scoring.mutual_information(assignment[labelled], speakers),
            "labelled": len(speakers),
            "speakers": len(set(speakers)),
        }
    write_clusters(output, embeddings.names, assignment)
    if figure is not None:
        plot_cluster_sizes(assignment, figure)
    return report


def cluster_text(report: dict) -> str:
    """Returns the report of `cluster_to_table` as human-readable text."""
    steps = [f"k-means to {plural(report['kmeans'], 'group')}"] if report["kmeans"] else []
    steps += [f"{report['linkage']} linkage"] if report["linkage"] else []
    chosen = ", defaults for this many utterances" if report["default_numbers"] else ""
    lines = [
        f"{plural(report['utterances'], 'utterance')} in {plural(report['clusters'], 'cluster')} "
        f"({', then '.join(steps)}{chosen})",
        f"  sizes {report['smallest']:,} to {report['largest']:,}, median {report['median']:g}, mean "
        f"{report['mean']:.1f}; {plural(report['single'], 'cluster')} of a single utterance",
    ]
    if "purity" in report:
        lines.append(
            f"  purity {100 * report['purity']:.1f} %, NMI {report['nmi']:.3f} against "
            f"{plural(report['speakers'], 'speaker')} of {plural(report['labelled'], 'utterance')}"
        )
    return "\n".join([*lines, report["output"]])
