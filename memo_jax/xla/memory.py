"""How memory that XLA has freed is kept. Imports no JAX, so that `memo-jax --help` does not wait for it."""


def keep_freed_memory() -> None:
    """Makes glibc keep freed memory for the next step or batch instead of returning it to the system.

    XLA on a CPU allocates its temporary memory anew for each call. If it were returned in between, every 4 KiB would
    cost a page fault: up to a fifth of the time of a small step.
    """
    import ctypes

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # only glibc has it
    if mallopt is not None:
        trim_threshold, mmap_max = -1, -4  # as malloc.h numbers M_TRIM_THRESHOLD, …
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, -1)
        # Limiting glibc to one arena is no alternative: compiler threads would contend for it, and steps take 1.5 times
        # as long.
