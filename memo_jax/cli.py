"""The command `memo-jax`: parses the command line, calls one function, prints the result."""

import argparse
import contextlib
import json
import os
import sys
import traceback
from pathlib import Path

from memo_jax import interrupts
from memo_jax.files import check_local, check_writable, one_line

NO = 1  # the answer is no: different speakers, nobody known, some recordings left out
BAD_INPUT = 2
LOST = 76  # another process of a distributed run has died
BUCKET_OPTIONS = {"train": {"workdir"}, "report": {"workdir"}} | dict.fromkeys(
    ("eval", "embed", "verify", "enroll", "identify", "export"), {"model"}
)  # these may be gs://…
# As interop.KINDS and features.FRONT_ENDS, which are slow to import.
TOOLKITS = ("speechbrain", "wespeaker", "3dspeaker", "speaker-net")
FRONT_END_NAMES = ("log_mel", "kaldi_fbank", "wespeaker_fbank", "sherpa_fbank", "speechbrain_fbank")


def main(arguments: list[str] | None = None) -> int:
    """Runs a command line and returns its exit status.

    0: done (verify: same speaker; identify: somebody known). 1: the answer is no (verify: different speakers; identify:
    nobody known; reproduce: not identical; plan: does not fit), or embed left recordings out. 2: bad input. 3: training
    stopped because of its own numbers. 75: SIGTERM ended training after a checkpoint. 76: another process of a
    distributed run was lost. 130: interrupted by Ctrl-C. An exception's `exit_status` overrides 2.
    """
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    overrides = [text for text in rest if text.startswith("--config.")]
    for text in overrides:
        if "=" not in text:
            parser.error(f"{text} has no value: write {text}=VALUE")
    unknown = [text for text in rest if not text.startswith("--config.")]
    if unknown or (overrides and options.command not in ("train", "plan", "reproduce")):
        parser.error(f"unknown argument {(unknown or overrides)[0]!r}: see `memo-jax {options.command} --help`")
    options.overrides = overrides
    try:
        with interrupts.handled():
            check_paths(options)
            return options.run(options) or 0
    except (Exception, KeyboardInterrupt) as error:
        if arguments is None and interrupts.requested():
            interrupts.end()  # a process of its own, which need not wait for threads that compile
        status = report_error(error)
        if status is None:
            raise
        return status


def report_error(error: BaseException) -> int | None:
    """Prints one line about an error and returns its exit status; None for a bug, which keeps its traceback."""
    if isinstance(error, KeyboardInterrupt) or interrupts.requested():
        print("memo-jax: interrupted", file=sys.stderr)
        return interrupts.INTERRUPTED
    status = getattr(error, "exit_status", None)
    if isinstance(error, (ValueError, OSError, ImportError)):
        print(f"memo-jax: error: {one_line(error, longest=None)}", file=sys.stderr)
        return BAD_INPUT if status is None else status
    if status is not None:
        print(f"memo-jax: {one_line(error, longest=None)}", file=sys.stderr)
    return status


