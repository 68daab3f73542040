"""Mutated recordings for `read_audio`, each to be read or refused with an AudioError.

Within seconds, and without memory for what a lying header claims: the address space may grow by a fixed amount only.
They therefore run in a process of their own, `python -m soak.recordings MUTATIONS SEED FOLDER`, where a mutation that
fails in any other way is left in FOLDER, and ends the process with its traceback (or by the signal that it caused).
Where ffmpeg is installed, 1 mutation in 20 is of a kind that it decodes.
"""

import io
import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np
import soundfile
import soxr  # noqa: F401  (both loaded before the memory is limited)

from memo_jax.audio import AudioError, read_audio

KINDS = {
    "wav": {"format": "WAV"},
    "float.wav": {"format": "WAV", "subtype": "FLOAT"},
    "adpcm.wav": {"format": "WAV", "subtype": "MS_ADPCM"},
    "wavex.wav": {"format": "WAVEX", "subtype": "PCM_24"},
    "flac": {"format": "FLAC"},
    "mp3": {"format": "MP3"},
    "ogg": {"format": "OGG", "subtype": "VORBIS"},
    "opus": {"format": "OGG", "subtype": "OPUS"},
    "vbr.mp3": {"format": "MP3", "bitrate_mode": "VARIABLE", "compression_level": 0.3},
    "aiff": {"format": "AIFF"},
    "au": {"format": "AU"},
    "caf": {"format": "CAF"},
    "w64": {"format": "W64"},
    "rf64": {"format": "RF64"},
    "sph": {"format": "NIST"},
}
BY_FFMPEG = {
    "m4a": (),
    "frag.mp4": ("-movflags", "frag_keyframe+empty_moov"),
    "webm": (),
    "wma": (),
    "aac": (),
    "avi": (),
}
BY_FFMPEG |= {"g722.wav": ("-c:a", "g722"), "flac.oga": ("-c:a", "flac")}
MEMORY = 300_000_000  # bytes
SECONDS = 120  # for one mutation: enough on a busy machine, and longer than ffmpeg is waited for
EXTREMES = [b"\0\0\0\0", b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\x7f\xff\xff\xff", b"\0\0\0\x80", b"\1\0\0\0"]


def seeds() -> dict[str, list[bytes]]:
    """Small recordings of every kind, of one and two channels and two rates."""
    rng, found = np.random.default_rng(0), {}
    for name, options in KINDS.items():
        for channels, rate in ((1, 16000), (2, 48000)):
            samples = 0.3 * np.sin(np.arange(rate // 2) * 0.05)[:, None] + 0.05 * rng.standard_normal(
                (rate // 2, channels)
            )
            file = io.BytesIO()
            soundfile.write(file, samples, rate, **options)
            found.setdefault(name, []).append(file.getvalue())
    return found


def seeds_by_ffmpeg() -> dict[str, list[bytes]]:
    """Small recordings of the kinds that ffmpeg decodes; none without it."""
    found = {}
    if not shutil.which("ffmpeg"):
        return found
    with tempfile.TemporaryDirectory() as folder:
        for name, options in BY_FFMPEG.items():
            for channels, rate in ((1, 16000), (2, 48000)):
                channels = 1 if "g722" in name else channels
                path = os.path.join(folder, f"a.{name}")
                source = ["-f", "lavfi", "-i", f"anoisesrc=a=0.1:d=0.5:r={rate}:seed=1", "-ac", str(channels)]
                subprocess.run(["ffmpeg", "-v", "error", "-y", *source, *options, path], check=True)
                with open(path, "rb") as file:
                    found.setdefault(name, []).append(file.read())
    return found


def mutated(content: bytes, others: list[bytes], rng) -> bytes:
    """The content with one to four changes of random kind and position; headers are hit more often than the rest."""
    data = bytearray(content)
    for _ in range(rng.integers(1, 5)):
        size = len(data)
        if not size:
            break
        place = int(rng.integers(min(size, 128) if rng.random() < 0.6 else size))
        length = int(2 ** rng.uniform(0, 10))
        match rng.integers(8):
            case 0:
                data[place] ^= 1 << int(rng.integers(8))
            case 1:
                data[place : place + length] = rng.bytes(length)
            case 2:
                data[place : place + 4] = EXTREMES[rng.integers(len(EXTREMES))]
            case 3:
                del data[place : place + length]
            case 4:
                data[place:place] = data[place : place + length]
            case 5:
                del data[place:]
            case 6:
                data[place : place + length] = bytes(length)
            case 7:  # the end of another recording
                other = others[rng.integers(len(others))]
                data[place:] = other[int(rng.integers(len(other))) :]
    return bytes(data)


def main(mutations: int, seed: int, folder: str) -> None:
    found, by_ffmpeg = seeds(), seeds_by_ffmpeg()
    everything = [content for contents in (found | by_ffmpeg).values() for content in contents]
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # within a C function, only the default action ends it
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    counts, slowest = {"read": 0, "refused": 0}, 0.0
    for number in range(mutations):
        rng = np.random.default_rng([seed, number])
        kinds = by_ffmpeg if by_ffmpeg and rng.random() < 0.05 else found
        name = list(kinds)[rng.integers(len(kinds))]
        path = os.path.join(folder, f"{seed}-{number}.{name}")
        content = mutated(kinds[name][rng.integers(2)], everything, rng)
        with open(path, "wb") as file:
            file.write(content)
        source = path
        if number % 2:  # as from an archive
            source = io.BytesIO(content)
            source.name = path
        signal.alarm(SECONDS)
        start = time.monotonic()
        try:
            samples = read_audio(source, max_seconds=600)
            assert samples.dtype == np.int16 and samples.ndim == 1 and 1 <= len(samples) <= 600 * 16000
            counts["read"] += 1
        except AudioError as error:
            assert error.reason and path in str(error)
            counts["refused"] += 1
        signal.alarm(0)
        slowest = max(slowest, time.monotonic() - start)
        os.unlink(path)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps(counts | {"slowest_seconds": round(slowest, 2), "peak_megabytes": round(peak)}))


def mutations(trials, rng):
    """Mutates as many recordings as there are trials; returns how many were read and refused."""
    total, folder = {"read": 0, "refused": 0, "slowest_seconds": 0, "peak_megabytes": 0}, tempfile.mkdtemp()
    while part := list(itertools.islice(trials, 1000)):
        command = [sys.executable, "-m", "soak.recordings", str(len(part)), str(rng.randrange(1 << 30)), folder]
        run = subprocess.run(command, capture_output=True, text=True)
        assert run.returncode == 0, f"{command}, {run.returncode}, {os.listdir(folder)}: {run.stderr[-2000:]}"
        assert "Traceback" not in run.stderr and "RuntimeWarning" not in run.stderr, run.stderr
        for name, value in json.loads(run.stdout).items():
            total[name] = total[name] + value if name in ("read", "refused") else max(total[name], value)
    os.rmdir(folder)
    return total


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
