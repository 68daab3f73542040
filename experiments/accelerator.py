r"""The first hour on a machine with GPUs or TPUs, in one command: is it right, how fast is it, and does it learn.

    python experiments/accelerator.py --output OUTPUT [--data DATA] [--config FILE] [--config.KEY=VALUE …]

Needs nothing but this repository and an installed memo-jax. It does its parts (accelerator_parts.py) one after the
other, each in a process of its own, and ends with 75 once `--minutes` are over, or on SIGTERM: the same command
resumes. Each part leaves OUTPUT/parts/PART.json: delete it to run the part again. One that failed, or took longer than
a whole call, is tried once more by the next call; where machine or parity fails, the command stops. OUTPUT/results.md
and results.json show all of them. Their order is:

    machine                  devices, best rate of a matrix product and of a copy
    parity                   reference steps of a PyTorch program, replayed in float32, within that file's tolerances
    bfloat16                 the same steps in float32 and in bfloat16
    devices                  the same steps on one device and on all
    flops                    of a step, by the definition of the networks
    step/DTYPE/BATCH         the authors' step, augmentation included, on all devices, at the smallest BATCH (utterances
                             a device)
    trace                    a profile of three steps for XProf and TensorBoard, and the memory's, for pprof
    plan                     what `memo-jax plan` says of this machine, beside what was measured
    step/bfloat16/BATCH      at larger batches, up to the 128 that training may have
    training                 rows of the study at the authors' sizes, and their EER (where there is DATA, see below)
    torch/VARIANT            the same step in PyTorch from the same weights, beside ours, both from mel power (where
                             PyTorch and the package speakerlab-slim are installed), and whether the losses agree;
                             compiled, its ECAPA-TDNN is several graphs
    step/DTYPE/BATCH         at the other larger batches, until one does not fit
    lever/NAME               the step in bfloat16 at the smallest batch, with one setting changed (mean_first: batch
                             statistics in two passes, as on a CPU; resnet_packed: the setting of memo_voxceleb2_tpu.py)
    lever/NAME/larger        of those that save memory, at the first batch that does not fit without it

DATA holds `train` and `test`, both made by `memo-jax prepare`, `trials.txt` (of test), and, if there are any, the
folders `noise`, `music` and `rirs`; accelerator_data.py makes a small one of larger datasets. Without it, the synthetic
speech of `make demo` is made where the package espeakng-loader is installed, and nothing is trained elsewhere.

The exit status is 0 when all parts are done, 1 when numbers are wrong or a part failed twice for another reason than
lack of memory, 75 while something is left, 2 for bad arguments, and where JAX does not see the accelerator.
"""

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from accelerator_parts import (
    GO_ON,
    MEMORY_FRACTIONS,
    ROOT,
    NoAccelerator,
    config_of,
    part_file,
    parts_of,
    recipe_for_machine,
    result_of,
    run_part,
)
from memo_jax.files import as_json, write_text
from memo_jax.locks import exclusive
from memo_jax.log import say
from run import end_with_parent

REFUSED = 2
SAVE_SECONDS = 60  # that a part may take to end when time is up
ATTEMPTS = 2  # of a part that fails, each by a call of its own
NEARLY_ALL = 0.9  # share of a call's time with which a part that did not end is too slow, and not only late
NEEDED = ("machine", "parity")  # without them the others tell nothing
OUT_OF_MEMORY = re.compile(
    "RESOURCE_EXHAUSTED|[Oo]ut of memory|OutOfMemory|Ran out of memory|INTERNAL: Failed to allocate"
)
# XLA's lines beside the exception, among them that its allocator "ran out of memory", which "is not a failure", or
# "failed to allocate": it then tries a smaller size, or another algorithm.
NOTES = re.compile(r"^[IWE]\d{4} .*|^\d{4}-\d\d-\d\d \S+: [IWE] .*|.*not a failure.*", re.MULTILINE)
MAY_NOT_FIT = ("step/", "lever/", "torch/", "bfloat16", "devices", "trace")


def chosen(options) -> list[str]:
    """Names of the parts to run."""
    return [name for name in parts_of(options) if re.search(options.parts, name)]


