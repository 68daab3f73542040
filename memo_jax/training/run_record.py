"""The record of a run, run.json: its data, and for every start the versions, commit, command and hardware."""

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import jax

from memo_jax.files import as_path, parse_json, read_text, write_text
from memo_jax.version import __version__
from memo_jax.xla.devices import chosen_devices

RUN_FILE = "run.json"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "array_record", "numpy", "soundfile")


def versions() -> dict[str, str]:
    """Returns the versions of Python, of memo-jax and of the packages that a run's numbers depend on."""
    found = {"python": platform.python_version(), "memo-jax": __version__}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "unknown"
    return found


def commit() -> str | None:
    """Returns the commit of the checkout that memo_jax runs from, with "+changes" if files were changed since.

    None if memo_jax was installed from a package, or without git.
    """
    package = Path(__file__).parent

    def git(*arguments) -> str | None:
        command = ["git", "-C", str(package), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=30)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # The environment may lie inside the checkout of another project, which does not track it.
    if not git("ls-files", "--error-unmatch", Path(__file__).name):
        return None
    head = git("rev-parse", "HEAD")
    return f"{head}+changes" if head and git("status", "--porcelain", "--untracked-files=no") else head


def hardware() -> dict:
    """Returns the processor, the cores this process may use, the memory, and the devices of all processes."""
    devices = chosen_devices()
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "system": platform.system(),
        "devices": len(devices),
        "device": devices[0].device_kind,
        "platform": devices[0].platform,
        "processes": jax.process_count(),
    }


def _processor() -> str:
    """The kernel's name for the processor, which says more than platform.processor(), the architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


def read_run(workdir: str | os.PathLike) -> dict | None:
    """Returns what `RunRecord` wrote, None if there is no record; raises ValueError if it is damaged."""
    path = as_path(workdir) / RUN_FILE
    try:
        text = read_text(path)
        if text is None:
            return None
        run = parse_json(text)
        run["starts"][0]["versions"], run["starts"][-1]["total_steps"]
        return run
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise ValueError(f"{path}: damaged ({type(error).__name__}: {error}): delete it to continue without") from None


def length_at(workdir: str | os.PathLike, step: int) -> int | None:
    """Returns the planned length of the run, in steps, as of `step`; None if not recorded.

    Raises ValueError as `read_run` does.
    """
    starts = (read_run(workdir) or {"starts": []})["starts"]
    return next((start["total_steps"] for start in reversed(starts) if start["first_step"] <= step), None)


class RunRecord:
    """Writes `<workdir>/run.json`: the run's seed and data; for each start its step, command, versions and hardware.

    If a start's `total_steps` differs from that of the step before it, the run was extended: `extended_from` is the
    earlier length, and from this start on the schedules span the new one. A start that ended before its first
    checkpoint has extended nothing. A start's `last_step`, `seconds` and `cpu_seconds` are added when it ends; a start
    that was killed lacks them.

    Args:
      workdir: folder of the run.
      seed: of the run.
      data: JSON that describes the dataset and the banks.
      evaluation: JSON that identifies what error rates are measured on while training; None for nothing.
      begin: the step that this start resumes after; 0 discards the record of earlier starts.
      total: length of the run in steps.
      active: whether to write anything; false in every process but the first.

    Raises:
      ValueError: the record of earlier starts is damaged.
      OSError: it cannot be written.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        *,
        seed: int,
        data: dict,
        evaluation: dict | None = None,
        begin: int,
        total: int,
        active: bool = True,
    ):
        self.extended_from: int | None = None
        self._path, self._active = as_path(workdir) / RUN_FILE, active
        self._began = time.monotonic()
        if not active:
            return
        before = read_run(workdir) or {"starts": []}
        self._start = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "first_step": begin + 1,
            "total_steps": total,
            "evaluation": evaluation,
            "command": sys.argv,
            "commit": commit(),
            "versions": versions(),
            "hardware": hardware(),
        }
        # A start from the beginning replaces all earlier ones.
        earlier = before["starts"] if begin else []
        for start in earlier:
            if start["first_step"] > begin:
                start.pop("extended_from", None)
        length = length_at(workdir, begin)
        if length not in (None, total):  # None too where the record was deleted meanwhile
            self.extended_from = self._start["extended_from"] = length
        self._run = {"seed": seed, "data": data, "starts": [*earlier, self._start]}
        self._write()

    def end(self, step: int) -> None:
        """Records the last step that was taken."""
        if self._active:
            self._start |= {
                "last_step": step,
                "seconds": round(time.monotonic() - self._began, 1),
                "cpu_seconds": round(time.process_time(), 1),
            }
            self._write()

    def _write(self) -> None:
        write_text(self._path, json.dumps(self._run, indent=2, ensure_ascii=False) + "\n")
