"""Recordings on disk to embeddings: `memo-jax embed` beside the same ECAPA-TDNN under PyTorch, on the same cores.

    taskset -c 1 python experiments/benchmarks/embed.py --data speech/speechocean762/test --clock cpu --json

Theirs is 3D-Speaker's ECAPA-TDNN (speakerlab-slim, in speechbrain's form) with the same weights, after log-mel features
by torch.stft; recordings are read by soundfile. It runs once with one recording at a time, as wespeaker, 3D-Speaker
and the MeMo authors do, and once in batches: sorted by length and padded, with lengths, which slightly changes
embeddings at the padded ends. Each side has a process of its own, and they take turns.

Prints `ratio` and `ratio_batched` (theirs ÷ ours in time, median of the runs, and the `spread` from the smallest to the
largest), `min_cosine` and `max_relative_difference` between ours and theirs one at a time, `min_cosine_batched`,
`audio_seconds_per_second` of all three, and `fraction_of_peak`: what the network alone must compute for the frames that
there are, in the time of the whole, of the rate of one big matrix product here.
"""

import argparse
import importlib.util
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np

from machine import best_seconds

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}  # the latter of all threads, where others use the cores
WIDTH = 512  # of the ECAPA-TDNN


class Timed(NamedTuple):
    """Seconds that embedding took, and the embeddings [N, D]."""

    seconds: float
    embeddings: np.ndarray


# ------------------------------------------------------------------------------- ours and theirs, in their processes


def load_ours(model: Path) -> None:
    """Prepares a process as the command `memo-jax embed` does."""
    global embedder
    from memo_jax import Embedder, cli

    cli.keep_compiled_programs()
    cli.keep_freed_memory()
    embedder = Embedder.load(model)


def run_ours(paths: list[str], clock: str) -> Timed:
    """What the command does: files to a file of embeddings."""
    from memo_jax.inference.embed_recordings import embed_recordings
    from memo_jax.scoring.embedding_file import read_embeddings

    with tempfile.TemporaryDirectory() as folder:
        output, begun = Path(folder) / "embeddings.npz", CLOCKS[clock]()
        embed_recordings(embedder, paths, output, quiet=True)
        seconds = CLOCKS[clock]() - begun
        found = read_embeddings(output)
        return Timed(seconds, found.embeddings[[list(found.names).index(path) for path in paths]])


def matmul_rate(clock: str, size: int = 1024) -> float:
    """FLOP per second of the fastest of several products of square matrices."""
    import jax

    product, matrix = jax.jit(lambda a: a @ a), jax.random.normal(jax.random.key(0), (size, size))
    return 2 * size**3 / best_seconds(lambda: product(matrix).block_until_ready(), CLOCKS[clock], 20)


def network_flops(frames: int) -> float:
    """FLOP of the network alone for a number of frames, by XLA's count."""
    import jax

    model = embedder.model

    def flops(count):
        x = jax.ShapeDtypeStruct((1, count, 80), np.float32)
        return jax.jit(model.module.apply).lower(model.variables, x).cost_analysis()["flops"]

    return (flops(300) - flops(200)) / 100 * frames


def load_theirs(model: Path, threads: int) -> None:
    """Builds the PyTorch network with the weights of our model file."""
    global network, window, filters
    import torch
    from speakerlab.models.ecapa_tdnn.ECAPA_TDNN import ECAPA_TDNN

    from memo_jax import features
    from memo_jax.inference import interop
    from memo_jax.inference.model_file import read_model

    torch.set_num_threads(threads)
    ours = read_model(model)
    network = ECAPA_TDNN(80, lin_neurons=ours.dimension, channels=list(ours.arguments["channels"])).eval()
    tensors = interop.backbone_to_torch(ours.variables, "3dspeaker", "ecapa")
    missing = network.load_state_dict({k: torch.from_numpy(v) for k, v in tensors.items()}, strict=False)
    assert not missing.unexpected_keys and all(name.endswith(interop.COUNTER) for name in missing.missing_keys), missing
    window, filters = torch.hann_window(features.WINDOW), torch.from_numpy(features._mel_basis())


def torch_features(path: str):
    """Normalised log-mel [T, 80] of a file, as the MeMo authors compute it."""
    import soundfile
    import torch

    wave = torch.from_numpy(soundfile.read(path, dtype="float32")[0])
    spectrum = torch.stft(wave, 512, 160, 400, window, center=True, pad_mode="reflect", return_complex=True)
    log_mel = torch.log(spectrum.abs().square().T[:, : len(filters)] @ filters + 1e-6)
    return (log_mel - log_mel.mean(0)) / torch.sqrt(log_mel.var(0, unbiased=False) + 1e-5)


def run_theirs(paths: list[str], clock: str, batch_size: int = 1) -> Timed:
    """Embeds one at a time, or in batches of recordings of similar length, padded."""
    import torch

    begun, found = CLOCKS[clock](), {}
    with torch.inference_mode():
        if batch_size == 1:
            for path in paths:
                found[path] = network(torch_features(path)[None])[0].numpy()
        else:
            inputs = sorted(((path, torch_features(path)) for path in paths), key=lambda item: len(item[1]))
            for start in range(0, len(inputs), batch_size):
                names, batch = zip(*inputs[start : start + batch_size])
                lengths = torch.tensor([len(x) for x in batch])
                padded = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True)
                found |= zip(names, network(padded, lengths / padded.shape[1]).numpy())
    seconds = CLOCKS[clock]() - begun
    return Timed(seconds, np.stack([found[path] for path in paths]))


# ------------------------------------------------------------------------------------------------- the comparison


