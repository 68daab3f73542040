"""The cache of compiled programs: truncated entries are replaced."""

import subprocess
import sys

import pytest

import tiny

SCRIPT = """
import jax, jax.numpy as jnp
from memo_jax.xla.program_cache import keep_compiled_programs
keep_compiled_programs()
keep_compiled_programs()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
print(jax.jit(lambda x: jnp.sin(x @ x).sum())(jnp.ones((8, 8))))
"""


@pytest.mark.parametrize("by_name", [True, False])
def test_an_entry_that_was_cut_short_is_named_and_replaced(by_name, tmp_path):
    """In the folder that the environment names, and in the user's cache folder."""
    variable = "JAX_COMPILATION_CACHE_DIR" if by_name else "XDG_CACHE_HOME"
    environment = tiny.environment() | {"JAX_COMPILATION_CACHE_DIR": "", variable: str(tmp_path)}
    folder = tmp_path if by_name else tmp_path / "memo_jax" / "xla"

    def run():
        done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout, done.stderr

    first, said = run()
    entries = {file: file.read_bytes() for file in folder.glob("*-cache")}
    assert entries and "damaged" not in said
    for file, content in entries.items():
        file.write_bytes(content[: len(content) // 2])
    other = folder / "jit__lambda_of_another-0123-cache"  # a program whose name only begins as this one's
    other.write_bytes(b"kept")
    again, said = run()
    assert again == first and said.count("was damaged") == len(entries) and "Warning" not in said, said
    assert other.read_bytes() == b"kept"
    other.unlink()
    assert {file: len(file.read_bytes()) for file in folder.glob("*-cache")}.keys() == entries.keys()
    assert all(len(file.read_bytes()) > len(content) // 2 for file, content in entries.items())
    assert run() == (first, "")