def check_paths(options: argparse.Namespace) -> None:
    """Raises ValueError for a URL given to an option that needs a path of the file system."""
    in_buckets = BUCKET_OPTIONS.get(options.command, ())
    for name, given in vars(options).items():
        for path in given if isinstance(given, list) else [given]:
            if isinstance(path, Path) and name not in in_buckets:
                check_local(path)


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of all commands; imports nothing heavy."""
    from memo_jax import __version__

    parser = argparse.ArgumentParser(
        prog="memo-jax", description="Self-supervised speaker verification: MeMo in JAX.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"memo-jax {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name, run, description, *parents):
        added = commands.add_parser(
            name, help=description, description=description, parents=parents, allow_abbrev=False
        )
        added.set_defaults(run=run)
        return added

    # Options that several commands share.
    def shared(*parents):
        return argparse.ArgumentParser(add_help=False, parents=parents)

    as_json = shared()
    as_json.add_argument("--json", action="store_true", help="print JSON instead of text")
    network = shared()
    network.add_argument("--branch", help="workdirs only: which backbone (default: ecapa, or the only one)")
    network.add_argument("--role", choices=("teacher", "student"), help="workdirs only (default: teacher)")
    network.add_argument(
        "--step",
        type=int,
        metavar="N",
        help="workdirs only: which checkpoint (default: the latest; 0: the untrained network)",
    )
    model = shared(network, as_json)
    model.add_argument(
        "--model",
        type=Path,
        metavar="MODEL",
        help="workdir of a training run, model file, exported program, or hf:org/name (default: the package's model)",
    )
    threshold = shared()
    threshold.add_argument(
        "--threshold",
        type=cosine,
        metavar="COSINE",
        help="accept scores from this one up (default: the threshold tuned by eval --save-threshold)",
    )
    replicates = shared()
    replicates.add_argument(
        "--replicates",
        type=int,
        default=1000,
        metavar="N",
        help="bootstrap replicates for the interval of the EER; 0 for no interval (default: %(default)s)",
    )
    channel = shared()
    channel.add_argument(
        "--channel",
        type=channel_choice,
        default="mean",
        metavar="N|mean",
        help="of recordings with several channels: the mean, or one of them, from 1 (default: %(default)s)",
    )
    min_seconds = shared()
    min_seconds.add_argument(
        "--min-seconds",
        type=float,
        default=0.5,
        metavar="S",
        help="leave out recordings shorter than this (default: %(default)s)",
    )
    gallery = shared()
    gallery.add_argument("--gallery", required=True, type=Path, metavar="FILE", help="FILE.npz or FILE.parquet")
    config = shared()
    config.add_argument(
        "--config",
        required=True,
        metavar="FILE",
        help="Python file with get_config(); change keys with --config.KEY=VALUE",
    )
    trials = shared()
    trials.add_argument(
        "--trials",
        required=True,
        type=Path,
        metavar="FILE",
        help="lines `1 enrol test`, `enrol test target`, `enrol test 1`, or `enrol test` for scores alone",
    )
    trials.add_argument(
        "--enrollments",
        type=Path,
        metavar="FILE",
        help="lines `speaker recording recording …`: who the enrol sides are",
    )

    prepare = command(
        "prepare", run_prepare, "turn recordings into a dataset, or check a dataset", min_seconds, channel
    )
    prepare.add_argument(
        "--input",
        action="append",
        type=Path,
        metavar="PATH",
        help="folder of recordings, zip or tar, Kaldi folder, or wespeaker shards; may be given several times",
    )
    prepare.add_argument(
        "--tfds",
        action="append",
        metavar="NAME:SPLIT",
        help="TFDS dataset with an Audio feature, such as librispeech:train_clean100",
    )
    prepare.add_argument("--tfds-dir", type=Path, metavar="DIR", help="where TFDS keeps its datasets")
    prepare.add_argument("--output", type=Path, metavar="DATASET", help="where the dataset goes")
    prepare.add_argument("--overwrite", action="store_true", help="replace an existing dataset")
    prepare.add_argument("--run-commands", action="store_true", help="run the commands in a Kaldi folder's wav.scp")
    prepare.add_argument(
        "--check", type=Path, metavar="DATASET", help="instead: read all of this dataset and verify its contents"
    )
    prepare.add_argument("--workers", type=int, metavar="N", help="processes (default: one per core)")

    train = command("train", run_train, "train a new run, or resume the run in a workdir", config)
    train.add_argument(
        "--workdir", required=True, type=Path, metavar="DIR", help="for config, metrics, checkpoints; may be gs://…"
    )
    train.add_argument("--stop-at-step", type=int, metavar="N", help="stop there with a checkpoint")
    train.add_argument(
        "--distributed",
        action="store_true",
        help="join the other processes of this TPU pod, Slurm, Open MPI or Kubernetes job",
    )
    train.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        help="instead, with the next two: the address on which process 0 listens for the others",
    )
    train.add_argument("--num_processes", "--num-processes", type=int, metavar="N", help="number of processes")
    train.add_argument("--process_id", "--process-id", type=int, metavar="I", help="number of this process, from 0")

    reproduce = command("reproduce", run_reproduce, "repeat a run from its config and compare the two", as_json)
    reproduce.add_argument(
        "workdir",
        type=Path,
        metavar="RUN",
        help="workdir of the run; if its data have moved, add --config.data.train=DATASET …",
    )
    reproduce.add_argument("--output", type=Path, metavar="DIR", help="the new workdir (default: RUN-again)")

    plan = command(
        "plan", run_plan, "tell what training would cost on TPUs or GPUs, without having them", config, as_json
    )
    plan.add_argument(
        "--topology",
        required=True,
        metavar="NAME",
        help="TPUs along each axis: v5e:4x4, v6e:4x4, v4:2x2x4, v5p:2x2x4; GPUs of one machine: a100:8, h100:8, "
        "h200:8, b200:8; four machines of eight: h100:4x8",
    )
    plan.add_argument(
        "--utterances",
        type=int,
        metavar="N",
        help="utterances in an epoch (default: those of data.train, or of VoxCeleb2)",
    )

    evaluate = command(
        "eval", run_eval, "score a trial list with a trained network", network, as_json, trials, replicates
    )
    evaluate.add_argument(
        "--workdir",
        "--model",
        dest="model",
        required=True,
        type=Path,
        metavar="MODEL",
        help="workdir of a training run, model file, or exported program",
    )
    evaluate.add_argument("--data", required=True, type=Path, metavar="DATASET", help="recordings of the trials")
    evaluate.add_argument("--output", required=True, type=Path, metavar="DIR", help="for results.json and det.png")
    evaluate.add_argument(
        "--crops", type=int, default=0, metavar="R", help="score R crops of each recording instead of full recordings"
    )
    evaluate.add_argument("--crop-seconds", type=float, default=4.0, metavar="S", help="default: %(default)s")
    evaluate.add_argument(
        "--save-threshold",
        nargs="?",
        const="eer",
        metavar="CRITERION",
        choices=("eer", "min_dcf_0.01", "min_dcf_0.05"),
        help="save the threshold at this criterion (default: eer) with the model, for verify and identify",
    )

    embed = command("embed", run_embed, "turn recordings into embeddings", model, min_seconds, channel)
    embed.add_argument("input", nargs="+", type=Path, metavar="INPUT", help="files, folders or datasets of recordings")
    embed.add_argument("--output", required=True, type=Path, metavar="FILE", help="FILE.npz or FILE.parquet")

    verify = command(
        "verify", run_verify, "tell whether two recordings are of the same speaker", model, threshold, channel
    )
    verify.add_argument("recordings", nargs=2, type=Path, metavar="RECORDING")

    enroll = command("enroll", run_enroll, "add a person to a gallery", model, gallery, channel)
    enroll.add_argument("name", metavar="NAME")
    enroll.add_argument("recordings", nargs="+", type=Path, metavar="RECORDING")

    remove = command("remove", run_remove, "remove a person from a gallery", gallery, as_json)
    remove.add_argument("name", metavar="NAME")

    identify = command(
        "identify", run_identify, "tell who in a gallery speaks in a recording", model, threshold, gallery, channel
    )
    identify.add_argument("recording", type=Path, metavar="RECORDING")

    report = command("report", run_report, "write an HTML page about a training run")
    report.add_argument("workdir", type=Path, metavar="WORKDIR", help="of a training run")
    report.add_argument("--output", type=Path, metavar="FILE", help="the page (default: WORKDIR/report.html)")
    report.add_argument("--data", type=Path, metavar="DATASET", help="to test on (default: the run's evaluation.data)")
    report.add_argument(
        "--trials", type=Path, metavar="FILE", help="trial list to test with (default: the run's evaluation.trials)"
    )
    report.add_argument("--step", type=int, metavar="N", help="checkpoint to test (default: the latest)")

    export = command("export", run_export, "write a network to files for use elsewhere", model)
    export.add_argument(
        "--output",
        nargs="+",
        required=True,
        type=Path,
        metavar="FILE",
        help="name.safetensors: a model file; name.zip: a program that runs with JAX alone; name.onnx: an ONNX file",
    )
    export.add_argument(
        "--onnx-input",
        choices=("waveform", "feats"),
        default="waveform",
        help="of an ONNX file: waveforms at 16 kHz, or features of the model's front end (default: %(default)s)",
    )
    export.add_argument(
        "--weights",
        choices=("float32", "float16", "int8"),
        default="float32",
        help="of a model file or ONNX file: as they are, half the size, or (ONNX) quantised (default: %(default)s)",
    )
    export.add_argument(
        "--onnx-runtime",
        choices=("sherpa-onnx", "wespeaker"),
        help="write features and metadata as this runtime expects them",
    )
    export.add_argument(
        "--other-front-end",
        action="store_true",
        help="let that runtime compute other features than the model was trained with; prints what that costs",
    )

    push = command("push", run_push, "upload a model to the Hugging Face Hub", network)
    push.add_argument("model", type=Path, metavar="MODEL", help="workdir of a training run, or model file")
    push.add_argument("repository", metavar="ORG/NAME", help="made where it is missing")
    push.add_argument("--results", type=Path, action="append", default=[], metavar="FILE", help="results.json of eval")
    push.add_argument("--license", default="apache-2.0", metavar="NAME", help="default: %(default)s")
    push.add_argument("--dataset", action="append", default=[], metavar="NAME", help="that it was trained on")
    push.add_argument("--private", action="store_true", help="make a new repository private")
    push.add_argument("--no-onnx", action="store_true", help="upload no ONNX file")

    score = command("score", run_score, "score a trial list with embeddings", trials, replicates, as_json)
    score.add_argument(
        "--embeddings",
        action="append",
        required=True,
        type=Path,
        metavar="FILE",
        help="npz with `names` and `embeddings` [N, D]; given several times, scores are averaged",
    )
    score.add_argument(
        "--cohort",
        action="append",
        default=[],
        type=Path,
        metavar="FILE",
        help="embeddings of other recordings, one file for each --embeddings",
    )
    score.add_argument("--mean-subtraction", action="store_true", help="subtract the cohort's mean")
    score.add_argument(
        "--as-norm", type=int, default=0, metavar="N", help="normalise by the N nearest utterances of the cohort"
    )
    score.add_argument(
        "--calibrate", type=Path, metavar="TRIALS", help="calibrate on these trials, and report actDCF and Cllr"
    )
    score.add_argument(
        "--compare",
        action="append",
        default=[],
        type=Path,
        metavar="FILE",
        help="embeddings of another system: is the first better?",
    )
    score.add_argument(
        "--speakers",
        type=Path,
        metavar="FILE",
        help="lines `name speaker`, for the interval (default: the first folder of a name)",
    )
    score.add_argument("--scores", type=Path, metavar="FILE", help="write lines `score enrol test` to this file")

    convert = command("convert", run_convert, "turn PyTorch weights into a model file, or back", network)
    convert.add_argument(
        "input",
        type=Path,
        metavar="INPUT",
        help="safetensors or a PyTorch checkpoint; with --to, a model file or a workdir",
    )
    convert.add_argument(
        "--output",
        required=True,
        type=Path,
        metavar="FILE",
        help="model file; with --to, FILE.safetensors, or .pt, .pth, .ckpt, .bin, which need torch",
    )
    convert.add_argument(
        "--kind", choices=TOOLKITS, help="the toolkit that INPUT is from (default: recognised by parameter names)"
    )
    convert.add_argument(
        "--part",
        metavar="NAME",
        help="which network of a checkpoint that holds several (default: teacher_ecapa, or the only one)",
    )
    convert.add_argument(
        "--front-end",
        choices=FRONT_END_NAMES,
        help="what the weights take as input (default: what convert --to noted in INPUT, or what the toolkit computes)",
    )
    convert.add_argument("--to", choices=TOOLKITS, help="write the network with the names of this toolkit")
    return parser


def cosine(text: str) -> float:
    """Returns a cosine score of the command line; argparse reports the error."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not -1 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not in [-1, 1], as cosines are")
    return value


