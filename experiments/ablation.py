"""The rows of the study: what each changes in one config, and which other row it is compared with."""

from typing import NamedTuple

from memo_jax.config import ConfigDict

# Plain distillation wants a slower teacher than contrastive learning does.
DISTILLATION_ALONE = ("gate.rule=never", "teacher.momentum=0.99")
ONE_BRANCH = ("model.branches=ecapa", "loss.cross=0")
# Without distillation, nothing is learned from local crops, and nothing needs to be kept from collapsing.
CONTRASTIVE_ALONE = (
    *ONE_BRANCH,
    "loss.self=0",
    "gate.rule=always",
    "data.local_crops=0",
    "loss.mean_entropy=0",
    "loss.koleo=0",
)
LABELS_ALONE = (*CONTRASTIVE_ALONE, "loss.contrastive=0", "gate.rule=never", "supervised.weight=1")
STAGE_TWO = (*LABELS_ALONE, "total_epochs=20", "total_steps=-1", "supervised.margin_warmup_epochs=5")
REFERENCE = "memo-plateau"  # whose cost at an equal number of steps is the time that others get at equal time


class Row(NamedTuple):
    """A line of the table.

    Attributes:
      title: what the table calls it.
      overrides: "key=value" texts that change the study's config.
      against: the rows it is compared with: the one that lacks the idea that the title names, and the plain one.
      main: run with at least three seeds.
      many_epochs: one of the study over many epochs.
      start: the row whose network this one starts from, of the same seed.
      clusters: learns this many clusters of that network's embeddings in place of speakers; 0: none.
      gate_factor: the fixed step at which the gate closes, as a multiple of the config's.
    """

    title: str
    overrides: tuple[str, ...]
    against: tuple[str, ...]
    main: bool = False
    many_epochs: bool = False
    start: str = ""
    clusters: int = 0
    gate_factor: float = 1


