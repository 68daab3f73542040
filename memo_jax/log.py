"""Metrics as JSON lines and TensorBoard files, and progress on the console. Knows nothing of JAX."""

import functools
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from memo_jax.files import AppendableFolder, as_path, make_folder, parse_json, read_text, write_text

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"
SECONDS_BETWEEN_LINES = 10.0  # of progress where there is no terminal


class MetricsLog:
    """Appends a row per step to `<workdir>/metrics.jsonl`, and the same numbers to `<workdir>/tensorboard`.

    Every row is on its way to the disk when `write` returns. A last line that a killed run left half-written is dropped
    on opening. With `active=False` (every process but the first) nothing is created or written.

    In a bucket, where nothing can be appended to, `upload`, `close` and, once a minute, `write` update the files.

    Raises:
      ValueError: the existing file holds a line that is not a row of metrics.
      OSError: the folder cannot be written.
    """

    def __init__(self, workdir: str | os.PathLike, active: bool = True):
        self._workdir = as_path(workdir)
        self.path = self._workdir / METRICS_FILE
        self._active = active
        self._events = None
        self._file = None
        if active:
            make_folder(self._workdir)
            self._folder = AppendableFolder(self._workdir, METRICS_FILE)
            self._local = self._folder.path / METRICS_FILE
            _drop_torn_line(self._local)
            self._file = open(self._local, "a", encoding="utf-8")

    def write(self, step: int, values: Mapping[str, object]) -> None:
        """Writes the row {"step": step, **values}: numpy and JAX scalars as numbers, NaN and infinities as null."""
        if not self._active:
            return
        row = {"step": int(step)} | {name: _plain(value) for name, value in values.items() if name != "step"}
        line = json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
        with self._failure_named():
            self._file.write(line)
            self._file.flush()
            self._write_event(row)
        self._folder.upload(only_when_due=True)

    def upload(self) -> None:
        """Brings the files in a bucket up to date; elsewhere they always are. Raises OSError."""
        if self._active:
            self._folder.upload()

    def truncate_after(self, step: int) -> None:
        """Drops the rows past `step`, which a run resumed from there writes again; TensorBoard hides them likewise."""
        if not self._active:
            return
        self._file.close()
        text = read_text(self._local, "replace")
        write_text(self._local, "".join(line for line, row in _lines_with_rows(text, self.path) if row["step"] <= step))
        self._file = open(self._local, "a", encoding="utf-8")
        if any((self._workdir / TENSORBOARD_FOLDER).glob("*tfevents*")):
            self._hide_events_from(step + 1)

    def close(self) -> None:
        """Closes the files. The log cannot be written afterwards."""
        active, self._active = self._active, False
        with self._failure_named():
            if self._file:
                self._file.close()
            if self._events:
                self._events.close()
        if active:
            self._folder.close()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    @contextmanager
    def _failure_named(self):
        """Names the file in the OSError of a full disk, which itself names none."""
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, f"cannot write metrics: {error.strerror}", str(self.path)) from error

    def _events_writer(self):
        # Not SummaryWriter: its thread dies silently when the disk is full, and the tenth row after that hangs.
        if self._events is None:
            from tensorboardX.event_file_writer import EventsWriter

            folder = self._folder.path / TENSORBOARD_FOLDER
            folder.mkdir(exist_ok=True)
            # File names carry whole seconds: a run restarted within one must not overwrite its predecessor.
            self._events = EventsWriter(str(folder / "events"), filename_suffix=f".{time.time_ns()}")
        return self._events

    def _write_event(self, row: dict) -> None:
        from tensorboardX.proto.event_pb2 import Event

        event = Event(step=row["step"], wall_time=time.time())
        for name, value in row.items():
            if name != "step" and isinstance(value, (int, float)):
                event.summary.value.add(tag=name, simple_value=float(value))
        self._events_writer().write_event(event)
        self._events_writer().flush()

    def _hide_events_from(self, step: int) -> None:
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        start = Event(step=step, wall_time=time.time(), session_log=SessionLog(status=SessionLog.START))
        self._events_writer().write_event(start)
        self._events_writer().flush()


def read_metrics(path: str | os.PathLike) -> list[dict]:
    """Returns the rows of a metrics file, or of the one in a workdir, oldest first; omits a half-written last line.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a line is not a row of metrics.
    """
    path = as_path(path)
    path = path / METRICS_FILE if path.is_dir() else path
    text = read_text(path, "replace")
    if text is None:
        raise FileNotFoundError(f"{path}: no metrics here; give the workdir of a training run or its {METRICS_FILE}")
    return [row for _, row in _lines_with_rows(text, path)]


