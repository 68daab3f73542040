"""The options of every command of `memo-jax`; nothing heavy is imported for them."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from memo_jax.version import __version__

# As interop.TOOLKITS, runtime.RUNTIMES and features.FRONT_ENDS, which are slow to import.
TOOLKITS = ("speechbrain", "wespeaker", "3dspeaker", "speaker-net")
RUNTIMES = ("auto", "jax", "onnx")
FRONT_END_NAMES = ("log_mel", "kaldi_fbank", "wespeaker_fbank", "sherpa_fbank", "speechbrain_fbank")
RECORDING_HELP = "a file, or an excerpt of it in seconds: file.wav:12.5-20"

Command = Callable[..., argparse.ArgumentParser]  # (name, description, *parents) → the parser of a command


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="memo-jax", description="Self-supervised speaker verification: MeMo in JAX.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"memo-jax {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name, description, *parents):
        return commands.add_parser(name, help=description, description=description, parents=parents, allow_abbrev=False)

    for add in (
        add_prepare,
        add_trials,
        add_init_config,
        add_train,
        add_pseudo_label,
        add_reproduce,
        add_plan,
        add_eval,
        add_embed,
        add_cluster,
        add_verify,
        add_enroll,
        add_remove,
        add_identify,
        add_app,
        add_report,
        add_export,
        add_push,
        add_score,
        add_convert,
    ):
        add(command)
    return parser


def add_prepare(command: Command) -> None:
    """Adds memo-jax prepare."""
    added = command("prepare", "turn recordings into a dataset, or check a dataset", MIN_SECONDS_OPTION, CHANNEL, VAD)
    added.add_argument(
        "--input",
        action="append",
        type=Path,
        metavar="PATH",
        help="folder of recordings, zip or tar, Kaldi folder, or wespeaker shards; may be given several times",
    )
    added.add_argument(
        "--tfds",
        action="append",
        metavar="NAME:SPLIT",
        help="TFDS dataset with an Audio feature, such as librispeech:train_clean100",
    )
    added.add_argument("--tfds-dir", type=Path, metavar="DIR", help="where TFDS keeps its datasets")
    added.add_argument("--output", type=Path, metavar="DATASET", help="where the dataset goes")
    added.add_argument("--overwrite", action="store_true", help="replace an existing dataset")
    added.add_argument("--run-commands", action="store_true", help="run the commands in a Kaldi folder's wav.scp")
    added.add_argument(
        "--check", type=Path, metavar="DATASET", help="instead: read all of this dataset and verify its contents"
    )
    added.add_argument("--workers", type=positive, metavar="N", help="processes (default: one per core)")


def add_trials(command: Command) -> None:
    """Adds memo-jax trials."""
    added = command("trials", "make a trial list of labelled recordings", JSON)
    added.add_argument("input", type=Path, metavar="DATASET", help="a dataset, or a folder or archive as for prepare")
    added.add_argument("-o", "--output", required=True, type=Path, metavar="FILE", help="where the list goes")
    added.add_argument(
        "--targets",
        type=positive,
        metavar="N",
        help="trials of one speaker, spread evenly (default: up to 10 of each speaker)",
    )
    added.add_argument(
        "--nontargets", type=positive, metavar="N", help="trials of different speakers (default: as many as targets)"
    )
    added.add_argument(
        "--same-gender",
        type=Path,
        metavar="FILE",
        help="lines `speaker gender`; nontarget trials are then within a gender",
    )
    added.add_argument(
        "--same-session",
        action="store_true",
        help="allow target trials within a session: a folder between the speaker's and the recording",
    )
    added.add_argument("--seed", type=count, default=0, metavar="N", help="default: %(default)s")
    added.add_argument(
        "--form",
        choices=("voxceleb", "kaldi"),
        default="voxceleb",
        help="`1 enrol test` or `enrol test target` (default: %(default)s)",
    )


def add_init_config(command: Command) -> None:
    """Adds memo-jax init-config."""
    added = command("init-config", "write a config file with every key and its meaning, to change and train with")
    added.add_argument(
        "name",
        nargs="?",
        default="small",
        metavar="NAME",
        help="packaged config whose values to use: small, base (the authors'), … (default: %(default)s)",
    )
    added.add_argument("-o", "--output", type=Path, metavar="FILE", help="default: NAME.py")


def add_train(command: Command) -> None:
    """Adds memo-jax train."""
    added = command("train", "train a new run, or resume the run in a workdir", CONFIG, DEVICE)
    added.add_argument(
        "--workdir",
        required=True,
        type=Path,
        metavar="DIR",
        help="folder for config, metrics and checkpoints; may be gs://…",
    )
    added.add_argument(
        "--init",
        type=Path,
        metavar="MODEL",
        help="start from the network of a model file or a workdir, as --config.init=MODEL does",
    )
    added.add_argument("--stop-at-step", type=count, metavar="N", help="save a checkpoint at step N and stop")
    added.add_argument(
        "--profile",
        metavar="STEPS",
        help="profile steps of this command into DIR/profile: FIRST:LAST, or how many after the first ten",
    )
    added.add_argument(
        "--distributed",
        action="store_true",
        help="join the other processes of this TPU pod, Slurm, Open MPI or Kubernetes job",
    )
    added.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        help="instead of --distributed, with --num-processes and --process-id: address on which process 0 listens",
    )
    added.add_argument("--num-processes", "--num_processes", type=positive, metavar="N", help="number of processes")
    added.add_argument("--process-id", "--process_id", type=count, metavar="I", help="number of this process, from 0")


def add_pseudo_label(command: Command) -> None:
    """Adds memo-jax pseudo-label."""
    added = command(
        "pseudo-label",
        "cluster with a network and train on the clusters, in rounds; resumes the rounds in a workdir",
        CONFIG,
        DEVICE,
        JSON,
        *CLUSTERING,
    )
    added.add_argument(
        "--workdir", required=True, type=Path, metavar="DIR", help="folder for the rounds and the best network"
    )
    added.add_argument(
        "--model", required=True, type=Path, metavar="MODEL", help="network to start from: a workdir or a model file"
    )
    added.add_argument("--rounds", type=positive, default=3, metavar="R", help="default: %(default)s")
    added.add_argument(
        "--from-scratch",
        action="store_true",
        help="each round trains from random weights, not from the network that made its clusters",
    )


def add_reproduce(command: Command) -> None:
    """Adds memo-jax reproduce."""
    added = command("reproduce", "repeat a run from its config and compare the two", JSON)
    added.add_argument(
        "workdir",
        type=Path,
        metavar="RUN",
        help="workdir of the run; if its data have moved, add --config.data.train=DATASET …",
    )
    added.add_argument("--output", type=Path, metavar="DIR", help="the new workdir (default: RUN-again)")


def add_plan(command: Command) -> None:
    """Adds memo-jax plan."""
    added = command("plan", "estimate the cost of training on TPUs or GPUs, without having them", CONFIG, JSON)
    added.add_argument(
        "--topology",
        required=True,
        metavar="NAME",
        help="TPUs along each axis: v5e:4x4, v6e:4x4, v4:2x2x4, v5p:2x2x4; GPUs of one machine: a100:8, h100:8, "
        "h200:8, b200:8; four machines of eight: h100:4x8",
    )
    added.add_argument(
        "--utterances",
        type=positive,
        metavar="N",
        help="utterances in an epoch (default: those of data.train, or of VoxCeleb2)",
    )


def add_eval(command: Command) -> None:
    """Adds memo-jax eval."""
    added = command(
        "eval", "score a trial list with a trained network", *NETWORK, DEVICE, JSON, *TRIALS, REPLICATES_OPTION
    )
    added.add_argument(
        "--workdir",
        "--model",
        dest="model",
        required=True,
        type=Path,
        metavar="MODEL",
        help="workdir of a training run, model file, or exported program",
    )
    added.add_argument("--data", required=True, type=Path, metavar="DATASET", help="recordings of the trials")
    added.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder for results.json and det.png")
    added.add_argument(
        "--crops", type=count, default=0, metavar="R", help="score R crops of each recording instead of full recordings"
    )
    added.add_argument(
        "--crop-seconds", type=seconds, metavar="S", help="length of each crop of --crops (default: 4.0)"
    )
    added.add_argument(
        "--save-threshold",
        nargs="?",
        const="eer",
        metavar="CRITERION",
        choices=("eer", "min_dcf_0.01", "min_dcf_0.05"),
        help="save the threshold at this criterion (default: eer) and a calibration of the scores with the model, for "
        "verify and identify",
    )
    added.add_argument(
        "--save-calibration",
        type=Path,
        metavar="FILE",
        help="save both to a file, for verify --calibration; for models that cannot be changed",
    )


def add_embed(command: Command) -> None:
    """Adds memo-jax embed."""
    added = command("embed", "turn recordings into embeddings", *EMBEDDER, MIN_SECONDS_OPTION)
    added.add_argument(
        "input",
        nargs="+",
        type=Path,
        metavar="INPUT",
        help="files, excerpts (file.wav:12.5-20, in seconds), folders or datasets of recordings",
    )
    added.add_argument(
        "-o",
        "--output",
        required=True,
        type=Path,
        metavar="FILE",
        help="FILE.npz, .parquet, .npy (with FILE.names.txt) or .ark (Kaldi's, with FILE.scp)",
    )
    added.add_argument(
        "--window",
        type=seconds,
        metavar="S",
        help="embed sliding windows of this length instead of whole recordings, with their times",
    )
    added.add_argument("--hop", type=seconds, metavar="S", help="from one window to the next (default: half a window)")


def add_cluster(command: Command) -> None:
    """Adds memo-jax cluster."""
    added = command("cluster", "cluster utterances by their embeddings, to train on", *MODEL, *CLUSTERING)
    added.add_argument("--embeddings", type=Path, metavar="FILE", help="of the utterances, as embed writes them")
    added.add_argument("--data", type=Path, metavar="DATASET", help="instead: utterances to embed with --model")
    added.add_argument(
        "-o", "--output", required=True, type=Path, metavar="FILE", help="table of lines `name<tab>cluster`"
    )
    added.add_argument("--figure", type=Path, metavar="FILE", help="histogram of the clusters' sizes: png, svg or pdf")


def add_verify(command: Command) -> None:
    """Adds memo-jax verify."""
    added = command("verify", "tell whether the same person speaks in two recordings", *EMBEDDER, *THRESHOLD)
    added.add_argument("recordings", nargs=2, type=Path, metavar="RECORDING", help=RECORDING_HELP)


def add_enroll(command: Command) -> None:
    """Adds memo-jax enroll."""
    added = command("enroll", "add a person to a gallery", *EMBEDDER, GALLERY)
    added.add_argument("name", metavar="NAME")
    added.add_argument("recordings", nargs="+", type=Path, metavar="RECORDING", help=RECORDING_HELP)


def add_remove(command: Command) -> None:
    """Adds memo-jax remove."""
    added = command("remove", "remove a person from a gallery", GALLERY, JSON)
    added.add_argument("name", metavar="NAME")


def add_identify(command: Command) -> None:
    """Adds memo-jax identify."""
    added = command("identify", "tell who in a gallery speaks in a recording", *EMBEDDER, *THRESHOLD, GALLERY)
    added.add_argument("recording", type=Path, metavar="RECORDING", help=RECORDING_HELP)


def add_app(command: Command) -> None:
    """Adds memo-jax app."""
    added = command(
        "app",
        "serve a page on this machine: compare two recordings, enrol people, identify them",
        *EMBEDDER,
        *THRESHOLD,
    )
    added.add_argument(
        "--gallery", type=Path, metavar="FILE", help="FILE.npz or FILE.parquet (default: forget people at the end)"
    )
    added.add_argument(
        "--port", type=port, metavar="N", help="port on 127.0.0.1 (default: the first free one from 7860)"
    )
    added.add_argument(
        "--open", action=argparse.BooleanOptionalAction, default=True, help="open the page in the browser"
    )


def add_report(command: Command) -> None:
    """Adds memo-jax report."""
    added = command("report", "write an HTML page about a training run", DEVICE)
    added.add_argument("workdir", type=Path, metavar="WORKDIR", help="of a training run")
    added.add_argument("--output", type=Path, metavar="FILE", help="the page (default: WORKDIR/report.html)")
    added.add_argument("--data", type=Path, metavar="DATASET", help="to test on (default: the run's evaluation.data)")
    added.add_argument(
        "--trials", type=Path, metavar="FILE", help="trial list to test with (default: the run's evaluation.trials)"
    )
    added.add_argument("--step", type=count, metavar="N", help="checkpoint to test (default: the latest)")


def add_export(command: Command) -> None:
    """Adds memo-jax export."""
    added = command("export", "write a network to files for use elsewhere", *MODEL)
    added.add_argument(
        "--output",
        nargs="+",
        required=True,
        type=Path,
        metavar="FILE",
        help="name.safetensors: a model file; name.zip: a program that runs with JAX alone; name.onnx: an ONNX file",
    )
    added.add_argument(
        "--onnx-input",
        choices=("waveform", "feats"),
        help="of an ONNX file: waveforms at 16 kHz, or features of the model's front end (default: waveform)",
    )
    added.add_argument(
        "--weights",
        choices=("float32", "float16", "int8"),
        default="float32",
        help="of a model file or ONNX file: as they are, half the size, or (ONNX) quantised (default: %(default)s)",
    )
    added.add_argument(
        "--onnx-runtime",
        choices=("sherpa-onnx", "wespeaker"),
        help="write features and metadata as this runtime expects them",
    )
    added.add_argument(
        "--other-front-end",
        action="store_true",
        help="let that runtime compute other features than the model was trained with; prints what that costs",
    )


def add_push(command: Command) -> None:
    """Adds memo-jax push."""
    added = command("push", "upload a model to the Hugging Face Hub", *NETWORK)
    added.add_argument("model", type=Path, metavar="MODEL", help="workdir of a training run, or model file")
    added.add_argument("repository", metavar="ORG/NAME", help="created if it is missing")
    added.add_argument("--results", type=Path, action="append", default=[], metavar="FILE", help="results.json of eval")
    added.add_argument("--license", default="apache-2.0", metavar="NAME", help="default: %(default)s")
    added.add_argument(
        "--dataset", action="append", default=[], metavar="NAME", help="name of a dataset the model was trained on"
    )
    added.add_argument("--private", action="store_true", help="make a new repository private")
    added.add_argument("--no-onnx", action="store_true", help="upload no ONNX file")


def add_score(command: Command) -> None:
    """Adds memo-jax score."""
    added = command("score", "score a trial list with embeddings", *TRIALS, REPLICATES_OPTION, JSON)
    added.add_argument(
        "--embeddings",
        action="append",
        required=True,
        type=Path,
        metavar="FILE",
        help="npz with `names` and `embeddings` [N, D], parquet, npy, ark or scp; given several times, scores are "
        "averaged",
    )
    added.add_argument(
        "--cohort",
        action="append",
        default=[],
        type=Path,
        metavar="FILE",
        help="embeddings of other recordings, one file for each --embeddings",
    )
    added.add_argument("--mean-subtraction", action="store_true", help="subtract the cohort's mean")
    added.add_argument(
        "--as-norm", type=count, default=0, metavar="N", help="normalise by the N nearest utterances of the cohort"
    )
    added.add_argument(
        "--calibrate", type=Path, metavar="TRIALS", help="calibrate on these trials, and report actDCF and Cllr"
    )
    added.add_argument(
        "--compare",
        action="append",
        default=[],
        type=Path,
        metavar="FILE",
        help="embeddings of another system: is the first better?",
    )
    added.add_argument(
        "--speakers",
        type=Path,
        metavar="FILE",
        help="lines `name speaker`, for the interval (default: the first folder of a name)",
    )
    added.add_argument("--scores", type=Path, metavar="FILE", help="write lines `score enrol test` to this file")


def add_convert(command: Command) -> None:
    """Adds memo-jax convert."""
    added = command("convert", "turn PyTorch weights into a model file, or back", *NETWORK)
    added.add_argument(
        "input",
        type=Path,
        metavar="INPUT",
        help="safetensors or a PyTorch checkpoint; with --to, a model file or a workdir",
    )
    added.add_argument(
        "--output",
        required=True,
        type=Path,
        metavar="FILE",
        help="model file; with --to, FILE.safetensors, or .pt, .pth, .ckpt, .bin, which need torch",
    )
    added.add_argument(
        "--kind", choices=TOOLKITS, help="the toolkit that INPUT is from (default: recognised by parameter names)"
    )
    added.add_argument(
        "--part",
        metavar="NAME",
        help="which network of a checkpoint that holds several (default: teacher_ecapa, or the only one)",
    )
    added.add_argument(
        "--front-end",
        choices=FRONT_END_NAMES,
        help="what the weights take as input (default: what convert --to noted in INPUT, or what the toolkit computes)",
    )
    added.add_argument("--to", choices=TOOLKITS, help="write the network with the names of this toolkit")


MOST_REPLICATES = 1_000_000  # of the bootstrap, whose error rates stay in memory


def number(text: str) -> float:
    """Returns a finite number from the command line; argparse reports the error."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or not text.isascii() or "_" in text:
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
    return value


