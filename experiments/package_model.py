"""Makes the network that comes with the package, from recordings to the file and its error rates.

    python experiments/package_model.py --speech speech --output package

Runs, in order, the commands that experiments/learning.md explains: the validation list, the datasets, training,
threshold and calibration by the validation list, float16, validation in noise and rooms, the tests, and the numbers of
the card. What is there already is not remade, unless the training has gone on since; it resumes where it stopped.
`--config.KEY=VALUE` reaches the training. `memo-jax reproduce OUTPUT/run --output AGAIN` repeats the training and the
evaluation on the validation list, and compares.

The folder of speech has speechocean762/, librispeech/ and commonvoice/ with train/ and test/, commonvoice/unlabelled/,
commands/, noise/esc10/, noise/music/, noise/speech_commands/, rirs/ with rirs/real/, and trials/ with a list for each
test set.

Writes into the output folder: `lists/`, `degraded/`, `data/`, `run/` with `results/validation/`, `network.safetensors`
(float32, with threshold and calibration), `default_model.safetensors` (the same in float16), and `results/` with its
error rates on each other list.
"""

import argparse
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from memo_jax.training.saved_checkpoint import saved_checkpoint

TESTS = ("speechocean762", "librispeech", "commonvoice")
EXPERIMENTS = Path(__file__).parent
CONFIG = EXPERIMENTS.parent / "configs" / "medium.py"
BRANCH = "ecapa,resnet"  # their mean errs less often than either on the validation list


class Step(NamedTuple):
    """A command, and the last thing that it writes; None for a command that is run each time."""

    command: list[str]
    result: Path | None


def steps(speech: Path, output: Path, overrides: list[str]) -> list[Step]:
    """Returns the commands in order; `overrides` are arguments of training."""
    memo_jax, script = [sys.executable, "-m", "memo_jax"], [sys.executable]
    lists, degraded, data, run = (output / name for name in ("lists", "degraded", "data", "run"))
    network, final = output / "network.safetensors", output / "default_model.safetensors"

    def prepared(name: str, *inputs: Path) -> Step:
        given = [argument for path in inputs for argument in ("--input", path)]
        return Step([*memo_jax, "prepare", *given, "--output", data / name], data / name)

    def evaluated(model: Path, results: Path, trials: Path, *more: str) -> Step:
        return Step(
            [*memo_jax, "eval", "--model", model, "--data", data / results.name, "--trials", trials]
            + ["--output", results, "--replicates", "300", *more],
            results / "results.json",
        )

    return [
        Step(
            [*script, EXPERIMENTS / "validation.py", "--input", speech / "commonvoice" / "train", "--output", lists],
            lists / "trials.txt",
        ),
        prepared(
            "train",
            speech / "speechocean762" / "train",
            speech / "librispeech" / "train",
            lists / "train",
            speech / "commonvoice" / "unlabelled",
            speech / "commands",
        ),
        prepared("validation", lists / "validation"),
        Step(
            [*script, EXPERIMENTS / "degrade.py", "--data", data / "validation", "--trials", lists / "trials.txt"]
            + ["--noise", speech / "noise" / "speech_commands", "--rirs", speech / "rirs" / "real"]
            + ["--output", degraded],
            degraded / "trials.txt",
        ),
        prepared("degraded", degraded / "recordings"),
        *(prepared(f"{name}-test", speech / name / "test") for name in TESTS),
        Step(
            [*memo_jax, "train", "--config", CONFIG, "--workdir", run, f"--config.data.train={data / 'train'}"]
            + [f"--config.augment.noise={speech / 'noise' / 'esc10'}"]
            + [f"--config.augment.music={speech / 'noise' / 'music'}", f"--config.augment.rirs={speech / 'rirs'}"]
            + overrides,
            None,
        ),
        evaluated(
            run, run / "results" / "validation", lists / "trials.txt", *("--branch", BRANCH, "--save-threshold", "eer")
        ),
        Step([*memo_jax, "export", "--model", run, "--branch", BRANCH, "--output", network], network),
        Step([*memo_jax, "export", "--model", network, "--weights", "float16", "--output", final], final),
        evaluated(final, output / "results" / "degraded", degraded / "trials.txt"),
        *(
            evaluated(final, output / "results" / f"{name}-test", speech / "trials" / f"{name}-test.txt")
            for name in TESTS
        ),
        Step([*script, EXPERIMENTS / "model_card.py", "--package", output], None),
    ]


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status of the command that failed, else 0."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[0], epilog="--config.KEY=VALUE overrides the config of the training"
    )
    parser.add_argument("--speech", type=Path, required=True, metavar="DIR", help="recordings and trial lists")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="where everything goes")
    arguments, overrides = parser.parse_known_args(argv)
    unknown = [argument for argument in overrides if not argument.startswith("--config.")]
    if unknown:
        parser.error(f"unknown argument {unknown[0]!r}")
    arguments.output.mkdir(parents=True, exist_ok=True)
    trained = 0.0  # when the training saved its last checkpoint
    for command, result in steps(arguments.speech, arguments.output, overrides):
        if result is not None and result.exists() and result.stat().st_mtime >= trained:
            continue
        command = [str(part) for part in command]
        print(f"$ {' '.join(command)}", flush=True)
        status = subprocess.run(command, check=False).returncode
        if status:
            print(f"package_model.py: this command ended with status {status}; run the same command again to resume")
            return status
        if result is None:
            trained = saved_at(arguments.output / "run")
    return 0


def saved_at(workdir: Path) -> float:
    """Returns when the last checkpoint of a run was saved, in seconds of the file system's clock."""
    return Path(saved_checkpoint(workdir).folder).stat().st_mtime


if __name__ == "__main__":
    sys.exit(main())
