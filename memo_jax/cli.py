"""The command `memo-jax`: parses the command line, calls one function, prints the result."""

import argparse
import contextlib
import gc
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memo_jax import interrupts
from memo_jax.files import as_json, as_path, check_bucket, check_local, check_writable, one_line, parse_json
from memo_jax.options import build_parser
from memo_jax.xla.memory import keep_freed_memory
from memo_jax.xla.program_cache import keep_compiled_programs

if TYPE_CHECKING:
    from memo_jax.inference.embedder import Embedder

NO = 1  # the answer is no: different speakers, nobody known, some recordings left out
BAD_INPUT = 2
CRASHED = 70  # an internal error: a bug here or in a library
PROCESS_LOST = 76  # another process of a distributed run has died
FIGURE_SUFFIXES = (".png", ".svg", ".pdf")
BUCKET_OPTIONS = {"train": {"workdir", "init"}, "report": {"workdir"}} | dict.fromkeys(
    ("eval", "embed", "cluster", "verify", "enroll", "identify", "app", "export", "pseudo-label"), {"model"}
)  # these may be gs://…


def main(arguments: list[str] | None = None) -> int:
    """Runs a command line and returns its exit status.

    0: done (verify: same speaker; identify: somebody known). 1: the answer is no (verify: different speakers; identify:
    nobody known; reproduce: not identical; plan: does not fit), or embed left recordings out. 2: bad input. 3: training
    stopped: a value was not finite, or the run collapsed. 70: an internal error (a bug), with its traceback. 75:
    SIGTERM ended training after a checkpoint. 76: another process of a distributed run was lost. 130: interrupted by
    Ctrl-C. An exception's `exit_status` overrides 2.
    """
    if arguments is None:  # a process of its own
        # Tracing makes many objects that live long: looking for cycles every 700 takes a quarter of its time.
        gc.set_threshold(10_000)
    try:
        with interrupts.handled():
            options = parsed(arguments)
            check_paths(options)
            check_overwrites(options)
            with device_of(options):
                return RUN[options.command](options) or 0
    except (Exception, KeyboardInterrupt) as error:
        if arguments is None and interrupts.requested():
            interrupts.end()  # a process of its own, which need not wait for threads that compile
        status = report_error(error)
        if status is None and arguments is None:
            traceback.print_exception(error)
            return CRASHED  # Python's own status, 1, is an answer of verify
        if status is None:
            raise
        return status


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    """Returns the options of a command line, the config's among them as `overrides`; exits for a wrong one."""
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    overrides = [text for text in rest if text.startswith("--config.")]
    for text in overrides:
        if "=" not in text:
            parser.error(f"{text} has no value: write {text}=VALUE")
    unknown = [text for text in rest if not text.startswith("--config.")]
    if unknown or (overrides and options.command not in ("train", "pseudo-label", "plan", "reproduce")):
        parser.error(f"unknown argument {(unknown or overrides)[0]!r}: see `memo-jax {options.command} --help`")
    options.overrides = overrides
    if "crop_seconds" in options and options.crop_seconds is None:
        options.crop_seconds = 4.0
    elif "crop_seconds" in options and not options.crops:
        parser.error("--crop-seconds is the length of crops: add --crops R")
    return options


def device_of(options: argparse.Namespace) -> contextlib.AbstractContextManager[None]:
    """Returns a context in which a command runs on the device that its options name."""
    name = getattr(options, "device", None)
    if name is None:
        return contextlib.nullcontext()
    from memo_jax.xla.devices import on_device

    if getattr(options, "runtime", None) == "onnx" and not name.startswith("cpu"):
        raise ValueError(f"--runtime onnx computes on the CPU: leave it out, or --device {name}")
    if getattr(options, "distributed", False) or getattr(options, "coordinator", None):
        raise ValueError("--device is for a single process: where several train, each has its own devices")
    return on_device(name)


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


