"""XLA still needs each workaround in memo_jax/xla: a test fails once jaxlib no longer does, and says what to delete.

It is also tested here that the workarounds help; that they change no result is tested where they are used.
"""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

import tiny
from memo_jax.xla import compiler, flags, products

# Runs in a process of its own, which compiles as users do; it has four devices that share a batch.
SCRIPT = """
import functools, json, os, re, time
import jax, jax.numpy as jnp, numpy as np
from memo_jax.models import blocks
from memo_jax.models.resnet import ResNet34
from memo_jax.planning.hlo import collectives
from memo_jax.xla import compiler, products, reductions, sharding

report = {}
FUSION, PASS = list(compiler.CPU_OPTIONS)[:2]
without = {o: {k: v for k, v in compiler.CPU_OPTIONS.items() if k != o} for o in compiler.CPU_OPTIONS}

def compiled(function, *arguments, options=compiler.CPU_OPTIONS):
    return jax.jit(function).lower(*arguments).compile(options)

def seconds(program, *arguments):
    times = []
    for _ in range(5):
        begin = time.process_time()
        jax.block_until_ready(program(*arguments))
        times.append(time.process_time() - begin)
    return min(times)

def convolution(x, kernel, stride):
    pad = (kernel.shape[0] // 2,) * 2
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), (pad, pad), dimension_numbers=("NHWC", "HWIO", "NHWC"))

def compiling(options):
    jax.clear_caches()
    lowered = jax.jit(ResNet34(4, 8, blocks=(2,)).init).lower(jax.random.key(0), jnp.ones((2, 40, 16)))
    begin = time.process_time()
    lowered.compile(options)
    return time.process_time() - begin

if "MEMO_JAX_TIMED_TESTS" in os.environ:
    x, kernel = jnp.ones((8, 101, 20, 64)), jnp.ones((3, 3, 64, 64))
    gradient = jax.grad(lambda kernel, x: jnp.sin(convolution(x, kernel, 1)).sum())
    report["kernel gradient"] = [
        seconds(compiled(gradient, kernel, x, options=o), kernel, x) for o in (compiler.CPU_OPTIONS, without[FUSION])]

    x, kernel = jnp.ones((16, 201, 80, 16)), jnp.ones((16, 32))
    ours = jax.grad(lambda kernel, x: jnp.sin(products.pointwise_convolution(x, kernel, (2, 2))).sum())
    plain = jax.grad(lambda kernel, x: jnp.sin(convolution(x, kernel[None, None], 2)).sum())
    report["pointwise"] = [seconds(compiled(f, kernel, x), kernel, x) for f in (ours, plain)]

    report["run once"] = [compiling(o) for o in (compiler.RUN_ONCE_CPU_OPTIONS, None)]

def additions(options):
    jax.clear_caches()
    network, x = ResNet34(4, 8, blocks=(5,)), jnp.ones((2, 40, 16))
    shapes = jax.eval_shape(network.init, jax.random.key(0), x)
    variables = jax.tree.map(lambda shape: jnp.ones(shape.shape), shapes)
    def loss(params):
        return network.apply(variables | {"params": params}, x, train=True, mutable=["batch_stats"])[0].sum()
    return len(re.findall(r" add\\(", compiled(jax.grad(loss), variables["params"], options=options).as_text()))

report["additions"] = [additions(compiler.CPU_OPTIONS), additions(without[PASS])]
barrier, blocks.materialize_on_cpu = blocks.materialize_on_cpu, lambda tree: tree
report["additions"].append(additions(compiler.CPU_OPTIONS))

x = jnp.ones((256, 1024))
for name, functions in {
    "squared_norm": (reductions.squared_norm, lambda x: jnp.square(x).sum()),
    "logsumexp": (reductions.logsumexp, functools.partial(jax.nn.logsumexp, axis=-1)),
    "sum_from_first_axis": (
        lambda x: reductions.sum_from_first_axis(jnp.exp(x.T), 0), lambda x: jnp.exp(x.T).sum(axis=0)),
}.items():
    report[name] = [compiled(f, x).memory_analysis().temp_size_in_bytes / x.nbytes for f in functions]

def transform(waves, responses):
    return jnp.fft.irfft(jnp.fft.rfft(waves) * jnp.fft.rfft(responses))

mesh = sharding.data_mesh()
rows = sharding.shard_batch(mesh)
x = jax.device_put(np.ones((8, 64), np.float32), rows)
report["moved"] = [
    collectives(jax.jit(sharding.on_mesh(mesh, f), out_shardings=rows).lower(x, x).compile().as_text())
    for f in (sharding.each_device_its_rows(transform), transform)]
print(json.dumps(report))
"""


