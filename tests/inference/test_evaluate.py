"""A run with trials as a user starts it, and `memo-jax eval` of it: what both write, that they agree, and bad input.

The tests of this file share one training run of both branches, the costliest to compile.
"""

import json
import re
import shutil

import numpy as np
import pytest

import tiny
from memo_jax.audio import SAMPLE_RATE
from memo_jax.config import read_config
from memo_jax.data.batches import Utterances
from memo_jax.inference.embedder import DEFAULT_THRESHOLD, Embedder
from memo_jax.inference.evaluate import Crops
from memo_jax.inference.workdir import workdir_model
from memo_jax.log import read_metrics
from memo_jax.scoring import metrics
from memo_jax.scoring.calibration import fit_calibration
from memo_jax.scoring.trials import read_trials
from memo_jax.training.saved_checkpoint import saved_steps

ERRORS = ("eer", "min_dcf_0.01", "min_dcf_0.05")


@pytest.fixture(scope="module")
def workdir():
    return tiny.trained_run()[0]


def evaluate(output, *arguments, workdir=None, data=None, trials=None):
    """Runs `memo-jax eval`; returns its status and what it printed."""
    workdir, data = workdir or tiny.trained_run()[0], data or tiny.material().dataset
    trials = trials or tiny.material().trials
    return tiny.here("eval", "--workdir", workdir, "--data", data, "--trials", trials, "--output", output, *arguments)


@pytest.fixture(scope="module")
def output(workdir, tmp_path_factory):
    """The output of an evaluation of the trained ECAPA teacher, and what was printed."""
    folder = tmp_path_factory.mktemp("evaluation") / "deep" / "output"
    status, text = evaluate(folder)
    assert status == 0, text
    return folder, text


def results_of(output):
    return json.loads((output / "results.json").read_text())


def test_a_run_writes_what_the_readme_promises():
    """Rows for every step with all indicators, EER of each branch at the start, after every epoch and at the end,
    TensorBoard files, the latest checkpoints, the config."""
    workdir, text = tiny.trained_run()
    rows = read_metrics(workdir)
    assert [row["step"] for row in rows] == list(range(7))
    assert [row["step"] for row in rows if "eer/ecapa" in row] == [0, 5, 6]
    for row in (rows[0], rows[5], rows[6]):
        for branch in ("ecapa", "resnet", "ecapa,resnet"):
            assert 0 <= row[f"eer/{branch}"] <= 100
            assert all(0 <= row[f"min_dcf_{prior}/{branch}"] <= 1 for prior in (0.01, 0.05))
    wanted = {"loss", "lr", "momentum", "teacher_temp", "epoch", "gate/open", "gate/loss", "gate/alignment"}
    wanted |= {"seconds_per_step", "utterances_per_second", "cpu_seconds"}
    for branch in ("ecapa", "resnet"):
        wanted |= {f"{name}/{branch}" for name in ("loss/self", "loss/cross", "embedding_std")}
        for head in ("self", "cross"):
            wanted |= {f"{name}/{head}/{branch}" for name in ("teacher_entropy", "mean_teacher_entropy", "kl")}
    assert not [name for row in rows[1:] for name in wanted if name not in row]
    assert all(np.isfinite(value) for row in rows for value in row.values())
    assert rows[5]["epoch"] == 1.0
    assert rows[5]["utterances_per_second"] == pytest.approx(4 / rows[5]["seconds_per_step"])
    # The time of a step is that of training alone, even where the row waited for an evaluation.
    assert rows[5]["seconds_per_step"] > 0.1 * min(row["seconds_per_step"] for row in rows[1:5])

    events = list((workdir / "tensorboard").iterdir())
    assert len(events) == 1 and all(
        name in events[0].read_bytes() for name in (b"loss/self/ecapa", b"min_dcf_0.01/resnet")
    )
    assert saved_steps(workdir) == [4, 6]
    assert list(read_config(workdir).model.branches) == ["ecapa", "resnet"]
    assert "20 utterances, 5 steps an epoch, 6 steps in all" in text
    assert "no bank of noise or rooms" in text and "step 5: eer/ecapa" in text
    assert re.search(r"step 6: eer/ecapa [\d.]+ %, min_dcf_0.01/ecapa \d\.\d{3}, min_dcf_0.05/ecapa", text)
    assert "training: 6/6 step (100.0%)" in text


