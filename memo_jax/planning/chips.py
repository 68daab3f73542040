"""TPUs and GPUs that programs can be compiled for without having one: data sheets, and compile-only devices."""

import importlib.metadata
import importlib.util
import os
import re
from typing import NamedTuple

import jax

from memo_jax.files import one_line


class Tpu(NamedTuple):
    """A TPU generation: peak of bfloat16 products (FLOP/s), memory (bytes), links (bytes/s), clock (Hz).

    From the pages of Cloud TPU; the clock follows from the peak of the matrix units. `cores` is libtpu's name for a
    chip whose cores are a single device, as they are for JAX.
    """

    peak: float
    memory: float
    links: float
    clock: float
    cores: str = "default"

    @property
    def compiler_options(self) -> dict:
        """Options that XLA compiles a plan's program with."""
        return {}


class Gpu(NamedTuple):
    """An Nvidia GPU: peak of bfloat16 products (FLOP/s), memory (bytes), links and network (bytes/s); and its parts.

    Peak, NVLink (one way) and network (a card per GPU) are from Nvidia's data sheets of its SXM form and HGX machines,
    the rest from XLA's own descriptions (openxla/xla, xla/backends/gpu/target_config/specs). With `has_cost_model`, XLA
    estimates how long operations take.
    """

    peak: float
    memory: float
    links: float
    network: float
    bandwidth: float
    name: str
    capability: int
    multiprocessors: int
    lanes: int  # float32 units of a multiprocessor
    shared_memory: int  # bytes of a multiprocessor
    cache: int  # bytes
    clock: float
    has_cost_model: bool = True

    @property
    def compiler_options(self) -> dict:
        """Options for estimates, and for cuBLAS: XLA's own products may fail to compile without a GPU."""
        return {"xla_gpu_enable_triton_gemm": False, "xla_gpu_collect_cost_model_stats": self.has_cost_model}

    def target_config(self) -> str:
        """Returns the GPU's description for XLA's compiler, a GpuTargetConfigProto as text."""
        extension = "ACCELERATED_FEATURES" if self.capability >= 9 else "NONE"
        return f"""
            gpu_device_info {{
              cuda_compute_capability {{ major: {self.capability} feature_extension: {extension} }}
              core_count: {self.multiprocessors} fpus_per_core: {self.lanes} clock_rate_ghz: {self.clock / 1e9}
              device_memory_size: {int(self.memory)} memory_bandwidth: {int(self.bandwidth)} l2_cache_size: {self.cache}
              shared_memory_per_core: {self.shared_memory} shared_memory_per_block: {48 * 1024}
              shared_memory_per_block_optin: {self.shared_memory - 1024}
              registers_per_core_limit: 65536 registers_per_block_limit: 65536
              threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
              thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
              block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
            }}
            platform_name: "CUDA"
            dnn_version_info {{ major: 9 minor: 10 }}
            device_description_str: "{self.name}"
        """


H100 = Gpu(
    989e12, 84_942_979_072, 450e9, 50e9, 3.352e12, "NVIDIA H100 80GB HBM3", 9, 132, 128, 228 * 1024, 50 * 2**20, 1.98e9
)
CHIPS = {
    "v4": Tpu(275e12, 32 * 2**30, 300e9, 1.05e9, "megacore"),
    "v5e": Tpu(197e12, 16 * 2**30, 200e9, 1.5e9),
    "v5p": Tpu(459e12, 95 * 2**30, 600e9, 1.75e9),
    "v6e": Tpu(918e12, 32 * 2**30, 400e9, 1.75e9),
    "a100": Gpu(
        312e12,
        85_100_068_864,
        300e9,
        25e9,
        2.039e12,
        "NVIDIA A100-SXM4-80GB",
        8,
        108,
        64,
        164 * 1024,
        40 * 2**20,
        1.41e9,
        has_cost_model=False,
    ),
    "h100": H100,
    "h200": H100._replace(memory=151_397_597_184, bandwidth=4.8e12, name="NVIDIA H200 141GB HBM3e"),
    "b200": Gpu(
        2250e12, 191_514_411_008, 900e9, 50e9, 7.672e12, "NVIDIA B200", 10, 148, 128, 228 * 1024, 132_644_864, 1.965e9
    ),
}
TOPOLOGY_SHAPES = {Tpu: r"\d+(x\d+){1,2}", Gpu: r"\d+(x\d+)?"}


def compile_only_devices(topology: str) -> tuple[Tpu | Gpu, list]:
    """Returns the kind of chip and compile-only devices of a topology such as "v5e:4x4" or "h100:8".

    "h100:8" is eight GPUs in one machine, "h100:4x8" four such machines, whose `links` are the slower of NVLink and all
    network cards of a machine.

    Raises:
      ValueError: no such topology.
      ImportError: the compiler for it is not installed, or this JAX has no topologies.
    """
    kind, _, shape = topology.partition(":")
    chip = CHIPS.get(kind)
    if chip is None or not re.fullmatch(TOPOLOGY_SHAPES[type(chip)], shape):
        raise ValueError(
            f"topology {topology!r}: give a kind of chip ({', '.join(CHIPS)}) and their number: for TPUs "
            "along each axis, such as v5e:4x4 or v5p:2x2x4; for GPUs in a machine, such as h100:8, after the number "
            "of machines if there are several, h100:4x8"
        )
    try:
        from jax.experimental.topologies import get_topology_desc
    except ImportError as error:  # experimental: another version of JAX may have moved it
        raise ImportError(
            f"planning needs jax.experimental.topologies, which jax {jax.__version__} does not have ({error}): install "
            "an earlier version, such as jax 0.10.2"
        ) from error
    if isinstance(chip, Gpu):
        if not any(
            plugin.name.startswith("xla_cuda") for plugin in importlib.metadata.entry_points(group="jax_plugins")
        ):
            raise ImportError("planning for a GPU needs JAX's CUDA plugin (no GPU): pip install 'memo-jax[cuda13]'")
        machines, gpus = (int(size) for size in f"1x{shape}".split("x")[-2:])
        if machines > 1:
            chip = chip._replace(links=min(chip.links, gpus * chip.network))
        described = {"platform": "cuda", "topology": f"1x{machines}x{gpus}", "target_config": chip.target_config()}
    else:
        if importlib.util.find_spec("libtpu") is None:
            raise ImportError("planning for a TPU needs its compiler, libtpu: pip install 'memo-jax[tpu-plan]'")
        # Only the compiler is used: libtpu need not look for a TPU, nor lock it against other processes.
        for name, value in (
            ("TPU_SKIP_MDS_QUERY", "1"),
            ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),
            ("TPU_WORKER_HOSTNAMES", "localhost"),
            ("TPU_WORKER_ID", "0"),
        ):
            os.environ.setdefault(name, value)
        described = {"platform": "tpu", "topology_name": topology, "chip_config_name": chip.cores}
        if set(shape.split("x")) == {"1"}:  # libtpu assumes hosts of four; that of JAX 0.10 refuses a part of one
            described["chips_per_host_bounds"] = [1, 1, 1]
    try:
        return chip, get_topology_desc(**described).devices
    except (jax.errors.JaxRuntimeError, RuntimeError, ValueError) as error:
        raise ValueError(f"topology {topology!r}: {one_line(error)}") from error
