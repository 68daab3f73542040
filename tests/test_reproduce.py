"""A reproduced run: bit-identical with the same seed, and whatever differs is reported; and the run's own record."""

import json
import shutil

import pytest

import tiny
from memo_jax import config as configs
from memo_jax.data.batches import Utterances
from memo_jax.log import read_metrics
from memo_jax.training.run_record import RUN_FILE, RunRecord, read_run
from memo_jax.training.saved_checkpoint import saved_steps

# orbax leaves futures of a failed operation behind, which complain of a closed event loop when they end.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.usefixtures("compiled_once"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of four steps, evaluated into its own folder: on trials, on crops, and on a list without labels."""
    workdir, data = tmp_path_factory.mktemp("run") / "run", tiny.material()
    status, text = tiny.train_here(workdir, "--stop-at-step=4", "checkpoint.every_steps=2")
    assert status == 0, text
    pairs = workdir.with_name("pairs.txt")
    pairs.write_text("".join(f"{line.split(maxsplit=1)[1]}\n" for line in data.trials.read_text().splitlines()))
    for name, trials, more in (
        ("test", data.trials, ()),
        ("crops", data.trials, ("--crops", 2, "--crop-seconds", 0.6)),
        ("pairs", pairs, ()),
    ):
        options = ("--data", data.dataset, "--trials", trials, "--output", workdir / name, "--replicates", 0, *more)
        status, text = tiny.here("eval", "--workdir", workdir, *options)
        assert status == 0, text
    return workdir


@pytest.fixture(scope="module")
def again(run, tmp_path_factory):
    """The run reproduced by the command, what it printed, and its status."""
    output = tmp_path_factory.mktemp("again") / "again"
    status, text = tiny.here("reproduce", run, "--output", output)
    return output, text, status


def test_the_same_seed_gives_bit_identical_metrics_parameters_and_rates(run, again):
    output, text, status = again
    assert status == 0 and text.endswith("identical\n") and "4 rows of metrics compared" in text, text
    assert json.loads((output / "crops" / "results.json").read_text())["crop_seconds"] == 0.6
    assert (output / "pairs" / "scores.txt").read_text() == (run / "pairs" / "scores.txt").read_text()
    assert "metrics: no difference" in text and "parameters: no difference" in text
    assert saved_steps(output)[-1] == saved_steps(run)[-1] == 4 and (output / "test" / "results.json").exists()
    assert "warning" not in text


def changed(run, folder, again):
    """A copy of the run to change, and a copy of the output, so that nothing need be trained again."""
    return shutil.copytree(run, folder / "run"), shutil.copytree(again[0], folder / "again")


def test_changed_metrics_are_reported_by_name_and_size(run, again, tmp_path):
    workdir, output = changed(run, tmp_path, again)
    rows = read_metrics(workdir)
    rows[1]["loss"] += 0.25
    del rows[2]["lr"]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    status, text = tiny.here("reproduce", workdir, "--output", output, "--json")
    found = json.loads(text[text.index("{") :])
    assert status == 1 and not found["identical"]
    assert found["metrics"] == {"loss": pytest.approx(0.25)} and found["missing"] == ["lr at step 3"]
    status, text = tiny.here("reproduce", workdir, "--output", output)
    assert status == 1 and "1 metrics differ, loss the most, by 0.25" in text and text.endswith("different\n")


def test_changed_parameters_and_rates_are_reported(run, again, tmp_path):
    """The parameters of an earlier step, and a report with a different rate."""
    workdir, output = changed(run, tmp_path, again)
    shutil.rmtree(workdir / "checkpoints" / "4")
    shutil.copytree(workdir / "checkpoints" / "2", workdir / "checkpoints" / "4")
    results = json.loads((workdir / "test" / "results.json").read_text())
    rate = results["eer"]
    (workdir / "test" / "results.json").write_text(json.dumps(results | {"eer": rate + 3}))
    status, text = tiny.here("reproduce", workdir, "--output", output, "--json")
    found = json.loads(text[text.index("{") :])
    assert status == 1 and {"student", "teacher", "center", "opt_state"} <= found["parameters"].keys()
    assert found["evaluations"] == {"test: eer": pytest.approx(3)} and not found["metrics"]


def test_changed_scores_of_a_list_without_labels_are_reported(run, again, tmp_path):
    workdir, output = changed(run, tmp_path, again)
    lines = (workdir / "pairs" / "scores.txt").read_text().splitlines()
    score, *names = lines[3].split("\t")
    lines[3] = "\t".join([f"{float(score) - 0.25:.6f}", *names])
    (workdir / "pairs" / "scores.txt").write_text("\n".join(lines) + "\n")
    results = json.loads((workdir / "pairs" / "results.json").read_text())
    old = {key: value for key, value in results.items() if key not in ("crop_seconds", "enrollments")}
    (workdir / "pairs" / "results.json").write_text(json.dumps(old))  # as earlier versions wrote it
    status, text = tiny.here("reproduce", workdir, "--output", output, "--json")
    found = json.loads(text[text.index("{") :])
    assert status == 1 and found["evaluations"] == {"pairs: scores": pytest.approx(0.25)}


