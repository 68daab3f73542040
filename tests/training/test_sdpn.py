"""Options of the step as a run uses them: SDPN's, alone and with partners, on a one-layer network."""

import numpy as np
import pytest

import tiny
import tiny_processes
from memo_jax.log import read_metrics
from memo_jax.training import recipe
from memo_jax.training.checkpoint import load_state
from runs import assert_same_state

pytestmark = pytest.mark.usefixtures("compiled_once")
SDPN = (
    "data.global_crops=1",
    "data.local_crops=2",
    "model.shared_prototypes=True",
    "loss.targets=sinkhorn",
    "loss.mean_entropy=1",
    "loss.koleo=0.1",
    "loss.variance=2",
    "loss.covariance=0.2",
    "loss.regularizer_warmup_epochs=1",
    "gate.rule=never",
    "teacher.view=clean",
    "teacher.temp=0.025",
    "teacher.end_temp=0.025",
)
PARTNERS = (
    "positives.clusters=6",
    "positives.from_epochs=-1",
    "positives.from_steps=2",
    "positives.reference_seconds=0.32",
)


@pytest.fixture(autouse=True)
def one_layer(monkeypatch):
    monkeypatch.setattr(recipe, "build_backbone", tiny_processes.layer)


def train(workdir, *arguments):
    status, text = tiny.train_here(workdir, *arguments)
    assert status == 0, text


def test_sdpn_resumes_exactly_alone_and_with_partners(tmp_path):
    """Until the first draw the losses are the same: a partner's clean crops come from the same program."""
    train(tmp_path / "alone", *SDPN, "--stop-at-step=4")
    train(tmp_path / "whole", *SDPN, *PARTNERS, "--stop-at-step=4")
    train(tmp_path / "parts", *SDPN, *PARTNERS, "--stop-at-step=2")
    train(tmp_path / "parts", *SDPN, *PARTNERS, "--stop-at-step=4")
    assert_same_state(tmp_path / "parts", tmp_path / "whole", least=20)
    alone, whole = ([row["loss"] for row in read_metrics(tmp_path / name)] for name in ("alone", "whole"))
    assert alone[:2] == whole[:2] and alone[2] != whole[2]
    row = read_metrics(tmp_path / "whole")[-1]
    kinds = ("self", "mean_entropy", "koleo", "variance", "covariance")
    assert row["loss"] == pytest.approx(sum(row[f"loss/{kind}/resnet"] for kind in kinds), rel=1e-5)
    state = load_state(tmp_path / "whole")
    student, teacher = (state[role]["resnet"]["params"]["self_head"] for role in ("student", "teacher"))
    np.testing.assert_array_equal(student["prototypes"], teacher["prototypes"])
    assert (student["linear_0"]["kernel"] != teacher["linear_0"]["kernel"]).any()


@pytest.mark.parametrize(
    "settings, said",
    [
        (["loss.targets=balanced"], "loss.targets is 'balanced': choose one of centered, sinkhorn"),
        (["teacher.view=local"], "teacher.view is 'local': choose one of global, clean"),
        (["teacher.view=clean", "data.local_crops=0"], "data.local_crops 0: with teacher.view=clean"),
        (["loss.koleo=-1"], "loss.koleo is -1"),
        (["loss.mean_entropy=-1"], "loss.mean_entropy is -1"),
        (["loss.variance=-1"], "loss.variance is -1"),
        (["loss.covariance=-1"], "loss.covariance is -1"),
        (["loss.regularizer_start=2"], "loss.regularizer_start is 2"),
    ],
)
def test_settings_that_cannot_work_are_named(settings, said, tmp_path):
    status, text = tiny.train_here(tmp_path / "run", *settings)
    assert status == 2 and said in text and not (tmp_path / "run").exists(), text
