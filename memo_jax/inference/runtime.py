"""What runs a network: JAX, or onnxruntime, which on CPUs starts sooner and is faster; the embeddings are the same.

onnxruntime needs the network as a graph. It is made once for every model, which takes JAX and the extra `onnx`, and
kept in the user's cache folder under the model's fingerprint. From then on neither JAX nor Flax is imported.
"""

import collections
import contextlib
import hashlib
import importlib.util
import os
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from memo_jax.files import replacing
from memo_jax.inference.batches import windows
from memo_jax.inference.model_file import Model, check_precision
from memo_jax.inference.telemetry import import_onnxruntime
from memo_jax.version import __version__
from memo_jax.xla.devices import chosen_devices

RUNTIMES = ("auto", "jax", "onnx")
MAGIC = b"memo-jax graph\n"
DIGEST_SIZE = hashlib.sha256().digest_size
ENDING = ".graph"
SOURCES = ("inference/onnx_graph.py", "features.py")  # code that decides what a graph is
READ_AHEAD = 4  # recordings, for each thread, that are read before their turn


def chosen_runtime(runtime: str = "auto") -> str:
    """Returns "jax" or "onnx"; "auto" is onnxruntime where it is installed and JAX has nothing but the CPU.

    Raises:
      ValueError: an unknown runtime. ImportError: "onnx" without the extra `onnx`.
    """
    if runtime not in RUNTIMES:
        raise ValueError(f"runtime {runtime!r}: choose one of {', '.join(RUNTIMES)}")
    if runtime == "jax":
        return runtime
    missing = [name for name in ("onnxruntime", "onnx", "spox") if importlib.util.find_spec(name) is None]
    if runtime == "auto":
        return "jax" if missing or _has_accelerator() else "onnx"
    if missing:
        raise ImportError(f"the runtime onnx needs the extra `onnx` ({missing[0]}): pip install 'memo-jax[onnx]'")
    return runtime


def _has_accelerator() -> bool:
    """Whether JAX would compute on something other than a CPU; JAX is imported only where it could."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    plugins = importlib.util.find_spec("jax_plugins") or importlib.util.find_spec("libtpu")
    if "jax" not in sys.modules and (platforms == "cpu" or not (platforms or plugins)):
        return False
    return chosen_devices()[0].platform != "cpu"


class OnnxFunction:
    """A network run by onnxruntime: int16 waves [N, L] at 16 kHz, zeros after lengths [N] → embeddings [N, D].

    Each recording is computed by itself, in a single thread, and as many at once as this process has cores: nothing is
    padded, and no thread waits for another.

    Args:
      graph: content of an ONNX file with the input `waveform` and the output `embs`.
    """

    def __init__(self, graph: bytes):
        onnxruntime = import_onnxruntime()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3  # errors, not warnings
        self._session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        self._threads = len(os.sched_getaffinity(0))

    def __call__(self, waves: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Embeds a batch; see the class."""
        alone = (wave[:length] for wave, length in zip(waves, lengths, strict=True))
        return np.stack([row for _, row in self.stream(enumerate(alone))])

    def stream(self, waves: Iterable[tuple[int, np.ndarray]]) -> Iterator[tuple[int, np.ndarray]]:
        """Yields (key, embedding [D]) for every (key, int16 wave [L]), in their order.

        A recording of several windows (`batches.windows`) yields the mean of their embeddings.
        """
        waiting: collections.deque[tuple[int, list]] = collections.deque()

        def next_row():
            key, parts = waiting.popleft()
            rows = [part.result() for part in parts]
            return key, np.mean(rows, axis=0) if len(rows) > 1 else rows[0]

        with ThreadPoolExecutor(self._threads) as pool:
            try:
                for key, wave in waves:
                    waiting.append((key, [pool.submit(self._embed, window) for window in windows(wave)]))
                    if len(waiting) > READ_AHEAD * self._threads:
                        yield next_row()
                while waiting:
                    yield next_row()
            finally:
                pool.shutdown(cancel_futures=True)

    def _embed(self, wave: np.ndarray) -> np.ndarray:
        return self._session.run(None, {"waveform": (wave.astype(np.float32) / 32768)[None]})[0][0]


def onnx_function(model: Model) -> OnnxFunction:
    """Returns a model's function for onnxruntime, with its graph from the cache, which is made if it is missing.

    Raises:
      NoGraphError: (a ValueError) the backbone has no ONNX graph.
      ValueError: the network does not compute in float32, as onnxruntime would.
      ModelFileError: (a ValueError) its variables are not those that the backbone needs.
    """
    check_precision(model)
    graph = cached_graph(model.fingerprint)
    if graph is None:
        from memo_jax.inference.onnx_file import waveform_graph

        graph = waveform_graph(model)
        with contextlib.suppress(OSError):  # a full or read-only cache only costs time
            _keep(model.fingerprint, graph)
    return OnnxFunction(graph)


def cached_graph(fingerprint: str) -> bytes | None:
    """Returns the graph of the model with this fingerprint, None if the cache has none or a damaged one."""
    try:
        content = graph_path(fingerprint).read_bytes()
    except OSError:
        return None
    start = len(MAGIC) + DIGEST_SIZE
    graph = content[start:]
    return graph if content[:start] == MAGIC + hashlib.sha256(graph).digest() else None


def graph_path(fingerprint: str) -> Path:
    """Returns where the graph of a model is kept; another version of the code that makes graphs uses another place."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    digest = hashlib.sha256(__version__.encode())
    for name in SOURCES:
        digest.update((Path(__file__).parents[1] / name).read_bytes())
    return Path(base, "memo_jax", "onnx", f"{fingerprint}-{digest.hexdigest()[:12]}{ENDING}")


def _keep(fingerprint: str, graph: bytes) -> None:
    """Writes a graph into the cache, whole or not at all, and removes those of other versions of this code."""
    path = graph_path(fingerprint)
    with replacing(path) as partial:
        partial.write_bytes(MAGIC + hashlib.sha256(graph).digest() + graph)
    for other in path.parent.glob(f"{fingerprint}-*{ENDING}"):
        if other != path:
            other.unlink(missing_ok=True)