def test_the_gate_closes_visibly_and_for_good():
    workdir, text = tiny.trained_run()
    rows = read_metrics(workdir)[1:]
    assert [row["gate/open"] for row in rows] == [1, 1, 1, 0, 0, 0]
    assert [row["gate/closed_at"] for row in rows] == [-1, -1, 3, 3, 3, 3]
    for branch in ("ecapa", "resnet"):
        assert [f"loss/contrastive/{branch}" in row for row in rows] == 3 * [True] + 3 * [False]
    assert text.count("step 3: the gate has closed (step)") == text.count("has closed") == 1


def test_results_name_what_they_are_and_match_the_scores_beside_them(output):
    folder, text = output
    results = results_of(folder)
    assert {path.name for path in folder.iterdir()} >= {"det.png", "results.json", "scores.txt"}
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".") or "partial" in path.name]
    assert (results["trials"], results["targets"], results["recordings"]) == (45, 5, 10)
    assert (results["branch"], results["role"], results["step"]) == ("ecapa", "teacher", 6)
    lines = [line.split("\t") for line in (folder / "scores.txt").read_text().splitlines()]
    trials = read_trials(tiny.material().trials)
    assert [line[1:] for line in lines] == [list(pair) for pair in zip(trials.enrol, trials.test)]
    scores = np.array([float(line[0]) for line in lines])
    assert results["eer"] == pytest.approx(100 * metrics.eer(scores, trials.target))
    for p in (0.01, 0.05):
        assert results[f"min_dcf_{p}"] == pytest.approx(metrics.min_dcf(scores, trials.target, p))
    assert {*ERRORS, "eer_threshold"} == set(results["log_mel_statistics"])
    low, high = results["eer_interval"]
    assert 0 <= low <= results["eer"] <= high <= 100
    least, most = results["min_dcf_0.05_interval"]
    assert 0 <= least <= results["min_dcf_0.05"] <= most <= 1
    cost = f"minDCF(0.05) {results['min_dcf_0.05']:.3f} ({least:.3f}–{most:.3f})"
    for figure in (
        f"EER {results['eer']:6.2f} % ({low:.2f}–{high:.2f})",
        cost,
        "log-mel statistics",
        "45 trials, 5 of them target",
        "det.png",
    ):
        assert figure in text


