"""`memo-jax pseudo-label`: rounds of clustering and training, which of them is best, and resuming after any end."""

import json
import shutil

import numpy as np
import pytest

import tiny
from memo_jax import pseudo_label as rounds
from memo_jax.data.batches import Utterances
from memo_jax.inference import cluster as clustering
from memo_jax.inference.model_file import read_model, write_model
from memo_jax.inference.workdir import workdir_model
from memo_jax.scoring.trials import read_table
from memo_jax.training import monitor

pytestmark = pytest.mark.usefixtures("compiled_once")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("rounds") / "whole"
    status, text = tiny.here(*tiny.round_arguments(workdir))
    assert status == 0, text
    return workdir, text


def fingerprints(workdir):
    return [read_model(workdir / f"round_{number}" / rounds.MODEL).fingerprint for number in range(3)]


def test_each_round_clusters_with_the_network_before_and_is_tested(whole):
    workdir, text = whole
    lines = [line.split("\t") for line in (workdir / "rounds.tsv").read_text().splitlines()]
    assert lines[0] == ["round", "eer", "min_dcf_0.01", "min_dcf_0.05", "clusters", "purity", "nmi", "verdict"]
    assert [line[0] for line in lines[1:]] == ["0", "1", "2"]
    assert lines[1][4:] == ["", "", "", "the network to start from"]
    assert [line[4] for line in lines[2:]] == ["5", "5"] and all(0 < float(line[5]) <= 1 for line in lines[2:])
    found = fingerprints(workdir)
    assert found[0] == tiny.untrained_model().fingerprint and len(set(found)) == 3
    eers = [json.loads((workdir / f"round_{number}" / rounds.RESULTS).read_text())["eer"] for number in range(3)]
    best = int(np.argmin(eers))
    assert read_model(workdir / "best.safetensors").fingerprint == found[best]
    assert text.rstrip().endswith(str(workdir / "best.safetensors"))
    names = Utterances(tiny.material().dataset).names
    for number in (1, 2):
        folder = workdir / f"round_{number}"
        before = read_model(workdir / f"round_{number - 1}" / rounds.MODEL)
        again = clustering.cluster(
            clustering.embeddings_of(before, Utterances(tiny.material().dataset)).embeddings, clusters=5
        )
        assert read_table(folder / "clusters.tsv", "name", "cluster") == dict(zip(names, map(str, again.tolist())))
        config = json.loads((folder / "config.json").read_text())
        assert config["init"] == str(workdir / f"round_{number - 1}" / rounds.MODEL)


def test_interrupted_anywhere_the_same_command_ends_the_same(whole, tmp_path, monkeypatch):
    """While it clusters, trains, writes the network, or tests it."""
    workdir = tmp_path / "again"
    record = monitor.Monitor.record

    def at_step_2_of_round_2(self, number, metrics):
        if number == 2 and "round_2" in self.config.init + self.config.supervised.labels:
            raise KeyboardInterrupt
        record(self, number, metrics)

    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    for place, name, action in (
        (clustering, "write_text", interrupt),
        (rounds, "write_model", interrupt),
        (rounds, "workdir_model", interrupt),
        (monitor.Monitor, "record", at_step_2_of_round_2),
        (rounds, "best_round", interrupt),
        (rounds.TrialEvaluation, "rates", interrupt),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, action)
            status, text = tiny.here(*tiny.round_arguments(workdir))
            assert status == 130, text
    status, text = tiny.here(*tiny.round_arguments(workdir))
    assert status == 0, text
    assert (workdir / "rounds.tsv").read_bytes() == (whole[0] / "rounds.tsv").read_bytes()
    assert fingerprints(workdir) == fingerprints(whole[0])
    status, again = tiny.here(*tiny.round_arguments(workdir, "--json"))
    assert status == 0 and json.loads(again[again.index("{") :])["rounds"][2]["round"] == 2


