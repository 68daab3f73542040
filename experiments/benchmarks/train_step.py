"""One full MeMo training step, ours beside the same step in PyTorch: time, memory and whether the losses agree.

    python experiments/benchmarks/train_step.py [--threads 2] [--steps 5] [--json]
    python experiments/benchmarks/train_step.py --platform cuda --batch 32 --dtype bfloat16 [--json]

Sizes are the authors' (ECAPA-512, ResNet34 with 16 channels, four heads of 65,536 prototypes, 2 crops of 4 s and 4 of
2 s), at a batch of 4, from mel power to updated students, teachers and centres. Theirs is experiments/torch_steps.py:
backbones of the package speakerlab-slim, heads and losses written as the public DINO recipes write them, pair by pair.
Ours recomputes the norms of its ResNet in the backward pass (`model.resnet_remat=norms`), which costs no time here, and
all crops but those of one length (`model.crop_remat`), as configs/base.py does and `--no-crop-remat` does not.
Both begin with the same weights and see the same input, in two processes on the same cores that take turns, so that
whatever else the machine does affects both. With `--platform cuda` both take their steps on the first GPU, with all
cores of the machine, in TensorFloat-32 or (theirs by autocast) in bfloat16, and the memory is the most that each has
had allocated there: theirs in a timed step, ours since the process began. With `--compile`, theirs is not one graph:
the forward of speakerlab's ECAPA-TDNN has a try statement, at which torch.compile divides it.

Prints, for each, the median and the extremes of a step's wall time, its CPU time, utterances a second and the peak
memory of its process, libraries included; then `ratio` and `memory_ratio` (theirs ÷ ours), `cpu_ratio`,
`max_relative_loss_difference` of the six losses at the first step (`…_later` at the steps after it, which rounding
drives apart), and `fraction_of_peak`: the FLOPs of PyTorch's convolutions and products in a step, over our time, over
the best rate of a matrix product here. Needs the environment of `make parity`.
"""

import argparse
import ctypes
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from machine import best_seconds

EXPERIMENTS = Path(__file__).resolve().parent.parent
MEL_BINS, GLOBAL_VIEWS, LOCAL_VIEWS = 80, 2, 4
FRAMES_PER_SECOND = 100


def reference_config(options) -> dict:
    """The config that experiments/torch_steps.py and parity.py read."""
    return {
        "batch": options.batch,
        "ecapa_channels": options.ecapa_channels,
        "resnet_base_channels": options.resnet_base_channels,
        "resnet_blocks": options.resnet_blocks,
        "resnet_remat": options.resnet_remat,
        "crop_remat": options.crop_remat,
        "dtype": options.dtype,
        "embed_dim": options.embedding_dim,
        "prototypes": options.prototypes,
        "head_hidden": options.head_hidden,
        "head_bottleneck": options.head_bottleneck,
        "epochs": 10,
        "steps_per_epoch": 100,
        "warmup_epochs": 0,
        "teacher_temp": [0.04, 0.07],
        "teacher_temp_warmup_epochs": 5,
        "student_temp": 0.1,
        "center_momentum": 0.9,
        "cross_weight": 1.0,
        "contrastive_weight": 1.0,
        "contrastive_temperature": 0.1,
        "contrastive_scale": 1 / 0.07,
        "base_lr_already_scaled": 0.2 * options.batch / 256,
        "min_lr": 1e-5,
        "teacher_momentum": 0.996,
        "weight_decay": 5e-5,
        "clip_per_parameter": 3.0,
        "freeze_last_layer_epochs": 0,
        "sgd_momentum": 0.9,
    }


def mel_power(options) -> list[np.ndarray]:
    """View-major mel power [V·B, 80, T] of the global and of the local views: a spectrum an utterance, and frames."""
    rng = np.random.default_rng(options.seed)
    spectra = rng.normal(-4, 3, (1, options.batch, MEL_BINS, 1))
    result = []
    for views, seconds in ((GLOBAL_VIEWS, options.global_seconds), (LOCAL_VIEWS, options.local_seconds)):
        shape = (views, options.batch, MEL_BINS, round(seconds * FRAMES_PER_SECOND) + 1)
        power = np.exp2(spectra + rng.normal(0, 3, shape)).astype(np.float32)
        result.append(power.reshape((-1,) + shape[2:]))
    return result


