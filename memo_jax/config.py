"""Configs: a Python file with `get_config()`, command-line overrides, JSON and back, durations in epochs or steps."""

import ast
import difflib
import importlib
import json
import math
import os
import sys
import traceback
import types
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ml_collections import config_dict
from ml_collections.config_dict import ConfigDict, FieldReference

from memo_jax.files import as_path, in_bucket, parse_json, read_text, write_text

CONFIG_FILE = "config.json"
TYPES = {kind.__name__: kind for kind in (bool, int, float, str, tuple, list)}


def load_config(path: str | os.PathLike, overrides: Iterable[str] = ()) -> ConfigDict:
    """Runs a config file and applies overrides.

    The file defines `get_config()` (or `get_config(arg)`, given as "file.py:arg"). It may import the files beside it by
    name: `import base` in configs/demo.py always means configs/base.py, even if another module has that name. If there
    is no such file beside it, the packaged config of that name is imported.

    Args:
      path: the config file, absolute or relative to the current folder, or the bare name of a packaged config,
        such as "small" (`packaged_configs`).
      overrides: texts like "--config.optim.lr=0.1", in the order to apply them. A value is read as the type it
        replaces: int, float (an int will do), bool (true, false, 1, 0), str (taken literally), tuple or list
        ("1,2" or "(1, 2)", with elements of the types replaced). A placeholder of ml_collections also takes "None".

    Returns:
      The locked config.

    Raises:
      FileNotFoundError: no such file.
      ValueError: the file cannot be run, has no get_config, or an override names an unknown key (the message names
        the nearest) or has a value of another type.
    """
    path, argument = _file_and_argument(str(path))
    config = _run_get_config(path, argument)
    for text in overrides:
        _apply_override(config, text, path.name)
    for key, (_, _, field) in _fields(config).items():
        if isinstance(field, FieldReference):
            try:
                field.get()
            except config_dict.RequiredValueError:
                raise ValueError(f"{path}: config.{key} has no value; give one: --config.{key}=…") from None
    return config.lock()


def load_run_config(path: str | os.PathLike, overrides: Iterable[str] = ()) -> ConfigDict:
    """Loads a run's config like `load_config`, and checks that it has every key of configs/base.py.

    Raises:
      FileNotFoundError: as for `load_config`.
      ValueError: as for `load_config`, or the config lacks a key, which the message names.
    """
    return _with_all_keys(load_config(path, overrides), path)


def _with_all_keys(config: ConfigDict, source) -> ConfigDict:
    base = load_config(packaged_configs()["base"])
    present = _fields(config)
    missing = [key for key in _fields(base) if key not in present]
    if missing:
        others = f" and {len(missing) - 1} more" if missing[1:] else ""
        raise ValueError(
            f"{source} has no key config.{missing[0]}{others}, which configs/base.py has: it is damaged, or of another "
            "version of memo_jax"
        )
    return config


def packaged_configs() -> dict[str, Path]:
    """Returns {name: file} of the configs that come with the package, sorted: those of the repository's configs/."""
    package = Path(__file__).parent
    installed, cloned = package / "configs", package.parent / "configs"  # in a wheel; in a clone or an editable install
    return {file.stem: file for file in sorted((installed if installed.is_dir() else cloned).glob("*.py"))}


def with_overrides(config: ConfigDict, overrides: Iterable[str]) -> ConfigDict:
    """Returns a locked copy of a config with overrides applied; the texts and errors are those of `load_config`."""
    changed = config.copy_and_resolve_references()
    with changed.unlocked():
        for text in overrides:
            _apply_override(changed, text, "the config")
    return changed.lock()


def config_to_json(config: ConfigDict) -> str:
    """Returns the config as JSON text, from which `config_from_json` makes an equal config.

    Tuples and unset placeholders survive.

    Raises:
      ValueError: a value that is not None, bool, int, float, str, or a tuple, list or group of these.
    """
    return json.dumps(_encoded(config, "config"), indent=2, ensure_ascii=False)


