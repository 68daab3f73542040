"""How a training step's time, memory and compile time grow with its sizes.

    python experiments/benchmarks/scaling.py [--axes batch,prototypes,seconds,branches,devices] [--output FOLDER]
        [--json] [--config.KEY=VALUE …]

Starting from a small MeMo, configs/study.py, one size at a time changes: utterances in a batch, prototypes of a head,
seconds of a crop, branches that learn together, devices (virtual ones, which share this machine's cores and one batch).
Each point is a process of its own, without a cache of compiled programs. Prints for each point the CPU-seconds of a
step (median) and of compiling it, and the memory of the compiled step on a device: arguments and temporaries by XLA's
analysis. `growth` is, for each axis, the exponent p of size^p between its smallest and its largest point: 1 is linear
growth. With --output, scaling.json and scaling.png are written there.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

from memo_jax.files import as_json

AXES = {
    "batch": (4, 8, 16, 32),
    "prototypes": (1024, 4096, 16384, 65536),
    "seconds": (0.5, 1.0, 2.0, 4.0),
    "branches": (1, 2, 3),
    "devices": (1, 2, 4),
}
BASE = {"batch": 8, "prototypes": 4096, "seconds": 1.0, "branches": 2, "devices": 1}
BRANCHES = ("ecapa", "resnet", "campplus")
QUANTITIES = {
    "step_cpu_seconds": "CPU-seconds a step",
    "compile_cpu_seconds": "CPU-seconds to compile",
    "megabytes": "memory of a device, MB",
}
CONFIG = Path(__file__).resolve().parents[2] / "configs" / "study.py"


def measured(point: dict, steps: int, overrides: list[str]) -> dict:
    """Returns what a step at a point takes, of a config with these overrides; the devices must be there."""
    import jax

    from memo_jax import config as configs
    from memo_jax.training import program
    from memo_jax.training import recipe as recipes
    from memo_jax.xla import sharding
    from memo_jax.xla.memory import keep_freed_memory
    from synthetic import example_banks, example_batch

    keep_freed_memory()
    config = configs.load_config(
        CONFIG,
        [
            f"--config.data.batch_size={point['batch']}",
            f"--config.model.prototypes={point['prototypes']}",
            f"--config.data.global_seconds={point['seconds']}",
            f"--config.data.local_seconds={0.6 * point['seconds']}",
            f"--config.model.branches={','.join(BRANCHES[: point['branches']])}",
            f"--config.loss.cross={float(point['branches'] > 1)}",
            *overrides,
        ],
    )
    recipe, mesh = recipes.build_recipe(config, 100), sharding.data_mesh()
    assert len(mesh.devices.flat) == point["devices"], mesh
    state = program.create_state(config, recipe, mesh)
    batch, banks, key = example_batch(config), example_banks(), jax.random.key(0)
    step = program.jitted_step(config, recipe, mesh, state).lower(state, batch, banks, key)
    begin = time.process_time()
    step = step.compile()
    compile_seconds, times = time.process_time() - begin, []
    batch, banks, key = jax.device_put((batch, banks, key), step.input_shardings[0][1:])
    for _ in range(steps + 1):
        begin = time.process_time()
        state, _ = jax.block_until_ready(step(state, batch, banks, key))
        times.append(time.process_time() - begin)
    memory = step.memory_analysis()
    return {
        "step_cpu_seconds": sorted(times[1:])[steps // 2],
        "compile_cpu_seconds": compile_seconds,
        "megabytes": (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 1e6,
    }


def measured_apart(point: dict, steps: int, overrides: list[str]) -> dict:
    """Returns what `measured` does in a process of its own with as many virtual devices as the point has."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={point['devices']}".strip()
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    done = subprocess.run(
        [sys.executable, __file__, "--point", json.dumps(point), "--steps", str(steps), *overrides],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
    )
    if done.returncode:
        raise SystemExit(f"the process that measured {point} ended with status {done.returncode}")
    return json.loads(done.stdout)


