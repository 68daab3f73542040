"""Makes the corpus of `make demo`: synthetic voices in random rooms, so that nothing has to be downloaded.

    python experiments/demo_speech.py OUTPUT [--seed 0]

eSpeak NG (package espeakng-loader, GPL-3.0-or-later, the extra `demo`) speaks sentences with voices drawn at random:
vocal tract length, formants, pitch, breathiness, roughness, rate and accent. Every *recording* then gets its own room,
noise, microphone and level, because with one channel per speaker the spectrum's mean and deviation already tell
speakers apart. About 1,400 recordings (90 minutes) take half a minute on 2 quiet cores. Good for showing that learning
works, never a stand-in for real speech in a result.

    OUTPUT/train/SPEAKER/UTTERANCE.wav
    OUTPUT/test/SPEAKER/UTTERANCE.wav (other voices)    OUTPUT/trials.txt (of test)
    OUTPUT/noise/*.wav    OUTPUT/rirs/*.wav (for augmentation; none of them is heard in the recordings)
    OUTPUT/corpus.json (what was made, with which arguments)
"""

import argparse
import ctypes
import itertools
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import scipy.fft
import scipy.signal
import soundfile
import soxr

SAMPLE_RATE = 16000
SPEAKERS_PER_PROCESS = 10  # see _speak_and_record: part of what makes a corpus reproducible
ACCENTS = ("en-us", "en", "en-gb-scotland", "en-gb-x-rp", "en-gb-x-gbclan", "en-gb-x-gbcwmd", "en-us-nyc", "en-029")

OPENINGS = (
    "Yesterday",
    "After lunch",
    "On most days",
    "Before the storm",
    "Near the harbour",
    "Last winter",
    "Every Friday",
    "In the old town",
    "Without a word",
    "Just before noon",
    "Most of the time",
    "Once in a while",
)
WHO = (
    "the gardener",
    "my younger cousin",
    "a tall woman",
    "our new teacher",
    "the ferry captain",
    "her brother",
    "an old friend",
    "the shop owner",
    "a group of children",
    "the night nurse",
    "their neighbour",
    "a young painter",
    "the baker",
    "one of the drivers",
    "the village doctor",
    "a quiet student",
)
DID = (
    "carried",
    "forgot",
    "painted",
    "repaired",
    "borrowed",
    "measured",
    "found",
    "sold",
    "washed",
    "photographed",
    "described",
    "followed",
    "ordered",
    "hid",
    "counted",
    "gathered",
)
WHAT = (
    "a basket of apples",
    "three heavy boxes",
    "the yellow bicycle",
    "a pair of gloves",
    "the broken window",
    "some fresh bread",
    "a very small boat",
    "the wrong key",
    "twelve silver spoons",
    "an enormous map",
    "the kitchen table",
    "a jar of honey",
    "the last newspaper",
    "a wooden ladder",
    "two grey horses",
    "the church bell",
)
WHERE = (
    "across the quiet bridge",
    "behind the station",
    "in the upper room",
    "under the chestnut trees",
    "by the river",
    "at the edge of the field",
    "on the way to school",
    "between two houses",
    "outside the museum",
    "in heavy rain",
    "along the coast",
    "near the fountain",
    "below the hill",
    "in front of everyone",
    "during the concert",
    "at dawn",
)


def sentence(rng):
    """A sentence of ten to sixteen words, about 3 to 4 seconds of speech."""
    opening, who, did, what, where = (rng.choice(words) for words in (OPENINGS, WHO, DID, WHAT, WHERE))
    return f"{opening}, {who} {did} {what} {where}."


# Voices


def voice_file(rng, name):
    """Text of an eSpeak NG voice variant drawn at random: one speaker's vocal tract and manner of phonation."""
    female = rng.random() < 0.5
    pitch = np.exp(rng.uniform(*np.log((150, 260) if female else (70, 140))))  # Hz, geometric like hearing
    tract = rng.uniform(1.02, 1.22) if female else rng.uniform(0.86, 1.04)  # a shorter tract raises all formants
    lines = [
        f"language variant\nname {name}",
        f"pitch {pitch:.0f} {pitch * rng.uniform(1.25, 1.6):.0f}",
        f"roughness {rng.integers(0, 4)}",
        f"flutter {rng.integers(0, 6)}",
        f"voicing {rng.integers(85, 140)}",
        f"consonants {rng.integers(60, 140)} {rng.integers(60, 140)}",
    ]
    for formant in range(9):
        frequency = 100 * tract * rng.uniform(0.93, 1.07)
        # Formants 0 and 1 carry most of the energy: too low a peak there leaves no voice.
        height = rng.uniform(80, 120) if formant < 2 else rng.uniform(45, 150)
        lines.append(f"formant {formant} {frequency:.0f} {height:.0f} {rng.uniform(75, 170):.0f}")
    if rng.random() < 0.4:
        lines.append("breath " + " ".join(str(rng.integers(0, 8)) for _ in range(8)))
    return "\n".join(lines) + "\n"


