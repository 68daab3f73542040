"""Replays reference training steps through our train step and prints how far they differ, as one JSON object.

    python experiments/parity.py FILE

FILE is an npz of initial weights by PyTorch names, mel inputs of each step, and the losses, weights, statistics and
centres that a reference implementation reached. A JSON `config` inside states sizes and schedules, and by `mode` which
steps are taken, if not MeMo's. The exit status is 1 when a deviation passes ten times the float32 noise, 2 when FILE
cannot be used.

Printed are `losses` (for each step, a list of the relative deviations of the loss columns), `state` (for each step
whose state FILE holds, the largest deviations: of parameters and centres absolute, of running statistics and the loss
gate relative), `embeddings` (largest absolute deviations before the first and after the last step), `deviations` and
`noise` (both by the names of single checks; the latter is what rounding alone causes) and `passed_tolerance` (the
checks that failed).
"""

import argparse
import functools
import json
import sys
import zipfile
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from memo_jax import features
from memo_jax.files import as_json
from memo_jax.inference import interop
from memo_jax.models import SPEAKER_HEAD, Branch, build_backbone
from memo_jax.models.heads import DINOHead
from memo_jax.training import optim
from memo_jax.training.front_end import Views
from memo_jax.training.gate import GateRule
from memo_jax.training.loss_gate import gate_threshold, initial_loss_gate
from memo_jax.training.state import TrainState, state_from_students
from memo_jax.training.step import GatedBatch, LossWeights, Recipe, Supervision, train_step_on_features

SPEAKER_WEIGHT = f"{SPEAKER_HEAD}.weight"
HEADS = ("self", "cross")
BRANCHES = ("ecapa", "resnet")

# The noise of one rounding before training amplifies it; `measured_noise` finds the rest. That of the threshold is how
# far from convergence the fit of the two distributions stops.
SMALLEST_NOISE = {
    "losses": 1e-6,
    "parameters": 1e-7,
    "statistics": 1e-6,
    "centers": 1e-7,
    "gate": 1e-6,
    "threshold": 1e-4,
    "embeddings": 1e-6,
}
NOISE_MARGIN = 10
PERTURBED_REPLAYS = 5
REPLAY_MARGIN = 4


class Run(NamedTuple):
    """What steps reached: losses [steps, columns], and arrays by their names in a reference file."""

    losses: np.ndarray
    states: dict[int, dict[str, np.ndarray]]
    embeddings: dict[str, np.ndarray]


