"""Reads the text of a compiled program (XLA's HLO): its collectives, and XLA's estimate of its time."""

import json
import math
import re
from collections.abc import Callable, Iterator

from memo_jax.planning.chips import Gpu, Tpu

INSTRUCTION = re.compile(
    r"^\s+(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<type>\(.*?\)|\S+) (?P<kind>[a-z][a-z\-]*)\((?P<rest>.*)"
)
ARRAY = re.compile(r"\b(pred|[a-z]+\d+)\w*\[([\d,]*)\]")
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
# On GPUs: instructions that do no work, or whose work is counted elsewhere.
NO_WORK = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "partition-id", "replica-id")
ESTIMATES = ("indexing-cost-model", "", "sol")  # XLA's cost models for GPUs, the one that knows tiles first


def collectives(text: str) -> dict[str, tuple[int, int]]:
    """Returns {kind: (number, bytes)} of a program's collectives; bytes are those of their results on a chip.

    In a loop they count as often as it runs.
    """
    found = {}
    for kind, size, _, runs in _collectives(text):
        count, total = found.get(kind, (0, 0))
        found[kind] = (count + runs, total + runs * size)
    return found


def collective_seconds(text: str, chip: Tpu | Gpu, chips: int) -> float:
    """Returns how long a compiled program's collectives take, in seconds, if nothing overlaps them.

    XLA's estimate where it has one (some GPUs), which includes latency; else bytes over links: a ring passes each part
    around twice to reduce, once to gather.
    """
    total = 0.0
    for kind, size, estimate, runs in _collectives(text):
        # Of a reduce-scatter, the size is that of one chip's share.
        rounds = {"all-reduce": 2, "reduce-scatter": chips}.get(kind, 1) * (chips - 1) / chips
        total += runs * (rounds * size / chip.links if estimate is None else estimate)
    return total


def _collectives(text: str) -> Iterator[tuple[str, int, float | None, int]]:
    """Yields kind, bytes and XLA's estimate in seconds of each collective, and how often it runs."""
    computations, entry = _computations(text)
    seen = set()

    def of(name, runs):
        for line in computations.get(name, ()):
            instruction = INSTRUCTION.match(line)
            if not instruction:
                continue
            trips = _trips(computations, line) if instruction["kind"] == "while" else 1
            for called in _called(line):
                yield from of(called, runs * trips)
            kind = instruction["kind"].removesuffix("-start")
            if kind not in COLLECTIVES:
                continue
            channel = re.search(r"channel_id=(\d+)", line)
            # A copy inside a fusion that overlaps it with other work. Collectives of `shard_map` all have channel 1.
            if channel and (kind, channel[1]) in seen:
                continue
            seen.add((kind, channel and channel[1]))
            arrays = [array for array in ARRAY.findall(instruction["type"]) if array != ("u32", "")]  # without contexts
            if instruction["kind"].endswith("-start") and kind != "all-reduce":  # operands come before results
                arrays = arrays[len(arrays) // 2 :]
            yield kind, sum(_bytes(*array) for array in arrays), _estimate(instruction["rest"]), runs

    yield from of(entry, 1)


def estimated_seconds(text: str, chip: Tpu | Gpu) -> float:
    """Returns how long a compiled program takes without its collectives, in seconds.

    A loop counts as often as it runs; for a conditional, the slowest branch counts. XLA's cost model writes an estimate
    beside each operation. It has none for convolutions, copies and Fourier transforms on GPUs, and none at all for some
    GPUs: these operations count by FLOPs at the peak or bytes at the memory's bandwidth, whichever takes longer.
    """
    if isinstance(chip, Tpu):
        return _total(text, _cycles) / chip.clock
    return _total(text, lambda line, types: _gpu_seconds(line, types, chip))


def _total(text: str, cost: Callable[[re.Match, dict], float]) -> float:
    """Returns the sum of cost(instruction, types of the instructions before it) over what a program runs."""
    computations, entry = _computations(text)

    def of(name):
        total, types = 0, {}
        for line in computations.get(name, ()):
            instruction = INSTRUCTION.match(line)
            if not instruction:
                continue
            types[instruction["name"]] = instruction["type"]
            if instruction["kind"] == "while":
                total += of(re.search(r"body=%?([\w.\-]+)", line)[1]) * _trips(computations, line)
            elif instruction["kind"] == "conditional":
                total += max(map(of, _branches(line)))
            elif instruction["kind"] == "call":
                total += of(re.search(r"to_apply=%?([\w.\-]+)", line)[1])
            else:
                total += cost(instruction, types)
        return total

    return of(entry)


def _computations(text: str) -> tuple[dict[str, list[str]], str | None]:
    computations, name, entry = {}, None, None
    for line in text.splitlines():
        begin = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if begin:
            name = begin[2]
            computations[name] = []
            entry = name if begin[1] else entry
        elif line.startswith("}"):
            name = None
        elif name:
            computations[name].append(line)
    return computations, entry


def _called(line: str) -> Iterator[str]:
    """Yields the computations that an instruction runs; of a loop, its body."""
    yield from re.findall(r"\b(?:calls|to_apply|body)=%?([\w.\-]+)", line)
    if " conditional(" in line:
        yield from _branches(line)


def _branches(line: str) -> Iterator[str]:
    named = re.search(r"branch_computations=\{(.*?)\}|true_computation=(\S+), false_computation=(\S+)", line)
    return (branch.strip(" %,") for branch in ",".join(filter(None, named.groups())).split(","))


def _trips(computations: dict[str, list[str]], loop: str) -> int:
    """Returns how often a loop runs: as XLA says beside it, or up to the constant that its condition compares with.

    1 where neither is there.
    """
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop)
    if known:
        return int(known[1])
    condition = computations.get(re.search(r"condition=%?([\w.\-]+)", loop)[1], ())
    constants = [int(found[1]) for line in condition if (found := re.search(r"s32\[\]\S* constant\((\d+)\)", line))]
    return constants[0] if len(constants) == 1 and any("direction=LT" in line for line in condition) else 1