class Synthesizer:
    """eSpeak NG through ctypes, with voice variants of our own beside its language data."""

    RATE, PITCH, RANGE = 1, 3, 4  # espeak_PARAMETER

    def __init__(self, voices, seed):
        """`voices`: {name: text of a variant file}."""
        try:
            import espeakng_loader
        except ImportError:
            raise ModuleNotFoundError(
                "the demo speech needs the package espeakng-loader: pip install 'memo-jax[demo]'"
            ) from None
        # eSpeak NG looks for variants in its data folder only, and takes paths of at most 160 characters.
        self._folder = tempfile.TemporaryDirectory(prefix="espeak")
        data = Path(self._folder.name)
        for entry in Path(espeakng_loader.get_data_path()).iterdir():
            if entry.name != "voices":
                (data / entry.name).symlink_to(entry)
        variants = data / "voices" / "!v"
        variants.mkdir(parents=True)
        for name, text in voices.items():
            (variants / name).write_text(text)

        self._library = ctypes.CDLL(espeakng_loader.get_library_path())
        synchronous = 2  # espeak_AUDIO_OUTPUT: samples go to the callback and nothing is played
        self.rate = self._library.espeak_Initialize(synchronous, 0, str(data).encode(), 0)
        if self.rate <= 0:
            raise OSError(f"eSpeak NG could not read its data in {data}")
        self._library.espeak_ng_SetRandSeed(ctypes.c_long(seed))
        self._chunks = []
        callback_type = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
        self._callback = callback_type(self._collect)  # kept: the library holds only a pointer to it
        self._library.espeak_SetSynthCallback(self._callback)

    def _collect(self, samples, count, _events):
        if samples and count:
            self._chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    def say(self, text, voice, rate, pitch=50, pitch_range=50):
        """float64 [samples] in [-1, 1] at `self.rate` Hz; `rate` in words a minute, the others 0–100, 50 neutral."""
        library = self._library
        if library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise ValueError(f"eSpeak NG has no voice {voice}")
        for parameter, value in ((self.RATE, rate), (self.PITCH, pitch), (self.RANGE, pitch_range)):
            library.espeak_SetParameter(parameter, int(value), 0)
        self._chunks.clear()
        utf8, by_character = 1, 1
        data = text.encode()
        status = library.espeak_Synth(data, ctypes.c_size_t(len(data) + 1), 0, by_character, 0, utf8, None, None)
        library.espeak_Synchronize()
        if status != 0 or not self._chunks:
            raise OSError(f"eSpeak NG returned no speech for voice {voice} and text {text!r} (status {status})")
        return np.concatenate(self._chunks) / 32768


# Channels


def filtered(wave, gain):
    """`wave` [samples] with its spectrum multiplied by `gain(hertz)`; no phase shift."""
    length = scipy.fft.next_fast_len(len(wave), real=True)
    spectrum = scipy.fft.rfft(wave, length) * gain(scipy.fft.rfftfreq(length, 1 / SAMPLE_RATE))
    return scipy.fft.irfft(spectrum, length)[: len(wave)]


def room_response(rng):
    """Impulse response float32 [samples] of a random room: direct sound, reflections, a tail falling 60 dB in RT60."""
    rt60 = np.exp(rng.uniform(*np.log((0.12, 0.7))))
    seconds = np.arange(int(rt60 * SAMPLE_RATE)) / SAMPLE_RATE
    tail = rng.standard_normal(len(seconds)) * 10 ** (-3 * seconds / rt60)
    # Air and walls swallow high frequencies first: the later, the duller.
    dull = scipy.signal.lfilter([0.35], [1, -0.65], tail)
    late = np.clip(seconds / rt60 * 2, 0, 1)
    tail = (1 - late) * tail + late * dull
    delays = rng.integers(16, int(0.05 * SAMPLE_RATE), size=8)
    tail[delays] += rng.choice([-1, 1], size=8) * rng.uniform(1, 6, size=8)
    tail[:8] = 0
    direct_to_reverberant = 10 ** (rng.uniform(-2, 15) / 10)
    tail /= np.sqrt(np.sum(tail**2) * direct_to_reverberant)
    tail[0] = 1.0
    return tail.astype(np.float32)


