"""experiments/accelerator.py at smoke size on a CPU: every part returns what its table needs, and calls resume."""

import json
import os
import signal
import subprocess
import sys
import time
import traceback
import types
from pathlib import Path

import jax
import numpy as np
import pytest
import soundfile
from jax.profiler import ProfileData

import tiny
import tiny_processes
from memo_jax import config as configs
from memo_jax import locks, models
from memo_jax.data import batches
from memo_jax.data.batches import Utterances
from memo_jax.planning import plan as planning
from memo_jax.scoring.trials import read_trials, recording_rows
from memo_jax.training import recipe
from memo_jax.training.optim import scaled_learning_rate
from memo_jax.xla import reductions, sharding

sys.path[:0] = [str(tiny.ROOT / "experiments"), str(tiny.ROOT / "experiments" / "benchmarks")]
import accelerator  # noqa: E402
import accelerator_data  # noqa: E402
import accelerator_parts  # noqa: E402
import parity  # noqa: E402
import run as study  # noqa: E402
import step_parts  # noqa: E402
import synthetic  # noqa: E402
import train_step  # noqa: E402

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


def parsed(output, *more):
    """Options as the parts get them."""
    options, rest = accelerator.build_parser().parse_known_args(arguments(output, *more))
    options.overrides = [text.removeprefix("--config.") for text in rest]
    options.batches = [int(text) for text in options.batches.split(",")]
    return options


def put(output, name, result):
    file = accelerator_parts.part_file(types.SimpleNamespace(output=output), name)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result))


def part(output, name, *more):
    """Runs a part in this process; returns its result."""
    assert accelerator.main(arguments(output, f"--part={name}", *more)) == 0
    return accelerator_parts.result_of(types.SimpleNamespace(output=output), name)


def command(output, *more):
    """Runs the command as a user does."""
    return subprocess.run(
        [sys.executable, SCRIPT, *arguments(output, *more)], capture_output=True, text=True, env=tiny.environment()
    )


@pytest.fixture(autouse=True, scope="module")
def sigterm_of_pytest():
    """The command handles the signal in this process; here its handler ends with the tests."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(autouse=True)
def small_network(monkeypatch):
    """A network of one layer, which compiles in no time; the tests are about what surrounds it."""
    tiny_processes.patch_for_tests(monkeypatch.setattr)


@pytest.fixture(autouse=True)
def batch_statistics_as_before(monkeypatch):
    """A part, which has a process of its own elsewhere, changes how they are taken."""
    monkeypatch.setattr(reductions, "MEAN_FIRST_ON", reductions.MEAN_FIRST_ON)


@pytest.fixture
def output(tmp_path):
    """The folder of a machine so fast that this one reaches only a small share of its peak."""
    put(tmp_path, "machine", MACHINE)
    put(tmp_path, "flops", {"flops_per_utterance": 1e6})
    return tmp_path


class InThisProcess:
    """In place of the process of a part."""

    def __init__(self, command, stdout, **_):
        try:
            self.returncode = accelerator.main(command[2:])
        except Exception:
            traceback.print_exc(file=stdout)
            self.returncode = 1

    def wait(self, seconds):
        return self.returncode


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a whole command at smoke size, without training and without most levers. Parts that take the same
    step share its program."""
    folder, program, programs = tmp_path_factory.mktemp("whole"), accelerator_parts.Program, {}
    limits = {"float32": (2e15, 3e15), "bfloat16": (4e15, 5e15)}
    compared = {"deviations": {"losses/step0/ecapa": 3e-6}, "noise": {"losses/step0/ecapa": 1e-6}}

    def program_once(config, of_devices, compiler_options=None):
        key = config.to_json()
        if key not in programs:
            programs[key] = program(config, of_devices)
        return programs[key]

    with pytest.MonkeyPatch.context() as patch:
        tiny_processes.patch_for_tests(patch.setattr)
        patch.setattr(step_parts, "machine_limits", limits.get)
        patch.setattr(parity, "compare", lambda path: compared | {"passed_tolerance": []})
        patch.setattr(reductions, "MEAN_FIRST_ON", ("cpu",))
        patch.setattr(accelerator.subprocess, "Popen", InThisProcess)
        patch.setattr(accelerator, "end_part", lambda child: None)
        patch.setattr(accelerator_parts, "Program", program_once)
        only = "--parts=^(machine|parity|bfloat16|devices|flops|step|lever/(crop|mean)|torch/float32$|trace|plan)"
        assert accelerator.main(arguments(folder, "--batches=4", only, "--config.model.crop_remat=false")) == 0
    return folder


def test_a_whole_command(whole):
    results = json.loads((whole / "results.json").read_text())
    skipped = {name for name, result in results.items() if "skipped" in result}
    assert skipped == {"devices", "lever/crop_remat/larger", "torch/float32", "plan"}
    steps = {"step/bfloat16/4", "step/float32/4", "lever/crop_remat", "lever/mean_first"}
    assert results.keys() - skipped == {"machine", "parity", "bfloat16", "flops", "trace", *steps}
    rows = {line.split(" | ")[0].strip("| "): line for line in (whole / "results.md").read_text().splitlines()}
    checks = {"machine", "parity", "bfloat16", "devices", "flops"}
    assert rows.keys() >= steps | checks | {"lever/crop_remat/larger", "torch/float32"}
    assert rows["machine"] == "| machine | 1 × cpu (cpu) |"
    for name in steps:
        assert rows[name].startswith(f"| {name} | 4 | {results[name]['seconds']:.4g} |")
        assert f"| {results[name]['compiled_bytes'] / 1e9:.2f} (compiled) |" in rows[name], "a CPU tells no peak"
    seconds = results["trace"]["seconds_by_scope"]["resnet/teacher/backbone"]
    share = results["trace"]["attributed_seconds"] / results["step/bfloat16/4"]["seconds"]
    assert rows["attributed, of the measured step"].split(" | ")[1].startswith(f"{share:.0%} of ") and share > 0.1
    assert rows["resnet/teacher/backbone"] == f"| resnet/teacher/backbone | {1e3 * seconds:.3g} |"


def test_the_order_of_parts(output):
    """What tells most comes first: an hour may end sooner."""
    names = list(accelerator_parts.parts_of(parsed(output)))
    first = "machine parity bfloat16 devices flops step/bfloat16/4 step/float32/4 trace plan step/bfloat16/8 training"
    torch = [f"torch/{name}" for name in accelerator_parts.TORCH_VARIANTS]
    expected = [*first.split(), *torch, "step/float32/8", "lever/crop_remat"]
    assert names[: len(expected)] == expected and names[-1] == "lever/mean_first"


