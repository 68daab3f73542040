"""From a config to the objects of its run: branches, recipe, front end, banks of augmentation."""

import functools
import math
from collections.abc import Callable
from operator import attrgetter

import jax.numpy as jnp
import numpy as np

from memo_jax import config as configs
from memo_jax.audio import SAMPLE_RATE
from memo_jax.data.banks import load_banks
from memo_jax.features import FRONT_ENDS, MEL_BINS
from memo_jax.models import Branch, build_backbone
from memo_jax.models.blocks import REMATS
from memo_jax.models.ecapa import ECAPA_FORMS
from memo_jax.models.heads import DINOHead
from memo_jax.training import optim
from memo_jax.training.augment import CATEGORIES
from memo_jax.training.front_end import Views, training_views
from memo_jax.training.gate import RULES, GateRule, check_rule
from memo_jax.training.step import LossWeights, Recipe
from memo_jax.training.supervision import Supervision

POSITIVE = (
    "log_every_steps",
    "augment.bank_seconds",
    "augment.bank_megabytes",
    "augment.rir_seconds",
    "model.embedding_dim",
    "model.ecapa_stride",
    "model.resnet_stride",
    "model.resnet_base_channels",
    "model.campplus_growth",
    "model.campplus_channels",
    "model.campplus_plane_channels",
    "model.head_hidden",
    "model.head_bottleneck",
    "model.prototypes",
    "optimizer.learning_rate",
    "loss.student_temp",
    "loss.contrastive_temperature",
    "supervised.scale",
    "supervised.correction_temperature",
    "teacher.temp",
    "teacher.end_temp",
    "positives.iterations",
)
NOT_NEGATIVE = (
    "split_above_megabytes",
    "optimizer.weight_decay",
    "optimizer.clip_norm",
    "loss.self",
    "loss.cross",
    "loss.contrastive",
    "loss.mean_entropy",
    "loss.koleo",
    "loss.variance",
    "loss.covariance",
    "supervised.weight",
    "positives.clusters",
)
CHOICES = {
    "model.ecapa_form": ECAPA_FORMS,
    "model.ecapa_remat": REMATS,
    "model.resnet_remat": REMATS,
    "features.front_end": FRONT_ENDS,
    "model.dtype": ("float32", "bfloat16"),
    "loss.targets": ("centered", "sinkhorn"),
    "loss.cross_head": ("cross", "self"),
    "optimizer.name": ("sgd", "adamw"),
    "gate.rule": RULES,
    "teacher.view": ("global", "clean"),
    "positives.cluster": ("nearest", "own"),
}
FRACTIONS = (
    "augment.clean",
    "augment.both",
    "augment.reverb_share",
    "positives.keep_own",
    "loss.center_momentum",
    "loss.contrastive_margin",
    "supervised.correction_probability",
    "loss.regularizer_start",
    "teacher.momentum",
    "teacher.end_momentum",
    "optimizer.sgd_momentum",
)


def reads_labels(config: configs.ConfigDict) -> bool:
    """Returns whether training reads labels: the dataset's speakers, or a table."""
    return config.supervised.weight > 0 or config.loss.contrastive_mask_same_speaker


def has_loss_gate(config: configs.ConfigDict) -> bool:
    """Returns whether training leaves out utterances by their losses."""
    return config.supervised.loss_gate_after_epochs > 0


def crop_numbers(config: configs.ConfigDict, partnered: bool = False) -> dict[str, int]:
    """Returns {kind: number} of the crops of an utterance in a batch; `training_views` says what the kinds are for.

    Args:
      config: of the run.
      partnered: whether the teachers see crops of a partner.
    """
    long, short = config.data.global_crops, config.data.local_crops
    if config.teacher.view == "clean":
        return {"global": 0, "local": short, "teacher": long}
    return {"global": long, "local": short, "teacher": long if partnered else 0}


