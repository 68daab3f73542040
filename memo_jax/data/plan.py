"""The list of recordings to prepare: those of the inputs now or, in a resumed run, those listed when it started."""

import collections
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from memo_jax.audio import AUDIO_EXTENSIONS, needs_ffmpeg
from memo_jax.data.recordings import Kind, Recording, input_kind
from memo_jax.data.tfds_audio import TfdsInput
from memo_jax.data.unfinished import Unfinished, explained_write_errors
from memo_jax.log import plural, say

Found = tuple[list[Recording], list[tuple[str, str]]]  # recordings, and (source, reason) of what was left out


def planned(
    unfinished: Unfinished,
    command: dict,
    inputs: Sequence[str | os.PathLike | TfdsInput],
    find: Callable[[Sequence], Found],
    overwrite: bool,
    output: Path,
) -> Found:
    """Returns the recordings of the plan in the unfinished folder, or finds them and writes them there as its plan.

    Args:
      unfinished: the folder, locked.
      command: JSON, everything that affects the output: the plan of another command is refused.
      inputs: paths, and datasets of TFDS.
      find: the function inputs → recordings and what was left out.
      overwrite: whether the plan of another command is discarded.
      output: the dataset, for messages.

    Raises:
      FileExistsError: the plan belongs to another command. ValueError: no recordings, or none that can be decoded here.
    """
    if unfinished.folder.is_dir():
        plan = unfinished.plan()
        problem = plan and _difference(plan[0], command)
        if problem and not overwrite:
            raise FileExistsError(
                f"{output} is unfinished, and {problem}: repeat the command that it was started with, "
                "or start over with --overwrite"
            )
        if plan and not problem:
            _, recordings, left_out = plan
            _check_ffmpeg(recordings)
            return recordings, left_out + _late(recordings, inputs, find, output)
        say(f"starting {output} over: {problem or 'its plan is missing or damaged'}")
        unfinished.discard()
    recordings, left_out = find(inputs)
    if not recordings:
        raise ValueError(
            f"no recordings in {', '.join(map(str, inputs))}{reasons(left_out)}; looked for "
            f"{' '.join(sorted(AUDIO_EXTENSIONS))}"
        )
    _check_ffmpeg(recordings)
    archives = {item.archive for item in recordings if item.archive}
    with explained_write_errors(unfinished, output):
        unfinished.begin(
            command | {"archives": {path: _state(path) for path in sorted(archives)}}, recordings, left_out
        )
    return recordings, left_out


def _late(recordings, inputs, find, output):
    """Returns (source, reason) of the recordings that were put into the folders after the plan was made."""
    folders = [path for path in inputs if input_kind(path) in ("folder", "Kaldi folder")]
    if not folders:
        return []
    known = {item.name for item in recordings}
    late = [item.source for item in find(folders)[0] if item.name not in known]
    if late:
        say(f"left out {plural(len(late), 'recording')} added after {output} was started, such as {late[0]}")
    return [(source, "added too late: after preparation had started") for source in late]


def _difference(header, command):
    """Returns how the command that a plan was made for differs from this one, as a clause; "" if it does not."""
    for key, value in command.items():
        # Inputs of a dataset that was begun without a working folder are absolute, so they are found from anywhere.
        if key == "working_folder" and header.get(key) is None:
            continue
        if header.get(key) != value:
            if key == "working_folder":
                return f"it was started in the folder {header[key]}, to which its inputs are relative"
            return f"it was started with {key.replace('_', ' ')} {header.get(key)} and not {value}"
    for path, state in header["archives"].items():
        if _state(path) != state:
            return f"the archive {path} has changed since"
    return ""


def _state(path):
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return None
    return [status.st_size, status.st_mtime_ns]


def _check_ffmpeg(recordings):
    """Reports before hours of work, not after, that recordings need ffmpeg, which is missing."""
    if shutil.which("ffmpeg"):
        return
    needing = [item for item in recordings if item.kind is not Kind.COMMAND and needs_ffmpeg(item.path)]
    if len(needing) == len(recordings):
        raise ValueError(
            f"ffmpeg is missing, and all recordings need it, such as {needing[0].source}: install it, or "
            "convert them to wav or flac"
        )
    if needing:
        say(
            f"ffmpeg is missing: without it, {plural(len(needing), 'recording')} will be left out, such as "
            f"{needing[0].source}"
        )


def reasons(left_out: Sequence[tuple[str, str]]) -> str:
    """Returns " (3 × empty file; 1 × silence)": how often each kind of reason occurs, or "" if nothing was left out."""
    counts = collections.Counter(reason.split(":")[0] for _, reason in left_out)
    shown = [f"{count} × {reason}" for reason, count in counts.most_common(5)]
    return f" ({'; '.join(shown + ['…'] * (len(counts) > 5))})" if shown else ""