def test_the_machine(whole):
    assert "Float32 is at default precision: TensorFloat-32 on a GPU" in (whole / "results.md").read_text()
    found = json.loads((whole / "parts" / "machine.json").read_text())
    assert found.keys() >= MACHINE.keys() and found["platform"] == "cpu"
    assert found["flops_per_second"] == {"float32": 2e15, "bfloat16": 4e15} and found["bytes_per_second"] == 5e15


def test_the_best_rate_is_of_numbers_at_random(monkeypatch):
    """As of a step's."""
    timed = []
    monkeypatch.setattr(step_parts, "best_seconds", lambda function, clock: timed.append(function) or 1.0)
    step_parts.machine_limits("bfloat16")
    (square,) = (x for x in timed[0].args if isinstance(x, jax.Array))
    assert square.dtype == "bfloat16" and np.std(square[:64].astype("float32")) == pytest.approx(1, abs=0.1)


def test_the_step_and_what_it_is_measured_against(whole):
    results = json.loads((whole / "results.json").read_text())
    each, found = results["flops"]["flops_per_utterance"], results["step/float32/4"]
    assert 1e6 < each < 1e9
    assert found["utterances_per_second"] == pytest.approx(4 / found["seconds"])
    assert found["fraction_of_peak"] == pytest.approx(4 * each / found["seconds"] / 2e15)
    assert found["fraction_of_bandwidth"] > 0 and found["compiled_bytes"] > 100_000


def test_bfloat16_is_compared_with_float32(whole, output, monkeypatch):
    found = json.loads((whole / "parts" / "bfloat16.json").read_text())
    assert found["passed"] and 1e-6 < found["relative_differences"][0] < 0.02
    losses = {"bfloat16": 1.03, "float32": 1.0}
    monkeypatch.setattr(accelerator_parts, "losses_of", lambda config, devices: [{"loss": losses[config.model.dtype]}])
    assert not part(output, "bfloat16")["passed"]


@pytest.mark.parametrize("step", [0, 1])
def test_bfloat16_has_no_nan(step, output, monkeypatch):
    def losses(config, devices):
        steps = [{"a": 1.0, "b": 1.0, "c": 1.0} for _ in range(2)]
        steps[step]["b"] = np.nan if config.model.dtype == "bfloat16" else 1.0
        return steps

    monkeypatch.setattr(accelerator_parts, "losses_of", losses)
    assert part(output, "bfloat16")["passed"] is False


def test_a_step_is_measured_where_nothing_is_known_to_compare_it_with(tmp_path, monkeypatch):
    monkeypatch.setattr(accelerator_parts, "Program", NoProgram)
    found = part(tmp_path, "step/bfloat16/4", "--config.total_steps=3")
    assert found["fraction_of_peak"] is None and found["fraction_of_bandwidth"] is None and found["seconds"] > 0
    assert " |  |  | " in accelerator.markdown({"step/bfloat16/4": found})


def test_a_length_of_the_run_is_for_training(tmp_path):
    """Its config gives it in steps, that of the other parts in epochs."""
    authors = f"--config={tiny.ROOT / 'configs' / 'memo_voxceleb2.py'}"
    assert accelerator_parts.config_of(parsed(tmp_path, authors, "--config.total_steps=3")).total_epochs == 150


def test_a_machine_whose_accelerator_jax_does_not_see_is_refused(tmp_path, monkeypatch, capsys):
    (tmp_path / "nvidia3").touch()  # of those in a container, the first may be missing
    patterns = [pattern.replace("/dev", str(tmp_path)) for pattern in accelerator_parts.DEVICE_FILES]
    monkeypatch.setattr(accelerator_parts, "DEVICE_FILES", patterns)
    monkeypatch.setattr(step_parts, "machine_limits", lambda dtype: (1.0, 1.0))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert part(tmp_path / "out", "machine")["platform"] == "cpu"
    monkeypatch.delenv("JAX_PLATFORMS")
    assert accelerator.main(arguments(tmp_path / "other", "--part=machine")) == accelerator.REFUSED
    assert "install the extra cuda13" in capsys.readouterr().err
    assert not (tmp_path / "other" / "parts" / "machine.json").exists()


def test_a_refused_machine_ends_the_command(tmp_path, monkeypatch, capsys):
    class Refused(InThisProcess):
        def __init__(self, command, stdout, **_):
            assert command[-1] == "--part=machine"
            print("install the extra cuda13", file=stdout, flush=True)
            self.returncode = accelerator.REFUSED

    monkeypatch.setattr(accelerator.subprocess, "Popen", Refused)
    monkeypatch.setattr(accelerator, "end_part", lambda child: None)
    assert accelerator.main(arguments(tmp_path)) == accelerator.REFUSED
    assert "install the extra cuda13" in capsys.readouterr().err
    assert not (tmp_path / "parts" / "machine.json").exists(), "the next call tries again"


XLA_NOTE = """W0000 00:00:1 bfc_allocator.cc:310] Allocator (GPU_0_bfc) ran out of memory trying to allocate 2.00GiB
with freed_by_count=0. The caller indicates that this is not a failure, but this may mean that there could be gains.
"""


ERROR_NOTE = "E0000 00:00:1 bfc_allocator.cc:3] failed to allocate 2.00GiB: CUDA_ERROR_OUT_OF_MEMORY: out of memory\n"
TRACEBACK = 'Traceback (most recent call last):\n  File "a.py", line 1, in <module>\n    run()\n'
CONTEXT = "\nDuring handling of the above exception, another exception occurred:\n\n"


class Failed(InThisProcess):
    """A part that prints `text` and ends with `status`."""

    text, status, names = "", 1, []

    def __init__(self, command, stdout, **_):
        self.names.append(command[-1].removeprefix("--part="))
        print(self.text, file=stdout, flush=True)
        self.returncode = self.status


