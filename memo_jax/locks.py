"""Locks on outputs: at most one process at a time writes a workdir, a dataset, a file of embeddings or a gallery.

What a lock can promise depends on where the output is:

* A local file system: `flock`. The kernel releases it when the process ends, however it ends.
* NFS: Linux passes `flock` on to the server, so the lock holds across machines and is released when the client is gone.
  A mount with `nolock` or `local_lock=flock` locks only between the processes of a single machine.
* A bucket, or a file system without `flock` (Lustre without the option, some FUSE mounts): a lease. The owner renews a
  small object every few seconds. An object that has not been renewed for `STALE_SECONDS` belongs to nobody, so after a
  kill the next process waits at most that long; on the owner's own machine it does not wait at all. A process that was
  suspended for longer may have lost its lease: `Lock.check` finds out.
"""

import contextlib
import errno
import fcntl
import json
import os
import shlex
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from memo_jax.files import as_path, in_bucket, one_line

RENEWAL_SECONDS = 10.0
STALE_SECONDS = 45.0
POLL_SECONDS = 1.0

NO_FLOCK = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # from file systems without it


class LockedError(OSError):
    """Another process is working on this output; the message names it."""


class Lock:
    """A lock that is held."""

    def check(self) -> None:
        """Raises LockedError if the lock has been lost, which only a lease can be."""


@contextlib.contextmanager
def exclusive(path: str | os.PathLike, *, inside: bool = False) -> Iterator[Lock]:
    """Holds the lock on an output for as long as a `with` block lasts; the lock file is removed at its end.

    Args:
      path: the output, in the file system or a bucket; it need not exist.
      inside: False: the lock file is `.NAME.lock` beside the output. True: the output is a folder, which is made where
        it is missing, and the lock file is `.lock` in it. Folders made here are removed if they are empty at the end.

    Raises:
      LockedError: another process holds the lock; the message names it.
      ValueError: `path` has no name, as the root folder. OSError: naming `path`: the folder cannot be made or written.
    """
    path = as_path(path)
    if not inside and not path.name:
        raise ValueError(f"{path} cannot be replaced: give the name of something in it")
    real = path if in_bucket(path) else Path(os.path.realpath(path))  # a link and its target are one output
    if real != path and path.is_symlink() and not real.parent.is_dir():
        raise FileNotFoundError(f"{real.parent}: no such folder, where the link {path} leads to")
    file = real / ".lock" if inside else real.with_name(f".{real.name}.lock")
    if in_bucket(path):
        with _Lease(path, file) as lease:
            yield lease
        return
    made = []
    try:
        made = _make_folders(file.parent)
        try:
            descriptor = _flocked(path, file)
        except LockedError:
            raise
        except OSError as error:
            if error.errno not in NO_FLOCK:
                raise OSError(error.errno, error.strerror, str(path)) from error
            with _Lease(path, file) as lease:
                yield lease
            return
        try:
            yield Lock()
        finally:
            with contextlib.suppress(OSError):  # the file system may have become read-only
                file.unlink(missing_ok=True)
            os.close(descriptor)
    finally:
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()


