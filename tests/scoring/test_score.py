"""`memo-jax score` as users run it, on embeddings from any program, against scikit-learn and scipy."""

import json

import numpy as np
import pytest
from scipy.interpolate import interp1d
from scipy.optimize import brentq
from sklearn.metrics import log_loss, roc_curve

import tiny
from memo_jax.scoring.embedding_file import Embeddings, write_embeddings
from memo_jax.scoring.score import warnings_of
from memo_jax.scoring.trials import read_trials, trial_pairs

SPEAKERS, UTTERANCES, DIMENSION = 12, 6, 16


def names_and_speakers(prefix="id"):
    pairs = [(f"{prefix}{s:02d}/{u}.wav", s) for s in range(SPEAKERS) for u in range(UTTERANCES)]
    return [name for name, _ in pairs], np.array([speaker for _, speaker in pairs])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """one.npz and two.npz of two systems, their cohorts, trials.txt, tuning.txt."""
    folder = tmp_path_factory.mktemp("score")
    rng = np.random.default_rng(0)
    names, speakers = names_and_speakers()
    centers = rng.normal(size=(SPEAKERS, DIMENSION))
    for system, spread in (("one", 1.0), ("two", 1.6)):
        rows = centers[speakers] + spread * rng.normal(size=(len(names), DIMENSION)) + 0.5
        write_embeddings(folder / f"{system}.npz", Embeddings(names, rows, system))
        others = [f"other/{i}.wav" for i in range(40)]
        cohort = rng.normal(size=(40, DIMENSION)) + 0.5
        write_embeddings(folder / f"{system} cohort.npz", Embeddings(others, cohort, system))
    for list_name, parity in (("trials.txt", 0), ("tuning.txt", 1)):
        pairs = [(i, j) for i in range(len(names)) for j in range(i) if (i + j) % 2 == parity]
        lines = [f"{int(speakers[i] == speakers[j])} {names[i]} {names[j]}\n" for i, j in pairs]
        (folder / list_name).write_text("".join(lines))
    return folder


def score(folder, *arguments, embeddings=("one.npz",)):
    """Runs the command with --json; returns what it printed."""
    files = [text for name in embeddings for text in ("--embeddings", folder / name)]
    options = ("--trials", folder / "trials.txt", "--json", "--replicates", 50)
    status, text = tiny.here("score", *files, *options, *arguments)
    assert status == 0, text
    return json.loads(text)


def plain_scores(folder, name="one.npz", trials="trials.txt", shift=0.0):
    """(cosines by the definition, target)."""
    listed = read_trials(folder / trials)
    with np.load(folder / name) as file:
        pairs, rows = trial_pairs(listed, file["names"].tolist()), file["embeddings"].astype(np.float64) - shift
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return (rows[pairs[:, 0]] * rows[pairs[:, 1]]).sum(axis=1), listed.target


def rates_by_scikit_learn(scores, target):
    fpr, tpr, _ = roc_curve(target, scores, drop_intermediate=False)
    rates = {"eer": 100 * brentq(lambda x: 1 - x - interp1d(fpr, tpr)(x), 0, 1, xtol=1e-12)}
    for p in (0.01, 0.05):
        rates[f"min_dcf_{p}"] = np.min(p * (1 - tpr) + (1 - p) * fpr) / min(p, 1 - p)
    return rates


def assert_rates(found, scores, target):
    for key, value in rates_by_scikit_learn(scores, target).items():
        assert found[key] == pytest.approx(value, abs=1e-6), key


def test_error_rates_are_those_of_scikit_learn(folder):
    found = score(folder)
    assert_rates(found, *plain_scores(folder))
    for rate, most in (("eer", 50), ("min_dcf_0.01", 1), ("min_dcf_0.05", 1)):
        low, high = found[f"{rate}_interval"]
        assert 0 < low < found[rate] < high <= most, rate
    trials = read_trials(folder / "trials.txt")
    assert (found["trials"], found["targets"]) == (len(trials), trials.target.sum()) and found["models"] == ["one"]


