"""Files, folders and datasets of recordings → a file of embeddings; recordings that cannot be used are listed."""

import collections
import contextlib
import functools
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from memo_jax.audio import (
    SAMPLE_RATE,
    AudioError,
    check_speech,
    excerpt_name,
    is_audio_name,
    parse_excerpt,
    read_excerpt,
    speech_of,
)
from memo_jax.audio.error import NOT_OF_THE_FILE
from memo_jax.data.batches import Utterances
from memo_jax.data.recordings import UNLISTABLE, Kind, Recording, find_recordings, input_kind, is_hidden, read_recording
from memo_jax.files import is_text, one_line, replacing, write_text
from memo_jax.inference.batches import apply_to_stream
from memo_jax.inference.embedder import MIN_SECONDS, Embedder, check_embedding
from memo_jax.locks import exclusive
from memo_jax.log import Progress, plural
from memo_jax.scoring.embedding_file import (
    Embeddings,
    check_names,
    check_output_name,
    check_replaces_no_list,
    write_embeddings,
)

DECODED_AHEAD = 8  # recordings that are decoded before they are needed
SAVE_SECONDS = 120.0  # how often the embeddings so far are saved, so that an interrupted run can be resumed


class Source(NamedTuple):
    """A recording to embed.

    Attributes:
      name: what its embedding is called.
      read: returns its samples, int16 [L]; may raise AudioError and OSError.
      stamp: returns where it is, with size and time of the file: a text that differs if the recording may differ.
      begins: of an excerpt, the file's name and the second at which the excerpt begins.
    """

    name: str
    read: Callable[[], np.ndarray]
    stamp: Callable[[], str]
    begins: tuple[str, float] | None = None

    def window_name(self, times: Sequence[float]) -> str:
        """Returns what the window from times[0] to times[1], in seconds of the file, is called: that excerpt."""
        return excerpt_name(self.begins[0] if self.begins else self.name, *times)


class Windows(NamedTuple):
    """Sliding windows of a recording: `seconds` long, one every `hop` seconds.

    The last one ends with the recording and may be shorter. It is left out where it is shorter than half of `seconds`
    or than `least`, unless it is the only one.
    """

    seconds: float
    hop: float
    least: float

    def spans(self, count: int) -> list[tuple[int, int]]:
        """Returns the first sample of each window of `count` samples, and the one after its last."""
        found, begin, end = [], 0, 0
        while end < count:
            begin = round(len(found) * self.hop * SAMPLE_RATE)
            end = min(begin + round(self.seconds * SAMPLE_RATE), count)
            if found and end - begin < max(self.seconds / 2, self.least) * SAMPLE_RATE:
                break
            found.append((begin, end))
        return found


def windows_of(seconds: float | None, hop: float | None, least: float) -> Windows | None:
    """Returns the windows that options ask for, None for whole recordings; half a window is the default hop.

    Raises ValueError for a hop without a window, or for impossible windows.
    """
    if seconds is None:
        if hop is not None:
            raise ValueError("a hop is given without the length of a window: add --window S")
        return None
    hop = seconds / 2 if hop is None else hop
    if not least <= seconds < math.inf:
        raise ValueError(f"windows of {seconds:g} s: give at least the {least:g} s of the shortest recording")
    if not 1 / SAMPLE_RATE <= hop <= seconds:
        raise ValueError(f"a hop of {hop:g} s: give more than 0, and at most the {seconds:g} s of a window")
    return Windows(seconds, hop, least)


def find_sources(
    inputs: Sequence[str | os.PathLike], channel: str | int = "mean"
) -> tuple[list[Source], list[tuple[str, str]]]:
    """Returns the recordings of files, folders (recursively), archives and datasets, and what cannot be used.

    A recording's name is its path relative to the folder or in the archive, or the file's path as given; a dataset has
    names of its own. `file.wav:12.5-20` is an excerpt in seconds, unless a file really has that name. Hidden files, and
    files without the extension of a recording, are passed over.

    Args:
      inputs: paths of files, folders, Kaldi folders, zips, tars, or datasets that `memo-jax prepare` wrote.
      channel: "mean", or a number from 1.

    Returns:
      The sources, and (path, reason) of recordings that cannot be listed, because of their names, or cannot be read
      from their archive.

    Raises:
      FileNotFoundError: no such input.
      ValueError: two recordings would have the same name, there are none at all, or an archive is damaged or a
        compressed tar.
    """
    sources: dict[str, Source] = {}
    left_out: list[tuple[str, str]] = []
    for given in inputs:
        for source in _sources_of(Path(given), given, channel, left_out):
            if source.name in sources:
                raise ValueError(
                    f"two recordings would be called {source.name!r}: embed them into two files, or give a folder "
                    "above both"
                )
            sources[source.name] = source
    if not sources and not left_out:
        raise ValueError(f"no recordings in {', '.join(map(str, inputs))}")
    return list(sources.values()), left_out


