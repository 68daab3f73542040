"""What voice activity detection does to error rates: the same network on whole recordings and on their speech alone.

    python experiments/vad.py --test speech/speechocean762/test speech/trials/speechocean762-test.txt

`--test` may be given several times. Recordings in which less than half a second of speech is found are counted, and the
trials that need them are left out for both sides. Prints, for each list, EER with its 95 % interval and minDCF of both,
the difference of the EERs, and how much of the recordings is speech.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from memo_jax import Embedder
from memo_jax.data.trial_lists import write_trials
from memo_jax.files import as_json
from memo_jax.inference.embed_recordings import embed_recordings
from memo_jax.scoring.score import score
from memo_jax.scoring.trials import read_trials

RATES = ("eer", "eer_interval", "min_dcf_0.01", "min_dcf_0.05")


def tested(model: Path | None, folder: Path, trials: Path) -> dict:
    """Results of one folder of recordings and its trial list."""
    with tempfile.TemporaryDirectory() as temporary:
        files = {vad: Path(temporary) / f"{vad}.npz" for vad in (False, True)}
        reports = {vad: embed_recordings(Embedder.load(model, vad=vad), [folder], files[vad]) for vad in files}
        lost = {name for report in reports.values() for name, _ in report["left_out"]}
        listed = read_trials(trials)
        listed.require_both_kinds()
        kept = [
            (int(target), enrol, test)
            for enrol, test, target in zip(listed.enrol, listed.test, listed.target)
            if not {enrol, test} & lost
        ]
        used = Path(temporary) / "trials.txt"
        write_trials(used, kept)
        found = score([files[True]], used, compare=[files[False]])
        whole = score([files[False]], used)
    return {
        "list": trials.name,
        "recordings": reports[False]["recordings"],
        "recordings_without_speech": len(lost),
        "share_of_speech": reports[True]["seconds"] / reports[False]["seconds"],
        "trials": len(kept),
        "trials_left_out": len(listed.target) - len(kept),
        "vad": {key: found[key] for key in RATES},
        "whole": {key: whole[key] for key in RATES},
        "difference": {key: found["comparison"][key] for key in ("difference", "interval", "p_value")},
    }


def main(arguments=None) -> int:
    """Parses, measures, prints JSON; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, help="default: the package's")
    parser.add_argument("--test", type=Path, nargs=2, action="append", required=True, metavar=("DIR", "TRIALS"))
    options = parser.parse_args(arguments)
    try:
        print(as_json([tested(options.model, *test) for test in options.test]))
    except (ValueError, OSError, ImportError) as error:
        print(f"vad.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
