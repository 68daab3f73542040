"""The networks of a training workdir, and the decision thresholds that are kept beside them."""

import dataclasses
import json
import os

import jax

from memo_jax import config as configs
from memo_jax.files import as_path, in_bucket, parse_json, read_text, write_text
from memo_jax.inference.model_file import (
    Decision,
    Model,
    check_holds_only,
    ensemble_of,
    members_of,
    model_of_backbone,
    read_model,
    save_decision_in_file,
)
from memo_jax.models import SPEAKER_HEAD, Variables
from memo_jax.training.checkpoint import load_state
from memo_jax.training.saved_checkpoint import saved_steps
from memo_jax.training.state import backbone_variables
from memo_jax.xla import sharding

DECISIONS = "decisions.json"  # {fingerprint of a model: its decision}


def workdir_model(
    workdir: str | os.PathLike, branch: str | None = None, role: str = "teacher", step: int | None = None
) -> Model:
    """Returns a network of a training workdir, without its heads, as a model.

    Step 0 is the network before training, which the config's seed and `init` determine. The branch is "ecapa" by
    default, or the first; "ecapa,resnet" is an ensemble. Raises FileNotFoundError where nothing has been trained,
    ValueError for a branch that the run does not have.
    """
    from memo_jax.training.program import create_state
    from memo_jax.training.recipe import build_branches, build_recipe

    config = configs.workdir_config(workdir)
    branches = build_branches(config)
    if branch is None:
        branch = "ecapa" if "ecapa" in branches else next(iter(branches))
    chosen = branch.split(",")
    for name in chosen:
        if name not in branches:
            raise ValueError(f"the run in {workdir} has no branch {name!r}: choose one of {', '.join(branches)}")
    if role not in ("teacher", "student"):
        raise ValueError(f"role {role!r}: choose teacher or student")
    if step == 0:
        mesh = sharding.data_mesh()
        variables = create_state(config, build_recipe(config, 1), mesh, starting_parts(config)).teacher
    else:
        if step is None and (steps := saved_steps(workdir)):
            step = steps[-1]
        variables = load_state(workdir, step, only=[role])[role]
    provenance = {
        "workdir": str(workdir),
        "branch": branch,
        "role": role,
        "step": int(step),
        "config": json.loads(configs.config_to_json(config)),
    }
    models = [
        model_of_backbone(
            branches[name].backbone,
            # Host arrays, as training evaluates them, so that programs which training has compiled are reused.
            jax.device_get(backbone_variables(variables[name])),
            front_end=config.features.front_end,
            provenance=provenance,
        )
        for name in chosen
    ]
    model = models[0] if len(models) == 1 else ensemble_of(models, provenance)
    return dataclasses.replace(model, decision=read_decisions(workdir).get(model.fingerprint))


def starting_parts(config: configs.ConfigDict) -> dict[str, Variables]:
    """Returns the parts of networks that a run starts from, as `train` takes them; {} where `config.init` is empty.

    Of a model file it is the backbone of its branch, or those of an ensemble that are branches here, of a workdir the
    teachers' backbones and speaker heads.

    Raises ValueError naming the file or workdir where the config has no branch with exactly that network.
    """
    if not config.init:
        return {}
    if not in_bucket(config.init) and not os.path.isdir(config.init):
        members = members_of(read_model(config.init))
        models = [model for model in members if model.backbone in config.model.branches] or members[:1]
        for model in models:
            _check_fits(config, model)
        return {
            model.backbone: {kind: {"backbone": tree} for kind, tree in model.variables.items()} for model in models
        }
    from memo_jax.training.recipe import build_branches

    theirs = configs.workdir_config(config.init)
    branches = build_branches(theirs)
    chosen = [branch for branch in branches if branch in config.model.branches or len(branches) == 1]
    if not chosen:
        raise ValueError(
            f"init: {config.init} has the branches {', '.join(branches)}, this config "
            f"{', '.join(config.model.branches)}: change one of them"
        )
    for branch in chosen:
        _check_fits(config, model_of_backbone(branches[branch].backbone, {}, front_end=theirs.features.front_end))
    teachers = load_state(config.init, only=["teacher"])["teacher"]
    kept = ("backbone", SPEAKER_HEAD)
    return {
        branch: {kind: {part: tree[part] for part in kept if part in tree} for kind, tree in teachers[branch].items()}
        for branch in chosen
    }


def _check_fits(config, model: Model) -> None:
    """Raises ValueError where a config has no branch with exactly a model's backbone, or another front end."""
    from memo_jax.training.recipe import build_branches

    branches = build_branches(config)
    wanted = {name: dict(model_of_backbone(branch.backbone, {}).arguments) for name, branch in branches.items()}
    if wanted.get(model.backbone) != dict(model.arguments):
        raise ValueError(
            f"init: {config.init} holds {model.backbone} {dict(model.arguments)}, which is not a branch of this config "
            f"({'; '.join(f'{name} {arguments}' for name, arguments in wanted.items())}): change one of them"
        )
    if model.front_end != config.features.front_end:
        raise ValueError(
            f"init: {config.init} takes {model.front_end}, but features.front_end is {config.features.front_end}: "
            "change one of them"
        )


def read_decisions(workdir: str | os.PathLike) -> dict[str, Decision]:
    """Returns {fingerprint: decision} of the networks of a workdir that were tuned; raises ValueError if damaged."""
    path = as_path(workdir) / DECISIONS
    try:
        text = read_text(path)
        return {} if text is None else {key: Decision(**value) for key, value in parse_json(text).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: damaged ({error}): delete it and tune the threshold again") from None


def save_decision(path: str | os.PathLike, model: Model, decision: Decision) -> None:
    """Keeps a decision with a model: in the model file at `path`, or beside the checkpoints of the workdir there.

    Raises ValueError for a file that holds other networks, or a damaged file of decisions.
    """
    if in_bucket(path) or os.path.isdir(path):
        kept = read_decisions(path) | {model.fingerprint: decision}
        decisions = {key: dataclasses.asdict(value) for key, value in kept.items()}
        write_text(as_path(path) / DECISIONS, json.dumps(decisions, indent=2, ensure_ascii=False) + "\n")
    else:
        check_holds_only(path, model)
        save_decision_in_file(path, decision)