ROWS = {
    "dino-ecapa": Row(
        "DINO, ECAPA-TDNN alone",
        ("model.branches=ecapa", "loss.cross=0", *DISTILLATION_ALONE),
        ("contrastive-alone",),
        True,
        many_epochs=True,
    ),
    "dino-resnet": Row(
        "DINO, ResNet alone", ("model.branches=resnet", "loss.cross=0", *DISTILLATION_ALONE), ("dino-ecapa",)
    ),
    "two-branches": Row(
        "+ second branch, no cross-distillation", ("loss.cross=0", *DISTILLATION_ALONE), ("dino-ecapa",)
    ),
    "shared-head": Row(
        "+ cross-distillation, shared head", ("loss.cross_head=self", *DISTILLATION_ALONE), ("two-branches",)
    ),
    "multi-head": Row(
        "+ split heads (Multi-Head)",
        DISTILLATION_ALONE,
        ("shared-head", "dino-ecapa", "contrastive-alone", "supervised"),
        True,
        many_epochs=True,
    ),
    "multi-head-quick-teacher": Row(
        "Multi-Head with the teachers' momentum of the rows below, 0.95", ("gate.rule=never",), ("multi-head",)
    ),
    "memo-always": Row(
        "+ contrastive, always on",
        ("gate.rule=always",),
        ("multi-head", "contrastive-alone", "dino-ecapa"),
        True,
        many_epochs=True,
    ),
    "memo-step": Row(
        "+ contrastive, stopped at a fixed step", ("gate.rule=step",), ("memo-always",), True, many_epochs=True
    ),
    "memo-plateau": Row(
        "+ contrastive, stopped at its plateau (MeMo)",
        ("gate.rule=plateau",),
        ("memo-always", "dino-ecapa"),
        True,
        many_epochs=True,
    ),
    "memo-conflict": Row(
        "+ contrastive, stopped when gradients conflict",
        ("gate.rule=conflict",),
        ("memo-always", "memo-step", "memo-plateau"),
        True,
        many_epochs=True,
    ),
    "memo-step-early": Row("the same, at half that fixed step", ("gate.rule=step",), ("memo-step",), gate_factor=0.5),
    "memo-step-late": Row("the same, at one and a half of it", ("gate.rule=step",), ("memo-step",), gate_factor=1.5),
    "memo-slow-teacher": Row(
        "MeMo with the teachers' momentum of distillation alone, 0.99",
        ("teacher.momentum=0.99",),
        ("memo-plateau", "multi-head"),
    ),
    "memo-campplus": Row("MeMo with CAM++ as second branch", ("model.branches=ecapa,campplus",), ("memo-plateau",)),
    "contrastive-alone": Row(
        "contrastive alone (NT-Xent, ECAPA-TDNN)", CONTRASTIVE_ALONE, ("memo-plateau",), True, many_epochs=True
    ),
    "no-augmentation": Row(
        "MeMo without augmentation",
        ("augment.noise=", "augment.music=", "augment.speech=", "augment.rirs=", "augment.babble_from_batch=false"),
        ("memo-plateau",),
    ),
    "contrastive-margin": Row(
        "AM-NT-Xent alone, margin 0.1",
        (*CONTRASTIVE_ALONE, "loss.contrastive_margin=0.1"),
        ("contrastive-alone",),
        many_epochs=True,
    ),
    "contrastive-oracle": Row(
        "NT-Xent alone, the anchor's speaker left out of its negatives (reads labels)",
        (*CONTRASTIVE_ALONE, "loss.contrastive_mask_same_speaker=true"),
        ("contrastive-alone",),
        many_epochs=True,
    ),
    "contrastive-partners": Row(
        "NT-Xent alone, positives from other recordings in the last third (SSPS)",
        (*CONTRASTIVE_ALONE, "positives.clusters=540", "positives.from_epochs=40", "positives.reference_seconds=2"),
        ("contrastive-alone",),
        many_epochs=True,
    ),
    "contrastive-partners-own": Row(
        "the same, positives from the own cluster",
        (
            *CONTRASTIVE_ALONE,
            "positives.clusters=360",
            "positives.cluster=own",
            "positives.from_epochs=40",
            "positives.reference_seconds=2",
        ),
        ("contrastive-alone", "contrastive-partners"),
        many_epochs=True,
    ),
    "dino-regularized": Row(
        "DINO with RDINO's regulariser",
        (*ONE_BRANCH, *DISTILLATION_ALONE, "loss.variance=2", "loss.covariance=0.2"),
        ("dino-ecapa",),
        many_epochs=True,
    ),
    "dino-centered": Row(
        "DINO with a centre in place of balanced targets, without mean entropy and KoLeo",
        (
            *ONE_BRANCH,
            *DISTILLATION_ALONE,
            "loss.targets=centered",
            "loss.mean_entropy=0",
            "loss.koleo=0",
            "teacher.temp=0.04",
            "teacher.end_temp=0.07",
        ),
        ("dino-ecapa",),
        many_epochs=True,
    ),
    "sdpn": Row(
        "SDPN",
        (
            *ONE_BRANCH,
            *DISTILLATION_ALONE,
            "data.global_crops=1",
            "data.local_crops=4",
            "model.shared_prototypes=true",
            "loss.targets=sinkhorn",
            "loss.mean_entropy=1",
            "loss.koleo=0.1",
            "teacher.view=clean",
            "teacher.temp=0.025",
            "teacher.end_temp=0.025",
            "optimizer.freeze_prototypes_epochs=0",
        ),
        ("dino-ecapa",),
        many_epochs=True,
    ),
    "pseudo-labels": Row(
        "stage two: AAM-softmax on clusters of NT-Xent alone, from its network",
        STAGE_TWO,
        ("contrastive-alone",),
        start="contrastive-alone",
        clusters=360,
        many_epochs=True,
    ),
    "pseudo-labels-gate": Row(
        "the same with loss gate and label correction",
        (*STAGE_TWO, "supervised.loss_gate_after_epochs=5", "supervised.correct_labels_after_epochs=10"),
        ("pseudo-labels",),
        start="contrastive-alone",
        clusters=360,
        many_epochs=True,
    ),
    "pseudo-labels-again": Row(
        "a second round of stage two, with clusters of the first one's embeddings",
        STAGE_TWO,
        ("pseudo-labels", "contrastive-alone"),
        start="pseudo-labels",
        clusters=360,
        many_epochs=True,
    ),
    "supervised": Row(
        "AAM-softmax on the speakers (reads labels)",
        (*LABELS_ALONE, "supervised.margin_warmup_epochs=10"),
        ("contrastive-alone",),
        many_epochs=True,
    ),
}


def chosen_rows(text: str) -> list[str]:
    """Returns the names of rows in a text "a,b", "main", "many-epochs" or "all", in the table's order.

    ValueError names an unknown one.
    """
    if text == "all":
        return list(ROWS)
    if text == "main":
        return [name for name, row in ROWS.items() if row.main]
    if text == "many-epochs":
        return [name for name, row in ROWS.items() if row.many_epochs]
    wanted = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in wanted if name not in ROWS]
    if unknown or not wanted:
        raise ValueError(f"no row {', '.join(unknown) or 'given'}: choose from {', '.join(ROWS)}, or main, or all")
    return [name for name in ROWS if name in wanted]


def gate_overrides(row: str, config: ConfigDict) -> list[str]:
    """Returns the "key=value" texts that move the fixed step of a row's gate, by the config of its run without them."""
    factor = ROWS[row].gate_factor
    return [] if factor == 1 else [f"gate.stop_steps={round(factor * config.gate.stop_steps)}"]
