"""Writes recordings, folders of them, and every kind of archive, for tests."""

import bz2
import gzip
import io
import lzma
import subprocess
import sys
import tarfile
import zipfile

import numpy as np
import soundfile

RATE = 16000
MEASURE = """
import resource, sys, soundfile, soxr
from memo_jax.audio import read_audio
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
read_audio(sys.argv[1], end=1.0)
before = peak()
print(len(read_audio(sys.argv[1])), peak() - before)
"""


def noise(seconds=0.6, seed=0):
    return np.random.default_rng(seed).integers(-9999, 9999, round(seconds * RATE)).astype(np.int16)


def memory_of_reading(path):
    """The samples of a recording, and the bytes by which a process of its own grows as it reads them."""
    command = [sys.executable, "-c", MEASURE, path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return map(int, done.stdout.split())


def audio_bytes(samples, kind="WAV", rate=RATE):
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=kind)
    return file.getvalue()


def write_files(folder, names):
    """Writes a recording, or the given bytes, under each name."""
    for index, (name, content) in enumerate(names.items()):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(audio_bytes(noise(seed=index)) if content is None else content)
    return folder


def write_tar(path, members, opened=open):
    with opened(path, "wb") as file, tarfile.open(fileobj=file, mode="w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def write_zip(path, members, method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


WRITERS = {
    ".zip": write_zip,
    ".stored.zip": lambda *a: write_zip(*a, zipfile.ZIP_STORED),
    ".tar": write_tar,
    ".tar.gz": lambda *a: write_tar(*a, gzip.open),
    ".tar.bz2": lambda *a: write_tar(*a, bz2.open),
    ".tar.xz": lambda *a: write_tar(*a, lzma.open),
}
