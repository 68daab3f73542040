"""The command `memo-jax`: parses, calls one function, prints."""

import argparse
import json
import os
import sys
from pathlib import Path

USAGE_ERROR = 2
STOPPED = 3


def main(arguments: list[str] | None = None) -> int:
    """Runs a command line; returns its exit status (0, 2 for bad input, 3 when training stopped on bad numbers)."""
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    overrides = [text for text in rest if text.startswith("--config.")]
    for text in overrides:
        if "=" not in text:
            parser.error(f"{text} has no value: write {text}=VALUE")
    unknown = [text for text in rest if not text.startswith("--config.")]
    if unknown or (overrides and options.command != "train"):
        parser.error(f"unknown argument {(unknown or overrides)[0]!r}: see `memo-jax {options.command} --help`")
    options.overrides = overrides
    try:
        return options.run(options) or 0
    except KeyboardInterrupt:
        print("memo-jax: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError) as error:
        print(f"memo-jax: error: {error_text(error)}", file=sys.stderr)
        return STOPPED if type(error).__name__ == "TrainingStopped" else USAGE_ERROR


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

    prepare = command("prepare", run_prepare, "turn recordings into a dataset, or check one")
    prepare.add_argument("--input", action="append", type=Path, metavar="PATH",
                         help="folder of recordings, zip or tar, Kaldi folder, or shards of wespeaker; may be given "
                              "several times")
    prepare.add_argument("--tfds", action="append", metavar="NAME:SPLIT",
                         help="dataset of TFDS with an Audio feature, such as librispeech:train_clean100")
    prepare.add_argument("--tfds-dir", type=Path, metavar="DIR", help="where TFDS keeps its datasets")
    prepare.add_argument("--output", type=Path, metavar="DATASET", help="where the dataset goes")
    prepare.add_argument("--overwrite", action="store_true", help="replace a dataset that is there")
    prepare.add_argument("--min-seconds", type=float, default=0.5, metavar="S",
                         help="leave out recordings shorter than this (default: %(default)s)")
    prepare.add_argument("--run-commands", action="store_true", help="run the commands in a Kaldi folder's wav.scp")
    prepare.add_argument("--check", type=Path, metavar="DATASET",
                         help="instead: read this dataset again and verify all that is in it")
    prepare.add_argument("--workers", type=int, metavar="N", help="processes (default: one a core)")

    train = command("train", run_train, "train, or go on training, the run of a workdir")
    train.add_argument("--config", required=True, metavar="FILE",
                       help="Python file with get_config(); change keys with --config.KEY=VALUE")
    train.add_argument("--workdir", required=True, type=Path, metavar="DIR", help="for config, metrics, checkpoints")
    train.add_argument("--stop-at-step", type=int, metavar="N", help="stop there with a checkpoint")

    evaluate = command("eval", run_eval, "score a trial list with a trained network")
    evaluate.add_argument("--workdir", required=True, type=Path, metavar="DIR", help="workdir of a training run")
    evaluate.add_argument("--data", required=True, type=Path, metavar="DATASET", help="recordings of the trials")
    evaluate.add_argument("--trials", required=True, type=Path, metavar="FILE", help="`1 a b` or `a b target` lines")
    evaluate.add_argument("--output", required=True, type=Path, metavar="DIR", help="for results.json and det.png")
    evaluate.add_argument("--branch", default="ecapa", help="which backbone (default: %(default)s)")
    evaluate.add_argument("--role", default="teacher", choices=("teacher", "student"), help="default: %(default)s")
    evaluate.add_argument("--step", type=int, metavar="N", help="checkpoint (default: the latest; 0: untrained)")
    evaluate.add_argument("--json", action="store_true", help="print results.json instead of a summary")
    return parser


def run_prepare(options) -> int:
    """memo-jax prepare"""
    if options.check:
        if options.input or options.tfds or options.output:
            raise ValueError("--check DATASET stands alone, without --input and --output")
        from memo_jax.check import check, check_summary

        report = check(options.check, workers=options.workers)
        print(check_summary(options.check, report))
        return USAGE_ERROR if report["problems"] else 0
    inputs = list(options.input or [])
    if options.tfds:
        from memo_jax.tfds_audio import tfds_input

        inputs += [tfds_input(name, options.tfds_dir) for name in options.tfds]
    for name, given in (("input", inputs), ("output", options.output)):
        if not given:
            raise ValueError(f"--{name} is missing: see `memo-jax prepare --help`")
    from memo_jax.prepare import prepare, summary

    report = prepare(
        inputs, options.output, min_seconds=options.min_seconds, workers=options.workers,
        overwrite=options.overwrite, run_commands=options.run_commands,
    )
    print(summary(report))
    return 0


def run_train(options) -> None:
    """memo-jax train"""
    from memo_jax.config import load_config

    config = load_config(options.config, options.overrides)
    keep_compiled_programs()
    keep_freed_memory()
    from memo_jax.train import train

    train(config, options.workdir, stop_at_step=options.stop_at_step)


def run_eval(options) -> None:
    """memo-jax eval"""
    keep_compiled_programs()
    from memo_jax.evaluate import evaluate, summary

    results = evaluate(
        options.workdir, options.data, options.trials, options.output, branch=options.branch, role=options.role,
        step=options.step,
    )
    print(json.dumps(results, indent=2) if options.json else f"{summary(results)}\n{options.output / 'results.json'}\n"
          f"{options.output / 'det.png'}")


def keep_compiled_programs() -> None:
    """Makes XLA keep what it compiles in the user's cache folder, unless JAX_COMPILATION_CACHE_DIR names another."""
    import jax

    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        jax.config.update("jax_compilation_cache_dir", os.path.join(base, "memo_jax", "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def keep_freed_memory() -> None:
    """Makes glibc keep what a step frees for the next one, where a CPU trains.

    XLA allocates a step's temporary memory anew each time. Handed back to the system in between, it costs a page fault
    for every 4 KiB: a fifth of the time of a small step.
    """
    import ctypes

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # only glibc has it
    if mallopt is not None:
        trim_threshold, mmap_max, arena_max = -1, -4, -8  # as malloc.h numbers M_TRIM_THRESHOLD, …
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, -1)
        mallopt(arena_max, 1)  # the arenas of other threads are too small for it, and fall back to the system
