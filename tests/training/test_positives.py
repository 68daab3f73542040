"""Positives from other recordings: partners against their definition, their crops in batches, and runs with them.

Runs train a one-layer network with an equally small front end, since the tests are about what surrounds them.
"""

import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

import tiny
import tiny_processes
from memo_jax.data.batches import Utterances, reference_batches, training_batches
from memo_jax.log import read_metrics
from memo_jax.training.checkpoint import load_state
from memo_jax.training.positives import draw_partners
from runs import KILLED, assert_same_state, rows_without_times

pytestmark = pytest.mark.usefixtures("compiled_once")
SETTINGS = (
    "positives.clusters=6",
    "positives.from_epochs=-1",
    "positives.from_steps=5",
    "positives.every_epochs=-1",
    "positives.every_steps=3",
    "positives.reference_seconds=0.32",
    "positives.iterations=3",
)
CROPS = {"global_seconds": 0.05, "local_seconds": 0.02}


def candidates(own, chosen):
    """The definition: for each utterance, those that it may draw; itself, if there are none."""
    found = [set(np.flatnonzero(own == cluster)) - {i} for i, cluster in enumerate(chosen)]
    return [others or {i} for i, others in enumerate(found)]


def test_partners_are_drawn_from_all_other_members_of_the_chosen_cluster():
    """Over many draws, all that may be drawn are, about equally often (600 draws: within five deviations)."""
    own = np.array([2, 0, 1, 0, 2, 2, 4, 1, 2])
    for chosen in (own, np.array([0, 2, 0, 2, 0, 3, 2, 2, 1])):  # cluster 3 is empty, and 4 has a single member
        draws = np.array([draw_partners(own, chosen, 0.0, [seed]) for seed in range(600)])
        for drawn, expected in zip(draws.T, candidates(own, chosen)):
            share, counts = 1 / len(expected), np.bincount(drawn, minlength=len(own))
            assert set(np.flatnonzero(counts)) == expected
            deviation = np.sqrt(600 * share * (1 - share))
            assert (np.abs(counts[sorted(expected)] - 600 * share) <= 5 * deviation).all()
    assert draws.dtype == np.int32
    np.testing.assert_array_equal(draw_partners(own, own, 0.0, [3, 4]), draw_partners(own, own, 0.0, [3, 4]))


def test_a_share_keeps_its_own_recording():
    own = np.zeros(4000, int)
    for share in (0.0, 0.3, 1.0):
        kept = (draw_partners(own, own, share, 1) == np.arange(4000)).mean()
        assert kept == pytest.approx(share, abs=0.04)


def test_crops_for_teachers_are_of_the_partner_and_the_others_as_without():
    utterances = Utterances(tiny.material().dataset)
    partners = np.random.default_rng(0).permutation(len(utterances)).astype(np.int32)
    options = {"batch_size": 4, "seed": 0, **CROPS, "labels": np.arange(len(utterances))}
    plain, both = training_batches(utterances, **options), {"teacher_crops": 3, "partners": partners}
    partnered = training_batches(utterances, **options, **both)
    parts = [training_batches(utterances, **options, **both, process_index=i, process_count=2) for i in range(2)]
    for _ in range(6):
        batch, without = next(partnered), next(plain)
        assert batch["teacher"].shape == (4, 3, 800) and "teacher" not in without
        for kind, crops in without.items():
            np.testing.assert_array_equal(batch[kind], crops)
        halves = [next(part)["teacher"] for part in parts]
        np.testing.assert_array_equal(batch["teacher"], np.concatenate(halves))
        for crops, utterance in zip(batch["teacher"], batch["label"]):
            partner = utterances[partners[utterance]].tobytes()
            assert all(crop.tobytes() in partner for crop in crops)


def test_references_are_a_crop_of_every_utterance_in_order():
    utterances = Utterances(tiny.material().dataset)
    options = {"rows": 8, "seconds": 0.05, "seed": 0}
    batches = [reference_batches(utterances, **options, draw=draw) for draw in (0, 0, 1)]
    parts = [reference_batches(utterances, **options, draw=0, process_index=i, process_count=2) for i in range(2)]
    for first in (0, 8, 16):
        crops, again, other = (next(one)["crops"] for one in batches)
        np.testing.assert_array_equal(crops, again)
        assert (crops != other).any()
        np.testing.assert_array_equal(crops, np.concatenate([next(part)["crops"] for part in parts]))
        for row, crop in enumerate(crops):
            assert crop.tobytes() in utterances[min(first + row, len(utterances) - 1)].tobytes()


@pytest.fixture(scope="module", autouse=True)
def small():
    with pytest.MonkeyPatch.context() as patch:
        tiny_processes.patch_for_tests(patch.setattr)
        yield


def train(workdir, *settings):
    status, text = tiny.here(*tiny_processes.command(workdir, *settings))
    assert status == 0, text
    return text


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("positives") / "run"
    return workdir, train(workdir, *SETTINGS)


def partners(workdir, step=None):
    return load_state(workdir, step, only=["partners"])["partners"]