def background_noise(rng, samples):
    """Noise float64 [samples] of unit power: a random colour, sometimes a hum, sometimes swelling."""
    slope, bump = rng.uniform(0, 1.2), rng.uniform(0, 4)
    centre, octaves = np.exp(rng.uniform(*np.log((200, 6000)))), rng.uniform(0.3, 1.5)

    def colour(hertz):
        distance = np.log2(np.maximum(hertz, 1) / centre) / octaves
        return np.maximum(hertz, 50) ** -slope * (1 + bump * np.exp(-0.5 * distance**2))

    noise = filtered(rng.standard_normal(samples), colour)
    noise /= noise.std()
    seconds = np.arange(samples) / SAMPLE_RATE
    if rng.random() < 0.3:
        fundamental = rng.choice([50, 60, 100, 120]) * rng.uniform(0.98, 1.02)
        for harmonic in range(1, 6):
            noise += rng.uniform(0, 0.5) * np.sin(2 * np.pi * (harmonic * fundamental * seconds + rng.random()))
    if rng.random() < 0.5:
        noise *= 1 + rng.uniform(0.2, 0.9) * np.sin(2 * np.pi * (rng.uniform(0.2, 4) * seconds + rng.random()))
    return noise / np.sqrt(np.mean(noise**2))


def microphone(rng, wave):
    """The wave through a random equaliser (standard deviation 3.5 dB) and a random pass-band."""
    equaliser = rng.normal(0, 3.5, size=8)  # dB at points evenly spaced in mel
    low, high = np.exp(rng.uniform(*np.log((20, 300)))), np.exp(rng.uniform(*np.log((5000, 8000))))

    def gain(hertz):
        mel = np.log1p(hertz / 700)
        decibels = np.interp(mel, np.linspace(0, mel[-1], len(equaliser)), equaliser)
        # Slopes of 12 and 24 dB an octave, and a floor: a narrow band dims what it cuts, but never erases it.
        decibels -= np.minimum(12 * np.maximum(np.log2(low / np.maximum(hertz, 1)), 0), 30)
        decibels -= np.minimum(24 * np.maximum(np.log2(np.maximum(hertz, 1) / high), 0), 30)
        return 10 ** (decibels / 20)

    return filtered(wave, gain)


def record(rng, speech):
    """`speech` float64 [samples] as int16 [samples], heard in a room, noise, microphone and level of its own."""
    wet = scipy.signal.fftconvolve(speech, room_response(rng))[: len(speech)]
    wet /= wet.std()
    noisy = wet + 10 ** (-rng.uniform(12, 30) / 20) * background_noise(rng, len(wet))
    heard = microphone(rng, noisy)
    level = 10 ** (rng.uniform(-30, -18) / 20)  # RMS re full scale
    return np.clip(np.round(heard / heard.std() * level * 32768), -32768, 32767).astype(np.int16)


# The corpus


def _speak_and_record(folder, split, speakers, utterances, seed):
    """Writes the recordings of these speakers, numbers within a split; returns seconds of audio.

    Meant for a fresh process: eSpeak NG carries small timing states from one utterance to the next, so the same bytes
    come out again only if a process says the same things in the same order.
    """
    streams = {speaker: np.random.default_rng([seed, {"train": 1, "test": 2}[split], speaker]) for speaker in speakers}
    voices = {f"{split}{speaker}": voice_file(rng, f"{split}{speaker}") for speaker, rng in streams.items()}
    synthesizer = Synthesizer(voices, seed=seed + speakers[0])
    seconds = 0.0
    for speaker, rng in streams.items():
        speaker_folder = folder / split / f"{split}{speaker:03d}"
        speaker_folder.mkdir(parents=True)
        voice = f"{rng.choice(ACCENTS)}+{split}{speaker}"
        words_a_minute = rng.uniform(150, 210)
        for utterance in range(utterances):
            speech = synthesizer.say(
                sentence(rng),
                voice,
                rate=words_a_minute * rng.uniform(0.94, 1.06),
                pitch=rng.integers(46, 55),
                pitch_range=rng.integers(40, 61),
            )
            recording = record(rng, soxr.resample(speech, synthesizer.rate, SAMPLE_RATE))
            soundfile.write(speaker_folder / f"{utterance:03d}.wav", recording, SAMPLE_RATE, subtype="PCM_16")
            seconds += len(recording) / SAMPLE_RATE
    return seconds


