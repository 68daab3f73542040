"""Files, folders and datasets of recordings → one file of embeddings; what cannot be read is counted and listed."""

import collections
import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from memo_jax.audio import SAMPLE_RATE, AudioError, check_speech, read_audio
from memo_jax.data.archives import is_archive_name, is_compressed_tar
from memo_jax.data.recordings import find_recordings, read_recording
from memo_jax.files import write_text
from memo_jax.inference.batches import apply_to_stream
from memo_jax.inference.embedder import MIN_SECONDS, Embedder
from memo_jax.log import Progress
from memo_jax.scoring.embedding_file import Embeddings, check_output_name, read_embeddings, write_embeddings

AHEAD = 8  # recordings that are decoded before they are needed
SAVE_SECONDS = 120.0  # how often the embeddings so far are saved, so that an interrupted run can go on


class Source(NamedTuple):
    """One recording: the name that its embedding gets, and how to read it: () → int16 [L]; may raise AudioError."""

    name: str
    read: Callable[[], np.ndarray]


def find_sources(inputs: Sequence[str | os.PathLike]) -> list[Source]:
    """Returns the recordings of files, folders (all below them), archives and datasets that `memo-jax prepare` wrote.

    A recording's name is its path relative to the folder or in the archive, or the file's path as given; a dataset has
    names of its own.

    Raises:
      FileNotFoundError: no such input.
      ValueError: two recordings would have one name, there is none, or an archive is a compressed tar.
    """
    sources: dict[str, Source] = {}
    for given in inputs:
        for source in _sources_of(Path(given), given):
            if source.name in sources:
                raise ValueError(
                    f"two recordings would be called {source.name!r}: embed them into two files, or give "
                    "a folder above both"
                )
            sources[source.name] = source
    if not sources:
        raise ValueError(f"no recordings in {', '.join(map(str, inputs))}")
    return list(sources.values())


def _sources_of(path: Path, given) -> Iterator[Source]:
    if (path / "dataset_info.json").is_file():
        from memo_jax.data.batches import open_utterances

        utterances = open_utterances(path)
        yield from (Source(name, _reader(utterances.__getitem__, row)) for row, name in enumerate(utterances.names))
    elif path.is_file() and is_archive_name(path) and is_compressed_tar(path):
        raise ValueError(
            f"{path} is a compressed tar, whose recordings cannot be read one by one: make a dataset of it "
            "with memo-jax prepare, or unpack it"
        )
    elif path.is_dir() or (path.is_file() and is_archive_name(path)):
        yield from (Source(found.name, _reader(read_recording, found)) for found in find_recordings([path])[0])
    elif path.exists():
        yield Source(os.fspath(given), _reader(read_audio, path))
    else:
        raise FileNotFoundError(f"{path}: no such file, folder or dataset")


def _reader(function, argument):
    return lambda: function(argument)


def embed_recordings(
    embedder: Embedder,
    inputs: Sequence[str | os.PathLike],
    output: str | os.PathLike,
    *,
    min_seconds: float = MIN_SECONDS,
    quiet: bool = False,
) -> dict:
    """Embeds recordings and writes them to one file (see `embedding_file.write_embeddings`).

    Interrupted, it goes on where it was when called again with the same model and output.

    Args:
      inputs: files, folders, datasets; see `find_sources`.
      output: name.npz or name.parquet.
      min_seconds: shorter recordings are left out.
      quiet: show no progress.

    Returns:
      {"output", "recordings": how many are in it, "left_out": [[name, reason], …], "seconds" of audio, "dimension",
      "model"}. What was left out is also written beside the output, to name.left_out.tsv.

    Raises:
      ValueError: no recordings at all, or none that can be used. OSError: the output cannot be written.
    """
    output = check_output_name(output)
    sources = find_sources(inputs)
    output.parent.mkdir(parents=True, exist_ok=True)
    begun = output.with_name(f".{output.stem}.begun.npz")
    left_out: dict[str, str] = {}
    found = _begun(begun, embedder.fingerprint)
    seconds = 0.0
    with Progress(len(sources), "embedding", "recording", active=not quiet) as shown:
        todo = [i for i, source in enumerate(sources) if source.name not in found]
        if len(todo) < len(sources):
            shown.write(f"going on: {len(sources) - len(todo):,} recordings were embedded before the interruption")
            shown.update(len(sources) - len(todo))

        def readable():
            nonlocal seconds
            for i, wave, problem in _decoded(sources, todo, min_seconds):
                if problem is None:
                    seconds += len(wave) / SAMPLE_RATE
                    yield i, wave
                else:
                    left_out[sources[i].name] = problem
                    shown.write(f"left out: {sources[i].name}: {problem}")
                    shown.update()

        saved = time.monotonic()
        try:
            for i, row in apply_to_stream(embedder.apply, readable()):
                found[sources[i].name] = row
                shown.update()
                if time.monotonic() - saved > SAVE_SECONDS:
                    _save(begun, found, list(found), embedder.fingerprint)
                    saved = time.monotonic()
        except KeyboardInterrupt:
            if found:
                _save(begun, found, list(found), embedder.fingerprint)
            raise
    names = [source.name for source in sources if source.name in found]
    report = output.with_suffix(".left_out.tsv")
    if left_out:
        write_text(report, "name\treason\n" + "".join(f"{name}\t{why}\n" for name, why in left_out.items()))
    else:
        report.unlink(missing_ok=True)
    if not names:
        raise ValueError(f"none of the {len(sources):,} recordings can be used: see {report}")
    _save(output, found, names, embedder.fingerprint)
    begun.unlink(missing_ok=True)
    return {
        "output": str(output),
        "recordings": len(names),
        "left_out": [list(item) for item in left_out.items()],
        "seconds": round(seconds, 2),
        "dimension": embedder.dimension,
        "model": embedder.fingerprint,
    }


def _save(path, found, names, fingerprint):
    write_embeddings(path, Embeddings(names, np.stack([found[name] for name in names]), fingerprint))


def _begun(path: Path, fingerprint: str) -> dict[str, np.ndarray]:
    """The embeddings of an interrupted run of the same model, by name."""
    if path.exists():
        with contextlib.suppress(ValueError):
            content = read_embeddings(path)
            if content.model == fingerprint:
                return dict(zip(content.names, content.embeddings))
    return {}


def _decoded(sources, todo, min_seconds) -> Iterator[tuple[int, np.ndarray | None, str | None]]:
    """Yields (number, samples, None) or (number, None, reason) of the recordings in order, some decoded ahead."""

    def decode(i):
        try:
            samples = sources[i].read()
            check_speech(sources[i].name, samples, min_seconds)
        except AudioError as error:
            return i, None, error.reason
        except OSError as error:  # of a dataset with a damaged shard
            return i, None, f"cannot be read: {error}"
        return i, samples, None

    with ThreadPoolExecutor(min(AHEAD, os.cpu_count() or 1)) as pool:
        waiting = collections.deque()
        try:
            for i in todo:
                waiting.append(pool.submit(decode, i))
                if len(waiting) >= AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def embedding_text(report: dict) -> str:
    """Returns the report of `embed_recordings` as text for people."""
    text = f"{report['recordings']:,} embeddings of {report['dimension']} numbers"
    if report["left_out"]:
        listed = Path(report["output"]).with_suffix(".left_out.tsv")
        text += f"; left out {len(report['left_out']):,} recordings, see {listed}"
    return f"{text}\n{report['output']}"
