"""experiments/accelerator.py at smoke size on a CPU: every part returns what its table needs, and calls resume."""

import json
import subprocess
import sys

import pytest

import tiny
import tiny_processes

sys.path[:0] = [str(tiny.ROOT / "experiments"), str(tiny.ROOT / "experiments" / "benchmarks")]
import accelerator  # noqa: E402

SCRIPT = tiny.ROOT / "experiments" / "accelerator.py"
MACHINE = {
    "platform": "cpu",
    "kind": "cpu",
    "devices": 1,
    "jax": "0",
    "jaxlib": "0",
    "python": "3",
    "flops_per_second": {"float32": 1e15, "bfloat16": 1e15},
    "bytes_per_second": 1e15,
}
SMALL = ("--config.model.branches=resnet", "--config.loss.cross=0", "--config.data.local_crops=0")


def arguments(output, *more):
    config = ("--config", str(tiny.material().config), "--training-config", str(tiny.material().config))
    return [f"--output={output}", *config, "--batches=4,8", "--steps=1", "--rounds=1", *SMALL, *more]


def put(output, name, result):
    file = output / "parts" / f"{name.replace('/', '-')}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result))


def part(output, name, *more):
    """Runs a part in this process; returns its result."""
    assert accelerator.main(arguments(output, f"--part={name}", *more)) == 0
    return json.loads((output / "parts" / f"{name.replace('/', '-')}.json").read_text())


def command(output, *more):
    """Runs the command as a user does."""
    return subprocess.run(
        [sys.executable, SCRIPT, *arguments(output, *more)], capture_output=True, text=True, env=tiny.environment()
    )


@pytest.fixture(autouse=True)
def small_network(monkeypatch):
    """A network of one layer, which compiles in no time; the tests are about what surrounds it."""
    tiny_processes.patch_for_tests(monkeypatch.setattr)


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """The folder of a machine so fast that this one reaches only a small share of its peak."""
    folder = tmp_path_factory.mktemp("accelerator")
    put(folder, "machine", MACHINE)
    return folder


def test_the_machine(output, tmp_path, monkeypatch):
    import step_parts

    monkeypatch.setattr(
        step_parts, "machine_limits", lambda dtype: {"float32": (2.0, 3.0), "bfloat16": (4.0, 5.0)}[dtype]
    )
    found = part(tmp_path, "machine")
    assert found.keys() >= MACHINE.keys() and found["platform"] == "cpu"
    assert found["flops_per_second"] == {"float32": 2.0, "bfloat16": 4.0} and found["bytes_per_second"] == 5.0


def test_the_step_and_what_it_is_measured_against(output):
    """Twice the batch has twice the FLOPs, but for what does not depend on the batch."""
    each = part(output, "flops")["flops_per_utterance"]
    assert 1e6 < each < 1e9
    found = part(output, "step/float32/4")
    assert found["utterances_per_second"] == pytest.approx(4 / found["seconds"])
    assert found["fraction_of_peak"] == pytest.approx(4 * each / found["seconds"] / 1e15)
    assert found["fraction_of_bandwidth"] > 0 and found["compiled_bytes"] > 100_000
    text = accelerator.markdown({"machine": MACHINE, "step/float32/4": found})
    assert f"| step/float32/4 | {found['seconds']:.4g} |" in text


def test_bfloat16_is_compared_with_float32(output, monkeypatch):
    found = part(output, "bfloat16")
    assert found["passed"] and 1e-6 < found["relative_differences"][0] < 0.02
    monkeypatch.setattr(accelerator, "BFLOAT16_TOLERANCE", 1e-9)
    assert not part(output, "bfloat16")["passed"]


def test_the_trace(output):
    found = part(output, "trace")
    seconds = found["seconds_by_scope"]
    assert seconds.keys() >= {"resnet/teacher/backbone", "resnet/student/backbone, backward", "resnet/student/update"}
    assert all(value > 0 for value in seconds.values()) and (output / "timeline.png").stat().st_size > 5_000
    assert (output / "profile" / "memory.prof").stat().st_size > 0


def test_all_devices_are_compared_with_one(tmp_path):
    """In a process with two (virtual) devices, with a ResNet: the one-layer network amplifies rounding to 1.1e-5."""
    put(tmp_path, "machine", MACHINE)
    done = subprocess.run(
        [sys.executable, SCRIPT, *arguments(tmp_path, "--part=devices")],
        capture_output=True,
        text=True,
        env=tiny.environment(devices=2),
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "parts" / "devices.json").read_text())
    assert found["passed"] and found["devices"] == 2 and len(found["relative_differences"]) == accelerator.STEPS


