"""From a config to what its run is made of: branches, recipe, front end, banks, the first state, the compiled step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from memo_jax import config as configs
from memo_jax import features
from memo_jax.models import Branch, build_backbone
from memo_jax.models.blocks import REMATS
from memo_jax.models.ecapa import FORMS
from memo_jax.models.heads import DINOHead
from memo_jax.training import augment, optim
from memo_jax.training import state as states
from memo_jax.training.gate import GateRule
from memo_jax.training.step import LossWeights, Recipe, train_step
from memo_jax.xla import sharding
from memo_jax.xla.compiler import compiler_options

POSITIVE = (
    "log_every_steps",
    "model.embedding_dim",
    "model.ecapa_stride",
    "model.resnet_base_channels",
    "model.campplus_growth",
    "model.campplus_channels",
    "model.campplus_plane_channels",
    "model.head_hidden",
    "model.head_bottleneck",
    "model.prototypes",
    "loss.student_temp",
    "loss.contrastive_temperature",
    "teacher.temp",
    "teacher.end_temp",
)
FRACTIONS = (
    "loss.center_momentum",
    "loss.contrastive_margin",
    "teacher.momentum",
    "teacher.end_momentum",
    "optimizer.sgd_momentum",
)


def check_ranges(config) -> None:
    """Raises ValueError naming a key whose value no run can work with."""
    for keys, fits, wanted in (
        (POSITIVE, lambda value: value > 0, "above 0"),
        (FRACTIONS, lambda value: 0 <= value <= 1, "in [0, 1]"),
    ):
        for key in keys:
            group, _, name = key.rpartition(".")
            value = (config[group] if group else config)[name]
            if not fits(value):
                raise ValueError(f"{key} is {value}: must be {wanted}")
    if config.data.global_crops < 2:
        raise ValueError(f"data.global_crops is {config.data.global_crops}: a teacher's view needs another")
    channels, blocks = config.model.ecapa_channels, config.model.resnet_blocks
    if len(channels) != 5 or min(channels) < 1 or any(width % 8 for width in channels[1:4]):
        raise ValueError(f"model.ecapa_channels is {channels}: give five widths, those of the blocks multiples of 8")
    if len(blocks) != 4 or min(blocks) < 1:
        raise ValueError(f"model.resnet_blocks is {blocks}: give four numbers of blocks, each at least 1")
    layers = config.model.campplus_layers
    if len(layers) != 3 or min(layers) < 1:
        raise ValueError(f"model.campplus_layers is {layers}: give three numbers of layers, each at least 1")
    if config.model.ecapa_form not in FORMS:
        raise ValueError(f"model.ecapa_form is {config.model.ecapa_form!r}: choose {' or '.join(FORMS)}")
    for key in ("ecapa_remat", "resnet_remat"):
        if config.model[key] not in REMATS:
            raise ValueError(f"model.{key} is {config.model[key]!r}: choose one of {', '.join(REMATS)}")


def build_branches(config) -> dict[str, Branch]:
    """Returns the config's branches by name; raises ValueError naming the key that is wrong."""
    check_ranges(config)
    model, names = config.model, tuple(config.model.branches)
    if not names or len(set(names)) != len(names):
        raise ValueError(f"model.branches {names}: name at least one backbone, each once")
    if config.loss.cross_head not in ("cross", "self"):
        raise ValueError(f"loss.cross_head {config.loss.cross_head!r}: choose cross or self")
    if model.dtype not in ("float32", "bfloat16"):
        raise ValueError(f"model.dtype {model.dtype!r}: choose float32 or bfloat16")
    dtype = jnp.dtype(model.dtype)
    arguments = {
        "ecapa": {
            "channels": tuple(model.ecapa_channels),
            "stride": model.ecapa_stride,
            "form": model.ecapa_form,
            "embedding_norm": model.ecapa_embedding_norm,
            "remat": model.ecapa_remat,
        },
        "resnet": {
            "base_channels": model.resnet_base_channels,
            "blocks": tuple(model.resnet_blocks),
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
    crosses = len(names) > 1 and config.loss.cross != 0 and config.loss.cross_head == "cross"
    head = DINOHead(model.prototypes, model.head_hidden, model.head_bottleneck, dtype)
    return {
        name: Branch(
            build_backbone(name, embedding_dim=model.embedding_dim, dtype=dtype, **arguments.get(name, {})),
            head,
            ("self", "cross") if crosses else ("self",),
        )
        for name in names
    }


def build_recipe(config, epoch_steps: int) -> Recipe:
    """Returns what the config's steps have in common; raises ValueError naming a bad key."""
    steps = functools.partial(configs.duration_in_steps, steps_per_epoch=epoch_steps)
    total = steps(config, "total")
    if total < 1:
        raise ValueError("the run has no steps: set total_epochs or total_steps above 0")
    schedules = optim.Schedules(
        optim.cosine_learning_rate(
            optim.scaled_learning_rate(config.optimizer.learning_rate, config.data.batch_size),
            config.optimizer.end_learning_rate,
            min(steps(config.optimizer, "warmup"), total),
            total,
        ),
        optim.cosine_momentum(config.teacher.momentum, config.teacher.end_momentum, total),
        optim.epoch_teacher_temp(
            config.teacher.temp, config.teacher.end_temp, config.teacher.temp_warmup_epochs, epoch_steps
        ),
        steps(config.optimizer, "freeze_prototypes"),
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
        steps(gate, "window"),
        steps(gate, "min"),
        gate.min_improvement,
        gate.min_alignment,
        steps(gate, "stop"),
    )
    return Recipe(build_branches(config), optimizer, schedules, LossWeights(**config.loss), rule)


def build_front_end(config):
    """Returns the function (key, batch, banks) → views: int16 crops, augmented, as normalised log-mel."""
    settings = {name: config.augment[name] for name in ("clean", "both", "reverb_share", "babble_from_batch")}
    settings["snr_db"] = {name: tuple(config.augment[f"{name}_snr_db"]) for name in augment.CATEGORIES}

    def front_end(key, batch, banks):
        views = []
        for i, kind in enumerate(("global", "local")):
            if kind in batch:
                crops = batch[kind]
                count = crops.shape[1]
                waves = crops.reshape(-1, crops.shape[-1]).astype(jnp.float32) / 32768
                waves = augment.augment(jax.random.fold_in(key, i), waves, banks, views=count, **settings)
                mel = features.normalized_log_mel(features.mel_power(waves))
                views.append(mel.reshape((-1, count) + mel.shape[1:]))
        return tuple(views)

    return front_end


def load_banks(config) -> dict[str, np.ndarray]:
    """Returns the config's augmentation banks; a run without any is announced by the caller."""
    from memo_jax.data import banks

    a = config.augment
    return banks.load_banks(
        noise=a.noise,
        music=a.music,
        speech=a.speech,
        rirs=a.rirs,
        seconds=a.bank_seconds,
        rir_seconds=a.rir_seconds,
        max_megabytes=a.bank_megabytes,
        seed=config.seed,
    )


def jitted_step(config, recipe: Recipe, mesh, state: states.TrainState):
    """Returns the compiled-once train step (state, batch, banks, key) → (state, metrics); the state is donated.

    Of `state`, perhaps abstract, only the shardings count.
    """
    whole, split = sharding.replicated(mesh), sharding.split_batch(mesh)
    state = jax.tree.map(lambda x: x.sharding, state)
    step = functools.partial(train_step, recipe=recipe, front_end=build_front_end(config))
    return jax.jit(
        step,
        in_shardings=(state, split, whole, whole),
        out_shardings=(state, whole),
        donate_argnums=0,
        compiler_options=compiler_options(mesh.devices.flat[0].platform),
    )


def lowered_step(config, recipe: Recipe, mesh, banks) -> jax.stages.Lowered:
    """Returns the train step, traced for devices that need not exist; of banks only shapes, types and shardings count."""
    split, whole, shapes = sharding.split_batch(mesh), sharding.replicated(mesh), {}
    for kind in ("global", "local"):
        count, seconds = config.data[f"{kind}_crops"], config.data[f"{kind}_seconds"]
        if count:
            shapes[kind] = (config.data.batch_size, count, round(seconds * features.SAMPLE_RATE))
    batch = {kind: jax.ShapeDtypeStruct(shape, np.int16, sharding=split) for kind, shape in shapes.items()}
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=whole)
    state = abstract_state(config, recipe, mesh)
    return jitted_step(config, recipe, mesh, state).lower(state, batch, banks, key)


def state_maker(recipe: Recipe):
    """Returns the function key → state before the first step."""
    return functools.partial(
        states.initial_state,
        branches=recipe.branches,
        mels=features.MEL_BINS,
        optimizer=recipe.optimizer,
        rule=recipe.gate_rule,
    )


def abstract_state(config, recipe: Recipe, mesh) -> states.TrainState:
    """Returns shapes, types and shardings of the state, for devices that need not exist.

    Large prototypes, of which a step uses one head's at a time, and what the optimiser keeps of large parameters, which
    it uses once a step, are split over the devices. All else is held whole by each.
    """
    large = config.split_above_megabytes * 1e6 or float("inf")

    def placed(path, x):
        splits = (path[0].name == "opt_state" or optim.is_prototypes(path)) and x.size * x.dtype.itemsize >= large
        held = sharding.split_longest_axis(mesh, x.shape) if splits else sharding.replicated(mesh)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=held)

    shapes = jax.eval_shape(state_maker(recipe), jax.random.key(config.seed))
    return jax.tree_util.tree_map_with_path(placed, shapes)


