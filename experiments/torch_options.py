"""Training steps beyond MeMo's in PyTorch, independent of memo_jax, for experiments/make_reference.py.

SDPN, DINO with RDINO's regulariser, AM-NT-Xent with the teacher on crops of other recordings, and AAM-softmax on
pseudo-labels with loss gate and label correction: one branch each, in the optimiser, schedules and teacher of
torch_steps.py. A step's `<kind>_mel` is view-major mel power [V·B, F, T].
"""

import math

import numpy as np
import torch
import torch.nn.functional as F

from torch_steps import Training, contrastive_loss, distillation_loss, normalized_log_mel, teacher_temperature


class SingleBranch(Training):
    """One student and its teacher."""

    def __init__(self, *arguments, **settings):
        super().__init__(*arguments, **settings)
        ((self.name, self.student),) = self.students.items()
        self.teacher = self.teachers[self.name]

    def inputs(self, mel: np.ndarray) -> torch.Tensor:
        """Returns a network's input [V·B, T, F]."""
        return normalized_log_mel(mel, self.dtype, self.device)

    def views(self, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Returns rows [V·B, …] view by view."""
        return rows.split(self.config["batch"])

    def outcome(self, losses: dict[str, torch.Tensor], targets=()):
        """Returns what `losses` returns: these (weighted) losses are to be minimised."""
        return {f"{kind}/{self.name}": loss for kind, loss in losses.items()}, sum(losses.values()), dict(targets)


class SDPN(SingleBranch):
    """One view as recorded for the teacher, short ones for the student, whose prototypes both use."""

    def losses(self, step: int, teacher_mel: np.ndarray, local_mel: np.ndarray):
        """Returns cross-entropy, mean-entropy term and KoLeo, weighted."""
        config = self.config
        embeddings = self.student.backbone(self.inputs(local_mel))
        probabilities = self.probabilities(self.student.self_head.mlp(embeddings))
        with torch.no_grad():
            teacher_rows = self.teacher.self_head.mlp(self.teacher.backbone(self.inputs(teacher_mel)))
            targets = self.probabilities(teacher_rows) ** config["sharpening"]
            targets = self.balance(targets / targets.sum(dim=1, keepdim=True))
        cross_entropies = [-(targets * view.log()).sum(dim=1).mean() for view in self.views(probabilities)]
        mean = probabilities.mean(dim=0)
        return self.outcome(
            {
                "self": sum(cross_entropies) / len(cross_entropies),
                "mean_entropy": config["mean_entropy_weight"] * (math.log(len(mean)) + (mean * mean.log()).sum()),
                "koleo": config["koleo_weight"] * sum(self.koleo(view) for view in self.views(embeddings)),
            }
        )

    def prototypes(self) -> torch.Tensor:
        """Returns the prototypes [K, P] of student and teacher."""
        return self.student.self_head.last_layer.weight_v

    def probabilities(self, projections: torch.Tensor) -> torch.Tensor:
        """Returns the probabilities [N, K] of the prototypes by their cosines with projections [N, P]."""
        cosines = F.normalize(projections, dim=1) @ F.normalize(self.prototypes(), dim=1).T
        return F.softmax(cosines / self.config["student_temp"], dim=1)

    def balance(self, targets: torch.Tensor) -> torch.Tensor:
        """Returns targets [B, K] after Sinkhorn's iterations: every prototype's sum is made 1, then every row's."""
        for _ in range(self.config["sinkhorn_iterations"]):
            targets = targets / targets.sum(dim=0)
            targets = targets / targets.sum(dim=1, keepdim=True)
        return targets

    def koleo(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Returns KoLeo of a view's embeddings [B, D]."""
        units = F.normalize(embeddings, dim=1)
        others = [torch.cat([units[:i], units[i + 1 :]]) for i in range(len(units))]
        nearest = [(unit - rest).norm(dim=1).min() for unit, rest in zip(units, others, strict=True)]
        return -torch.log(torch.stack(nearest) + 1e-8).mean()

    @torch.no_grad()
    def move_teachers(self, step: int) -> None:
        """Moves the teacher, whose prototypes are the student's."""
        super().move_teachers(step)
        self.teacher.self_head.last_layer.weight_v.copy_(self.student.self_head.last_layer.weight_v)


class RDINO(SingleBranch):
    """DINO with VICReg's variance and covariance of every view's projections, whose weight λ rises step by step."""

    def losses(self, step: int, global_mel: np.ndarray, local_mel: np.ndarray):
        """Returns distillation, and the two regularisers, weighted."""
        config, head = self.config, self.student.self_head
        projections = [head.mlp(self.student.backbone(self.inputs(mel))) for mel in (global_mel, local_mel)]
        logits = [view for rows in projections for view in self.views(head.last_layer(F.normalize(rows, dim=1)))]
        with torch.no_grad():
            targets = self.views(self.teacher.self_head(self.teacher.backbone(self.inputs(global_mel))))
        temperatures = config["student_temp"], teacher_temperature(config, step)
        weight, regularized = self.regularizer_weight(step), self.regularized(projections)
        variance = sum(self.variance(view) for view in regularized) / len(regularized)
        covariance = sum(self.covariance(view) for view in regularized) / len(regularized)
        return self.outcome(
            {
                "self": distillation_loss(logits, targets, self.centers["self", self.name], *temperatures),
                "variance": weight * config["variance_weight"] * variance,
                "covariance": weight * config["covariance_weight"] * covariance,
            },
            {("self", self.name): targets},
        )

    def regularized(self, projections: list[torch.Tensor]) -> list[torch.Tensor]:
        """Returns what is regularised of the projections of each crop length: all views."""
        return [view for rows in projections for view in self.views(rows)]

    def regularizer_weight(self, step: int) -> float:
        """Returns λ of a step."""
        start, end = self.config["regularizer"]
        done = step / (self.config["regularizer_warmup_epochs"] * self.config["steps_per_epoch"])
        return start + (end - start) * min(done, 1.0)

    def variance(self, x: torch.Tensor) -> torch.Tensor:
        """Returns VICReg's hinge on the deviations of x [B, P]."""
        return F.relu(1 - torch.sqrt(x.var(dim=0) + 1e-4)).mean()

    def covariance(self, x: torch.Tensor) -> torch.Tensor:
        """Returns VICReg's sum of squared covariances of x [B, P], divided by P."""
        covariance = torch.cov(x.T)
        return (covariance - torch.diag(torch.diag(covariance))).square().sum() / x.shape[1]


class Partners(SingleBranch):
    """AM-NT-Xent alone, between the student's views and all of the teacher's, which are of other recordings."""

    def losses(self, step: int, global_mel: np.ndarray, teacher_mel: np.ndarray):
        """Returns the contrastive loss, weighted."""
        config = self.config
        ours = self.views(self.student.backbone(self.inputs(global_mel)))
        with torch.no_grad():
            theirs = self.views(self.teacher.backbone(self.inputs(teacher_mel)))
        settings = 1 / config["contrastive_logit_scale"], config["contrastive_margin"]
        pairs = [contrastive_loss(ours[j], theirs[i], *settings) for i, j in self.pairs(len(theirs), len(ours))]
        return self.outcome({"contrastive": config["contrastive_weight"] * sum(pairs) / len(pairs)})

    def pairs(self, teacher_views: int, student_views: int) -> list[tuple[int, int]]:
        """Returns the pairs of views that are compared."""
        return [(i, j) for i in range(teacher_views) for j in range(student_views)]


class PseudoLabels(SingleBranch):
    """AAM-softmax on labels of which some are wrong, with a loss gate after each epoch and label correction."""

    def __init__(self, *arguments, **settings):
        super().__init__(*arguments, **settings)
        self.utterance_losses = torch.full((self.config["utterances"],), -1.0, dtype=self.dtype)
        self.threshold = math.inf
        self.counts = []  # of each step: utterances left out, and those of them whose label is corrected

    def losses(self, step: int, global_mel: np.ndarray, clean_mel: np.ndarray, label: np.ndarray, index: np.ndarray):
        """Returns AAM-softmax, weighted."""
        config, given, index = self.config, torch.from_numpy(label).long(), torch.from_numpy(index).long()
        learned = self.learned_labels(step, given, index, clean_mel)
        embeddings = self.student.backbone(self.inputs(global_mel))
        with torch.no_grad():
            self.teacher.backbone(self.inputs(global_mel))  # for its running statistics
        margin = self.margin(step)
        rows = torch.stack([self.aam_softmax(view, learned.clamp(min=0), margin) for view in self.views(embeddings)])
        kept = rows[:, learned >= 0]
        with torch.no_grad():
            of_given = torch.stack([self.aam_softmax(view, given, margin) for view in self.views(embeddings)])
            self.utterance_losses[index] = of_given.mean(dim=0)
        return self.outcome({"supervised": config["supervised_weight"] * kept.sum() / max(kept.numel(), 1)})

    def margin(self, step: int) -> float:
        """Returns the margin of a step, in radians."""
        return self.config["margin"] * min(step / self.config["margin_warmup_steps"], 1.0)

    def aam_softmax(self, embeddings: torch.Tensor, labels: torch.Tensor, margin: float) -> torch.Tensor:
        """Returns the loss of each row of embeddings [N, D], [N]."""
        cosines = F.normalize(embeddings, dim=1) @ F.normalize(self.student.speaker_head.weight, dim=1).T
        own = cosines[torch.arange(len(labels)), labels]
        angle = torch.acos(own)
        # Beyond π the cosine would rise again; the usual replacement keeps falling.
        shifted = torch.where(angle + margin <= math.pi, torch.cos(angle + margin), own - margin * math.sin(margin))
        is_own = F.one_hot(labels, cosines.shape[1]).bool()
        logits = self.config["scale"] * torch.where(is_own, shifted[:, None], cosines)
        return F.cross_entropy(logits, labels, reduction="none")

    @torch.no_grad()
    def learned_labels(self, step: int, given: torch.Tensor, index: torch.Tensor, clean_mel) -> torch.Tensor:
        """Returns the labels [B] that a step learns, −1 for none."""
        left_out = self.left_out(index)
        epoch = step // self.config["steps_per_epoch"]
        correction = torch.full_like(given, -1)
        if epoch >= self.config["correct_labels_after_epochs"]:
            probability, likeliest = F.softmax(self.label_logits(clean_mel), dim=1).max(dim=1)
            correction = torch.where(probability > self.config["correction_probability"], likeliest, correction)
        self.counts.append((int(left_out.sum()), int((left_out & (correction >= 0)).sum())))
        return torch.where(left_out, correction, given)

    def left_out(self, index: torch.Tensor) -> torch.Tensor:
        """Returns which utterances the gate leaves out, by their last losses."""
        return self.utterance_losses[index] > self.threshold

    def label_logits(self, clean_mel: np.ndarray) -> torch.Tensor:
        """Returns the student's logits [B, labels] of crops as they were recorded."""
        embeddings = self.student.eval().backbone(self.inputs(clean_mel))
        self.student.train()
        return embeddings @ self.student.speaker_head.weight.T / self.config["correction_temperature"]

    def take_step(self, step: int, *mels: np.ndarray, **batch: np.ndarray) -> list[float]:
        """Takes one step; after an epoch, sets the gate for the next."""
        losses = super().take_step(step, *mels, **batch)
        if (step + 1) % self.config["steps_per_epoch"] == 0:
            self.threshold = loss_threshold(self.utterance_losses.numpy())
        return losses

    def state(self) -> dict[str, np.ndarray]:
        """Returns student, teacher and gate as named arrays."""
        gate = {"losses": self.utterance_losses.numpy().copy(), "threshold": np.array(self.threshold)}
        return super().state() | {f"gate/{name}": value for name, value in gate.items()}


def loss_threshold(losses: np.ndarray) -> float:
    """Returns where, between the means, two weighted Gaussians fitted to the logarithms of losses [N] are equal."""
    x = np.log(losses.astype(np.float64))
    weights, means, variances = np.full(2, 0.5), np.array([x.min(), x.max()]), np.full(2, x.var())
    for _ in range(2000):
        densities = weights * np.exp(-((x[:, None] - means) ** 2) / (2 * variances)) / np.sqrt(2 * np.pi * variances)
        shares = densities / densities.sum(axis=1, keepdims=True)
        counts = shares.sum(axis=0)
        weights, means = counts / len(x), (shares * x[:, None]).sum(axis=0) / counts
        variances = (shares * (x[:, None] - means) ** 2).sum(axis=0) / counts + 1e-9  # not zero for a single number
    # The logarithm of a weighted density is a parabola; the two cross where their difference is zero.
    parabolas = np.stack(
        [-0.5 / variances, means / variances, np.log(weights / np.sqrt(variances)) - means**2 / (2 * variances)]
    )
    roots = np.roots(parabolas[:, 0] - parabolas[:, 1])
    crossings = [root.real for root in roots if np.isreal(root) and means.min() < root.real < means.max()]
    return float(np.exp(crossings[0])) if crossings else math.inf


MODES = {"sdpn": SDPN, "rdino": RDINO, "partners": Partners, "pseudo_labels": PseudoLabels}
