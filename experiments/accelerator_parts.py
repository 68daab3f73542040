"""The parts of accelerator.py: what each does, and what they share; each runs in a process of its own."""

import functools
import glob
import importlib.util
import json
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

EXPERIMENTS = Path(__file__).resolve().parent
ROOT = EXPERIMENTS.parent
sys.path[:0] = [str(EXPERIMENTS / "benchmarks")]

import numpy as np  # noqa: E402

from memo_jax import config as configs  # noqa: E402
from memo_jax.files import write_text  # noqa: E402
from memo_jax.log import say  # noqa: E402
from run import end_with_parent  # noqa: E402

GO_ON = 75
LEVERS = {
    "crop_remat": ("model.crop_remat=true",),
    "resnet_remat=norms": ("model.resnet_remat=norms",),
    "resnet_remat=blocks": ("model.resnet_remat=blocks",),
    "ecapa_remat=norms": ("model.ecapa_remat=norms",),
    "ecapa_remat=blocks": ("model.ecapa_remat=blocks",),
    "remat=blocks": ("model.resnet_remat=blocks", "model.ecapa_remat=blocks"),
    "resnet_packed": ("model.resnet_packed=true",),
    "resnet_scan": ("model.resnet_scan=true",),
    "ecapa_stride=2": ("model.ecapa_stride=2",),
}
TORCH_VARIANTS = {
    "float32": (),
    "float32, compiled": ("--compile",),
    "bfloat16": (),
    "bfloat16, channels last": ("--channels-last",),
    "bfloat16, compiled": ("--compile",),
    "bfloat16, compiled, channels last": ("--compile", "--channels-last"),
}
GPUS = {"H200": "h200", "H100": "h100", "A100": "a100", "B200": "b200"}  # as words: a GH200 is another one
OTHER_GPUS = re.compile("pcie|nvl", re.IGNORECASE)  # the data sheets are of the SXM form
TPUS = {"v5 lite": "v5e", "v5e": "v5e", "v5": "v5p", "v6 lite": "v6e", "v6e": "v6e", "v4": "v4"}  # the first in a name
SLICES = {1: "1x1", 4: "2x2", 8: "2x4"}  # of TPUs on a host
DEVICE_FILES = ("/dev/nvidia[0-9]*", "/dev/accel[0-9]*", "/dev/vfio/[0-9]*")  # of GPUs and of TPUs
MEMORY_FRACTIONS = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")  # the older name is last
# A rounding of bfloat16 is 2^-9 of a number; all roundings of a step together moved no loss by more.
BFLOAT16_TOLERANCE = 0.02
# In bfloat16 ours and PyTorch's were 0.004 apart, at a small size on a CPU. Float32 is TensorFloat-32 on a GPU, a
# rounding of which is 2^-11.
TORCH_TOLERANCES = {"bfloat16": BFLOAT16_TOLERANCE, "float32": BFLOAT16_TOLERANCE / 4}
# Devices sum in another order, and training amplifies it.
DEVICES_TOLERANCE = {"first": 1e-5, "last": 1e-3}
STEPS = 3  # of the checks
TRACED = 3  # steps
SCOPES = ("augment", "mel", "teacher", "student", "backbone", "head", "distributions", "distillation", "contrastive")
SCOPES += ("update", "supervised", "ecapa", "resnet", "campplus")
UNATTRIBUTED = "unattributed"
OPERATIONS = {"/device:GPU:": "Stream", "/device:TPU:": "XLA Ops"}  # what lines with operations begin with, in planes
EACH_KERNEL = {"xla_gpu_enable_command_buffer": ""}  # none: in a command buffer, kernels have no operation's name
EPOCH_STEPS = 1000  # of the recipe that is timed
ROW_SECONDS = 60  # that a row of the study takes beside steps and compiling: processes start, evaluations, the test
STUDY_EPOCH_STEPS = 1085 // 24  # of its recordings at its batch
# What changes how a step is compiled, and not what it computes.
STEP_SETTINGS = tuple(f"model.{key}" for key in ("crop_remat", "ecapa_remat", "resnet_remat"))
STEP_SETTINGS += ("model.resnet_packed", "model.resnet_scan")
# Utterances/s that the loader gave on two cores: experiments/README.md, "Loader", ours in a thread, crops as here.
LOADER_RATE = 1629
# As synthetic.example_banks: 32 rows of 6 s (192,000 bytes each), and no fraction of a row.
PLANNED_BANKS = ("augment.noise=x", "augment.music=x", "augment.rirs=x", "augment.bank_megabytes=6.2")


