"""MeMo's training step in PyTorch, independent of memo_jax, for experiments/make_reference.py.

Everything is written out step by step and pair by pair, as the recipes' formulae are. The backbones are those of the
package speakerlab-slim: ECAPA-TDNN in speechbrain's form, ResNet34 in wespeaker's. The ECAPA-TDNN's own forward tries
its layers with an argument that some refuse, so torch.compile makes a graph of each layer, not one of the network.
"""

import copy
import math

import numpy as np
import torch
import torch.nn.functional as F
from speakerlab.models.ecapa_tdnn.ECAPA_TDNN import ECAPA_TDNN
from speakerlab.models.resnet.ResNet import ResNet
from torch import nn

BRANCHES = ("ecapa", "resnet")
HEADS = ("self", "cross")
MEL_BINS = 80
GLOBAL_VIEWS, LOCAL_VIEWS = 2, 4
LOSS_COLUMNS = [f"{kind}/{branch}" for kind in (*HEADS, "contrastive") for branch in BRANCHES]
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

    def __init__(self, inputs: int, hidden: int, bottleneck: int, prototypes: int, std: float):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(inputs, hidden),
            nn.BatchNorm1d(hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden),
            nn.BatchNorm1d(hidden),
            nn.GELU(),
            nn.Linear(hidden, bottleneck),
        )
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=std)
                nn.init.zeros_(layer.bias)
        self.last_layer = Prototypes(bottleneck, prototypes)

    def forward(self, x):
        return self.last_layer(F.normalize(self.mlp(x), dim=-1))


class Branch(nn.Module):
    """A backbone with its heads, of which a config may name others than MeMo's self-head and cross-head."""

    def __init__(self, name: str, config: dict):
        super().__init__()
        mel_bins = config.get("mel_bins", MEL_BINS)
        if name == "ecapa":
            self.backbone = ECAPA_TDNN(mel_bins, lin_neurons=config["embed_dim"], channels=config["ecapa_channels"])
        else:
            self.backbone = ResNet(
                num_blocks=config.get("resnet_blocks", [3, 4, 6, 3]),
                m_channels=config["resnet_base_channels"],
                feat_dim=mel_bins,
                embedding_size=config["embed_dim"],
                two_emb_layer=False,
            )
            self.backbone.pool = StatisticsPooling()
        sizes = config["embed_dim"], config["head_hidden"], config["head_bottleneck"], config["prototypes"]
        for head in config.get("heads", HEADS):
            self.add_module(f"{head}_head", Head(*sizes, config.get("head_std", 0.02)))
        if "speakers" in config:
            self.speaker_head = nn.Linear(config["embed_dim"], config["speakers"], bias=False)


def build_students(config: dict) -> dict[str, Branch]:
    """Returns freshly initialised students."""
    return {name: Branch(name, config) for name in config.get("branches", BRANCHES)}


def normalized_log_mel(mel: np.ndarray | torch.Tensor, dtype: torch.dtype, device: str = "cpu") -> torch.Tensor:
    """Returns log-mel [N, T, 80] of mel power [N, 80, T], of mean 0 and variance 1 over time."""
    log = torch.log(torch.as_tensor(mel, dtype=torch.float32).to(device, dtype) + 1e-6)
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


def contrastive_loss(student, teacher, temperature: float, margin: float = 0.0):
    """Returns (AM-)NT-Xent between a teacher's and a student's embeddings [B, D] of the same utterances."""
    batch = len(student)
    rows = F.normalize(torch.cat([teacher.detach(), student]), dim=-1)
    itself = torch.eye(2 * batch, dtype=torch.bool, device=rows.device)
    positives = torch.cat([torch.arange(batch, 2 * batch), torch.arange(batch)]).to(rows.device)
    cosines = rows @ rows.T - margin * F.one_hot(positives, 2 * batch).to(rows.dtype)
    return F.cross_entropy((cosines / temperature).masked_fill(itself, float("-inf")), positives)


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
    """Returns τ_t of a step: one value per epoch."""
    warm = np.linspace(*config["teacher_temp"], config["teacher_temp_warmup_epochs"])
    epoch = step // config["steps_per_epoch"]
    return float(warm[epoch]) if epoch < len(warm) else config["teacher_temp"][1]


