"""Figures as SVG inside a page: their text is the page's, and their colours are its variables, light or dark."""

import html
import io
import re
import warnings
from xml.etree import ElementTree

import matplotlib
from matplotlib.figure import Figure
from matplotlib.text import Text

from memo_jax.scoring import figures
from memo_jax.scoring.figures import Look

# Colour of a figure → name of its variable in the style sheet, its value on a light page and on a dark one.
THEME = {
    "#ffffff": ("surface", "#ffffff", "#1a1d21"),
    figures.INK: ("ink", "#222222", "#e7e9ec"),
    figures.MUTED: ("muted", "#6b6b6b", "#a0a6ad"),
    figures.AXIS: ("axis", "#9a9a9a", "#7d848c"),
    figures.FAINT: ("faint", "#d9d9d9", "#42484f"),
    figures.GRID: ("grid", "#ececec", "#2b3036"),
    figures.BLUE: ("blue", "#0072b2", "#58b1ee"),
    figures.VERMILION: ("vermilion", "#d55e00", "#ff8a4c"),
    figures.GREEN: ("green", "#007e5b", "#3cc598"),
    figures.PURPLE: ("purple", "#a3457e", "#dd8fc0"),
    figures.ORANGE: ("orange", "#b07a00", "#e3ad3a"),
    figures.SLATE: ("slate", "#444444", "#c9ced4"),
}
_VARIABLES = {color.lower(): f"var(--{name})" for color, (name, _, _) in THEME.items()}
_SVG, _XLINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}"


def theme_css() -> str:
    """Returns the rules that give every variable of THEME its value, by the reader's preferred colour scheme."""
    light, dark = ("".join(f" --{entry[0]}: {entry[i]};" for entry in THEME.values()) for i in (1, 2))
    return (
        f":root {{ color-scheme: light dark;{light} }}\n@media (prefers-color-scheme: dark) {{ :root {{{dark} }} }}\n"
    )


def variable(color: str) -> str:
    """Returns a colour of THEME as the CSS that names it; any other colour as it is."""
    return _VARIABLES.get(color.lower(), color)


def picture(figure: Figure, description: str, kind: str = "") -> str:
    """Returns a figure as an <svg> element that scales with its place in a page; `kind` adds a class.

    Text stays text, so that readers can select it and style sheets can size it.
    """
    for text in figure.findobj(Text):
        text.set_path_effects([])  # the style sheet draws halos
    file = io.StringIO()
    # The salt goes into identifiers: two pictures of a page must not share any.
    with (
        matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": f"{kind} {description}"}),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the reader's fonts draw the text
        figure.savefig(
            file,
            format="svg",
            facecolor="none",
            bbox_inches="tight",
            pad_inches=0.02,
            metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")),
        )
    root = ElementTree.fromstring(file.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{_SVG}style", f"{_SVG}metadata"):
                parent.remove(child)
    text = file.getvalue()
    used = {*re.findall(r'href="#([^"]+)"', text), *re.findall(r"url\(#([^)]+)\)", text)}
    for element in root.iter():
        element.tag = element.tag.removeprefix(_SVG)
        kept = {}
        for name, value in element.attrib.items():
            if name in ("style", "fill", "stroke"):
                value = re.sub("#[0-9a-f]{6}", lambda match: variable(match[0]), value)
                value = re.sub(r"(font: [^']*)'.*?(?=;|$)", r"\1sans-serif", value)
            if name != "id" or value in used:
                kept[name.removeprefix(_XLINK)] = value
        element.attrib.clear()
        element.attrib.update(kept)
    root.attrib = {
        "class": f"chart {kind}".strip(),
        "viewBox": root.attrib["viewBox"],
        "role": "img",
        "aria-label": description,
    }
    return ElementTree.tostring(root, encoding="unicode")


def swatch(look: Look) -> str:
    """Returns a short line in a system's look, for tables and captions that serve as legends."""
    dashes = "" if look.dashes == "-" else " ".join(f"{2 * length:g}" for length in look.dashes[1])
    return (
        '<svg class=swatch viewBox="0 0 30 8" aria-hidden=true><path d="M1 4H29" '
        f'stroke-dasharray="{dashes}" style="stroke: {variable(look.color)}"/></svg>'
    )


def figure_element(picture_html: str, title: str = "", note: str = "", mark: str = "", kind: str = "") -> str:
    """Returns a <figure> of a picture below its title and a note; `mark` is HTML (a swatch), the texts are plain."""
    caption = f"<b>{mark}{html.escape(title)}</b>" if title else ""
    caption += f"<span>{html.escape(note)}</span>" if note else ""
    caption = f"<figcaption>{caption}</figcaption>" if caption else ""
    return f'<figure class="{kind}">{caption}{picture_html}</figure>'
