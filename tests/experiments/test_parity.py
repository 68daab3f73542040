"""experiments/parity.py: our train step against steps of an independent PyTorch implementation.

tests/reference_steps.npz holds steps that experiments/make_reference.py took in float64, and the losses of the
same steps with one mistake each. It was written by

    make_reference.py make reference_steps.npz --float64 --mistakes

tests/reference_<mode>.npz hold the same for steps beyond MeMo's, by `--mode` (sdpn, rdino, partners, pseudo_labels):

    make_reference.py make reference_sdpn.npz --mode sdpn --float64 --mistakes
"""

import contextlib
import importlib.util
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import tiny
from memo_jax.models import layers
from memo_jax.xla import reductions

PROJECT = Path(__file__).parents[2]
TINY = PROJECT / "tests" / "reference_steps.npz"


@pytest.fixture(scope="module")
def parity():
    spec = importlib.util.spec_from_file_location("parity", PROJECT / "experiments" / "parity.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_main(parity, *arguments) -> tuple[int, str]:
    """Returns the exit status and what was printed."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        status = parity.main([str(argument) for argument in arguments])
    return status, out.getvalue()


@pytest.fixture(scope="module")
def judged(parity):
    """The exit status of parity.py for the tiny file, and what it prints."""
    status, out = run_main(parity, TINY)
    return status, json.loads(out)


@pytest.fixture(scope="module")
def our_run(parity):
    """Our steps on the tiny file, and the reference's."""
    reference = parity.Reference(TINY)
    return reference.run(reference.initial_students()), reference.reached()


def check_keys(result: dict, path: Path):
    with np.load(path) as file:
        losses = file["losses"]
        kept = {name.split("/")[0] for name in file.files if name.startswith("after")}
    assert np.shape(result["losses"]) == losses.shape
    assert set(result["state"]) == kept
    for deviation in result["state"].values():
        assert set(deviation) == {"parameters", "statistics", "centers"}
    assert set(result["embeddings"]) == {"before", "after"}


def test_tiny_reference_is_reproduced(judged):
    status, result = judged
    assert result["passed_tolerance"] == []
    assert status == 0
    check_keys(result, TINY)
    # Before training has amplified anything, float32 leaves room for rounding only.
    assert np.max(result["losses"][0]) < 1e-5
    assert result["state"]["after0"]["parameters"] < 1e-4
    assert result["embeddings"]["before"] < 1e-5


def test_tiny_reference_puts_every_part_of_the_step_to_the_test(parity):
    """A setting at a neutral value (a weight of 1, a rate of 0) would hide whether the step uses it."""
    reference = parity.Reference(TINY)
    config, arrays = reference.config, reference.arrays
    assert config["cross_weight"] != 1 and config["weight_decay"] > 0 and arrays["schedule/lr"][0] > 0
    temperature = reference.recipe.schedules.teacher_temp
    steps = len(arrays["losses"])
    assert float(temperature(0)) != float(temperature(steps - 1))
    assert 0 < reference.recipe.schedules.prototypes_from < steps
    for i, state in reference.reached().states.items():
        kinds = {(parity.kind_of(name), *name.split("/")[:2]) for name in state}
        roles = {(role, branch) for role in ("student", "teacher") for branch in parity.BRANCHES}
        assert kinds >= {(kind, *role) for kind in ("parameters", "statistics") for role in roles}, i
        assert {name for name in state if name.startswith("center/")} == {
            f"center/{kind}/{branch}" for kind in parity.HEADS for branch in parity.BRANCHES
        }


def with_tensor(run, step: int, name: str, change):
    """Returns a run with one array of its state after a step changed."""
    state = run.states[step]
    return run._replace(states=run.states | {step: state | {name: change(state[name])}})


def failed(parity, ours, reference, noise) -> list[str]:
    """Returns the checks that fail against a reference."""
    return [line.split(":")[0] for line in parity.report(ours, reference, noise)["passed_tolerance"]]


with np.load(TINY) as file:
    MISTAKES = sorted(name.split("/")[1] for name in file.files if name.startswith("mistake/"))


def test_there_are_mistakes():
    assert {"tanh_gelu", "decayed_biases", "global_clip", "center_momentum", "teacher_momentum"} <= set(MISTAKES)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_is_caught(parity, judged, our_run, mistake):
    """To a comparison it is all the same whether our step or the reference makes the mistake, so the reference does."""
    ours, reference = our_run
    with np.load(TINY) as file:
        mistaken = reference._replace(losses=file[f"mistake/{mistake}/losses"])
    caught = failed(parity, ours, mistaken, judged[1]["noise"])
    assert caught and all(check.startswith("losses/") for check in caught)


@pytest.mark.parametrize(
    ("check", "tensor", "change"),
    [
        # Prototypes frozen by a zeroed gradient, so that decay still shrinks them; being normalised, no loss shows it.
        (
            "parameters",
            "student/ecapa/self_head.last_layer.weight_v",
            lambda v, c: v * (1 - c["base_lr_already_scaled"] * c["weight_decay"]),
        ),
        # A running variance over n instead of n − 1 values: no training loss shows this either.
        ("statistics", "student/resnet/self_head.mlp.1.running_var", lambda v, c: v * (1 - 0.1 / (4 * c["batch"]))),
        ("statistics", "teacher/ecapa/backbone.asp_bn.norm.running_mean", lambda v, c: 0.999 * v),
        ("parameters", "teacher/resnet/backbone.conv1.weight", lambda v, c: v[..., ::-1]),
        ("centers", "center/cross/ecapa", lambda v, c: v * 1.0001),
        ("parameters", "student/ecapa/self_head.mlp.4.bias", lambda v, c: np.full_like(v, np.nan)),
    ],
)
def test_change_of_state_is_caught(parity, judged, our_run, check, tensor, change):
    ours, reference = our_run
    config = parity.Reference(TINY).config
    changed = with_tensor(reference, 0, tensor, lambda value: change(value, config))
    (caught,) = failed(parity, ours, changed, judged[1]["noise"])
    assert caught.startswith(f"{check}/after0")


def test_swapped_cross_centers_are_caught(parity, judged, our_run):
    ours, reference = our_run
    state = reference.states[0]
    swapped = with_tensor(reference, 0, "center/cross/ecapa", lambda _: state["center/cross/resnet"])
    assert failed(parity, ours, swapped, judged[1]["noise"]) == ["centers/after0"]


def rewritten(path: Path, changes: dict) -> Path:
    """Writes the tiny file with some arrays replaced, or left out if None."""
    with np.load(TINY) as file:
        arrays = {name: file[name] for name in file.files} | changes
    np.savez(path, **{name: value for name, value in arrays.items() if value is not None})
    return path


def test_a_wrong_file_exits_with_1(parity, tmp_path):
    with np.load(TINY) as file:
        losses = file["losses"]
    losses[1, 0] *= 1.001
    status, out = run_main(parity, rewritten(tmp_path / "wrong.npz", {"losses": losses}))
    assert status == 1
    assert [line.split(":")[0] for line in json.loads(out)["passed_tolerance"]] == ["losses/step1/ecapa"]


def tiny_config(**changes) -> np.ndarray:
    with np.load(TINY) as file:
        return np.array(json.dumps(json.loads(str(file["config"])) | changes))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"config": None}, "config"),
        ({"losses": None}, "losses"),
        ({"config": np.array("{")}, ""),
        ({"config": np.array('{"prototypes": 8}')}, "head_hidden"),
        ({"step0/global_mel": None}, "step0/global_mel"),
        ({"init/student/resnet/backbone.conv1.weight": None}, "backbone.conv1.weight"),
        ({"init/student/resnet/backbone.conv1.weight": np.zeros((2, 1, 5, 5), np.float32)}, "backbone.conv1.weight"),
        ({"init/student/ecapa/backbone.fc.conv.bias": np.array(["a"] * 12)}, ""),
    ],
)
def test_unusable_file_exits_with_2(parity, tmp_path, capsys, changes, named):
    path = rewritten(tmp_path / "unusable.npz", changes)
    assert parity.main([str(path)]) == 2
    out, error = capsys.readouterr()
    assert out == "" and str(path) in error and named in error


