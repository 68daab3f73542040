"""DET curves, histograms and maps of embeddings as matplotlib figures, and the look that all pictures share.

Colours are Okabe and Ito's (two darkened, to be readable as text), which colour-blind readers can tell apart, and never
the only difference: lines also differ in style and carry names. A system looks the same in every picture.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from scipy.special import ndtri

from memo_jax.files import replacing
from memo_jax.scoring.metrics import eer_point, error_rates, min_dcf_point

BLUE, VERMILION, GREEN, PURPLE, ORANGE, SLATE = "#0072B2", "#D55E00", "#007E5B", "#A3457E", "#B07A00", "#444444"
COLORS = [BLUE, VERMILION, GREEN, PURPLE, ORANGE, SLATE]
INK, MUTED, AXIS, FAINT, GRID = "#222222", "#6B6B6B", "#9A9A9A", "#D9D9D9", "#ECECEC"
DASHES = ["-", (0, (5, 2)), (0, (1.2, 1.6)), (0, (6, 2, 1.2, 2))]
BASELINE = "log-mel statistics"  # the system that every network is compared with
# Equally light hues that stand out from white and from black, for the speakers of a map.
HUES = ["#CA6477", "#C86D3F", "#B08000", "#839328", "#3BA064", "#00A19B", "#0098C5", "#5D87D7", "#9376CD", "#B869A9"]
STYLE = {
    "text.parse_math": False,  # names that people give are never markup
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": AXIS,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "figure.dpi": 100,
    "legend.frameon": False,
    "lines.solid_capstyle": "round",
}
HALO = [patheffects.withStroke(linewidth=2.5, foreground="white")]


class Look(NamedTuple):
    """How a system's lines are drawn in every picture."""

    color: str
    dashes: object = "-"


def system_looks(names: Iterable[str]) -> dict[str, Look]:
    """Returns the look of each system: colours in the order of their names, and a fixed one for `BASELINE`."""
    looks: dict[str, Look] = {}
    for name in names:
        number = len(looks) - (BASELINE in looks)
        looks[name] = Look(SLATE, DASHES[3]) if name == BASELINE else Look(COLORS[number % 5], DASHES[number % 3])
    return looks


def save_figure(figure: Figure, path: str | os.PathLike) -> Path:
    """Writes a figure in the format of the path's suffix (png, svg, pdf), whole or not at all; returns the path."""
    path = Path(path)
    with replacing(path) as partial:  # long names stay whole
        figure.savefig(partial, dpi=150, facecolor="white", bbox_inches="tight", pad_inches=0.12)
    return path


def running_mean(values: np.ndarray, half: int) -> np.ndarray:
    """Returns the centred mean over 2·half+1 values, over fewer at the ends; the values themselves when half is 0."""
    if half == 0:
        return values
    total = np.concatenate([[0.0], np.cumsum(values)])
    middle = np.arange(len(values))
    low, high = np.maximum(middle - half, 0), np.minimum(middle + half + 1, len(values))
    return (total[high] - total[low]) / (high - low)


def label_ends(ax: Axes, labels: list[tuple[float, str, str]], x: float, line_height: float = 0.085) -> None:
    """Writes each line's label where the lines end (x, a share of the width), moved apart where two would overlap.

    `labels` are (value, text, colour); `line_height` is that of a line of text, as a share of the panel's height.
    """
    low, high = ax.get_ylim()
    placed = sorted((float(np.clip((value - low) / (high - low), 0, 1)), text, color) for value, text, color in labels)
    size = [line_height * (1 + text.count("\n")) for _, text, _ in placed]
    heights = [height for height, _, _ in placed]
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + (size[i] + size[i - 1]) / 2)
    heights[-1] = min(heights[-1], 1.0)
    for i in range(len(heights) - 2, -1, -1):
        heights[i] = min(heights[i], heights[i + 1] - (size[i] + size[i + 1]) / 2)
    for height, (_, text, color) in zip(heights, placed):
        ax.annotate(
            text,
            (x, height),
            xycoords="axes fraction",
            xytext=(6, 0),
            textcoords="offset points",
            fontsize=8.5,
            color=color,
            va="center",
            linespacing=1.15,
            path_effects=HALO,
        )