def make_banks(folder, *, noises=60, rooms=60, seconds=4.0, seed=0):
    """Noise (noise/*.wav) and room responses (rirs/*.wav) for augmentation, from draws of their own."""
    for kind, count in (("noise", noises), ("rirs", rooms)):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            rng = np.random.default_rng([seed, {"noise": 3, "rirs": 4}[kind], number])
            wave = background_noise(rng, int(seconds * SAMPLE_RATE)) if kind == "noise" else room_response(rng)
            wave = 0.9 * wave / np.abs(wave).max()
            soundfile.write(folder / kind / f"{number:03d}.wav", wave, SAMPLE_RATE, subtype="PCM_16")


def make_trials(names_by_speaker, *, nontargets_per_target=4, seed=0):
    """Lines of a trial list in VoxCeleb form ("1 enrol test"): all target pairs, and nontarget pairs, none twice.

    `names_by_speaker`: {speaker: [utterance name, …]}; needs two speakers and one with two utterances.
    """
    targets = [pair for names in names_by_speaker.values() for pair in itertools.combinations(names, 2)]
    if not targets or len(names_by_speaker) < 2:
        raise ValueError("a trial list needs at least two speakers, and two recordings of one of them")
    rng = np.random.default_rng([seed, 5])
    names = [(name, speaker) for speaker, group in names_by_speaker.items() for name in group]
    possible = len(names) * (len(names) - 1) // 2 - len(targets)
    nontargets = {}  # a dict keeps the order of drawing
    while len(nontargets) < min(nontargets_per_target * len(targets), possible):
        first, second = sorted(rng.integers(0, len(names), size=2))
        if names[first][1] != names[second][1]:
            nontargets[names[first][0], names[second][0]] = None
    between = "\t" if any(len(name.split()) > 1 for name, _ in names) else " "  # names with spaces need tabs
    return [between.join((label, *pair)) for label, pairs in (("1", targets), ("0", nontargets)) for pair in pairs]


def make_corpus(
    output_dir, *, speakers=100, utterances=12, test_speakers=30, test_utterances=8, seed=0, processes=None
):
    """Makes the whole corpus (see the module's docstring) and returns the content of its corpus.json.

    The folder appears complete or not at all; one made before with the same arguments is kept as it is. The same
    arguments yield the same bytes, however many processes work. Raises FileExistsError when `output_dir` holds anything
    else.
    """
    output_dir = Path(output_dir)
    made = {
        "speakers": speakers,
        "utterances": utterances,
        "test_speakers": test_speakers,
        "test_utterances": test_utterances,
        "seed": seed,
    }
    record_file = output_dir / "corpus.json"
    if record_file.exists():
        found = json.loads(record_file.read_text())
        if found["arguments"] == made:
            return found
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise FileExistsError(
            f"{output_dir} exists and is not this demo corpus ({made}): remove it, or name another folder"
        )

    partial = output_dir.with_name(output_dir.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tasks = [
        (partial, split, list(range(start, min(start + SPEAKERS_PER_PROCESS, total))), count, seed)
        for split, total, count in (("train", speakers, utterances), ("test", test_speakers, test_utterances))
        for start in range(0, total, SPEAKERS_PER_PROCESS)
    ]
    try:
        with multiprocessing.get_context("spawn").Pool(processes or os.cpu_count(), maxtasksperchild=1) as pool:
            seconds = pool.starmap(_speak_and_record, tasks, chunksize=1)
        make_banks(partial, seed=seed)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    test = {
        folder.name: [f"{folder.name}/{file.name}" for file in sorted(folder.iterdir())]
        for folder in sorted((partial / "test").iterdir())
    }
    trials = make_trials(test, seed=seed)
    (partial / "trials.txt").write_text("\n".join(trials) + "\n")
    by_split = {split: sum(s for s, task in zip(seconds, tasks) if task[1] == split) for split in ("train", "test")}
    summary = {
        "arguments": made,
        "train_minutes": round(by_split["train"] / 60, 2),
        "test_minutes": round(by_split["test"] / 60, 2),
        "trials": len(trials),
    }
    (partial / "corpus.json").write_text(json.dumps(summary, indent=2) + "\n")
    if output_dir.exists():
        output_dir.rmdir()  # empty, as checked above
    os.replace(partial, output_dir)
    return summary


def main():
    parser = argparse.ArgumentParser(description="Make the synthetic corpus of the demo.")
    parser.add_argument("output", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    start = time.perf_counter()
    try:
        summary = make_corpus(arguments.output, seed=arguments.seed)
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"demo_speech: error: {error}")
    print(
        f"{arguments.output}: {summary['train_minutes']:.0f} minutes to train on, {summary['test_minutes']:.0f} to "
        f"test on, {summary['trials']} trials, made in {time.perf_counter() - start:.0f} s"
    )


if __name__ == "__main__":
    main()