def _sources_of(path: Path, given, channel, left_out) -> Iterator[Source]:
    if (path / "dataset_info.json").is_file():
        utterances = Utterances(path)
        for row, name in enumerate(utterances.names):
            stamp = functools.partial(f"{utterances.fingerprint} {{}}".format, row)
            yield Source(name, functools.partial(utterances.__getitem__, row), stamp)
        return
    try:
        input_kind(path)
    except FileNotFoundError:
        excerpt = parse_excerpt(given)
        if not os.path.isfile(excerpt.path):
            raise FileNotFoundError(f"{path}: no such file, folder or dataset") from None
    except ValueError:  # a single file
        excerpt = parse_excerpt(given)
    else:
        excerpt = None
    if excerpt is not None:
        name = os.fspath(given)
        if not is_text(name):
            left_out.append((name, "odd name: not valid UTF-8"))
            return
        if set(name) & UNLISTABLE:
            left_out.append((name, "odd name: a tab or a line break"))
            return
        begins = None if excerpt.path == name else (excerpt.path, excerpt.start)
        read = functools.partial(read_excerpt, name, channel=channel)
        yield Source(name, read, functools.partial(_file_stamp, excerpt.path), begins)
        return
    found, unusable = find_recordings([path])
    for source, reason in unusable:
        if is_audio_name(source) and not is_hidden(os.path.relpath(source, path)):
            left_out.append((source, reason))
    for recording in found:
        if recording.kind is Kind.STREAMED:
            raise ValueError(
                f"{recording.root} is a compressed tar, whose recordings cannot be read one by one: make a dataset of "
                "it with memo-jax prepare, or unpack it"
            )
        yield Source(
            recording.name,
            functools.partial(read_recording, recording, channel=channel),
            functools.partial(_recording_stamp, recording),
        )


def _file_stamp(path) -> str:
    try:
        status = os.stat(path)
    except OSError:  # reading it will say why
        return ""
    return f"{os.path.abspath(path)} {status.st_size} {status.st_mtime_ns}"


def _recording_stamp(recording: Recording) -> str:
    path = recording.archive or os.path.join(recording.root, recording.path)
    file = "" if recording.kind is Kind.COMMAND else _file_stamp(path)
    return json.dumps([recording.kind, recording.path, recording.extent, recording.span, recording.channel, file])


def embed_recordings(
    embedder: Embedder,
    inputs: Sequence[str | os.PathLike],
    output: str | os.PathLike,
    *,
    min_seconds: float = MIN_SECONDS,
    window: float | None = None,
    hop: float | None = None,
    quiet: bool = False,
) -> dict:
    """Embeds recordings and writes the embeddings to a file (see `embedding_file.write_embeddings`).

    If it is interrupted, calling it again with the same model, output and options resumes it: a recording is not
    embedded again if its file has the same path, size and modification time. Recordings that cannot be used are left
    out and listed beside the output, in name.left_out.tsv; the embeddings are written first. While it runs, no other
    process can write the same output.

    Args:
      embedder: the network; its `channel` says which channel of the recordings is embedded, its `vad` whether only
        their speech, to which `min_seconds` then applies.
      inputs: files, folders, archives, datasets; see `find_sources`.
      output: a name with an ending of `embedding_file.FILE_KINDS`.
      min_seconds: shorter recordings are left out.
      window: embed windows of that many seconds instead of whole recordings, see `Windows`. Each is named like an
        excerpt, `file.wav:1.5-4.5`, and its times are in the output. Silent ones are left out and listed.
      hop: seconds from the beginning of a window to that of the next; half a window by default.
      quiet: show no progress.

    Returns:
      {"output", "recordings": how many have embeddings, "embeddings": how many there are, "left_out": [[name, reason],
      …], "seconds" of audio, "dimension", "model"}. Characters of a name that UTF-8 or a line cannot hold are escaped
      there and in the list, see `escaped`.

    Raises:
      ValueError: no recordings at all, none that can be used, or an embedding that is not finite (names the recording).
      OSError: the output cannot be written, or another process is writing it (LockedError).
    """
    output = check_output_name(output)
    windows = windows_of(window, hop, min_seconds)
    if windows is not None and embedder.vad:
        raise ValueError("windows have times in the whole recording: embed them without voice activity detection")
    sources, unlistable = find_sources(inputs, embedder.channel)
    check_replaces_no_list(output)
    check_names(output, [source.name for source in sources])
    with exclusive(output) as lock:
        return _embed(embedder, sources, unlistable, output, min_seconds, windows, quiet, lock)