def check_overwrites(options: argparse.Namespace) -> None:
    """Raises ValueError if the file to be written is also one to be read, which would be lost."""
    given = vars(options)
    read = [(name, path) for name, value in given.items() for path in (value if isinstance(value, list) else [value])]
    for name in ("output", "scores", "figure", "save_calibration"):
        value = given.get(name)
        for written in value if isinstance(value, list) else [value]:
            if not isinstance(written, Path) or not written.is_file():
                continue
            for other, path in read:
                if other != name and isinstance(path, (str, Path)) and os.path.isfile(path) and written.samefile(path):
                    option = name.replace("_", "-")
                    raise ValueError(f"--{option} {written} is also an input ({other}): choose another name")


def run_prepare(options: argparse.Namespace) -> int:
    """Runs memo-jax prepare."""
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
        vad=options.vad,
        workers=options.workers,
        overwrite=options.overwrite,
        run_commands=options.run_commands,
    )
    print(preparation_text(report))
    return 0


def run_trials(options: argparse.Namespace) -> None:
    """Runs memo-jax trials."""
    check_writable(options.output)
    from memo_jax.data.trial_lists import trials_of, trials_text

    report = trials_of(
        options.input,
        options.output,
        targets=options.targets,
        nontargets=options.nontargets,
        genders=options.same_gender,
        same_session=options.same_session,
        seed=options.seed,
        form=options.form,
    )
    print(as_json(report) if options.json else trials_text(report))


def run_init_config(options: argparse.Namespace) -> None:
    """Runs memo-jax init-config."""
    from memo_jax.config_template import write_config

    print(write_config(options.name, options.output))


def run_train(options: argparse.Namespace) -> None:
    """Runs memo-jax train."""
    from memo_jax.config import load_run_config

    start_from = [] if options.init is None else [f"--config.init={as_path(options.init)}"]
    config = load_run_config(options.config, options.overrides + start_from)
    keep_compiled_programs()
    keep_freed_memory()
    place = {name: getattr(options, name) for name in ("coordinator", "num_processes", "process_id")}
    with joined(**place) if options.distributed or set(place.values()) != {None} else contextlib.nullcontext():
        from memo_jax.inference.evaluate import training_evaluation
        from memo_jax.inference.workdir import starting_parts
        from memo_jax.training.profile import profiled_steps
        from memo_jax.training.saved_checkpoint import saved_steps
        from memo_jax.training.train import train

        check_bucket(as_path(options.workdir))
        resumes = bool(saved_steps(options.workdir))  # then the networks that it began with are not needed
        train(
            config,
            options.workdir,
            evaluation=training_evaluation(config),
            start=None if resumes else starting_parts(config),
            stop_at_step=options.stop_at_step,
            profile=options.profile and profiled_steps(options.profile),
        )


@contextlib.contextmanager
def joined(**place: Any) -> Iterator[None]:
    """Makes this process train with others for a block; an error ends this process and, soon after, the others."""
    from memo_jax.training import processes

    processes.join(**place)
    try:
        yield
    except processes.StopRequested:  # raised in all of them
        processes.leave()
        raise
    except BaseException as error:
        if processes.means_lost_process(error):
            print(
                "memo-jax: error: another process is lost, so this one ends too; start the same command again in "
                f"all of them to resume from the last checkpoint ({one_line(error)})",
                file=sys.stderr,
            )
            status = PROCESS_LOST
        else:
            status = report_error(error)
        if status is None:
            traceback.print_exception(error)
        processes.leave_at_once(CRASHED if status is None else status)
    processes.leave()


def run_pseudo_label(options: argparse.Namespace) -> None:
    """Runs memo-jax pseudo-label."""
    from memo_jax.config import load_run_config

    config = load_run_config(options.config, options.overrides)
    keep_compiled_programs()
    keep_freed_memory()
    from memo_jax.pseudo_label import pseudo_label, rounds_text

    chosen = ("kmeans", "clusters", "linkage", "iterations", "seed", "crops", "crop_seconds", "labels", "from_scratch")
    result = pseudo_label(
        config, options.workdir, options.model, options.rounds, **{name: getattr(options, name) for name in chosen}
    )
    print(as_json(result) if options.json else rounds_text(result))