def run_all(options, arguments: list[str]) -> int:
    """Runs the parts that are not done, until time is up; returns the exit status."""
    end = time.monotonic() + 60 * options.minutes
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(GO_ON))  # `ended` then ends the part
    part_file(options, "machine").parent.mkdir(parents=True, exist_ok=True)
    for name in chosen(options):
        result, remaining = result_of(options, name), end - time.monotonic()
        if not (is_left(result) or result.get("again")):
            continue
        if remaining <= 0:
            break
        say(f"{name} …")
        attempts, log = result.get("attempts", 0) + 1, part_file(options, name).with_suffix(".log")
        with open(log, "a" if name == "training" else "w") as stream:  # training goes on where it was
            child = subprocess.Popen(
                [sys.executable, __file__, *arguments, f"--part={name}"],
                stdout=stream,
                stderr=stream,
                env=environment_of(options, name),
                start_new_session=True,
                preexec_fn=end_with_parent,
            )
        in_time = ended(child, remaining)
        if in_time and not child.returncode:
            result = result_of(options, name)
        elif in_time:
            result = failure(name, child.returncode, log.read_text(errors="replace"))
        elif name == "training" or remaining < NEARLY_ALL * 60 * options.minutes:
            break  # it resumes where it was, or had less than the full time
        else:
            result = {"error": f"did not end within {options.minutes:g} minutes: give a larger --minutes"}
        if "error" in result and name in NEEDED and (in_time or attempts == ATTEMPTS):
            part_file(options, name).unlink(missing_ok=True)
            say(f"accelerator.py: error: {name}: {result['error']} (see {log}; the same command tries again)")
            return REFUSED if child.returncode == REFUSED else 1
        if "error" in result:
            write_text(part_file(options, name), json.dumps(result | {"attempts": attempts}))
        write_results(options)
        say(f"  {summary(result)}")
    results = write_results(options)
    left = [name for name in chosen(options) if is_left(results.get(name, {}))]
    print(f"{options.output / 'results.md'}: {len(chosen(options)) - len(left)} of {len(chosen(options))} parts done")
    wrong = [
        name
        for name in chosen(options)
        if (result := results.get(name, {})).get("passed") is False
        or ("error" in result and not result.get("out_of_memory"))
    ]
    for name in wrong:
        say(f"{name}: {summary(results[name])} (see {part_file(options, name).with_suffix('.log')})")
    if left:
        say(f"the same command continues with {left[0]}")
        return GO_ON
    return 1 if wrong else 0


def is_left(result: dict) -> bool:
    """Whether a part is still to be done: it has no result, or it failed once, which may have been a passing fault."""
    failed = "error" in result and not result.get("out_of_memory")
    return not result or (failed and result.get("attempts", 0) < ATTEMPTS)


def environment_of(options, name: str) -> dict[str, str]:
    """The environment of a part's process; what the user has set stays as it is."""
    environment = {
        "JAX_COMPILATION_CACHE_DIR": str(options.output / "xla"),
        "JAX_TRACEBACK_FILTERING": "off",  # its note would be the last line
    } | os.environ
    if not any(map(os.environ.get, MEMORY_FRACTIONS)):  # jaxlib refuses both
        environment[MEMORY_FRACTIONS[-1]] = "0.9"  # of a GPU's memory; the default is 0.75
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    if name == "flops":  # counted on a CPU, wherever the others run
        environment["JAX_PLATFORMS"] = "cpu"
    return environment


def failure(name: str, status: int, log: str) -> dict:
    """What the result of a part says that ended with a status other than 0."""
    if status == -signal.SIGKILL:
        cause = "the host (not the accelerator) probably ran out of memory"
        return {"error": f"killed by signal 9: {cause}; end what else runs there, or give smaller --batches"}
    _, traceback, text = NOTES.sub("", log).rpartition("Traceback (most recent call last):\n")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith(" ")]  # without its frames
    found = {"error": (lines or [f"status {status}"])[0 if traceback else -1][:500]}
    if name.startswith(MAY_NOT_FIT) and OUT_OF_MEMORY.search("\n".join(lines)):
        found["out_of_memory"] = True
    return found