def write_network(path: Path, width: int) -> None:
    """Writes a model file: an ECAPA-TDNN with random weights and statistics."""
    import jax
    import jax.numpy as jnp

    from memo_jax.inference.model_file import model_of_backbone, write_model
    from memo_jax.models import build_backbone

    backbone = build_backbone("ecapa", channels=(width,) * 4 + (3 * width,), embedding_dim=width // 2)
    shapes = jax.eval_shape(backbone.init, jax.random.key(0), jnp.zeros((1, 32, 80)))
    rng = np.random.default_rng(0)

    def drawn(path, leaf):
        if path[-1].key == "kernel":
            return rng.normal(0, (2 / np.prod(leaf.shape[:-1])) ** 0.5, leaf.shape).astype(np.float32)
        low, high = (0.5, 1.5) if path[-1].key in ("var", "scale") else (-0.3, 0.3)
        return rng.uniform(low, high, leaf.shape).astype(np.float32)

    write_model(path, model_of_backbone(backbone, jax.tree_util.tree_map_with_path(drawn, shapes)))


def chosen_recordings(folder: Path | None, count: int, made: Path, seconds: float) -> list[str]:
    """Paths of recordings, evenly spaced through a folder, or made here."""
    from memo_jax.audio import is_audio_name

    if folder is None:
        import soundfile

        from synthetic import cuts, utterance_lengths

        rng = np.random.default_rng(0)
        for i, samples in enumerate(cuts(rng, utterance_lengths(rng, count, seconds))):
            soundfile.write(made / f"{i:05d}.wav", samples, 16000)
        folder = made
    paths = sorted(str(path) for path in folder.rglob("*") if is_audio_name(path))
    if not paths:
        raise SystemExit(f"{folder}: no recordings")
    return [paths[i] for i in np.linspace(0, len(paths) - 1, min(count, len(paths))).astype(int)]


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine of each row of one with the same row of the other."""
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


def compare(paths: list[str], model: Path, options, threads: int) -> dict:
    """Runs both sides in turns; the first run of each, in which programs are compiled, does not count."""
    from memo_jax.audio import audio_seconds
    from memo_jax.features import HOP, SAMPLE_RATE
    from memo_jax.log import progress

    clock, processes = options.clock, multiprocessing.get_context("spawn")
    durations = [audio_seconds(path) for path in paths]
    frames = sum(1 + int(s * SAMPLE_RATE) // HOP for s in durations)
    ours = ProcessPoolExecutor(1, processes, load_ours, (model,))
    sides: dict[str, Callable[[], Timed]] = {"ours": lambda: ours.submit(run_ours, paths, clock).result()}
    if not options.ours_only:
        theirs = ProcessPoolExecutor(1, processes, load_theirs, (model, threads))
        sides["theirs"] = lambda: theirs.submit(run_theirs, paths, clock).result()
        sides["theirs_batched"] = lambda: theirs.submit(run_theirs, paths, clock, options.batch_size).result()
    first = {side: run() for side, run in sides.items()}
    taken: dict[str, list[float]] = {side: [] for side in sides}
    rates = []
    for _ in progress(range(options.runs), options.runs, "embed", "run"):
        rates.append(ours.submit(matmul_rate, clock).result())
        for side, run in sides.items():
            taken[side].append(run().seconds)
    middle = {side: median(seconds) for side, seconds in taken.items()}
    flops = ours.submit(network_flops, frames).result()
    results = {
        "recordings": len(paths),
        "audio_seconds": sum(durations),
        "threads": threads,
        "clock": clock,
        "runs": options.runs,
        "first_run_seconds": first["ours"].seconds,
        "seconds": taken,
        "audio_seconds_per_second": {side: sum(durations) / seconds for side, seconds in middle.items()},
        "matmul_gflops": max(rates) / 1e9,
        "fraction_of_peak": flops / middle["ours"] / max(rates),
    }
    for side, key in (("theirs", "ratio"), ("theirs_batched", "ratio_batched")):
        if side in sides:
            ratios = [a / b for a, b in zip(taken[side], taken["ours"])]
            results |= {key: median(ratios), f"{key}_spread": [min(ratios), max(ratios)]}
            results[key.replace("ratio", "min_cosine")] = float(
                cosines(first[side].embeddings, first["ours"].embeddings).min()
            )
    if "theirs" in sides:
        a, b = first["theirs"].embeddings, first["ours"].embeddings
        results["max_relative_difference"] = float((np.abs(a - b).max(1) / np.abs(a).max(1)).max())
    for side in sides:
        (ours if side == "ours" else theirs).shutdown()
    return results


def main() -> int:
    """Parses, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder of 16-kHz recordings (default: made here)")
    parser.add_argument("--utterances", type=int, default=100, help="how many of them (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=8.0, help="mean of those made here (default: %(default)s)")
    parser.add_argument("--width", type=int, default=WIDTH, help="channels of the network (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, help="of theirs, batched (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="default: %(default)s")
    parser.add_argument("--ours-only", action="store_true", help="without PyTorch")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    needed = {"torch": "torch", "speakerlab": "speakerlab-slim, without its dependencies"}
    lacking = [text for name, text in needed.items() if importlib.util.find_spec(name) is None]
    if lacking and not options.ours_only:
        print(
            f"embed.py compares with PyTorch and needs {' and '.join(lacking)}: `make parity` makes an environment, "
            ".venv-parity, that has them; or measure ours alone with --ours-only",
            file=sys.stderr,
        )
        return 2
    with tempfile.TemporaryDirectory(prefix="memo-jax-benchmark-") as folder:
        model = Path(folder) / "ecapa.safetensors"
        write_network(model, options.width)
        paths = chosen_recordings(options.data, options.utterances, Path(folder), options.seconds)
        results = compare(paths, model, options, len(os.sched_getaffinity(0)))
    print(json.dumps(results, indent=2) if options.json else "\n".join(f"{k:<26} {v}" for k, v in results.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