timed = pytest.mark.skipif(
    "MEMO_JAX_TIMED_TESTS" not in os.environ, reason="compares speeds: `make test-timed` on a quiet machine"
)


@pytest.fixture(scope="module")
def report():
    """Returns what was measured, {what: [with the workaround, without it]}."""
    environment = tiny.as_users_compile() | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def needless(what: str) -> str:
    return f"jaxlib {jax.lib.__version__} no longer needs it: delete {what}, and its row in memo_jax/xla/__init__.py"


@timed
def test_the_library_takes_the_gradient_of_a_kernel_slowly(report):
    """When this was tried, a third of the speed."""
    ours, default = report["kernel gradient"]
    assert default > 1.5 * ours, needless("the ynn fusion type in compiler.CPU_OPTIONS")


@timed
def test_the_gradient_of_a_strided_pointwise_convolution_is_slow(report):
    """When this was tried, half the speed of the product."""
    ours, convolution = report["pointwise"]
    assert convolution > 1.3 * ours, needless("products.pointwise_convolution")


@timed
def test_initialisation_takes_long_to_optimise(report):
    """When this was tried, five times as long."""
    ours, default = report["run once"]
    assert default > 2 * ours, needless("compiler.RUN_ONCE_CPU_OPTIONS")


def test_sums_of_residuals_are_recomputed(report):
    ours, _, without_barrier = report["additions"]
    assert without_barrier > ours, needless("materialize_on_cpu in models/blocks.py")


def test_barriers_are_dropped(report):
    """Up to jaxlib 0.10."""
    ours, without_option, without_barrier = report["additions"]
    if jax.__version_info__ < (0, 11):
        assert without_option == without_barrier != ours, needless("the disabled pass in compiler.CPU_OPTIONS")
    else:
        assert without_option == ours


# Each of four devices, which have four threads together, has transforms and collectives that could run at once.
TRANSFORMS = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, PartitionSpec

mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
split, whole = PartitionSpec("data"), PartitionSpec()

def transforms(waves):
    return [(jnp.fft.irfft(jnp.fft.rfft(wave)), jax.lax.all_gather(wave, "data")) for wave in waves]

mapped = jax.shard_map(transforms, mesh=mesh, in_specs=split, out_specs=[(split, whole)] * 16, check_vma=False)
waves = [jnp.full((64, 8000), number, jnp.float32) for number in range(16)]
compiled = jax.jit(mapped, compiler_options=json.loads(sys.argv[1]))
for _ in range(15):
    jax.block_until_ready(compiled(waves))