class Skip(Exception):
    """A part that cannot run here, and why; `again`: a later call may find that it can."""

    def __init__(self, reason: str, again: bool = False):
        super().__init__(reason)
        self.again = again


class NoAccelerator(Exception):
    """JAX does not see the accelerator that is there."""


# Parts: each runs in a process of its own and returns what its file will hold.


def machine(options) -> dict:
    """Devices, versions and limits."""
    import jax
    import jaxlib

    import step_parts

    require_accelerator(jax.devices()[0].platform)
    rates = {dtype: step_parts.machine_limits(dtype) for dtype in ("float32", "bfloat16")}
    device = jax.devices()[0]
    return {
        "platform": device.platform,
        "kind": device.device_kind,
        "devices": jax.device_count(),
        "memory_bytes": (device.memory_stats() or {}).get("bytes_limit"),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "python": sys.version.split()[0],
        "flops_per_second": {dtype: rate for dtype, (rate, _) in rates.items()},
        "bytes_per_second": max(bandwidth for _, bandwidth in rates.values()),
    }


def parity(options) -> dict:
    """Reference steps replayed in float32."""
    import jax

    import parity as replay

    with jax.default_matmul_precision("highest"):
        result = replay.compare(str(options.reference))
    return {
        "passed": not result["passed_tolerance"],
        "beyond_tolerance": result["passed_tolerance"],
        "largest_share_of_tolerance": max(
            deviation / (replay.NOISE_MARGIN * result["noise"][check])
            for check, deviation in result["deviations"].items()
        ),
    }


def bfloat16(options) -> dict:
    """Losses of the same steps in float32 and in bfloat16."""
    import jax

    ours, exact = (
        losses_of(config_of(options, f"model.dtype={dtype}"), jax.devices()[:1]) for dtype in ("bfloat16", "float32")
    )
    found = differences(ours, exact)
    passed = bool(found[0] <= BFLOAT16_TOLERANCE and np.isfinite(found).all())
    return {"passed": passed, "relative_differences": found, "tolerance": BFLOAT16_TOLERANCE}


