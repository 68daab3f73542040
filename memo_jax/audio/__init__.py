"""Recordings of any common kind → 16 kHz mono samples, or an error that names the file and the reason.

Read `read` first, which holds all that others call. `containers` (with `mpeg` and `ogg`) tells by the bytes of a file
what it is and whether all of it is there. `decode_soundfile` and `decode_ffmpeg` decode. `samples` makes mono 16-bit
samples. `error`, `part` and `window` are what these share.
"""

from memo_jax.audio.error import SAMPLE_RATE, AudioError
from memo_jax.audio.read import (
    AUDIO_EXTENSIONS,
    MAX_SECONDS,
    as_audio,
    audio_seconds,
    check_speech,
    is_audio_name,
    needs_ffmpeg,
    parse_channel,
    read_audio,
    read_float_audio,
)

__all__ = [
    "AUDIO_EXTENSIONS",
    "MAX_SECONDS",
    "SAMPLE_RATE",
    "AudioError",
    "as_audio",
    "audio_seconds",
    "check_speech",
    "is_audio_name",
    "needs_ffmpeg",
    "parse_channel",
    "read_audio",
    "read_float_audio",
]