def _make_folders(folder: Path) -> list[Path]:
    """Makes a folder and those above it; returns the ones that were missing, innermost first."""
    missing = [one for one in (folder, *folder.parents) if not one.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _flocked(path: Path, file: Path) -> int:
    """Returns the descriptor of the lock file, locked."""
    while True:
        made = True
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            made = False
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise LockedError(_taken(path, os.read(descriptor, 10_000))) from None
            except OSError as error:
                if made and error.errno in NO_FLOCK:  # else a lease would take it for another process's
                    os.unlink(file)
                raise
            # The previous holder removes the file when it ends: this may be the removed one.
            if _is_at(file, descriptor):
                try:
                    os.ftruncate(descriptor, 0)
                    os.write(descriptor, _owner())
                except OSError:  # a full disk
                    os.unlink(file)
                    raise
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _is_at(file: Path, descriptor: int) -> bool:
    """Whether an open file is still the one at its path."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(file))
    except FileNotFoundError:
        return False


class _Lease(Lock):
    """An object or file that its owner renews, for places without `flock`."""

    def __init__(self, path, file):
        self._path, self._file = path, file
        self._token = uuid.uuid4().hex
        self._lost, self._end = "", threading.Event()

    def __enter__(self) -> "_Lease":
        deadline, seen = time.monotonic() + STALE_SECONDS, None
        told = taken_over = False
        while not self._create():
            content = self._read()
            if content != seen and seen is not None:
                raise LockedError(_taken(self._path, content))  # renewed while we looked
            seen = content
            if content is None:
                continue
            if time.monotonic() > deadline or _is_dead(content):
                self._remove()
                taken_over = True
                seen, deadline = None, time.monotonic() + STALE_SECONDS
                continue
            if not told:
                print(f"{_taken(self._path, content)} (waiting to see if it is alive)", file=sys.stderr, flush=True)
                told = True
            time.sleep(POLL_SECONDS)
        if told or taken_over:
            time.sleep(POLL_SECONDS)  # two processes taking over the same lease may each have written their own
            if not self._is_mine():
                raise LockedError(_taken(self._path, self._read()))
        threading.Thread(target=self._renew, daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        self._end.set()
        with contextlib.suppress(Exception):  # whatever a bucket's library raises: the work is done
            if self._is_mine():
                self._remove()

    def check(self) -> None:
        """Raises LockedError if another process has taken the lease over."""
        if self._lost:
            raise LockedError(self._lost)

    def _renew(self) -> None:
        while not self._end.wait(RENEWAL_SECONDS):
            with contextlib.suppress(Exception):  # whatever a library raises for a bucket that is away for a moment
                if not self._is_mine():
                    self._lost = f"{self._path}: the lock was lost: {_taken(self._path, self._read())}"
                    return
                if not self._end.is_set():
                    self._file.write_bytes(_owner(self._token))

    def _is_mine(self) -> bool:
        return self._token.encode() in (self._read() or b"")

    def _create(self) -> bool:
        if in_bucket(self._file):
            import fsspec

            system = fsspec.filesystem("gs")
            try:
                system.pipe_file(os.fspath(self._file), _owner(self._token), mode="create")
                return True
            except FileExistsError:
                return False
            except Exception as error:
                raise OSError(f"{self._path}: cannot lock it: {one_line(error)}") from error
        try:
            descriptor = os.open(self._file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            return False
        with open(descriptor, "wb") as file:
            file.write(_owner(self._token))
        return True

    def _read(self) -> bytes | None:
        try:
            return self._file.read_bytes()
        except FileNotFoundError:
            return None
        except Exception as error:  # whatever a bucket's library raises
            raise OSError(f"{self._path}: cannot read its lock: {one_line(error)}") from error

    def _remove(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._file.unlink()


def _owner(token: str = "") -> bytes:
    """What a lock file says about its owner; `renewed` differs each time."""
    owner = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "machine": _machine(),
        "command": shlex.join(sys.argv)[:200],
        "renewed": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "beat": time.monotonic(),
        "token": token,
    }
    return json.dumps(owner).encode()


def _parsed(content: bytes | None) -> dict:
    try:
        owner = json.loads(content or b"{}")
        return owner if isinstance(owner, dict) else {}
    except ValueError:  # being written at the moment
        return {}


def _taken(path, content: bytes | None) -> str:
    owner = _parsed(content)
    who = f"process {owner['pid']} on {owner.get('host')}" if "pid" in owner else "another process"
    return f"{path} is in use by {who}: wait for it to end, or end it"


def _is_dead(content: bytes) -> bool:
    """Whether the owner ran on this machine and has ended."""
    owner = _parsed(content)
    if owner.get("machine") != _machine():
        return False
    try:
        os.kill(int(owner["pid"]), 0)
        return False
    except ProcessLookupError:
        return True
    except (OSError, ValueError, TypeError, KeyError):
        return False


def _machine() -> list[str]:
    """What distinguishes machines. Containers may share a name and a kernel, but not a namespace of processes."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return parts