def test_the_picture_is_a_picture(output):
    import matplotlib.image

    assert (output[0] / "det.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    height, width, _ = matplotlib.image.imread(output[0] / "det.png").shape
    assert height > 200 and width > 200


def test_evaluation_gives_what_training_logged(output, workdir, tmp_path):
    """The EER of either branch and of their mean, after the last step and (`--step 0`) before the first, is that of the
    run's own evaluations: checkpoint, initialisation and scoring are the same everywhere."""
    rows = read_metrics(workdir)
    for key in ERRORS:
        assert results_of(output[0])[key] == pytest.approx(rows[-1][f"{key}/ecapa"])
    status, text = evaluate(tmp_path, "--step", "0", "--branch", "resnet", "--json")
    assert status == 0 and results_of(tmp_path)["step"] == 0
    assert json.loads(text[text.index("{") :]) == results_of(tmp_path)
    assert results_of(tmp_path)["eer"] == pytest.approx(rows[0]["eer/resnet"])
    status, text = evaluate(tmp_path, "--branch", "ecapa,resnet")
    for key in ERRORS:
        assert results_of(tmp_path)[key] == pytest.approx(rows[-1][f"{key}/ecapa,resnet"])


def test_both_forms_of_a_trial_list_give_the_same(output, tmp_path):
    status, text = evaluate(tmp_path, trials=tiny.write_trials(tmp_path / "kaldi.txt", kaldi=True))
    assert status == 0, text
    for name in (*ERRORS, "trials", "targets", "log_mel_statistics"):
        assert results_of(tmp_path)[name] == results_of(output[0])[name]


def test_step_role_and_branch_choose_the_network(workdir):
    """Student and teacher differ, steps differ, and step 0 follows from the config's seed alone."""
    import jax

    def kernels(*arguments):
        model = workdir_model(workdir, *arguments)
        leaves = jax.tree.leaves(model.variables["params"])
        return np.concatenate([np.ravel(leaf) for leaf in leaves]), model.provenance["step"]

    teacher, step = kernels("resnet")
    assert step == 6
    others = [("student",), ("teacher", 4), ("teacher", 0)]
    networks = [teacher, *(kernels("resnet", *other)[0] for other in others)]
    for i, one in enumerate(networks):
        for other in networks[:i]:
            assert not np.array_equal(one, other)
    np.testing.assert_array_equal(networks[3], kernels("resnet", "student", 0)[0])


def test_a_saved_threshold_stays_with_its_network(workdir, tmp_path):
    """Tuned for the ECAPA teacher of a step: others keep the default, and an export includes it."""
    run = shutil.copytree(workdir, tmp_path / "run")
    assert Embedder.load(run).threshold == DEFAULT_THRESHOLD
    status, text = evaluate(tmp_path / "out", "--save-threshold", workdir=run)
    assert status == 0 and "are saved with the model" in text, text
    results = results_of(tmp_path / "out")
    tuned = Embedder.load(run)
    assert tuned.threshold == results["saved_threshold"] <= results["eer_threshold"]
    assert "45 trials of trials.txt" in tuned.threshold_source
    for other in ({"branch": "resnet"}, {"role": "student"}, {"step": 4}):
        assert Embedder.load(run, **other).threshold == DEFAULT_THRESHOLD
    corpus = tiny.material().corpus
    status, text = tiny.here("verify", corpus / "s0" / "0.wav", corpus / "s0" / "1.wav", "--model", run)
    assert status in (0, 1) and "of trials.txt" in text and "not tuned" not in text
    assert tiny.here("export", "--model", run, "--output", tmp_path / "a.safetensors")[0] == 0
    assert Embedder.load(tmp_path / "a.safetensors").threshold == tuned.threshold

    status, text = evaluate(tmp_path / "out", "--save-threshold", "eer", workdir=tmp_path / "a.safetensors")
    assert status == 0 and results_of(tmp_path / "out")["eer"] == results["eer"], text
    again = Embedder.load(tmp_path / "a.safetensors")
    assert again.threshold == results_of(tmp_path / "out")["saved_threshold"]
    assert "eer of" in again.threshold_source
    assert again.fingerprint == tuned.fingerprint == results["fingerprint"]
    (run / "decisions.json").write_text("{")
    with pytest.raises(ValueError, match="decisions.json: damaged"):
        Embedder.load(run)


def test_a_calibration_is_saved_to_a_file_where_the_model_stays_as_it_is(workdir, tmp_path):
    assert tiny.here("export", "--model", workdir, "--output", tmp_path / "a.zip")[0] == 0
    before, file = (tmp_path / "a.zip").read_bytes(), tmp_path / "calibration.json"
    status, text = evaluate(tmp_path / "out", "--save-calibration", file, workdir=tmp_path / "a.zip")
    assert status == 0 and f"are saved with {file}" in text, text
    results, embedder = results_of(tmp_path / "out"), Embedder.load(tmp_path / "a.zip", calibration=file)
    assert (tmp_path / "a.zip").read_bytes() == before and embedder.threshold == results["saved_threshold"]
    decision = embedder.decision
    assert {"scale": decision.scale, "offset": decision.offset} == results["calibration"]
    scores = np.array([float(line.split()[0]) for line in (tmp_path / "out" / "scores.txt").read_text().splitlines()])
    target = np.array([line[0] == "1" for line in tiny.trial_lines()])
    assert fit_calibration(scores, target) == pytest.approx((decision.scale, decision.offset), rel=1e-4)
    assert embedder.probability(0.3) == pytest.approx(1 / (1 + np.exp(-0.3 * decision.scale - decision.offset)))
    with pytest.raises(ValueError, match="prior is 1"):
        embedder.probability(0.3, 1)


def test_a_workdir_its_export_and_embed_give_what_eval_scored(workdir, output, tmp_path):
    """The cosines in scores.txt are those of `embed` and `score`."""
    assert tiny.here("embed", tiny.material().dataset, "--model", workdir, "--output", tmp_path / "e.npz")[0] == 0
    status, text = tiny.here(
        "score",
        "--embeddings",
        tmp_path / "e.npz",
        "--trials",
        tiny.material().trials,
        "--json",
        "--scores",
        tmp_path / "scores.txt",
    )
    assert status == 0, text
    found, results = json.loads(text), results_of(output[0])
    assert found["models"] == [results["fingerprint"]]
    scores = [np.loadtxt(path, usecols=0) for path in (tmp_path / "scores.txt", output[0] / "scores.txt")]
    np.testing.assert_allclose(*scores, atol=1e-4)


def test_crops_are_spread_evenly_and_scored_in_pairs(workdir, tmp_path):
    crops = [Crops([np.arange(100_000, dtype=np.int32)], i, 3, 2.0)[0] for i in range(3)]
    assert [crop[0] for crop in crops] == [0, 34_000, 68_000] and {len(crop) for crop in crops} == {32_000}
    np.testing.assert_array_equal(Crops([np.arange(3)], 0, 1, 8 / SAMPLE_RATE)[0], [0, 1, 2, 0, 1, 2, 0, 1])
    status, text = evaluate(tmp_path / "crops", "--crops", "2", "--crop-seconds", "0.5")
    assert status == 0, text
    whole = evaluate(tmp_path / "whole")
    assert whole[0] == 0 and results_of(tmp_path / "crops")["crops"] == 2
    assert (tmp_path / "crops" / "scores.txt").read_text() != (tmp_path / "whole" / "scores.txt").read_text()


def test_only_the_recordings_of_the_trials_are_read(workdir, tmp_path, monkeypatch):
    """A list of two trials (the minimum) is evaluated, and each of its recordings is read once for either system."""
    trials = tmp_path / "trials.txt"
    trials.write_text("1 s0/0.wav s0/1.wav\n0 s0/0.wav s1/0.wav\n")
    read = []
    get = Utterances.__getitem__
    monkeypatch.setattr(Utterances, "__getitem__", lambda self, row: read.append(self.names[row]) or get(self, row))
    status, text = evaluate(tmp_path, trials=trials)
    assert status == 0 and results_of(tmp_path)["recordings"] == 3, text
    assert sorted(read) == sorted(2 * ["s0/0.wav", "s0/1.wav", "s1/0.wav"])


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("1 s0/0.wav s0/9.wav\n0 s0/0.wav s1/0.wav\n", "trials are missing from the data: 's0/9.wav'"),
        ("1 s0/0.wav s0/1.wav\n0 s0/0.wav\n", "line 2: 2 fields where the first trial has 3"),
        ("1 s0/0.wav s0/1.wav\n2 s0/0.wav s1/0.wav\n", "line 2: the label '2'"),
        ("", "the trial list is empty"),
        ("\n\n", "the trial list is empty"),
        ("1 s0/0.wav s0/1.wav\n", "no nontarget trial"),
        ("s0/0.wav s1/1.wav nontarget\n", "no target trial"),
    ],
)
def test_a_trial_list_that_cannot_be_used_is_named(lines, message, tmp_path):
    trials = tmp_path / "list of trials.txt"
    trials.write_text(lines)
    status, text = evaluate(tmp_path / "output", trials=trials)
    assert status == 2 and "memo-jax: error: " in text and message in text
    assert "missing" in message or str(trials) in text
    assert not (tmp_path / "output").exists()


