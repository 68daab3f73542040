"""Recordings on disk to embeddings: `memo-jax embed` beside others that run the same ECAPA-TDNN on the same cores.

    taskset -c 1 python experiments/benchmarks/embed.py --data speech/speechocean762/test --clock cpu --json

The others have the same weights:

* `pytorch`: 3D-Speaker's ECAPA-TDNN (speakerlab-slim, in speechbrain's form) after log-mel features by torch.stft.
* `onnxruntime`: the file that `memo-jax export name.onnx` writes, front end inside, with all graph optimisations and
  one thread per core.
* `sherpa_onnx`: its SpeakerEmbeddingExtractor with the file for it, whose features are sherpa-onnx's own in C++, so its
  embeddings differ; one thread per core.

They read recordings by soundfile and run one at a time, as their own examples do; the first two also in batches: sorted
by length and padded, which changes embeddings at the padded ends. Each side has a process of its own, and they take
turns.

Prints for each of them `ratio` (theirs ÷ ours in time, median of the runs), `spread` from the smallest to the largest,
`min_cosine` and `max_relative_difference` between their embeddings and ours; `audio_seconds_per_second` of all; and
`fraction_of_peak`: the FLOP of the network alone for these frames, over the total time, over the rate of one big matrix
product here.
"""

import argparse
import importlib.util
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
from memo_jax.files import as_json

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}  # the latter of all threads, where others use the cores
WIDTH = 512  # of the ECAPA-TDNN


class Timed(NamedTuple):
    """Seconds that embedding took, and the embeddings [N, D]."""

    seconds: float
    embeddings: np.ndarray


# ------------------------------------------------------------------------------ ours and others, in their processes


def load_ours(model: Path, runtime: str) -> None:
    """Prepares a process as the command `memo-jax embed` does."""
    global embedder
    from memo_jax import Embedder
    from memo_jax.xla.memory import keep_freed_memory
    from memo_jax.xla.program_cache import keep_compiled_programs

    keep_compiled_programs()
    keep_freed_memory()
    embedder = Embedder.load(model, runtime=runtime)


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


def runtime_of_ours() -> str:
    """What runs our network."""
    return embedder.runtime


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


def load_pytorch(model: Path, threads: int) -> None:
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


def run_pytorch(paths: list[str], clock: str, batch_size: int = 1) -> Timed:
    """Embeds one at a time, or in batches of recordings of similar length, padded."""
    import torch

    def embed(batch):
        lengths = torch.tensor([len(x) for x in batch])
        padded = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True)
        return network(padded, lengths / padded.shape[1]).numpy()

    with torch.inference_mode():
        return timed(paths, clock, batch_size, torch_features, embed)


def load_onnxruntime(model: Path, threads: int) -> None:
    """Exports our model file and opens it with onnxruntime."""
    global session
    from memo_jax.inference.model_file import read_model
    from memo_jax.inference.onnx_file import write_onnx
    from memo_jax.inference.telemetry import import_onnxruntime

    onnxruntime = import_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    path = write_onnx(model.with_suffix(".onnx"), read_model(model))
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def run_onnxruntime(paths: list[str], clock: str, batch_size: int = 1) -> Timed:
    """Embeds one at a time, or in batches of recordings of similar length, padded."""
    import soundfile

    def embed(batch):
        padded = np.zeros((len(batch), max(map(len, batch))), np.float32)
        for row, wave in zip(padded, batch):
            row[: len(wave)] = wave
        return session.run(None, {"waveform": padded})[0]

    return timed(paths, clock, batch_size, lambda path: soundfile.read(path, dtype="float32")[0], embed)


def load_sherpa_onnx(model: Path, threads: int) -> None:
    """Exports our model file for sherpa-onnx and opens it there."""
    global extractor
    import dataclasses

    import sherpa_onnx

    from memo_jax.inference.model_file import read_model
    from memo_jax.inference.onnx_file import write_onnx

    ours = dataclasses.replace(read_model(model), front_end="sherpa_fbank")
    path = write_onnx(model.with_suffix(".sherpa.onnx"), ours, inputs="feats", runtime="sherpa-onnx")
    extractor = sherpa_onnx.SpeakerEmbeddingExtractor(
        sherpa_onnx.SpeakerEmbeddingExtractorConfig(model=str(path), num_threads=threads)
    )


def run_sherpa_onnx(paths: list[str], clock: str, batch_size: int = 1) -> Timed:
    """Embeds one at a time."""
    import soundfile

    def embed(batch):
        stream = extractor.create_stream()
        stream.accept_waveform(16000, batch[0])
        stream.input_finished()
        return [np.array(extractor.compute(stream), np.float32)]

    return timed(paths, clock, 1, lambda path: soundfile.read(path, dtype="float32")[0], embed)


