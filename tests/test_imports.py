"""No circle among the modules, and every import goes to the same floor or a lower one of CONTRIBUTING.md's line."""

import ast
import functools
import graphlib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "memo_jax"
HEADING = "**A file imports only from its own floor or a lower one:**\n"


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in PACKAGE.rglob("*.py")}


@functools.cache
def imported_by(module):
    """Our modules that a module imports anywhere, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(FILES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in FILES else node.module for name in names}
    return found & FILES.keys()


def part_of(module):
    """The package or the file of `memo_jax/` that a module is or is in."""
    return module.split(".")[1] if "." in module else module


def test_no_module_imports_itself_through_others():
    graph = {module: imported_by(module) for module in FILES}
    assert "memo_jax.inference.embedder" in graph["memo_jax.cli"]  # which a function imports
    graphlib.TopologicalSorter(graph).prepare()  # CycleError names the circle


def test_every_import_goes_to_the_same_floor_or_a_lower_one():
    _, found, text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition(HEADING)
    assert found
    floors = text.partition("\n\n")[0].replace("\n", " ").rstrip(".").split(" → ")
    floor_of = {part: number for number, floor in enumerate(floors) for part in floor.split(", ")}
    floor_of |= {"memo_jax": 0, "__main__": 0}
    parts = {module: part_of(module) for module in FILES}
    assert set(parts.values()) == floor_of.keys()
    upwards = [
        f"{module} imports {other}"
        for module in FILES
        for other in imported_by(module)
        if floor_of[parts[module]] > floor_of[parts[other]]
    ]
    assert not upwards
