"""Takes MeMo training steps in PyTorch and writes them as a reference file, or replays such a file.

    python experiments/make_reference.py make OUTPUT [--batch 4 --steps 4 …]
    python experiments/make_reference.py replay FILE [--float64-output OUTPUT]

`replay` prints how far float32 and float64 replays lie from the file and from one another: the file's rounding noise.

An implementation of its own, sharing nothing with memo_jax, so that `experiments/parity.py` compares two programs. It
needs PyTorch and the package speakerlab-slim (ECAPA-TDNN in speechbrain's form, ResNet34 in wespeaker's); neither
memo_jax nor its tests do. Everything is written out step by step and pair by pair, as the recipes' formulae are.
"""

import argparse
import copy
import io
import json
import math
import os
import re
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from speakerlab.models.ecapa_tdnn.ECAPA_TDNN import ECAPA_TDNN
from speakerlab.models.resnet.ResNet import ResNet
from torch import nn

BRANCHES = ("ecapa", "resnet")
MEL_BINS = 80
GLOBAL_VIEWS, LOCAL_VIEWS = 2, 4
LOSS_COLUMNS = [f"{kind}/{branch}" for kind in ("self", "cross", "contrastive") for branch in BRANCHES]
TSTP_VARIANCE_FLOOR = 1e-7  # wespeaker's; speakerlab's own pooling has 1e-8


class StatisticsPooling(nn.Module):
    """Mean and standard deviation over time of every channel and frequency, as wespeaker's TSTP."""

    def forward(self, x):
        deviation = torch.sqrt(torch.var(x, dim=-1) + TSTP_VARIANCE_FLOOR)
        return torch.cat([x.mean(dim=-1).flatten(1), deviation.flatten(1)], dim=1)


class Prototypes(nn.Module):
    """Weight-normed linear layer without bias, its gain fixed at one."""

    def __init__(self, inputs: int, prototypes: int):
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(prototypes, 1), requires_grad=False)
        self.weight_v = nn.Parameter(torch.empty(prototypes, inputs).uniform_(-1, 1) / math.sqrt(inputs))

    def forward(self, x):
        return F.linear(x, self.weight_v * (self.weight_g / self.weight_v.norm(dim=1, keepdim=True)))


class Head(nn.Module):
    """DINO head: three linear layers, L2 normalisation, prototypes."""

    def __init__(self, inputs: int, hidden: int, bottleneck: int, prototypes: int):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(inputs, hidden), nn.BatchNorm1d(hidden), nn.GELU(),
            nn.Linear(hidden, hidden), nn.BatchNorm1d(hidden), nn.GELU(),
            nn.Linear(hidden, bottleneck),
        )
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.last_layer = Prototypes(bottleneck, prototypes)

    def forward(self, x):
        return self.last_layer(F.normalize(self.mlp(x), dim=-1))


class Branch(nn.Module):
    """A backbone with a self-head and a cross-head."""

    def __init__(self, name: str, config: dict):
        super().__init__()
        if name == "ecapa":
            self.backbone = ECAPA_TDNN(MEL_BINS, lin_neurons=config["embed_dim"], channels=config["ecapa_channels"])
        else:
            self.backbone = ResNet(
                m_channels=config["resnet_base_channels"], feat_dim=MEL_BINS, embedding_size=config["embed_dim"],
                two_emb_layer=False,
            )
            self.backbone.pool = StatisticsPooling()
        sizes = config["embed_dim"], config["head_hidden"], config["head_bottleneck"], config["prototypes"]
        self.self_head = Head(*sizes)
        self.cross_head = Head(*sizes)


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


def build_students(config: dict) -> dict[str, Branch]:
    """Returns freshly initialised students."""
    return {name: Branch(name, config) for name in BRANCHES}