def batch_crops(config: configs.ConfigDict, partnered: bool = False) -> dict[str, tuple[int, int]]:
    """Returns {kind: (number, samples)} of the crops of an utterance in a batch; arguments as for `crop_numbers`."""
    data = config.data
    seconds = {"global": data.global_seconds, "local": data.local_seconds, "teacher": data.global_seconds}
    numbers = crop_numbers(config, partnered)
    return {kind: (count, round(seconds[kind] * SAMPLE_RATE)) for kind, count in numbers.items() if count}


def check_learns_something(config: configs.ConfigDict) -> None:
    """Raises ValueError for a config without a loss to learn from, or without one after its gate has closed."""
    loss, rule = config.loss, config.gate.rule
    cross = loss.cross and len(config.model.branches) > 1
    if loss.self or cross or config.supervised.weight:
        return
    if not loss.contrastive or rule == "never":
        raise ValueError("nothing to learn from: loss.self, loss.cross, loss.contrastive and supervised.weight are off")
    if rule != "always":
        raise ValueError(f"gate.rule is {rule}: once the gate closes, no loss is left; set gate.rule=always")


def check_ranges(config: configs.ConfigDict) -> None:
    """Raises ValueError, naming the key, for a value that cannot work."""
    for keys, fits, wanted in (
        (POSITIVE, lambda value: value > 0, "above 0"),
        (NOT_NEGATIVE, lambda value: value >= 0, "at least 0"),
        (FRACTIONS, lambda value: 0 <= value <= 1, "in [0, 1]"),
    ):
        for key in keys:
            if not fits(value := attrgetter(key)(config)):
                raise ValueError(f"{key} is {value}: must be {wanted}")
    for kind in CATEGORIES:
        key, snr = f"augment.{kind}_snr_db", config.augment[f"{kind}_snr_db"]
        if len(snr) != 2 or not snr[0] <= snr[1]:
            raise ValueError(f"{key} is {snr}: give the lowest and the highest, in dB")
    for key, choices in CHOICES.items():
        if (value := attrgetter(key)(config)) not in choices:
            raise ValueError(f"{key} is {value!r}: choose one of {', '.join(choices)}")
    check_learns_something(config)
    check_supervision(config)
    check_views(config)
    check_networks(config)


def check_views(config: configs.ConfigDict) -> None:
    """Raises ValueError, naming the key, for shares of augmentation or numbers of crops that cannot work."""
    clean, both = config.augment.clean, config.augment.both
    if clean < 1 and clean + both > 1 + 1e-6:  # two shares that are rounded
        raise ValueError(f"augment.clean is {clean} and augment.both {both}: together they must be at most 1")
    if not 0 <= config.augment.masked_bins <= MEL_BINS:
        raise ValueError(f"augment.masked_bins is {config.augment.masked_bins}: must be 0 to {MEL_BINS}")
    if config.teacher.view == "clean":
        if config.data.global_crops < 1 or config.data.local_crops < 1:
            raise ValueError(
                f"data.global_crops is {config.data.global_crops} and data.local_crops {config.data.local_crops}: with "
                "teacher.view=clean, teachers see the first and students the second; give at least 1 of each"
            )
    elif config.data.global_crops < 2:
        raise ValueError(f"data.global_crops is {config.data.global_crops}: must be 2 or more, to compare two views")


def check_supervision(config: configs.ConfigDict) -> None:
    """Raises ValueError, naming the key, for settings of the loss on labels that cannot work."""
    if not 0 <= config.supervised.margin <= math.pi / 2:
        raise ValueError(f"supervised.margin is {config.supervised.margin}: must be 0 to π/2, in radians")
    after, correct_after = config.supervised.loss_gate_after_epochs, config.supervised.correct_labels_after_epochs
    if after < 0 or correct_after < 0:
        raise ValueError(
            f"supervised.loss_gate_after_epochs is {after} and supervised.correct_labels_after_epochs {correct_after}: "
            "must be at least 0 (0 means never)"
        )
    if after and not config.supervised.weight:
        raise ValueError("supervised.loss_gate_after_epochs is set, but supervised.weight is 0: no loss to gate")
    if correct_after and not 0 < after <= correct_after:
        raise ValueError(
            f"supervised.correct_labels_after_epochs is {correct_after} and supervised.loss_gate_after_epochs {after}: "
            f"only utterances that the loss gate leaves out are corrected; set the latter to 1 to {correct_after}"
        )
    if config.supervised.labels and not reads_labels(config):
        raise ValueError("supervised.labels is set, but nothing reads labels: set supervised.weight above 0")


