"""Hooks of the documentation's build.

They add the pages that are made from other files of the repository (the configuration from configs/, the command line
from its parser, the pages of experiments/, CONTRIBUTING and CHANGELOG), rewrite the links that leave docs/, and turn
equations into MathML, so that neither building nor reading needs a network or a script.
"""

import argparse
import html
import io
import os
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
# Files of the repository that are pages of the site.
PAGES = {
    "experiments/README.md": "study.md",
    "experiments/learning.md": "learning.md",
    "experiments/many_epochs.md": "many_epochs.md",
    "experiments/faults.md": "faults.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "configs/base.py": "reference/configuration.md",
    "README.md": "index.md",
}
UNITS = {"seconds": "s", "db": "dB", "megabytes": "MB", "epochs": "epochs", "steps": "steps", "interval": "s"}


class Key(NamedTuple):
    """A key of a config file: its dotted name, the text of its default and its comment."""

    name: str
    default: str
    meaning: str

    @property
    def unit(self) -> str:
        """The unit that the last word of the name tells, or ""."""
        return UNITS.get(self.name.rpartition("_")[2], "")


def config_keys(source: str) -> list[Key]:
    """Returns the keys of a config file, each with its comment: on the same line, or on whole lines just before it.

    Raises ValueError naming a key without a comment, unless it is the `…_steps` of an `…_epochs` before it, which says
    "instead of `…_epochs`".
    """
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    lines, groups, keys = source.splitlines(), {"config": ""}, []
    for number, line in enumerate(lines, 1):
        code = line[: line.rindex("#")] if number in comments and "#" in line else line
        if group := re.match(r"\s+(\w+) = config\.(\w+) = ConfigDict\(\)", code):
            groups[group[1]] = f"{group[2]}."
        elif key := re.match(r"\s+(\w+)\.(\w+) = (.+?)\s*$", code):
            name, above = groups[key[1]] + key[2], number - 1
            meaning = [comments[number]] if number in comments else []
            while above in comments and lines[above - 1].lstrip().startswith("#"):
                meaning.insert(0, comments[above])
                above -= 1
            other = name.removesuffix("_steps") + "_epochs"
            if not meaning and name.endswith("_steps") and any(known.name == other for known in keys):
                meaning = [f"instead of `{other}`"]
            if not meaning:
                raise ValueError(f"configs/base.py, line {number}: {name} has no comment")
            keys.append(Key(name, key[3], " ".join(meaning)))
    return keys


def cell(text: str) -> str:
    """Returns a text as the cell of a Markdown table."""
    return re.sub(r"(?<!\\)\|", r"\\|", text).replace("\n", " ")


def table(header: list[str], rows: Iterator[list[str]]) -> str:
    """Returns a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(map(cell, line))} |\n" for line in lines)


def configuration_page() -> str:
    """Returns the page of all keys, and of what each recipe changes."""
    from memo_jax.config import config_differences, load_config

    base = ROOT / "configs" / "base.py"
    keys = config_keys(base.read_text(encoding="utf-8"))
    text = [
        "# Configuration\n",
        "Made from the comments of `configs/base.py`, whose defaults are the authors' recipe for VoxCeleb2. Change a "
        "key on the command line with `--config.KEY=VALUE`; [Training](../guides/training.md#configs) says how. A "
        "duration has a key in epochs and a key in steps: set one of them, and the other to -1.\n",
    ]
    for group in dict.fromkeys(key.name.rpartition(".")[0] for key in keys):
        rows = (
            [f"`{key.name}`", key.unit, f"`{key.default}`", key.meaning]
            for key in keys
            if key.name.rpartition(".")[0] == group
        )
        text += [f"## {group or 'The run'}\n", table(["key", "unit", "default", "meaning"], rows)]
    text.append("## Recipes\n\nWhat each config changes:\n")
    for path in sorted(base.parent.glob("*.py")):
        if path != base:
            docstring = path.read_text(encoding="utf-8").split('"""')[1]
            changes = config_differences(load_config(base), load_config(path))
            rows = (
                [f"`{name}`", *(f"`{value}`" for value in values.split(" → "))]
                for name, _, values in (line.partition(": ") for line in changes)
            )
            changed = table(["key", "base.py", path.name], rows) if changes else "It is `base.py` as it stands.\n"
            text += [f"### {path.name}\n", docstring.split("\n\n")[0].strip() + "\n", changed]
    return "\n".join(text)


