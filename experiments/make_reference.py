"""Takes MeMo training steps in PyTorch and writes them as a reference file, or replays such a file.

    python experiments/make_reference.py make OUTPUT [--batch 4 --steps 4 …]
    python experiments/make_reference.py replay FILE [--float64-output OUTPUT]

`replay` prints how far float32 and float64 replays lie from the file and from one another: the file's rounding noise.
It needs PyTorch and the package speakerlab-slim; neither memo_jax nor its tests do. On more than one thread PyTorch
rounds differently, and on tiny networks it is slower: set OMP_NUM_THREADS=1.
"""

import argparse
import copy
import io
import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

from torch_steps import GLOBAL_VIEWS, LOCAL_VIEWS, LOSS_COLUMNS, MEL_BINS, Branch, Training, build_students

# Tensors of every kind, few enough for a small file.
KEPT_TENSORS = (
    r"^center|mlp\.[14]\.|self_head.*(mlp\.[036]\.bias|mlp.3.weight|last_layer\.weight_v)|fc\.conv\.bias|seg_1\.bias"
    r"|asp_bn|blocks\.[03]\.norm|blocks\.2\.res2net_block\.blocks\.[06]|blocks\.3\.tdnn2"
    r"|layer[14]\.0\..*(bn|shortcut)|layer3\.5|layer2\.1\.conv1|backbone\.(bn1|conv1)"
)


@torch.no_grad()
def randomize(branch: Branch) -> None:
    """Moves batch norms away from their initial ones and zeros, and rounds to float16 (which compresses well)."""
    for module in branch.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.weight.normal_(1, 0.1)
            module.bias.normal_(0, 0.1)
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    for tensor in branch.state_dict().values():
        tensor.copy_(tensor.half())


def random_mel(random: np.random.Generator, utterances: int, views: int, frames: int) -> np.ndarray:
    """Returns view-major mel power float16 [V·N, 80, T]: a spectrum for each utterance, and frames that differ.

    Whole powers of two, because they compress well.
    """
    spectra = random.normal(-4, 3, (1, utterances, MEL_BINS, 1))
    power = 2.0 ** np.clip(np.rint(spectra + random.normal(0, 3, (views, utterances, MEL_BINS, frames))), -24, 15)
    return power.reshape(views * utterances, MEL_BINS, frames).astype(np.float16)


# Steps taken with one mistake, each a plausible one in a port; a check of a port must tell them from the right steps.


def tanh_gelu(training: Training) -> None:
    """GELU by its tanh approximation."""
    for model in (*training.students.values(), *training.teachers.values()):
        for module in model.modules():
            if isinstance(module, nn.GELU):
                module.approximate = "tanh"


def zero_padding(training: Training) -> None:
    """ECAPA-TDNN's convolutions padded with zeros."""
    for role in (training.students, training.teachers):
        for module in role["ecapa"].modules():
            if hasattr(module, "padding_mode") and not isinstance(module, nn.Conv1d):
                module.padding_mode = "constant"


def decayed_biases(training: Training) -> None:
    """Weight decay on every parameter."""
    training.optimizer.param_groups[1]["weight_decay"] = training.config["weight_decay"]


def global_clip(training: Training) -> None:
    """One clip over a student's whole gradient."""
    limit = training.config["clip_per_parameter"]
    training.clip = lambda: [nn.utils.clip_grad_norm_(s.parameters(), limit) for s in training.students.values()]


def early_teachers(training: Training) -> None:
    """Teachers moved before the optimiser's step, on the old students."""
    right_order = training.optimize, training.move_teachers
    training.optimize, training.move_teachers = right_order[::-1]


def eval_teachers(training: Training) -> None:
    """Teachers' batch norms in evaluation mode."""
    for teacher in training.teachers.values():
        teacher.eval()


def joint_heads(training: Training) -> None:
    """Heads run on global and local views together, as one batch of their batch norms."""

    def student_outputs(branch, inputs):
        embeddings = [branch.backbone(x) for x in inputs]
        batch, rows = training.config["batch"], torch.cat(embeddings)
        return {
            "embedding": list(embeddings[0].split(batch)),
            "self": list(branch.self_head(rows).split(batch)),
            "cross": list(branch.cross_head(rows).split(batch)),
        }

    training.student_outputs = student_outputs


MISTAKES = (tanh_gelu, zero_padding, decayed_biases, global_clip, early_teachers, eval_teachers, joint_heads)
MISTAKEN_SETTINGS = {
    "teacher_momentum": 0.75,
    "center_momentum": 0.81,
    "teacher_temp": [0.05, 0.09],
    "sgd_momentum": 0.5,
    "base_lr_already_scaled": 0.0055,
    "cross_weight": 1.0,
    "freeze_last_layer_epochs": 0,
    "clip_per_parameter": 0.35,
    "contrastive_weight": 0.501,
}


