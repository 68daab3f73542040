"""Faults of the file system: changes that fail, or kill the process (faults.c), and damaged bytes."""

import atexit
import contextlib
import ctypes
import errno
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from memo_jax import cli

ERRORS = (errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT)
KILL = 0  # in place of an error number
FOR_EVER = 1 << 40
TEMPORARY = re.compile(r"/\.[^/ ]*\d")  # a name that only this program uses


def preload() -> None:
    """Starts this program again with faults.c in front of the C library, unless it has been."""
    if hasattr(ctypes.CDLL(None), "faults_arm"):
        atexit.register(shutil.rmtree, Path(os.environ["LD_PRELOAD"]).parent, ignore_errors=True)
        return
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None or sys.platform != "linux":
        sys.exit("soak: write errors and kills need Linux and a C compiler (cc)")
    library = Path(tempfile.mkdtemp(prefix="memo-jax-soak-")) / "faults.so"
    source = Path(__file__).with_name("faults.c")
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    os.execve(sys.executable, sys.orig_argv, os.environ | {"LD_PRELOAD": str(library)})


class Changes:
    """How many changes there were, and the name of the first that failed."""

    count, failed = 0, ""


@contextlib.contextmanager
def failing(folder, at: int = -1, code: int = KILL, times: int = FOR_EVER):
    """While it lasts, `times` changes below a folder, from number `at` on, fail with an error or kill the process."""
    layer, changes = ctypes.CDLL(None), Changes()
    layer.faults_last.restype = ctypes.c_char_p
    layer.faults_arm(os.fsencode(folder), ctypes.c_long(at), ctypes.c_long(times), code)
    try:
        yield changes
    finally:
        changes.count, changes.failed = layer.faults_disarm(), layer.faults_last().decode()


def command(*arguments) -> tuple[int, str]:
    """Runs `memo-jax ARGUMENTS` here; returns the status and all that was printed, even by libraries in C."""
    sys.stdout.flush()
    sys.stderr.flush()
    with tempfile.TemporaryFile() as printed:
        kept = os.dup(1), os.dup(2)
        os.dup2(printed.fileno(), 1), os.dup2(printed.fileno(), 2)
        streams = sys.stdout, sys.stderr
        sys.stdout = sys.stderr = open(os.dup(1), "w", encoding="utf-8", buffering=1)
        try:
            status = cli.main([str(argument) for argument in arguments])
        except SystemExit as stop:
            status = stop.code
        finally:
            sys.stdout.close()
            sys.stdout, sys.stderr = streams
            for descriptor, number in zip(kept, (1, 2)):
                os.dup2(descriptor, number)
                os.close(descriptor)
        printed.seek(0)
        return status, printed.read().decode(errors="replace")


def check_told(status: int, text: str, folder, code: int) -> None:
    """A write error below a folder ends in one line that names what was asked for, and no temporary file."""
    errors = [line for line in text.splitlines() if "error" in line.lower()]
    assert status == 2 and "Traceback" not in text, text
    assert len(errors) == 1 and text.splitlines()[-1] == errors[0], text
    assert errors[0].startswith("memo-jax: error: ") and str(folder) in errors[0], text
    assert os.strerror(code) in errors[0] and not TEMPORARY.search(errors[0]), text


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of every file below a folder, by name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def damaged(content: bytes, rng) -> bytes:
    """The bytes of a file with a flipped bit, other bytes, zeros, or without its end."""
    kind, at = rng.choice(("bit", "bytes", "zeros", "cut")), rng.randrange(len(content))
    if kind == "cut":
        return content[:at]
    changed = bytearray(content)
    size = {"bit": 1, "bytes": rng.randint(1, 9), "zeros": rng.randint(1, 600)}[kind]
    for place in range(at, min(at + size, len(content))):
        changed[place] = {"bit": changed[place] ^ 1 << rng.randrange(8), "zeros": 0}.get(kind, rng.randrange(256))
    return bytes(changed)
