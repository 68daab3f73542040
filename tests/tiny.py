"""A corpus, a dataset, trials and a config so small that a whole training run takes seconds."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import soundfile

from memo_jax.audio import SAMPLE_RATE
from memo_jax.config import load_config
from memo_jax.prepare import prepare

ROOT = Path(__file__).parents[1]
SPEAKERS, UTTERANCES = 5, 4
STEPS_PER_EPOCH = SPEAKERS * UTTERANCES // 4  # at the config's batch of 4

CONFIG = """
import base


def get_config():
    config = base.get_config()
    config.total_epochs = -1.0
    config.total_steps = 12
    config.log_every_steps = 1
    config.data.batch_size = 4
    config.data.global_seconds = 0.32
    config.data.local_crops = 1
    config.data.local_seconds = 0.32
    config.augment.bank_seconds = 0.5
    config.model.embedding_dim = 16
    config.model.ecapa_channels = (16, 16, 16, 16, 48)
    config.model.resnet_base_channels = 2
    config.model.resnet_blocks = (1, 1, 1, 1)
    config.model.head_hidden = 32
    config.model.head_bottleneck = 16
    config.model.prototypes = 64
    config.optimizer.warmup_epochs = -1.0
    config.optimizer.warmup_steps = 2
    config.optimizer.freeze_prototypes_epochs = -1.0
    config.optimizer.freeze_prototypes_steps = 3
    config.gate.rule = "step"
    config.gate.stop_epochs = -1.0
    config.gate.stop_steps = 7
    config.checkpoint.every_epochs = -1.0
    config.checkpoint.every_steps = 4
    config.checkpoint.keep = 2
    config.checkpoint.keep_every_epochs = 0.0
    return config
"""


def write_corpus(folder: Path, speakers: int = SPEAKERS, utterances: int = UTTERANCES) -> Path:
    """Writes folder/s<i>/<j>.wav of 0.6 to 1.2 s: harmonics of a pitch that is the speaker's, with noise."""
    rng = np.random.default_rng(0)
    for speaker in range(speakers):
        (folder / f"s{speaker}").mkdir(parents=True)
        for utterance in range(utterances):
            time = np.arange(int(SAMPLE_RATE * (0.6 + 0.6 * rng.random()))) / SAMPLE_RATE
            pitch = 90 * 1.2**speaker * (1 + 0.03 * rng.normal())
            tones = sum(np.sin(2 * np.pi * pitch * k * time + rng.random() * 6) / k for k in range(1, 12))
            wave = 0.1 * tones + 0.02 * rng.normal(size=len(time))
            soundfile.write(folder / f"s{speaker}" / f"{utterance}.wav", wave, SAMPLE_RATE)
    return folder


def write_dataset(folder: Path, corpus: Path, **options) -> Path:
    """Prepares the corpus into `folder`."""
    prepare(corpus, folder, workers=1, **options)
    return folder


def trial_lines(kaldi: bool = False) -> list[str]:
    """Every pair of two speakers' first two utterances as trial lines."""
    names = [(f"s{speaker}/{utterance}.wav", speaker) for speaker in range(SPEAKERS) for utterance in range(2)]
    lines = []
    for i, (a, speaker_a) in enumerate(names):
        for b, speaker_b in names[i + 1 :]:
            same = speaker_a == speaker_b
            lines.append(f"{a} {b} {'target' if same else 'nontarget'}" if kaldi else f"{int(same)} {a} {b}")
    return lines


def write_trials(path: Path, kaldi: bool = False) -> Path:
    """Writes `trial_lines` to a file."""
    path.write_text("\n".join(trial_lines(kaldi)) + "\n")
    return path


def write_config(folder: Path) -> Path:
    """Writes the tiny config, and beside it the base that it imports; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / "configs" / "base.py", folder)
    path = folder / "tiny.py"
    path.write_text(CONFIG)
    return path


def tiny_config(folder: Path, dataset: Path, *overrides: str):
    """Returns the tiny config, loaded, for a dataset, with overrides like "total_steps=3"."""
    path = folder / "tiny.py"
    path = path if path.exists() else write_config(folder)
    return load_config(path, [f"--config.{text}" for text in (f"data.train={dataset}", *overrides)])


def environment() -> dict[str, str]:
    """The environment in which another process finds the package and one CPU device."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}


def memo_jax(*arguments, **options) -> subprocess.CompletedProcess:
    """Runs `memo-jax ARGUMENTS` as a user would and returns what came out."""
    command = [sys.executable, "-m", "memo_jax", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment(), **options)