def ended(child: subprocess.Popen, seconds: float) -> bool:
    """Waits for a part, and returns False when it takes longer; ends it, with all that it started, in any case."""
    try:
        child.wait(seconds)
        return True
    except subprocess.TimeoutExpired:
        return False
    finally:  # also on Ctrl-C and SIGTERM, and for what a failed part has left
        end_part(child)


def end_part(child: subprocess.Popen) -> None:
    """Ends a part and all that it started; what were left of it would hold the accelerator."""
    try:
        if child.poll() is None:
            child.terminate()  # a training saves where it is
            child.wait(SAVE_SECONDS)
    except subprocess.TimeoutExpired:
        pass
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def summary(result: dict) -> str:
    """A line about a part's result."""
    if "skipped" in result:
        return f"skipped: {result['skipped']}"
    if result.get("out_of_memory"):
        return "does not fit"
    if "error" in result:
        return f"failed: {result['error']}"
    if "passed" in result:
        return "passed" if result["passed"] else "WRONG"
    if "utterances_per_second" in result:
        return f"{result['seconds']:.4g} s, {result['utterances_per_second']:.4g} utterances/s"
    if "kind" in result:
        return f"{result['devices']} × {result['kind']} ({result['platform']})"
    return "done"


def write_results(options) -> dict[str, dict]:
    """Writes results.json and results.md of the parts done; returns them by name."""
    results = {name: result_of(options, name) for name in parts_of(options) if part_file(options, name).is_file()}
    write_text(options.output / "results.json", as_json(results))
    write_text(options.output / "results.md", markdown(results))
    return results


def markdown(results: dict[str, dict]) -> str:
    """The results as tables."""
    limits = results.get("machine", {})
    lines = ["# On an accelerator", ""]
    if "kind" in limits:
        rates = ", ".join(f"{rate / 1e12:.4g} in {dtype}" for dtype, rate in limits["flops_per_second"].items())
        lines += [
            f"{summary(limits)}, jax {limits['jax']}, jaxlib "
            f"{limits['jaxlib']}, Python {limits['python']}. Best matrix product of a device: {rates} TFLOP/s; best "
            f"copy: {limits['bytes_per_second'] / 1e12:.4g} TB/s. Float32 is at default precision: "
            "TensorFloat-32 on a GPU, one pass of bfloat16 on a TPU.",
            "",
        ]
    lines += ["| check | result |", "|---|---|"]
    for name in ("machine", "parity", "bfloat16", "devices", "flops"):
        if name in results:
            lines.append(f"| {name} | {summary(results[name])} |")
    steps = {name: result for name, result in results.items() if name.startswith(("step/", "lever/"))}
    if steps:
        lines += [
            "",
            "| step | utterances a device | s | utterances/s | of the matrix peak | of the bandwidth | peak memory, GB "
            "| compiled in, s |",
            "|---" * 8 + "|",
        ]
    for name, row in steps.items():
        if "seconds" not in row:
            lines.append(f"| {name} | | {summary(row)} | | | | | |")
            continue
        of_peak, of_bandwidth = (
            "" if row[key] is None else format(row[key], digits)
            for key, digits in (("fraction_of_peak", ".1%"), ("fraction_of_bandwidth", ".0%"))
        )
        memory = f"{(row['peak_bytes'] or row['compiled_bytes']) / 1e9:.2f}"
        memory += "" if row["peak_bytes"] else " (compiled)"
        lines.append(
            f"| {name} | {row['batch_a_device']} | {row['seconds']:.4g} | {row['utterances_per_second']:.4g} | "
            f"{of_peak} | {of_bandwidth} | {memory} | {row['compile_seconds']:.0f} |"
        )
    beside = {name: result for name, result in results.items() if name.startswith("torch/")}
    if beside:
        lines += [
            "",
            "| PyTorch | its s | ours, s | its utterances/s | ours | ratio | difference of losses |",
            "|---" * 7 + "|",
        ]
    for name, row in beside.items():
        if "ratio" not in row:
            lines.append(f"| {name} | {summary(row)} | | | | | |")
            continue
        sides = [f"{row[side][key]:.4g}" for key in ("seconds", "utterances_per_second") for side in ("theirs", "ours")]
        difference = f"{row['max_relative_loss_difference']:.2g} of {row['tolerance']:g}: {summary(row)}"
        lines.append(f"| {' | '.join([name, *sides])} | {row['ratio']:.3g} | {difference} |")
    others = {name: results[name] for name in ("trace", "plan", "training") if name in results}
    for name, row in others.items():
        lines += ["", f"**{name}**: {summary(row)}"]
        if "seconds_by_scope" in row:
            lines += ["", "| scope | ms a step |", "|---|---|"]
            lines += [f"| {scope} | {1e3 * seconds:.3g} |" for scope, seconds in row["seconds_by_scope"].items()]
            share = "not measured"
            if row["step_seconds"]:
                share = f"{row['attributed_seconds'] / row['step_seconds']:.0%} of {1e3 * row['step_seconds']:.3g} ms"
            lines.append(f"| attributed, of the measured step | {share} |")
        if "topology" in row:
            lines.append(
                f"{row['topology']}: {seconds_and_bytes(row, 'planned', 'does not fit by plan')}; "
                f"{seconds_and_bytes(row, 'measured', 'not measured')}"
            )
        if "rows" in row:
            lines += ["", "| row | steps | EER % of each teacher |", "|---|---|---|"]
            for of, found in row["rows"].items():
                rates = ", ".join(f"{branch} {eer:.2f}" for branch, eer in found["eer"].items())
                lines.append(f"| {of} | {found['steps']} | {rates or found['status']} |")
    return "\n".join(lines) + "\n"