def plot_det(systems: Mapping[str, tuple[np.ndarray, np.ndarray]], path: str | os.PathLike, **options: Any) -> Path:
    """Draws the DET curves of systems, {name: (scores [N], target bool [N])}, into a file; options: `det_figure`."""
    return save_figure(det_figure(systems, **options), path)


PERCENT_TICKS = np.array(
    [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 40, 60, 80, 90, 95, 98, 99]
)


def det_figure(
    systems: Mapping[str, tuple[np.ndarray, np.ndarray]],
    *,
    title: str | None = "Detection error trade-off",
    p_target: float = 0.05,
) -> Figure:
    """Draws DET curves: miss against false-alarm rate on normal-deviate axes in percent.

    Dots mark equal error rates, diamonds where the detection cost at `p_target` is least. The legend lists the systems
    from worst to best with both. Without a title (None) there is no legend either: a page says both beside the picture.

    Raises:
      ValueError: naming the system, when its scores cannot make a curve (see `metrics.error_rates`).
    """
    if not systems:
        raise ValueError("there is no system to draw a DET curve of")
    curves = []
    for name, (scores, target) in systems.items():
        try:
            rates, equal = error_rates(scores, target), eer_point(scores, target).value
            curves.append((equal, name, rates, min_dcf_point(scores, target, p_target)))
        except ValueError as error:
            raise ValueError(f"system {name!r}: {error}") from None
    looks = system_looks(systems)
    curves.sort(key=lambda curve: -curve[0])
    low, high = _det_limits([curve[0] for curve in curves], [target for _, target in systems.values()])
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.0, 4.9) if title is None else (10.2, 6.2), layout="constrained")
        ax = figure.subplots()
        ax.plot([low, high], [low, high], color=FAINT, linewidth=1, zorder=1)
        ax.annotate(
            "miss rate = false-alarm rate",
            (high, high),
            xytext=(-14, -4),
            textcoords="offset points",
            fontsize=8,
            color=MUTED,
            rotation=45,
            ha="right",
            va="top",
            rotation_mode="anchor",
        )
        for equal, name, rates, cost in curves:
            color, dashes = looks[name]
            x, y = _thinned(*ndtri(np.clip([rates.fpr, rates.fnr], 1e-9, 1 - 1e-9)))
            text = f"{name}\nEER {100 * equal:.2f} %,  minDCF({p_target:g}) {cost.value:.3f}"
            ax.plot(x, y, color=color, linestyle=dashes, linewidth=1.8, label=text)
            marks = {"markeredgecolor": "white", "markeredgewidth": 0.8, "color": color, "zorder": 4}
            if 0 < equal < 1:
                ax.plot(*[ndtri(equal)] * 2, "o", markersize=7, **marks)
            at = np.searchsorted(rates.thresholds, cost.threshold)
            if 0 < rates.fpr[at] < 1 and 0 < rates.fnr[at] < 1:
                ax.plot(*ndtri([rates.fpr[at], rates.fnr[at]]), "D", markersize=6, **marks)
        ticks = _det_ticks(low, high)
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_ticks(ndtri(np.array(ticks) / 100), [f"{tick:g}" for tick in ticks])
        ax.set(xlim=(low, high), ylim=(low, high), box_aspect=1)
        ax.set_xlabel("False-alarm rate: nontarget trials accepted (%)")
        ax.set_ylabel("Miss rate: target trials rejected (%)")
        if title is not None:
            _name_curves(figure, ax, title, p_target)
    return figure


def add_title(ax: Axes, title: str, note: str, size: float = 11) -> None:
    """Writes a bold title above the axes, and a small note, such as the unit, between the two."""
    ax.set_title(title, loc="left", fontsize=size, weight="bold", pad=11 + size)
    place = {"xycoords": "axes fraction", "xytext": (0, 6), "textcoords": "offset points"}
    ax.annotate(note, (0, 1), **place, fontsize=8.5, color=MUTED)