def test_scores_are_written_in_the_order_of_the_list(folder, tmp_path):
    found = score(folder, "--scores", tmp_path / "scores.txt")
    lines = [line.split("\t") for line in (tmp_path / "scores.txt").read_text().splitlines()]
    scores, target = plain_scores(folder)
    np.testing.assert_allclose([float(line[0]) for line in lines], scores, atol=2e-6)
    trials = read_trials(folder / "trials.txt")
    assert [tuple(line[1:]) for line in lines] == list(zip(trials.enrol, trials.test))
    accepted = scores >= found["eer_threshold"]
    assert abs((~accepted[target]).mean() - accepted[~target].mean()) < 0.03


def test_mean_subtraction_and_as_norm_use_the_cohort(folder):
    with np.load(folder / "one cohort.npz") as file:
        cohort = file["embeddings"].astype(np.float64)
    mean = cohort.mean(axis=0)
    found = score(folder, "--cohort", folder / "one cohort.npz", "--mean-subtraction")
    assert_rates(found, *plain_scores(folder, shift=mean))

    scores, target = plain_scores(folder)
    listed = read_trials(folder / "trials.txt")
    with np.load(folder / "one.npz") as file:
        pairs, rows = trial_pairs(listed, file["names"].tolist()), file["embeddings"].astype(np.float64)
    units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    nearest = -np.sort(-units @ (cohort / np.linalg.norm(cohort, axis=1, keepdims=True)).T, axis=1)[:, :10]
    normal = [(scores - nearest[side].mean(axis=1)) / nearest[side].std(axis=1) for side in pairs.T]
    found = score(folder, "--cohort", folder / "one cohort.npz", "--as-norm", "10")
    assert_rates(found, np.mean(normal, axis=0), target)


def test_several_files_are_averaged(folder):
    (one, target), (two, _) = plain_scores(folder), plain_scores(folder, "two.npz")
    found = score(folder, embeddings=("one.npz", "two.npz"))
    assert_rates(found, (one + two) / 2, target)
    assert found["models"] == ["one", "two"]
    both = score(
        folder,
        "--cohort",
        folder / "one cohort.npz",
        "--cohort",
        folder / "two cohort.npz",
        "--mean-subtraction",
        embeddings=("one.npz", "two.npz"),
    )
    assert both["eer"] != found["eer"]


def test_calibration_makes_costs_that_scikit_learn_confirms(folder):
    """Cllr is the log loss, in bits, of both classes with equal weight; actDCF that of Bayes' threshold."""
    found = score(folder, "--calibrate", folder / "tuning.txt")
    scores, target = plain_scores(folder)
    llrs = found["calibration_scale"] * scores + found["calibration_offset"]
    weights = np.where(target, 1 / target.sum(), 1 / (~target).sum())
    probability = 1 / (1 + np.exp(-llrs))
    assert found["cllr"] == pytest.approx(log_loss(target, probability, sample_weight=weights) / np.log(2), abs=1e-6)
    for p in (0.01, 0.05):
        accepted = llrs >= np.log((1 - p) / p)
        cost = (p * (~accepted[target]).mean() + (1 - p) * accepted[~target].mean()) / p
        assert found[f"act_dcf_{p}"] == pytest.approx(cost, abs=1e-6) and cost >= found[f"min_dcf_{p}"] - 1e-9
    assert found["min_cllr"] <= found["cllr"] < 1


def test_two_systems_are_compared_on_the_same_speakers(folder):
    found = score(folder, "--compare", folder / "two.npz")["comparison"]
    ours, theirs = (rates_by_scikit_learn(*plain_scores(folder, name))["eer"] for name in ("one.npz", "two.npz"))
    assert found["eer"] == pytest.approx(theirs, abs=1e-6)
    assert found["difference"] == pytest.approx(ours - theirs, abs=1e-6) and found["difference"] < 0
    assert found["interval"][0] <= found["difference"] <= found["interval"][1] and found["p_value"] < 0.1