def seconds_and_bytes(row: dict, which: str, missing: str) -> str:
    """The planned or the measured time and memory of a step; `missing` in place of a time that there is not."""
    seconds, size = row[f"{which}_seconds"], row[f"{which}_bytes"]
    text = missing if seconds is None else f"{which} {seconds:.4g} s"
    return text if size is None else f"{text}, {size / 1e9:.2f} GB"


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[2],
        usage=__doc__.splitlines()[2].strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--output", type=Path, required=True, metavar="OUTPUT")
    parser.add_argument("--data", type=Path, metavar="DATA", help="what to train on, see above")
    parser.add_argument("--minutes", type=float, default=8.5, help="of one call (default: %(default)s)")
    parser.add_argument("--training-minutes", type=float, default=20.0, help="of all rows (default: %(default)s)")
    rows = "dino-ecapa,memo-plateau,contrastive-alone"
    parser.add_argument("--rows", default=rows, help="of the study, as run.py takes them (default: %(default)s)")
    parser.add_argument("--parts", default="", metavar="REGEX", help="only those whose name it matches")
    batches = "32,64,128,256,512,1024"
    parser.add_argument("--batches", default=batches, help="utterances a device (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="steps between two clock readings (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="of that many steps (default: %(default)s)")
    parser.add_argument("--reference", type=Path, default=ROOT / "tests" / "reference_steps.npz", metavar="NPZ")
    default = "default: configs/memo_voxceleb2.py; on TPUs memo_voxceleb2_tpu.py"
    parser.add_argument("--config", type=Path, metavar="FILE", help=default)
    parser.add_argument("--training-config", type=Path, default=ROOT / "configs" / "study_full.py", metavar="FILE")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    unknown = [text for text in rest if not (text.startswith("--config.") and "=" in text)]
    if unknown:
        parser.error(f"unknown argument {unknown[0]!r}")
    options.overrides = [text.removeprefix("--config.") for text in rest]
    try:
        options.batches = sorted(int(text) for text in options.batches.split(","))
    except ValueError:
        parser.error(f"--batches {options.batches}: give numbers with commas between")
    options.output = options.output.resolve()
    options.config = options.config or recipe_for_machine(options)
    if options.data:
        options.data = options.data.resolve()
        missing = [name for name in ("train", "test", "trials.txt") if not (options.data / name).exists()]
        if missing:
            parser.error(f"--data {options.data}: has no {missing[0]}")
    if options.part:
        try:
            run_part(options)
        except NoAccelerator as error:
            print(error, file=sys.stderr)
            return REFUSED
        return 0
    try:
        config_of(options)
        with exclusive(options.output, inside=True):
            return run_all(options, arguments)
    except (OSError, ValueError, KeyError) as error:
        print(f"accelerator.py: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