def growth(rows: list[dict], axis: str) -> dict:
    """Returns {quantity: exponent between the smallest and the largest point of the axis}."""
    first, last = rows[0], rows[-1]
    return {name: math.log(last[name] / first[name]) / math.log(last[axis] / first[axis]) for name in QUANTITIES}


def draw(rows: dict, path: Path) -> None:
    """Draws every quantity over every axis, both logarithmic, with linear growth from the first point beside it."""
    import matplotlib
    from matplotlib.figure import Figure

    from memo_jax.scoring.figures import BLUE, MUTED, STYLE, save_figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(1 + 2.2 * len(rows), 2 * len(QUANTITIES)), layout="constrained")
        axes = figure.subplots(len(QUANTITIES), len(rows), squeeze=False, sharex="col", sharey="row")
        for column, (axis, points) in enumerate(rows.items()):
            sizes = [point[axis] for point in points]
            for row, (name, label) in enumerate(QUANTITIES.items()):
                plot, values = axes[row][column], [point[name] for point in points]
                plot.loglog(sizes, [values[0] * size / sizes[0] for size in sizes], ":", color=MUTED, label="linear")
                plot.loglog(sizes, values, "o-", color=BLUE, markersize=4, label="measured")
                plot.set_xticks(sizes, [f"{size:,g}" for size in sizes])
                plot.minorticks_off()
                if column == 0:
                    plot.set_ylabel(label)
            axes[-1][column].set_xlabel({"seconds": "seconds of a global crop"}.get(axis, axis))
        axes[0][0].legend()
        save_figure(figure, path)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--axes", default=",".join(AXES), help=f"of {', '.join(AXES)} (default: all)")
    parser.add_argument("--points", type=int, default=4, help="at most this many of each axis (default: 4, all)")
    parser.add_argument("--steps", type=int, default=3, help="that are timed, after one that is not (default: 3)")
    parser.add_argument("--output", type=Path, help="folder for scaling.json and scaling.png")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--point", type=json.loads, help=argparse.SUPPRESS)
    return parser


def main(arguments=None) -> dict | None:
    """Measures and prints."""
    options, overrides = build_parser().parse_known_args(arguments)
    if options.point:
        print(json.dumps(measured(options.point, options.steps, overrides)))
        return None
    from memo_jax.log import progress

    axes = options.axes.split(",")
    if unknown := set(axes) - set(AXES):
        raise SystemExit(f"scaling.py: no axis {', '.join(sorted(unknown))}: choose from {', '.join(AXES)}")
    points = [BASE | {axis: size} for axis in axes for size in AXES[axis][: options.points]]
    points = [dict(items) for items in dict.fromkeys(tuple(point.items()) for point in points)]
    found = [
        point | measured_apart(point, options.steps, overrides)
        for point in progress(points, label="scale", unit="point")
    ]
    rows = {
        axis: sorted(
            (row for row in found if all(row[key] == BASE[key] for key in BASE if key != axis)),
            key=lambda row: row[axis],
        )
        for axis in axes
    }
    result = {"rows": rows, "growth": {axis: growth(rows[axis], axis) for axis in axes}}
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "scaling.json").write_text(as_json(result) + "\n", encoding="utf-8")
        draw(rows, options.output / "scaling.png")
    if options.json:
        print(json.dumps(result))
        return result
    for axis in axes:
        print(f"\n| {axis} | {' | '.join(QUANTITIES.values())} |\n|{'---|' * (1 + len(QUANTITIES))}")
        for row in rows[axis]:
            print(
                f"| {row[axis]:g} | {row['step_cpu_seconds']:.3f} | {row['compile_cpu_seconds']:.1f} "
                f"| {row['megabytes']:.0f} |"
            )
        exponents = (f"{name} {value:.2f}" for name, value in result["growth"][axis].items())
        print(f"growth with {axis}: size to the power of {', '.join(exponents)}")
    return result


if __name__ == "__main__":
    main()
