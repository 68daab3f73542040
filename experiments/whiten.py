"""Whitens a network's embeddings by recordings of unknown speakers, and folds that into its last layer.

    python experiments/whiten.py --model runs/contrastive --data data/train --output whitened.safetensors

The halves of a recording are of one speaker, whoever it is, so their differences tell, without labels, in which
directions embeddings vary for other reasons. Three steps, each linear, computed from the embeddings of both halves:

1. the mean is subtracted;
2. within-class covariance normalisation (Hatch et al., Interspeech 2006), a recording being a class: times the inverse
   square root of W + floor · (mean eigenvalue of W), where W is the covariance of the halves about their mean;
3. partial whitening: times (T + the same floor)^(-power/2), where T is the covariance of what step 2 leaves.

W and T are those of unit vectors. As the last layer of the networks is affine, the product is again such a
network.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

import numpy as np


class Halves:
    """The first halves of recordings, or their second ones."""

    def __init__(self, recordings, second: bool):
        self.recordings, self.second = recordings, second

    def __len__(self):
        return len(self.recordings)

    def __getitem__(self, index) -> np.ndarray:
        wave = self.recordings[index]
        middle = len(wave) // 2
        return wave[middle:] if self.second else wave[:middle]


def inverse_power(covariance: np.ndarray, power: float, floor: float) -> np.ndarray:
    """Returns (C + floor · mean eigenvalue · 1)^(-power/2) of a covariance [D, D]."""
    values, vectors = np.linalg.eigh(covariance)
    values = np.maximum(values, 0) + floor * max(values.mean(), np.finfo(float).tiny)
    return (vectors * values ** (-power / 2)) @ vectors.T


def whitening(first: np.ndarray, second: np.ndarray, power: float, floor: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns (mean [D], matrix [D, D]): an embedding e becomes (e − mean) @ matrix.

    Args:
      first: embeddings [N, D] of the first halves of N recordings.
      second: those of the second halves.
      power: of step 3; 0 leaves it out, 1 whitens.
      floor: how far eigenvalues are kept from zero, as a share of their mean.
    """
    halves = np.stack([first, second]).astype(np.float64)
    mean = halves.mean(axis=(0, 1))
    unit = halves - mean
    unit /= np.maximum(np.linalg.norm(unit, axis=-1, keepdims=True), 1e-12)
    difference = unit[0] - unit[1]
    within = inverse_power(difference.T @ difference / (2 * len(difference)), 1.0, floor)
    total = within @ np.cov(unit.reshape(-1, unit.shape[-1]).T) @ within
    return mean, within @ inverse_power(total, power, floor)


def folded(model, mean: np.ndarray, matrix: np.ndarray, **provenance):
    """Returns the model whose embeddings are (e − mean) @ matrix of the given model's e.

    Raises ValueError for a network whose last layer is not affine.
    """
    after = {"ecapa": "embedding_norm", "resnet": "second_embedding"}  # what may come after the layer
    if model.backbone not in after or model.arguments.get(after[model.backbone]):
        raise ValueError(
            f"only an ecapa without embedding_norm or a resnet without second_embedding can be whitened, not "
            f"{model.backbone} with {dict(model.arguments)}"
        )
    layer = model.variables["params"]["embedding"]
    layer = {
        "kernel": (np.asarray(layer["kernel"], np.float64) @ matrix).astype(np.float32),
        "bias": ((np.asarray(layer["bias"], np.float64) - mean) @ matrix).astype(np.float32),
    }
    variables = dict(model.variables) | {"params": dict(model.variables["params"]) | {"embedding": layer}}
    # A threshold was tuned on other scores.
    return dataclasses.replace(
        model, variables=variables, decision=None, provenance=dict(model.provenance) | {"whitened": provenance}
    )


def main(arguments=None) -> int:
    """Runs the command line; returns its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", required=True, help="workdir of a run, or a model file")
    parser.add_argument("--branch", help="of a workdir: which backbone, ecapa or the first by default")
    parser.add_argument("--role", choices=("teacher", "student"), help="of a workdir: which network")
    parser.add_argument("--step", type=int, help="of a workdir: which checkpoint, the last by default")
    parser.add_argument("--data", type=Path, required=True, help="dataset whose recordings are used, none of a trial")
    parser.add_argument("--recordings", type=int, default=2000, help="how many of them, drawn by the seed")
    parser.add_argument("--power", type=float, default=0.25, help="of the last step: 0 leaves it out, 1 whitens")
    parser.add_argument("--floor", type=float, default=0.1, help="least eigenvalue, as a share of the mean one")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of recordings")
    parser.add_argument("--output", type=Path, required=True, help="model file to write")
    options = parser.parse_args(arguments)

    from memo_jax.data.batches import Utterances
    from memo_jax.inference.batches import apply_to_recordings
    from memo_jax.inference.embedder import load_model
    from memo_jax.inference.model_file import write_model

    try:
        model = load_model(options.model, branch=options.branch, role=options.role, step=options.step)
        data = Utterances(options.data)
        folded(model, np.zeros(model.dimension), np.eye(model.dimension))  # fails before the work, not after it
        rows = np.sort(np.random.default_rng(options.seed).permutation(len(data))[: options.recordings])
        if len(rows) <= model.dimension:
            raise ValueError(f"{len(rows)} recordings are too few for embeddings of {model.dimension} numbers")
        halves = [apply_to_recordings(model.function, Halves(data, second), rows) for second in (False, True)]
        mean, matrix = whitening(*halves, options.power, options.floor)
        said = {"recordings": len(rows), "fingerprint": data.fingerprint, "power": options.power}
        said |= {"floor": options.floor, "seed": options.seed}
        write_model(options.output, folded(model, mean, matrix, **said))
    except (ValueError, OSError) as error:
        print(f"whiten.py: error: {error}", file=sys.stderr)
        return 2
    print(f"{options.output}: whitened by {len(rows)} recordings of {options.data}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
