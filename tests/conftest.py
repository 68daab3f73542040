"""What all tests share: a cache of compiled programs that outlives a run of pytest, and the reference material."""

import contextlib
import gc
import os
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

import pytest

from memo_jax.xla.flags import default_xla_flags

SHARED = Path(__file__).parents[2] / "shared"
# They take longest, so they come first: else one worker would still run one of them when the others are done.
LONG = (
    "experiments/test_parity.py",
    "inference/test_evaluate.py",
    "training/test_processes.py",
    "xla/test_sharding.py",
    "experiments/test_benchmarks.py",
    "training/test_resume.py",
    "test_docs.py",
    "experiments/test_configs.py",
    "training/test_supervised.py",
    "training/test_train.py",
    "training/test_step.py",
    "test_buckets.py",
    "experiments/test_study.py",
    "experiments/test_demo.py",
    "test_soak.py",
    "training/test_checkpoint.py",
    "data/test_batches.py",
)


def pytest_configure(config):
    # A shell's background job ignores Ctrl-C, and so would the commands that tests interrupt.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # Before anything imports JAX; the processes that tests start inherit it.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # Small networks that take a few steps: compiling them takes most of the time. tiny.as_users_compile() undoes this.
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    # jaxlib 0.11 does not have the first. By default XLA cuts a program into up to 32 parts to compile them in threads;
    # here each core has a worker of its own, and without the cutting test_step.py takes a tenth less.
    default_xla_flags("--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1")
    cache = getattr(config, "cache", None)  # absent under `-p no:cacheprovider`
    if cache is not None:
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache.mkdir("xla")))
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        os.environ.setdefault("XDG_CACHE_HOME", str(cache.mkdir("user")))  # graphs of networks for onnxruntime
    # Tracing makes many long-lived objects: looking for cycles every 700 objects would take a sixth of its time.
    gc.set_threshold(50_000)
    if "MEMO_JAX_TESTS_SHARE" not in os.environ:  # workers inherit it
        os.environ["MEMO_JAX_TESTS_SHARE"] = share = tempfile.mkdtemp(prefix="memo-jax-tests-")
        config.add_cleanup(lambda: shutil.rmtree(share, ignore_errors=True))
        config.add_cleanup(lambda: os.environ.pop("MEMO_JAX_TESTS_SHARE", None))


def pytest_collection_modifyitems(items):
    place = {str(Path(__file__).parent / name): number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(str(item.path), len(place)))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference steps and real speech beside the project; tests that need it skip without it."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the reference material in {SHARED.name}/ beside the project")
    return SHARED


@pytest.fixture(scope="session")
def reference(shared):
    """The arrays of the reference steps, by name."""
    import numpy as np

    path = shared / "reference" / "memo_steps.npz"
    if not path.is_file():
        pytest.skip(f"needs {path.name}")
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


@pytest.fixture(scope="module")
def compiled_once():
    """Runs of the file's tests that share a step trace and compile it once."""
    from compiled_once import compiled_once

    with compiled_once():
        yield


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 8 MB."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("needs the right to mount a small file system")
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("cannot mount a small file system here")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


@pytest.fixture(params=["read-only", "full"])
def unwritable(request, tmp_path):
    """(folder, message): a mounted file system that cannot be written, and the system's error message."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("needs the right to mount a small file system")
    folder, options = tmp_path / "disk", {"read-only": "ro", "full": "size=8k"}[request.param]
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("cannot mount a small file system here")
    try:
        if request.param == "full":
            with contextlib.suppress(OSError):
                (folder / "filler").write_bytes(bytes(8192))
        yield folder, {"read-only": "Read-only file system", "full": "No space left on device"}[request.param]
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)
