"""Recordings of any common kind → 16 kHz mono samples, or an error that names the file and the reason.

Read `read` first: it holds everything that other packages call. `containers` identifies a file by its bytes (`kinds`)
and checks that it is complete (`chunks`, `flac`, `mpeg`, `ogg`). `decode_soundfile` and `decode_ffmpeg` decode.
`samples` makes mono 16-bit samples, `speech` finds the parts that are speech. `error`, `part` and `window` are shared.
"""

from memo_jax.audio.error import SAMPLE_RATE, AudioError
from memo_jax.audio.read import (
    AUDIO_EXTENSIONS,
    MAX_SECONDS,
    as_audio,
    audio_seconds,
    check_speech,
    excerpt_name,
    is_audio_name,
    needs_ffmpeg,
    parse_channel,
    parse_excerpt,
    read_audio,
    read_excerpt,
    read_float_audio,
)
from memo_jax.audio.speech import speech_of, speech_parts

__all__ = [
    "AUDIO_EXTENSIONS",
    "MAX_SECONDS",
    "SAMPLE_RATE",
    "AudioError",
    "as_audio",
    "audio_seconds",
    "check_speech",
    "excerpt_name",
    "is_audio_name",
    "needs_ffmpeg",
    "parse_channel",
    "parse_excerpt",
    "read_audio",
    "read_excerpt",
    "read_float_audio",
    "speech_of",
    "speech_parts",
]