def devices(options) -> dict:
    """Losses of the same steps on one device and on all of them."""
    import jax

    count = jax.device_count()
    if count == 1:
        raise Skip("there is one device")
    batch = -(-options.batches[0] // count) * count
    config = config_of(options, "model.dtype=float32", f"data.batch_size={batch}")
    found = differences(losses_of(config, jax.devices()), losses_of(config, jax.devices()[:1]))
    passed = found[0] <= DEVICES_TOLERANCE["first"] and found[-1] <= DEVICES_TOLERANCE["last"]
    return {"passed": passed, "devices": count, "relative_differences": found, "tolerance": DEVICES_TOLERANCE}


def flops(options) -> dict:
    """FLOPs of a step of one utterance, by the definition of the networks."""
    from memo_jax.planning.plan import model_flops

    batch = options.batches[0]
    total = model_flops(config_of(options, f"data.batch_size={batch}"), EPOCH_STEPS)
    return {"flops_per_utterance": total / batch}


def step(options, *overrides, batch: int) -> dict:
    """Time, memory and rates of the training step on all devices at a batch a device."""
    import jax

    count = jax.device_count()
    config = config_of(options, *overrides, f"data.batch_size={batch * count}")
    program = Program(config, jax.devices())
    compile_seconds = longest_compile(options, program.compile_seconds)
    for _ in range(2):
        program.take_step()
    seconds = []
    for _ in range(options.rounds):
        begin = time.perf_counter()
        for _ in range(options.steps):
            program.dispatch()
        program.wait()
        seconds.append((time.perf_counter() - begin) / options.steps)
    median, limits = statistics.median(seconds), result_of(options, "machine")
    needed = result_of(options, "flops").get("flops_per_utterance")
    peak, bandwidth = limits.get("flops_per_second", {}).get(config.model.dtype), limits.get("bytes_per_second")
    analysis, memory = program.compiled.cost_analysis() or {}, program.compiled.memory_analysis()
    moved = analysis.get("bytes accessed")
    planned = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    return {
        "batch_a_device": batch,
        "devices": count,
        "dtype": config.model.dtype,
        "seconds": median,
        "fastest": min(seconds),
        "slowest": max(seconds),
        "utterances_per_second": batch * count / median,
        "compile_seconds": compile_seconds,
        "peak_bytes": (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use"),
        "compiled_bytes": planned,
        "fraction_of_peak": needed * batch / median / peak if needed and peak else None,
        # XLA's count of what operations read and write, which is less where caches help.
        "fraction_of_bandwidth": moved / median / bandwidth if moved and bandwidth else None,
    }


def torch_step(options, *, dtype: str, arguments: tuple[str, ...]) -> dict:
    """The step of experiments/torch_steps.py beside ours, and whether the first losses agree."""
    for module in ("torch", "speakerlab"):
        if importlib.util.find_spec(module) is None:
            raise Skip(f"the module {module} is not installed", again=True)
    platform = machine_of(options)["platform"].replace("gpu", "cuda")
    if platform not in ("cpu", "cuda"):
        raise Skip(f"PyTorch has no {platform} here")
    if platform == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise Skip("this PyTorch sees no GPU", again=True)
    model, data = (config := config_of(options)).model, config.data
    sizes = [
        f"--batch={options.batches[0]}",
        f"--global-seconds={data.global_seconds}",
        f"--local-seconds={data.local_seconds}",
        *("--ecapa-channels", *map(str, model.ecapa_channels)),
        f"--resnet-base-channels={model.resnet_base_channels}",
        *("--resnet-blocks", *map(str, model.resnet_blocks)),
        f"--embedding-dim={model.embedding_dim}",
        f"--head-hidden={model.head_hidden}",
        f"--head-bottleneck={model.head_bottleneck}",
        f"--prototypes={model.prototypes}",
        f"--resnet-remat={model.resnet_remat}",
        "--crop-remat" if model.crop_remat else "--no-crop-remat",
        f"--dtype={dtype}",
        f"--steps={options.steps}",
    ]
    script = EXPERIMENTS / "benchmarks" / "train_step.py"
    command = [sys.executable, str(script), f"--platform={platform}", "--json", *sizes, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, preexec_fn=end_with_parent)
    if done.returncode:
        raise SystemExit(done.returncode)
    found, tolerance = json.loads(done.stdout.splitlines()[-1]), TORCH_TOLERANCES[dtype]
    return found | {"passed": found["max_relative_loss_difference"] <= tolerance, "tolerance": tolerance}


def trace(options) -> dict:
    """A profile of three steps, and of the memory."""
    import jax

    from memo_jax.training.profile import tracing_options
    from memo_jax.xla.compiler import known_options

    folder, batch = options.output / "profile", small_batch(options)
    on_gpu = machine_of(options)["platform"] == "gpu"
    program = Program(
        config_of(options, "model.dtype=bfloat16", f"data.batch_size={batch}"),
        None,
        known_options(EACH_KERNEL) if on_gpu else None,
    )
    for _ in range(2):
        program.take_step()
    with jax.profiler.trace(folder, profiler_options=tracing_options()):
        for _ in range(TRACED):
            program.take_step()
    jax.profiler.save_device_memory_profile(str(folder / "memory.prof"))
    spans = traced_spans(max(folder.rglob("*.xplane.pb")), scopes(program.compiled.as_text()))
    seconds = {}
    for scope, _, length in spans:
        seconds[scope] = seconds.get(scope, 0.0) + length / TRACED
    draw_timeline(spans, options.output / "timeline.png")
    return {
        "folder": str(folder),
        "seconds_by_scope": dict(sorted(seconds.items(), key=lambda item: -item[1])),
        "attributed_seconds": covered([span for span in spans if span[0] != UNATTRIBUTED]) / TRACED,
        "step_seconds": result_of(options, f"step/bfloat16/{options.batches[0]}").get("seconds"),
    }


def plan(options) -> dict:
    """What `memo-jax plan` says of these devices, beside what was measured."""
    limits = machine_of(options)
    chip = chip_of(limits)
    count = limits["devices"]
    shape = str(count) if limits["platform"] == "gpu" else SLICES.get(count)
    if shape is None:
        raise Skip(f"no topology of {count} chips is known here")
    measured = result_of(options, f"step/bfloat16/{options.batches[0]}")
    texts = [*without_length(options.overrides), *PLANNED_BANKS, "model.dtype=bfloat16"]
    texts.append(f"data.batch_size={small_batch(options)}")
    command = [sys.executable, "-m", "memo_jax", "plan", f"--config={options.config}", f"--topology={chip}:{shape}"]
    command += ["--json", *(f"--config.{text}" for text in texts)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, preexec_fn=end_with_parent)
    if done.returncode not in (0, 1):
        raise SystemExit(done.returncode)
    planned = json.loads(done.stdout)
    return {
        "topology": f"{chip}:{shape}",
        "planned_seconds": planned["seconds_per_step"] if planned["fits"] else None,
        "measured_seconds": measured.get("seconds"),
        "planned_bytes": planned["hbm_bytes"],
        "measured_bytes": measured.get("peak_bytes") or measured.get("compiled_bytes"),
    }


def training(options) -> dict:
    """Rows of the study at full width, by experiments/run.py, and their error rates."""
    data = options.data or demo_data(options.output / "data")
    folder = options.output / "training"
    command = [sys.executable, str(EXPERIMENTS / "run.py"), f"--data={data / 'train'}", "--seeds=0", "--replicates=100"]
    command += [f"--test=test={data / 'test'}:{data / 'trials.txt'}", f"--output={folder}", f"--results={folder}"]
    # Nobody else runs them: a claim is of a process that ended, perhaps on another machine.
    command += [f"--rows={options.rows}", f"--config={options.training_config}", "--take-over"]
    command += [f"--{kind}={data / kind}" for kind in ("noise", "music", "rirs") if (data / kind).is_dir()]
    overrides = training_overrides(options, data)
    command += [f"--config.{text}" for text in overrides]
    say(shlex.join(command))
    runner, stopped = subprocess.Popen(command, stdout=subprocess.DEVNULL, preexec_fn=end_with_parent), []

    def stop(*_):
        stopped.append(True)
        runner.terminate()  # it lets the training save where it is

    signal.signal(signal.SIGTERM, stop)
    status = runner.wait()
    if stopped:
        raise SystemExit(GO_ON)
    import ablation
    import study_results

    rows = {}
    for run in study_results.read_results(folder):
        tested = run.result["tests"].get("test", {})
        rows[run.result["row"]] = {
            "status": run.result["status"],
            "steps": run.result["steps"],
            "eer": {branch: found["eer"] for branch, found in tested.items()},
        }
    missing = [row for row in ablation.chosen_rows(options.rows) if row not in rows]
    errors = [f"experiments/run.py ended with {status}"] if status else []
    errors += [f"no result of {', '.join(missing)}"] if missing else []
    return {"rows": rows, "overrides": overrides} | ({"error": "; ".join(errors)} if errors else {})


# What parts share.


class Program:
    """The compiled training step of a config on devices (None: all), with a state and a batch of noise."""

    def __init__(self, config, of_devices, compiler_options=None):
        import jax

        from memo_jax.training.program import create_state, lowered_step
        from memo_jax.training.recipe import build_recipe
        from memo_jax.xla import sharding
        from synthetic import example_banks, example_batch

        mesh = sharding.data_mesh(of_devices)
        recipe, self.banks = build_recipe(config, EPOCH_STEPS), sharding.replicate(mesh, example_banks())
        begin = time.perf_counter()
        self.compiled = lowered_step(config, recipe, mesh, self.banks).compile(compiler_options)
        self.compile_seconds = time.perf_counter() - begin
        jax.clear_caches()
        self.state = create_state(config, recipe, mesh)
        self.batch = sharding.global_batch(mesh, example_batch(config))
        self.key = jax.jit(lambda: jax.random.key(1), out_shardings=sharding.replicated(mesh))()
        self.metrics = None

    def dispatch(self) -> None:
        """Asks for a step."""
        self.state, self.metrics = self.compiled(self.state, self.batch, self.banks, self.key)

    def wait(self) -> None:
        """Waits for everything that was asked for."""
        import jax

        jax.block_until_ready((self.state, self.metrics))

    def take_step(self) -> dict[str, float]:
        """Takes a step; returns its losses."""
        self.dispatch()
        self.wait()
        return {name: float(value) for name, value in self.metrics.items() if name.startswith("loss")}


def scopes(text: str) -> dict[str, str]:
    """Returns {operation of a compiled program: the parts of the method it belongs to, "ecapa/student/backbone"}."""
    found = {}
    for operation, name in re.findall(r'^ +(?:ROOT )?%?([\w.\-]+) = .*op_name="([^"]*)"', text, re.MULTILINE):
        words = dict.fromkeys(word for word in re.findall(r"\w+", name) if word in SCOPES)
        backward = "student" in words and "update" not in words and "transpose(" in name
        found[operation] = "/".join(words) + (", backward" if backward else "") or "other"
    return found


def traced_spans(file: Path, scope_of: dict[str, str]) -> list[tuple[str, float, float]]:
    """Returns (scope, begin, length) in seconds of every operation in a trace, on the first device."""
    from jax.profiler import ProfileData

    spans, inside = [], ("while", "conditional", "call")  # their operations are in the trace, too
    planes = {plane.name: plane for plane in ProfileData.from_file(str(file)).planes}
    devices = (name for name in sorted(planes) if name.startswith(tuple(OPERATIONS)))
    plane = planes[next(devices, "/host:CPU")]
    lines = OPERATIONS.get(plane.name[:12])
    for line in plane.lines:
        if lines and not line.name.startswith(lines):
            continue
        for event in line.events:
            named = event.name.split(" ")[0].lstrip("%") if line.name == "XLA Ops" else ""  # as on TPUs
            operation = dict(event.stats).get("hlo_op", named)
            if (operation or lines) and not operation.startswith(inside):
                scope = scope_of.get(operation, UNATTRIBUTED)
                spans.append((scope, event.start_ns / 1e9, event.duration_ns / 1e9))
    if all(scope == UNATTRIBUTED for scope, _, _ in spans):
        raise ValueError(f"{file}: {plane.name} has no operation of the step, of {', '.join(sorted(planes))}")
    return spans


def covered(spans: list[tuple[str, float, float]]) -> float:
    """Seconds in which at least one of these operations ran."""
    total, until = 0.0, 0.0
    for _, begin, length in sorted(spans, key=lambda span: span[1]):
        total += max(begin + length - max(begin, until), 0.0)
        until = max(until, begin + length)
    return total


def draw_timeline(spans: list[tuple[str, float, float]], file: Path) -> None:
    """Draws a trace: a row for each scope, in the order in which they begin."""
    from matplotlib.figure import Figure

    rows = list(dict.fromkeys(scope for scope, _, _ in sorted(spans, key=lambda span: span[1])))
    first = min(begin for _, begin, _ in spans)
    figure = Figure(figsize=(9, 1 + 0.22 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    for place, scope in enumerate(rows):
        mine = [((begin - first) * 1e3, length * 1e3) for name, begin, length in spans if name == scope]
        axes.broken_barh(mine, (place - 0.4, 0.8), color="tab:orange" if scope.endswith("backward") else "tab:blue")
    axes.set_yticks(range(len(rows)), rows, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("ms")
    figure.savefig(file, dpi=110)


def recipe_for_machine(options) -> Path:
    """The authors' recipe in the form for the machine, once the part machine knows it."""
    on_tpu = result_of(options, "machine").get("platform") == "tpu"
    return ROOT / "configs" / f"memo_voxceleb2{'_tpu' if on_tpu else ''}.py"


def config_of(options, *overrides):
    """The config with the command line's overrides, and these, "key=value"."""
    texts = [*without_length(options.overrides), *overrides]
    config = configs.load_config(options.config, [f"--config.{text}" for text in texts])
    if not any(text.startswith("data.batch_size=") for text in overrides):
        config.data.batch_size = options.batches[0]
    return config


def without_length(overrides: list[str]) -> list[str]:
    """Overrides without those of a run's length, which are for training, whose config gives it in another unit."""
    return [text for text in overrides if not text.startswith(("total_steps=", "total_epochs="))]


def longest_compile(options, seconds: float) -> float:
    """The longest that any attempt at this part took to compile: after the first, XLA's cache has the program."""
    file = part_file(options, options.part).with_suffix(".compiled")
    seconds = max(seconds, float(file.read_text()) if file.is_file() else 0.0)
    write_text(file, str(seconds))
    return seconds


def small_batch(options) -> int:
    """The smallest batch, of all devices."""
    return options.batches[0] * machine_of(options)["devices"]


def losses_of(config, of_devices) -> list[dict[str, float]]:
    """Losses of the first steps."""
    import jax

    with jax.default_matmul_precision("highest"):  # not TensorFloat-32
        program = Program(config, of_devices)
    return [program.take_step() for _ in range(STEPS)]


def differences(ours: list[dict], exact: list[dict]) -> list[float]:
    """Of each step, the largest relative difference of a loss; NaN where one is."""
    pairs = zip(ours, exact, strict=True)
    return [float(np.max([abs(a[name] / b[name] - 1) for name in b if b[name]])) for a, b in pairs]


def part_file(options, name: str) -> Path:
    """Where a part leaves its result."""
    return options.output / "parts" / (re.sub(r"[^\w=.]+", "-", name) + ".json")


def result_of(options, name: str) -> dict:
    """Result of an earlier part."""
    file = part_file(options, name)
    return json.loads(file.read_text()) if file.is_file() else {}


def machine_of(options) -> dict:
    """Result of the part machine, for parts that cannot do without."""
    found = result_of(options, "machine")
    if "platform" not in found:
        raise Skip("the part machine has no result", again=True)
    return found


def require_accelerator(platform: str) -> None:
    """Raises NoAccelerator where JAX fell back to the CPU; its plugin may be missing."""
    found = next((file for pattern in DEVICE_FILES for file in glob.glob(pattern)), None)
    if platform == "cpu" and found and os.environ.get("JAX_PLATFORMS") != "cpu":
        raise NoAccelerator(
            f"there is {found}, but JAX sees no accelerator: install the extra cuda13, cuda12 (for an older driver) or "
            "tpu, or put JAX_PLATFORMS=cpu before the command"
        )


def chip_of(limits: dict) -> str:
    """The name that `memo-jax plan` has for the machine's chips; Skip where its data sheet is of others."""
    from memo_jax.planning.chips import CHIPS

    kind, memory, fraction = limits["kind"], limits.get("memory_bytes"), 1.0
    if limits["platform"] == "gpu":
        chip = next((chip for name, chip in GPUS.items() if re.search(rf"\b{name}\b", kind)), None)
        chip = None if OTHER_GPUS.search(kind) else chip
        fraction = float(next(filter(None, map(os.environ.get, MEMORY_FRACTIONS)), 0.75))
    else:
        chip = next((chip for name, chip in TPUS.items() if name in kind), None)
    if chip is None:
        raise Skip(f"`memo-jax plan` has no data sheet of {kind}")
    if memory and not 0.8 < memory / fraction / CHIPS[chip].memory < 1.2:
        sizes = f"{memory / fraction / 1e9:.0f} GB of memory, not {CHIPS[chip].memory / 1e9:.0f}"
        raise Skip(f"`memo-jax plan` has no data sheet of this {kind}: it has {sizes}")
    return chip


def training_overrides(options, data: Path) -> list[str]:
    """The settings of the measured step, a batch that fits, and schedules stretched to the minutes that there are."""
    import ablation
    from memo_jax.data import batches

    def value_of(config, key):
        return functools.reduce(getattr, key.split("."), config)

    texts = [f"{key}={value_of(config_of(options), key)}" for key in STEP_SETTINGS] + options.overrides
    config = configs.load_config(options.training_config, [f"--config.{text}" for text in texts])
    batch = config.data.batch_size
    measured, given = training_step(options, batch), {text.partition("=")[0] for text in options.overrides}
    if measured and "data.batch_size" not in given:
        devices = measured["devices"]
        batch = max(min(batch // devices, measured["batch_a_device"]), 1) * devices
        texts.append(f"data.batch_size={batch}")
    if "total_steps" in given:
        return texts
    if not measured:
        raise Skip("no step in bfloat16 was measured, which tells how many steps there is time for", again=True)
    # No more steps than of the measured batch, should that be larger, and than the loader has batches.
    rate = min(measured["utterances_per_second"], LOADER_RATE) / batch
    rate = min(rate, 1 / measured["seconds"])
    seconds = 60 * options.training_minutes / len(ablation.chosen_rows(options.rows))
    seconds -= measured["compile_seconds"] + ROW_SECONDS
    factor = max(seconds * rate / config.total_steps, 1.0)
    for key in (
        "total_steps",
        "gate.window_steps",
        "gate.min_steps",
        "gate.stop_steps",
        "optimizer.warmup_steps",
        "optimizer.freeze_prototypes_steps",
        "evaluation.every_steps",
        "checkpoint.every_steps",
    ):
        if (value := value_of(config, key)) > 0:
            texts.append(f"{key}={round(value * factor)}")
    # What the study gives in epochs has to keep its share of the run, though an epoch has another number of steps here.
    factor *= STUDY_EPOCH_STEPS / batches.steps_per_epoch(len(batches.Utterances(data / "train")), batch)
    for key in ("optimizer.freeze_prototypes_epochs", "teacher.temp_warmup_epochs"):
        if (value := value_of(config, key)) > 0:
            texts.append(f"{key}={max(round(value * factor), 1) if isinstance(value, int) else value * factor}")
    return texts


def training_step(options, batch: int) -> dict:
    """The measured step by which training is planned: the smallest that has its batch, or the largest that fitted."""
    file = options.output / "training" / "measured.json"
    if not file.is_file():  # a training that resumes keeps its batch, though larger ones were measured since
        rows = [result_of(options, f"step/bfloat16/{size}") for size in options.batches]
        fitted = [row for row in rows if "utterances_per_second" in row]
        if not fitted:
            return {}
        file.parent.mkdir(parents=True, exist_ok=True)
        found = next((row for row in fitted if row["batch_a_device"] * row["devices"] >= batch), fitted[-1])
        write_text(file, json.dumps(found))
    return json.loads(file.read_text())


def demo_data(folder: Path) -> Path:
    """Makes the synthetic speech of the demo into a folder as --data takes it."""
    if importlib.util.find_spec("espeakng_loader") is None:
        reason = "no --data, and the package espeakng-loader, which makes synthetic speech, is not installed"
        raise Skip(reason, again=True)
    import demo_speech
    from memo_jax.data.prepare import prepare

    corpus = folder / "corpus"
    demo_speech.make_corpus(corpus)
    for split in ("train", "test"):
        if not (folder / split / "dataset_info.json").exists():
            prepare([corpus / split], folder / split)
    for name in ("trials.txt", "noise", "rirs"):
        if not (folder / name).exists():
            (folder / name).symlink_to(corpus / name)
    return folder


def parts_of(options) -> dict:
    """{name: function of the options} of all parts, in order."""
    parts = {"machine": machine, "parity": parity, "bfloat16": bfloat16, "devices": devices, "flops": flops}
    steps = {
        f"step/{dtype}/{batch}": functools.partial(step_at, dtype=dtype, batch=batch)
        for dtype in ("bfloat16", "float32")
        for batch in options.batches
    }
    parts |= {name: steps[name] for name in steps if name.endswith(f"/{options.batches[0]}")}
    parts |= {"trace": trace, "plan": plan}
    parts |= {name: steps[name] for batch in options.batches if (name := f"step/bfloat16/{batch}") and batch <= 128}
    parts["training"] = training  # its batch, of all devices at most 128, has been measured
    for name, arguments in TORCH_VARIANTS.items():
        dtype = name.partition(",")[0]
        parts[f"torch/{name}"] = functools.partial(torch_step, dtype=dtype, arguments=arguments)
    parts |= steps
    for name, overrides in LEVERS.items():
        parts[f"lever/{name}"] = functools.partial(lever, overrides=overrides)
        if "remat" in name:
            parts[f"lever/{name}/larger"] = functools.partial(lever, overrides=overrides, larger=True)
    return parts | {"lever/mean_first": mean_first}


def step_at(options, *, dtype: str, batch: int) -> dict:
    """The step, unless a smaller batch did not fit."""
    for smaller in options.batches[: options.batches.index(batch)]:
        if result_of(options, f"step/{dtype}/{smaller}").get("out_of_memory"):
            raise Skip(f"{smaller} utterances a device did not fit")
    return step(options, f"model.dtype={dtype}", batch=batch)


def lever(options, *, overrides: tuple[str, ...], larger: bool = False) -> dict:
    """The step with a setting changed, at the smallest batch or at the first that does not fit without it."""
    batch = options.batches[0]
    if overrides and config_of(options, *overrides) == config_of(options):
        raise Skip("the config has these settings without it")
    if larger:
        results = {size: result_of(options, f"step/bfloat16/{size}") for size in options.batches}
        batch = next((size for size, result in results.items() if result.get("out_of_memory")), None)
        if batch is None:
            raise Skip("no batch is known that does not fit without it")
    return step(options, "model.dtype=bfloat16", *overrides, batch=batch)


def mean_first(options) -> dict:
    """The step with the mean of batch statistics taken before their variance, as on a CPU, not both in one pass."""
    from memo_jax.xla import reductions

    reductions.MEAN_FIRST_ON = ("cpu", "cuda", "rocm", "tpu")
    return lever(options, overrides=())


def run_part(options) -> None:
    """Runs one part in this process and writes its file."""
    begin = time.time()
    part_file(options, options.part).parent.mkdir(parents=True, exist_ok=True)
    try:
        result = parts_of(options)[options.part](options)
    except Skip as reason:
        result = {"skipped": str(reason)} | ({"again": True} if reason.again else {})
    write_text(part_file(options, options.part), json.dumps({"took_seconds": time.time() - begin} | result, indent=2))
