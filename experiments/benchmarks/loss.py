"""The distillation loss and its gradient beside a pair-by-pair version: time, memory, and whether they agree.

    python experiments/benchmarks/loss.py [--batch 32] [--prototypes 65536] [--global-views 2] [--local-views 4]
        [--torch] [--json]

The public DINO programs go pair by pair: for every pair of a teacher view and another student view, a softmax of the
one, a log-softmax of the other and their cross-entropy; automatic differentiation does the rest. Both versions are
compiled by XLA, ours with the options of the train step; it sees all pairs at once and merges what they share.
`cpu_seconds` is the median, over runs that take turns, of loss and gradient; `temporary_bytes` is XLA's own analysis of
what the compiled program needs beside arguments and results. `--torch` adds the pairs as PyTorch runs them, one
operation after the other, from experiments/torch_steps.py (in the environment of `make parity`); its memory is not
measured.

Prints `ratio` and `memory_ratio` (pair by pair ÷ ours) and `max_difference`: the larger of the losses' relative
difference and the gradients' largest difference relative to the largest gradient. `ratio_torch` and
`max_difference_torch` are the same against PyTorch, whose float32 sums over so many prototypes round coarsely.
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

import jax
import numpy as np

from memo_jax.training.losses import distillation, teacher_distributions
from memo_jax.xla.compiler import compiler_options
from memo_jax.xla.memory import keep_freed_memory

STUDENT_TEMP, TEACHER_TEMP = 0.1, 0.04


def pairwise_distillation(student, teacher, center):
    """Returns the mean cross-entropy over all pairs of a teacher view and another student view."""
    total, pairs = 0.0, 0
    for i in range(len(teacher)):
        for v in range(len(student)):
            if v != i:
                target = jax.lax.stop_gradient(jax.nn.softmax((teacher[i] - center) / TEACHER_TEMP, axis=-1))
                log_probability = jax.nn.log_softmax(student[v] / STUDENT_TEMP, axis=-1)
                total = total - (target * log_probability).sum(axis=-1).mean()
                pairs += 1
    return total / pairs


def our_distillation(student, teacher, center):
    """Returns the loss of memo_jax, without its indicators."""
    distributions, _ = teacher_distributions(teacher, center, TEACHER_TEMP)
    return distillation(student, distributions, STUDENT_TEMP)


def example_logits(options):
    """Returns student logits [V, B, K], teacher logits [W, B, K] and a centre [K], in the range of cosines."""
    keys = jax.random.split(jax.random.key(options.seed), 3)
    shape = (options.batch, options.prototypes)
    student = jax.random.normal(keys[0], (options.global_views + options.local_views, *shape)) * 0.1
    teacher = jax.random.normal(keys[1], (options.global_views, *shape)) * 0.1
    return student, teacher, jax.random.normal(keys[2], shape[1:]) * 0.1


def compiled_forms(logits) -> tuple[dict, dict]:
    """Returns {form: a call without arguments → (loss, gradient)} and {form: its temporary bytes}."""
    calls, temporary = {}, {}
    ours = compiler_options(jax.default_backend())
    for name, form, options in (("ours", our_distillation, ours), ("pairwise", pairwise_distillation, None)):
        program = jax.jit(jax.value_and_grad(form)).lower(*logits).compile(options)
        calls[name] = lambda program=program: jax.block_until_ready(program(*logits))
        temporary[name] = program.memory_analysis().temp_size_in_bytes
    return calls, temporary


def torch_form(logits):
    """Returns a call that takes loss and gradient in PyTorch, on as many threads as this process has cores."""
    import torch

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from torch_steps import distillation_loss

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    student, teacher, center = (torch.from_numpy(np.array(x)) for x in logits)
    student.requires_grad_()

    def call():
        student.grad = None
        loss = distillation_loss(list(student), list(teacher), center, STUDENT_TEMP, TEACHER_TEMP)
        loss.backward()
        return loss.item(), student.grad.numpy()

    return call


def measured(calls: dict, runs: int) -> dict:
    """Returns {form: its loss, gradient and the CPU-seconds of every run}, the forms run in turns."""
    results = {name: {"cpu_seconds": []} for name in calls}
    for run in range(runs + 1):  # the first is not counted
        for name, call in calls.items():
            begin = time.process_time()
            results[name]["loss"], results[name]["gradient"] = call()
            if run:
                results[name]["cpu_seconds"].append(time.process_time() - begin)
    return results


def difference(ours: dict, theirs: dict) -> float:
    """Returns the larger of the losses' relative difference and the gradients', relative to the largest gradient."""
    gradients = np.abs(np.asarray(ours["gradient"]) - theirs["gradient"]).max() / np.abs(theirs["gradient"]).max()
    return max(abs(float(ours["loss"]) / float(theirs["loss"]) - 1), float(gradients))


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--prototypes", type=int, default=65536)
    parser.add_argument("--global-views", type=int, default=2)
    parser.add_argument("--local-views", type=int, default=4)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--torch", action="store_true", help="beside PyTorch, too")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def main(arguments=None) -> dict:
    """Measures and prints."""
    options = build_parser().parse_args(arguments)
    keep_freed_memory()  # as training does
    logits = example_logits(options)
    calls, temporary = compiled_forms(logits)
    if options.torch:
        calls["torch"] = torch_form(logits)
    results = measured(calls, options.runs)
    differences = {name: difference(results["ours"], row) for name, row in results.items()}
    for name, row in results.items():
        del row["gradient"]
        row["loss"] = float(row["loss"])
        row["spread"] = [min(row["cpu_seconds"]), max(row["cpu_seconds"])]
        row["cpu_seconds"] = statistics.median(row["cpu_seconds"])
        row["temporary_bytes"] = temporary.get(name)
    ours = results["ours"]
    result = results | {
        "ratio": results["pairwise"]["cpu_seconds"] / ours["cpu_seconds"],
        "memory_ratio": temporary["pairwise"] / temporary["ours"],
        "max_difference": differences["pairwise"],
    }
    if options.torch:
        result["ratio_torch"] = results["torch"]["cpu_seconds"] / ours["cpu_seconds"]
        result["max_difference_torch"] = differences["torch"]
    if options.json:
        print(json.dumps(result))
        return result
    for name, row in results.items():
        memory = (
            "" if row["temporary_bytes"] is None else f", {row['temporary_bytes'] / 1e6:.1f} MB of temporary memory"
        )
        print(
            f"{name:9s}{row['cpu_seconds'] * 1e3:8.1f} ms of CPU time ({row['spread'][0] * 1e3:.1f}–"
            f"{row['spread'][1] * 1e3:.1f}){memory}"
        )
    for key in ("ratio", "ratio_torch", "memory_ratio", "max_difference", "max_difference_torch"):
        if key in result:
            print(f"{key:21s} {result[key]:.4g}")
    return result


if __name__ == "__main__":
    main()