@pytest.mark.parametrize("content", [None, b"", b"plain text", TINY.read_bytes()[:5000]])
def test_file_that_is_not_an_npz_exits_with_2(parity, tmp_path, capsys, content):
    path = tmp_path / "no.npz"
    if content is not None:
        path.write_bytes(content)
    assert parity.main([str(path)]) == 2
    assert str(path) in capsys.readouterr().err


# For each mode, how far apart PyTorch's own float32 and float64 steps are, as `make_reference.py replay` prints: the
# losses of each step (relative), and the parameters in the file's first state.
PYTORCH_NOISE = {
    "sdpn": ([6.6e-7, 1.2e-6, 5.6e-6, 2.4e-6], 9.1e-8),
    "rdino": ([4.2e-7, 6.2e-6, 1.8e-5, 2.0e-5], 8.6e-7),
    "partners": ([2.8e-7, 8.9e-8, 5.3e-7, 2.5e-7], 1.6e-7),
    "pseudo_labels": ([1.6e-7, 1.5e-7, 9.1e-5, 1.9e-5, 5.1e-5, 2.4e-5], 3.8e-7),
}


def reference_of(mode: str) -> Path:
    return PROJECT / "tests" / f"reference_{mode}.npz"


@pytest.fixture(scope="module", params=PYTORCH_NOISE)
def option(parity, request):
    """A mode, its reference, our steps, and the output of our comparison."""
    reference = parity.Reference(reference_of(request.param))
    students = reference.initial_students()
    run, theirs = reference.run(students), reference.reached()
    return request.param, reference, run, parity.report(run, theirs, parity.measured_noise(reference, students, run))