def test_rounds_resume_by_another_path_of_their_folder_and_are_not_made_fewer(whole, tmp_path, monkeypatch):
    workdir = shutil.copytree(whole[0], tmp_path / "moved")
    for done in (rounds.RESULTS, rounds.MODEL):
        (workdir / "round_2" / done).unlink()
    monkeypatch.chdir(tmp_path)
    status, text = tiny.here(*tiny.round_arguments("moved"))
    assert status == 0 and fingerprints(workdir) == fingerprints(whole[0]), text
    best = (workdir / "best.safetensors").read_bytes()
    status, text = tiny.here(*tiny.round_arguments("moved", "--rounds=1"))
    assert status == 2 and "moved has more than 1 rounds, which would be lost" in text
    assert (workdir / "best.safetensors").read_bytes() == best


def test_rounds_resume_with_the_same_options_alone(whole):
    for more, said in (
        (("--seed=1",), "seed: 0 → 1"),
        (("--clusters=4",), "clusters: 5 → 4"),
        (("supervised.scale=20.0",), "supervised.scale: 30.0"),
    ):
        status, text = tiny.here(*tiny.round_arguments(whole[0], *more))
        assert status == 2 and said in text, text


@pytest.mark.parametrize(
    "more, said",
    [
        (("init=a",), "init is 'a': leave it out"),
        (("supervised.labels=a",), "supervised.labels is 'a': leave it out"),
        (("evaluation.trials=",), "evaluation.trials is ''"),
        (("--labels=missing",), "missing"),
        (("--rounds=0",), "0"),
        (("model.resnet_base_channels=4",), "which is not a branch of this config"),
    ],
)
def test_what_cannot_work_is_refused_before_the_work(more, said, tmp_path):
    given = tiny.round_arguments(tmp_path / "run")
    given = [text for text in given if text.split("=")[0] not in [f"--config.{m}".split("=")[0] for m in more]]
    status, text = tiny.here(*given, *(text if text.startswith("--") else f"--config.{text}" for text in more))
    assert status == 2 and said in text and not (tmp_path / "run" / "round_1").exists(), text


def test_rounds_that_start_from_both_networks_end_with_both(tmp_path, monkeypatch):
    """As the network of the package does; training itself is left out."""
    both, taken = workdir_model(tiny.trained_run()[0], "ecapa,resnet"), []

    def trained(folder, branch):
        taken.append(branch)
        return both

    monkeypatch.setattr(rounds, "train", lambda *_, **__: None)
    monkeypatch.setattr(rounds, "starting_parts", lambda _: {})
    monkeypatch.setattr(rounds, "workdir_model", trained)
    model = write_model(tmp_path / "both.safetensors", both)
    arguments = tiny.round_arguments(tmp_path / "run", "model.branches=ecapa,resnet", f"--model={model}")
    status, text = tiny.here(*arguments)
    assert status == 0 and taken == ["ecapa,resnet"] * 2, (taken, text)
    assert read_model(tmp_path / "run" / "best.safetensors").fingerprint == both.fingerprint


def test_a_round_that_is_worse_is_called_worse():
    rows = []
    for number, eer in enumerate((10.0, 8.0, 9.0, 12.0, 11.0, 7.5)):
        rows.append({"round": number, "eer": eer, "min_dcf_0.01": 0.5, "min_dcf_0.05": 0.4})
        rounds.judge(rows)
    assert [row["verdict"] for row in rows] == [
        "the network to start from",
        "the best so far (round 0: 10.00 %)",
        "WORSE than round 1 (8.00 %)",
        "WORSE than round 2 (9.00 %) and than round 1 (8.00 %), which is kept",
        "not better than round 1 (8.00 %), which is kept",
        "the best so far (round 1: 8.00 %)",
    ]
    assert rounds.best_round(rows) == 5 and rounds.best_round(rows[:1]) == 0
    for row in rows:
        row |= {"clusters": 7, "purity": None, "nmi": 0.5}
    assert "no round has a lower EER" in rounds.rounds_text({"rounds": rows[:1], "best": 0, "output": "best"})
    assert "the best is round 5\nbest" in rounds.rounds_text({"rounds": rows, "best": 5, "output": "best"})