def cosine(text: str) -> float:
    """Returns a cosine score from the command line; argparse reports the error."""
    value = number(text)
    if not -1 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not in [-1, 1], as cosines are")
    return value


def seconds(text: str) -> float:
    """Returns a duration of at least 0 from the command line; argparse reports the error."""
    value = number(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is less than 0 seconds")
    return value


def count(text: str) -> int:
    """Returns a whole number of at least 0 from the command line; argparse reports the error."""
    return _whole(text, 0)


def positive(text: str) -> int:
    """Returns a whole number of at least 1 from the command line; argparse reports the error."""
    return _whole(text, 1)


def replicates(text: str) -> int:
    """Returns a number of bootstrap replicates from the command line, 0 for none; argparse reports the error."""
    if _whole(text, 0) > MOST_REPLICATES:
        raise argparse.ArgumentTypeError(f"{text} is more than {MOST_REPLICATES:,}")
    return int(text)


def _whole(text, lowest):
    if not text.isascii() or not text.isdigit() or len(text) > 18 or int(text) < lowest:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {lowest}")
    return int(text)


def port(text: str) -> int:
    """Returns a port from the command line; argparse reports the error."""
    if not 1 <= (value := _whole(text, 0)) <= 65535:
        raise argparse.ArgumentTypeError(f"{value} is not in [1, 65535]")
    return value


def device_choice(text: str) -> str:
    """Returns the name of a device from the command line; argparse reports the error."""
    from memo_jax.xla.devices import check_device_name

    try:
        return check_device_name(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def probability(text: str) -> float:
    """Returns a probability from the command line, neither 0 nor 1; argparse reports the error."""
    value = number(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not strictly between 0 and 1, as this probability must be")
    return value


def channel_choice(text: str) -> str | int:
    """Returns a channel from the command line; argparse reports the error."""
    from memo_jax.audio import parse_channel

    try:
        return parse_channel(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def option(*flags: str, **settings: Any) -> argparse.ArgumentParser:
    """Returns a parser with a single option, a parent of the parsers of the commands that have it."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument(*flags, **settings)
    return parser


# Options of several commands: parents of their parsers.
JSON = option("--json", action="store_true", help="print JSON instead of text")
DEVICE = option(
    "--device",
    type=device_choice,
    metavar="NAME",
    help="device to compute on: cpu, gpu or tpu, or a particular one, such as cuda:1 (default: the fastest available)",
)
NETWORK = (
    option(
        "--branch",
        metavar="NAME[,NAME]",
        help="of a workdir: which backbone, or several as one network with their mean score, such as ecapa,resnet "
        "(default: ecapa, or the first); of a file with several networks: one of them (default: all)",
    ),
    option("--role", choices=("teacher", "student"), help="which network of a workdir (default: teacher)"),
    option(
        "--step",
        type=count,
        metavar="N",
        help="which checkpoint of a workdir (default: the latest; 0: the untrained network)",
    ),
)
MODEL = (
    *NETWORK,
    DEVICE,
    JSON,
    option(
        "--model",
        type=Path,
        metavar="MODEL",
        help="workdir of a training run, model file, exported program, or hf:org/name (default: the package's model)",
    ),
)
THRESHOLD = (
    option(
        "--threshold",
        type=cosine,
        metavar="COSINE",
        help="accept scores from this one up (default: the threshold tuned by eval --save-threshold)",
    ),
    option(
        "--prior",
        type=probability,
        default=0.5,
        metavar="P",
        help="prior probability that both recordings are of the same speaker, combined with the score "
        "(default: %(default)s)",
    ),
    option(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="threshold and calibration that eval --save-calibration wrote (default: those in the model)",
    ),
)
REPLICATES_OPTION = option(
    "--replicates",
    type=replicates,
    default=1000,
    metavar="N",
    help="bootstrap replicates for the intervals of EER and minDCF; 0 for none (default: %(default)s)",
)
CHANNEL = option(
    "--channel",
    type=channel_choice,
    default="mean",
    metavar="N|mean",
    help="of recordings with several channels: the mean, or one of them, from 1 (default: %(default)s)",
)
VAD = option(
    "--vad", action="store_true", help="take only what is speech, by Silero's voice activity detection (extra vad)"
)
EMBEDDER = (
    *MODEL,
    CHANNEL,
    VAD,
    option(
        "--runtime",
        choices=RUNTIMES,
        default="auto",
        help="what runs the network (default: auto: onnxruntime where it is installed and there is only a CPU)",
    ),
)
MIN_SECONDS_OPTION = option(
    "--min-seconds",
    type=seconds,
    default=0.5,
    metavar="S",
    help="leave out recordings shorter than this (default: %(default)s)",
)
GALLERY = option(
    "--gallery",
    required=True,
    type=Path,
    metavar="FILE",
    help="FILE.npz or FILE.parquet; identify also reads .npy, .ark and .scp",
)
CONFIG = option(
    "--config",
    required=True,
    metavar="FILE",
    help="Python file with get_config(), or the name of a packaged config, such as small; change keys with "
    "--config.KEY=VALUE",
)
TRIALS = (
    option(
        "--trials",
        required=True,
        type=Path,
        metavar="FILE",
        help="trial list with lines `1 enrol test`, `enrol test target`, `enrol test 1`, or `enrol test` for scores "
        "alone",
    ),
    option(
        "--enrollments",
        type=Path,
        metavar="FILE",
        help="table with lines `speaker recording recording …`: the recordings that enrol each speaker",
    ),
)
CLUSTERING = (
    option(
        "--kmeans",
        type=positive,
        metavar="K1",
        help="make this many groups by k-means (default: none with --clusters; with neither, N/22 of N utterances, "
        "none up to 5,000)",
    ),
    option(
        "--clusters",
        type=positive,
        metavar="K2",
        help="merge groups, or without --kmeans utterances, into this many clusters (default: none with "
        "--kmeans; with neither, N/146)",
    ),
    option(
        "--linkage",
        choices=("ward", "average"),
        default="ward",
        help="linkage criterion for merging clusters (default: %(default)s)",
    ),
    option(
        "--iterations",
        type=positive,
        default=20,
        metavar="N",
        help="number of k-means iterations (default: %(default)s)",
    ),
    option("--seed", type=count, default=0, metavar="N", help="random seed of k-means (default: %(default)s)"),
    option(
        "--crops",
        type=count,
        default=0,
        metavar="R",
        help="embed R crops of each utterance, and take their mean, instead of whole utterances",
    ),
    option("--crop-seconds", type=seconds, metavar="S", help="length of each crop of --crops (default: 4.0)"),
    option(
        "--labels",
        type=Path,
        metavar="FILE",
        help="known speakers, for purity and NMI alone: a dataset, or lines `name speaker` (utt2spk)",
    ),
)
