"""Replays reference training steps through our train step and prints how far they differ, as one JSON object.

    python experiments/parity.py FILE

FILE is an npz of initial weights by PyTorch names, mel inputs of each step, and the losses, weights, statistics and
centres that a reference implementation reached (a JSON `config` inside tells sizes and schedules). The exit status is
1 when a deviation passes ten times the float32 noise, 2 when FILE cannot be used.
"""

import argparse
import json
import sys
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from memo_jax import features, interop, optim
from memo_jax.gate import GateRule
from memo_jax.models import Branch, build_backbone
from memo_jax.models.heads import DINOHead
from memo_jax.state import TrainState, state_from_students
from memo_jax.step import LossWeights, Recipe, train_step_on_features

HEADS = ("self", "cross")
BRANCHES = ("ecapa", "resnet")

# The float32 noise to expect of the first steps, known from a reference replayed in float32 and float64: losses relative,
# parameters absolute, at these steps. Where rounding grows faster than that (it depends on sizes, and is different for each
# architecture) the noise is measured: see `measured_noise`.
LOSS_NOISE = ((0, 1e-6), (3, 2e-4), (7, 4e-3))
PARAMETER_NOISE = ((0, 1e-7), (7, 5e-6))
EMBEDDING_NOISE = 1e-6
PERTURBED_REPLAYS = 3


def noise_at(step: int, known) -> float:
    """Returns the known noise at a step (from 0), interpolated in its logarithm; that of the last step behind it."""
    return float(np.exp(np.interp(step, [k[0] for k in known], np.log([k[1] for k in known]))))


def build_recipe(config: dict) -> Recipe:
    """Returns our recipe for a reference file's config."""
    head = DINOHead(config["prototypes"], config["head_hidden"], config["head_bottleneck"])
    backbones = {
        "ecapa": {"channels": tuple(config["ecapa_channels"])},
        "resnet": {"base_channels": config["resnet_base_channels"]},
    }
    branches = {
        name: Branch(build_backbone(name, embedding_dim=config["embed_dim"], **backbones[name]), head, HEADS)
        for name in BRANCHES
    }
    per_epoch = config["steps_per_epoch"]
    total = config["epochs"] * per_epoch
    schedules = optim.Schedules(
        optim.cosine_learning_rate(
            config["base_lr_already_scaled"], config["min_lr"], config["warmup_epochs"] * per_epoch, total
        ),
        optim.cosine_momentum(config["teacher_momentum"], 1.0, total),
        optim.epoch_teacher_temp(*config["teacher_temp"], config["teacher_temp_warmup_epochs"], per_epoch),
        config["freeze_last_layer_epochs"] * per_epoch,
    )
    optimizer = optim.build_optimizer(
        "sgd", schedules, weight_decay=config["weight_decay"], clip_norm=config["clip_per_parameter"],
        sgd_momentum=config["sgd_momentum"],
    )
    weights = LossWeights(
        student_temp=config["student_temp"],
        center_momentum=config["center_momentum"],
        cross=config["cross_weight"],
        contrastive=config["contrastive_weight"] * config["contrastive_scale"],
        contrastive_temperature=config["contrastive_temperature"],
    )
    return Recipe(branches, optimizer, schedules, weights, GateRule("always"))


def tensors_under(file, prefix: str) -> dict[str, np.ndarray]:
    """Returns the file's arrays whose names begin with `prefix/`, by the rest of their names."""
    return {name[len(prefix) + 1 :]: file[name] for name in file.files if name.startswith(prefix + "/")}


def views_of(mel: np.ndarray, batch: int) -> jax.Array:
    """Returns normalised log-mel [B, V, T, F] of view-major mel power [V·B, F, T]."""
    normalized = features.normalized_log_mel(jnp.asarray(mel, jnp.float32).swapaxes(1, 2))
    return normalized.reshape((-1, batch) + normalized.shape[1:]).swapaxes(0, 1)