def run_reproduce(options: argparse.Namespace) -> int:
    """Runs memo-jax reproduce."""
    keep_compiled_programs()
    keep_freed_memory()
    from memo_jax.reproduce import comparison_text, reproduce

    workdir = options.workdir.resolve()
    output = options.output or workdir.with_name(f"{workdir.name}-again")
    found = reproduce(options.workdir, output, options.overrides)
    print(as_json(found) if options.json else comparison_text(options.workdir, found))
    return 0 if found["identical"] else NO


def run_plan(options: argparse.Namespace) -> int:
    """Runs memo-jax plan."""
    from memo_jax.config import load_run_config

    config = load_run_config(options.config, options.overrides)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the hardware being planned for is not here
    from memo_jax.planning.plan import plan, plan_text

    result = plan(config, options.topology, options.utterances)
    print(as_json(result) if options.json else plan_text(result))
    return 0 if result["fits"] else NO


def run_eval(options: argparse.Namespace) -> None:
    """Runs memo-jax eval."""
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
        save_calibration=options.save_calibration,
        replicates=options.replicates,
    )
    if options.json:
        print(as_json(results))
        return
    written = ("results.json", "det.png") if "eer" in results else ("results.json", "scores.txt")
    print("\n".join([evaluation_text(results), *(str(options.output / name) for name in written)]))


def load_embedder(options: argparse.Namespace, gallery: str | os.PathLike | None = None) -> "Embedder":
    """Returns the Embedder that a command's options choose."""
    from memo_jax.inference.embedder import Embedder
    from memo_jax.inference.runtime import chosen_runtime

    if chosen_runtime(options.runtime) == "jax":
        keep_compiled_programs()
    keep_freed_memory()

    return Embedder.load(
        options.model,
        branch=options.branch,
        role=options.role,
        step=options.step,
        gallery=gallery,
        channel=options.channel,
        calibration=getattr(options, "calibration", None),
        runtime=options.runtime,
        vad=options.vad,
    )


def decided(options: argparse.Namespace, embedder: "Embedder", score: float) -> tuple[str, dict]:
    """Returns where a decision's threshold is from and what the score's probability is: for people, and as JSON."""
    source = embedder.threshold_source if options.threshold is None else "given"
    probability = embedder.probability(score, options.prior)
    fields = {"threshold_source": source, "probability": probability, "prior": options.prior}
    fields["calibration_source"] = None if embedder.decision is None else embedder.decision.source
    if probability is None:
        return f"({source})", fields
    trials = "the same trials" if source == fields["calibration_source"] else fields["calibration_source"]
    likely = f"{100 * probability:.1f} %"
    if not 0.001 <= probability <= 0.999:
        likely = "over 99.9 %" if probability > 0.5 else "below 0.1 %"
    text = f"probability of the same person {likely} (prior {options.prior:g}; calibrated by {trials})"
    return f"({source})\n  {text}", fields


def run_convert(options: argparse.Namespace) -> None:
    """Runs memo-jax convert."""
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


def run_embed(options: argparse.Namespace) -> int:
    """Runs memo-jax embed."""
    from memo_jax.inference.embedder import MIN_SECONDS
    from memo_jax.scoring.embedding_file import check_output_name

    check_writable(check_output_name(options.output))
    if options.min_seconds < MIN_SECONDS:
        if options.runtime == "onnx":
            raise ValueError(
                f"--min-seconds below {MIN_SECONDS} needs --runtime jax: ONNX graphs are not tested on less"
            )
        options.runtime = "jax"
    embedder = load_embedder(options)
    from memo_jax.inference.embed_recordings import embed_recordings, embedding_text

    report = embed_recordings(
        embedder, options.input, options.output, min_seconds=options.min_seconds, window=options.window, hop=options.hop
    )
    print(as_json(report) if options.json else embedding_text(report))
    return NO if report["left_out"] else 0