"""


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="jaxlib 0.10 takes transforms on one thread")
def test_fourier_transforms_wait_for_each_other():
    """For ever, or until XLA ends the process since a device waits for the others."""
    name = "xla_cpu_multi_thread_eigen"

    def ends(options, seconds):
        command = [sys.executable, "-c", TRANSFORMS, json.dumps(options)]
        environment = tiny.environment(devices=4) | {"NPROC": "1"}
        try:
            return subprocess.run(command, env=environment, capture_output=True, timeout=seconds).returncode == 0
        except subprocess.TimeoutExpired:
            return False

    assert ends({name: compiler.CPU_OPTIONS[name]}, 240)
    assert not ends({}, 60), needless(f"{name} in compiler.CPU_OPTIONS")


@pytest.mark.parametrize("name", ["squared_norm", "logsumexp", "sum_from_first_axis"])
def test_what_a_long_reduction_reads_is_written_to_memory(report, name):
    """Temporaries relative to the input: one group of rows with the workaround, all of it without."""
    ours, plain = report[name]
    assert ours < 0.25
    assert plain > 0.9, needless(f"reductions.{name}")


def test_every_device_transforms_the_rows_of_all(report):
    ours, plain = report["moved"]
    assert ours == {}
    assert plain, needless("each_device_its_rows")


def test_compiler_options_that_jaxlib_does_not_know_are_left_out_and_named_once(capsys):
    known = compiler.compiler_options("cpu")
    assert known == compiler.CPU_OPTIONS, needless("the option that is missing")
    assert compiler.run_once_options("cpu") == compiler.RUN_ONCE_CPU_OPTIONS
    assert compiler.compiler_options("tpu") is compiler.run_once_options("tpu") is None
    capsys.readouterr()
    for _ in range(2):
        assert compiler.known_options(known | {"xla_cpu_option_of_another_version": "1"}) == known
    assert capsys.readouterr().err == (
        "this jaxlib does not know the compiler option xla_cpu_option_of_another_version: continuing without it\n"
    )
    doubled = jax.jit(lambda x: 2 * x, compiler_options=known)(np.float32(3))
    assert doubled == 6


def test_xla_flags_that_jaxlib_does_not_know_are_left_out(monkeypatch, capsys):
    """Such a flag would end any process that starts JAX."""
    known = "--xla_backend_extra_options=xla_cpu_disable_loop_unrolling=true"
    unknown = "--xla_flag_of_another_version=1"
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    flags.default_xla_flags(unknown, known)
    assert os.environ["XLA_FLAGS"] == known
    assert capsys.readouterr().err == f"this jaxlib does not know the XLA flag {unknown}: continuing without it\n"


def test_xla_flags_of_the_user_are_kept(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=3")
    flags.default_xla_flags("--xla_backend_extra_options=xla_cpu_disable_loop_unrolling=true")
    assert os.environ["XLA_FLAGS"] == "--xla_force_host_platform_device_count=3"


def test_a_strided_slice_is_computed_before_its_product_on_gpus_alone():
    """Lowered for platforms that need not be present: the barrier is in the program for CUDA and in no other."""
    x, kernel = jax.ShapeDtypeStruct((2, 9, 8, 4), np.float32), jax.ShapeDtypeStruct((4, 6), np.float32)
    gradient = jax.grad(lambda kernel, x: products.pointwise_convolution(x, kernel, (2, 2)).sum())
    for function, arguments in ((products.pointwise_convolution, (x, kernel, (2, 2))), (gradient, (kernel, x))):
        traced = jax.jit(function, static_argnums=(2,) if len(arguments) == 3 else ()).trace(*arguments)
        has_barrier = {
            platform: "optimization_barrier" in traced.lower(lowering_platforms=(platform,)).as_text()
            for platform in ("cuda", "cpu", "tpu")
        }
        assert has_barrier == {"cuda": True, "cpu": False, "tpu": False}


PAGE_FAULTS = """
import os, resource, sys
os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])  # XLA has a thread for each core, each with memory of its own
import jax, jax.numpy as jnp
from memo_jax.xla.memory import keep_freed_memory

if sys.argv[1] == "keep":
    keep_freed_memory()
step = jax.jit(lambda x: jnp.fft.irfft(jnp.fft.rfft(x)).sum())  # the transforms need 32 MiB of temporary memory
x = jnp.ones((64, 1 << 16))
step(x).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    step(x).block_until_ready()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(what: str) -> int:
    """Returns the page faults of twenty runs of a program in a process of its own, once it has run before."""
    flags = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    command = [sys.executable, "-c", PAGE_FAULTS, what]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | {"XLA_FLAGS": flags})
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="keep_freed_memory is for glibc")
def test_freed_memory_is_kept():
    """Without the call, every run touches new pages of 4 KiB, 8,000 of them; with it, none does."""
    given_back = page_faults("give back")
    assert given_back > 80_000, "keep_freed_memory is no longer needed: delete it, and its row in memo_jax/xla"
    assert page_faults("keep") < given_back / 2
