"""Makes copies of a dataset's recordings: at another speed, as of another speaker, or through a codec.

    python experiments/copies.py --data data/train --speed 0.9 --speed 1.1 --codec opus:8k --output copies
    memo-jax prepare --input speech/train --input copies --output data/larger

At another speed, pitch and formants move with the tempo, so a copy counts as another speaker (Yamamoto et al., 2019).
Through a codec (of ffmpeg, with its bit rate) the speaker is the same.

Writes a Kaldi folder, the input of `memo-jax prepare`: the recordings, `wav.scp` and, where speakers are known,
`utt2spk`. A recording NAME becomes speed-0.9/NAME or opus-8k/NAME, its speaker S at another speed speed-0.9/S.
"""

import argparse
import functools
import subprocess
import sys
from pathlib import Path

import numpy as np
import soundfile
import soxr

from memo_jax.audio import SAMPLE_RATE
from memo_jax.data.batches import Utterances
from memo_jax.log import progress

CODECS = {  # name: what ffmpeg calls it, and the suffix of its files
    "opus": ("libopus", ".opus"),
    "mp3": ("libmp3lame", ".mp3"),
    "vorbis": ("libvorbis", ".ogg"),
}


def write_at_speed(wave: np.ndarray, path: Path, speed: float) -> None:
    """Writes a wave int16 [L] played `speed` times as fast."""
    played = soxr.resample(wave.astype(np.float32), SAMPLE_RATE * speed, SAMPLE_RATE)
    soundfile.write(path, np.clip(np.round(played), -32768, 32767).astype(np.int16), SAMPLE_RATE)


def write_encoded(wave: np.ndarray, path: Path, codec: str, rate: str) -> None:
    """Writes a wave int16 [L] through a codec at a bit rate such as "8k"; ValueError says what ffmpeg refused."""
    raw = ["-f", "s16le", "-ar", str(SAMPLE_RATE), "-ac", "1", "-i", "-"]
    command = ["ffmpeg", "-nostdin", "-v", "error", "-y", *raw, "-c:a", CODECS[codec][0], "-b:a", rate, str(path)]
    done = subprocess.run(command, input=wave.tobytes(), capture_output=True)
    if done.returncode:
        reason = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise ValueError(f"ffmpeg cannot write {path}: {''.join(reason)}")


def codec_of(text: str) -> tuple[str, str]:
    """Returns (codec, bit rate) of CODEC:RATE; ValueError for another codec."""
    name, _, rate = text.partition(":")
    if name not in CODECS or not rate:
        raise ValueError(f"--codec {text}: expected CODEC:RATE, as opus:8k, of {', '.join(CODECS)}")
    return name, rate


def main(arguments=None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="dataset made by `memo-jax prepare`")
    parser.add_argument("--speed", type=float, action="append", default=[], help="of a copy, 0.5 to 2; several times")
    parser.add_argument("--codec", action="append", default=[], metavar="CODEC:RATE", help="of a copy; several times")
    parser.add_argument("--output", type=Path, required=True, help="folder for the copies")
    options = parser.parse_args(arguments)
    try:
        codecs = [codec_of(text) for text in options.codec]
        if wrong := [speed for speed in options.speed if not 0.5 <= speed <= 2]:
            raise ValueError(f"--speed {wrong[0]:g}: must be between 0.5 and 2")
        if not (codecs or options.speed):
            raise ValueError("give --speed or --codec")
        dataset, lines, speakers = Utterances(options.data), [], []
        if spaced := [name for name in dataset.names if len(name.split()) > 1]:
            raise ValueError(f"{options.data}: {spaced[0]!r} has a space, which no name in wav.scp can have")
        # {copy: (suffix of its files, what writes one, what its speakers' names begin with)}
        copies = {
            f"speed-{speed:g}": (".flac", functools.partial(write_at_speed, speed=speed), f"speed-{speed:g}/")
            for speed in options.speed
        } | {
            f"{codec}-{rate}": (CODECS[codec][1], functools.partial(write_encoded, codec=codec, rate=rate), "")
            for codec, rate in codecs
        }
        for index, name in enumerate(progress(dataset.names, label="copies", unit="recording")):
            for copy, (suffix, write, prefix) in copies.items():
                path = options.output / copy / f"{index:07d}{suffix}"
                path.parent.mkdir(parents=True, exist_ok=True)
                write(dataset[index], path)
                lines.append(f"{copy}/{name} {path.absolute()}\n")
                if speaker := dataset.speakers[index]:
                    speakers.append(f"{copy}/{name} {prefix}{speaker}\n")
        (options.output / "wav.scp").write_text("".join(lines))
        if speakers:
            (options.output / "utt2spk").write_text("".join(speakers))
    except (ValueError, OSError) as error:
        print(f"copies.py: error: {error}", file=sys.stderr)
        return 2
    print(f"{options.output}: {len(lines):,} copies of {len(dataset):,} recordings")
    return 0


if __name__ == "__main__":
    sys.exit(main())
