"""The command `memo-jax`: parses, calls one function, prints."""

import argparse
import contextlib
import json
import os
import sys
import traceback
from pathlib import Path

from memo_jax.files import check_local

NO = 1  # the answer is no: another speaker, nobody known, some recordings left out
USAGE_ERROR = 2
STOPPED = 3
TERMINATED = 75  # as sysexits.h numbers what may be tried again
LOST = 76
BUCKET_OPTIONS = {"train": {"workdir"}, "report": {"workdir"}} | dict.fromkeys(
    ("eval", "embed", "verify", "enroll", "identify", "export"), {"model"}
)  # that may be gs://…


def main(arguments: list[str] | None = None) -> int:
    """Runs a command line; returns its exit status.

    0: done (verify: one speaker; identify: somebody known). 1: verify: different speakers, identify: nobody known,
    embed: some recordings were left out. 2: bad input. 3: training stopped because of its numbers. 75: SIGTERM ended
    training, with a checkpoint. 76: another process of the training is lost. 130: interrupted.
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
        check_paths(options)
        return options.run(options) or 0
    except (Exception, KeyboardInterrupt) as error:
        status = reported(error)
        if status is None:
            raise
        return status


def reported(error: BaseException) -> int | None:
    """Says what was wrong and returns the exit status for it, or None for an error that is a fault of the program."""
    kind = type(error).__name__
    if isinstance(error, KeyboardInterrupt):
        print("memo-jax: interrupted", file=sys.stderr)
        return 130
    if kind == "StopRequested":
        print(f"memo-jax: {error}", file=sys.stderr)
        return TERMINATED
    if isinstance(error, (ValueError, OSError, ImportError)):
        print(f"memo-jax: error: {error_text(error)}", file=sys.stderr)
        return STOPPED if kind == "TrainingStopped" else USAGE_ERROR
    return None


def check_paths(options) -> None:
    """Raises ValueError for a URL where a command needs a path of the file system."""
    in_buckets = BUCKET_OPTIONS.get(options.command, ())
    for name, given in vars(options).items():
        for path in given if isinstance(given, list) else [given]:
            if isinstance(path, Path) and name not in in_buckets:
                check_local(path)


def error_text(error: Exception) -> str:
    """Returns what an exception says, without Python's decoration of file errors."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    return str(error) or type(error).__name__


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of all commands; nothing heavy is imported for it."""
    from memo_jax import __version__

    parser = argparse.ArgumentParser(
        prog="memo-jax", description="Speaker verification learned without labels: MeMo in JAX.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"memo-jax {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name, run, description):
        added = commands.add_parser(name, help=description, description=description, allow_abbrev=False)
        added.set_defaults(run=run)
        return added

    def add_json(added):
        added.add_argument("--json", action="store_true", help="print JSON instead of text")

    prepare = command("prepare", run_prepare, "turn recordings into a dataset, or check one")
    prepare.add_argument(
        "--input",
        action="append",
        type=Path,
        metavar="PATH",
        help="folder of recordings, zip or tar, Kaldi folder, or shards of wespeaker; may be given several times",
    )
    prepare.add_argument(
        "--tfds",
        action="append",
        metavar="NAME:SPLIT",
        help="dataset of TFDS with an Audio feature, such as librispeech:train_clean100",
    )
    prepare.add_argument("--tfds-dir", type=Path, metavar="DIR", help="where TFDS keeps its datasets")
    prepare.add_argument("--output", type=Path, metavar="DATASET", help="where the dataset goes")
    prepare.add_argument("--overwrite", action="store_true", help="replace a dataset that is there")
    prepare.add_argument(
        "--min-seconds",
        type=float,
        default=0.5,
        metavar="S",
        help="leave out recordings shorter than this (default: %(default)s)",
    )
    prepare.add_argument("--run-commands", action="store_true", help="run the commands in a Kaldi folder's wav.scp")
    prepare.add_argument(
        "--check", type=Path, metavar="DATASET", help="instead: read this dataset again and verify all that is in it"
    )
    prepare.add_argument("--workers", type=int, metavar="N", help="processes (default: one a core)")

    train = command("train", run_train, "train, or go on training, the run of a workdir")
    train.add_argument(
        "--config",
        required=True,
        metavar="FILE",
        help="Python file with get_config(); change keys with --config.KEY=VALUE",
    )
    train.add_argument(
        "--workdir", required=True, type=Path, metavar="DIR", help="for config, metrics, checkpoints; may be gs://…"
    )
    train.add_argument("--stop-at-step", type=int, metavar="N", help="stop there with a checkpoint")
    train.add_argument(
        "--distributed",
        action="store_true",
        help="together with the other processes of this TPU pod, Slurm, Open MPI or Kubernetes job",
    )
    train.add_argument(
        "--coordinator", metavar="HOST:PORT", help="instead, with the next two: where process 0 listens for the others"
    )
    train.add_argument("--num_processes", "--num-processes", type=int, metavar="N", help="how many processes")
    train.add_argument("--process_id", "--process-id", type=int, metavar="I", help="which one this is, from 0")

    reproduce = command("reproduce", run_reproduce, "make a run again from its config, and compare")
    reproduce.add_argument(
        "workdir",
        type=Path,
        metavar="RUN",
        help="of the run; where its data have moved, say so with --config.data.train=DATASET …",
    )
    reproduce.add_argument("--output", type=Path, metavar="DIR", help="the new workdir (default: RUN-again)")
    add_json(reproduce)

    plan = command("plan", run_plan, "tell what training would need and cost on TPUs or GPUs, without them")
    plan.add_argument(
        "--config", required=True, metavar="FILE", help="as for train; change keys with --config.KEY=VALUE"
    )
    plan.add_argument(
        "--topology",
        required=True,
        metavar="NAME",
        help="TPUs along each axis: v5e:4x4, v6e:4x4, v4:2x2x4, v5p:2x2x4; GPUs of one machine: a100:8, h100:8, "
        "h200:8, b200:8; four machines of eight: h100:4x8",
    )
    plan.add_argument(
        "--utterances", type=int, metavar="N", help="of an epoch (default: those of data.train, or of VoxCeleb2)"
    )
    add_json(plan)

    def choose_network(added):
        added.add_argument("--branch", help="of a workdir: which backbone (default: ecapa, or the only one)")
        added.add_argument("--role", choices=("teacher", "student"), help="of a workdir (default: teacher)")
        added.add_argument(
            "--step", type=int, metavar="N", help="of a workdir: which checkpoint (default: the latest; 0: untrained)"
        )
        add_json(added)

    def add_model(added):
        added.add_argument(
            "--model", required=True, type=Path, metavar="MODEL", help="workdir of a training run, or a model file"
        )
        choose_network(added)

    def add_threshold(added):
        added.add_argument(
            "--threshold",
            type=float,
            metavar="COSINE",
            help="accept from this score on (default: the one tuned by eval --save-threshold)",
        )

    def add_replicates(added):
        added.add_argument(
            "--replicates",
            type=int,
            default=1000,
            metavar="N",
            help="of the bootstrap for the interval of the EER; 0 for none (default: %(default)s)",
        )

    evaluate = command("eval", run_eval, "score a trial list with a trained network")
    evaluate.add_argument(
        "--workdir",
        "--model",
        dest="model",
        required=True,
        type=Path,
        metavar="MODEL",
        help="workdir of a training run, or a model file",
    )
    evaluate.add_argument("--data", required=True, type=Path, metavar="DATASET", help="recordings of the trials")
    evaluate.add_argument("--trials", required=True, type=Path, metavar="FILE", help="`1 a b` or `a b target` lines")
    evaluate.add_argument("--output", required=True, type=Path, metavar="DIR", help="for results.json and det.png")
    choose_network(evaluate)
    evaluate.add_argument(
        "--crops", type=int, default=0, metavar="R", help="score by R crops a recording instead of full recordings"
    )
    evaluate.add_argument("--crop-seconds", type=float, default=4.0, metavar="S", help="default: %(default)s")
    evaluate.add_argument(
        "--save-threshold",
        nargs="?",
        const="eer",
        metavar="CRITERION",
        choices=("eer", "min_dcf_0.01", "min_dcf_0.05"),
        help="keep the threshold that reaches it (default: eer) with the model, for verify, identify",
    )
    add_replicates(evaluate)

    embed = command("embed", run_embed, "turn recordings into embeddings")
    embed.add_argument("input", nargs="+", type=Path, metavar="INPUT", help="files, folders or datasets of recordings")
    add_model(embed)
    embed.add_argument("--output", required=True, type=Path, metavar="FILE", help="FILE.npz or FILE.parquet")
    embed.add_argument(
        "--min-seconds",
        type=float,
        default=0.5,
        metavar="S",
        help="leave out recordings shorter than this (default: %(default)s)",
    )

    verify = command("verify", run_verify, "tell whether two recordings are of one speaker")
    verify.add_argument("recordings", nargs=2, type=Path, metavar="RECORDING")
    add_model(verify)
    add_threshold(verify)

    enroll = command("enroll", run_enroll, "add a person to a gallery")
    enroll.add_argument("name", metavar="NAME")
    enroll.add_argument("recordings", nargs="+", type=Path, metavar="RECORDING")
    add_model(enroll)
    identify = command("identify", run_identify, "tell who of a gallery speaks in a recording")
    identify.add_argument("recording", type=Path, metavar="RECORDING")
    add_model(identify)
    add_threshold(identify)
    for added in (enroll, identify):
        added.add_argument("--gallery", required=True, type=Path, metavar="FILE", help="FILE.npz or FILE.parquet")

    report = command("report", run_report, "write one HTML page about a training run")
    report.add_argument("workdir", type=Path, metavar="WORKDIR", help="of a training run")
    report.add_argument("--output", type=Path, metavar="FILE", help="the page (default: WORKDIR/report.html)")
    report.add_argument("--data", type=Path, metavar="DATASET", help="to test on (default: the run's evaluation.data)")
    report.add_argument("--trials", type=Path, metavar="FILE", help="of it (default: the run's evaluation.trials)")
    report.add_argument("--step", type=int, metavar="N", help="checkpoint to test (default: the latest)")

    export = command("export", run_export, "write a network to files for use elsewhere")
    add_model(export)
    export.add_argument(
        "--output",
        nargs="+",
        required=True,
        type=Path,
        metavar="FILE",
        help="name.safetensors: a model file; name.zip: a program that JAX alone runs",
    )

    score = command("score", run_score, "score a trial list by embeddings")
    score.add_argument(
        "--embeddings",
        action="append",
        required=True,
        type=Path,
        metavar="FILE",
        help="npz with `names` and `embeddings` [N, D]; given several times, scores are averaged",
    )
    score.add_argument("--trials", required=True, type=Path, metavar="FILE", help="`1 a b` or `a b target` lines")
    score.add_argument(
        "--cohort",
        action="append",
        default=[],
        type=Path,
        metavar="FILE",
        help="embeddings of other recordings, one for each --embeddings",
    )
    score.add_argument("--mean-subtraction", action="store_true", help="subtract the cohort's mean")
    score.add_argument("--as-norm", type=int, default=0, metavar="N", help="normalise by the N nearest of the cohort")
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
        help="`name speaker` lines for the interval (default: a name's first folder)",
    )
    score.add_argument("--scores", type=Path, metavar="FILE", help="write `score enrol test` lines there")
    add_replicates(score)
    add_json(score)

    convert = command("convert", run_convert, "turn PyTorch weights into a model file, or back")
    convert.add_argument(
        "input",
        type=Path,
        metavar="INPUT",
        help="safetensors or a PyTorch checkpoint; with --to a model file or a workdir",
    )
    convert.add_argument(
        "--output",
        required=True,
        type=Path,
        metavar="FILE",
        help="model file; with --to FILE.safetensors, or .pt, .pth, .ckpt, .bin, which need torch",
    )
    kinds = ("speechbrain", "wespeaker", "3dspeaker", "speaker-net")
    convert.add_argument("--kind", choices=kinds, help="the toolkit of INPUT (default: by the parameters' names)")
    convert.add_argument(
        "--part",
        metavar="NAME",
        help="which network of a checkpoint of several (default: teacher_ecapa, or the only one)",
    )
    convert.add_argument("--to", choices=kinds, help="write the network by the names of this toolkit")
    convert.add_argument("--branch", help="of a workdir: which backbone (default: ecapa, or the only one)")
    convert.add_argument("--role", choices=("teacher", "student"), help="of a workdir (default: teacher)")
    convert.add_argument("--step", type=int, metavar="N", help="of a workdir: which checkpoint (default: the latest)")
    return parser


def run_prepare(options) -> int:
    """memo-jax prepare"""
    if options.check:
        if options.input or options.tfds or options.output:
            raise ValueError("--check DATASET stands alone, without --input and --output")
        from memo_jax.data.check import check, check_summary

        report = check(options.check, workers=options.workers)
        print(check_summary(options.check, report))
        return USAGE_ERROR if report["problems"] else 0
    inputs = list(options.input or [])
    if options.tfds:
        from memo_jax.data.tfds_audio import tfds_input

        inputs += [tfds_input(name, options.tfds_dir) for name in options.tfds]
    for name, given in (("input", inputs), ("output", options.output)):
        if not given:
            raise ValueError(f"--{name} is missing: see `memo-jax prepare --help`")
    from memo_jax.data.prepare import prepare, summary

    report = prepare(
        inputs,
        options.output,
        min_seconds=options.min_seconds,
        workers=options.workers,
        overwrite=options.overwrite,
        run_commands=options.run_commands,
    )
    print(summary(report))
    return 0


def run_train(options) -> None:
    """memo-jax train"""
    from memo_jax.config import load_config

    config = load_config(options.config, options.overrides)
    keep_compiled_programs()
    keep_freed_memory()
    place = {name: getattr(options, name) for name in ("coordinator", "num_processes", "process_id")}
    with joined(**place) if options.distributed or set(place.values()) != {None} else contextlib.nullcontext():
        from memo_jax.training.train import train

        train(config, options.workdir, stop_at_step=options.stop_at_step)


@contextlib.contextmanager
def joined(**place):
    """Within it, this process trains with others; an error ends it and so, soon, the others."""
    from memo_jax.training import processes

    processes.join(**place)
    try:
        yield
    except processes.StopRequested:  # in all of them
        processes.leave()
        raise
    except BaseException as error:
        if processes.is_of_lost_process(error):
            print(
                "memo-jax: error: another process is lost, so this one ends, too; start the same command again in "
                f"all to go on from the last checkpoint ({str(error).splitlines()[0]})",
                file=sys.stderr,
            )
            status = LOST
        else:
            status = reported(error)
        if status is None:
            traceback.print_exception(error)
        processes.leave_at_once(1 if status is None else status)
    processes.leave()


def run_reproduce(options) -> int:
    """memo-jax reproduce"""
    keep_compiled_programs()
    keep_freed_memory()
    from memo_jax.reproduce import reproduce, summary

    workdir = options.workdir.resolve()
    output = options.output or workdir.with_name(f"{workdir.name}-again")
    found = reproduce(options.workdir, output, options.overrides)
    print(json.dumps(found, indent=2) if options.json else summary(options.workdir, found))
    return 0 if found["identical"] else NO


def run_plan(options) -> int:
    """memo-jax plan"""
    from memo_jax.config import load_config

    config = load_config(options.config, options.overrides)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # what is planned for is not here
    from memo_jax.planning.plan import plan, plan_text

    result = plan(config, options.topology, options.utterances)
    print(json.dumps(result, indent=2) if options.json else plan_text(result))
    return 0 if result["fits"] else NO


def run_eval(options) -> None:
    """memo-jax eval"""
    keep_compiled_programs()
    keep_freed_memory()
    from memo_jax.inference.evaluate import evaluate, summary

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
        save_threshold=options.save_threshold,
        replicates=options.replicates,
    )
    print(
        json.dumps(results, indent=2)
        if options.json
        else f"{summary(results)}\n{options.output / 'results.json'}\n{options.output / 'det.png'}"
    )


def load_embedder(options, gallery=None):
    """Returns the Embedder that the options of a command choose."""
    keep_compiled_programs()
    keep_freed_memory()
    from memo_jax.inference.embedder import Embedder

    return Embedder.load(options.model, branch=options.branch, role=options.role, step=options.step, gallery=gallery)


def run_convert(options) -> None:
    """memo-jax convert"""
    of_workdir = {name: getattr(options, name) for name in ("branch", "role", "step")}
    wrong = [name for name in ("kind", "part") if options.to and getattr(options, name) is not None]
    wrong += [name for name, value in of_workdir.items() if not options.to and value is not None]
    if wrong:
        raise ValueError(f"--{wrong[0]} is for conversion {'from' if options.to else 'to'} PyTorch")
    from memo_jax.inference import convert

    if options.to:
        print(convert.convert_back(options.input, options.output, options.to, **of_workdir))
    else:
        print(convert.convert(options.input, options.output, options.kind, options.part))


def run_embed(options) -> int:
    """memo-jax embed"""
    embedder = load_embedder(options)
    from memo_jax.inference.embed_recordings import embed_recordings, summary

    report = embed_recordings(embedder, options.input, options.output, min_seconds=options.min_seconds)
    print(json.dumps(report, indent=2, ensure_ascii=False) if options.json else summary(report))
    return NO if report["left_out"] else 0


def run_verify(options) -> int:
    """memo-jax verify"""
    embedder = load_embedder(options)
    result = embedder.verify(*options.recordings, threshold=options.threshold)
    source = embedder.threshold_source if options.threshold is None else "given"
    if options.json:
        print(json.dumps(result._asdict() | {"threshold_source": source, "model": embedder.fingerprint}, indent=2))
    else:
        print(
            f"{'one speaker' if result.decision else 'different speakers'}: score {result.score:.4f}, accepted from "
            f"{result.threshold:.4f} on ({source})"
        )
    return 0 if result.decision else NO


def run_enroll(options) -> None:
    """memo-jax enroll"""
    embedder = load_embedder(options, options.gallery)
    embedder.enroll(options.name, options.recordings)
    names = embedder.gallery.names
    print(
        json.dumps({"enrolled": options.name, "people": names}, indent=2, ensure_ascii=False)
        if options.json
        else f"{options.name} is enrolled; {len(names)} in {options.gallery}"
    )


def run_identify(options) -> int:
    """memo-jax identify"""
    if not options.gallery.exists():
        raise FileNotFoundError(f"{options.gallery}: no such gallery: enrol people with memo-jax enroll")
    embedder = load_embedder(options, options.gallery)
    result = embedder.identify(options.recording, threshold=options.threshold)
    source = embedder.threshold_source if options.threshold is None else "given"
    if options.json:
        print(json.dumps(result._asdict() | {"threshold_source": source}, indent=2, ensure_ascii=False))
    else:
        print(
            f"{result.name or 'nobody known'}: nearest {result.nearest}, score {result.score:.4f}, accepted from "
            f"{result.threshold:.4f} on ({source})"
        )
    return NO if result.name is None else 0


def run_report(options) -> None:
    """memo-jax report"""
    keep_compiled_programs()
    from memo_jax.report.page import write_report

    print(write_report(options.workdir, options.output, data=options.data, trials=options.trials, step=options.step))


def run_export(options) -> None:
    """memo-jax export"""
    from memo_jax.inference.embedder import load_model
    from memo_jax.inference.export import export

    model = load_model(options.model, branch=options.branch, role=options.role, step=options.step)
    paths = [str(path) for path in export(model, options.output)]
    print(json.dumps({"files": paths, "model": model.fingerprint}, indent=2) if options.json else "\n".join(paths))


def run_score(options) -> None:
    """memo-jax score"""
    from memo_jax.scoring.score import score, summary

    results = score(
        options.embeddings,
        options.trials,
        cohorts=options.cohort,
        mean_subtraction=options.mean_subtraction,
        as_norm=options.as_norm,
        calibration_trials=options.calibrate,
        compare=options.compare,
        speakers=options.speakers,
        replicates=options.replicates,
        scores_file=options.scores,
    )
    print(json.dumps(results, indent=2) if options.json else summary(results))


def keep_compiled_programs() -> None:
    """Makes XLA keep what it compiles in the user's cache folder, unless JAX_COMPILATION_CACHE_DIR names another."""
    import jax

    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        jax.config.update("jax_compilation_cache_dir", os.path.join(base, "memo_jax", "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def keep_freed_memory() -> None:
    """Makes glibc keep what a step or a batch frees for the next one, where a CPU trains or embeds.

    XLA allocates temporary memory anew each time. Handed back to the system in between, it costs a page fault for every
    4 KiB: up to a fifth of the time of a small step.
    """
    import ctypes

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # only glibc has it
    if mallopt is not None:
        trim_threshold, mmap_max = -1, -4  # as malloc.h numbers M_TRIM_THRESHOLD, …
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, -1)
        # Not one arena for all threads: compiling in many waits for it, and steps after that take half as long again.