@pytest.fixture
def failing(monkeypatch):
    """Makes every part fail; returns the class, to say how."""
    for name, value in {"text": "ValueError: other", "status": 1, "names": []}.items():
        monkeypatch.setattr(Failed, name, value)
    monkeypatch.setattr(accelerator.subprocess, "Popen", Failed)
    monkeypatch.setattr(accelerator, "end_part", lambda child: None)
    return Failed


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("step/float32/4", "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.\n", "does not fit"),
        ("torch/float32", "torch.OutOfMemoryError: CUDA out of memory.\nended with 1\n", "does not fit"),
        ("lever/crop_remat", XLA_NOTE + "ValueError: other\n", "failed: ValueError: other"),
        ("step/float32/4", ERROR_NOTE + "ValueError: other\n", "failed: ValueError: other"),
        (
            "step/float32/4",
            f"{TRACEBACK}E: out of memory\n{CONTEXT}{TRACEBACK}TypeError: a\n\n",
            "failed: TypeError: a",
        ),
        ("bfloat16", f"{TRACEBACK}jax.errors.A: RESOURCE_EXHAUSTED: a\n  the largest:\n1 GB\n", "does not fit"),
        ("trace", f"{TRACEBACK}jax.errors.A: INTERNAL: Failed to allocate 123 bytes\n{ERROR_NOTE}", "does not fit"),
        ("devices", XLA_NOTE + "RESOURCE_EXHAUSTED\n", "does not fit"),
        ("plan", "RESOURCE_EXHAUSTED\n", "failed: RESOURCE_EXHAUSTED"),
    ],
)
def test_only_lack_of_memory_where_it_may_lack_is_excused(name, text, line, output, failing):
    log = accelerator_parts.part_file(types.SimpleNamespace(output=output), name).with_suffix(".log")
    log.write_text("RESOURCE_EXHAUSTED, in an earlier attempt\n")
    failing.text = text
    assert accelerator.main(arguments(output, f"--parts=^{name}$")) == (0 if line == "does not fit" else 75)
    found = accelerator_parts.result_of(types.SimpleNamespace(output=output), name)
    assert accelerator.summary(found) == line
    assert f"| {name} | {line} |" in accelerator.markdown({name: found}) or name not in ("bfloat16", "devices")


def test_a_part_that_failed_is_tried_once_more(output, failing, capsys):
    """A machine that is lent may have a fault that passes; a step that does not fit will not fit."""
    put(output, "step/bfloat16/4", {"error": "RESOURCE_EXHAUSTED", "out_of_memory": True})
    only = arguments(output, "--parts=^(flops|plan|step/bfloat16/4)$")
    assert accelerator.main(only) == 75 and "continues with plan" in capsys.readouterr().err
    assert accelerator.main(only) == 1 and accelerator.main(only) == 1
    assert failing.names == ["plan", "plan"]


def test_a_fault_of_what_all_need_stops_the_command_without_a_result(tmp_path, failing, capsys):
    assert [accelerator.main(arguments(tmp_path)) for _ in range(3)] == [1, 1, 1]
    put(tmp_path, "machine", MACHINE)
    assert [accelerator.main(arguments(tmp_path)) for _ in range(3)] == [1, 1, 1]
    assert "parity: ValueError: other" in capsys.readouterr().err
    assert failing.names == ["machine"] * 3 + ["parity"] * 3 and not (tmp_path / "parts" / "parity.json").exists()


def test_a_part_without_its_package_is_looked_at_again(output, monkeypatch):
    monkeypatch.setattr(accelerator.subprocess, "Popen", InThisProcess)
    monkeypatch.setattr(accelerator, "end_part", lambda child: None)
    monkeypatch.setattr(accelerator_parts.importlib.util, "find_spec", lambda name: None)
    name, only = "torch/float32", arguments(output, "--parts=^torch/float32$")
    assert accelerator.main(only) == 0, "nothing is left that the same command could do"
    monkeypatch.setattr(accelerator_parts, "torch_step", lambda options, **_: {"passed": True})
    assert accelerator.main(only) == 0
    assert accelerator_parts.result_of(types.SimpleNamespace(output=output), name)["passed"]


def test_a_part_that_the_kernel_killed_is_said_to_lack_the_hosts_memory(output, failing):
    failing.status = -9
    assert accelerator.main(arguments(output, "--parts=^step/bfloat16/4$")) == 75
    found = accelerator_parts.result_of(types.SimpleNamespace(output=output), "step/bfloat16/4")
    assert "the host (not the accelerator)" in found["error"] and "out_of_memory" not in found


@pytest.mark.parametrize("name", ["plan", "parity"])
def test_a_part_that_is_too_slow_has_a_second_call(name, output, failing, monkeypatch):
    monkeypatch.setattr(accelerator, "ended", lambda child, seconds: False)
    only = arguments(output, f"--parts=^{name}$")
    assert accelerator.main(only) == 75
    found = accelerator_parts.result_of(types.SimpleNamespace(output=output), name)
    assert "give a larger --minutes" in found["error"] and found["attempts"] == 1
    assert accelerator.main(only) == 1 and len(failing.names) == 2