def state_deviation(state: TrainState, file, prefix: str) -> dict[str, float]:
    """Returns the largest deviations of parameters and centres (absolute) and of running statistics (relative)."""
    parameters, statistics, centers = [0.0], [0.0], [0.0]
    for role, variables in (("student", state.student), ("teacher", state.teacher)):
        for branch in BRANCHES:
            ours = interop.branch_to_torch(variables[branch], branch)
            for name, theirs in tensors_under(file, f"{prefix}/{role}/{branch}").items():
                if name.endswith("num_batches_tracked"):
                    continue
                difference = np.abs(ours[name] - theirs)
                if name.endswith(("running_mean", "running_var")):
                    statistics.append(difference.max() / np.abs(theirs).max())
                else:
                    parameters.append(difference.max())
    for branch in BRANCHES:
        other = next(b for b in BRANCHES if b != branch)
        for kind, center in (("self", state.center[branch]["self"]), ("cross", state.center[other]["cross"])):
            centers.append(np.abs(center - file[f"{prefix}/center/{kind}/{branch}"].ravel()).max())
    return {
        "parameters": float(max(parameters)), "statistics": float(max(statistics)), "centers": float(max(centers))
    }


class Reference:
    """A file of reference steps, and our train step for it."""

    def __init__(self, path: str):
        self.file = np.load(path, allow_pickle=False)
        self.config = json.loads(str(self.file["config"]))
        self.recipe = build_recipe(self.config)
        self.losses = self.file["losses"]
        self.step = jax.jit(lambda state, views: train_step_on_features(state, views, self.recipe))

    def initial_students(self) -> dict:
        """Returns the students' initial variables."""
        mels = self.file["step0/global_mel"].shape[1]
        students = {}
        for name, branch in self.recipe.branches.items():
            like = jax.eval_shape(lambda b=branch: b.init(jax.random.key(0), jnp.zeros((2, 32, mels)), train=True))
            students[name] = interop.branch_from_torch(tensors_under(self.file, f"init/student/{name}"), like, name)
        return jax.tree.map(jnp.asarray, students)

    def replay(self, students) -> Iterator[tuple[TrainState, np.ndarray]]:
        """Yields the state and the loss columns after each step from these students."""
        recipe = self.recipe
        state = state_from_students(students, recipe.branches, recipe.optimizer, recipe.gate_rule)
        for i in range(len(self.losses)):
            views = tuple(
                views_of(self.file[f"step{i}/{kind}_mel"], self.config["batch"]) for kind in ("global", "local")
            )
            state, metrics = self.step(state, views)
            yield state, np.array([float(metrics[f"loss/{column}"]) for column in self.config["loss_columns"]])

    def has_state(self, step: int) -> bool:
        """Says whether the file holds the state after a step."""
        return any(name.startswith(f"after{step}/") for name in self.file.files)


def perturbed(tree, seed: int):
    """Returns a pytree of arrays, each number of which is moved by up to half a float32 rounding unit."""
    random = np.random.default_rng(seed)
    unit = np.finfo(np.float32).eps / 2
    return jax.tree.map(lambda x: x * (1 + jnp.asarray(random.uniform(-unit, unit, x.shape), x.dtype)), tree)


def measured_noise(reference: Reference, states: list[TrainState], losses: list[np.ndarray]) -> dict[str, list[float]]:
    """Returns how far replays from initial weights that differ by rounding alone drift from ours, step by step.

    Two correct float32 implementations round differently at every operation; the drift of replays that start a rounding
    apart is what training makes of such differences.
    """
    steps = range(len(losses))
    noise = {kind: [0.0 for _ in steps] for kind in ("losses", "parameters", "statistics", "centers", "embeddings")}
    for seed in range(PERTURBED_REPLAYS):
        replay = reference.replay(perturbed(reference.initial_students(), seed))
        for i, (state, columns) in enumerate(replay):
            noise["losses"][i] = max(noise["losses"][i], float(np.abs(columns / losses[i] - 1).max()))
            if states[i] is not None:
                for kind, drift in state_drift(state, states[i]).items():
                    noise[kind][i] = max(noise[kind][i], drift)
            if i == steps[-1]:
                drift = max(
                    float(np.abs(a - b).max())
                    for roles in ((state.student, states[i].student), (state.teacher, states[i].teacher))
                    for a, b in zip(*(eval_embeddings(reference, role).values() for role in roles), strict=True)
                )
                noise["embeddings"][i] = max(noise["embeddings"][i], drift)
    return noise


