"""What is to be prepared: the recordings that inputs hold now or, when work goes on, that they held at its begin."""

import collections
import os
import shutil
import sys

from memo_jax.audio import AUDIO_EXTENSIONS, needs_ffmpeg
from memo_jax.data.recordings import input_kind
from memo_jax.data.unfinished import explained_write_errors


def planned(unfinished, command, inputs, find, overwrite, output):
    """(recordings, left_out): those of the plan in the unfinished folder, or found now and written there as its plan.

    Args:
      unfinished: the folder, `Unfinished`, which this process owns afterwards.
      command: JSON, all that decides what becomes of the inputs: a plan made for another is refused.
      inputs: paths.
      find: the function inputs → (recordings, left_out).
      overwrite: whether the plan of another command is thrown away.
      output: of the dataset, for messages.

    Raises:
      FileExistsError: the plan of another command. ValueError: no recordings, or none that can be decoded here.
    """
    if unfinished.folder.is_dir():
        unfinished.claim()
        header = unfinished.header()
        problem = header and _difference(header, command)
        if problem and not overwrite:
            raise FileExistsError(
                f"{output} is unfinished, and {problem}: finish it with the command that it was "
                "begun with, or start over with --overwrite"
            )
        if header and not problem:
            recordings, left_out = unfinished.plan()
            folders = [path for path in inputs if input_kind(path) in ("folder", "Kaldi folder")]
            known = {item.name for item in recordings} if folders else ()
            late = [item.source for item in (find(folders)[0] if folders else ()) if item.name not in known]
            if late:
                say(f"{len(late):,} recordings came since {output} was begun, the first {late[0]}: they are left out")
            return recordings, left_out + [(source, "came late: after the dataset was begun") for source in late]
        say(f"starting {output} over: what was unfinished there {problem or 'has no plan'}")
        unfinished.discard()
    recordings, left_out = find(inputs)
    if not recordings:
        raise ValueError(
            f"no recordings in {', '.join(inputs)}{reasons(left_out)}; looked for {' '.join(sorted(AUDIO_EXTENSIONS))}"
        )
    _check_ffmpeg(recordings)
    unfinished.claim()
    archives = {item.root for item in recordings if item.extent}
    with explained_write_errors(unfinished, output):
        unfinished.begin(
            command | {"archives": {path: _state(path) for path in sorted(archives)}}, recordings, left_out
        )
    return recordings, left_out


def _difference(header, command):
    """How the call that a plan was made for differs from this one; "" when it does not."""
    for key, value in command.items():
        if header.get(key) != value:
            return f"was begun with {key.replace('_', ' ')} {header.get(key)}, now {value}"
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
    """Tells before hours of work, not after, that recordings need an ffmpeg that is not there."""
    if shutil.which("ffmpeg"):
        return
    needing = [item for item in recordings if needs_ffmpeg(item.path)]
    if len(needing) == len(recordings):
        raise ValueError(
            f"ffmpeg is missing, and all recordings need it, such as {needing[0].source}: install it, or "
            "convert them to wav or flac"
        )
    if needing:
        say(
            f"ffmpeg is missing: {len(needing):,} recordings that need it, such as {needing[0].source}, will be left "
            "out"
        )


def say(text: str) -> None:
    """Tells people about the progress of work, apart from its result."""
    print(text, file=sys.stderr, flush=True)


def reasons(left_out, most=5):
    """ " (3 × empty file; 1 × silence)": how often each kind of reason occurs, or "" when nothing was left out."""
    counts = collections.Counter(reason.split(":")[0] for _, reason in left_out)
    shown = [f"{count} × {reason}" for reason, count in counts.most_common(most)]
    return f" ({'; '.join(shown + ['…'] * (len(counts) > most))})" if shown else ""