def normalized_log_mel(mel: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """Returns log-mel [N, T, 80] of mel power [N, 80, T], of mean 0 and variance 1 over time."""
    log = torch.log(torch.from_numpy(mel.astype(np.float32)).to(dtype) + 1e-6)
    return F.instance_norm(log, eps=1e-5).transpose(1, 2)


def distillation_loss(student, teacher, center, student_temp: float, teacher_temp: float):
    """Returns the mean cross-entropy over pairs of a teacher view and another student view (lists of logits [B, K])."""
    total, pairs = 0.0, 0
    for i, teacher_logits in enumerate(teacher):
        target = F.softmax((teacher_logits - center) / teacher_temp, dim=-1).detach()
        for v, student_logits in enumerate(student):
            if v == i:
                continue
            total = total - (target * F.log_softmax(student_logits / student_temp, dim=-1)).sum(dim=-1).mean()
            pairs += 1
    return total / pairs


def contrastive_loss(student, teacher, temperature: float):
    """Returns NT-Xent between a teacher's and a student's embeddings [B, D] of the same utterances."""
    batch = len(student)
    rows = F.normalize(torch.cat([teacher.detach(), student]), dim=-1)
    similarity = (rows @ rows.T / temperature).masked_fill(torch.eye(2 * batch, dtype=torch.bool), float("-inf"))
    positives = torch.cat([torch.arange(batch, 2 * batch), torch.arange(batch)])
    return F.cross_entropy(similarity, positives)


def learning_rates(config: dict) -> np.ndarray:
    """Returns the learning rate of every step: linear from 0 to the peak, then cosine."""
    total, warm = (config[key] * config["steps_per_epoch"] for key in ("epochs", "warmup_epochs"))
    peak, end = config["base_lr_already_scaled"], config["min_lr"]
    falling = end + 0.5 * (peak - end) * (1 + np.cos(np.pi * np.arange(total - warm) / max(total - warm, 1)))
    return np.concatenate([np.linspace(0, peak, warm), falling])


def teacher_momenta(config: dict) -> np.ndarray:
    """Returns the teacher's momentum of every step: cosine to 1."""
    total = config["epochs"] * config["steps_per_epoch"]
    return 1 + 0.5 * (config["teacher_momentum"] - 1) * (1 + np.cos(np.pi * np.arange(total) / total))


def teacher_temperature(config: dict, step: int) -> float:
    """Returns τ_t of a step: one value an epoch."""
    warm = np.linspace(*config["teacher_temp"], config["teacher_temp_warmup_epochs"])
    epoch = step // config["steps_per_epoch"]
    return float(warm[epoch]) if epoch < len(warm) else config["teacher_temp"][1]


class Training:
    """Students, teachers, centres and SGD, taken one step at a time."""

    def __init__(self, config: dict, students: dict[str, Branch], dtype: torch.dtype = torch.float32):
        self.config, self.dtype = config, dtype
        self.students = {name: student.to(dtype).train() for name, student in students.items()}
        self.teachers = copy.deepcopy(self.students)
        self.learning_rates, self.momenta = learning_rates(config), teacher_momenta(config)
        self.centers = {
            (kind, name): torch.zeros(1, config["prototypes"], dtype=dtype)
            for kind in ("self", "cross") for name in BRANCHES
        }
        trained = [p for s in self.students.values() for p in s.parameters() if p.requires_grad]
        # PyTorch's SGD adds the decay to the gradient before the momentum, and skips a parameter without gradient.
        self.optimizer = torch.optim.SGD(
            [
                {"params": [p for p in trained if p.ndim > 1], "weight_decay": config["weight_decay"]},
                {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0},
            ],
            lr=0.0, momentum=config["sgd_momentum"],
        )

    def student_outputs(self, branch: Branch, inputs) -> dict[str, list[torch.Tensor]]:
        """Returns global embeddings and both heads' logits, view by view; batch norms see global, then local views."""
        embeddings = [branch.backbone(x) for x in inputs]
        outputs = {"embedding": list(embeddings[0].split(self.config["batch"]))}
        for head in ("self", "cross"):
            project = getattr(branch, f"{head}_head")
            outputs[head] = [view for e in embeddings for view in project(e).split(self.config["batch"])]
        return outputs

    @torch.no_grad()
    def teacher_outputs(self, branch: Branch, inputs) -> dict[str, list[torch.Tensor]]:
        """Returns the teacher's embeddings and both heads' logits of the global views, view by view."""
        embedding = branch.backbone(inputs[0])
        outputs = {"embedding": embedding, "self": branch.self_head(embedding), "cross": branch.cross_head(embedding)}
        return {key: list(value.split(self.config["batch"])) for key, value in outputs.items()}

    def take_step(self, step: int, global_mel: np.ndarray, local_mel: np.ndarray) -> list[float]:
        """Takes one step on view-major mel power [V·B, 80, T]; returns the loss columns."""
        config = self.config
        inputs = [normalized_log_mel(mel, self.dtype) for mel in (global_mel, local_mel)]
        teachers = {name: self.teacher_outputs(teacher, inputs) for name, teacher in self.teachers.items()}
        students = {name: self.student_outputs(student, inputs) for name, student in self.students.items()}
        temperatures = config["student_temp"], teacher_temperature(config, step)

        # The centre "cross/<branch>" belongs to the loss of that student, so it is the *other* teacher's.
        targets = {
            (kind, name): teachers[name if kind == "self" else other][kind]
            for name, other in (BRANCHES, BRANCHES[::-1]) for kind in ("self", "cross")
        }
        losses, total = {}, 0.0
        for (kind, name), target in targets.items():
            loss = distillation_loss(students[name][kind], target, self.centers[kind, name], *temperatures)
            losses[f"{kind}/{name}"] = loss
            total = total + (loss if kind == "self" else config["cross_weight"] * loss)
        for name in BRANCHES:
            ours, theirs = students[name]["embedding"], teachers[name]["embedding"]
            pairs = [(i, j) for i in range(GLOBAL_VIEWS) for j in range(GLOBAL_VIEWS) if i != j]
            loss = sum(contrastive_loss(ours[j], theirs[i], config["contrastive_temperature"]) for i, j in pairs)
            loss = config["contrastive_weight"] * config["contrastive_scale"] * loss / len(pairs)
            losses[f"contrastive/{name}"] = loss
            total = total + loss

        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        self.optimize(step)
        self.move_teachers(step)
        for key, target in targets.items():
            mean = torch.cat(target).mean(dim=0, keepdim=True)
            self.centers[key] = config["center_momentum"] * self.centers[key] + (1 - config["center_momentum"]) * mean
        return [float(losses[column].detach()) for column in LOSS_COLUMNS]

    @torch.no_grad()
    def optimize(self, step: int) -> None:
        """Clips the gradients, drops those of frozen prototypes, steps the optimiser."""
        self.clip()
        if step < self.config["freeze_last_layer_epochs"] * self.config["steps_per_epoch"]:
            self.freeze_prototypes()
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rates[step]
        self.optimizer.step()

    def clip(self) -> None:
        """Scales every tensor's gradient down to the clip's norm, each by itself."""
        for student in self.students.values():
            for parameter in student.parameters():
                if parameter.grad is not None:
                    coefficient = self.config["clip_per_parameter"] / (parameter.grad.norm() + 1e-6)
                    if coefficient < 1:
                        parameter.grad.mul_(coefficient)

    def freeze_prototypes(self) -> None:
        """Takes the prototypes' gradients away."""
        for student in self.students.values():
            for head in (student.self_head, student.cross_head):
                head.last_layer.weight_v.grad = None

    @torch.no_grad()
    def move_teachers(self, step: int) -> None:
        """Moves the teachers' parameters towards the students'."""
        momentum = self.momenta[step]
        for name in BRANCHES:
            for old, new in zip(self.teachers[name].parameters(), self.students[name].parameters(), strict=True):
                old.mul_(momentum).add_(new, alpha=1 - momentum)

    def state(self) -> dict[str, np.ndarray]:
        """Returns students, teachers and centres as named arrays."""
        arrays = {f"center/{kind}/{name}": center.numpy().copy() for (kind, name), center in self.centers.items()}
        for role, models in (("student", self.students), ("teacher", self.teachers)):
            for name, model in models.items():
                for key, tensor in model.state_dict().items():
                    arrays[f"{role}/{name}/{key}"] = tensor.numpy().copy()
        return arrays

    @torch.no_grad()
    def eval_embeddings(self, role: str, mel: np.ndarray) -> dict[str, np.ndarray]:
        """Returns the eval-mode embeddings of mel power [N, 80, T], by branch."""
        embeddings = {}
        for name, model in (self.students if role == "student" else self.teachers).items():
            embeddings[name] = model.eval().backbone(normalized_log_mel(mel, self.dtype)).numpy().copy()
            model.train()
        return embeddings


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


MISTAKES = (
    tanh_gelu, zero_padding, decayed_biases, global_clip, early_teachers, eval_teachers, joint_heads
)
MISTAKEN_SETTINGS = {
    "teacher_momentum": 0.81, "center_momentum": 0.81, "teacher_temp": [0.05, 0.082], "sgd_momentum": 0.8,
    "base_lr_already_scaled": 0.0031, "cross_weight": 0.75, "freeze_last_layer_epochs": 0,
    "clip_per_parameter": 0.31, "contrastive_weight": 0.501,
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
                f"after{i}/{name}": value for name, value in training.state().items()
                if value.size <= options.largest and re.search(options.names, name)
            }
    for role in ("student", "teacher"):
        for name, value in training.eval_embeddings(role, arrays["eval/mel"]).items():
            arrays[f"eval_after_last/{role}/embedding/{name}"] = value
    arrays = {
        name: value.astype(np.float32) if value.dtype == np.float64 else value
        for name, value in arrays.items() if not name.endswith("num_batches_tracked")
    }
    arrays |= {"config": np.array(json.dumps(config)), "losses": np.array(losses)}
    arrays |= {"schedule/lr": training.learning_rates[: len(losses)], "schedule/momentum": training.momenta[: len(losses)]}
    if options.mistakes:
        mistaken = mistaken_losses(config, students, mels, dtype)
        arrays |= {f"mistake/{name}/losses": value for name, value in mistaken.items()}
    return arrays


def replay(file, dtype: torch.dtype) -> tuple[np.ndarray, dict[int, dict[str, np.ndarray]]]:
    """Returns the losses and, for the steps whose state the file holds, the states of the file's steps taken again."""
    torch.set_default_dtype(dtype)
    config = json.loads(str(file["config"]))
    students = build_students(config)
    for name, student in students.items():
        prefix = f"init/student/{name}/"
        names = [key for key in file.files if key.startswith(prefix)]
        student.load_state_dict({key[len(prefix):]: torch.from_numpy(file[key]) for key in names})
    training = Training(config, students, dtype)
    losses, states = [], {}
    for i in range(len(file["losses"])):
        losses.append(training.take_step(i, file[f"step{i}/global_mel"], file[f"step{i}/local_mel"]))
        if any(name.startswith(f"after{i}/") for name in file.files):
            states[i] = training.state()
    torch.set_default_dtype(torch.float32)
    return np.array(losses), states


def parts(name: str) -> str:
    """Returns the part of the system, such as "student/resnet/backbone statistics", that a state's array belongs to."""
    role, branch, rest = name.split("/", 2)
    if role == "center":
        return "center"
    statistics = " statistics" if rest.endswith(("running_mean", "running_var")) else ""
    return f"{role}/{branch}/{'backbone' if rest.startswith('backbone') else 'heads'}{statistics}"


def state_differences(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """Returns the largest and the mean absolute difference in each part; of statistics relative to the tensor's largest."""
    differences: dict[str, list[np.ndarray]] = {}
    for name in sorted(a.keys() & b.keys()):
        if not name.endswith(("num_batches_tracked", "weight_g")):
            scale = np.abs(b[name]).max() if "running_" in name else 1.0
            differences.setdefault(parts(name), []).append(np.abs(a[name] - b[name]).ravel() / scale)
    return {
        part: {"max": float(np.concatenate(d).max()), "mean": float(np.concatenate(d).mean())}
        for part, d in differences.items()
    }


def compare(file, runs: dict) -> dict:
    """Returns how far replays {"float32": …, "float64": …} lie from the file and from one another."""
    states = sorted(runs["float32"][1])
    runs = dict(runs)
    runs["file"] = file["losses"], {
        i: {n.split("/", 1)[1]: file[n] for n in file.files if n.startswith(f"after{i}/")} for i in states
    }
    result = {}
    for a, b in (("float32", "file"), ("float64", "file"), ("float32", "float64")):
        result[f"{a} against {b}"] = {
            "losses": np.abs(runs[a][0] / runs[b][0] - 1).max(axis=1).tolist(),
            **{f"after{i}": state_differences(runs[a][1][i], runs[b][1][i]) for i in states},
        }
    return result


def replaced_by(run, file) -> dict[str, np.ndarray]:
    """Returns a file's arrays, its losses and states replaced by a replay's."""
    losses, states = run
    arrays = {name: file[name] for name in file.files if not name.startswith("after")} | {"losses": losses}
    for i, state in states.items():
        arrays |= {f"after{i}/{name}": value for name, value in state.items() if f"after{i}/{name}" in file.files}
    return arrays


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
    making = commands.add_parser("make", help="write a reference file", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    making.add_argument("output", type=Path, help="npz to write")
    making.add_argument("--seed", type=int, default=4)
    making.add_argument("--steps", type=int, default=4)
    making.add_argument("--keep", type=int, nargs="*", default=[0, 3], help="steps whose state is written")
    making.add_argument("--largest", type=int, default=10**9, help="most numbers in a tensor of a written state")
    making.add_argument("--names", default="", help="regular expression of the tensors in a written state")
    making.add_argument("--float64", action="store_true", help="take the steps in float64")
    making.add_argument("--mistakes", action="store_true", help="write the losses of mistaken steps, too")
    making.add_argument("--frames", type=int, nargs=2, default=[24, 16], help="frames of global and of local views")
    sizes = {
        "batch": 4, "ecapa_channels": [16, 16, 16, 16, 48], "resnet_base_channels": 2, "embed_dim": 12, "prototypes": 96,
        "head_hidden": 20, "head_bottleneck": 8, "epochs": 3, "steps_per_epoch": 2, "warmup_epochs": 0,
        "teacher_temp": [0.05, 0.08], "teacher_temp_warmup_epochs": 2, "student_temp": 0.12, "center_momentum": 0.8,
        "cross_weight": 0.7, "contrastive_weight": 0.5, "contrastive_temperature": 0.2,
        "contrastive_scale": 1 / 0.07, "base_lr_already_scaled": 0.003, "min_lr": 1e-4, "teacher_momentum": 0.8,
        "weight_decay": 0.05, "clip_per_parameter": 0.3, "freeze_last_layer_epochs": 1, "sgd_momentum": 0.85,
    }
    for name, default in sizes.items():
        many = isinstance(default, list)
        kind = type(default[0] if many else default)
        making.add_argument(f"--{name.replace('_', '-')}", type=kind, nargs=len(default) if many else None, default=default)
    replaying = commands.add_parser("replay", help="print a file's rounding noise as JSON")
    replaying.add_argument("file", type=Path)
    replaying.add_argument("--float64-output", type=Path, help="write the file with the float64 losses and states")
    options = parser.parse_args(arguments)
    if options.command == "replay":
        file = np.load(options.file, allow_pickle=False)
        runs = {"float32": replay(file, torch.float32), "float64": replay(file, torch.float64)}
        print(json.dumps(compare(file, runs), indent=1))
        if options.float64_output:
            write_npz(options.float64_output, replaced_by(runs["float64"], file))
        return 0
    config = {name: getattr(options, name) for name in sizes} | {"loss_columns": LOSS_COLUMNS}
    if options.steps > config["epochs"] * config["steps_per_epoch"]:
        parser.error(f"{options.steps} steps do not fit into {config['epochs']} epochs of {config['steps_per_epoch']}")
    write_npz(options.output, make(config, options))
    return 0


if __name__ == "__main__":
    sys.exit(main())