def check_networks(config: configs.ConfigDict) -> None:
    """Raises ValueError, naming the key, for sizes of networks that cannot work."""
    channels, blocks = config.model.ecapa_channels, config.model.resnet_blocks
    scale = config.model.ecapa_scale
    if scale < 2:
        raise ValueError(f"model.ecapa_scale is {scale}: must be at least 2")
    if len(channels) < 3 or min(channels) < 1 or any(width % scale for width in channels[1:-1]):
        raise ValueError(
            f"model.ecapa_channels is {channels}: give three widths or more, those of the blocks between the first and "
            f"the last multiples of model.ecapa_scale, {scale}"
        )
    if not blocks or min(blocks) < 1:
        raise ValueError(f"model.resnet_blocks is {blocks}: give a number of blocks for each stage, each at least 1")
    layers = config.model.campplus_layers
    if len(layers) != 3 or min(layers) < 1:
        raise ValueError(f"model.campplus_layers is {layers}: give three numbers of layers, each at least 1")


def build_branches(config: configs.ConfigDict, speakers: int = 1) -> dict[str, Branch]:
    """Returns the config's branches by name.

    Args:
      config: with all keys of configs/base.py.
      speakers: how many the dataset has; read only if the config trains with labels.

    Raises:
      ValueError: a value that cannot work; the message names its key.
    """
    check_ranges(config)
    model, names = config.model, tuple(config.model.branches)
    if not names or len(set(names)) != len(names):
        raise ValueError(f"model.branches {names}: name at least one backbone, each once")
    dtype = jnp.dtype(model.dtype)
    blocks = len(model.ecapa_channels) - 2
    arguments = {
        "ecapa": {
            "channels": tuple(model.ecapa_channels),
            "kernel_sizes": (5, *[3] * blocks),
            "dilations": tuple(range(1, blocks + 2)),
            "scale": model.ecapa_scale,
            "stride": model.ecapa_stride,
            "form": model.ecapa_form,
            "embedding_norm": model.ecapa_embedding_norm,
            "remat": model.ecapa_remat,
        },
        "resnet": {
            "base_channels": model.resnet_base_channels,
            "blocks": tuple(model.resnet_blocks),
            "stride": model.resnet_stride,
            "packed": model.resnet_packed,
            "scan": model.resnet_scan,
            "remat": model.resnet_remat,
        },
        "campplus": {
            "layers": tuple(model.campplus_layers),
            "growth": model.campplus_growth,
            "stem_channels": model.campplus_channels,
            "plane_channels": model.campplus_plane_channels,
        },
    }
    for name in names:
        if name not in arguments:
            raise ValueError(f"model.branches {names}: choose from {', '.join(arguments)}")
    crosses = len(names) > 1 and config.loss.cross != 0 and config.loss.cross_head == "cross"
    head = DINOHead(model.prototypes, model.head_hidden, model.head_bottleneck, dtype)
    return {
        name: Branch(
            build_backbone(name, embedding_dim=model.embedding_dim, dtype=dtype, **arguments[name]),
            head,
            ("self", "cross") if crosses else ("self",),
            speakers if config.supervised.weight else 0,
        )
        for name in names
    }