def config_from_json(text: str) -> ConfigDict:
    """Returns the locked config that `config_to_json` wrote as text.

    Raises:
      ValueError: any other text.
    """
    try:
        decoded = _decoded(parse_json(text))
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"not the JSON of a config: {error}") from None
    if not isinstance(decoded, dict):
        raise ValueError("not the JSON of a config: the outermost value is not a group")
    return ConfigDict(decoded).lock()


def save_config(workdir: str | os.PathLike, config: ConfigDict) -> None:
    """Writes `<workdir>/config.json` atomically."""
    write_text(as_path(workdir) / CONFIG_FILE, config_to_json(config) + "\n")


def read_config(workdir: str | os.PathLike) -> ConfigDict | None:
    """Returns the locked config that `save_config` wrote, None if there is none.

    Raises:
      ValueError: it is damaged; the message names the file.
    """
    path = as_path(workdir) / CONFIG_FILE
    try:
        text = read_text(path)
        return None if text is None else config_from_json(text)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; the workdir cannot be used without it") from None


def workdir_config(workdir: str | os.PathLike) -> ConfigDict:
    """Returns the locked config of a run.

    Raises:
      FileNotFoundError: the workdir has none.
      ValueError: it is damaged, or lacks a key of configs/base.py.
    """
    config = read_config(workdir)
    if config is None:
        hint = "; if it is a model file in a bucket, copy it to this machine first" if in_bucket(workdir) else ""
        raise FileNotFoundError(f"{workdir} is not the workdir of a run (it has no {CONFIG_FILE}){hint}")
    return _with_all_keys(config, as_path(workdir) / CONFIG_FILE)


def config_differences(a: ConfigDict, b: ConfigDict) -> list[str]:
    """Returns a line "key: a → b" for each key whose values differ (a tuple is not a list, 1 is not 1.0)."""
    fields = [{key: _value(field) for key, (_, _, field) in _fields(config).items()} for config in (a, b)]
    lines = []
    for key in dict.fromkeys([*fields[0], *fields[1]]):
        was, now = (f"{values[key]!r}" if key in values else "absent" for values in fields)
        if was != now:
            lines.append(f"{key}: {was} → {now}")
    return lines


def duration_in_steps(config: ConfigDict, name: str, steps_per_epoch: int) -> int:
    """Returns a duration in steps, whatever unit the config gives it in (after big_vision's `steps`).

    Exactly one of the keys `<name>_epochs` and `<name>_steps` must be set, to a number ≥ 0. None, a negative number and
    an absent key mean unset. Epochs may be fractions; give them a float or `placeholder(float)` as the default, so that
    overrides may be fractions, too. A duration above 0 is at least 1 step.

    Args:
      config: of the run.
      name: "total", "optimizer.warmup", …
      steps_per_epoch: at least 1.

    Raises:
      ValueError: none or both of the keys are set, or the number is not finite.
    """
    if steps_per_epoch < 1:
        raise ValueError(f"steps_per_epoch is {steps_per_epoch}: the dataset holds fewer utterances than a batch")
    steps_per_unit = {"epochs": steps_per_epoch, "steps": 1}
    group, _, stem = name.rpartition(".")
    keys = config[group] if group else config
    values = {unit: keys.get(f"{stem}_{unit}") for unit in steps_per_unit}
    given = {unit: value for unit, value in values.items() if value is not None and value >= 0}
    if len(given) != 1:
        shown = ", ".join(f"{name}_{unit}={value}" for unit, value in given.items()) or "none of them"
        raise ValueError(
            f"exactly one of {name}_epochs, {name}_steps must be set (0 or more; None or -1 means unset), but the "
            f"config sets {shown}"
        )
    ((unit, value),) = given.items()
    if not math.isfinite(value):
        raise ValueError(f"{name}_{unit}={value} cannot be converted to steps: give a number")
    return max(round(value * steps_per_unit[unit]), 1 if value > 0 else 0)