def test_speakers_come_from_a_table_or_from_folders_or_not_at_all(folder, tmp_path):
    wanted = score(folder)["eer_interval"]
    names, speakers = names_and_speakers()
    table = tmp_path / "utt2spk"
    table.write_text("".join(f"{name} person{speaker}\n" for name, speaker in zip(names, speakers)))
    assert score(folder, "--speakers", table)["eer_interval"] == wanted
    table.write_text("".join(f"{name}\tone person\n" for name in names))
    arguments = ["score", "--embeddings", folder / "one.npz", "--trials", folder / "trials.txt"]
    status, text = tiny.here(*arguments, "--speakers", table)
    assert status == 2 and "contradict" in text
    flat = {old: old.replace("/", "-") for old in names}
    with np.load(folder / "one.npz") as file:
        np.savez(tmp_path / "flat.npz", names=np.array(list(flat.values())), embeddings=file["embeddings"])
    lines = (folder / "trials.txt").read_text().replace("/", "-")
    (tmp_path / "trials.txt").write_text(lines)
    assert score(tmp_path, embeddings=("flat.npz",))["eer_interval"] is None
    status, text = tiny.here("score", "--embeddings", tmp_path / "flat.npz", "--trials", tmp_path / "trials.txt")
    assert status == 0 and "no interval: the recording name 'id00-" in text
    status, text = tiny.here(*arguments, "--replicates", 0)
    assert status == 0 and "no interval: the number of bootstrap replicates is 0" in text


def test_what_does_not_belong_together_is_refused(folder, tmp_path):
    for arguments, message in (
        (("--cohort", folder / "two cohort.npz", "--mean-subtraction"), "are from different models (one and two)"),
        (("--mean-subtraction",), "need a cohort"),
        (("--as-norm", "10"), "need a cohort"),
        (("--cohort", folder / "one cohort.npz", "--as-norm", "41"), "41 nearest of a cohort of 40 recordings"),
        (("--embeddings", folder / "two.npz", "--cohort", folder / "one cohort.npz"), "1 cohorts for 2 files"),
        (("--embeddings", folder / "one cohort.npz"), f"are missing from {folder / 'one cohort.npz'}: 'id00"),
        (("--compare", folder / "one cohort.npz"), f"are missing from {folder / 'one cohort.npz'}: 'id00"),
        (("--embeddings", folder / "gone.npz"), "gone.npz: no such file"),
        (("--speakers", tmp_path / "gone"), "gone: No such file"),
    ):
        needed = ("--embeddings", folder / "one.npz", "--trials", folder / "trials.txt")
        status, text = tiny.here("score", *needed, *arguments)
        assert status == 2 and message in text, text
    for content, message in (
        ("", "the trial list is empty"),
        ("1 id00/0.wav id00/1.wav\n1 id00/0.wav\n", "2 fields"),
        ("id00/0.wav id00/1.wav\n", "has no labels, so only scores can be written: give --scores"),
        ("1 id00/0.wav id00/1.wav\n0 id00/1.wav id00/0.wav\n", "once as target and once as nontarget"),
        ("1 id00/0.wav id00/1.wav\n", "no nontarget trial"),
    ):
        (tmp_path / "list.txt").write_text(content)
        status, text = tiny.here("score", "--embeddings", folder / "one.npz", "--trials", tmp_path / "list.txt")
        assert status == 2 and message in text and "list.txt" in text


def test_a_cohort_of_trial_recordings_is_warned_of(folder, tmp_path):
    names, _ = names_and_speakers()
    with np.load(folder / "one.npz") as file:
        write_embeddings(tmp_path / "c.npz", Embeddings(["x", *names[:5]], -file["embeddings"][:6], "one"))
        write_embeddings(tmp_path / "narrow.npz", Embeddings(["x", "y"], file["embeddings"][:2, :8], "one"))
    assert score(folder, "--cohort", tmp_path / "c.npz", "--mean-subtraction")["cohort_in_trials"] == 5
    assert score(folder, "--cohort", folder / "one cohort.npz", "--mean-subtraction")["cohort_in_trials"] == 0
    needed = ("score", "--embeddings", folder / "one.npz", "--trials", folder / "trials.txt")
    status, text = tiny.here(*needed, "--cohort", tmp_path / "c.npz", "--mean-subtraction")
    assert status == 0 and "WARNING: 5 recordings of the cohort take part in the trials" in text
    status, text = tiny.here(*needed, "--cohort", tmp_path / "narrow.npz", "--mean-subtraction")
    assert status == 2 and "has 16-dimensional embeddings and its cohort" in text and "8-dimensional ones" in text