class TorchSteps:
    """Their steps; writes the initial weights for ours to start from."""

    def __init__(self, options, weights: Path):
        import torch

        if options.platform == "cpu":
            torch.set_num_threads(options.threads)
        torch.manual_seed(options.seed)
        sys.path.insert(0, str(EXPERIMENTS))
        from torch_steps import Training, build_students

        config, self.platform = reference_config(options), options.platform
        self.mels = [torch.from_numpy(mel).to(self.platform) for mel in mel_power(options)]
        self.dtype = getattr(torch, options.dtype)
        torch.set_float32_matmul_precision("high")  # TensorFloat-32 where there is one, as JAX's default
        torch.backends.cudnn.benchmark = True
        students = build_students(config)
        np.savez(
            weights,
            **{
                f"{name}/{key}": tensor.numpy()
                for name, student in students.items()
                for key, tensor in student.state_dict().items()
            },
        )
        autocast = None if options.dtype == "float32" else self.dtype
        if options.channels_last:
            students = {name: student.to(memory_format=torch.channels_last) for name, student in students.items()}
        self.training, self.number = Training(config, students, device=self.platform, autocast=autocast), 0
        if options.compile:
            self.training.compile()

    def take_step(self) -> list[float]:
        """Takes a step; returns its six losses."""
        losses = self.training.take_step(self.number, *self.mels)
        self.wait()
        self.number += 1
        return losses

    def counted_flops(self) -> int:
        """Takes a step and returns the FLOPs of its convolutions and matrix products."""
        from torch.utils.flop_counter import FlopCounterMode

        with FlopCounterMode(display=False) as counter:
            self.take_step()
        return counter.get_total_flops()

    def matmul(self, size: int):
        """Returns a function that takes a product of two square matrices."""
        import torch

        x = torch.ones(size, size, device=self.platform, dtype=self.dtype)
        return lambda: self.wait(x @ x)

    def wait(self, result=None) -> None:
        """Waits until what was asked of a GPU is done."""
        import torch

        if self.platform == "cuda":
            torch.cuda.synchronize()

    def device_peak(self) -> int:
        """Most bytes that tensors have had on the GPU since the last call, which leaves cuDNN's search out."""
        import torch

        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return peak


class JaxSteps:
    """Our steps, from the same weights."""

    def __init__(self, options, weights: Path):
        sys.path.insert(0, str(EXPERIMENTS))
        from memo_jax.xla.memory import keep_freed_memory

        keep_freed_memory()
        import jax

        from memo_jax.inference import interop
        from memo_jax.training.front_end import Views
        from memo_jax.training.state import state_from_students
        from memo_jax.training.step import train_step_on_features
        from memo_jax.xla.compiler import compiler_options
        from parity import build_recipe, views_of

        config, self.dtype = reference_config(options), options.dtype
        recipe, mels = build_recipe(config), mel_power(options)
        arrays, students = np.load(weights), {}
        for name, branch in recipe.branches.items():
            like = jax.eval_shape(
                lambda b=branch: b.init(jax.random.key(0), np.zeros((2, 32, MEL_BINS), np.float32), train=True)
            )
            own = {key.split("/", 1)[1]: arrays[key] for key in arrays.files if key.startswith(f"{name}/")}
            students[name] = jax.tree.map(jax.numpy.asarray, interop.branch_from_torch(own, like, name))
            del own
        self.state = jax.jit(lambda s: state_from_students(s, recipe.branches, recipe.optimizer, recipe.gate_rule))(
            students
        )
        del students
        self.mels = [jax.numpy.asarray(mel) for mel in mels]
        self.columns = [f"{kind}/{branch}" for kind in ("self", "cross", "contrastive") for branch in recipe.branches]

        def step(state, *mels):
            views = Views(tuple(views_of(mel, options.batch) for mel in mels))
            return train_step_on_features(state, views, recipe)

        begin = time.perf_counter()
        compiled = jax.jit(step, donate_argnums=0, compiler_options=compiler_options(options.platform))
        self.step = compiled.lower(self.state, *self.mels).compile()
        self.compile_seconds = time.perf_counter() - begin
        jax.clear_caches()  # as training does

    def take_step(self) -> list[float]:
        """Takes a step; returns its six losses."""
        import jax

        self.state, metrics = self.step(self.state, *self.mels)
        jax.block_until_ready(self.state)
        return [float(metrics[f"loss/{column}"]) for column in self.columns]

    def matmul(self, size: int):
        """Returns a function that takes a product of two square matrices."""
        import jax

        x = jax.numpy.ones((size, size), self.dtype)
        product = jax.jit(lambda x: x @ x)
        return lambda: product(x).block_until_ready()

    def device_peak(self) -> int:
        """Most bytes that arrays and temporaries have had on the GPU since the process began."""
        import jax

        return jax.devices()[0].memory_stats()["peak_bytes_in_use"]