def run_cluster(options: argparse.Namespace) -> None:
    """Runs memo-jax cluster."""
    if (options.embeddings is None) == (options.data is None):
        raise ValueError("give either --embeddings FILE, or --data DATASET to be embedded with --model")
    of_network = [name for name in ("model", "branch", "role", "step") if getattr(options, name) is not None]
    if options.crops:
        of_network.append("crops")
    if options.embeddings is not None and of_network:
        raise ValueError(f"--{of_network[0]} is for --data: these embeddings exist already")
    for path in filter(None, (options.output, options.figure)):
        check_writable(path)
    if options.figure and options.figure.suffix.lower() not in FIGURE_SUFFIXES:
        raise ValueError(f"--figure {options.figure}: end its name in {', '.join(FIGURE_SUFFIXES)}")
    keep_compiled_programs()
    keep_freed_memory()
    from memo_jax.data.batches import Utterances
    from memo_jax.inference.cluster import cluster_text, cluster_to_table, embeddings_of
    from memo_jax.inference.embedder import load_model

    embeddings = options.embeddings
    if options.data is not None:
        utterances = Utterances(options.data)
        model = load_model(options.model, branch=options.branch, role=options.role, step=options.step)
        embeddings = embeddings_of(model, utterances, options.crops, options.crop_seconds)
    report = cluster_to_table(
        embeddings,
        options.output,
        kmeans=options.kmeans,
        clusters=options.clusters,
        linkage=options.linkage,
        iterations=options.iterations,
        seed=options.seed,
        labels=options.labels,
        figure=options.figure,
    )
    print(as_json(report) if options.json else cluster_text(report))


def run_verify(options: argparse.Namespace) -> int:
    """Runs memo-jax verify."""
    embedder = load_embedder(options)
    result = embedder.verify(*options.recordings, threshold=options.threshold)
    text, fields = decided(options, embedder, result.score)
    if options.json:
        fields |= {"model": embedder.fingerprint}
        print(as_json(result._asdict() | fields))
    else:
        print(
            f"{'same speaker' if result.decision else 'different speakers'}: score {result.score:.4f}, threshold "
            f"{result.threshold:.4f} {text}"
        )
    return 0 if result.decision else NO


def run_enroll(options: argparse.Namespace) -> None:
    """Runs memo-jax enroll."""
    from memo_jax.scoring.embedding_file import check_output_name

    check_writable(check_output_name(options.gallery, gallery=True))
    embedder = load_embedder(options, options.gallery)
    embedder.enroll(options.name, options.recordings)
    names = embedder.gallery.names
    print(
        as_json({"enrolled": options.name, "people": names})
        if options.json
        else f"{options.name} is enrolled; {len(names)} in {options.gallery}"
    )


def run_remove(options: argparse.Namespace) -> None:
    """Runs memo-jax remove."""
    from memo_jax.inference.gallery import remove_person
    from memo_jax.scoring.embedding_file import check_output_name

    check_output_name(options.gallery, gallery=True)
    names = remove_person(options.gallery, options.name).names
    print(
        as_json({"removed": options.name, "people": names})
        if options.json
        else f"{options.name} is removed; {len(names)} left in {options.gallery}"
    )


def run_identify(options: argparse.Namespace) -> int:
    """Runs memo-jax identify."""
    if not options.gallery.exists():
        raise FileNotFoundError(f"{options.gallery}: no such gallery: enrol people with memo-jax enroll")
    embedder = load_embedder(options, options.gallery)
    result = embedder.identify(options.recording, threshold=options.threshold)
    text, fields = decided(options, embedder, result.score)
    if options.json:
        print(as_json(result._asdict() | fields))
    else:
        print(
            f"{result.name or 'unknown speaker'}: nearest is {result.nearest}, score {result.score:.4f}, threshold "
            f"{result.threshold:.4f} {text}"
        )
    return NO if result.name is None else 0


