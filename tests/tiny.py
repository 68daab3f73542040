"""A corpus, a dataset, trials and a config so small that a whole training run takes seconds."""

import atexit
import contextlib
import fcntl
import functools
import io
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile

from memo_jax import cli
from memo_jax.audio import SAMPLE_RATE
from memo_jax.config import load_config
from memo_jax.data.prepare import prepare

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
    # Shallow, since compiling takes most of the time: one block of two parts, two stages of one block.
    config.model.ecapa_channels = (16, 16, 48)
    config.model.ecapa_scale = 2
    config.model.resnet_base_channels = 2
    config.model.resnet_blocks = (1, 1)
    config.model.campplus_layers = (1, 1, 1)
    config.model.campplus_growth = 4
    config.model.campplus_channels = 8
    config.model.campplus_plane_channels = 4
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


# Settings with which a run learns from labels alone.
SUPERVISED = (
    "supervised.weight=1",
    "loss.self=0",
    "loss.cross=0",
    "loss.contrastive=0",
    "gate.rule=never",
    "optimizer.name=adamw",
    "optimizer.learning_rate=0.5",
)


def write_corpus(folder: Path, speakers: int = SPEAKERS, utterances: int = UTTERANCES) -> Path:
    """Writes folder/s<i>/<j>.wav of 0.6 to 1.2 s: harmonics of the speaker's own pitch, with noise."""
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
    """Every pair of the first two utterances of two speakers, as trial lines."""
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


class Material(NamedTuple):
    """What a run needs, as paths."""

    corpus: Path
    dataset: Path
    trials: Path
    config: Path