def memory_peak() -> int:
    """Peak bytes of this process since `forget_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def forget_peak() -> None:
    """Returns freed memory and resets the peak, so that setting up and compiling do not count."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def work(options) -> None:
    """A worker: does what the lines of its standard input say and answers each by a line of JSON."""
    if options.platform == "cpu":
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    steps = {"torch": TorchSteps, "jax": JaxSteps}[options.worker](options, options.weights)
    if options.platform == "cpu":
        forget_peak()
    answers = sys.stdout
    print(json.dumps({"compile_seconds": getattr(steps, "compile_seconds", None)}), file=answers, flush=True)
    for command in sys.stdin:
        if command.strip() == "step":
            begin, cpu = time.perf_counter(), time.process_time()
            losses = steps.take_step()
            answer = {
                "seconds": time.perf_counter() - begin,
                "cpu_seconds": time.process_time() - cpu,
                "losses": losses,
                "peak_bytes": memory_peak() if options.platform == "cpu" else steps.device_peak(),
            }
        elif command.strip() == "flops":
            answer = {"flops": steps.counted_flops()}
        else:
            size = 256 if options.prototypes < 4096 else 3072 if options.platform == "cpu" else 8192
            answer = {"rate": 2 * size**3 / best_seconds(steps.matmul(size), time.perf_counter)}
        print(json.dumps(answer), file=answers, flush=True)


class Worker:
    """A process that takes one side's steps when told to."""

    def __init__(self, side: str, arguments: list[str], weights: Path, threads: int, platform: str):
        sys.path.insert(0, str(EXPERIMENTS))
        from run import end_with_parent

        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS") if platform == "cpu" else ()
        limits = {name: str(threads) for name in names}
        self.side = side
        self.process = subprocess.Popen(
            [sys.executable, __file__, *arguments, "--worker", side, "--weights", str(weights)],
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ
            | limits
            | {"JAX_PLATFORMS": platform, "OMP_WAIT_POLICY": "PASSIVE", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
            preexec_fn=end_with_parent,  # it would hold the GPU
        )
        self.begun = self.answer()

    def answer(self) -> dict:
        """Waits for the next answer."""
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the {self.side} worker ended with status {self.process.wait()}")
        return json.loads(line)

    def ask(self, command: str) -> dict:
        """Sends a command and waits for its answer."""
        print(command, file=self.process.stdin, flush=True)
        return self.answer()

    def end(self) -> None:
        """Lets the process end."""
        self.process.stdin.close()
        self.process.wait()


def timing_summary(rows: list[dict], batch: int) -> dict:
    """Median and extremes of a side's steps."""
    seconds = [row["seconds"] for row in rows]
    return {
        "seconds": statistics.median(seconds),
        "fastest": min(seconds),
        "slowest": max(seconds),
        "cpu_seconds": statistics.median(row["cpu_seconds"] for row in rows),
        "utterances_per_second": batch / statistics.median(seconds),
        "peak_gigabytes": max(row["peak_bytes"] for row in rows) / 1e9,
    }


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2, help="cores of each side on a CPU (default 2)")
    parser.add_argument("--steps", type=int, default=5, help="steps that are timed, after one that is not (default 5)")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--platform", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="what networks compute in")
    parser.add_argument("--compile", action="store_true", help="theirs with torch.compile")
    parser.add_argument("--channels-last", action="store_true", help="theirs with its images' channels last in memory")
    parser.add_argument("--resnet-remat", choices=("none", "norms", "blocks"), default="norms", help="of ours")
    parser.add_argument("--crop-remat", action=argparse.BooleanOptionalAction, default=True, help="of ours")
    parser.add_argument("--global-seconds", type=float, default=4.0)
    parser.add_argument("--local-seconds", type=float, default=2.0)
    parser.add_argument("--ecapa-channels", type=int, nargs=5, default=[512, 512, 512, 512, 1536])
    parser.add_argument("--resnet-base-channels", type=int, default=16)
    parser.add_argument("--resnet-blocks", type=int, nargs=4, default=[3, 4, 6, 3])
    parser.add_argument("--embedding-dim", type=int, default=256)
    parser.add_argument("--head-hidden", type=int, default=2048)
    parser.add_argument("--head-bottleneck", type=int, default=256)
    parser.add_argument("--prototypes", type=int, default=65536)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--worker", choices=("torch", "jax"), help=argparse.SUPPRESS)
    parser.add_argument("--weights", type=Path, help=argparse.SUPPRESS)
    return parser


