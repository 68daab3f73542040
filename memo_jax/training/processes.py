"""Processes that train together: how they join, agree, stop at the same step, and end when one of them is lost."""

import hashlib
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np

# A process silent for this long counts as lost, which ends the others. It sends a heartbeat every half of it, so it may
# be suspended for the other half, as when its machine is moved to another host. But the first process's gRPC server
# closes the connection of one that leaves a ping unanswered for a minute. It pings when it has received something, a
# heartbeat or a message about a checkpoint, and JAX has no setting for it.
HEARTBEAT_SECONDS = 150
SHUTDOWN_SECONDS = 60  # how long a process that ends waits for the others
LAST_WORDS_SECONDS = 5.0  # how long a failed first process, whose exit ends all, lets the others report their errors
TEXT_BYTES = 1000  # longest error message that the first process sends to the others
# How XLA's errors begin when a peer is lost. Others, such as RESOURCE_EXHAUSTED, come from this process itself.
LOST = re.compile(r"(UNKNOWN|UNAVAILABLE|INTERNAL|ABORTED|CANCELLED|DEADLINE_EXCEEDED|FAILED_PRECONDITION): ")

T = TypeVar("T")


class StopRequested(Exception):
    """SIGTERM was sent to this process, or to another that trains with it; the state after `step` has been saved."""

    exit_status = 75

    def __init__(self, step: int):
        super().__init__(f"SIGTERM: stopped after step {step}, which is saved; run the same command again to resume")


def join(coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None) -> None:
    """Connects this process to those that train with it. Call it before anything else touches a device.

    Without arguments, JAX finds the others on Cloud TPU, under Slurm, Open MPI and Kubernetes.

    Args:
      coordinator: host and port on which process 0 listens.
      num_processes: how many there are.
      process_id: which one this is, from 0.

    Raises:
      ValueError: the arguments are wrong, or missing where JAX cannot find them out.
      ImportError: this JAX does not have what several processes need.
      OSError: the others cannot be reached.
    """
    _multihost_utils()
    given = {"--coordinator": coordinator, "--num-processes": num_processes, "--process-id": process_id}
    missing = [name for name, value in given.items() if value is None]
    if not missing and not 0 <= process_id < num_processes:
        raise ValueError(f"--process-id is {process_id}: must be 0 to {num_processes - 1}, as --num-processes says")
    if coordinator is not None and not re.fullmatch(r".+:\d+", coordinator):
        raise ValueError(f"--coordinator is {coordinator!r}: give host and port, such as 10.0.0.1:1234")
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
            # With all arguments given, nothing is left to detect; under Slurm, JAX would take one device per process.
            cluster_detection_method=None if missing else "deactivate",
        )
    except ValueError as error:
        raise ValueError(
            f"found no TPU pod, Slurm, Open MPI or Kubernetes that connects the processes ({error}): "
            f"give {', '.join(missing) or 'other values'}"
        ) from error
    except RuntimeError as error:
        raise OSError(f"cannot join the other processes: {error}") from error


def leave() -> None:
    """Disconnects when all is done; waits for the others, which are about to do the same."""
    jax.distributed.shutdown()


def leave_at_once(status: int) -> None:
    """Ends this process after an error that others may not have, without waiting for them: they notice and end."""
    sys.stdout.flush()
    sys.stderr.flush()
    if jax.process_index() == 0:
        time.sleep(LAST_WORDS_SECONDS)
    os._exit(status)


def means_lost_process(error: BaseException | None) -> bool:
    """Returns whether an error of a computation, or one that caused it, means that another process is lost."""
    if error is None or jax.process_count() == 1:
        return False
    return LOST.match(str(error)) is not None or means_lost_process(error.__cause__ or error.__context__)


def on_first_process(action: Callable[[], T]) -> T | None:
    """Calls `action` in the first process and returns its result there, None in the others.

    An OSError or ValueError that it raises is raised in all, so that no process waits for one that has failed.
    """
    if jax.process_count() == 1:
        return action()
    result, failure = None, None
    if jax.process_index() == 0:
        try:
            result = action()
        except (OSError, ValueError) as error:
            failure = error
    text = b"" if failure is None else (str(failure) or type(failure).__name__).encode()[:TEXT_BYTES]
    told = broadcast_from_first(np.frombuffer(text.ljust(TEXT_BYTES, b"\0"), np.uint8))
    if text := told.tobytes().rstrip(b"\0").decode(errors="replace"):
        raise failure or OSError(text)
    return result


def broadcast_from_first(value: np.ndarray) -> np.ndarray:
    """Returns the first process's value in all of them; each passes one of the same shape and type."""
    if jax.process_count() == 1:
        return value
    return np.asarray(_multihost_utils().broadcast_one_to_all(value))


def gathered_from_all(value: np.ndarray) -> np.ndarray:
    """Returns the values of all processes, stacked; each passes one of the same shape and type."""
    if jax.process_count() == 1:
        return value[None]
    return np.asarray(_multihost_utils().process_allgather(value))


def check_agreement(values: dict[str, str]) -> None:
    """Raises ValueError, in all processes, naming the first key whose text is not the same in all of them."""
    digests = [hashlib.sha256(value.encode()).digest()[:8] for value in values.values()]
    gathered = gathered_from_all(np.frombuffer(b"".join(digests), np.uint32).reshape(len(values), 2))
    for name, rows in zip(values, np.moveaxis(gathered, 0, 1), strict=True):
        other = [i for i, digest in enumerate(rows) if (digest != rows[0]).any()]
        if other:
            raise ValueError(
                f"{name} differs between processes 0 and {other[0]}: all must read the same files and be given the "
                "same command"
            )


class StopRequest:
    """Lets a loop ask at every step whether SIGTERM came: `with StopRequest() as stop: … if stop.reached(step)`.

    With several processes, the answer becomes true at the same step in all of them, whichever received the signal. A
    process that trains alone ends at once on a second signal.
    """

    def __enter__(self) -> "StopRequest":
        self._asked, self._handler = False, None
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self._handler = signal.signal(signal.SIGTERM, self._ask)
        return self

    def reached(self, step: int) -> bool:
        """Returns whether to stop after this step. All processes must ask after every step."""
        return self._asked or jax.process_count() > 1 and _multihost_utils().reached_preemption_sync_point(step)

    def __exit__(self, *exception) -> None:
        self._restore()

    def _ask(self, *_) -> None:
        self._asked = True
        self._restore()

    def _restore(self) -> None:
        if self._handler is not None:
            signal.signal(signal.SIGTERM, self._handler)
            self._handler = None


def _multihost_utils():
    """Returns JAX's module for several processes, which a single one does not need."""
    try:
        from jax.experimental import multihost_utils
    except ImportError as error:  # experimental: another version of JAX may have moved it
        raise ImportError(
            f"training in several processes needs jax.experimental.multihost_utils, which jax {jax.__version__} does "
            f"not have ({error}): install an earlier version, such as jax 0.10.2"
        ) from error
    return multihost_utils