def name_line(ax: Axes, x: float, text: str, *, on_left: bool, height: float = 0.97, color: str = INK) -> None:
    """Writes a text beside a vertical line at x, `height` of the panel up, on one side of the line."""
    ax.annotate(
        text,
        (x, height),
        xycoords=("data", "axes fraction"),
        xytext=(-5 if on_left else 5, 0),
        textcoords="offset points",
        ha="right" if on_left else "left",
        va="top",
        fontsize=8.5,
        color=color,
        path_effects=HALO,
        zorder=5,
    )


def _name_curves(figure: Figure, ax: Axes, title: str, p_target: float) -> None:
    """Gives a DET picture its title, its legend and what the markers mean, above the axes where no curve can be."""
    add_title(ax, title, f"● equal error    ◆ least cost at a prior of {p_target:g}", size=13)
    legend = figure.legend(
        loc="outside right upper",
        handlelength=2.6,
        labelspacing=1.1,
        fontsize=9.5,
        title="Worst to best",
        alignment="left",
    )
    for line, text in zip(legend.get_lines(), legend.get_texts()):
        text.set_color(line.get_color())


def _det_limits(rates: list[float], targets) -> tuple[float, float]:
    """Ends of both axes in normal deviates: around the equal error rates, and no finer than the trials can resolve."""
    finest = min(1 / max(1, min(np.sum(target), np.sum(~np.asarray(target, bool)))) for target in targets)
    low = min(max(min(rates) / 12, finest / 2, 1e-5), 0.1)
    high = min(0.99, max(0.4, 2 * max(rates)))
    ticks = PERCENT_TICKS / 100
    return float(ndtri(ticks[ticks <= low * (1 + 1e-9)][-1])), float(ndtri(ticks[ticks >= high * (1 - 1e-9)][0]))


def _det_ticks(low: float, high: float) -> list[float]:
    """Ticks in percent between two normal deviates, so far apart that their labels do not touch."""
    chosen = []
    for tick in PERCENT_TICKS[::-1]:
        at = ndtri(tick / 100)
        if low - 1e-9 <= at <= high + 1e-9 and (not chosen or ndtri(chosen[-1] / 100) - at > (high - low) / 20):
            chosen.append(float(tick))
    return chosen


