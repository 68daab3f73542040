"""The cache of compiled programs on disk: where it is, and how a damaged entry is replaced."""

import glob
import os
import re
import warnings

from memo_jax.files import as_path
from memo_jax.log import say

# JAX warns, recompiles, and never overwrites an existing entry.
UNREADABLE = re.compile(r"Error reading persistent compilation cache entry for '(.+?)'")


def keep_compiled_programs() -> None:
    """Makes XLA cache compiled programs in the user's cache folder, unless JAX_COMPILATION_CACHE_DIR names another.

    Caches programs that took at least half a second to compile, unless JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS says
    otherwise. An entry that was cut short, by a full disk or a killed process, is removed when it is found, and written
    again.
    """
    import jax

    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if not folder:
        base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        folder = os.path.join(base, "memo_jax", "xla")
        jax.config.update("jax_compilation_cache_dir", folder)
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    _remove_unreadable_entries(folder)


def _remove_unreadable_entries(folder: str) -> None:
    """Turns JAX's warning of an entry that it cannot read, which names the program, into the removal of its entries."""
    show = warnings.showwarning
    if getattr(show, "removes_from", None) == folder:
        return

    def remove_or_show(message, *arguments, **options):
        unreadable = UNREADABLE.match(str(message))
        if not unreadable:
            return show(message, *arguments, **options)
        for entry in as_path(folder).glob(f"{glob.escape(unreadable[1])}-*"):
            entry.unlink(missing_ok=True)
        say(f"the compiled program {unreadable[1]} in {folder} was damaged: it is recompiled and cached again")

    remove_or_show.removes_from = folder
    warnings.showwarning = remove_or_show
