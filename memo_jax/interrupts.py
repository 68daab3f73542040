"""Ctrl-C that is never lost: it ends a command at once where that is possible, and otherwise at the next stage.

Python turns SIGINT into KeyboardInterrupt in the main thread, wherever that is. Raised in a callback (of the garbage
collector, of a C++ library), the exception is printed as "ignored" and the command continues; raised while a module is
imported, it can crash the process (jaxlib, one time in 70). So within `handled()` it is raised after an import, and a
request is remembered as well: `check()`, called between stages and by every `log.Progress`, raises it again. A second
Ctrl-C ends the process at once, even while the main thread is in a compiler.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import NoReturn

INTERRUPTED = 130  # the exit status, as of shells: 128 + SIGINT

_requested = False


@contextlib.contextmanager
def handled() -> Iterator[None]:
    """Remembers Ctrl-C within a block until it has ended the command; for the main thread of a command line.

    Elsewhere, and where SIGINT is ignored (`nohup`, jobs in the background of a script), nothing changes.
    """
    global _requested
    _requested = False
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    hook = sys.unraisablehook
    watched, signalled = os.pipe()
    os.set_blocking(signalled, False)
    before = signal.set_wakeup_fd(signalled, warn_on_full_buffer=False)
    threading.Thread(target=_end_at_second, args=(watched,), daemon=True).start()
    try:
        sys.unraisablehook = lambda one: None if issubclass(one.exc_type, KeyboardInterrupt) else hook(one)
        signal.signal(signal.SIGINT, _remember)
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.unraisablehook = hook
        signal.set_wakeup_fd(before)
        os.close(signalled)  # ends the thread


def check() -> None:
    """Raises KeyboardInterrupt if Ctrl-C was pressed: to be called between stages."""
    if _requested:
        raise KeyboardInterrupt


def requested() -> bool:
    """Returns whether Ctrl-C was pressed since `handled()` began. After that, any exception ends the command."""
    return _requested


def _remember(_, frame) -> None:
    global _requested
    if _requested:
        end()
    _requested = True
    importer = _outermost_importer(frame)
    if importer is None:
        raise KeyboardInterrupt
    importer.f_trace = _raise_in
    sys.settrace(lambda *_: None)  # a frame's trace function is called only while a global one is set


def _outermost_importer(frame):
    """Returns the frame whose import statement a frame is part of, the outermost one; None for no import."""
    importer = None
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            importer = frame.f_back
        frame = frame.f_back
    return importer


def _raise_in(*_) -> NoReturn:
    """The trace function of an importer: it is called at its next line, when the import is over."""
    sys.settrace(None)
    raise KeyboardInterrupt


def _end_at_second(watched: int) -> None:
    """Reads the numbers of signals, which arrive even while the main thread runs no Python, until the pipe closes."""
    with open(watched, "rb", buffering=0) as pipe:
        count = 0
        while numbers := pipe.read(1):
            count += numbers[0] == signal.SIGINT
            if count == 2:
                end()


def end() -> NoReturn:
    """Ends the process at once: waits neither for threads nor for exit handlers."""
    with contextlib.suppress(Exception):  # a pipe that is closed
        sys.stdout.flush()
    print("memo-jax: interrupted", file=sys.stderr, flush=True)
    os._exit(INTERRUPTED)
