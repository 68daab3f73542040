"""Tasks over worker processes, which count what they do and end with the process that they work for."""

import concurrent.futures
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool

from memo_jax.log import Progress


def results(function: Callable, tasks: Iterable[tuple], workers: int, shown: Progress) -> Iterator:
    """Yields `function(*task, count=count)` of each task, in the order in which they finish.

    Args:
      function: may call `count()` for each unit done; it and the tasks are pickled.
      tasks: an iterable that is read as workers become free, so that at most one task waits.
      workers: processes; with 1, the calling process does the work.
      shown: counts the units.

    Raises:
      OSError: a worker was killed. Also whatever `function` or `tasks` raise.
    """
    tasks = iter(tasks)
    if workers == 1:
        yield from (function(*task, count=shown.update) for task in tasks)
        return
    # spawn: a fork of a process with threads (JAX, soundfile) may deadlock
    context = multiprocessing.get_context("spawn")
    counter, counted, running = context.Value("q", 0), 0, set()
    pool = concurrent.futures.ProcessPoolExecutor(workers, context, _start_worker, (counter,))
    try:
        while True:
            while len(running) <= workers and (task := next(tasks, None)) is not None:
                running.add(pool.submit(_run, function, task))
            if not running:
                break
            finished, running = concurrent.futures.wait(running, 0.5, concurrent.futures.FIRST_COMPLETED)
            shown.update(counter.value - counted)
            counted = counter.value
            yield from (future.result() for future in finished)
    except BrokenProcessPool:
        raise OSError("a worker process was killed, perhaps because memory ran out: try fewer workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(counter):
    global _counter
    _counter = counter
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C reaches all processes: end without a traceback
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _run(function, task):
    return function(*task, count=_count)


def _count():
    with _counter.get_lock():
        _counter.value += 1
