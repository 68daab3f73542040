"""Where the wall time of training goes: to its steps, or to whatever holds them up."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import jax

PARTS = ("steps", "start", "compile", "input", "checkpoint", "evaluation", "positives")
GOODPUT_METRICS = (*(f"goodput/{part}" for part in PARTS), "checkpoint_seconds", "input_seconds")


class Goodput:
    """Adds up the wall time of this process since it began to train; time not counted elsewhere goes to the steps."""

    def __init__(self):
        self._begin = time.perf_counter()
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._checkpoint, self._input = None, 0.0  # seconds of the last checkpoint; of stalls since the last row

    def end_start(self) -> None:
        """Ends the part "start": everything before the first step has been done."""
        self._seconds["start"] = time.perf_counter() - self._begin

    @contextmanager
    def counting(self, part: str) -> Iterator[None]:
        """Returns a context whose time is counted for a part: compile, checkpoint, evaluation or positives."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            took = time.perf_counter() - begin
            self._seconds[part] += took
            if part == "checkpoint":
                self._checkpoint = took

    @contextmanager
    def waiting_for_input(self, running: Mapping[str, jax.Array] | None) -> Iterator[None]:
        """Returns a context in which the next batch is fetched while the step with these results may still be running.

        Its time counts as a stall only if that step has finished when the context ends: an upper bound on how long the
        device was idle.
        """
        begin = time.perf_counter()
        yield
        if running is None or all(value.is_ready() for value in running.values()):
            took = time.perf_counter() - begin
            self._seconds["input"] += took
            self._input += took

    def shares(self) -> dict[str, float]:
        """Returns the share of each part, 0 to 1; they add up to 1."""
        total = max(time.perf_counter() - self._begin, 1e-9)
        others = {part: seconds / total for part, seconds in self._seconds.items() if part != "steps"}
        return {"steps": max(1 - sum(others.values()), 0.0)} | others

    def row(self) -> dict[str, float]:
        """Returns the metrics of a row; `input_seconds` counts stalls since the previous row."""
        row = {f"goodput/{part}": share for part, share in self.shares().items()} | {"input_seconds": self._input}
        self._input = 0.0
        return row if self._checkpoint is None else row | {"checkpoint_seconds": self._checkpoint}

    def __str__(self) -> str:
        return "wall time: " + shares_text(self.shares())


def shares_text(shares: Mapping[str, float]) -> str:
    """Returns shares as text, such as "93.1 % steps, 5.0 % compile"; those below a thousandth are left out."""
    return ", ".join(f"{share:.1%} {part}".replace("%", " %") for part, share in shares.items() if share >= 0.0005)