def _embed(embedder, sources, unlistable, output, min_seconds, windows, quiet, lock):
    options = {"model": embedder.fingerprint, "channel": embedder.channel, "min_seconds": min_seconds}
    options |= {"vad": True} if embedder.vad else {}
    options |= {} if windows is None else windows._asdict()
    begun = Begun(output.with_name(f".{output.name}.begun.npz"), options)
    left_out = [(escaped(name), reason) for name, reason in unlistable]
    unfinished: dict[int, Rows] = {}
    with Progress(len(sources), "embedding", "recording", active=not quiet) as shown:
        for name, reason in left_out:
            shown.write(f"left out: {name}: {reason}")
        changed = begun.keep(sources)
        if changed:
            shown.write(f"{plural(changed, 'recording')} of the interrupted run changed since: embedded again")
        todo = [i for i, source in enumerate(sources) if source.name not in begun.found]
        if begun.found:
            shown.write(f"resuming: {plural(len(begun.found), 'recording')} embedded before the interruption")
            shown.update(len(begun.found))

        def leave_out(name, problem):
            left_out.append((escaped(name), problem))
            shown.write(f"left out: {left_out[-1][0]}: {problem}")

        def readable():
            for i, wave, problem in _decoded(sources, todo, begun.stamps, min_seconds, embedder.vad):
                if problem is not None:
                    leave_out(sources[i].name, problem)
                    shown.update()
                    continue
                begun.seconds[sources[i].name] = len(wave) / SAMPLE_RATE
                spans = [(0, len(wave))] if windows is None else windows.spans(len(wave))
                begins = sources[i].begins[1] if sources[i].begins else 0.0
                times = begins + np.array(spans) / SAMPLE_RATE
                silent = [begin for begin, end in spans if wave[begin:end].min() == wave[begin:end].max()]
                kept = np.array([begin not in silent for begin, _ in spans])
                for window in times[~kept]:
                    leave_out(sources[i].window_name(window), "silence: all samples are equal")
                    begun.stamps[sources[i].name] = ""  # a resumed run must list it again
                unfinished[i] = Rows(times[kept])
                for k, (begin, end) in enumerate(span for span, keep in zip(spans, kept) if keep):
                    yield (i, k), wave[begin:end]

        saved = time.monotonic()
        try:
            for (i, k), row in apply_to_stream(embedder.apply, readable()):
                check_embedding(sources[i].name, row)
                if unfinished[i].complete_with(k, row):
                    begun.found[sources[i].name] = unfinished.pop(i)
                    shown.update()
                if time.monotonic() - saved > SAVE_SECONDS:
                    begun.save()
                    saved = time.monotonic()
        except BaseException:
            with contextlib.suppress(OSError):  # the error that ends the run is the one to report
                begun.save()
            raise
    lock.check()
    found = _write(output, sources, begun, left_out, embedder.fingerprint, windows)
    return {
        "output": str(output),
        "recordings": len(begun.found),
        "embeddings": len(found),
        "left_out": [list(item) for item in left_out],
        "seconds": round(sum(begun.seconds[name] for name in begun.found), 2),
        "dimension": embedder.dimension,
        "model": embedder.fingerprint,
    }


def _write(output, sources, begun, left_out, fingerprint, windows):
    """Writes the embeddings and the list of what was left out; returns {name: (embedding, times)}."""
    found = {}  # {name: (embedding, times)}; overlapping excerpts may have windows in common
    for source in sources:
        for row, times in begun.found[source.name].pairs() if source.name in begun.found else ():
            found[source.name if windows is None else source.window_name(times)] = row, times
    if found:
        rows, times = (np.stack(arrays) for arrays in zip(*found.values(), strict=True))
        times = None if windows is None else times
        write_embeddings(output, Embeddings(list(found), rows, fingerprint, times))
        begun.remove()
    report = output.with_suffix(".left_out.tsv")
    if left_out:
        write_text(report, "name\treason\n" + "".join(f"{name}\t{escaped(why)}\n" for name, why in left_out))
    else:
        report.unlink(missing_ok=True)
    if not found:
        raise ValueError(f"none of {plural(len(left_out), 'recording')} can be used: see {report}")
    return found


def escaped(name: str) -> str:
    r"""Returns a name with escapes for what UTF-8 or a line of a table cannot hold, such as \xfc or \n."""
    text = name.encode(errors="surrogateescape").decode(errors="backslashreplace")
    return "".join(repr(letter)[1:-1] if letter in UNLISTABLE else letter for letter in text)