def test_option_is_reproduced(option):
    mode, reference, _, result = option
    assert result["passed_tolerance"] == []
    losses, parameters = PYTORCH_NOISE[mode]
    assert (np.max(result["losses"], axis=1) < 10 * np.array(losses)).all()
    assert np.shape(result["losses"])[1] == len(reference.config["loss_columns"])
    assert result["state"][min(result["state"])]["parameters"] < 10 * parameters
    assert result["embeddings"]["before"] < 1e-5


def test_steps_with_batch_statistics_in_one_pass_are_reproduced(parity, monkeypatch):
    """As accelerators take them, and within tolerances that are derived as those above. This network compiles in a
    fraction of the time of MeMo's two, and has batch norms over one, two and three axes."""
    traced, in_one_pass = [], reductions._in_one_pass

    def counted(x, near_mean):
        traced.append(x.shape)
        return in_one_pass(x, near_mean)

    monkeypatch.setattr(reductions, "MEAN_FIRST_ON", ())
    monkeypatch.setattr(reductions, "_in_one_pass", counted)
    monkeypatch.setattr(layers, "normalized_batch", layers.normalized_batch.__wrapped__)  # not what is traced already
    monkeypatch.setattr(parity, "compiled", parity.compiled.__wrapped__)
    assert parity.compare(reference_of("sdpn"))["passed_tolerance"] == []
    assert {len(shape) for shape in traced} == {2, 4}


def test_an_option_is_reproduced_in_float64():
    """In a process of its own, since what float64 needs is decided at import."""
    command = [sys.executable, tiny.ROOT / "experiments" / "parity_float64.py", reference_of("partners")]
    done = subprocess.run(command, env=tiny.environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert np.max(json.loads(done.stdout)["losses"]) < 1e-7, "float32 deviates by more"


def test_mistake_in_an_option_is_caught(parity, option):
    _, reference, run, result = option
    mistakes = {name.split("/")[1]: x for name, x in reference.arrays.items() if name.startswith("mistake/")}
    assert len(mistakes) >= 3
    for name, losses in mistakes.items():
        caught = failed(parity, run, reference.reached()._replace(losses=losses), result["noise"])
        assert caught and all(check.startswith("losses/") for check in caught), name


def test_pseudo_labels_are_kept_left_out_and_corrected(parity):
    """The reference would not test gate and correction if all utterances passed, or none was corrected."""
    with np.load(reference_of("pseudo_labels")) as file:
        losses, threshold = file["after1/gate/losses"], file["after1/gate/threshold"]
        assert 0 < (losses <= threshold).sum() < len(losses)
        differs = {
            name: np.abs(file[f"mistake/{name}/losses"] / file["losses"] - 1).max(axis=1) > 1e-2
            for name in ("open_loss_gate", "correct_labels_after_epochs", "correction_probability")
        }
    # Two steps per epoch: the gate acts from the second epoch on, the correction in the third.
    assert differs["open_loss_gate"].tolist()[:3] == [False, False, True]
    for name in ("correct_labels_after_epochs", "correction_probability"):
        assert not differs[name][:4].any() and differs[name][4:].any()