def test_what_is_not_there_is_named(workdir, tmp_path):
    for place, named in (
        ({"workdir": tmp_path}, f"{tmp_path} is not the workdir of a run"),
        ({"workdir": tmp_path / "gone"}, f"{tmp_path / 'gone'}: no such workdir or model file"),
        ({"data": tmp_path}, f"{tmp_path} is not a dataset"),
        ({"trials": tmp_path / "gone.txt"}, f"{tmp_path / 'gone.txt'}: No such file"),
    ):
        status, text = evaluate(tmp_path / "output", **place)
        assert status == 2 and named in text, text
    for flags, named in (
        (("--branch", "xvector"), "no branch 'xvector': choose one of ecapa, resnet"),
        (("--step", "5"), "there are those of steps 4, 6"),
        (("--role", "parent"), "invalid choice: 'parent'"),
    ):
        status, text = evaluate(tmp_path / "output", *flags)
        assert status == 2 and named in text, text
    assert not (tmp_path / "output").exists()


def test_a_run_without_checkpoint_is_no_network(workdir, tmp_path):
    shutil.copy(workdir / "config.json", tmp_path)
    status, text = evaluate(tmp_path / "output", workdir=tmp_path)
    assert status == 2 and "no checkpoint" in text


def test_a_checkpoint_cut_short_is_named_with_the_one_before_it(workdir, tmp_path):
    copy = shutil.copytree(workdir, tmp_path / "run")
    data = max((copy / "checkpoints" / "6").rglob("*"), key=lambda path: path.stat().st_size)
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    status, text = evaluate(tmp_path / "output", workdir=copy)
    assert status == 2 and f"{copy / 'checkpoints' / '6'}: the checkpoint is damaged or cut short" in text
    assert f"{copy / 'checkpoints' / '4'}" in text
    status, text = evaluate(tmp_path / "output", "--step", "4", workdir=copy)
    assert status == 0 and results_of(tmp_path / "output")["step"] == 4, text


