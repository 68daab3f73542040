"""Takes training steps in PyTorch and writes them as a reference file, or replays such a file.

    python experiments/make_reference.py make OUTPUT [--mode sdpn --batch 4 --steps 4 …]
    python experiments/make_reference.py replay FILE [--float64-output OUTPUT]

The steps are MeMo's, or by `--mode` those of an option: sdpn, rdino, partners or pseudo_labels (torch_options.py).

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

from torch_options import MODES
from torch_steps import (
    GLOBAL_VIEWS,
    LOCAL_VIEWS,
    LOSS_COLUMNS,
    MEL_BINS,
    Branch,
    Training,
    build_students,
    normalized_log_mel,
)

# Tensors of every kind, few enough for a small file; of MeMo, and of the other modes.
KEPT_TENSORS = (
    r"^center|mlp\.[14]\.|self_head.*(mlp\.[036]\.bias|mlp.3.weight|last_layer\.weight_v)|fc\.conv\.bias|seg_1\.bias"
    r"|asp_bn|blocks\.[03]\.norm|blocks\.2\.res2net_block\.blocks\.[06]|blocks\.3\.tdnn2"
    r"|layer[14]\.0\..*(bn|shortcut)|layer3\.5|layer2\.1\.conv1|backbone\.(bn1|conv1)"
)
KEPT_OPTION_TENSORS = (
    r"^(center|gate)|mlp\.4|mlp\.6\.weight|last_layer\.weight_v|speaker_head|seg_1|backbone\.(bn1|conv1)"
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


def random_mel(
    random: np.random.Generator, utterances: int, views: int, frames: int, bins: int = MEL_BINS, voices=None
) -> np.ndarray:
    """Returns view-major mel power float16 [V·N, F, T]: a spectrum for each utterance, and frames that differ.

    Whole powers of two, because they compress well. With `voices` [N, F, T], the logarithms of the frames are these,
    and noise.
    """
    spectra = random.normal(-4, 3, (1, utterances, bins, 1))
    frames_of_views = random.normal(0, 3 if voices is None else 1, (views, utterances, bins, frames))
    if voices is not None:
        frames_of_views += voices
    power = 2.0 ** np.clip(np.rint(spectra + frames_of_views), -24, 15)
    return power.reshape(views * utterances, bins, frames).astype(np.float16)


VIEWS = {  # numbers of each kind: long ones, but for "local"
    "memo": {"global": GLOBAL_VIEWS, "local": LOCAL_VIEWS},
    "sdpn": {"teacher": 1, "local": 3},
    "rdino": {"global": 2, "local": 2},
    "partners": {"global": 2, "teacher": 2},
    "pseudo_labels": {"global": 2, "clean": 1},
}


class Batches:
    """Random batches {name: array} of a mode; those of pseudo-labels have numbered utterances with labels."""

    def __init__(self, random: np.random.Generator, mode: str, config: dict, frames: tuple[int, int]):
        self.random, self.mode, self.config, self.frames = random, mode, config, frames
        if mode == "pseudo_labels":
            speakers = np.arange(config["utterances"]) % config["speakers"]
            voices = random.normal(0, 3, (config["speakers"], config["mel_bins"], frames[0]))[speakers]
            self.voices = voices + random.normal(0, config["voice_noise"], voices.shape)
            self.labels = speakers.copy()
            wrong = random.permutation(config["utterances"])[: config["wrong_labels"]]
            self.labels[wrong] = (speakers[wrong] + 1) % config["speakers"]
            self.speakers, self.order = speakers, []

    def mel(self, views: int, frames: int, voices=None) -> np.ndarray:
        """Returns view-major mel power of a batch, or of the utterances that `voices` belongs to."""
        utterances = self.config["batch"] if voices is None else len(voices)
        return random_mel(self.random, utterances, views, frames, self.config.get("mel_bins", MEL_BINS), voices)

    def next(self) -> dict[str, np.ndarray]:
        """Returns the next batch."""
        numbered, voices = {}, None
        if self.mode == "pseudo_labels":
            if not self.order:
                self.order = list(self.random.permutation(self.config["utterances"]))
            index = np.array([self.order.pop() for _ in range(self.config["batch"])])
            numbered, voices = {"index": index, "label": self.labels[index]}, self.voices[index]
        long, short = self.frames
        kinds = VIEWS[self.mode].items()
        return {f"{kind}_mel": self.mel(n, short if kind == "local" else long, voices) for kind, n in kinds} | numbered

    @torch.no_grad()
    def teach(self, student: Branch) -> None:
        """Makes a student know its speakers: running statistics, centred embeddings, the mean direction of each."""
        inputs = normalized_log_mel(self.mel(8, self.frames[0], self.voices), torch.float32)
        for momentum in (1.0, 0.1):
            for module in student.modules():
                if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                    module.momentum = momentum
            embeddings = student.train().backbone(inputs)
        student.backbone.seg_1.bias -= embeddings.mean(dim=0)
        of_utterances = (embeddings - embeddings.mean(dim=0)).reshape(8, len(self.voices), -1).mean(dim=0)
        means = torch.stack([of_utterances[self.speakers == s].mean(dim=0) for s in range(self.config["speakers"])])
        student.speaker_head.weight.copy_(self.config["speaker_norm"] * nn.functional.normalize(means, dim=1))
        for tensor in student.state_dict().values():
            tensor.copy_(tensor.half())


# Steps taken with one mistake, each a plausible one in a port; a check of a port must distinguish them from the right
# steps.


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


MISTAKEN_MEMO_SETTINGS = {
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


def averaged_prototypes(training: Training) -> None:
    """SDPN's teacher with prototypes that follow the student's, as the rest of it does."""
    training.move_teachers = lambda step: Training.move_teachers(training, step)
    prototypes = training.prototypes

    @torch.no_grad()
    def probabilities(projections):
        training.prototypes = prototypes
        if not torch.is_grad_enabled():
            training.prototypes = lambda: training.teacher.self_head.last_layer.weight_v
        return type(training).probabilities(training, projections)

    training.probabilities = probabilities


def rows_first(training: Training) -> None:
    """Sinkhorn's iterations that end with the prototypes."""

    def balance(targets):
        for _ in range(training.config["sinkhorn_iterations"]):
            targets = targets / targets.sum(dim=1, keepdim=True)
            targets = targets / targets.sum(dim=0)
        return targets

    training.balance = balance