def timed(paths, clock, batch_size, read, embed) -> Timed:
    """Runs one of the others: `read` a path, `embed` a list of what it returns, sorted by length if of several."""
    begun, found = CLOCKS[clock](), {}
    if batch_size == 1:
        for path in paths:
            found[path] = embed([read(path)])[0]
    else:
        inputs = sorted(((path, read(path)) for path in paths), key=lambda item: len(item[1]))
        for start in range(0, len(inputs), batch_size):
            names, batch = zip(*inputs[start : start + batch_size])
            found |= zip(names, embed(batch))
    seconds = CLOCKS[clock]() - begun
    return Timed(seconds, np.stack([found[path] for path in paths]))


class Other(NamedTuple):
    """One to compare with: what it needs, how its process begins, how it runs, and whether in batches too."""

    needs: dict[str, str]  # modules, and the packages that have them
    load: Callable
    run: Callable
    batched: bool


OTHERS = {
    "pytorch": Other(
        {"torch": "torch", "speakerlab": "speakerlab-slim (without its dependencies)"}, load_pytorch, run_pytorch, True
    ),
    "onnxruntime": Other(
        {"onnxruntime": "memo-jax[onnx]", "spox": "memo-jax[onnx]"}, load_onnxruntime, run_onnxruntime, True
    ),
    "sherpa_onnx": Other(
        {"sherpa_onnx": "sherpa-onnx", "spox": "memo-jax[onnx]"}, load_sherpa_onnx, run_sherpa_onnx, False
    ),
}


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
    """Runs all sides in turns; the first run of each, in which programs are compiled, does not count."""
    from memo_jax.audio import SAMPLE_RATE, audio_seconds
    from memo_jax.features import HOP
    from memo_jax.log import progress

    clock, processes = options.clock, multiprocessing.get_context("spawn")
    durations = [audio_seconds(path) for path in paths]
    frames = sum(1 + int(s * SAMPLE_RATE) // HOP for s in durations)
    ours = ProcessPoolExecutor(1, processes, load_ours, (model, options.runtime))
    pools = [ours]
    sides: dict[str, Callable[[], Timed]] = {"ours": lambda: ours.submit(run_ours, paths, clock).result()}

    def add(name, pool, run, batch_size):
        sides[name] = lambda: pool.submit(run, paths, clock, batch_size).result()

    for name in options.against:
        other = OTHERS[name]
        pools.append(ProcessPoolExecutor(1, processes, other.load, (model, threads)))
        add(name, pools[-1], other.run, 1)
        if other.batched:
            add(f"{name}_batched", pools[-1], other.run, options.batch_size)
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
        "runtime": ours.submit(runtime_of_ours).result(),
        "clock": clock,
        "runs": options.runs,
        "first_run_seconds": first["ours"].seconds,
        "seconds": taken,
        "audio_seconds_per_second": {side: sum(durations) / seconds for side, seconds in middle.items()},
        "matmul_gflops": max(rates) / 1e9,
        "fraction_of_peak": flops / middle["ours"] / max(rates),
    }
    b = first["ours"].embeddings
    for side in list(sides)[1:]:
        ratios = [other / own for other, own in zip(taken[side], taken["ours"])]
        a = first[side].embeddings
        results[side] = {
            "ratio": median(ratios),
            "spread": [min(ratios), max(ratios)],
            "min_cosine": float(cosines(a, b).min()),
            "max_relative_difference": float((np.abs(a - b).max(1) / np.abs(a).max(1)).max()),
        }
    for pool in pools:
        pool.shutdown()
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
    parser.add_argument("--runtime", default="auto", help="of ours: jax or onnx (default: as the command chooses)")
    parser.add_argument("--against", nargs="*", choices=OTHERS, help="whom to compare with (default: those installed)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    asked = list(OTHERS) if options.against is None else options.against
    lacking = {}
    for name in asked:
        if packages := [p for module, p in OTHERS[name].needs.items() if importlib.util.find_spec(module) is None]:
            lacking[name] = " and ".join(sorted(set(packages)))
    for name, packages in lacking.items():
        print(f"embed.py: {name} needs {packages}, which is not installed here", file=sys.stderr)
    if lacking and options.against is not None:
        return 2
    options.against = [name for name in asked if name not in lacking]
    with tempfile.TemporaryDirectory(prefix="memo-jax-benchmark-") as folder:
        model = Path(folder) / "ecapa.safetensors"
        write_network(model, options.width)
        paths = chosen_recordings(options.data, options.utterances, Path(folder), options.seconds)
        results = compare(paths, model, options, len(os.sched_getaffinity(0)))
    print(as_json(results) if options.json else "\n".join(f"{k:<26} {v}" for k, v in results.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
