"""Makes a trial list harder: of each trial, the second recording is played in a room, with noise.

    python experiments/degrade.py --data data/validation --trials lists/validation/trials.txt \
        --noise speech/noise/speech_commands --rirs speech/rirs/real --output lists/degraded

Where both recordings of a trial come from one device in one room, a network that has learned the channel is rewarded.
Here it is not: the two sides differ. Half of the second recordings are reverberated, and all get noise at 5 to 20 dB.
Give noise that training does not use.

Writes into the output folder `recordings/`, the input of `memo-jax prepare`: each recording as it is and degraded, in
folders of speakers; and `trials.txt`, the same trials with the degraded recording second.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import soundfile
from scipy.signal import fftconvolve

from memo_jax.audio import SAMPLE_RATE, is_audio_name, read_audio
from memo_jax.data.batches import Utterances
from memo_jax.data.trial_lists import write_trials
from memo_jax.scoring.trials import name_without_extension, read_trials

SNR_DB = (5.0, 20.0)


def recordings_below(folder: Path) -> list[np.ndarray]:
    """Returns the recordings of a folder, float64 [L] each; ValueError if there are none."""
    paths = sorted(path for path in folder.rglob("*") if is_audio_name(path.name))
    if not paths:
        raise ValueError(f"{folder}: no recordings")
    return [read_audio(path).astype(np.float64) for path in paths]


# Not the functions of `training.augment`: they would compile for every length of a recording.
def degraded(wave: np.ndarray, noises: list[np.ndarray], rooms: list[np.ndarray], rng) -> np.ndarray:
    """Returns a wave [L] in a room, in one case of two, with noise at a random level, as loud as before."""
    heard = wave.astype(np.float64)
    if rng.random() < 0.5:
        heard = fftconvolve(heard, rooms[rng.integers(len(rooms))])[: len(wave)]
    noise = noises[rng.integers(len(noises))]
    noise = np.take(noise, rng.integers(len(noise)) + np.arange(len(wave)), mode="wrap")
    power = [max(np.mean(np.square(signal)), 1e-9) for signal in (heard, noise)]
    heard = heard + noise * np.sqrt(power[0] / power[1] * 10 ** (-rng.uniform(*SNR_DB) / 10))
    heard *= np.sqrt(np.mean(np.square(wave, dtype=np.float64)) / max(np.mean(np.square(heard)), 1e-9))
    return np.clip(np.round(heard), -32768, 32767).astype(np.int16)


def flac_name(name: str, degrade: bool) -> str:
    """Returns what a recording is called in the output folder."""
    return name_without_extension(name) + (".degraded.flac" if degrade else ".flac")


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="dataset with the recordings of the trials")
    parser.add_argument("--trials", type=Path, required=True, help="trial list, with names as in the dataset")
    parser.add_argument("--noise", type=Path, required=True, help="folder of noise")
    parser.add_argument("--rirs", type=Path, required=True, help="folder of room impulse responses")
    parser.add_argument("--output", type=Path, required=True, help="folder for recordings and trials")
    parser.add_argument("--seed", type=int, default=0, help="of rooms and noise")
    options = parser.parse_args(arguments)
    try:
        dataset, trials = Utterances(options.data), read_trials(options.trials)
        trials.require_both_kinds()
        names = {flac_name(name, False) for name in trials.recordings}
        if len(names) < len(trials.recordings):
            raise ValueError(f"{options.trials}: names of recordings differ only in their extensions")
        noises, rooms = recordings_below(options.noise), recordings_below(options.rirs)
        rows = {name: row for row, name in enumerate(dataset.names)}
        for name in trials.recordings:
            if name not in rows:
                raise ValueError(f"{options.data}: has no recording {name!r}, which {options.trials} names")
            wave = dataset[rows[name]]
            rng = np.random.default_rng([options.seed, rows[name]])
            for degrade in (False, True):
                path = options.output / "recordings" / flac_name(name, degrade)
                path.parent.mkdir(parents=True, exist_ok=True)
                soundfile.write(path, degraded(wave, noises, rooms, rng) if degrade else wave, SAMPLE_RATE)
        lines = zip(trials.target, trials.enrol, trials.test)
        write_trials(options.output / "trials.txt", [(t, flac_name(a, False), flac_name(b, True)) for t, a, b in lines])
    except (ValueError, OSError) as error:
        print(f"degrade.py: error: {error}", file=sys.stderr)
        return 2
    print(f"{len(trials):,} trials, {len(trials.recordings):,} recordings, each as it is and degraded")
    return 0


if __name__ == "__main__":
    sys.exit(main())