def koleo_of_all_views(training: Training) -> None:
    """KoLeo among the embeddings of all views."""
    views = training.views
    training.views = lambda rows: (rows,) if rows.shape[1] == training.config["embed_dim"] else views(rows)


def ramp_by_epoch(training: Training) -> None:
    """λ that rises once an epoch."""
    weight, steps = training.regularizer_weight, training.config["steps_per_epoch"]
    training.regularizer_weight = lambda step: weight(step // steps * steps)


def regularized_directions(training: Training) -> None:
    """The regulariser on projections of unit length."""
    views = training.regularized
    training.regularized = lambda rows: [nn.functional.normalize(view, dim=1) for view in views(rows)]


def regularized_global_views(training: Training) -> None:
    """The regulariser on global views alone."""
    views = training.regularized
    training.regularized = lambda rows: views(rows[:1])


def biased_variance(training: Training) -> None:
    """The variance over B instead of B − 1."""
    training.variance = lambda x: nn.functional.relu(1 - torch.sqrt(x.var(dim=0, correction=0) + 1e-4)).mean()


def skipped_equal_views(training: Training) -> None:
    """Views of the same number left out, as if teacher and student shared them."""
    pairs = training.pairs
    training.pairs = lambda *views: [(i, j) for i, j in pairs(*views) if i != j]


def open_loss_gate(training: Training) -> None:
    """A loss gate that lets everything pass."""
    training.left_out = lambda index: torch.zeros(len(index), dtype=torch.bool)


def late_loss_gate(training: Training) -> None:
    """A loss gate that first acts one epoch too late."""
    left_out, first = training.left_out, 2 * training.config["steps_per_epoch"]
    training.left_out = lambda index: left_out(index) & (len(training.counts) >= first)


def correction_by_cosines(training: Training) -> None:
    """Labels corrected by the cosines of unit vectors."""

    def label_logits(clean_mel):
        embeddings = training.student.eval().backbone(training.inputs(clean_mel))
        training.student.train()
        units = nn.functional.normalize(embeddings), nn.functional.normalize(training.student.speaker_head.weight)
        return units[0] @ units[1].T / training.config["correction_temperature"]

    training.label_logits = label_logits


def correction_in_train_mode(training: Training) -> None:
    """Labels corrected with the batch's statistics."""
    training.student.eval = training.student.train


MISTAKES = {  # of each mode: functions that change its training, and settings
    "memo": (
        (tanh_gelu, zero_padding, decayed_biases, global_clip, early_teachers, eval_teachers, joint_heads),
        MISTAKEN_MEMO_SETTINGS,
    ),
    "sdpn": (
        (averaged_prototypes, rows_first, koleo_of_all_views),
        {"sinkhorn_iterations": 2, "sharpening": 1, "mean_entropy_weight": 0.0, "koleo_weight": 0.101},
    ),
    "rdino": (
        (ramp_by_epoch, regularized_directions, regularized_global_views, biased_variance),
        {"regularizer": [0.2, 0.2], "regularizer_warmup_epochs": 4, "variance_weight": 9.9, "covariance_weight": 0.0},
    ),
    "partners": ((skipped_equal_views,), {"contrastive_margin": 0.0, "contrastive_logit_scale": 33.0}),
    "pseudo_labels": (
        (open_loss_gate, late_loss_gate, correction_by_cosines, correction_in_train_mode),
        {
            "margin": 0.0,
            "margin_warmup_steps": 1,
            "scale": 11.9,
            "correct_labels_after_epochs": 3,
            "correction_probability": 0.0,
            "correction_temperature": 0.2,
        },
    ),
}


def mistaken_losses(
    mode: str, config: dict, students: dict[str, Branch], batches: list, dtype: torch.dtype
) -> dict[str, np.ndarray]:
    """Returns the losses {name: [steps, columns]} of the same steps taken with one mistake each."""
    functions, settings = MISTAKES[mode]
    runs = [(function.__name__, {}, function) for function in functions]
    runs += [(key, {key: value}, lambda training: None) for key, value in settings.items()]
    losses = {}
    for name, changes, mistake in runs:
        training = TRAININGS[mode](config | changes, copy.deepcopy(students), dtype)
        mistake(training)
        losses[name] = np.array([training.take_step(i, **batch) for i, batch in enumerate(batches)])
    return losses


def make(config: dict, options: argparse.Namespace) -> dict[str, np.ndarray]:
    """Returns a reference file's arrays, parameters in float32 whatever the steps were taken in."""
    torch.manual_seed(options.seed)
    random = np.random.default_rng(options.seed)
    students = build_students(config)
    for student in students.values():
        randomize(student)
    dtype = torch.float64 if options.float64 else torch.float32
    batches = Batches(random, options.mode, config, options.frames)
    if "speakers" in config:
        for student in students.values():
            batches.teach(student)
    torch.set_default_dtype(dtype)
    training = TRAININGS[options.mode](config, copy.deepcopy(students), dtype)
    bins = config.get("mel_bins", MEL_BINS)
    arrays = {"eval/mel": random_mel(random, 2, 1, options.frames[0], bins).astype(np.float32)}
    arrays |= {f"init/{name}": value for name, value in training.state().items() if name.startswith("student/")}
    for name, value in training.eval_embeddings("student", arrays["eval/mel"]).items():
        arrays[f"eval/embedding/{name}"] = value
    losses, taken = [], []
    for i in range(options.steps):
        taken.append(batches.next())
        arrays |= {f"step{i}/{name}": array for name, array in taken[-1].items()}
        losses.append(training.take_step(i, **taken[-1]))
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
        mistaken = mistaken_losses(options.mode, config, students, taken, dtype)
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
    training = TRAININGS[config.get("mode", "memo")](config, students, dtype)
    reached, losses = {}, []
    for name, value in training.eval_embeddings("student", file["eval/mel"]).items():
        reached[f"eval/embedding/{name}"] = value
    for i in range(len(file["losses"])):
        prefix = f"step{i}/"
        batch = {name.removeprefix(prefix): x for name, x in file.items() if name.startswith(prefix)}
        losses.append(training.take_step(i, **batch))
        reached |= {f"after{i}/{name}": value for name, value in training.state().items()}
    reached |= embedding_arrays(training, file["eval/mel"]) | {"losses": np.array(losses)}
    torch.set_default_dtype(torch.float32)
    return file | {name: value for name, value in reached.items() if name in file}


def parts(name: str) -> str:
    """Returns the part of the system, such as "student/resnet/backbone statistics", that a state's array belongs to."""
    role = name.split("/")[0]
    if role in ("center", "gate"):
        return role
    role, branch, rest = name.split("/", 2)
    statistics = " statistics" if rest.endswith(("running_mean", "running_var")) else ""
    return f"{role}/{branch}/{'backbone' if rest.startswith('backbone') else 'heads'}{statistics}"


def state_differences(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """Returns the largest and the mean difference of each part, of statistics and gate relative to their largest."""
    differences: dict[str, list[np.ndarray]] = {}
    for name in a:
        if not name.endswith(("num_batches_tracked", "weight_g")):
            scale = np.abs(b[name]).max() if "running_" in name or name.startswith("gate/") else 1.0
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


TRAININGS = {"memo": Training} | MODES
COMMON_SETTINGS = {
    "batch": 4,
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
    "base_lr_already_scaled": 0.005,
    "min_lr": 1e-4,
    "teacher_momentum": 0.8,
    "weight_decay": 0.5,
    "clip_per_parameter": 0.3,
    "freeze_last_layer_epochs": 1,
    "sgd_momentum": 0.85,
}
OPTION_SETTINGS = COMMON_SETTINGS | {
    "batch": 6,
    "mel_bins": 8,
    "resnet_blocks": [1, 1, 1, 1],
    "embed_dim": 8,
    "prototypes": 24,
    "head_hidden": 12,
    "head_bottleneck": 6,
    "head_std": 0.5,
    "freeze_last_layer_epochs": 0,
    "base_lr_already_scaled": 0.02,
    "clip_per_parameter": 3.0,  # hardly ever: a clipped gradient would hide a wrong weight of its loss
}
SETTINGS = {
    "memo": COMMON_SETTINGS
    | {
        "ecapa_channels": [16, 16, 16, 16, 48],
        "resnet_blocks": [1, 1, 1, 1],
        "cross_weight": 0.7,
        "contrastive_weight": 0.5,
        "contrastive_temperature": 0.2,
        "contrastive_scale": 1 / 0.07,
    },
    "sdpn": OPTION_SETTINGS
    | {
        "base_lr_already_scaled": 0.005,
        "student_temp": 0.1,
        "sharpening": 4,
        "sinkhorn_iterations": 3,
        "mean_entropy_weight": 1.0,
        "koleo_weight": 0.1,
    },
    "rdino": OPTION_SETTINGS
    | {"regularizer": [0.05, 0.2], "regularizer_warmup_epochs": 1.5, "variance_weight": 10.0, "covariance_weight": 1.0},
    "partners": OPTION_SETTINGS
    | {"contrastive_weight": 0.5, "contrastive_logit_scale": 33.3, "contrastive_margin": 0.1},
    "pseudo_labels": OPTION_SETTINGS
    | {
        "utterances": 12,
        "speakers": 4,
        "wrong_labels": 3,
        "voice_noise": 0.1,
        "speaker_norm": 0.3,
        "supervised_weight": 0.7,
        "scale": 12.0,
        "margin": 0.2,
        "margin_warmup_steps": 4,
        "correct_labels_after_epochs": 2,
        "correction_temperature": 0.1,
        "correction_probability": 0.5,
    },
}
SEED_OF_PSEUDO_LABELS = 14
HEADS_OF_MODES = {"sdpn": ["self"], "rdino": ["self"], "partners": [], "pseudo_labels": []}
COLUMNS_OF_MODES = {
    "sdpn": ["self", "mean_entropy", "koleo"],
    "rdino": ["self", "variance", "covariance"],
    "partners": ["contrastive"],
    "pseudo_labels": ["supervised"],
}


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    modes = argparse.ArgumentParser(add_help=False)
    modes.add_argument("--mode", choices=SETTINGS, default="memo", help="what the steps are of")
    mode = modes.parse_known_args(arguments)[0].mode
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    formatter = argparse.ArgumentDefaultsHelpFormatter
    making = commands.add_parser("make", help="write a reference file", formatter_class=formatter, parents=[modes])
    making.add_argument("output", type=Path, help="npz to write")
    gated, memo = mode == "pseudo_labels", mode == "memo"
    # With this seed, pseudo-labels of every kind occur: kept, left out, corrected.
    making.add_argument("--seed", type=int, default=SEED_OF_PSEUDO_LABELS if gated else 8)
    making.add_argument("--steps", type=int, default=6 if gated else 4)
    making.add_argument(
        "--keep",
        type=int,
        nargs="*",
        default=[1, 5] if gated else [0, 3] if memo else [0],
        help="steps whose state is written",
    )
    names = KEPT_TENSORS if memo else KEPT_OPTION_TENSORS
    making.add_argument("--names", default=names, help="regular expression of the tensors in a written state")
    making.add_argument("--float64", action="store_true", help="take the steps in float64")
    making.add_argument("--mistakes", action="store_true", help="write the losses of mistaken steps, too")
    making.add_argument(
        "--frames", type=int, nargs=2, default=[24, 16] if memo else [17, 9], help="frames of long and of short views"
    )
    sizes = SETTINGS[mode]
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
    config = {name: getattr(options, name) for name in sizes}
    if memo:
        config["loss_columns"] = LOSS_COLUMNS
    else:
        columns = [f"{kind}/resnet" for kind in COLUMNS_OF_MODES[mode]]
        config |= {"mode": mode, "branches": ["resnet"], "heads": HEADS_OF_MODES[mode], "loss_columns": columns}
    if options.steps > config["epochs"] * config["steps_per_epoch"]:
        parser.error(f"{options.steps} steps do not fit into {config['epochs']} epochs of {config['steps_per_epoch']}")
    write_npz(options.output, make(config, options))
    return 0


if __name__ == "__main__":
    sys.exit(main())
