"""Where recordings are: folders → files with the name and speaker that each has in a dataset."""

import dataclasses
import os

from memo_jax.audio import is_audio_name


@dataclasses.dataclass(frozen=True)
class Recording:
    """One input file: `name` in the dataset, `speaker` ("" unknown), `path` to read."""

    name: str
    speaker: str
    path: str


def find_recordings(inputs, exclude=None) -> tuple[list[Recording], list[tuple[str, str]]]:
    """All recordings below the folders, sorted by name, and [(file, reason)] for the other files.

    A name is the path relative to its folder, with "/"; the speaker is its first part, or "" when it has one part only.
    `exclude` is a folder not to enter.

    Raises:
      FileNotFoundError: no such folder. ValueError: two recordings would have one name.
    """
    recordings, left_out = {}, []
    for folder in inputs:
        for path in files_below(folder, exclude):
            name = os.path.relpath(path, folder).replace(os.sep, "/")
            if problem := _name_problem(name):
                left_out.append((path, problem))
            elif name in recordings:
                raise ValueError(f"{recordings[name].path} and {path} would both be called {name}: prepare them "
                                 "into two datasets, or give a folder above both")
            else:
                speaker = name.split("/")[0] if "/" in name else ""
                recordings[name] = Recording(name, speaker, path)
    return [recordings[name] for name in sorted(recordings)], sorted(left_out)


def files_below(folder, exclude=None):
    """Yields the path of every file below a folder, sorted folder by folder; follows links, but enters none twice.

    Raises:
      FileNotFoundError: no such folder. OSError: a folder in it cannot be read.
    """
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"{folder}: no such folder of recordings")
    seen = set()
    excluded = os.path.realpath(exclude) if exclude else None

    def fail(error):
        raise error

    for parent, folders, files in os.walk(folder, followlinks=True, onerror=fail):
        real = os.path.realpath(parent)
        if real in seen or real == excluded:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        yield from (os.path.join(parent, file) for file in sorted(files))


def _name_problem(name):
    if not is_audio_name(name):
        return f"not a recording: extension {os.path.splitext(name)[1].lower() or 'missing'}"
    try:
        name.encode()
    except UnicodeEncodeError:
        return "odd name: not valid UTF-8"
    return "odd name: a tab or a line break" if set(name) & set("\t\r\n") else None