class Progress:
    """Progress of long work with rate and time left: a bar on a terminal, elsewhere a line about every ten seconds.

    Args:
      total: how many units there are in all; None when unknown (no time left is shown then).
      label: what is being done.
      unit: name of one unit.
      initial: units done before (a resumed run); they do not count in the rate.
      active: False shows nothing (every process but the first).
    """

    def __init__(
        self, total: int | None = None, label: str = "", unit: str = "it", initial: int = 0, active: bool = True
    ):
        self._total, self._label, self._unit, self._done = total, label, unit, initial
        self._active = active
        self._stream = sys.stderr
        self._bar = None
        self._postfix = {}
        self._initial, self._start = initial, time.monotonic()
        self._printed_done, self._printed_time = initial, self._start
        if active and self._stream.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=total, desc=label or None, unit=unit, initial=initial, dynamic_ncols=True, file=self._stream
            )

    def update(self, n: int = 1, **postfix: Any) -> None:
        """Counts `n` more units done; keyword arguments are shown beside them (numbers with four digits)."""
        self._done += n
        self._postfix = {name: _short(value) for name, value in postfix.items()} or self._postfix
        if self._bar is not None:
            if postfix:
                self._bar.set_postfix(self._postfix, refresh=False)
            self._bar.update(n)
        elif self._active and time.monotonic() - self._printed_time >= SECONDS_BETWEEN_LINES:
            self._print_line()

    def write(self, text: str) -> None:
        """Prints a line of text without breaking the bar."""
        if not self._active:
            return
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Leaves the final state on the screen. May be called twice."""
        if self._bar is not None:
            self._bar.close()
        elif self._active and (self._done > self._printed_done or self._printed_time == self._start):
            self._printed_done, self._printed_time = self._initial, self._start  # the overall rate
            self._print_line()
        self._bar, self._active = None, False

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def _print_line(self) -> None:
        now, parts = time.monotonic(), []
        # The rate since the previous line; no rate until two units are done: training compiles its first step, and
        # evaluates the untrained network before the second.
        if self._done > self._initial + 2 or self._done == self._total:
            rate = (self._done - self._printed_done) / max(now - self._printed_time, 1e-9)
            parts.append(_speed_text(rate, self._unit))
            if self._total is not None and rate > 0 and self._done < self._total:
                parts.append(f"{_clock((self._total - self._done) / rate)} left")
        parts.append(f"{_clock(now - self._start)} elapsed")
        parts += [f"{name} {value}" for name, value in self._postfix.items()]
        count = f"{self._done}" if self._total is None else f"{self._done}/{self._total}"
        share = f" ({self._done / self._total:.1%})" if self._total else ""
        label = f"{self._label}: " if self._label else ""
        print(f"{label}{count} {self._unit}{share}, {', '.join(parts)}", file=self._stream, flush=True)
        self._printed_done, self._printed_time = self._done, now


def progress(
    iterable: Iterable, total: int | None = None, label: str = "", unit: str = "it", active: bool = True
) -> Iterator:
    """Yields the elements of `iterable`, showing a `Progress`; `total` defaults to its length."""
    if total is None and hasattr(iterable, "__len__"):
        total = len(iterable)
    with Progress(total, label, unit, active=active) as shown:
        for element in iterable:
            yield element
            shown.update()


def say(text: str) -> None:
    """Prints a line about the progress of work to stderr, apart from the result on stdout."""
    print(text, file=sys.stderr, flush=True)


@functools.cache
def say_once(text: str) -> None:
    """Prints a line as `say` does, unless this process has printed it before."""
    say(text)


def plural(count: int, noun: str) -> str:
    """Returns the count with its noun: "1 recording", "1,200 recordings"."""
    return f"{count:,} {noun if count == 1 else noun + 's'}"


def _plain(value):
    """The JSON value of a metric: plain int, float, bool, str or None."""
    if hasattr(value, "item"):  # scalars of numpy and JAX, without importing either
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _lines_with_rows(text: str, path: Path) -> list[tuple[str, dict]]:
    """The complete lines of a metrics file's text, each with the row it holds."""
    pairs = []
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        if not line.endswith("\n"):
            break
        try:
            row = parse_json(line)
            if not 0 <= row["step"] < 2**53:
                raise ValueError
        except (ValueError, TypeError, KeyError):
            raise ValueError(
                f"{path}, line {number}: not a row of metrics: {line.strip()[:80]!r}; "
                "delete the line, or start in another workdir"
            ) from None
        pairs.append((line, row))
    return pairs


def _drop_torn_line(path: Path) -> None:
    """Removes what follows the last newline: the row a killed run was writing."""
    if path.exists():
        content = path.read_bytes()
        if content and not content.endswith(b"\n"):
            write_text(path, content[: content.rfind(b"\n") + 1].decode("utf-8"))


def _short(value) -> str:
    value = value.item() if hasattr(value, "item") else value
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _speed_text(rate: float, unit: str) -> str:
    return f"{rate:.3g} {unit}/s" if rate >= 1 or rate == 0 else f"{1 / rate:.3g} s/{unit}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