def initial_state(config, recipe: Recipe, mesh=None) -> states.TrainState:
    """Returns the state before the first step, which the config's seed alone decides, and its `init` where it has one."""
    options = {}
    if mesh is not None:
        options["out_shardings"] = jax.tree.map(lambda x: x.sharding, abstract_state(config, recipe, mesh))
    if jax.default_backend() == "cpu":
        # It runs once: optimising hundreds of small kernels for it would take several times as long as it saves.
        options["compiler_options"] = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    state = jax.jit(state_maker(recipe), **options)(jax.random.key(config.seed))
    return with_backbone(state, config.init, recipe.branches) if config.init else state


def with_backbone(state: states.TrainState, path, branches: dict[str, Branch]) -> states.TrainState:
    """Returns the state with the network of a model file as student and teacher of the branch of its kind.

    Raises ValueError naming the file where no branch has just that network.
    """
    from memo_jax.inference.model_file import model_of_backbone, read_model

    model = read_model(path)
    name = model.backbone
    if name not in branches or dict(model.arguments) != (
        wanted := dict(model_of_backbone(branches[name].backbone, {}).arguments)
    ):
        found = f"{name} {dict(model.arguments)}"
        needed = f"{name} {wanted}" if name in branches else " or ".join(branches)
        raise ValueError(f"init: {path} holds {found}, and the config asks for {needed}: change one of them")

    def begun(variables):
        new = {
            kind: of
            | {
                "backbone": jax.tree.map(
                    lambda new, old: jax.device_put(new, old.sharding), model.variables[kind], of["backbone"]
                )
            }
            for kind, of in variables.items()
        }
        return variables | new

    return state.replace(
        student=state.student | {name: begun(state.student[name])},
        teacher=state.teacher | {name: begun(state.teacher[name])},
    )