def interval_in_steps(config: ConfigDict, name: str, steps_per_epoch: int) -> int:
    """Returns how often something happens, in steps; arguments as for `duration_in_steps`.

    Raises:
      ValueError: as for `duration_in_steps`, or the interval is 0.
    """
    steps = duration_in_steps(config, name, steps_per_epoch)
    if steps < 1:
        raise ValueError(f"{name}_epochs or {name}_steps is 0: give an interval above 0")
    return steps


def _file_and_argument(text: str) -> tuple[Path, str | None]:
    path, argument = Path(text), None
    if not path.is_file() and ":" in text:
        path, argument = Path(text.rpartition(":")[0]), text.rpartition(":")[2]
    packaged = packaged_configs()
    if not path.is_file():
        path = packaged.get(str(path), path)
    if not path.is_file():
        if path.parent == Path() and not path.suffix:
            raise FileNotFoundError(f"no packaged config is called {path}; choose one of {', '.join(packaged)}")
        others = sorted(str(other) for other in path.parent.glob("*.py")) if path.parent.is_dir() else []
        nearest = difflib.get_close_matches(str(path), others, 1, 0.5) or others[:10]
        there_is = f"; nearest: {', '.join(nearest)}" if nearest else ""
        raise FileNotFoundError(f"{path}: no such config file{there_is}")
    return path.resolve(), argument


def _run_get_config(path: Path, argument: str | None) -> ConfigDict:
    module = types.ModuleType(path.stem)
    module.__file__ = str(path)
    with _importable(path.parent, *{file.parent for file in packaged_configs().values()} - {path.parent}):
        try:
            exec(compile(path.read_bytes(), str(path), "exec"), module.__dict__)
        except Exception as error:
            where = _line_in(path.parent, error)
            raise ValueError(f"{path}{where}: the config file cannot be run: {_named(error)}") from error
        if not callable(getattr(module, "get_config", None)):
            raise ValueError(f"{path}: the config file defines no function get_config()")
        try:
            config = module.get_config() if argument is None else module.get_config(argument)
        except Exception as error:
            raise ValueError(f"{path}{_line_in(path.parent, error)}: get_config() fails: {_named(error)}") from error
    if not isinstance(config, ConfigDict):
        raise ValueError(f"{path}: get_config() returns {type(config).__name__}, not ml_collections.ConfigDict")
    return config


@contextmanager
def _importable(*folders: Path) -> Iterator[None]:
    """Lets `import base` find base.py in the first folder that has it, then forgets it again."""
    names = {file.stem for folder in folders for file in folder.glob("*.py")}
    hidden = {name: sys.modules.pop(name) for name in names & sys.modules.keys()}
    write_bytecode, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # nothing is left in the user's folder
    sys.path[:0] = map(str, folders)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        for folder in folders:
            sys.path.remove(str(folder))
        sys.dont_write_bytecode = write_bytecode
        for name in names & sys.modules.keys():
            del sys.modules[name]
        sys.modules.update(hidden)


