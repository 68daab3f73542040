"""`parity.py` in float64, where no rounding hides a difference: prints the same JSON object.

    python experiments/parity_float64.py FILE

FILE's steps must have been taken in float64, too (`make_reference.py make --float64`, or `replay --float64-output`).
The exit status is 1 when a deviation passes what float32 storage of FILE's states explains.
"""

import argparse
import sys

import jax
import jax.numpy as jnp

jax.config.update("jax_enable_x64", True)
jnp.float32 = jnp.float64  # the layers ask for float32 by name, their defaults already when they are imported

import parity  # noqa: E402
from memo_jax.files import as_json

STORAGE_NOISE = 2e-8  # times parity.NOISE_MARGIN; half a float32 rounding of numbers up to two is 1.2e-7


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", metavar="FILE", help="npz of reference steps")
    reference = parity.Reference(parser.parse_args(arguments).file)
    run, theirs = reference.run(reference.initial_students()), reference.reached()
    noise = dict.fromkeys(parity.deviations(run, theirs), STORAGE_NOISE)
    for check in noise:
        if check.startswith("threshold/"):  # the fit stops early whatever it computes in
            noise[check] = parity.SMALLEST_NOISE["threshold"]
    result = parity.report(run, theirs, noise)
    print(as_json(result))
    return 1 if result["passed_tolerance"] else 0


if __name__ == "__main__":
    sys.exit(main())
