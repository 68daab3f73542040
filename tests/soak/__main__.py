"""Runs the campaigns: `python -m soak`."""

import argparse
import json
import os
import random
import sys
import time

from memo_jax.log import Progress
from soak import faults

# With trials per unit of --count, by about how long a trial takes, so that each campaign gets its share of the time.
CAMPAIGNS = {
    "prepare.write_errors": 2,
    "prepare.kills": 2,
    "prepare.dataset_damage": 8,
    "prepare.archive_damage": 12,
    "prepare.unfinished_damage": 1,
    "training.write_errors": 1,
    "training.kills": 0.5,
    "training.round_write_errors": 0.5,
    "training.round_kills": 0.25,
    "damage.files": 20,
    "damage.checkpoints": 5,
    "commands.write_errors": 5,
    "recordings.mutations": 100,
}


def campaign(name: str):
    """Imports and returns the function of a campaign: those of training import JAX."""
    module, _, function = name.partition(".")
    __import__(f"soak.{module}")
    return getattr(sys.modules[f"soak.{module}"], function)


def counted(count: int, shown: Progress):
    """Yields the numbers of the trials, and shows how many are done."""
    for number in range(count):
        yield number
        shown.update()


def main() -> None:
    parser = argparse.ArgumentParser("soak", description=__doc__)
    parser.add_argument("campaigns", nargs="*", metavar="CAMPAIGN", help=f"of {', '.join(CAMPAIGNS)}; or its module")
    parser.add_argument("--count", type=float, default=100, help="of trials; campaigns whose trials are quick do more")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    faults.preload()
    console, report = os.fdopen(os.dup(2), "w", buffering=1), {}
    chosen = [name for name in CAMPAIGNS if not options.campaigns or {name, name.split(".")[0]} & {*options.campaigns}]
    for name in chosen:
        count, began = max(round(options.count * CAMPAIGNS[name]), 1), time.monotonic()
        run, streams = campaign(name), (sys.stdout, sys.stderr)
        sys.stderr = console
        with Progress(count, name, "trial") as shown:
            sys.stderr = open(os.devnull, "w")
            try:
                found = run(counted(count, shown), random.Random(f"{name} {options.seed}"))
            finally:
                sys.stdout, sys.stderr = streams
        report[name] = {"trials": count, **found, "seconds": round(time.monotonic() - began)}
    print(json.dumps({"seed": options.seed, **report}, indent=2))


if __name__ == "__main__":
    main()
