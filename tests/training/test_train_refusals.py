"""Configs and workdirs that training refuses, in one line, leaving nothing."""

import subprocess
from types import SimpleNamespace

import numpy as np
import pytest

import tiny
from memo_jax.training import inputs


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["data.batch_sise=8"], "nearest: data.batch_size"),
        (["data.batch_size=many"], "config.data.batch_size takes an int, not 'many'"),
        (["data.train="], "data.train is empty"),
        (["data.train=nowhere"], "nowhere is not a dataset"),
        (["data.batch_size=21"], "batch_size is 21; expected 1 to 20"),
        (["data.global_crops=1"], "data.global_crops is 1"),
        (["data.global_seconds=0.0"], "global_seconds is 0.0"),
        (["total_steps=0"], "total_epochs or total_steps"),
        (["total_epochs=2"], "exactly one of total_epochs, total_steps"),
        (["log_every_steps=0"], "log_every_steps is 0"),
        (["model.branches=xvector"], "model.branches ('xvector',): choose from ecapa, resnet, campplus"),
        (["model.branches=ensemble"], "model.branches ('ensemble',): choose from ecapa, resnet, campplus"),
        (["augment.rir_seconds=0"], "augment.rir_seconds is 0"),
        (["augment.clean=1.5"], "augment.clean is 1.5"),
        (["model.branches=ecapa", "model.ecapa_channels=16,16"], "model.ecapa_channels is (16, 16)"),
        (["model.ecapa_scale=3"], "multiples of model.ecapa_scale, 3"),
        (["model.ecapa_scale=1"], "model.ecapa_scale is 1: must be at least 2"),
        (["model.resnet_blocks=1,0"], "model.resnet_blocks is (1, 0)"),
        (["model.campplus_layers=1,0,1"], "model.campplus_layers is (1, 0, 1)"),
        (["model.ecapa_form=kaldi"], "model.ecapa_form is 'kaldi': choose one of speechbrain, wespeaker"),
        (["model.resnet_remat=all"], "model.resnet_remat is 'all': choose one of none, norms, blocks"),
        (["model.prototypes=0"], "model.prototypes is 0"),
        (["model.ecapa_stride=0"], "model.ecapa_stride is 0"),
        (["model.resnet_stride=0"], "model.resnet_stride is 0"),
        (["augment.masked_bins=81"], "augment.masked_bins is 81: must be 0 to 80"),
        (["loss.contrastive_margin=-0.1"], "loss.contrastive_margin is -0.1"),
        (["init=nowhere.safetensors"], "nowhere.safetensors"),
        (["model.dtype=float16"], "model.dtype is 'float16': choose one of float32, bfloat16"),
        (["teacher.momentum=1.5"], "teacher.momentum is 1.5"),
        (["teacher.temp=0.0"], "teacher.temp is 0.0"),
        (["optimizer.name=lamb"], "optimizer.name is 'lamb': choose one of sgd, adamw"),
        (["optimizer.learning_rate=-1"], "optimizer.learning_rate is -1.0"),
        (["optimizer.clip_norm=-1"], "optimizer.clip_norm is -1.0"),
        (["augment.speech_snr_db=15"], "augment.speech_snr_db is (15.0,): give the lowest and the highest"),
        (["augment.clean=0.9", "augment.both=0.2"], "augment.clean is 0.9 and augment.both 0.2"),
        (["checkpoint.every_steps=0"], "checkpoint.every_epochs or checkpoint.every_steps is 0"),
        (["gate.smoothing=1"], "gate.smoothing is 1.0"),
        (
            ["positives.clusters=2", "positives.every_steps=0", "positives.every_epochs=-1"],
            "positives.every_epochs or positives.every_steps is 0",
        ),
        (["gate.rule=often"], "gate.rule is 'often': choose one of plateau"),
        (["gate.rule=often", "--stop-at-step=0"], "gate.rule is 'often': choose one of plateau"),
        (["loss.self=0", "loss.cross=0", "gate.rule=never"], "nothing to learn from: loss.self, loss.cross"),
        (["loss.self=0", "loss.cross=0"], "gate.rule is step: once the gate closes, no loss is left"),
        (["checkpoint.keep=0"], "checkpoint.keep is 0: at least 1 checkpoint must stay"),
        (["augment.noise=nowhere"], "nowhere: no such folder"),
        (["seed=-1"], "seed is -1"),
        (["evaluation.data=somewhere"], "evaluation.trials is not"),
        (["evaluation.trials=somewhere"], "evaluation.data is not"),
    ],
)
def test_a_config_that_cannot_work_is_refused_and_leaves_nothing(settings, message, tmp_path):
    status, text = tiny.train_here(tmp_path / "run", *settings)
    assert status == 2 and "memo-jax: error: " in text and message in text
    assert not (tmp_path / "run").exists()


def test_processes_with_unequal_numbers_of_devices_are_refused(monkeypatch):
    """Each reads an equal share of a batch, which must be that of its devices."""
    devices = np.array([SimpleNamespace(process_index=index) for index in (0, 0, 1)])
    monkeypatch.setattr(inputs.sharding, "data_mesh", lambda: SimpleNamespace(size=3, devices=devices))
    config = tiny.tiny_config("data.batch_size=6", f"data.train={tiny.material().dataset}")
    with pytest.raises(ValueError, match=r"the processes have \[1, 2\] devices"):
        inputs.checked_inputs(config, None)


def test_a_list_without_labels_is_refused_before_training(tmp_path):
    lines = tiny.material().trials.read_text().splitlines()
    (tmp_path / "pairs.txt").write_text("".join(f"{line.split(maxsplit=1)[1]}\n" for line in lines))
    evaluated = [f"evaluation.data={tiny.material().dataset}", f"evaluation.trials={tmp_path / 'pairs.txt'}"]
    status, text = tiny.train_here(tmp_path / "run", *evaluated)
    assert status == 2 and "pairs.txt" in text and text.count("\n") == 1, text
    assert not (tmp_path / "run").exists()


def test_an_invalid_config_file_is_refused(tmp_path):
    wrong = (("gone.py", None, "no such config file"), ("a.py", "import nothing_of_that_name", "line 1"))
    for name, content, message in wrong:
        if content:
            (tmp_path / name).write_text(content)
        status, text = tiny.here("train", "--config", tmp_path / name, "--workdir", tmp_path / "run")
        assert status == 2 and name in text and message in text


def test_a_workdir_that_cannot_be_written_is_named(small_disk, tmp_path):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    status, text = tiny.train_here(small_disk / "run")
    assert status == 2 and "memo-jax: error: " in text and "Read-only file system" in text and str(small_disk) in text
    (tmp_path / "file").write_text("")
    status, text = tiny.train_here(tmp_path / "file")
    assert status == 2 and f"{tmp_path / 'file'}" in text
