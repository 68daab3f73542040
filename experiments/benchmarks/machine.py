"""What the benchmarks measure of the machine itself: how quick a call is at its best."""

import time
from collections.abc import Callable


def best_seconds(call: Callable, clock: Callable[[], float] = time.process_time, runs: int = 8) -> float:
    """Returns the least that `clock` counts for one of several calls, after one that is not counted."""
    call()
    seconds = []
    for _ in range(runs):
        begin = clock()
        call()
        seconds.append(clock() - begin)
    return min(seconds)