def state_drift(a: TrainState, b: TrainState) -> dict[str, float]:
    """Returns the largest differences of two of our states, in the measures of `state_deviation`."""
    parameters, statistics = [0.0], [0.0]
    for ours, others in ((a.student, b.student), (a.teacher, b.teacher)):
        for branch in ours:
            for x, y in zip(*(jax.tree.leaves(v[branch]["params"]) for v in (ours, others)), strict=True):
                parameters.append(float(jnp.abs(x - y).max()))
            for x, y in zip(*(jax.tree.leaves(v[branch]["batch_stats"]) for v in (ours, others)), strict=True):
                statistics.append(float(jnp.abs(x - y).max() / jnp.abs(y).max()))
    centers = [float(jnp.abs(x - y).max()) for x, y in zip(jax.tree.leaves(a.center), jax.tree.leaves(b.center))]
    return {"parameters": max(parameters), "statistics": max(statistics), "centers": max(centers)}


def eval_embeddings(reference: Reference, variables) -> dict[str, jax.Array]:
    """Returns the eval-mode embeddings {branch: [N, D]} of the file's test input."""
    mel = jnp.asarray(reference.file["eval/mel"], jnp.float32).swapaxes(1, 2)
    inputs = features.normalized_log_mel(mel)
    return {
        name: branch.apply(variables[name], inputs, method="embed") for name, branch in reference.recipe.branches.items()
    }


def embedding_deviation(reference: Reference, variables, prefix: str) -> float:
    """Returns the largest absolute deviation of our eval-mode embeddings from those under a prefix of the file."""
    theirs = tensors_under(reference.file, prefix)
    ours = eval_embeddings(reference, variables)
    return max(float(np.abs(ours[name] - theirs[name]).max()) for name in ours)


def compare(path: str) -> dict:
    """Returns the deviations of our steps from those in a reference file, and those that pass ten times the noise."""
    reference = Reference(path)
    students = reference.initial_students()
    result = {"losses": [], "state": {}, "embeddings": {}, "noise": {}, "passed_tolerance": []}
    result["embeddings"]["before"] = embedding_deviation(reference, students, "eval/embedding")

    states, losses = [], []
    last = len(reference.losses) - 1
    for i, (state, columns) in enumerate(reference.replay(students)):
        losses.append(columns)
        result["losses"].append([float(d) for d in np.abs(columns / reference.losses[i] - 1)])
        states.append(state if reference.has_state(i) or i == last else None)
        if reference.has_state(i):
            result["state"][f"after{i}"] = state_deviation(state, reference.file, f"after{i}")
    result["embeddings"]["after"] = max(
        embedding_deviation(reference, variables, f"eval_after_last/{role}/embedding")
        for role, variables in (("student", state.student), ("teacher", state.teacher))
    )

    noise = result["noise"] = measured_noise(reference, states, losses)

    def check(what: str, deviation: float, *noises: float):
        limit = 10 * max(noises)
        if not deviation <= limit:  # NaN does not pass either
            result["passed_tolerance"].append(f"{what}: {deviation:.3g} > {limit:.3g}")

    check("embeddings before", result["embeddings"]["before"], EMBEDDING_NOISE)
    for i in range(last + 1):
        check(f"losses of step {i}", max(result["losses"][i]), noise_at(i, LOSS_NOISE), noise["losses"][i])
        if deviation := result["state"].get(f"after{i}"):
            known, relative = noise_at(i, PARAMETER_NOISE), noise_at(i, LOSS_NOISE)
            check(f"parameters after step {i}", deviation["parameters"], known, noise["parameters"][i])
            check(f"statistics after step {i}", deviation["statistics"], relative, noise["statistics"][i])
            check(f"centers after step {i}", deviation["centers"], known, noise["centers"][i])
    check("embeddings after", result["embeddings"]["after"], EMBEDDING_NOISE, noise["embeddings"][last])
    return result


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", metavar="FILE", help="npz of reference steps")
    options = parser.parse_args(arguments)
    try:
        result = compare(options.file)
    except (OSError, KeyError, ValueError) as error:
        print(f"parity: {options.file}: {error}", file=sys.stderr)
        return 2
    print(json.dumps(result, indent=2))
    return 1 if result["passed_tolerance"] else 0


if __name__ == "__main__":
    sys.exit(main())