def test_a_cohort_of_trial_recordings_is_found_under_other_names(folder, tmp_path):
    names, _ = names_and_speakers()
    with np.load(folder / "one.npz") as file:
        rows = file["embeddings"]
    others = np.random.default_rng(1).normal(size=(4, rows.shape[1])).astype(np.float32)
    renamed = [names[0].replace(".wav", ".flac"), names[1], "a copy of the third.wav", "stranger.wav"]
    for embeddings, count in ((others, 2), (np.concatenate([others[:2], rows[2:3], others[3:]]), 3)):
        write_embeddings(tmp_path / "c.npz", Embeddings(renamed, embeddings, "one"))
        assert score(folder, "--cohort", tmp_path / "c.npz", "--mean-subtraction")["cohort_in_trials"] == count


def test_options_without_effect_are_refused(folder, tmp_path):
    needed = ("score", "--embeddings", folder / "one.npz", "--trials")
    status, text = tiny.here(*needed, folder / "trials.txt", "--cohort", folder / "one.npz")
    assert status == 2 and "a cohort is for --mean-subtraction or --as-norm N" in text
    lines = (folder / "trials.txt").read_text().splitlines()
    (tmp_path / "pairs.txt").write_text("".join(f"{line.split(maxsplit=1)[1]}\n" for line in lines))
    for option in ("--calibrate", "--compare", "--speakers"):
        scores = tmp_path / "new" / "scores.txt"
        status, text = tiny.here(*needed, tmp_path / "pairs.txt", "--scores", scores, option, "gone")
        assert status == 2 and f"there are no error rates: leave out {option}" in text and not scores.exists()
    assert tiny.here(*needed, tmp_path / "pairs.txt", "--scores", scores)[0] == 0 and scores.exists()


def test_calibration_on_the_trials_themselves_is_warned_of(folder, tmp_path):
    lines = (folder / "trials.txt").read_text().splitlines()
    label, first, second = lines[0].split()
    (tmp_path / "tuning.txt").write_text("\n".join([f"{label} {second} {first}", *lines[1:40]]))
    needed = ("score", "--embeddings", folder / "one.npz", "--trials", folder / "trials.txt", "--replicates", 0)
    status, text = tiny.here(*needed, "--calibrate", tmp_path / "tuning.txt")
    assert status == 0 and "WARNING: 40 trials were calibrated on, too" in text, text


def test_calibration_on_trials_without_errors_is_warned_of(folder, tmp_path):
    """The slope is then as steep as the optimiser lets it become."""
    (tmp_path / "tuning.txt").write_text("1 id00/0.wav id00/0.wav\n0 id00/0.wav id01/0.wav\n")
    needed = ("score", "--embeddings", folder / "one.npz", "--trials", folder / "trials.txt", "--replicates", 0)
    status, text = tiny.here(*needed, "--calibrate", tmp_path / "tuning.txt")
    assert status == 0 and "WARNING: the trials calibrated on have no errors" in text, text
    assert "no errors" not in tiny.here(*needed, "--calibrate", folder / "tuning.txt")[1]


def test_a_warning_of_one_is_in_the_singular():
    texts = "\n".join(warnings_of({"self_trials": 1, "cohort_in_trials": 1, "calibration_trials_in_both": 1}))
    assert "1 trial compares" in texts and "1 recording of the cohort takes part" in texts
    assert "1 trial was calibrated on" in texts