def _thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A curve without the points that fall on the same spot of the picture as the one before."""
    spots = np.round(np.stack([x, y]) * 400)
    keep = np.append(True, np.any(np.diff(spots, axis=1) != 0, axis=0))
    return x[keep], y[keep]


def score_histogram_figure(
    scores: np.ndarray, target: np.ndarray, look: Look, *, thresholds: Mapping[str, float] | None = None
) -> Figure:
    """Draws histograms of target scores, in a system's look, and of nontarget scores in grey.

    Each class sums to 100 %. The dark parts are the errors at the threshold of equal error. `thresholds` adds further
    operating points by name.
    """
    scores, target = np.asarray(scores), np.asarray(target, bool)
    equal = eer_point(scores, target)
    width = np.ptp(scores) / 80 or 0.01
    first, last = np.floor((scores.min() - equal.threshold) / width), np.ceil((scores.max() - equal.threshold) / width)
    edges = equal.threshold + width * np.arange(first, last + 2)  # the threshold is an edge: no bin is half error
    below = np.arange(len(edges) - 1) < -first
    marks = {f"equal error {100 * equal.value:.2f} %": equal.threshold, **(thresholds or {})}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.0, 2.5), layout="constrained")
        ax = figure.subplots()
        peak = 0.0
        for chosen, wrong, color, dashes in ((~target, ~below, AXIS, DASHES[1]), (target, below, look.color, "-")):
            share = 100 * np.histogram(scores[chosen], edges)[0] / chosen.sum()
            ax.stairs(share, edges, color=color, linewidth=1.4, linestyle=dashes)
            ax.stairs(share, edges, color=color, fill=True, alpha=0.15)
            ax.stairs(np.where(wrong, share, 0), edges, color=color, fill=True, alpha=0.6)
            peak = max(peak, share.max())
        line_height = 0.09
        ax.set_ylim(0, peak / (0.97 - line_height * len(marks)))
        ax.margins(x=0.01)
        _mark_thresholds(ax, marks, line_height)
        ax.set_xlabel("cosine score (accepted at or above the threshold)")
        ax.set_ylabel("share of the class (%)")
        ax.grid(axis="x", visible=False)
    return figure


def _mark_thresholds(ax: Axes, marks: Mapping[str, float], line_height: float) -> None:
    """Draws vertical lines with their names above the histograms, on the side with room, so that no two collide."""
    low, high = ax.get_xlim()
    left = np.mean(list(marks.values())) > (low + high) / 2  # texts go to the left of their lines
    # A text crosses the lines on its side, so these have to end below it.
    for number, (name, threshold) in enumerate(sorted(marks.items(), key=lambda mark: mark[1], reverse=bool(left))):
        top = 1 - line_height * number
        dashes = DASHES[list(marks).index(name) % len(DASHES)]
        ax.axvline(threshold, ymax=top, color=INK, linewidth=1.1, linestyle=dashes, zorder=4)
        name_line(ax, threshold, f"{name}, at {threshold:.3g}", on_left=left, height=top)


def plot_cluster_sizes(assignment: np.ndarray, path: str | os.PathLike) -> Path:
    """Draws how many clusters have how many utterances, given the cluster of each, int [N], into a file."""
    counts = np.unique(assignment, return_counts=True)[1]
    # Sizes are whole numbers: equal bins while they are few, equal ratios beyond.
    edges = np.unique(np.round(np.geomspace(counts.min(), counts.max() + 1, 40))) - 0.5
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 3.4), layout="constrained")
        ax = figure.subplots()
        heights = np.histogram(counts, edges)[0]
        ax.stairs(heights, edges, color=BLUE, fill=True, alpha=0.25)
        ax.stairs(heights, edges, color=BLUE, linewidth=1.4)
        ax.set(xscale="log", ylim=(0, 1.22 * heights.max()))
        ticks = [m * 10**e for e in range(9) for m in (1, 2, 5) if edges[0] < m * 10**e < edges[-1]]
        ticks = ticks or np.unique(counts[[counts.argmin(), counts.argmax()]]).tolist()
        ax.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        ax.xaxis.set_minor_formatter(NullFormatter())
        median = float(np.median(counts))
        ax.axvline(median, ymax=0.9, color=INK, linewidth=1.1, linestyle=DASHES[1])
        name_line(ax, median, f"median {median:g}", on_left=median**2 > edges[0] * edges[-1])
        add_title(ax, "Sizes of clusters", f"{len(counts):,} clusters of {len(assignment):,} utterances")
        ax.set_xlabel("utterances in a cluster")
        ax.set_ylabel("clusters")
        ax.grid(axis="x", visible=False)
    return save_figure(figure, path)


def embedding_map_figure(points: np.ndarray, speakers: Sequence[str], size: tuple[float, float] = (9.0, 5.0)) -> Figure:
    """Draws points [N, 2], coloured by speaker, with the names of speakers where there is room; size in inches.

    Speakers differ in colour and mark; with more than 60 of them, some share both.
    """
    points, speakers = np.asarray(points, float), np.asarray(speakers)
    kinds = list(dict.fromkeys(speakers.tolist()))
    marks = "os^DvP"
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size)
        ax = figure.add_axes((0.02, 0.02, 0.96, 0.96))
        tops = {}
        for number, kind in enumerate(kinds):
            mine = points[speakers == kind]
            tops[kind] = np.median(mine[:, 0]), mine[:, 1].max()
            color, mark = HUES[number * 3 % len(HUES)], marks[number // len(HUES) % len(marks)]
            ax.plot(*mine.T, mark, color=color, markersize=4.5, markeredgecolor="white", markeredgewidth=0.4)
        ax.set(xticks=[], yticks=[])
        ax.grid(False)
        ax.spines[["left", "bottom"]].set_visible(False)
        ax.autoscale_view()  # names are compared where they will be
        renderer, taken = FigureCanvasAgg(figure).get_renderer(), []
        for kind, top in tops.items():
            name = ax.annotate(
                str(kind),
                top,
                xytext=(0, 4),
                textcoords="offset points",
                fontsize=7.5,
                color=INK,
                ha="center",
                path_effects=HALO,
                zorder=5,
            )
            box = name.get_window_extent(renderer)
            if any(box.overlaps(other) for other in taken):
                name.remove()
            else:
                taken.append(box)
    return figure