def test_until_the_first_draw_a_run_is_the_one_without_positives(run, tmp_path):
    """Bit for bit. Then partners are drawn every three steps, and the run takes another course."""
    workdir, text = run
    train(tmp_path, "--stop-at-step=6")
    plain, rows = rows_without_times(tmp_path), rows_without_times(workdir)
    assert rows[:5] == plain[:5] and rows[5]["loss"] != plain[5]["loss"]
    assert [line.split(":")[0] for line in text.splitlines() if "drew partners" in line] == [
        f"step {step}" for step in (5, 8, 11)
    ]
    assert not [name for row in rows[:5] for name in row if name.startswith("positives/")]
    for row in rows[5:]:
        assert 0 < row["positives/other"] <= 1 and 0 <= row["positives/same_speaker"] <= 1
    assert len({(row["positives/other"], row["positives/same_speaker"]) for row in rows[5:8]}) == 1
    table = partners(workdir)
    assert table.dtype == np.int32 and table.shape == (20,) and set(table) <= set(range(20))
    speakers, others = np.array(Utterances(tiny.material().dataset).speakers), table != np.arange(20)
    assert rows[-1]["positives/other"] == others.mean()
    assert rows[-1]["positives/same_speaker"] == pytest.approx((speakers == speakers[table])[others].mean())


def test_partners_that_no_step_would_see_are_announced(tmp_path):
    text = train(tmp_path, *SETTINGS, "positives.from_steps=99", "--stop-at-step=1")
    assert "partners would first be drawn after step 99: lower positives.from_epochs" in text


@pytest.mark.parametrize("stops", [(5,), (4, 6, 8)])
def test_a_run_stopped_before_at_or_after_a_draw_resumes_exactly(run, tmp_path, stops):
    for stop in stops:
        train(tmp_path, *SETTINGS, f"--stop-at-step={stop}")
    train(tmp_path, *SETTINGS)
    assert_same_state(tmp_path, run[0], least=20)
    assert rows_without_times(tmp_path) == rows_without_times(run[0])


def test_a_killed_run_resumes_exactly(run, tmp_path):
    """Killed in the middle of the save after which partners are drawn, and in a row between two draws."""
    arguments = tiny_processes.command(tmp_path / "run", *SETTINGS)
    small = f"import sys; sys.path.insert(0, {str(tiny.ROOT / 'tests')!r})\n"
    small += "import tiny_processes; tiny_processes.patch_for_tests(setattr)\n"
    for point, step in (("save", 8), ("row", 10)):
        command = [sys.executable, "-c", small + KILLED, point, str(step), *arguments]
        done = subprocess.run(command, env=tiny.environment(), capture_output=True, text=True)
        assert done.returncode == -signal.SIGKILL, done.stderr
    train(tmp_path / "run", *SETTINGS)
    assert_same_state(tmp_path / "run", run[0], least=20)
    assert rows_without_times(tmp_path / "run") == rows_without_times(run[0])


def test_two_processes_draw_what_one_draws(tmp_path):
    """With the same teacher, the first step's."""
    settings = (*SETTINGS, "positives.from_steps=0", "positives.every_steps=100", "--stop-at-step=2")
    (first, second) = tiny_processes.start(2, tiny_processes.command(tmp_path / "two", *settings))
    assert (first.status, second.status) == (0, 0), first
    train(tmp_path / "alone", *settings)
    np.testing.assert_array_equal(partners(tmp_path / "two"), partners(tmp_path / "alone"))
    assert (partners(tmp_path / "two") != np.arange(20)).any()
    one, other = ([row["loss"] for row in read_metrics(tmp_path / name)] for name in ("alone", "two"))
    np.testing.assert_allclose(one, other, rtol=1e-5)


def test_without_labels_nothing_is_said_of_speakers(tmp_path):
    """And what is learned is the same: labels only inform the user."""
    names = Utterances(tiny.material().dataset).names
    dataset = tiny.write_dataset(tmp_path / "set", tiny.material().corpus, speakers=dict.fromkeys(names, ""))
    settings = (*SETTINGS, "positives.cluster=own", "positives.keep_own=0.5", "positives.from_steps=1")
    for workdir, data in (("plain", dataset), ("labelled", tiny.material().dataset)):
        text = train(tmp_path / workdir, *settings, f"data.train={data}", "--stop-at-step=3")
        assert ("same speaker" in text) == (workdir == "labelled"), text
    plain, labelled = (read_metrics(tmp_path / name)[-1] for name in ("plain", "labelled"))
    assert plain["loss"] == labelled["loss"] and plain["positives/other"] == labelled["positives/other"]
    assert "positives/same_speaker" in labelled and "positives/same_speaker" not in plain
    for one, other in zip(*(jax.tree.leaves(load_state(tmp_path / name)) for name in ("plain", "labelled"))):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    "setting, said",
    [
        ("positives.clusters=21", "positives.clusters is 21: more than the 20 utterances"),
        ("positives.clusters=-1", "positives.clusters is -1"),
        ("positives.cluster=other", "positives.cluster is 'other': choose one of nearest, own"),
        ("positives.keep_own=1.5", "positives.keep_own is 1.5"),
        ("positives.iterations=0", "positives.iterations is 0"),
        ("positives.reference_seconds=0", "reference_seconds is 0"),
        ("positives.every_steps=-1", "every_steps"),
    ],
)
def test_settings_that_cannot_work_are_named(setting, said, tmp_path):
    status, text = tiny.train_here(tmp_path / "run", *SETTINGS, setting)
    assert status == 2 and said in text and not (tmp_path / "run").exists(), text