def build_recipe(config: dict) -> Recipe:
    """Returns our recipe for a reference file's config."""
    dtype = jnp.dtype(config.get("dtype", jnp.float32))  # by its attribute, which parity_float64.py changes
    head = DINOHead(config["prototypes"], config["head_hidden"], config["head_bottleneck"], dtype)
    backbones = {
        "ecapa": lambda: {"channels": tuple(config["ecapa_channels"])},
        "resnet": lambda: {
            "base_channels": config["resnet_base_channels"],
            "blocks": tuple(config.get("resnet_blocks", (3, 4, 6, 3))),
            "remat": config.get("resnet_remat", "none"),
        },
    }
    branches = {
        name: Branch(
            build_backbone(name, embedding_dim=config["embed_dim"], dtype=dtype, **backbones[name]()),
            head,
            tuple(config.get("heads", HEADS)),
            config.get("speakers", 0),
        )
        for name in config.get("branches", BRANCHES)
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
    weights = LossWeights(
        student_temp=config["student_temp"], center_momentum=config["center_momentum"], contrastive=0.0, cross=0.0
    )
    schedules, weights, supervision = OPTIONS[config.get("mode", "memo")](config, schedules, weights)
    optimizer = optim.build_optimizer(
        "sgd",
        schedules,
        weight_decay=config["weight_decay"],
        clip_norm=config["clip_per_parameter"],
        sgd_momentum=config["sgd_momentum"],
    )
    return Recipe(
        branches,
        optimizer,
        schedules,
        weights,
        GateRule("always"),
        supervision,
        remat=config.get("crop_remat", True),
        shared_prototypes=weights.targets == "sinkhorn",
    )


def memo(config: dict, schedules: optim.Schedules, weights: LossWeights):
    """Returns schedules, weights and supervision of MeMo; the following functions, those of options."""
    weights = weights._replace(
        cross=config["cross_weight"],
        contrastive=config["contrastive_weight"] * config["contrastive_scale"],
        contrastive_temperature=config["contrastive_temperature"],
    )
    return schedules, weights, Supervision()


def sdpn(config: dict, schedules: optim.Schedules, weights: LossWeights):
    """A softmax that is sharpened to a power and normalised equals one at a smaller temperature."""
    temperature = optax.constant_schedule(config["student_temp"] / config["sharpening"])
    weights = weights._replace(
        targets="sinkhorn", mean_entropy=config["mean_entropy_weight"], koleo=config["koleo_weight"]
    )
    return schedules._replace(teacher_temp=temperature), weights, Supervision()


def rdino(config: dict, schedules: optim.Schedules, weights: LossWeights):
    """The two weights reach λ's end, and rise from its start."""
    start, end = config["regularizer"]
    warmup = round(config["regularizer_warmup_epochs"] * config["steps_per_epoch"])
    weights = weights._replace(variance=end * config["variance_weight"], covariance=end * config["covariance_weight"])
    return (schedules._replace(regularization=optim.rising_regularization(start / end, warmup)), weights, Supervision())


def partners(config: dict, schedules: optim.Schedules, weights: LossWeights):
    """The factor of the logits is the inverse of a temperature."""
    weights = weights._replace(
        contrastive=config["contrastive_weight"],
        contrastive_temperature=1 / config["contrastive_logit_scale"],
        contrastive_margin=config["contrastive_margin"],
    )
    return schedules, weights, Supervision()


def pseudo_labels(config: dict, schedules: optim.Schedules, weights: LossWeights):
    """AAM-softmax with loss gate and label correction."""
    supervision = Supervision(
        config["supervised_weight"],
        config["scale"],
        config["utterances"],
        config["correct_labels_after_epochs"] * config["steps_per_epoch"],
        config["correction_temperature"],
        config["correction_probability"],
    )
    margin = optim.rising_margin(config["margin"], config["margin_warmup_steps"])
    return schedules._replace(margin=margin), weights, supervision


OPTIONS = {function.__name__: function for function in (memo, sdpn, rdino, partners, pseudo_labels)}
STUDENT_VIEWS = {
    "memo": ("global", "local"),
    "sdpn": ("local",),
    "rdino": ("global", "local"),
    "partners": ("global",),
    "pseudo_labels": ("global",),
}


@jax.jit
def normalized_log_mel(mel: jax.Array) -> jax.Array:
    """Returns normalised log-mel [N, T, F] of mel power [N, F, T]."""
    return features.normalized_log_mel(mel.astype(jnp.float32).swapaxes(1, 2))


def views_of(mel: np.ndarray, batch: int) -> jax.Array:
    """Returns normalised log-mel [B, V, T, F] of view-major mel power [V·B, F, T]."""
    normalized = normalized_log_mel(mel)
    return normalized.reshape((-1, batch) + normalized.shape[1:]).swapaxes(0, 1)


def state_tensors(state: TrainState) -> dict[str, np.ndarray]:
    """Returns a state's arrays by their names in a reference file."""
    tensors, branches = {}, tuple(state.student)
    for role, variables in (("student", state.student), ("teacher", state.teacher)):
        for branch in branches:
            params = dict(variables[branch]["params"])
            if SPEAKER_HEAD in params:
                tensors[f"{role}/{branch}/{SPEAKER_WEIGHT}"] = np.asarray(params.pop(SPEAKER_HEAD)["directions"]).T
            named = interop.branch_to_torch(variables[branch] | {"params": params}, branch)
            tensors |= {f"{role}/{branch}/{name}": tensor for name, tensor in named.items()}
    for branch, other in zip(branches, branches[::-1], strict=True):
        # A reference names a centre after the student whose loss uses it, we after the teacher it follows.
        for head in state.center[branch]:
            center = state.center[other if head == "cross" else branch][head]
            tensors[f"center/{head}/{branch}"] = np.asarray(center)[None]
    if state.loss_gate is not None:
        tensors |= {f"gate/{name}": np.asarray(getattr(state.loss_gate, name)) for name in ("losses", "threshold")}
    return tensors


@functools.cache
def compiled(config: str):
    """Returns the recipe and, jitted, the initial state, the step and the embeddings for a file's config (JSON)."""
    recipe = build_recipe(json.loads(config))

    def start(students):
        state = state_from_students(students, recipe.branches, recipe.optimizer, recipe.gate_rule)
        utterances = recipe.supervision.gated_utterances
        return state.replace(loss_gate=initial_loss_gate(utterances)) if utterances else state

    def embed(variables, inputs):
        return {name: branch.apply(variables[name], inputs, method="embed") for name, branch in recipe.branches.items()}

    def step(state, views, labels, gated):
        return train_step_on_features(state, views, recipe, labels, gated)

    return recipe, jax.jit(start), jax.jit(step), jax.jit(embed)


class Reference:
    """A file of reference steps, and our train step for it."""

    def __init__(self, path: str):
        file = np.load(path, allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise ValueError("not an npz file")
        self.arrays = {name: file[name] for name in file.files}
        self.config = json.loads(str(self.arrays["config"]))
        self.recipe, self.start, self.step, self.embed = compiled(str(self.arrays["config"]))

    def under(self, prefix: str) -> dict[str, np.ndarray]:
        """Returns the file's arrays whose names begin with `prefix/`, by the rest of their names."""
        return {name[len(prefix) + 1 :]: x for name, x in self.arrays.items() if name.startswith(prefix + "/")}

    def reached(self) -> Run:
        """Returns what the reference reached."""
        branches = self.recipe.branches
        embeddings = {f"before/{branch}": self.arrays[f"eval/embedding/{branch}"] for branch in branches}
        for role in ("student", "teacher"):
            for branch in branches:
                embeddings[f"after/{role}/{branch}"] = self.arrays[f"eval_after_last/{role}/embedding/{branch}"]
        states = {i: self.under(f"after{i}") for i in range(len(self.arrays["losses"]))}
        return Run(self.arrays["losses"], {i: state for i, state in states.items() if state}, embeddings)

    def initial_students(self) -> dict:
        """Returns the students' initial variables."""
        mels = self.arrays["eval/mel"].shape[1]
        students = {}
        for name, branch in self.recipe.branches.items():
            like = jax.eval_shape(lambda b=branch: b.init(jax.random.key(0), jnp.zeros((2, 32, mels)), train=True))
            tensors, speakers = self.under(f"init/student/{name}"), {}
            if branch.speakers:
                like["params"].pop(SPEAKER_HEAD)
                speakers = {SPEAKER_HEAD: {"directions": tensors.pop(SPEAKER_WEIGHT).T}}
            variables = interop.branch_from_torch(tensors, like, name)
            students[name] = variables | {"params": variables["params"] | speakers}
        return jax.tree.map(lambda x: np.asarray(x, jnp.float32), students)

    def eval_embeddings(self, variables, prefix: str) -> dict[str, np.ndarray]:
        """Returns the eval-mode embeddings {prefix/branch: [N, D]} of the file's test input."""
        inputs = normalized_log_mel(self.arrays["eval/mel"])
        return {f"{prefix}/{name}": np.asarray(x) for name, x in self.embed(variables, inputs).items()}

    def batch(self, step: int) -> tuple[Views, jax.Array | None, GatedBatch | None]:
        """Returns what a step learns from: views, labels, and what the loss gate reads."""
        mode = self.config.get("mode", "memo")

        def views(kind):
            return views_of(self.arrays[f"step{step}/{kind}_mel"], self.config["batch"])

        students = tuple(views(kind) for kind in STUDENT_VIEWS[mode])
        teachers = views("teacher") if mode in ("sdpn", "partners") else None
        if not self.recipe.supervision.gated_utterances:
            return Views(students, teachers), None, None
        index, labels = (jnp.asarray(self.arrays[f"step{step}/{name}"], jnp.int32) for name in ("index", "label"))
        return Views(students, teachers), labels, GatedBatch(index, views("clean")[:, 0])

    def run(self, students) -> Run:
        """Takes the file's steps from these students, by our train step."""
        embeddings = self.eval_embeddings(students, "before")
        state = self.start(students)
        losses, states, kept = [], {}, self.reached().states
        for i in range(len(self.arrays["losses"])):
            state, metrics = self.step(state, *self.batch(i))
            if state.loss_gate is not None and (i + 1) % self.config["steps_per_epoch"] == 0:
                threshold = jnp.asarray(gate_threshold(state.loss_gate.losses), jnp.float32)
                state = state.replace(loss_gate=state.loss_gate.replace(threshold=threshold))
            losses.append([float(metrics[f"loss/{column}"]) for column in self.config["loss_columns"]])
            if i in kept:
                states[i] = state_tensors(state)
        embeddings |= self.eval_embeddings(state.student, "after/student")
        embeddings |= self.eval_embeddings(state.teacher, "after/teacher")
        return Run(np.array(losses), states, embeddings)


def perturbed(tree, seed: int):
    """Returns a pytree of arrays, each number of which is moved by up to ten float32 rounding errors."""
    random = np.random.default_rng(seed)
    reach = NOISE_MARGIN * np.finfo(np.float32).eps / 2
    return jax.tree.map(lambda x: np.asarray(x * (1 + random.uniform(-reach, reach, x.shape)), x.dtype), tree)


def kind_of(name: str) -> str:
    """Returns whether a state's array belongs to the parameters, statistics, centers, or (losses of) the loss gate."""
    if name.startswith("center/"):
        return "centers"
    if name.startswith("gate/"):
        return "threshold" if name.endswith("/threshold") else "gate"
    return "statistics" if name.endswith(("running_mean", "running_var")) else "parameters"


def deviations(run: Run, reference: Run) -> dict[str, float]:
    """Returns how far a run is from a reference, as "losses/step0/ecapa" or "parameters/after0/student/ecapa".

    Students and teachers of each architecture are checked by themselves: a ResNet amplifies rounding a thousand times
    more than an ECAPA-TDNN does.
    """
    branches = [name.split("/")[1] for name in reference.embeddings if name.startswith("before/")]
    result = {
        f"losses/step{i}/{branch}": float(relative[first :: len(branches)].max())
        for i, relative in enumerate(np.abs(run.losses / reference.losses - 1))
        for first, branch in enumerate(branches)
    }

    def keep_largest(check: str, deviation):
        # Not max(): a NaN has to stay.
        result[check] = float(np.maximum(result.get(check, 0.0), deviation))

    for i, state in reference.states.items():
        for name, theirs in state.items():
            if name.endswith("num_batches_tracked"):
                continue
            kind, (role, branch) = kind_of(name), name.split("/")[:2]
            part = f"/{role}/{branch}" if kind in ("parameters", "statistics") else ""
            scale = np.abs(theirs).max() if kind in ("statistics", "gate", "threshold") else 1.0
            keep_largest(f"{kind}/after{i}{part}", np.abs(run.states[i][name] - theirs).max() / scale)
    for name, theirs in reference.embeddings.items():
        keep_largest(f"embeddings/{name}", np.abs(run.embeddings[name] - theirs).max())
    return result


def measured_noise(reference: Reference, students, run: Run) -> dict[str, float]:
    """Returns the float32 noise of every check: how far two correct float32 implementations drift apart.

    Each rounds differently at every operation, and training amplifies that: smoothly where it can, in jumps where a
    rounding puts a ReLU's input on the other side of zero. Starting weights perturbed by ten roundings give ten times
    the noise and trigger the jumps ten times as often, thus a few replays suffice to meet them. A margin allows for
    noise on both sides, and for drift that no longer scales with the perturbation once jumps accumulate.
    """
    noise: dict[str, float] = {}
    for seed in range(PERTURBED_REPLAYS):
        for check, drift in deviations(reference.run(perturbed(students, seed)), run).items():
            smallest = SMALLEST_NOISE[check.split("/")[0]]
            noise[check] = max(noise.get(check, smallest), REPLAY_MARGIN * drift / NOISE_MARGIN)
    return noise


def report(run: Run, reference: Run, noise: dict[str, float]) -> dict:
    """Returns the result to print: deviations of our run from a reference, and those beyond ten times their noise."""
    found = deviations(run, reference)

    def largest(prefix: str) -> float:
        return float(np.max([deviation for check, deviation in found.items() if check.startswith(prefix)], initial=0.0))

    return {
        "losses": np.abs(run.losses / reference.losses - 1).tolist(),
        "state": {
            f"after{i}": {kind: largest(f"{kind}/after{i}") for kind in sorted(set(map(kind_of, state)))}
            for i, state in reference.states.items()
        },
        "embeddings": {when: largest(f"embeddings/{when}") for when in ("before", "after")},
        "deviations": found,
        "noise": noise,
        "passed_tolerance": [
            f"{check}: {deviation:.3g} > {NOISE_MARGIN * noise[check]:.3g}"
            for check, deviation in found.items()
            if not deviation <= NOISE_MARGIN * noise[check]  # nor does NaN pass
        ],
    }


def compare(path: str) -> dict:
    """Returns the result of our steps against those of a reference file."""
    reference = Reference(path)
    students = reference.initial_students()
    run, theirs = reference.run(students), reference.reached()
    return report(run, theirs, measured_noise(reference, students, run))


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", metavar="FILE", help="npz of reference steps")
    options = parser.parse_args(arguments)
    try:
        result = compare(options.file)
    except KeyError as error:
        print(f"parity: {options.file}: has no {error.args[0]!r}", file=sys.stderr)
        return 2
    except (OSError, EOFError, TypeError, ValueError, zipfile.BadZipFile) as error:
        print(f"parity: {options.file}: {error}", file=sys.stderr)
        return 2
    print(as_json(result))
    return 1 if result["passed_tolerance"] else 0


if __name__ == "__main__":
    sys.exit(main())
