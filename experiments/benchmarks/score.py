"""Time to score a list of the size of VoxCeleb1-E from embeddings: 580,000 trials over 145,000 recordings.

    python experiments/benchmarks/score.py --json

Prints `seconds` (list read, looked up, scored; EER and both minDCF), the `cpu_seconds` of the same, its parts,
`reference_seconds` of the same error rates by plain numpy and scikit-learn in the same process, their `ratio`
(reference ÷ ours), the largest `difference` between the error rates of both, and `interval_seconds`, what the bootstrap
over speakers takes on top.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
from sklearn.metrics import roc_curve

from memo_jax.files import as_json
from memo_jax.scoring import metrics
from memo_jax.scoring.score import P_TARGETS, error_intervals, error_report
from memo_jax.scoring.trials import read_trials, trial_pairs


def write_material(folder: Path, trials: int, recordings: int, speakers: int, dimension: int):
    """Writes trials.txt; returns (names, embeddings [recordings, dimension]) of speakers that overlap somewhat."""
    rng = np.random.default_rng(0)
    speaker = np.arange(recordings) * speakers // recordings
    names = [f"id{10000 + s}/{i * 7919:011d}/{i % 100:05d}.wav" for i, s in enumerate(speaker)]
    centers = rng.normal(size=(speakers, dimension)).astype(np.float32)
    embeddings = centers[speaker] + 2 * rng.normal(size=(recordings, dimension)).astype(np.float32)
    enrol = rng.integers(recordings, size=trials)
    first = np.searchsorted(speaker, speaker[enrol])
    count = np.searchsorted(speaker, speaker[enrol], side="right") - first
    target = np.arange(trials) % 2 == 0
    test = np.where(target, first + rng.integers(1 << 40, size=trials) % count, rng.integers(recordings, size=trials))
    labels = (speaker[enrol] == speaker[test]).astype(int)
    lines = (f"{label} {names[a]} {names[b]}\n" for label, a, b in zip(labels, enrol, test))
    (folder / "trials.txt").write_text("".join(lines))
    return names, embeddings


def reference_rates(embeddings, pairs, target) -> dict[str, float]:
    """EER (percent) and minDCF by scikit-learn's ROC curve of cosines from one big product."""
    units = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    scores = (units[pairs[:, 0]] * units[pairs[:, 1]]).sum(axis=1)
    fpr, tpr, _ = roc_curve(target, scores, drop_intermediate=False)
    fnr = 1 - tpr
    after = int(np.argmax(fpr >= fnr))
    before = after - 1
    share = (fnr[before] - fpr[before]) / ((fnr[before] - fpr[before]) + (fpr[after] - fnr[after]))
    found = {"eer": 100 * (fnr[before] + share * (fnr[after] - fnr[before]))}
    for p in P_TARGETS:
        found[f"min_dcf_{p}"] = float(np.min(p * fnr + (1 - p) * fpr) / min(p, 1 - p))
    return found


def main(arguments=None) -> dict:
    """Runs the benchmark and prints what it found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=580_000)
    parser.add_argument("--recordings", type=int, default=145_000)
    parser.add_argument("--speakers", type=int, default=1251)
    parser.add_argument("--dimension", type=int, default=256)
    parser.add_argument("--replicates", type=int, default=1000, help="of the bootstrap")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    marks = [("", time.perf_counter(), time.process_time())]

    def mark(name):
        marks.append((name, time.perf_counter(), time.process_time()))

    with tempfile.TemporaryDirectory() as folder:
        names, embeddings = write_material(
            Path(folder), options.trials, options.recordings, options.speakers, options.dimension
        )
        mark("material")
        trials = read_trials(Path(folder) / "trials.txt")
        mark("read")
    pairs = trial_pairs(trials, names)
    mark("look_up")
    scores = metrics.cosine_scores(embeddings, pairs)
    mark("score")
    rates = error_report(scores, trials.target)
    mark("error_rates")
    reference = reference_rates(embeddings, pairs, trials.target)
    mark("reference")
    interval = error_intervals(scores, trials, replicates=options.replicates)["eer_interval"]
    mark("interval")
    took = {name: end - begin for (_, begin, _), (name, end, _) in zip(marks, marks[1:])}
    cpu = {name: end - begin for (_, _, begin), (name, _, end) in zip(marks, marks[1:])}
    ours = took["score"] + took["error_rates"]
    results = {
        "trials": len(trials),
        "seconds": took["read"] + took["look_up"] + ours,
        "cpu_seconds": sum(cpu[name] for name in ("read", "look_up", "score", "error_rates")),
        **{f"{name}_seconds": value for name, value in took.items() if name != "material"},
        "ratio": took["reference"] / ours,
        "difference": max(abs(rates[name] - value) for name, value in reference.items()),
        "eer": rates["eer"],
        "eer_interval": interval,
    }
    print(as_json(results) if options.json else "\n".join(f"{k:<22} {v}" for k, v in results.items()))
    return results


if __name__ == "__main__":
    main()