def mistaken_losses(config: dict, students: dict[str, Branch], mels: list, dtype: torch.dtype) -> dict[str, np.ndarray]:
    """Returns the losses {name: [steps, 6]} of the same steps taken with one mistake each."""
    losses = {}
    for mistake in MISTAKES:
        training = Training(config, copy.deepcopy(students), dtype)
        mistake(training)
        losses[mistake.__name__] = np.array([training.take_step(i, *mel) for i, mel in enumerate(mels)])
    for key, value in MISTAKEN_SETTINGS.items():
        training = Training(config | {key: value}, copy.deepcopy(students), dtype)
        losses[key] = np.array([training.take_step(i, *mel) for i, mel in enumerate(mels)])
    return losses


def make(config: dict, options: argparse.Namespace) -> dict[str, np.ndarray]:
    """Returns a reference file's arrays, parameters in float32 whatever the steps were taken in."""
    torch.manual_seed(options.seed)
    random = np.random.default_rng(options.seed)
    students = build_students(config)
    for student in students.values():
        randomize(student)
    dtype = torch.float64 if options.float64 else torch.float32
    torch.set_default_dtype(dtype)
    training = Training(config, copy.deepcopy(students), dtype)
    arrays = {"eval/mel": random_mel(random, 2, 1, options.frames[0]).astype(np.float32)}
    arrays |= {f"init/{name}": value for name, value in training.state().items() if name.startswith("student/")}
    for name, value in training.eval_embeddings("student", arrays["eval/mel"]).items():
        arrays[f"eval/embedding/{name}"] = value
    losses, mels = [], []
    for i in range(options.steps):
        views = zip((GLOBAL_VIEWS, LOCAL_VIEWS), options.frames, strict=True)
        mels.append([random_mel(random, config["batch"], number, frames) for number, frames in views])
        arrays[f"step{i}/global_mel"], arrays[f"step{i}/local_mel"] = mels[-1]
        losses.append(training.take_step(i, *mels[-1]))
        if i in options.keep:
            arrays |= {
                f"after{i}/{name}": value for name, value in training.state().items() if re.search(options.names, name)
            }
    arrays |= embedding_arrays(training, arrays["eval/mel"])
    arrays = {
        name: value.astype(np.float32) if value.dtype == np.float64 else value
        for name, value in arrays.items()
        if not name.endswith("num_batches_tracked")
    }
    arrays |= {"config": np.array(json.dumps(config)), "losses": np.array(losses)}
    steps = slice(len(losses))
    arrays |= {"schedule/lr": training.learning_rates[steps], "schedule/momentum": training.momenta[steps]}
    if options.mistakes:
        mistaken = mistaken_losses(config, students, mels, dtype)
        arrays |= {f"mistake/{name}/losses": value for name, value in mistaken.items()}
    return arrays


