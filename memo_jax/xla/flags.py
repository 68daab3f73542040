"""XLA flags of the environment. One that jaxlib does not know would end the process, so each is tried first.

Does not import JAX, which reads XLA_FLAGS once, when it first looks for devices.
"""

import functools
import os
import subprocess
import sys

from memo_jax.log import say

FLAGS = "XLA_FLAGS"


def default_xla_flags(*flags: str) -> None:
    """Sets XLA_FLAGS unless the user has set it. Call it before JAX first looks for devices.

    Args:
      flags: such as "--xla_name=value". One that the installed jaxlib does not know is left out with a message.
    """
    if FLAGS in os.environ:
        return
    known = flags if _accepted(flags) else tuple(flag for flag in flags if _accepted((flag,)))
    for flag in flags:
        if flag not in known:
            say(f"this jaxlib does not know the XLA flag {flag}: continuing without it")
    os.environ[FLAGS] = " ".join(known)


@functools.cache
def _accepted(flags: tuple[str, ...]) -> bool:
    """Returns whether a fresh process starts with these flags; jaxlib has no list of the flags it knows."""
    environment = os.environ | {FLAGS: " ".join(flags), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", "import jax; jax.devices()"]
    return subprocess.run(command, env=environment, capture_output=True).returncode == 0
