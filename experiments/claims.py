"""Claims on runs, in a folder that processes on several machines share: who does which run.

A claim is a file claim-N in the folder of a run; the highest N counts. A hard link makes the file appear complete, and
only where there is none of its name. When several processes want a run, exactly one gets it, without a lock service.
Taking over a run means adding the next number.
"""

import json
import os
import re
import socket
import time
from pathlib import Path


class Claim:
    """A run that belongs to this process until released."""

    def __init__(self, folder: Path, number: int):
        self._folder, self._number = folder, number

    def release(self) -> None:
        """Lets others have the run, if it is not done."""
        _add(self._folder, self._number + 1, {"released": True})


def take(folder: Path, take_over: bool = False) -> Claim | None:
    """Returns the claim of a run, None where it belongs to another process.

    Only on its own machine can a process be shown to have ended without a release; `take_over` also takes the runs of
    other machines.
    """
    folder.mkdir(parents=True, exist_ok=True)
    number, owner = _latest(folder)
    if owner is not None and not owner.get("released"):
        here = owner["machine"] == _machine()
        if _lives(owner["process"]) if here else not take_over:
            return None
    claimed = {"machine": _machine(), "process": _process(os.getpid()), "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    return Claim(folder, number + 1) if _add(folder, number + 1, claimed) else None


def _latest(folder: Path) -> tuple[int, dict | None]:
    """The number of the latest claim and what it says; (0, None) where there is none."""
    numbers = [int(found[1]) for path in folder.iterdir() if (found := re.fullmatch(r"claim-(\d+)", path.name))]
    if not numbers:
        return 0, None
    path = folder / f"claim-{max(numbers)}"
    try:
        return max(numbers), json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: damaged ({error}): delete it when no process does this run") from None


def _add(folder: Path, number: int, content: dict) -> bool:
    """Writes a claim; False where somebody else was first."""
    return write_once(folder / f"claim-{number}", json.dumps(content) + "\n")


def write_once(path: Path, text: str) -> bool:
    """Writes a complete file, if there is none of its name; False where somebody else was first."""
    beside = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
    beside.write_text(text, encoding="utf-8")
    try:
        os.link(beside, path)
        return True
    except FileExistsError:
        return False
    finally:
        beside.unlink()


def _machine() -> list[str]:
    """Identifies a machine. Containers may share a host name and a kernel, but not process numbers."""
    parts = [socket.gethostname()]
    try:
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    except OSError:
        pass
    return parts


def _process(pid: int) -> list:
    """The number of a process and its start time, since numbers are reused."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        return [pid, stat.rpartition(")")[2].split()[19]]
    except OSError:
        return [pid, None]


def _lives(process: list) -> bool:
    pid, began = process
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it is somebody else's
    return began is None or _process(pid)[1] in (None, began)