def commands_page() -> str:
    """Returns the page of all commands and their options."""
    from memo_jax.cli import build_parser

    parser = build_parser()
    (subparsers,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    text = [
        "# Command line\n",
        "Made from the parser; `memo-jax COMMAND --help` prints the same. "
        "[Exit codes](../guides/embeddings.md#exit-codes) are listed in a guide.\n",
    ]
    for name, command in subparsers.choices.items():
        formatter = command._get_formatter()
        formatter._width = 10**6
        rows = []
        for action in command._actions:
            if action.dest == "help" or action.help == argparse.SUPPRESS:
                continue
            shown = ", ".join(f"`{flag}`" for flag in action.option_strings) or f"`{action.metavar or action.dest}`"
            if action.option_strings and action.nargs != 0:
                value = action.metavar or (
                    "|".join(map(str, action.choices)) if action.choices else action.dest.upper()
                )
                shown += f" `{value if isinstance(value, str) else ' '.join(value)}`"
            meaning = formatter._expand_help(action) if action.help else ""
            if action.choices and action.metavar:
                meaning += f" ({', '.join(map(str, action.choices))})"
            rows.append([shown, ("required; " if action.required and action.option_strings else "") + meaning])
        text += [f"## {name}\n", f"{command.description[0].upper()}{command.description[1:]}.\n"]
        text.append(table(["option", "meaning"], rows))
    return "\n".join(text)


def with_links(markdown: str, page: str) -> str:
    """Returns a page's Markdown with its links as the site has them.

    Args:
      markdown: its text.
      page: the repository's file that it comes from, to which its links are relative. A link to a page of the site
        becomes relative to this page there; of a link to another file, which the site lacks, the text remains.
    """
    here = Path(PAGES.get(page, page.removeprefix("docs/"))).parent

    def replaced(link):
        text, (target, mark, anchor) = link[1], link[2].partition("#")
        if re.match(r"\w+:", target) or not target:
            return link[0]
        path = os.path.normpath((Path(page).parent / target).as_posix())
        if path.startswith("docs/"):
            path = path.removeprefix("docs/")
        elif path in PAGES:
            path = PAGES[path]
        elif path.startswith("experiments/results/") and path.endswith(".png"):
            path = path.removeprefix("experiments/")
        elif (ROOT / path).exists():
            return text
        return f"[{text}]({os.path.relpath(path, here)}{mark}{anchor})"

    return re.sub(r"(?<!`)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)", replaced, markdown)


def with_mathml(content: str) -> str:
    """Returns a page's HTML with the equations that arithmatex has marked as MathML."""
    from latex2mathml.converter import convert

    def converted(marked):
        latex = html.unescape(marked[3])
        return convert(latex, display="block" if marked[1] == "div" else "inline")

    return re.sub(r'<(div|span) class="arithmatex">\\([\[(])(.*?)\\[\])]</\1>', converted, content, flags=re.DOTALL)


def on_files(files, config):
    """Adds the pages that are no files of docs/."""
    from mkdocs.structure.files import File

    made = {"reference/configuration.md": configuration_page(), "reference/commands.md": commands_page()}
    for source in (
        "experiments/README.md",
        "experiments/learning.md",
        "experiments/many_epochs.md",
        "experiments/faults.md",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
    ):
        made[PAGES[source]] = with_links((ROOT / source).read_text(encoding="utf-8"), source)
    for name, content in made.items():
        files.append(File.generated(config, name, content=content))
    for picture in sorted((ROOT / "experiments" / "results").glob("*.png")):
        files.append(File.generated(config, f"results/{picture.name}", abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Rewrites the links of the pages in docs/."""
    source = page.file.src_uri
    return markdown if source in PAGES.values() and source != "index.md" else with_links(markdown, f"docs/{source}")


def on_page_content(content, page, config, files):
    """Turns equations into MathML."""
    return with_mathml(content)