class Training:
    """Students, teachers, centres and SGD, taken one step at a time.

    `autocast` is the type that PyTorch computes in where it deems that safe.
    """

    def __init__(
        self,
        config: dict,
        students: dict[str, Branch],
        dtype: torch.dtype = torch.float32,
        *,
        device: str = "cpu",
        autocast: torch.dtype | None = None,
    ):
        self.config, self.dtype, self.device, self.autocast = config, dtype, device, autocast
        self.distillation_loss = distillation_loss
        self.students = {name: student.to(device, dtype).train() for name, student in students.items()}
        self.teachers = copy.deepcopy(self.students)
        self.learning_rates, self.momenta = learning_rates(config), teacher_momenta(config)
        self.centers = {
            (kind, name): torch.zeros(1, config["prototypes"], dtype=dtype, device=device)
            for kind in config.get("heads", HEADS)
            for name in students
        }
        trained = [p for s in self.students.values() for p in s.parameters() if p.requires_grad]
        # PyTorch's SGD adds the decay to the gradient before the momentum, and skips a parameter without gradient.
        self.optimizer = torch.optim.SGD(
            [
                {"params": [p for p in trained if p.ndim > 1], "weight_decay": config["weight_decay"]},
                {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0},
            ],
            lr=0.0,
            momentum=config["sgd_momentum"],
        )

    def compile(self) -> None:
        """Compiles the networks and the distillation loss with torch.compile, for each of their shapes."""
        # Blocks of a class share a limit of 8 graphs, beyond which they would run uncompiled. PyTorch 2.6 has it under
        # another name.
        limits = torch._dynamo.config
        setattr(limits, "recompile_limit" if hasattr(limits, "recompile_limit") else "cache_size_limit", 64)
        for branch in (*self.students.values(), *self.teachers.values()):
            for part in (branch.backbone, branch.self_head, branch.cross_head):
                part.compile(dynamic=False)
        self.distillation_loss = torch.compile(distillation_loss, dynamic=False)

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

    def take_step(self, step: int, *mels: np.ndarray, **batch: np.ndarray) -> list[float]:
        """Takes one step on what `losses` takes, as view-major mel power [V·B, 80, T]; returns the loss columns."""
        with torch.autocast(self.device, self.autocast, enabled=self.autocast is not None):
            losses, total, targets = self.losses(step, *mels, **batch)
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        self.optimize(step)
        self.move_teachers(step)
        for key, target in targets.items():
            mean = torch.cat(target).mean(dim=0, keepdim=True)
            momentum = self.config["center_momentum"]
            self.centers[key] = momentum * self.centers[key] + (1 - momentum) * mean
        return [float(losses[column].detach()) for column in self.config.get("loss_columns", LOSS_COLUMNS)]

    def losses(self, step: int, global_mel: np.ndarray, local_mel: np.ndarray):
        """Returns the loss columns by name, what is to be minimised, and the teachers' logits by centre."""
        config = self.config
        inputs = [normalized_log_mel(mel, self.dtype, self.device) for mel in (global_mel, local_mel)]
        teachers = {name: self.teacher_outputs(teacher, inputs) for name, teacher in self.teachers.items()}
        students = {name: self.student_outputs(student, inputs) for name, student in self.students.items()}
        temperatures = config["student_temp"], teacher_temperature(config, step)

        # The centre "cross/<branch>" belongs to the loss of that student, so it is the *other* teacher's.
        targets = {
            (kind, name): teachers[name if kind == "self" else other][kind]
            for name, other in (BRANCHES, BRANCHES[::-1])
            for kind in HEADS
        }
        losses, total = {}, 0.0
        for (kind, name), target in targets.items():
            loss = self.distillation_loss(students[name][kind], target, self.centers[kind, name], *temperatures)
            losses[f"{kind}/{name}"] = loss
            total = total + (loss if kind == "self" else config["cross_weight"] * loss)
        for name in BRANCHES:
            ours, theirs = students[name]["embedding"], teachers[name]["embedding"]
            pairs = [(i, j) for i in range(GLOBAL_VIEWS) for j in range(GLOBAL_VIEWS) if i != j]
            loss = sum(contrastive_loss(ours[j], theirs[i], config["contrastive_temperature"]) for i, j in pairs)
            loss = config["contrastive_weight"] * config["contrastive_scale"] * loss / len(pairs)
            losses[f"contrastive/{name}"] = loss
            total = total + loss
        return losses, total, targets

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
                    parameter.grad.mul_(coefficient.clamp(max=1))  # an `if` would wait for the GPU

    def freeze_prototypes(self) -> None:
        """Takes the prototypes' gradients away."""
        for student in self.students.values():
            for head in self.config.get("heads", HEADS):
                getattr(student, f"{head}_head").last_layer.weight_v.grad = None

    @torch.no_grad()
    def move_teachers(self, step: int) -> None:
        """Moves the teachers' parameters towards the students'."""
        momentum = self.momenta[step]
        for name in self.students:
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