def test_an_output_that_cannot_be_written_is_named(workdir, tmp_path):
    (tmp_path / "file").write_text("")
    status, text = evaluate(tmp_path / "file" / "output")
    assert status == 2 and str(tmp_path / "file") in text and "directory" in text


def test_a_disk_that_takes_nothing_is_named(workdir, unwritable):
    """No partial file remains."""
    folder, message = unwritable
    status, text = evaluate(folder)
    assert status == 2 and str(folder) in text and message in text, text
    assert not [path for path in folder.iterdir() if path.name in ("results.json", "det.png", "scores.txt")]


def test_a_threshold_that_accepts_nobody_is_refused_and_the_results_are_kept(workdir, tmp_path, monkeypatch):
    """If all scores are alike, accepting nobody costs least at a low prior: no threshold reaches that cost."""
    from memo_jax.inference.evaluate import TrialEvaluation, tuned_decision

    rng = np.random.default_rng(0)
    target = np.arange(200) < 100
    with pytest.raises(
        ValueError, match=r"min_dcf_0.01 is best \(1\) when nobody is accepted, so no threshold was saved"
    ):
        tuned_decision(np.where(target, 0.4, 0.5) + 0.01 * rng.random(200), target, "min_dcf_0.01", "list.txt")
    monkeypatch.setattr(TrialEvaluation, "scores", lambda self, _: np.where(self.target, 0.1, 0.2))
    run = shutil.copytree(workdir, tmp_path / "run")
    status, text = evaluate(tmp_path / "out", "--save-threshold", "min_dcf_0.01", workdir=run)
    assert status == 2 and "no threshold was saved" in text
    results = json.loads((tmp_path / "out" / "results.json").read_text(), parse_constant=pytest.fail)
    assert results["eer"] == 100 and "saved_threshold" not in results and not (run / "decisions.json").exists()


def test_a_threshold_lies_between_scores_and_is_not_tuned_on_crops(workdir, tmp_path):
    from memo_jax.inference.evaluate import tuned_decision

    target, scores = np.array([True, True, False, False]), np.array([0.9, 0.7, 0.3, 0.1])
    assert tuned_decision(scores, target, "eer", "list.txt").threshold == pytest.approx(0.5)
    status, text = evaluate(tmp_path / "out", "--crops", "2", "--save-threshold", workdir=workdir)
    assert status == 2 and "leave out --crops" in text and not (tmp_path / "out").exists()