def test_a_reference_beyond_its_tolerance_fails(output, monkeypatch):
    import parity

    result = {"deviations": {"losses/step0/ecapa": 3e-6}, "noise": {"losses/step0/ecapa": 1e-6}, "passed_tolerance": []}
    monkeypatch.setattr(parity, "compare", lambda path: result)
    assert part(output, "parity")["largest_share_of_tolerance"] == pytest.approx(0.3)
    monkeypatch.setitem(result, "passed_tolerance", ["losses/step0/ecapa: 3 > 1"])
    found = part(output, "parity")
    assert not found["passed"] and accelerator.summary(found) == "WRONG"


def test_a_larger_batch_is_not_tried_where_a_smaller_one_did_not_fit(output):
    put(output, "step/bfloat16/4", {"error": "RESOURCE_EXHAUSTED", "out_of_memory": True})
    assert part(output, "step/bfloat16/8")["skipped"] == "4 utterances a device did not fit"


def test_rows_are_trained_and_tested(tmp_path):
    """On prepared data that came with the machine."""
    data = tmp_path / "data"
    data.mkdir()
    for name, source in {"train": "dataset", "test": "dataset", "trials.txt": "trials"}.items():
        (data / name).symlink_to(getattr(tiny.material(), source))
    more = ("--rows=dino-resnet", f"--data={data}", "--config.total_steps=3", "--config.gate.stop_steps=2")
    (row,) = part(tmp_path / "out", "training", *more)["rows"].items()
    assert row[0] == "dino-resnet" and row[1]["steps"] == 3 and 0 < row[1]["eer"]["resnet"] < 100
    assert "| dino-resnet | 3 | resnet " in accelerator.markdown({"training": {"rows": dict([row])}})


def test_schedules_are_stretched_to_the_minutes_that_there_are(output):
    """120 s at 4 steps a second, for each of two rows."""
    put(output, "step/bfloat16/4", {"utterances_per_second": 16.0})
    more = ["--rows=dino-ecapa,memo-plateau", "--training-minutes=4", f"--training-config={tiny.material().config}"]
    parsed = accelerator.build_parser().parse_args([f"--output={output}", *more])
    parsed.overrides, parsed.batches = [], [4, 8]
    texts = dict(text.split("=") for text in accelerator.training_overrides(parsed))
    assert texts["total_steps"] == "480" and texts["gate.stop_steps"] == str(480 // 12 * 7)


def test_a_call_resumes_where_time_ran_out(tmp_path):
    put(tmp_path, "machine", MACHINE)
    only = "--parts=^(machine|devices|plan)$"
    done = command(tmp_path, only, "--minutes=0")
    assert done.returncode == 75 and "the same command continues with devices" in done.stderr
    done = command(tmp_path, only)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert (
        results["devices"]["skipped"] == "there is one device" and "no data sheet of cpu" in results["plan"]["skipped"]
    )
    assert "| devices | skipped: there is one device |" in (tmp_path / "results.md").read_text()
    again = command(tmp_path, only)
    assert again.returncode == 0 and again.stderr == "", "nothing was left to do"


def test_a_part_that_fails_is_reported_and_the_others_still_run(tmp_path):
    put(tmp_path, "machine", MACHINE)
    done = command(tmp_path, "--parts=^(machine|parity|plan)$", f"--reference={tmp_path / 'nowhere.npz'}")
    assert done.returncode == 1 and "parity: failed: " in done.stderr and "nowhere.npz" in done.stderr
    assert "3 of 3 parts done" in done.stdout


def test_a_part_that_takes_too_long_is_ended():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    assert not accelerator.ended(child, 0.1) and child.returncode < 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--batches=a"], "give numbers with commas between"),
        (["--data=nowhere"], "has no train"),
        (["--config.model.width=3"], "model.width"),
    ],
)
def test_bad_arguments(more, message, tmp_path, capsys):
    try:
        status = accelerator.main(arguments(tmp_path / "out", *more))
    except SystemExit as stop:
        status = stop.code
    assert status == 2 and message in capsys.readouterr().err and not (tmp_path / "out").exists()