def test_a_part_that_began_late_is_not_too_slow(output, failing, monkeypatch):
    now = [0.0]

    def ended(child, seconds):
        now[0] += 300
        return seconds > 300

    monkeypatch.setattr(accelerator.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(accelerator, "ended", ended)
    (output / "parts" / "flops.json").unlink()
    assert accelerator.main(arguments(output, "--parts=^(flops|plan)$")) == 75
    assert failing.names == ["flops", "plan"] and not (output / "parts" / "plan.json").exists()


def test_two_commands_do_not_share_an_output(output, failing, capsys):
    with locks.exclusive(output, inside=True):
        assert accelerator.main(arguments(output)) == 2
    assert str(output) in capsys.readouterr().err and not failing.names


@pytest.mark.parametrize("given", [{}, {"XLA_CLIENT_MEM_FRACTION": "0.6"}, {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.6"}])
def test_one_share_of_the_memory_is_set(given, output, monkeypatch):
    """jaxlib refuses both names at once."""
    for name in accelerator_parts.MEMORY_FRACTIONS:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    found = accelerator.environment_of(parsed(output), "trace")
    fractions = {name: found[name] for name in accelerator_parts.MEMORY_FRACTIONS if name in found}
    assert fractions == (given or {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.9"})
    assert found["JAX_TRACEBACK_FILTERING"] == "off"


def test_flops_are_counted_on_a_cpu(output, monkeypatch):
    seen = {}

    class Seen(InThisProcess):
        def __init__(self, command, stdout, env, **_):
            seen[command[-1]] = env["JAX_PLATFORMS"]
            self.returncode = 1

    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    monkeypatch.setattr(accelerator.subprocess, "Popen", Seen)
    monkeypatch.setattr(accelerator, "end_part", lambda child: None)
    (output / "parts" / "flops.json").unlink()
    assert accelerator.main(arguments(output, "--parts=^(flops|step/float32/4)$")) == 75
    assert seen == {"--part=flops": "cpu", "--part=step/float32/4": "cuda"}


def test_the_trace(whole):
    seconds = json.loads((whole / "parts" / "trace.json").read_text())["seconds_by_scope"]
    assert seconds.keys() >= {"resnet/teacher/backbone", "resnet/student/backbone, backward", "resnet/student/update"}
    assert all(value > 0 for value in seconds.values()) and (whole / "timeline.png").stat().st_size > 5_000
    assert (whole / "profile" / "memory.prof").stat().st_size > 0


def plane(name, **lines):
    """A plane of a trace as text: lines {name: [(event, hlo_op or "", begin, length)]}, in picoseconds."""
    text, named = "", {}
    for of, events in lines.items():
        body = ""
        for event, operation, begin, length in events:
            number = named.setdefault(event, len(named) + 1)
            stat = f'stats {{ metadata_id: 1 str_value: "{operation}" }}' if operation else ""
            body += f"events {{ metadata_id: {number} offset_ps: {begin} duration_ps: {length} {stat} }}\n"
        text += f'lines {{ name: "{of}" timestamp_ns: 0 {body} }}\n'
    for event, number in named.items():
        text += f'event_metadata {{ key: {number} value {{ id: {number} name: "{event}" }} }}\n'
    text += 'stat_metadata { key: 1 value { id: 1 name: "hlo_op" } }\n'
    return f'planes {{ name: "{name}" {text} }}\n'


GPU = {
    "Stream #7(Compute)": [("k1", "fusion.1", 0, 4000), ("k2", "copy.2", 4000, 1000), ("MemcpyD2D", "", 5000, 1000)],
    "Stream #8(Compute)": [("k3", "fusion.1", 2000, 4000), ("k4", "while.3", 0, 9000)],
    "XLA Modules": [("jit_step", "fusion.1", 0, 9000)],
}
TPU = {
    "XLA Ops": [
        ("%fusion.1 = f32[] fusion()", "", 0, 6000),
        ("%copy.2 = f32[]", "", 6000, 1000),
        ("%x", "", 7000, 1000),
    ],
    "Steps": [("1", "", 0, 9000)],
    "XLA Modules": [("jit_step", "", 0, 9000)],
}


@pytest.mark.parametrize(("name", "lines"), [("/device:GPU:0", GPU), ("/device:TPU:0", TPU)])
def test_operations_without_a_scope_are_counted(name, lines, tmp_path):
    """Two kernels of a GPU at once take their time only once."""
    text = plane("/host:CPU", python=[("fusion.1", "fusion.1", 0, 9000)]) + plane(name, **lines)
    (tmp_path / "a.xplane.pb").write_bytes(ProfileData.text_proto_to_serialized_xspace(text))
    spans = accelerator_parts.traced_spans(tmp_path / "a.xplane.pb", {"fusion.1": "update", "while.3": "other"})
    unknown = [span for span in spans if span[0] == "unattributed"]
    assert sum(length for *_, length in unknown) == pytest.approx(2e-9) and len(unknown) == 2
    attributed = [span for span in spans if span[0] == "update"]
    assert accelerator_parts.covered(attributed) == pytest.approx(6e-9) and len(spans) == len(unknown + attributed)


@pytest.mark.parametrize(("platform", "options"), [("gpu", {"xla_gpu_enable_command_buffer": ""}), ("tpu", None)])
def test_a_traced_step_has_no_command_buffers(platform, options, output, monkeypatch):
    class Asked(Exception):
        pass

    def program(config, of_devices, compiler_options):
        assert compiler_options == options
        raise Asked

    put(output, "machine", MACHINE | {"platform": platform})
    monkeypatch.setattr(accelerator_parts, "Program", program)
    with pytest.raises(Asked):
        part(output, "trace")


def test_a_trace_without_the_step_is_an_error(whole):
    with pytest.raises(ValueError, match="no operation of the step"):
        accelerator_parts.traced_spans(max((whole / "profile").rglob("*.xplane.pb")), {"another": "program"})


class NoProgram:
    """In place of the compiled step, for what is put into it; keeps the configs."""

    configs = []
    compile_seconds = 0.0
    compiled = types.SimpleNamespace(
        cost_analysis=dict,
        memory_analysis=lambda: types.SimpleNamespace(argument_size_in_bytes=1, temp_size_in_bytes=2),
    )

    def __init__(self, config, of_devices):
        self.configs.append(config)

    def take_step(self):
        pass

    dispatch = wait = take_step


@pytest.mark.parametrize("name", accelerator_parts.LEVERS)
def test_a_lever_changes_the_step_and_one_that_saves_memory_is_tried_where_memory_lacked(name, output, monkeypatch):
    monkeypatch.setattr(accelerator_parts, "Program", NoProgram)
    monkeypatch.setattr(recipe, "build_backbone", models.build_backbone)
    more = ("--batches=4,8,16", "--config.model.branches=ecapa,resnet", "--config.model.crop_remat=false")

    def built(of_part):
        batch = part(output, of_part, *more)["batch_a_device"]
        made = recipe.build_recipe(NoProgram.configs[-1], 1000)
        return batch, made.branches, made.remat

    _, *plain = built("step/bfloat16/4")
    assert built("step/bfloat16/8") == (8, *plain)
    batch, *changed = built(f"lever/{name}")
    assert batch == 4 and changed != plain
    if "remat" in name:
        assert "skipped" in part(output, f"lever/{name}/larger", *more)
        put(output, "step/bfloat16/8", {"error": "RESOURCE_EXHAUSTED", "out_of_memory": True})
        assert built(f"lever/{name}/larger") == (8, *changed)


def test_the_recipe_for_tpus_is_measured():
    plain, tpu = (configs.load_config(tiny.ROOT / "configs" / f"memo_voxceleb2{end}.py", []) for end in ("", "_tpu"))
    overrides = [f"--config.{text}" for text in (*accelerator_parts.LEVERS["resnet_packed"], "model.dtype=bfloat16")]
    changed = configs.load_config(tiny.ROOT / "configs" / "memo_voxceleb2.py", overrides)
    assert changed == tpu and changed != plain


@pytest.mark.parametrize(("platform", "name"), [("tpu", "memo_voxceleb2_tpu"), ("gpu", "memo_voxceleb2")])
def test_the_config_is_that_for_the_machine(platform, name, output, monkeypatch):
    put(output, "machine", MACHINE | {"platform": platform})
    monkeypatch.setattr(accelerator_parts, "flops", lambda options: {"config": str(options.config)})
    assert accelerator.main([f"--output={output}", "--part=flops"]) == 0
    found = accelerator_parts.result_of(types.SimpleNamespace(output=output), "flops")["config"]
    assert found == str(tiny.ROOT / "configs" / f"{name}.py")
    assert part(output, "flops")["config"] == str(tiny.material().config)


def test_a_lever_that_changes_nothing_is_skipped(output, monkeypatch):
    """As one does with the recipe for TPUs."""
    monkeypatch.setattr(accelerator_parts, "Program", NoProgram)
    more = ("--batches=4", f"--config={tiny.ROOT / 'configs' / 'memo_voxceleb2_tpu.py'}")
    found = {name: part(output, f"lever/{name}", *more) for name in accelerator_parts.LEVERS}
    assert [name for name, result in found.items() if "skipped" in result] == ["resnet_packed"]
    assert found["resnet_packed"]["skipped"] == "the config has these settings without it"
    assert "seconds" in part(output, "lever/mean_first", *more)


def test_a_program_from_the_cache_keeps_the_time_that_it_took_to_compile(output, monkeypatch):
    monkeypatch.setattr(accelerator_parts, "Program", NoProgram)
    for seconds in (90.0, 2.0):
        monkeypatch.setattr(NoProgram, "compile_seconds", seconds)
        assert part(output, "step/bfloat16/4")["compile_seconds"] == 90
    assert part(output, "step/float32/4")["compile_seconds"] == 2


def test_batch_statistics_are_measured_with_the_mean_first(output, monkeypatch):
    monkeypatch.setattr(accelerator_parts, "Program", NoProgram)
    assert part(output, "lever/mean_first")["dtype"] == "bfloat16"
    assert {"cuda", "rocm", "tpu"} <= set(reductions.MEAN_FIRST_ON)


def test_pytorch_takes_the_step_of_the_config_and_its_losses_are_judged(output, monkeypatch):
    settings = ("--config.model.branches=ecapa,resnet", "--config.model.ecapa_channels=(16,16,16,16,48)")
    settings += ("--config.model.resnet_blocks=(1,1,1,1)", "--config.model.crop_remat=false")
    side = {"seconds": 2.0, "utterances_per_second": 2.0}
    measured = {"max_relative_loss_difference": 0.01, "ratio": 1.5}
    measured |= {"ours": side, "theirs": side | {"utterances_per_second": 1.25}}
    commands = []

    def run(command, **_):
        commands.append(command)
        return subprocess.CompletedProcess(command, 0, stdout=json.dumps(measured) + "\n")

    monkeypatch.setattr(accelerator_parts.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(accelerator.subprocess, "run", run)
    found = {name: part(output, f"torch/{name}", *settings) for name in ("float32", "bfloat16, compiled")}
    assert not found["float32"]["passed"] and found["bfloat16, compiled"]["passed"]
    table = accelerator.markdown({f"torch/{name}": row for name, row in found.items()})
    assert "| torch/float32 | 2 | 2 | 1.25 | 2 | 1.5 | 0.01 of 0.005: WRONG |" in table

    model = accelerator_parts.config_of(parsed(output, *settings)).model
    chosen = train_step.build_parser().parse_args(commands[1][2:])
    assert chosen.dtype == "bfloat16" and chosen.compile and chosen.batch == 4
    taken = train_step.reference_config(chosen)
    for theirs, ours in {"embed_dim": "embedding_dim", "ecapa_channels": "ecapa_channels"}.items():
        assert np.array_equal(taken[theirs], model[ours])
    for name in ("resnet_base_channels", "resnet_blocks", "head_hidden", "head_bottleneck", "prototypes"):
        assert np.array_equal(taken[name], model[name]), name
    built = parity.build_recipe(taken)
    assert not built.remat and built.branches["resnet"].backbone.remat == model.resnet_remat == "none"


PLANNED = {"fits": True, "seconds_per_step": 0.25, "hbm_bytes": 4e9}
REFUSED = {"fits": False, "seconds_per_step": None, "hbm_bytes": 4e10}
MEASURED = {"seconds": 0.5, "peak_bytes": 5e9}


@pytest.mark.parametrize(
    ("kind", "devices", "measured", "status", "planned", "line"),
    [
        ("NVIDIA H200", 2, MEASURED, 0, PLANNED, "h200:2: planned 0.25 s, 4.00 GB; measured 0.5 s, 5.00 GB"),
        ("TPU v5 lite", 1, MEASURED, 1, REFUSED, "v5e:1x1: does not fit by plan, 40.00 GB; measured 0.5 s, 5.00 GB"),
        ("TPU v5", 4, {"out_of_memory": True}, 0, PLANNED, "v5p:2x2: planned 0.25 s, 4.00 GB; not measured"),
        ("TPU v5p", 4, {}, 1, PLANNED | {"fits": False}, "v5p:2x2: does not fit by plan, 4.00 GB; not measured"),
        ("TPU v6e", 8, {}, 2, "memo-jax: error: no compiler", None),
    ],
)
def test_the_plan_beside_the_measurement(kind, devices, measured, status, planned, line, output, monkeypatch):
    platform = "gpu" if "NVIDIA" in kind else "tpu"
    put(output, "machine", MACHINE | {"kind": kind, "devices": devices, "platform": platform})
    put(output, "step/bfloat16/4", measured)
    done = subprocess.CompletedProcess([], status, stdout=json.dumps(planned))
    monkeypatch.setattr(accelerator.subprocess, "run", lambda command, **_: done)
    if line is None:
        with pytest.raises(SystemExit, match="2"):
            part(output, "plan")
    else:
        found = part(output, "plan")
        assert line in accelerator.markdown({"plan": found}).splitlines()


def test_the_plan_is_of_the_program_that_is_measured(output, monkeypatch):
    """With banks as large, of folders that need not exist."""
    put(output, "machine", MACHINE | {"kind": "NVIDIA H100 80GB HBM3", "platform": "gpu"})
    commands = []

    def run(command, **_):
        commands.append(command)
        return subprocess.CompletedProcess(command, 0, stdout=json.dumps(PLANNED))

    monkeypatch.setattr(accelerator.subprocess, "run", run)
    authors = tiny.ROOT / "configs" / "memo_voxceleb2.py"
    part(output, "plan", f"--config={authors}", "--config.total_steps=3")
    config = configs.load_config(authors, [text for text in commands[0] if text.startswith("--config.")])
    planned, measured = planning._banks(config.augment, sharding.data_mesh(None)), synthetic.example_banks()
    assert planned.keys() == measured.keys()
    assert all(planned[kind].shape == measured[kind].shape for kind in ("noise", "music"))
    assert planned["rir"].shape[1:] == measured["rir"].shape[1:]


@pytest.mark.parametrize(
    ("kind", "platform", "gigabytes", "chip"),
    [
        ("NVIDIA H100 80GB HBM3", "gpu", 76, "h100"),
        ("NVIDIA H100 80GB HBM3", "gpu", None, "h100"),
        ("NVIDIA H100 80GB HBM3", "gpu", 38, None),  # a part of one
        ("NVIDIA H100 PCIe", "gpu", 76, None),
        ("NVIDIA H100 NVL", "gpu", 90, None),
        ("NVIDIA H200", "gpu", 136, "h200"),
        ("NVIDIA GH200 480GB", "gpu", 92, None),
        ("NVIDIA GB200", "gpu", 172, None),
        ("NVIDIA A100-SXM4-80GB", "gpu", 76, "a100"),
        ("NVIDIA A100-SXM4-40GB", "gpu", 38, None),
        ("TPU v5 lite", "tpu", 16.9, "v5e"),
        ("TPU v5p", "tpu", 102, "v5p"),
        ("TPU v6 lite", "tpu", 16.9, None),
    ],
)
@pytest.mark.parametrize("name", accelerator_parts.MEMORY_FRACTIONS)
def test_a_data_sheet_is_of_the_chip(kind, platform, gigabytes, chip, name, monkeypatch):
    monkeypatch.setenv(name, "0.9")
    limits = {"kind": kind, "platform": platform, "memory_bytes": gigabytes and gigabytes * 1e9}
    if chip:
        assert accelerator_parts.chip_of(limits) == chip
    else:
        with pytest.raises(accelerator_parts.Skip, match="no data sheet of"):
            accelerator_parts.chip_of(limits)


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
    assert found["passed"] and found["devices"] == 2 and len(found["relative_differences"]) == accelerator_parts.STEPS


def test_a_reference_beyond_its_tolerance_fails(output, monkeypatch):
    result = {"deviations": {"losses/step0/ecapa": 3e-6}, "noise": {"losses/step0/ecapa": 1e-6}, "passed_tolerance": []}
    monkeypatch.setattr(parity, "compare", lambda path: result)
    assert part(output, "parity")["largest_share_of_tolerance"] == pytest.approx(0.3)
    monkeypatch.setitem(result, "passed_tolerance", ["losses/step0/ecapa: 3 > 1"])
    found = part(output, "parity")
    assert not found["passed"] and accelerator.summary(found) == "WRONG"


def test_a_larger_batch_is_not_tried_where_a_smaller_one_did_not_fit(output):
    put(output, "step/bfloat16/4", {"error": "RESOURCE_EXHAUSTED", "out_of_memory": True})
    assert part(output, "step/bfloat16/8")["skipped"] == "4 utterances a device did not fit"


def pack(folder, *more):
    """A package of the tiny corpus."""
    data = tiny.material()
    inputs = (f"--train={data.dataset}", f"--test={data.dataset}", f"--trials={data.trials}")
    return accelerator_data.main([str(folder), *inputs, *more])


def test_rows_are_trained_and_tested(tmp_path):
    """On a package that came with the machine."""
    assert pack(tmp_path / "data") == 0
    more = ("--rows=dino-resnet", f"--data={tmp_path / 'data'}", "--config.total_steps=3", "--config.gate.stop_steps=2")
    found = part(tmp_path / "out", "training", *more)
    (row,) = found["rows"].items()
    assert "error" not in found
    assert row[0] == "dino-resnet" and row[1]["steps"] == 3 and 0 < row[1]["eer"]["resnet"] < 100
    assert "| dino-resnet | 3 | resnet " in accelerator.markdown({"training": {"rows": dict([row])}})


def test_rows_that_are_missing_are_an_error_beside_those_that_are_there(output, monkeypatch):
    class Runner:
        def __init__(self, command, **_):
            assert "--take-over" in command

        def wait(self):
            return 1

    result = {"row": "dino-resnet", "budget": "steps", "seed": 0, "status": "finished", "steps": 3}
    result["tests"] = {"test": {"resnet": {"eer": 12.5}}}
    file = output / "training" / "steps" / "dino-resnet" / "seed-0" / "result.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(result))
    pack_of_nothing(output)
    monkeypatch.setattr(accelerator.subprocess, "Popen", Runner)
    monkeypatch.setattr(accelerator.signal, "signal", lambda *_: None)
    more = (f"--data={output / 'data'}", "--config.total_steps=3", "--rows=dino-resnet,dino-ecapa")
    found = part(output, "training", *more)
    assert found["error"] == "experiments/run.py ended with 1; no result of dino-ecapa"
    text = accelerator.markdown({"training": found})
    assert "**training**: failed: experiments/run.py ended" in text and "| dino-resnet | 3 | resnet 12.50 |" in text


def measured(batch, seconds, devices=1, compile_seconds=0.0):
    """The result of a step of `batch` utterances a device."""
    result = {"batch_a_device": batch, "devices": devices, "utterances_per_second": batch * devices / seconds}
    return result | {"seconds": seconds, "compile_seconds": compile_seconds}


def overrides_of(options):
    return dict(text.split("=") for text in accelerator_parts.training_overrides(options, Path("data")))


@pytest.fixture
def utterances(monkeypatch):
    """Of the dataset to train on: 1,280."""
    monkeypatch.setattr(batches, "Utterances", lambda path: range(1280))


STUDY_FULL = f"--training-config={tiny.ROOT / 'configs' / 'study_full.py'}"


def test_schedules_are_stretched_to_the_minutes_that_there_are(output, utterances):
    """120 s at 4 steps a second, for each of two rows, which compile for 30 s and are tested."""
    put(output, "step/bfloat16/4", measured(4, 0.25, compile_seconds=30.0))
    minutes = 2 * (120 + 30 + accelerator_parts.ROW_SECONDS) / 60
    options = parsed(output, "--rows=dino-ecapa,memo-plateau", f"--training-minutes={minutes}")
    texts = overrides_of(options)
    assert texts["total_steps"] == "480" and texts["gate.stop_steps"] == str(480 // 12 * 7)
    options.training_minutes = 1
    assert overrides_of(options)["total_steps"] == "12", "never less than the study's"


@pytest.mark.parametrize("minutes", [1, 11, 101])
def test_what_the_study_gives_in_epochs_is_stretched_too(minutes, output, utterances):
    """In shares of the run, as one of 300 steps, 45 of them an epoch."""
    put(output, "step/bfloat16/4", measured(128, 0.1))
    more = (STUDY_FULL, "--rows=dino-ecapa", f"--training-minutes={minutes}")
    options = parsed(output, *more)
    texts = overrides_of(options)
    config = configs.load_config(options.training_config, [f"--config.{k}={v}" for k, v in texts.items()])
    frozen = configs.duration_in_steps(config, "optimizer.freeze_prototypes", 10)
    assert frozen / config.total_steps == pytest.approx(45 / 300, rel=0.03)
    assert 10 * config.teacher.temp_warmup_epochs / config.total_steps == pytest.approx(3 * 45 / 300, rel=0.05)
    assert config.optimizer.warmup_steps / config.total_steps == pytest.approx(50 / 300, rel=0.01)


def test_the_full_study_has_a_cautious_learning_rate():
    study, full = (configs.load_config(tiny.ROOT / "configs" / f"{name}.py") for name in ("study", "study_full"))
    rates = [scaled_learning_rate(c.optimizer.learning_rate, c.data.batch_size) for c in (study, full)]
    assert rates[1] / rates[0] == pytest.approx((full.data.batch_size / study.data.batch_size) ** 0.5)


@pytest.mark.parametrize(
    ("batch", "seconds", "rate"),
    [
        (128, 0.5, 2.0),
        (256, 0.5, 2.0),  # no more steps than measured, though each is of fewer utterances
        (128, 0.01, accelerator_parts.LOADER_RATE / 128),
    ],
)
def test_steps_are_planned_at_the_batch_of_the_training(batch, seconds, rate, output, utterances):
    """The study trains with 128 in all."""
    put(output, "step/bfloat16/4", measured(batch, seconds))
    minutes = (100_000 + accelerator_parts.ROW_SECONDS) / 60
    texts = overrides_of(parsed(output, STUDY_FULL, "--rows=dino-ecapa", f"--training-minutes={minutes}"))
    assert int(texts["total_steps"]) == round(100_000 * rate)


@pytest.mark.parametrize(
    ("devices", "fitting", "batch"),
    [(1, (4,), 4), (1, (4, 8, 16), 16), (1, (32, 256), 128), (8, (4, 8), 64), (6, (32,), 126), (8, (8, 16, 32), 128)],
)
def test_training_has_the_largest_batch_that_fits(devices, fitting, batch, output, utterances):
    sizes = (4, 8, 16, 32, 256)
    for size in sizes:
        failed = {"error": "RESOURCE_EXHAUSTED", "out_of_memory": True}
        put(output, f"step/bfloat16/{size}", measured(size, 1.0, devices) if size in fitting else failed)
    more = (STUDY_FULL, f"--batches={','.join(map(str, sizes))}")
    assert overrides_of(parsed(output, *more))["data.batch_size"] == str(batch)
    put(output, "step/bfloat16/32", measured(32, 1.0, devices))
    assert overrides_of(parsed(output, *more))["data.batch_size"] == str(batch), "one that resumes keeps its own"
    assert overrides_of(parsed(output, *more, "--config.data.batch_size=24"))["data.batch_size"] == "24"


def test_training_compiles_the_step_that_was_measured(output, utterances):
    put(output, "step/bfloat16/4", measured(4, 1.0))
    tpu = f"--config={tiny.ROOT / 'configs' / 'memo_voxceleb2_tpu.py'}"
    options = parsed(output, STUDY_FULL, tpu, "--config.model.resnet_scan=true")
    texts = [f"--config.{text}" for text in accelerator_parts.training_overrides(options, Path("data"))]
    model = configs.load_config(options.training_config, texts).model
    assert (model.resnet_packed, model.resnet_scan, model.resnet_remat) == (True, True, "none")
    assert model == accelerator_parts.config_of(options).model


def test_training_waits_for_a_measured_step(output):
    put(output, "step/bfloat16/4", {"error": "status 1", "attempts": 1})
    found = part(output, "training", f"--data={pack_of_nothing(output)}")
    assert found["again"] and "no step in bfloat16 was measured" in found["skipped"]


def pack_of_nothing(output):
    """A folder in the form of a package."""
    for name in ("train", "test", "trials.txt"):
        (output / "data" / name).mkdir(parents=True)
    return output / "data"


TRAINING = """
import pathlib, signal, sys, time
folder = pathlib.Path(next(text for text in sys.argv if text.startswith("--output="))[9:])
folder.mkdir(parents=True, exist_ok=True)
def save(*_):
    (folder / "saved").touch()
    sys.exit(1)
signal.signal(signal.SIGTERM, save)
resumes = (folder / "saved").exists()
(folder / "started").touch()
while not resumes:
    time.sleep(0.05)
(folder / "ended").touch()
"""


def test_a_training_that_time_cuts_saves_and_is_resumed(tmp_path, monkeypatch):
    """With a runner that ends only when it is started again; whether the real one resumes is tested with it."""
    (tmp_path / "run.py").write_text(TRAINING)
    script, folder, data = tmp_path / "accelerator.py", tmp_path / "training", tmp_path / "data"
    script.write_text(
        f"import pathlib, sys\nsys.path.insert(0, {str(SCRIPT.parent)!r})\nimport accelerator, accelerator_parts\n"
        f"accelerator_parts.EXPERIMENTS = pathlib.Path({str(tmp_path)!r})\nsys.exit(accelerator.main())\n"
    )
    for name in ("train", "test", "trials.txt"):
        (data / name).mkdir(parents=True)
    ended = accelerator.ended

    def cut(child, seconds):
        while not (folder / "started").exists():
            assert child.poll() is None
            time.sleep(0.05)
        return ended(child, 0.0)

    more = (f"--data={data}", "--parts=^training$", "--config.total_steps=3")
    monkeypatch.setattr(accelerator, "__file__", str(script))
    monkeypatch.setattr(accelerator, "ended", cut)
    assert accelerator.main(arguments(tmp_path, *more)) == accelerator.GO_ON
    assert (folder / "saved").exists() and not (folder / "ended").exists()
    monkeypatch.setattr(accelerator, "ended", ended)
    assert not (tmp_path / "parts" / "training.json").exists()
    assert accelerator.main(arguments(tmp_path, *more)) == accelerator.GO_ON, "it failed, and is tried once more"
    found = json.loads((tmp_path / "parts" / "training.json").read_text())
    assert (folder / "ended").exists() and found["rows"] == {} and found["error"].startswith("no result of dino-ecapa")


def test_a_package_is_what_training_takes(tmp_path, monkeypatch):
    (tmp_path / "noise").mkdir()
    soundfile.write(tmp_path / "noise" / "a.wav", np.random.default_rng(0).normal(size=16_000) / 10, 16_000)
    assert pack(tmp_path / "data", f"--noise={tmp_path / 'noise'}", f"--rirs={tmp_path / 'noise'}") == 0
    commands = []

    class Runner:
        def __init__(self, command, **_):
            commands.append(command)

        def wait(self):
            return 0

    monkeypatch.setattr(accelerator.subprocess, "Popen", Runner)
    monkeypatch.setattr(accelerator.signal, "signal", lambda *_: None)
    part(tmp_path / "out", "training", f"--data={tmp_path / 'data'}", "--config.total_steps=3")
    options, _ = study.build_parser().parse_known_args(commands[0][2:])
    _, (dataset, trials) = study.test_of(*options.test)
    assert len(recording_rows(read_trials(trials), Utterances(dataset).names)) == 10
    packed, all_of_it = Utterances(options.data), Utterances(tiny.material().dataset)
    assert (packed.names, packed.speakers) == (all_of_it.names, all_of_it.speakers)
    assert all(map(np.array_equal, packed, all_of_it)) and packed.fingerprint == all_of_it.fingerprint
    banks = [f"augment.{kind}={getattr(options, kind)}" for kind in ("noise", "rirs")]
    assert recipe.load_augmentation_banks(tiny.tiny_config(*banks)).keys() == {"noise", "rir"} and not options.music


def test_a_package_has_no_more_than_its_size(tmp_path, capsys):
    assert pack(tmp_path / "data", "--megabytes=0.8") == 0
    assert 0.7e6 < accelerator_data.size_of(tmp_path / "data") <= 0.8e6
    packed, all_of_it = (Utterances(path) for path in (tmp_path / "data" / "train", tiny.material().dataset))
    fitting = 8 * (len(packed) // 8)
    assert f"give accelerator.py --config.data.batch_size={fitting}\n" in capsys.readouterr().out
    assert 10 < len(packed) < len(all_of_it)
    for index, name in enumerate(packed.names):
        assert np.array_equal(packed[index], all_of_it[all_of_it.names.index(name)])
    trials, tested = read_trials(tmp_path / "data" / "trials.txt"), Utterances(tmp_path / "data" / "test")
    assert set(trials.recordings) == set(tested.names) and len(tested) < 10
    given = {(enrol, test) for _, enrol, test in map(str.split, tiny.trial_lines())}
    assert {*zip(trials.enrol, trials.test)} == {pair for pair in given if set(pair) <= set(tested.names)}
    for more, message in (("--megabytes=0.3", "give --megabytes a larger number"), ("--seed=1", "exists already")):
        folder = tmp_path / ("data" if "seed" in more else "small")
        assert pack(folder, more) == 2 and message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]


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


def test_a_part_that_fails_is_reported_and_the_others_still_run(output, monkeypatch, capsys):
    def broken(options):
        raise ValueError("no such thing")

    monkeypatch.setattr(accelerator.subprocess, "Popen", InThisProcess)
    monkeypatch.setattr(accelerator, "end_part", lambda child: None)
    monkeypatch.setattr(accelerator_parts, "devices", broken)
    only = arguments(output, "--parts=^(machine|devices|plan)$")
    assert [accelerator.main(only) for _ in range(2)] == [75, 1]
    printed = capsys.readouterr()
    assert "devices: failed: ValueError: no such thing (see " in printed.err and "3 of 3 parts done" in printed.out


def test_a_part_that_takes_too_long_is_ended():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    assert not accelerator.ended(child, 0.1) and child.returncode < 0


PART = """
import pathlib, subprocess, sys, time
kept = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
pathlib.Path(sys.argv[0]).with_name("kept").write_text(str(kept.pid))
time.sleep(0 if "--crash" in sys.argv else 600)
"""


def gone(process):
    """Whether a process ends within ten seconds; one that nobody has waited for is a zombie."""
    for _ in range(200):
        try:
            if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.05)
    return False


def test_a_part_that_crashed_leaves_nothing(tmp_path):
    (tmp_path / "part.py").write_text(PART)
    child = subprocess.Popen([sys.executable, tmp_path / "part.py", "--crash"], start_new_session=True)
    assert accelerator.ended(child, 60) and gone(int((tmp_path / "kept").read_text()))


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 75), (signal.SIGINT, -signal.SIGINT), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_a_part_ends_with_the_command(number, status, tmp_path):
    """With all that it started, but for SIGKILL, which leaves the command no time: then what it started itself ends."""
    (tmp_path / "part.py").write_text(PART)
    script = tmp_path / "command.py"
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(SCRIPT.parent)!r})\nimport accelerator\n"
        f"accelerator.__file__ = {str(tmp_path / 'part.py')!r}\nsys.exit(accelerator.main())\n"
    )
    started = [sys.executable, script, *arguments(tmp_path / "out", "--parts=^machine$")]
    running = subprocess.Popen(started, env=tiny.environment(), stderr=subprocess.DEVNULL)
    while not (tmp_path / "kept").exists() or not (tmp_path / "kept").read_text():
        assert running.poll() is None
        time.sleep(0.05)
    kept = int((tmp_path / "kept").read_text())
    of_part = int(Path(f"/proc/{kept}/stat").read_text().rpartition(")")[2].split()[1])
    running.send_signal(number)
    try:
        assert running.wait(60) == status
        assert gone(of_part) and (number == signal.SIGKILL or gone(kept))
    finally:
        if number == signal.SIGKILL:
            os.kill(kept, signal.SIGKILL)


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