def embedding_arrays(training: Training, mel: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the embeddings after the last step by their names in a file."""
    return {
        f"eval_after_last/{role}/embedding/{name}": value
        for role in ("student", "teacher")
        for name, value in training.eval_embeddings(role, mel).items()
    }


def replay(file: dict[str, np.ndarray], dtype: torch.dtype) -> dict[str, np.ndarray]:
    """Returns a file's arrays, those that its steps reached (losses, states, embeddings) as they come out here."""
    torch.set_default_dtype(dtype)
    config = json.loads(str(file["config"]))
    students = build_students(config)
    for name, student in students.items():
        prefix = f"init/student/{name}/"
        weights = {key.removeprefix(prefix): x for key, x in file.items() if key.startswith(prefix)}
        student.load_state_dict({key: torch.from_numpy(x) for key, x in weights.items()})
    training = Training(config, students, dtype)
    reached, losses = {}, []
    for name, value in training.eval_embeddings("student", file["eval/mel"]).items():
        reached[f"eval/embedding/{name}"] = value
    for i in range(len(file["losses"])):
        losses.append(training.take_step(i, file[f"step{i}/global_mel"], file[f"step{i}/local_mel"]))
        reached |= {f"after{i}/{name}": value for name, value in training.state().items()}
    reached |= embedding_arrays(training, file["eval/mel"]) | {"losses": np.array(losses)}
    torch.set_default_dtype(torch.float32)
    return file | {name: value for name, value in reached.items() if name in file}


def parts(name: str) -> str:
    """Returns the part of the system, such as "student/resnet/backbone statistics", that a state's array belongs to."""
    role, branch, rest = name.split("/", 2)
    if role == "center":
        return "center"
    statistics = " statistics" if rest.endswith(("running_mean", "running_var")) else ""
    return f"{role}/{branch}/{'backbone' if rest.startswith('backbone') else 'heads'}{statistics}"


def state_differences(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """Returns the largest and the mean absolute difference of each part, of statistics relative to their largest."""
    differences: dict[str, list[np.ndarray]] = {}
    for name in a:
        if not name.endswith(("num_batches_tracked", "weight_g")):
            scale = np.abs(b[name]).max() if "running_" in name else 1.0
            differences.setdefault(parts(name), []).append(np.abs(a[name] - b[name]).ravel() / scale)
    return {
        part: {"max": float(np.concatenate(d).max()), "mean": float(np.concatenate(d).mean())}
        for part, d in differences.items()
    }


def compare(runs: dict[str, dict[str, np.ndarray]]) -> dict:
    """Returns how far the runs "file", "float32" and "float64" lie from one another."""
    result = {}
    for a, b in (("float32", "file"), ("float64", "file"), ("float32", "float64")):
        found = result[f"{a} against {b}"] = {
            "losses": np.abs(runs[a]["losses"] / runs[b]["losses"] - 1).max(axis=1).tolist()
        }
        for step in sorted({name.split("/")[0] for name in runs["file"] if name.startswith("after")}):
            found[step] = state_differences(
                *(
                    {name.split("/", 1)[1]: x for name, x in runs[run].items() if name.startswith(step + "/")}
                    for run in (a, b)
                )
            )
    return result


def write_npz(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes a compressed npz, whole or not at all."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    part = path.with_name(path.name + ".part")
    part.write_bytes(buffer.getvalue())
    os.replace(part, path)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    formatter = argparse.ArgumentDefaultsHelpFormatter
    making = commands.add_parser("make", help="write a reference file", formatter_class=formatter)
    making.add_argument("output", type=Path, help="npz to write")
    making.add_argument("--seed", type=int, default=8)
    making.add_argument("--steps", type=int, default=4)
    making.add_argument("--keep", type=int, nargs="*", default=[0, 3], help="steps whose state is written")
    making.add_argument("--names", default=KEPT_TENSORS, help="regular expression of the tensors in a written state")
    making.add_argument("--float64", action="store_true", help="take the steps in float64")
    making.add_argument("--mistakes", action="store_true", help="write the losses of mistaken steps, too")
    making.add_argument("--frames", type=int, nargs=2, default=[24, 16], help="frames of global and of local views")
    sizes = {
        "batch": 4,
        "ecapa_channels": [16, 16, 16, 16, 48],
        "resnet_base_channels": 2,
        "embed_dim": 12,
        "prototypes": 96,
        "head_hidden": 20,
        "head_bottleneck": 8,
        "epochs": 3,
        "steps_per_epoch": 2,
        "warmup_epochs": 0,
        "teacher_temp": [0.05, 0.08],
        "teacher_temp_warmup_epochs": 2,
        "student_temp": 0.12,
        "center_momentum": 0.8,
        "cross_weight": 0.7,
        "contrastive_weight": 0.5,
        "contrastive_temperature": 0.2,
        "contrastive_scale": 1 / 0.07,
        "base_lr_already_scaled": 0.005,
        "min_lr": 1e-4,
        "teacher_momentum": 0.8,
        "weight_decay": 0.5,
        "clip_per_parameter": 0.3,
        "freeze_last_layer_epochs": 1,
        "sgd_momentum": 0.85,
    }
    for name, default in sizes.items():
        kind, count = (type(default[0]), len(default)) if isinstance(default, list) else (type(default), None)
        making.add_argument(
            f"--{name.replace('_', '-')}", type=kind, nargs=count, default=default, help="as in the file's config"
        )
    replaying = commands.add_parser("replay", help="print a file's rounding noise as JSON")
    replaying.add_argument("file", type=Path)
    replaying.add_argument("--float64-output", type=Path, help="write the file with the float64 losses and states")
    options = parser.parse_args(arguments)
    if options.command == "replay":
        with np.load(options.file, allow_pickle=False) as arrays:
            file = dict(arrays)
        runs = {"file": file, "float32": replay(file, torch.float32), "float64": replay(file, torch.float64)}
        print(json.dumps(compare(runs), indent=1))
        if options.float64_output:
            write_npz(options.float64_output, runs["float64"])
        return 0
    config = {name: getattr(options, name) for name in sizes} | {"loss_columns": LOSS_COLUMNS}
    if options.steps > config["epochs"] * config["steps_per_epoch"]:
        parser.error(f"{options.steps} steps do not fit into {config['epochs']} epochs of {config['steps_per_epoch']}")
    write_npz(options.output, make(config, options))
    return 0


if __name__ == "__main__":
    sys.exit(main())
