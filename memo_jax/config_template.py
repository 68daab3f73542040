"""A config file to start from: every key with its comment, and the values of a packaged config."""

import difflib
import os
import re
from operator import attrgetter
from pathlib import Path

from memo_jax.config import load_config, packaged_configs
from memo_jax.files import write_text
from memo_jax.version import __version__

GROUP_LINE = re.compile(r"\s+(\w+) = config\.(\w+) = ConfigDict\(\)")
HEADING = '''"""Every key of a run once, with its unit and its meaning.

    memo-jax train --config THIS_FILE --workdir runs/mine --config.data.train=DATASET …

The values are those of `{name}` of memo_jax {version}:
{summary}

Durations are given in epochs or in steps: exactly one of `X_epochs` and `X_steps` is set, the other is -1.
"""
'''
KEY = re.compile(r"(\s+(\w+)\.(\w+) = )([^#]+?)(\s*#.*)?")


def commented_config(name: str) -> str:
    """Returns the text of a config file with every key once, its comment, and its value in a packaged config.

    It is configs/base.py with other values, so it stands alone.

    Raises:
      ValueError: no packaged config has this name.
    """
    files = packaged_configs()
    if name not in files:
        nearest = difflib.get_close_matches(name, files, 1)
        hint = f": did you mean {nearest[0]}?" if nearest else ""
        raise ValueError(f"no packaged config is called {name!r}{hint} (choose one of {', '.join(files)})")
    wanted, base = load_config(files[name]), load_config(files["base"])
    groups, lines = {"config": ""}, []
    source = files["base"].read_text(encoding="utf-8")
    for line in source[source.index("from ml_collections") :].splitlines():
        if group := GROUP_LINE.fullmatch(line):
            groups[group[1]] = f"{group[2]}."
        elif (key := KEY.fullmatch(line)) and key[2] in groups:
            value_in = attrgetter(groups[key[2]] + key[3])
            if repr(value_in(wanted)) != repr(value_in(base)):
                line = f"{key[1]}{_literal(value_in(wanted))}{key[5] or ''}"
        lines.append(line.replace("the base config, which other configs change", "the config of a run"))
    summary = files[name].read_text(encoding="utf-8").split('"""')[1].splitlines()[0]
    heading = HEADING.format(name=name, version=__version__, summary=summary)
    return "\n".join([heading, *lines, ""])


def _literal(value) -> str:
    """Returns a value as Python source, in this project's quotes."""
    return repr(value) if '"' in repr(value) else repr(value).replace("'", '"')


def write_config(name: str, output: str | os.PathLike | None = None) -> Path:
    """Writes `commented_config` to a file, NAME.py by default; returns its path.

    Raises:
      ValueError: no packaged config has this name, or the output's does not end in .py.
      FileExistsError: the output exists already.
      OSError: it cannot be written.
    """
    text, path = commented_config(name), Path(output or f"{name}.py")
    if path.suffix != ".py":
        raise ValueError(f"{path}: the name of a config file ends in .py")
    if path.exists():
        raise FileExistsError(f"{path} exists already: choose another name with --output")
    write_text(path, text)
    return path