def _line_in(folder: Path, error: BaseException) -> str:
    """Returns ", FILE line N": the last line of a config file in an exception's traceback."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).parent == folder]
    return f", {Path(frames[-1].filename).name} line {frames[-1].lineno}" if frames else ""


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _fields(config: ConfigDict, prefix: str = "") -> dict[str, tuple[ConfigDict, str, object]]:
    """{dotted key: (group that holds it, its name there, value or reference)} of all keys but groups."""
    found = {}
    for name, field in config.items(preserve_field_references=True):
        if isinstance(field, ConfigDict):
            found |= _fields(field, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = (config, name, field)
    return found


def _value(field):
    return field.get() if isinstance(field, FieldReference) else field


def _apply_override(config: ConfigDict, text: str, source: str) -> None:
    key, equals, value = text.removeprefix("--config.").partition("=")
    if not text.startswith("--config.") or not equals or not key:
        raise ValueError(f"{text!r} is not of the form --config.key=value")
    fields = _fields(config)
    if key not in fields:
        inside = [known for known in fields if known.startswith(key + ".")]
        hint = "it is a group; its keys are " if inside else "nearest: "
        hint += ", ".join(inside or _nearest(key, list(fields)))
        raise ValueError(f"{source} has no key config.{key} to set; {hint}")
    group, name, field = fields[key]
    optional = isinstance(field, FieldReference)
    old = field if not optional else None if field.empty() else field.get()
    kind = field.get_type() if optional else type(old)
    try:
        group[name] = _parsed(value, kind, old, optional)
    except (ValueError, KeyError, SyntaxError, TypeError):
        expected = _expected(kind, old) + (" or None" if optional else "")
        raise ValueError(f"config.{key} takes {expected}, not {value!r} (now {old!r})") from None


def _nearest(key: str, keys: list[str]) -> list[str]:
    """The keys most similar to a mistyped one, as a whole or in their last part."""
    last = {}
    for known in keys:
        last.setdefault(known.rpartition(".")[2], []).append(known)
    whole = difflib.get_close_matches(key, keys, 3, 0.6)
    alike = difflib.get_close_matches(key.rpartition(".")[2], last, 2, 0.7)
    by_last = [known for name in alike for known in last[name]]
    return list(dict.fromkeys(whole + by_last))[:4] or keys


def _parsed(text: str, kind: type, old, optional: bool):
    """Reads a text as a value of type `kind`. Raises ValueError, KeyError or SyntaxError."""
    if optional and text == "None":
        return None
    if kind is bool:
        return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
    if kind is int:
        return int(text)
    if kind is float:
        return float(text) if not math.isnan(float(text)) else _refuse()
    if kind is str:
        return text
    if kind in (tuple, list):
        return kind(_parsed_elements(text, old))
    return ast.literal_eval(text)  # the old value is None, which implies no type


def _parsed_elements(text: str, old) -> list:
    kinds = {type(element) for element in old or ()}
    inner = text.strip().removeprefix("(").removesuffix(")").removeprefix("[").removesuffix("]").strip()
    if kinds == {str} and not any(quote in text for quote in "'\""):
        return [part.strip() for part in inner.split(",") if part.strip()]
    value = ast.literal_eval(text) if text.strip() else ()
    elements = list(value) if isinstance(value, (tuple, list)) else [value]
    if kinds == {float}:
        elements = [float(element) if type(element) is int else element for element in elements]
    if kinds and not {type(element) for element in elements} <= kinds:
        _refuse()
    return elements


def _refuse():
    raise ValueError


def _expected(kind: type, old) -> str:
    names = {bool: "true or false", int: "an int", float: "a float", str: "a string", type(None): "a Python literal"}
    if kind not in (tuple, list):
        return names.get(kind, kind.__name__)
    elements = sorted({type(element).__name__ for element in old or ()})
    return f"a {kind.__name__}" + (f" of {' or '.join(elements)}" if elements else "")


def _encoded(value, key: str):
    """Returns plain JSON values; types that JSON lacks become a dict whose only key begins with two underscores."""
    if isinstance(value, FieldReference):
        if value.empty():
            return {"__placeholder__": value.get_type().__name__}
        value = value.get()
    if isinstance(value, ConfigDict):
        value = dict(value.items(preserve_field_references=True))
    if isinstance(value, dict):
        return {name: _encoded(inner, f"{key}.{name}") for name, inner in value.items()}
    if isinstance(value, tuple):
        return {"__tuple__": [_encoded(inner, key) for inner in value]}
    if isinstance(value, list):
        return [_encoded(inner, key) for inner in value]
    if value is None or type(value) in (bool, int, float, str):
        return value
    kind = type(value).__name__
    raise ValueError(f"{key} has type {kind}, which a config cannot hold: use None, bool, int, float, str, tuple, list")


def _decoded(value):
    if isinstance(value, list):
        return [_decoded(inner) for inner in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {"__tuple__"}:
        return tuple(_decoded(inner) for inner in value["__tuple__"])
    if value.keys() == {"__placeholder__"}:
        return config_dict.placeholder(TYPES[value["__placeholder__"]])
    return {name: _decoded(inner) for name, inner in value.items()}
