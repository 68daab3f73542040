"""What rounding and quantising cost: error rates of a model, its float16 model file and its ONNX files on trial lists.

    python experiments/benchmarks/export_weights.py --test speechocean762=DATASET,TRIALS --test … --json

Without --model, those of the package's network. Every form embeds the same recordings: a model file with JAX in
batches, ONNX files with onnxruntime, one recording at a time. Needs the extra `onnx`.

Prints for every list and form the EER in percent, minDCF at priors 0.01 and 0.05, the smallest and mean cosine between
its embeddings and the float32 model's, and the size of its file.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np

from memo_jax.data.batches import Utterances
from memo_jax.files import as_json
from memo_jax.inference.embedder import load_model
from memo_jax.inference.evaluate import TrialEvaluation
from memo_jax.inference.model_file import read_model, write_model
from memo_jax.inference.onnx_file import write_onnx
from memo_jax.inference.telemetry import import_onnxruntime
from memo_jax.scoring.metrics import unit_norm
from memo_jax.scoring.score import error_report, rates_text

ONNX_WEIGHTS = ("float32", "float16", "int8")


def onnx_function(path: Path):
    """Returns the function from int16 waves [N, L] and lengths [N] to embeddings [N, D] of an ONNX file."""
    session = import_onnxruntime().InferenceSession(path, providers=["CPUExecutionProvider"])
    dimension = session.get_outputs()[0].shape[1]

    def embed(waves, lengths):
        rows = np.zeros((len(waves), dimension), np.float32)
        for row, (wave, length) in enumerate(zip(waves, lengths, strict=True)):
            if length > 1:  # a batch is filled up with recordings of one sample
                (rows[row],) = session.run(None, {"waveform": wave[None, :length].astype(np.float32) / 32768})[0]
        return rows

    return embed


def write_forms(model, folder: Path) -> dict:
    """Writes a model in every form; returns {form: (path, its function from waves and lengths to embeddings)}."""
    forms = {}
    for weights in ("float32", "float16"):
        path = write_model(folder / f"{weights}.safetensors", model, weights)
        forms[f"model file, {weights}"] = (path, read_model(path).function)
    for weights in ONNX_WEIGHTS:
        path = write_onnx(folder / f"{weights}.onnx", model, weights=weights)
        forms[f"ONNX, {weights}"] = (path, onnx_function(path))
    return forms


def measure(model, tests: dict[str, tuple[Path, Path]]) -> list[dict]:
    """Returns a row for every test {name: (dataset, trial list)} and form."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        forms = write_forms(model, Path(folder))
        for test, (data, trials) in tests.items():
            evaluation, reference = TrialEvaluation(Utterances(data), trials), None
            if evaluation.target is None:
                raise ValueError(f"{trials} has no labels, so there are no error rates")
            for form, (path, function) in forms.items():
                embeddings = evaluation.embeddings(function, quiet=True)
                units = unit_norm(embeddings)
                reference = units if reference is None else reference
                cosines = (units * reference).sum(axis=1)
                rates = error_report(evaluation.scores(embeddings), evaluation.target)
                del rates["eer_threshold"]
                sizes = {"megabytes": path.stat().st_size / 1e6}
                likeness = {"min_cosine": float(cosines.min()), "mean_cosine": float(cosines.mean())}
                rows.append({"test": test, "form": form} | rates | likeness | sizes)
                print(row_text(rows[-1]), file=sys.stderr, flush=True)
    return rows


def row_text(row: dict) -> str:
    """Returns a row as a line for people."""
    cosine = f"cosine {row['mean_cosine']:.5f}, at least {row['min_cosine']:.5f}"
    return f"{row['test']:<18} {row['form']:<20} {rates_text(row)}, {cosine}, {row['megabytes']:.1f} MB"


def named_test(text: str) -> tuple[str, tuple[Path, Path]]:
    """Returns (name, (dataset, trial list)) of NAME=DATASET,TRIALS; argparse reports the error."""
    name, equals, paths = text.partition("=")
    data, comma, trials = paths.partition(",")
    if not (name and equals and data and comma and trials):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=DATASET,TRIALS")
    return name, (Path(data), Path(trials))


def main(arguments=None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="workdir or model file (default: the package's model)")
    parser.add_argument("--test", type=named_test, action="append", required=True, metavar="NAME=DATASET,TRIALS")
    parser.add_argument("--json", action="store_true", help="print JSON instead of lines")
    options = parser.parse_args(arguments)
    rows = measure(load_model(options.model), dict(options.test))
    print(as_json(rows) if options.json else "\n".join(map(row_text, rows)))
    return rows


if __name__ == "__main__":
    main()