def main(arguments=None) -> dict | None:
    """Runs the benchmark and prints what it found."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = build_parser().parse_args(arguments)
    if options.worker:
        return work(options)
    if not importlib.util.find_spec("speakerlab"):
        print(
            "train_step.py: the PyTorch networks are missing: run it in the environment that `make parity` makes",
            file=sys.stderr,
        )
        raise SystemExit(2)
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights.npz"
        theirs = Worker("torch", arguments, weights, options.threads, options.platform)
        ours = Worker("jax", arguments, weights, options.threads, options.platform)
        rows = [{side.side: side.ask("step") for side in (theirs, ours)} for _ in range(options.steps + 1)]
        flops = theirs.ask("flops")["flops"]
        peak = max(side.ask("peak")["rate"] for side in (theirs, ours))
        for side in (theirs, ours):
            side.end()
    differences = [
        float(np.abs(np.array(row["jax"]["losses"]) / np.array(row["torch"]["losses"]) - 1).max()) for row in rows
    ]
    result = {
        "ours": timing_summary([row["jax"] for row in rows[1:]], options.batch),
        "theirs": timing_summary([row["torch"] for row in rows[1:]], options.batch),
        "threads": options.threads if options.platform == "cpu" else None,
        "batch": options.batch,
        "compile_seconds": ours.begun["compile_seconds"],
        "max_relative_loss_difference": differences[0],
        "max_relative_loss_difference_later": max(differences[1:]),
        "gigaflops_per_step": flops / 1e9,
        "peak_gigaflops_per_second": peak / 1e9,
    }
    result |= {
        "ratio": result["theirs"]["seconds"] / result["ours"]["seconds"],
        "cpu_ratio": result["theirs"]["cpu_seconds"] / result["ours"]["cpu_seconds"],
        "memory_ratio": result["theirs"]["peak_gigabytes"] / result["ours"]["peak_gigabytes"],
        "fraction_of_peak": flops / result["ours"]["seconds"] / peak,
    }
    if options.json:
        print(json.dumps(result))
        return result
    for side in ("ours", "theirs"):
        row = result[side]
        print(
            f"{side:7s}{row['seconds']:7.2f} s a step ({row['fastest']:.2f}–{row['slowest']:.2f}), "
            f"{row['cpu_seconds']:.2f} s of CPU time, {row['utterances_per_second']:.2f} utterances/s, "
            f"{row['peak_gigabytes']:.2f} GB"
        )
    for key in (
        "ratio",
        "cpu_ratio",
        "memory_ratio",
        "max_relative_loss_difference",
        "max_relative_loss_difference_later",
        "gigaflops_per_step",
        "peak_gigaflops_per_second",
        "fraction_of_peak",
        "compile_seconds",
    ):
        print(f"{key:36s} {result[key]:.4g}")
    return result


if __name__ == "__main__":
    main()