def channel_choice(text: str) -> str | int:
    """Returns a channel of the command line; argparse reports the error."""
    from memo_jax.audio import parse_channel

    try:
        return parse_channel(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def run_prepare(options) -> int:
    """memo-jax prepare."""
    if options.check:
        if options.input or options.tfds or options.output:
            raise ValueError("--check DATASET stands alone, without --input and --output")
        from memo_jax.data.check import check, check_text

        report = check(options.check, workers=options.workers)
        print(check_text(options.check, report))
        return BAD_INPUT if report["problems"] else 0
    inputs = list(options.input or [])
    if options.tfds:
        from memo_jax.data.tfds_audio import TfdsInput

        inputs += [TfdsInput(name, str(options.tfds_dir or "")) for name in options.tfds]
    for name, given in (("input", inputs), ("output", options.output)):
        if not given:
            raise ValueError(f"--{name} is missing: see `memo-jax prepare --help`")
    from memo_jax.data.prepare import preparation_text, prepare

    report = prepare(
        inputs,
        options.output,
        min_seconds=options.min_seconds,
        channel=options.channel,
        workers=options.workers,
        overwrite=options.overwrite,
        run_commands=options.run_commands,
    )
    print(preparation_text(report))
    return 0


def run_train(options) -> None:
    """memo-jax train."""
    from memo_jax.config import load_config

    config = load_config(options.config, options.overrides)
    keep_compiled_programs()
    keep_freed_memory()
    place = {name: getattr(options, name) for name in ("coordinator", "num_processes", "process_id")}
    with joined(**place) if options.distributed or set(place.values()) != {None} else contextlib.nullcontext():
        from memo_jax.inference.evaluate import training_evaluation
        from memo_jax.inference.workdir import starting_backbones
        from memo_jax.training.train import train

        evaluation, start = training_evaluation(config), starting_backbones(config)
        train(config, options.workdir, evaluation=evaluation, start=start, stop_at_step=options.stop_at_step)


@contextlib.contextmanager
def joined(**place):
    """A context in which this process trains with others; an error ends this process and, soon after, the others."""
    from memo_jax.training import processes

    processes.join(**place)
    try:
        yield
    except processes.StopRequested:  # raised in all of them
        processes.leave()
        raise
    except BaseException as error:
        if processes.is_of_lost_process(error):
            print(
                "memo-jax: error: another process is lost, so this one ends too; start the same command again in "
                f"all of them to resume from the last checkpoint ({one_line(error)})",
                file=sys.stderr,
            )
            status = LOST
        else:
            status = report_error(error)
        if status is None:
            traceback.print_exception(error)
        processes.leave_at_once(1 if status is None else status)
    processes.leave()


def run_reproduce(options) -> int:
    """memo-jax reproduce."""
    keep_compiled_programs()
    keep_freed_memory()
    from memo_jax.reproduce import comparison_text, reproduce

    workdir = options.workdir.resolve()
    output = options.output or workdir.with_name(f"{workdir.name}-again")
    found = reproduce(options.workdir, output, options.overrides)
    print(json.dumps(found, indent=2) if options.json else comparison_text(options.workdir, found))
    return 0 if found["identical"] else NO


def run_plan(options) -> int:
    """memo-jax plan."""
    from memo_jax.config import load_config

    config = load_config(options.config, options.overrides)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the hardware being planned for is not here
    from memo_jax.planning.plan import plan, plan_text

    result = plan(config, options.topology, options.utterances)
    print(json.dumps(result, indent=2) if options.json else plan_text(result))
    return 0 if result["fits"] else NO


def run_eval(options) -> None:
    """memo-jax eval."""
    keep_compiled_programs()
    keep_freed_memory()
    from memo_jax.inference.evaluate import evaluate, evaluation_text

    results = evaluate(
        options.model,
        options.data,
        options.trials,
        options.output,
        branch=options.branch,
        role=options.role,
        step=options.step,
        crops=options.crops,
        crop_seconds=options.crop_seconds,
        enrollments=options.enrollments,
        save_threshold=options.save_threshold,
        replicates=options.replicates,
    )
    if options.json:
        print(json.dumps(results, indent=2))
        return
    written = ("results.json", "det.png") if "eer" in results else ("results.json", "scores.txt")
    print("\n".join([evaluation_text(results), *(str(options.output / name) for name in written)]))


def load_embedder(options, gallery=None):
    """Returns the Embedder that a command's options choose."""
    keep_compiled_programs()
    keep_freed_memory()
    from memo_jax.inference.embedder import Embedder

    return Embedder.load(
        options.model,
        branch=options.branch,
        role=options.role,
        step=options.step,
        gallery=gallery,
        channel=options.channel,
    )


def run_convert(options) -> None:
    """memo-jax convert."""
    of_workdir = {name: getattr(options, name) for name in ("branch", "role", "step")}
    wrong = [name for name in ("kind", "part", "front_end") if options.to and getattr(options, name) is not None]
    wrong += [name for name, value in of_workdir.items() if not options.to and value is not None]
    if wrong:
        direction = "from PyTorch, without --to" if options.to else "to PyTorch, with --to"
        raise ValueError(f"--{wrong[0].replace('_', '-')} is for conversion {direction}")
    from memo_jax.inference import convert

    if options.to:
        print(convert.convert_back(options.input, options.output, options.to, **of_workdir))
    else:
        print(convert.convert(options.input, options.output, options.kind, options.part, options.front_end))


def run_embed(options) -> int:
    """memo-jax embed."""
    from memo_jax.scoring.embedding_file import check_output_name

    check_writable(check_output_name(options.output))
    embedder = load_embedder(options)
    from memo_jax.inference.embed_recordings import embed_recordings, embedding_text

    report = embed_recordings(embedder, options.input, options.output, min_seconds=options.min_seconds)
    print(json.dumps(report, indent=2, ensure_ascii=False) if options.json else embedding_text(report))
    return NO if report["left_out"] else 0


def run_verify(options) -> int:
    """memo-jax verify."""
    embedder = load_embedder(options)
    result = embedder.verify(*options.recordings, threshold=options.threshold)
    source = embedder.threshold_source if options.threshold is None else "given"
    if options.json:
        print(json.dumps(result._asdict() | {"threshold_source": source, "model": embedder.fingerprint}, indent=2))
    else:
        print(
            f"{'same speaker' if result.decision else 'different speakers'}: score {result.score:.4f}, threshold "
            f"{result.threshold:.4f} ({source})"
        )
    return 0 if result.decision else NO


def run_enroll(options) -> None:
    """memo-jax enroll."""
    from memo_jax.scoring.embedding_file import check_output_name

    check_writable(check_output_name(options.gallery))
    embedder = load_embedder(options, options.gallery)
    embedder.enroll(options.name, options.recordings)
    names = embedder.gallery.names
    print(
        json.dumps({"enrolled": options.name, "people": names}, indent=2, ensure_ascii=False)
        if options.json
        else f"{options.name} is enrolled; {len(names)} in {options.gallery}"
    )


def run_remove(options) -> None:
    """memo-jax remove."""
    from memo_jax.inference.gallery import remove_person

    names = remove_person(options.gallery, options.name).names
    print(
        json.dumps({"removed": options.name, "people": names}, indent=2, ensure_ascii=False)
        if options.json
        else f"{options.name} is removed; {len(names)} left in {options.gallery}"
    )


def run_identify(options) -> int:
    """memo-jax identify."""
    if not options.gallery.exists():
        raise FileNotFoundError(f"{options.gallery}: no such gallery: enrol people with memo-jax enroll")
    embedder = load_embedder(options, options.gallery)
    result = embedder.identify(options.recording, threshold=options.threshold)
    source = embedder.threshold_source if options.threshold is None else "given"
    if options.json:
        print(json.dumps(result._asdict() | {"threshold_source": source}, indent=2, ensure_ascii=False))
    else:
        print(
            f"{result.name or 'nobody known'}: nearest {result.nearest}, score {result.score:.4f}, threshold "
            f"{result.threshold:.4f} ({source})"
        )
    return NO if result.name is None else 0


def run_report(options) -> None:
    """memo-jax report."""
    check_writable(options.output or options.workdir / "report.html")
    keep_compiled_programs()
    from memo_jax.report.page import write_report

    print(write_report(options.workdir, options.output, data=options.data, trials=options.trials, step=options.step))


def run_export(options) -> None:
    """memo-jax export."""
    from memo_jax.inference.embedder import load_model
    from memo_jax.inference.export import check_outputs, export

    check_outputs(options.output)
    model = load_model(options.model, branch=options.branch, role=options.role, step=options.step)
    onnx_options = {
        "inputs": "feats" if options.onnx_runtime else options.onnx_input,
        "weights": options.weights,
        "runtime": options.onnx_runtime,
        "other_front_end": options.other_front_end,
    }
    paths = [str(path) for path in export(model, options.output, **onnx_options)]
    print(json.dumps({"files": paths, "model": model.fingerprint}, indent=2) if options.json else "\n".join(paths))


def run_push(options) -> None:
    """memo-jax push."""
    from memo_jax.inference.embedder import load_model
    from memo_jax.inference.hub import push

    model = load_model(options.model, branch=options.branch, role=options.role, step=options.step)
    results = [json.loads(path.read_text("utf-8")) for path in options.results]
    url = push(
        model,
        options.repository,
        results=results,
        license=options.license,
        datasets=options.dataset,
        private=options.private,
        onnx=not options.no_onnx,
    )
    print(url)


def run_score(options) -> None:
    """memo-jax score."""
    from memo_jax.scoring.score import score, score_text

    results = score(
        options.embeddings,
        options.trials,
        cohorts=options.cohort,
        mean_subtraction=options.mean_subtraction,
        as_norm=options.as_norm,
        calibration_trials=options.calibrate,
        compare=options.compare,
        speakers=options.speakers,
        enrollments=options.enrollments,
        replicates=options.replicates,
        scores_file=options.scores,
    )
    print(json.dumps(results, indent=2) if options.json else score_text(results))


def keep_compiled_programs() -> None:
    """Makes XLA cache compiled programs in the user's cache folder, unless JAX_COMPILATION_CACHE_DIR names another."""
    import jax

    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        jax.config.update("jax_compilation_cache_dir", os.path.join(base, "memo_jax", "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def keep_freed_memory() -> None:
    """Makes glibc keep freed memory for the next step or batch instead of returning it to the system.

    XLA on a CPU allocates its temporary memory anew for each call. If that was returned in between, every 4 KiB cost a
    page fault: up to a fifth of the time of a small step.
    """
    import ctypes

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # only glibc has it
    if mallopt is not None:
        trim_threshold, mmap_max = -1, -4  # as malloc.h numbers M_TRIM_THRESHOLD, …
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, -1)
        # Not a single arena: threads that compile would wait for it, and later steps take half as long again.