@functools.cache
def temporary_folder() -> Path:
    """A folder for this process, removed when it ends."""
    folder = Path(tempfile.mkdtemp(prefix="memo-jax-tests-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def shared_folder() -> Path:
    """A folder for all workers of pytest, which conftest.py makes and removes; elsewhere a folder for this process."""
    return Path(os.environ["MEMO_JAX_TESTS_SHARE"]) if "MEMO_JAX_TESTS_SHARE" in os.environ else temporary_folder()


def made_once(make):
    """Decorates a function that writes into `shared_folder`: the first process to call it runs it, others wait for it
    and get what it returned."""

    @functools.cache
    @functools.wraps(make)
    def once():
        returned = shared_folder() / f"{make.__name__}.pickle"
        with open(returned.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                if not returned.exists():
                    value = make()
                    returned.write_bytes(pickle.dumps(value))
                return pickle.loads(returned.read_bytes())
            finally:
                fcntl.flock(lock, fcntl.LOCK_UN)  # processes that were forked meanwhile hold it too

    return once


@made_once
def material() -> Material:
    """The corpus, dataset, trial list and config that all tests share: read-only."""
    folder = shared_folder()
    corpus = write_corpus(folder / "corpus")
    shutil.copy(ROOT / "configs" / "base.py", folder)  # the config's neighbour, which it imports
    (folder / "tiny.py").write_text(CONFIG)
    dataset = write_dataset(folder / "dataset", corpus)
    return Material(corpus, dataset, write_trials(folder / "trials.txt"), folder / "tiny.py")


def tiny_config(*overrides: str):
    """The tiny config with overrides like "total_steps=3"."""
    return load_config(material().config, [f"--config.{text}" for text in overrides])


def one_branch() -> list[str]:
    """Overrides: the data, and a single branch."""
    return ["data.train=" + str(material().dataset), "model.branches=resnet"]


def train_arguments(workdir: Path, *arguments: str) -> list[str]:
    """The command line, after `memo-jax`, of a tiny run of one branch; an argument "a.b=1" is for the config."""
    settings = one_branch()
    flags = [text for text in arguments if text.startswith("--")]
    settings += [text for text in arguments if not text.startswith("--")]
    command = ["train", f"--config={material().config}", f"--workdir={workdir}", *flags]
    return command + [f"--config.{text}" for text in settings]


def round_arguments(workdir: Path, *more: str) -> list[str]:
    """The command line, after `memo-jax`, of two rounds of pseudo-labels of three steps each; as `train_arguments`."""
    tiny = material()
    command = train_arguments(
        workdir,
        *(text for text in more if not text.startswith("--")),
        *SUPERVISED,
        "model.embedding_dim=8",
        "model.resnet_blocks=1,1,1,1",  # those of `model_file`
        "data.local_crops=0",
        "total_steps=3",
        "checkpoint.every_steps=1",
        f"evaluation.data={tiny.dataset}",
        f"evaluation.trials={tiny.trials}",
    )
    options = ["--rounds=2", "--clusters=5", f"--model={model_file()}", f"--labels={tiny.dataset}"]
    return ["pseudo-label", *command[1:], *options, *(text for text in more if text.startswith("--"))]


@functools.cache
def untrained_model():
    """An untrained ResNet of two channels with a decision threshold: enough to try everything but its accuracy."""
    import jax
    import jax.numpy as jnp

    from memo_jax.inference.model_file import Decision, model_of_backbone
    from memo_jax.models import build_backbone

    backbone = build_backbone("resnet", embedding_dim=8, base_channels=2, blocks=(1, 1, 1, 1))
    variables = jax.jit(backbone.init)(jax.random.key(0), jnp.zeros((2, 32, 80)))
    variables = jax.tree.map(np.asarray, variables)
    decision = Decision(0.4, 20.0, -8.0, "a list")
    return model_of_backbone(backbone, variables, provenance={"said": "größer"}, decision=decision)


@functools.cache
def model_file() -> Path:
    """A model file of `untrained_model`: read-only."""
    from memo_jax.inference.model_file import write_model

    return write_model(temporary_folder() / "model.safetensors", untrained_model())


@made_once
def whole_run() -> Path:
    """The workdir of an uninterrupted run of 12 steps, with checkpoints at 8 and 12 and the gate closing after 7:
    read-only."""
    workdir = shared_folder() / "whole"
    status, text = train_here(workdir)
    assert status == 0, text
    assert "augmentation: no bank of noise or rooms; other utterances are added as babble\n" in text
    return workdir


@made_once
def trained_run() -> tuple[Path, str]:
    """The (read-only) workdir of a run of ECAPA-TDNN and ResNet with trials, started as a user does, and what it
    printed."""
    workdir, tiny = shared_folder() / "run", material()
    arguments = train_arguments(
        workdir,
        "model.branches=ecapa,resnet",
        "data.local_crops=0",
        "total_steps=6",
        "gate.stop_steps=3",
        "checkpoint.every_steps=2",
        f"evaluation.data={tiny.dataset}",
        f"evaluation.trials={tiny.trials}",
        "evaluation.every_epochs=1",
    )
    done = memo_jax(*arguments)
    assert done.returncode == 0, done.stderr
    return workdir, done.stderr


def here(*arguments) -> tuple[int, str]:
    """Runs `memo-jax ARGUMENTS` in this process; returns the exit status and what it printed (both streams)."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            status = cli.main([str(argument) for argument in arguments])
        except SystemExit as stop:
            status = stop.code
    return status, printed.getvalue()


def train_here(workdir: Path, *arguments: str) -> tuple[int, str]:
    """Runs `memo-jax train` in this process, with `train_arguments`."""
    return here(*train_arguments(workdir, *arguments))


def environment(devices: int = 1) -> dict[str, str]:
    """The environment in which another process finds the package and sees a number of (virtual) CPU devices."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}".strip()
    return os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}


def as_users_compile() -> dict[str, str]:
    """The environment without what conftest.py sets so that small networks compile quickly."""
    kept = environment()
    return {name: value for name, value in kept.items() if name not in ("JAX_DISABLE_MOST_OPTIMIZATIONS", "XLA_FLAGS")}


def memo_jax(*arguments, **options) -> subprocess.CompletedProcess:
    """Runs `memo-jax ARGUMENTS` as a user would and returns the result."""
    command = [sys.executable, "-m", "memo_jax", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment(), **options)