def test_only_what_both_runs_have_is_compared(run, again, tmp_path):
    """A run that was interrupted has evaluated elsewhere, and a checkpoint that was evaluated may be gone."""
    workdir, output = changed(run, tmp_path, again)
    rows = read_metrics(workdir)
    rows[1]["eer/resnet"] = 12.0
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    status, text = tiny.here("reproduce", workdir, "--output", output)
    assert status == 0 and text.endswith("identical\n"), text
    shutil.rmtree(workdir / "checkpoints")
    results = json.loads((workdir / "test" / "results.json").read_text())
    (workdir / "test" / "results.json").write_text(json.dumps(results | {"step": 3}))
    status, text = tiny.here("reproduce", workdir, "--output", output, "--json")
    found = json.loads(text[text.index("{") :])
    assert status == 1 and found["missing"] == [
        "parameters (no checkpoint of the same step)",
        "test, of step 3, whose checkpoint is not kept",
    ]


def test_error_rates_on_another_trial_list_are_not_compared(tmp_path):
    """A run that was resumed with another list has rates of both; its repetition measures on the last one."""
    data, workdir = tiny.material(), tmp_path / "run"
    other = tmp_path / "other.txt"
    other.write_text("".join(data.trials.read_text().splitlines(keepends=True)[::2]))
    settings = (f"evaluation.data={data.dataset}", "evaluation.every_epochs=-1", "evaluation.every_steps=1")
    for trials, step in ((data.trials, 1), (other, 2)):
        status, text = tiny.train_here(workdir, *settings, f"evaluation.trials={trials}", f"--stop-at-step={step}")
        assert status == 0, text
    status, text = tiny.here("reproduce", workdir)
    assert status == 0 and "evaluation: other trials or recordings" in text and text.endswith("identical\n"), text


def test_other_versions_code_data_and_machines_are_warned_of(run, again, tmp_path):
    workdir, output = changed(run, tmp_path, again)
    record = read_run(workdir)
    record["data"]["fingerprint"] = "another"
    record["starts"][-1]["versions"]["jax"] = "0.1"
    record["starts"][-1]["hardware"]["processor"] = "abacus"
    record["starts"].append(record["starts"][0] | {"commit": "0123"})
    (workdir / RUN_FILE).write_text(json.dumps(record))
    status, text = tiny.here("reproduce", workdir, "--output", output)
    assert status == 0
    for warned in (
        "jax: 0.1 → ",
        "processor: abacus → ",
        "commit: 0123 → ",
        "data.fingerprint: another → ",
        "resumed with other versions or on another machine",
    ):
        assert f"warning: {warned}" in text or warned in text, warned
    (workdir / RUN_FILE).unlink()
    assert "it was made by an earlier version" in tiny.here("reproduce", workdir, "--output", output)[1]
    for damaged in ("{", "[" * 100_000):
        (workdir / RUN_FILE).write_text(damaged)
        status, text = tiny.here("reproduce", workdir, "--output", output)
        assert status == 2 and f"{workdir / RUN_FILE}: damaged" in text


def test_data_may_have_moved_but_nothing_else_may_change(run, again, tmp_path):
    workdir, output = changed(run, tmp_path, again)
    output.rename(tmp_path / "run-again")
    status, text = tiny.here("reproduce", workdir, f"--config.data.train={tmp_path / 'moved'}")
    assert status == 0 and f"{tmp_path / 'run-again'}: 4 rows" in text, text
    status, text = tiny.here("reproduce", workdir, "--output", tmp_path / "new", "--config.seed=5")
    assert status == 2 and "seed: 0 → 5: this would be a different run" in text and not (tmp_path / "new").exists()
    status, text = tiny.here("reproduce", workdir, "--config.seeed=5")
    assert status == 2 and "the config has no key config.seeed to set; nearest: seed" in text
    for wrong, said in ((tmp_path, "not the workdir of a run"), (tmp_path / "empty", "has logged no step")):
        if wrong.name == "empty":
            configs.save_config(wrong, configs.read_config(run))
            (wrong / "metrics.jsonl").touch()
        status, text = tiny.here("reproduce", wrong, "--output", tmp_path / "new")
        assert status == 2 and said in text
    status, text = tiny.here("reproduce", workdir, "--output", workdir)
    assert status == 2 and "is the run itself" in text


def test_a_run_keeps_what_it_was_made_with(run):
    record, data = read_run(run), tiny.material().dataset
    assert record["seed"] == 0
    assert record["data"]["fingerprint"] == Utterances(data).fingerprint and record["data"]["utterances"] == 20
    (start,) = record["starts"]
    assert start["versions"].keys() >= {"python", "memo-jax", "jax", "jaxlib", "flax", "numpy"}
    assert "unknown" not in start["versions"].values()
    assert start["hardware"]["cores"] >= 1 and start["hardware"]["devices"] == 1
    assert start["hardware"]["platform"] == "cpu" and start["cpu_seconds"] > 0 and start["command"]
    assert start["commit"] is None or len(start["commit"].removesuffix("+changes")) == 40
    assert (start["first_step"], start["last_step"]) == (1, 4)


def test_every_start_is_kept_unless_the_run_starts_afresh(tmp_path):
    for begin, end in ((0, 3), (3, None), (3, 8)):
        record = RunRecord(tmp_path, seed=1, data={}, begin=begin, total=9)
        if end:
            record.end(end)
    starts = read_run(tmp_path)["starts"]
    assert [(start["first_step"], start.get("last_step")) for start in starts] == [(1, 3), (4, None), (4, 8)]
    RunRecord(tmp_path, seed=1, data={}, begin=0, total=9)
    assert len(read_run(tmp_path)["starts"]) == 1
    RunRecord(tmp_path / "other", seed=1, data={}, begin=0, total=9, active=False).end(3)
    assert not (tmp_path / "other").exists() and read_run(tmp_path / "other") is None