def _cycles(instruction: re.Match, types: dict) -> int:
    estimate = re.search(r'"estimated_cycles":"(\d+)"', instruction["rest"])
    return int(estimate[1]) if estimate else 0


def _gpu_seconds(instruction: re.Match, types: dict, chip: Gpu) -> float:
    kind, rest = instruction["kind"], instruction["rest"]
    if kind in NO_WORK or kind.removesuffix("-start").removesuffix("-done") in COLLECTIVES:
        return 0
    estimate = _estimate(rest)
    if estimate is not None:
        return estimate
    operands = [types.get(name, "") for name in re.findall(r"%([\w.\-]+)", rest.partition(")")[0])]
    moved = sum(_bytes(*array) for array in ARRAY.findall(instruction["type"] + " ".join(operands)))
    return max(moved / chip.bandwidth, _library_flops(instruction, operands) / _peak(operands, rest, chip))


def _estimate(rest: str) -> float | None:
    """Returns the estimate of XLA's GPU compiler for an instruction, in seconds; None without one."""
    found = re.search(r'"reification_cost":(\[.*?\])', rest)
    estimates = {each["name"]: each["exec_time_us"] for each in json.loads(found[1])} if found else {}
    return next((estimates[name] / 1e6 for name in ESTIMATES if name in estimates), None)


def _library_flops(instruction: re.Match, operands: list[str]) -> float:
    """Returns the FLOPs of a cuDNN convolution or a cuBLAS product; 0 for anything else."""
    target = re.search(r'custom_call_target="__(cudnn\$conv(\w+?)|cublas\S*?)"', instruction["rest"])
    if not target:
        return 0
    left, right, result = (ARRAY.search(of) for of in (*operands[:2], instruction["type"]))
    if not target[2]:
        contracted = re.search(r'"lhs_contracting_dimensions":\["(\d+)"\]', instruction["rest"])
        return 2 * _elements(result[2]) * int(left[2].split(",")[int(contracted[1])])
    kernel, out = {"BackwardInput": (right, left), "BackwardFilter": (result, right)}.get(target[2], (right, result))
    features = re.search(r"dim_labels=\w+->(\w+)", instruction["rest"])[1].index("f")
    return 2 * _elements(out[2]) * _elements(kernel[2]) / int(out[2].split(",")[features])


def _peak(operands: list[str], rest: str, chip: Gpu) -> float:
    """Returns the peak FLOP/s for these operands: half in TensorFloat-32, and no matrix units in full float32."""
    if not operands or not operands[0].startswith(("f32", "(f32")):
        return chip.peak
    in_full = "operand_precision={highest" in rest
    return 2 * chip.multiprocessors * chip.lanes * chip.clock if in_full else chip.peak / 2


def _elements(shape: str) -> int:
    return math.prod(int(size) for size in shape.split(",") if size)


def _bytes(dtype: str, shape: str) -> int:
    return _elements(shape) * (8 if dtype == "pred" else int(re.search(r"\d+", dtype)[0])) // 8