def build_recipe(config: configs.ConfigDict, epoch_steps: int, speakers: int = 1, utterances: int = 0) -> Recipe:
    """Returns what the steps of a run have in common.

    Args:
      config: with all keys of configs/base.py.
      epoch_steps: steps in an epoch, by which durations in epochs are converted.
      speakers: how many the dataset has; read only if the config trains with labels.
      utterances: how many the dataset has; read only for a loss gate or positives from other recordings.

    Raises:
      ValueError: a value that cannot work; the message names its key.
    """
    check_ranges(config)
    steps = functools.partial(configs.duration_in_steps, config, steps_per_epoch=epoch_steps)
    total = steps("total")
    if total < 1:
        raise ValueError("the run has no steps: set total_epochs or total_steps above 0")
    schedules = optim.Schedules(
        optim.cosine_learning_rate(
            optim.scaled_learning_rate(config.optimizer.learning_rate, config.data.batch_size),
            config.optimizer.end_learning_rate,
            min(steps("optimizer.warmup"), total),
            total,
        ),
        optim.cosine_momentum(config.teacher.momentum, config.teacher.end_momentum, total),
        optim.epoch_teacher_temp(
            config.teacher.temp, config.teacher.end_temp, config.teacher.temp_warmup_epochs, epoch_steps
        ),
        steps("optimizer.freeze_prototypes"),
        optim.rising_margin(config.supervised.margin, steps("supervised.margin_warmup")),
        optim.rising_regularization(config.loss.regularizer_start, steps("loss.regularizer_warmup")),
    )
    optimizer = optim.build_optimizer(
        config.optimizer.name,
        schedules,
        weight_decay=config.optimizer.weight_decay,
        clip_norm=config.optimizer.clip_norm,
        sgd_momentum=config.optimizer.sgd_momentum,
    )
    gate = config.gate
    rule = GateRule(
        gate.rule,
        gate.smoothing,
        steps("gate.window"),
        steps("gate.min"),
        gate.min_improvement,
        gate.min_alignment,
        steps("gate.stop"),
    )
    check_rule(rule)
    supervised = config.supervised
    supervision = Supervision(
        supervised.weight,
        supervised.scale,
        utterances if has_loss_gate(config) else 0,
        supervised.correct_labels_after_epochs * epoch_steps if supervised.correct_labels_after_epochs else None,
        supervised.correction_temperature,
        supervised.correction_probability,
    )
    branches = build_branches(config, speakers)
    return Recipe(
        branches,
        optimizer,
        schedules,
        LossWeights(**{name: config.loss[name] for name in LossWeights._fields}),
        rule,
        supervision,
        remat=config.model.crop_remat,
        partners=utterances if config.positives.clusters else 0,
        shared_prototypes=config.model.shared_prototypes,
    )


def build_front_end(config: configs.ConfigDict) -> Callable[..., Views]:
    """Returns the config's front end, a function (key, batch, banks) → views (`front_end.training_views`)."""
    settings = {name: config.augment[name] for name in ("clean", "both", "reverb_share", "babble_from_batch")}
    settings |= {"masked_bins": config.augment.masked_bins, "clean_teachers": config.teacher.view == "clean"}
    settings["snr_db"] = {name: tuple(config.augment[f"{name}_snr_db"]) for name in CATEGORIES}
    return functools.partial(training_views, front_end=config.features.front_end, **settings)


def load_augmentation_banks(config: configs.ConfigDict) -> dict[str, np.ndarray]:
    """Returns the config's banks of recordings and room responses, {} if it names none.

    Raises:
      OSError: a folder does not exist or cannot be read; the message names it.
      ValueError: a folder yields no bank, or has a damaged recording, which the message names; or a length is not
        positive.
    """
    a = config.augment
    return load_banks(
        noise=a.noise,
        music=a.music,
        speech=a.speech,
        rirs=a.rirs,
        seconds=a.bank_seconds,
        rir_seconds=a.rir_seconds,
        max_megabytes=a.bank_megabytes,
        seed=config.seed,
    )