def test_a_list_with_swapped_labels_is_noticed(workdir, tmp_path, monkeypatch):
    from memo_jax.inference.evaluate import TrialEvaluation

    monkeypatch.setattr(TrialEvaluation, "scores", lambda self, _: np.where(self.target, 0.1, 0.2))
    status, text = evaluate(tmp_path / "out", workdir=workdir)
    assert (
        status == 0
        and "WARNING: targets have lower scores than nontargets: are the labels of the list swapped?" in text
    )


def test_results_say_what_was_saved_before_a_file_could_not_be(workdir, tmp_path, monkeypatch):
    from memo_jax.inference import evaluate as module

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_decision", full)
    run = shutil.copytree(workdir, tmp_path / "run")
    arguments = ("--save-threshold", "--save-calibration", str(tmp_path / "file.json"))
    status, text = evaluate(tmp_path / "out", *arguments, workdir=run)
    assert status == 2 and "No space left on device" in text
    results = results_of(tmp_path / "out")
    assert results["saved_in"] == ["the model"] and Embedder.load(run).threshold == results["saved_threshold"]


def test_a_network_that_is_worse_than_the_statistics_is_reported(output, tmp_path, monkeypatch):
    from memo_jax.inference.evaluate import TrialEvaluation

    monkeypatch.setattr(TrialEvaluation, "statistics_scores", lambda self, quiet: np.where(self.target, 0.3, 0.2))
    status, text = evaluate(tmp_path)
    worse = results_of(tmp_path)["worse_than_statistics"]
    assert status == 0 and worse == [key for key in ERRORS if results_of(output[0])[key] > 0] and worse
    assert "WARNING: in EER" in text and "worse than plain log-mel statistics" in text


def test_a_network_that_is_worse_in_one_kind_of_error_alone_is_reported(workdir, tmp_path, monkeypatch):
    """One impostor above all targets: a low EER, but false alarms make every threshold costly."""
    from memo_jax.inference.evaluate import TrialEvaluation

    def network(self, _):
        scores = np.where(self.target, 0.5, 0.1)
        scores[np.flatnonzero(~self.target)[0]] = 0.9
        return scores

    def statistics(self, quiet):
        scores = np.where(self.target, 0.5, 0.1)
        scores[np.flatnonzero(self.target)[:2]] = 0.0
        return scores

    monkeypatch.setattr(TrialEvaluation, "scores", network)
    monkeypatch.setattr(TrialEvaluation, "statistics_scores", statistics)
    status, text = evaluate(tmp_path)
    results = results_of(tmp_path)
    assert status == 0 and results["eer"] < results["log_mel_statistics"]["eer"]
    assert results["worse_than_statistics"] == ["min_dcf_0.01", "min_dcf_0.05"]
    assert "WARNING: in minDCF(0.01), minDCF(0.05) the network is worse than plain log-mel statistics" in text


def test_a_list_without_labels_gives_scores_alone(output, tmp_path):
    listed = read_trials(tiny.material().trials)
    lines = [f"{a}\t{b}\n" for a, b in zip(listed.enrol, listed.test)]
    (tmp_path / "list.txt").write_text("".join(lines))
    status, text = evaluate(tmp_path / "out", trials=tmp_path / "list.txt")
    assert status == 0 and "no labels" in text and "eer" not in results_of(tmp_path / "out")
    assert (tmp_path / "out" / "scores.txt").read_text() == (output[0] / "scores.txt").read_text()


def test_enrolled_speakers_and_other_extensions_keep_the_interval(tmp_path):
    """The list names .m4a where the data have .wav, and speakers by two recordings each."""
    speakers = sorted({name.partition("/")[0] for name in read_trials(tiny.material().trials).recordings})
    (tmp_path / "enroll.txt").write_text("".join(f"model-{s}\t{s}/0.m4a\n" for s in speakers))
    lines = [f"model-{a}\t{b}/1.m4a\t{int(a == b)}\n" for a in speakers for b in speakers]
    (tmp_path / "list.txt").write_text("".join(lines))
    status, text = evaluate(tmp_path / "out", "--enrollments", tmp_path / "enroll.txt", trials=tmp_path / "list.txt")
    assert status == 0, text
    assert results_of(tmp_path / "out")["eer_interval"] is not None
