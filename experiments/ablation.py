"""The rows of the study: what each changes in one config, and which other row it is compared with."""

from typing import NamedTuple

# Plain distillation wants a slower teacher than contrastive learning does.
DISTILLATION_ALONE = ("gate.rule=never", "teacher.momentum=0.99")
REFERENCE = "memo-plateau"  # whose cost at an equal number of steps is the time that others get at equal time


class Row(NamedTuple):
    """A line of the table.

    Attributes:
      title: what the table calls it.
      overrides: "key=value" texts that change the study's config.
      against: the rows it is compared with: the one that lacks the idea that the title names, and the plain one.
      main: run with at least three seeds.
    """

    title: str
    overrides: tuple[str, ...]
    against: tuple[str, ...]
    main: bool = False


ROWS = {
    "dino-ecapa": Row(
        "DINO, ECAPA-TDNN alone", ("model.branches=ecapa", "loss.cross=0", *DISTILLATION_ALONE), (), True
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
    "multi-head": Row("+ split heads (Multi-Head)", DISTILLATION_ALONE, ("shared-head", "dino-ecapa"), True),
    "multi-head-quick-teacher": Row(
        "Multi-Head with the teachers' momentum of the rows below, 0.95", ("gate.rule=never",), ("multi-head",)
    ),
    "memo-always": Row("+ contrastive, always on", ("gate.rule=always",), ("multi-head", "dino-ecapa"), True),
    "memo-step": Row("+ contrastive, stopped at a fixed step", ("gate.rule=step",), ("memo-always",), True),
    "memo-plateau": Row(
        "+ contrastive, stopped at its plateau (MeMo)", ("gate.rule=plateau",), ("memo-always", "dino-ecapa"), True
    ),
    "memo-conflict": Row(
        "+ contrastive, stopped when gradients conflict",
        ("gate.rule=conflict",),
        ("memo-always", "memo-step", "memo-plateau"),
        True,
    ),
    "memo-step-early": Row(
        "the same, at half that fixed step", ("gate.rule=step", "gate.stop_steps=75"), ("memo-step",)
    ),
    "memo-step-late": Row(
        "the same, at one and a half of it", ("gate.rule=step", "gate.stop_steps=225"), ("memo-step",)
    ),
    "memo-slow-teacher": Row(
        "MeMo with the teachers' momentum of distillation alone, 0.99",
        ("teacher.momentum=0.99",),
        ("memo-plateau", "multi-head"),
    ),
    "memo-campplus": Row("MeMo with CAM++ as second branch", ("model.branches=ecapa,campplus",), ("memo-plateau",)),
    "contrastive-alone": Row(
        "contrastive alone (NT-Xent, ECAPA-TDNN)",
        ("model.branches=ecapa", "loss.self=0", "loss.cross=0", "gate.rule=always"),
        ("memo-plateau",),
        True,
    ),
    "no-augmentation": Row(
        "MeMo without augmentation",
        ("augment.noise=", "augment.music=", "augment.speech=", "augment.rirs=", "augment.babble_from_batch=false"),
        ("memo-plateau",),
    ),
}


def chosen_rows(text: str) -> list[str]:
    """Returns the names of rows in a text "a,b", "main" or "all", in the table's order; ValueError names an unknown."""
    if text == "all":
        return list(ROWS)
    if text == "main":
        return [name for name, row in ROWS.items() if row.main]
    wanted = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in wanted if name not in ROWS]
    if unknown or not wanted:
        raise ValueError(f"no row {', '.join(unknown) or 'given'}: choose from {', '.join(ROWS)}, or main, or all")
    return [name for name in ROWS if name in wanted]