class Rows:
    """The embeddings of a recording's windows, or of all of it, as they arrive.

    Args:
      times: float64 [K, 2], the seconds of the file at which each begins and ends.
      embeddings: float32 [K, D] where they are complete.
    """

    def __init__(self, times: np.ndarray, embeddings: np.ndarray | None = None):
        self.times = times
        self._rows: dict[int, np.ndarray] = {} if embeddings is None else dict(enumerate(embeddings))

    def complete_with(self, k: int, row: np.ndarray) -> bool:
        """Adds the embedding of window `k`; returns whether all are there."""
        self._rows[k] = row
        return len(self._rows) == len(self.times)

    def pairs(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields (embedding [D], times [2]) of the windows in their order."""
        for k, times in enumerate(self.times):
            yield self._rows[k], times


class Begun:
    """The embeddings of an unfinished run in a hidden file beside its output, so that it can be resumed.

    Args:
      path: of the file.
      options: everything else that the embeddings depend on; what was begun with other options is not used.

    Attributes:
      found: {name: its rows, complete}.
      stamps: {name: stamp of its source, when it was read; "" where it must be read again}.
      seconds: {name: how long it is}.
    """

    def __init__(self, path: Path, options: dict):
        self._path, self._options = path, json.dumps(options, sort_keys=True)
        self.found: dict[str, Rows] = {}
        self.stamps: dict[str, str] = {}
        self.seconds: dict[str, float] = {}
        with contextlib.suppress(Exception):  # a file that is missing or damaged: nothing was begun
            with np.load(path, allow_pickle=False) as file:
                if str(file["options"]) == self._options:
                    names = file["names"].tolist()
                    self.stamps = dict(zip(names, file["stamps"].tolist(), strict=True))
                    self.seconds = dict(zip(names, file["seconds"].tolist(), strict=True))
                    ends = np.cumsum(file["counts"])[:-1]
                    of_names = zip(
                        names, np.split(file["times"], ends), np.split(file["embeddings"], ends), strict=True
                    )
                    self.found = {name: Rows(times, embeddings) for name, times, embeddings in of_names}

    def keep(self, sources: Sequence[Source]) -> int:
        """Forgets what is not from these sources as they are now; returns how many of them have changed."""
        before, changed = self.found, 0
        self.found = {}
        for source in sources:
            if source.name in before and self.stamps[source.name]:
                if source.stamp() == self.stamps[source.name]:
                    self.found[source.name] = before[source.name]
                else:
                    changed += 1
        return changed

    def save(self) -> None:
        """Writes the file, whole or not at all, if there is anything to save."""
        if self.found:
            names = list(self.found)
            rows, times = zip(*(pair for name in names for pair in self.found[name].pairs()), strict=True)
            with replacing(self._path) as partial:
                np.savez(
                    partial,
                    names=np.array(names, str),
                    stamps=np.array([self.stamps[name] for name in names], str),
                    seconds=np.array([self.seconds[name] for name in names]),
                    counts=np.array([len(self.found[name].times) for name in names]),
                    embeddings=np.stack(rows),
                    times=np.stack(times),
                    options=np.array(self._options),
                )

    def remove(self) -> None:
        """Removes the file."""
        self._path.unlink(missing_ok=True)


def _decoded(sources, todo, stamps, min_seconds, vad) -> Iterator[tuple[int, np.ndarray | None, str | None]]:
    """Yields (number, samples, None) or (number, None, reason) of the recordings in order, some decoded ahead."""

    def decode(i):
        stamp = sources[i].stamp()  # before it is read: a change in between is then noticed
        try:
            samples = sources[i].read()
            samples = speech_of(samples, sources[i].name) if vad else samples
            check_speech(sources[i].name, samples, min_seconds)
        except AudioError as error:
            return i, None, error.reason
        except OSError as error:  # of a dataset with a damaged shard
            if error.errno in NOT_OF_THE_FILE:
                raise
            return i, None, f"cannot be read: {one_line(error)}"
        stamps[sources[i].name] = stamp
        return i, samples, None

    with ThreadPoolExecutor(min(DECODED_AHEAD, os.cpu_count() or 1)) as pool:
        waiting = collections.deque()
        try:
            for i in todo:
                waiting.append(pool.submit(decode, i))
                if len(waiting) >= DECODED_AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def embedding_text(report: dict) -> str:
    """Returns the report of `embed_recordings` as human-readable text."""
    text = f"{plural(report['embeddings'], 'embedding')} of {report['dimension']} dimensions"
    if report["embeddings"] > report["recordings"]:
        text += f", windows of {plural(report['recordings'], 'recording')}"
    if report["left_out"]:
        listed = Path(report["output"]).with_suffix(".left_out.tsv")
        windows = " or window" if report["embeddings"] > report["recordings"] else ""
        text += f"; left out {plural(len(report['left_out']), 'recording' + windows)}, see {listed}"
    return f"{text}\n{report['output']}"