def test_recordings_compared_with_themselves_are_warned_of(folder, tmp_path):
    lines = (folder / "trials.txt").read_text()
    (tmp_path / "list.txt").write_text(lines + "1 id00/0.wav id00/0.wav\n")
    needed = ("score", "--embeddings", folder / "one.npz", "--replicates", 0)
    status, text = tiny.here(*needed, "--trials", tmp_path / "list.txt")
    assert status == 0 and "WARNING: 1 trial compares a recording with itself" in text, text
    (tmp_path / "enroll.txt").write_text("ada id00/0.wav id00/1.wav\n")
    (tmp_path / "enrolled.txt").write_text("ada id00/1.wav 1\nada id00/2.wav 1\nada id01/2.wav 0\n")
    options = ("--trials", tmp_path / "enrolled.txt", "--enrollments", tmp_path / "enroll.txt")
    assert "WARNING: 1 trial compares" in tiny.here(*needed, *options)[1]
    assert "WARNING" not in tiny.here(*needed, "--trials", folder / "trials.txt")[1]
    (tmp_path / "list.txt").write_text(lines + "0 id00/0.wav id00/0.wav\n")
    status, text = tiny.here(*needed, "--trials", tmp_path / "list.txt")
    assert status == 2 and "'id00/0.wav' against itself and says nontarget" in text


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "the table of speakers is empty"),
        (b"id00/0.wav\n", "line 1: expected `name speaker`"),
        (b"id00/0.wav\tid00\tfemale\n", "line 1: expected `name speaker`"),
        (b"a x\nb y\na z\n", "line 3: the speaker of 'a' is 'z' here and 'x' before"),
        (b"\xff\xfea\x00", "not a table of speakers: not UTF-8"),
    ],
)
def test_a_table_of_speakers_that_cannot_be_used_is_named(content, message, folder, tmp_path):
    (tmp_path / "utt2spk").write_bytes(content)
    needed = ("score", "--embeddings", folder / "one.npz", "--trials", folder / "trials.txt")
    status, text = tiny.here(*needed, "--speakers", tmp_path / "utt2spk")
    assert status == 2 and message in text and "utt2spk" in text


def test_a_list_without_labels_gives_scores_alone(folder, tmp_path):
    labelled = (folder / "trials.txt").read_text().splitlines()
    (tmp_path / "list.txt").write_text("".join(line.partition(" ")[2] + "\n" for line in labelled))
    needed = ("score", "--embeddings", folder / "one.npz")
    for name, trials in (("with", folder / "trials.txt"), ("without", tmp_path / "list.txt")):
        status, text = tiny.here(*needed, "--trials", trials, "--scores", tmp_path / name, "--replicates", 0)
        assert status == 0 and ("EER" in text) == (name == "with"), text
    assert "no labels" in text and (tmp_path / "with").read_text() == (tmp_path / "without").read_text()


def test_speakers_enrolled_by_several_recordings_score_by_their_mean(folder, tmp_path):
    with np.load(folder / "one.npz") as file:
        rows = dict(zip(file["names"].tolist(), file["embeddings"].astype(np.float64)))
    (tmp_path / "enroll.txt").write_text("ada id00/0.wav id00/1.wav\nbob id01/0.wav\n")
    (tmp_path / "list.txt").write_text("ada id00/2.wav 1\nada id01/2.wav 0\nbob id01/2.wav 1\nbob id02/0.wav 0\n")
    options = ("--enrollments", tmp_path / "enroll.txt", "--scores", tmp_path / "scores.txt")
    status, text = tiny.here(
        "score", "--embeddings", folder / "one.npz", "--trials", tmp_path / "list.txt", *options, "--replicates", 20
    )
    assert status == 0, text
    lines = [line.split("\t") for line in (tmp_path / "scores.txt").read_text().splitlines()]
    ada = (rows["id00/0.wav"] + rows["id00/1.wav"]) / 2
    for (found, _, test), enrolled in zip(lines, [ada, ada, rows["id01/0.wav"], rows["id01/0.wav"]], strict=True):
        other = rows[test]
        wanted = enrolled @ other / np.linalg.norm(enrolled) / np.linalg.norm(other)
        assert float(found) == pytest.approx(wanted, abs=2e-6)


def test_a_comparison_has_every_error_rate_and_needs_no_bootstrap(folder):
    found = score(folder, "--compare", folder / "two.npz")["comparison"]
    assert_rates(found, *plain_scores(folder, "two.npz"))
    without = score(folder, "--compare", folder / "two.npz", "--replicates", 0)["comparison"]
    assert without["interval"] is None and without["p_value"] is None
    assert without["difference"] == found["difference"]


def test_nothing_is_imported_that_scoring_does_not_need(folder):
    """Importing JAX takes longer than scoring a list of trials."""
    import subprocess
    import sys

    code = "import sys; from memo_jax import cli; status = cli.main(sys.argv[1:]); print('jax' in sys.modules, status)"
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            code,
            "score",
            "--embeddings",
            str(folder / "one.npz"),
            "--trials",
            str(folder / "trials.txt"),
        ],
        env=tiny.environment(),
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines()[-1] == "False 0", done.stderr