def run_app(options: argparse.Namespace) -> None:
    """Runs memo-jax app."""
    if options.gallery is not None:
        from memo_jax.scoring.embedding_file import check_output_name

        check_writable(check_output_name(options.gallery, gallery=True))
    from memo_jax.app.page import serve

    embedder = load_embedder(options, options.gallery)
    if options.threshold is not None:
        embedder.threshold, embedder.threshold_source = options.threshold, "given"
    serve(embedder, options.port, options.open, options.prior, options.json)


def run_report(options: argparse.Namespace) -> None:
    """Runs memo-jax report."""
    check_writable(options.output or options.workdir / "report.html")
    keep_compiled_programs()
    from memo_jax.report.page import write_report

    print(write_report(options.workdir, options.output, data=options.data, trials=options.trials, step=options.step))


def run_export(options: argparse.Namespace) -> None:
    """Runs memo-jax export."""
    from memo_jax.inference.embedder import load_model
    from memo_jax.inference.export import check_outputs, export

    check_outputs(options.output)
    of_onnx = {"onnx-input": options.onnx_input, "onnx-runtime": options.onnx_runtime}
    of_onnx |= {"other-front-end": options.other_front_end}
    if not any(output.suffix.lower() == ".onnx" for output in options.output):
        for name in (name for name, value in of_onnx.items() if value):
            raise ValueError(f"--{name} is for an ONNX file: give an --output that ends in .onnx")
    if options.other_front_end and not options.onnx_runtime:
        raise ValueError("--other-front-end is for --onnx-runtime: add that, or leave it out")
    if options.onnx_runtime and options.onnx_input == "waveform":
        raise ValueError(f"--onnx-runtime {options.onnx_runtime} takes features: leave out --onnx-input waveform")
    model = load_model(options.model, branch=options.branch, role=options.role, step=options.step)
    onnx_options = {
        "inputs": "feats" if options.onnx_runtime else options.onnx_input or "waveform",
        "weights": options.weights,
        "runtime": options.onnx_runtime,
        "other_front_end": options.other_front_end,
    }
    paths = [str(path) for path in export(model, options.output, **onnx_options)]
    print(as_json({"files": paths, "model": model.fingerprint}) if options.json else "\n".join(paths))


def run_push(options: argparse.Namespace) -> None:
    """Runs memo-jax push."""
    from memo_jax.inference.embedder import load_model
    from memo_jax.inference.hub import push

    model = load_model(options.model, branch=options.branch, role=options.role, step=options.step)
    results = []
    for path in options.results:
        try:
            results.append(parse_json(path.read_text("utf-8")))
            if not isinstance(results[-1], dict):
                raise ValueError("no group")
        except ValueError as error:
            raise ValueError(f"{path}: not what eval writes: {one_line(error)}") from None
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


def run_score(options: argparse.Namespace) -> None:
    """Runs memo-jax score."""
    from memo_jax.scoring.score import score, score_text

    if options.scores is not None:
        check_writable(options.scores)
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
    print(as_json(results) if options.json else score_text(results))


RUN = {
    "prepare": run_prepare,
    "trials": run_trials,
    "init-config": run_init_config,
    "train": run_train,
    "pseudo-label": run_pseudo_label,
    "reproduce": run_reproduce,
    "plan": run_plan,
    "eval": run_eval,
    "embed": run_embed,
    "cluster": run_cluster,
    "verify": run_verify,
    "enroll": run_enroll,
    "remove": run_remove,
    "identify": run_identify,
    "app": run_app,
    "report": run_report,
    "export": run_export,
    "push": run_push,
    "score": run_score,
    "convert": run_convert,
}
