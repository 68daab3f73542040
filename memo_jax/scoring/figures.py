"""DET curves, score histograms and maps of embeddings as matplotlib figures, and the look that all pictures share.

Colours are Okabe and Ito's (two darkened, to be readable as text), which colour-blind readers can tell apart, and never
the only difference: lines also differ in style and carry names.
"""

import os
from collections.abc import Mapping
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.special import ndtri

from memo_jax.scoring.metrics import eer_point, error_rates, min_dcf_point

BLUE, VERMILION, GREEN, PURPLE, ORANGE = "#0072B2", "#D55E00", "#007E5B", "#A3457E", "#B07A00"
COLORS = [BLUE, VERMILION, GREEN, PURPLE, ORANGE, "#444444"]
INK, MUTED, FAINT = "#222222", "#6B6B6B", "#D9D9D9"
DASHES = ["-", (0, (5, 2)), (0, (1.2, 1.6)), (0, (6, 2, 1.2, 2))]
STYLE = {
    "text.parse_math": False,  # names that people give are never markup
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": "#9A9A9A",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#ECECEC",
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "figure.dpi": 100,
    "legend.frameon": False,
    "lines.solid_capstyle": "round",
}
HALO = [patheffects.withStroke(linewidth=2.5, foreground="white")]


def save_figure(figure: Figure, path: str | os.PathLike, dpi: int = 150) -> Path:
    """Writes a figure in the format of the path's suffix (png, svg, pdf), whole or not at all; returns the path."""
    path = Path(path)
    part = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        figure.savefig(part, dpi=dpi, facecolor="white", bbox_inches="tight", pad_inches=0.12)  # long names stay whole
        os.replace(part, path)
    except OSError as error:  # that of a full disk names no file
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        part.unlink(missing_ok=True)
    return path


def running_mean(values: np.ndarray, half: int) -> np.ndarray:
    """Centred mean over 2·half+1 values, over fewer at the ends; the values themselves when half is 0."""
    if half == 0:
        return values
    total = np.concatenate([[0.0], np.cumsum(values)])
    middle = np.arange(len(values))
    low, high = np.maximum(middle - half, 0), np.minimum(middle + half + 1, len(values))
    return (total[high] - total[low]) / (high - low)


def label_ends(ax: Axes, labels: list[tuple[float, str, str]], x: float, line_height: float = 0.085):
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


def plot_det(systems: Mapping[str, tuple[np.ndarray, np.ndarray]], path: str | os.PathLike, **options) -> Path:
    """Draws the DET curves of systems, {name: (scores [N], target bool [N])}, into a file; options as `det_figure`."""
    return save_figure(det_figure(systems, **options), path)


PERCENT_TICKS = np.array(
    [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 40, 60, 80, 90, 95, 98, 99]
)


def det_figure(
    systems: Mapping[str, tuple[np.ndarray, np.ndarray]],
    *,
    title: str = "Detection error trade-off",
    p_target: float = 0.05,
) -> Figure:
    """DET curves: miss against false-alarm rate on normal-deviate axes in percent.

    Dots mark equal error rates, diamonds where the detection cost at `p_target` is least. The legend lists the systems
    from worst to best with both.

    Raises:
      ValueError: naming the system, when its scores cannot make a curve (see `scoring.error_rates`).
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
    looks = {name: (COLORS[i % len(COLORS)], DASHES[i % len(DASHES)]) for i, name in enumerate(systems)}
    curves.sort(key=lambda curve: -curve[0])
    low, high = _det_limits([curve[0] for curve in curves], [target for _, target in systems.values()])
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.2, 6.2), layout="constrained")
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
            if 0 < equal < 1:
                ax.plot(*[ndtri(equal)] * 2, "o", color=color, markersize=7, markeredgecolor="white", zorder=4)
            at = np.searchsorted(rates.thresholds, cost.threshold)
            if 0 < rates.fpr[at] < 1 and 0 < rates.fnr[at] < 1:
                ax.plot(
                    *ndtri([rates.fpr[at], rates.fnr[at]]),
                    "D",
                    color=color,
                    markersize=6,
                    markeredgecolor="white",
                    zorder=4,
                )
        ticks = _det_ticks(low, high)
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_ticks(ndtri(np.array(ticks) / 100), [f"{tick:g}" for tick in ticks])
        ax.set(xlim=(low, high), ylim=(low, high), box_aspect=1)
        ax.set_xlabel("False-alarm rate: nontarget trials accepted (%)")
        ax.set_ylabel("Miss rate: target trials rejected (%)")
        ax.set_title(title, loc="left", fontsize=13, weight="bold", pad=24)
        # Above the axes, where no curve can come.
        ax.annotate(
            f"● equal error    ◆ least cost at a prior of {p_target:g}",
            (0, 1),
            xycoords="axes fraction",
            xytext=(0, 7),
            textcoords="offset points",
            fontsize=8.5,
            color=MUTED,
        )
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
    return figure


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
    scores,
    target,
    *,
    title: str = "Scores of target and nontarget trials",
    unit: str = "cosine score",
    thresholds: Mapping[str, float] | None = None,
) -> Figure:
    """Histograms of target and nontarget scores, each class summing to 100 %, with the threshold of equal error.

    The filled parts are the errors at that threshold. `thresholds` adds further operating points by name.
    """
    scores, target = np.asarray(scores), np.asarray(target, bool)
    equal = eer_point(scores, target)
    width = np.ptp(scores) / 80 or 0.01
    first, last = np.floor((scores.min() - equal.threshold) / width), np.ceil((scores.max() - equal.threshold) / width)
    edges = equal.threshold + width * np.arange(first, last + 2)  # the threshold is an edge: no bin is half error
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.4, 4.4), layout="constrained")
        ax = figure.subplots()
        peak = 0.0
        for kind, chosen, color, dashes in (
            ("nontarget: different speakers", ~target, VERMILION, DASHES[1]),
            ("target: same speaker", target, BLUE, "-"),
        ):
            share = 100 * np.histogram(scores[chosen], edges)[0] / chosen.sum()
            below = np.arange(len(share)) < -first
            errors = np.where(below if kind.startswith("target") else ~below, share, 0)
            label = f"{kind} ({chosen.sum():,} trials)"
            ax.stairs(share, edges, color=color, linewidth=1.7, linestyle=dashes, label=label)
            ax.stairs(share, edges, color=color, fill=True, alpha=0.10)
            ax.stairs(errors, edges, color=color, fill=True, alpha=0.45)
            peak = max(peak, share.max())
        ax.set_ylim(0, 1.32 * peak)
        marks = {f"equal error {100 * equal.value:.2f} %": equal.threshold, **(thresholds or {})}
        for number, (name, threshold) in enumerate(marks.items()):
            top = 0.93 - 0.075 * number
            ax.axvline(threshold, ymax=top, color=INK, linewidth=1.1, linestyle=DASHES[number % 4], zorder=4)
            ax.annotate(
                f"{name}, at {threshold:.3g}",
                (threshold, top),
                xycoords=("data", "axes fraction"),
                xytext=(5, -2),
                textcoords="offset points",
                fontsize=8.5,
                va="top",
                path_effects=HALO,
                zorder=5,
            )
        ax.set_xlabel(f"{unit} (accepted at or above the threshold)")
        ax.set_ylabel("share of the class per bin (%)")
        ax.set_title(title, loc="left", fontsize=13, weight="bold", pad=26)
        ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0.2, handlelength=2.4)
        ax.grid(axis="x", visible=False)
        ax.margins(x=0.01)
    return figure


def embedding_map_figure(points, speakers, *, title: str = "Map of the embeddings", names_of_most: int = 40) -> Figure:
    """Points [N, 2], coloured by speaker; each speaker's name stands at the middle of his points where they are few.

    Speakers differ in colour and mark; with more than 60 of them, some share both.
    """
    points, speakers = np.asarray(points), np.asarray(speakers)
    kinds = list(dict.fromkeys(speakers.tolist()))
    palette = matplotlib.colormaps["tab20"].colors[::2] + matplotlib.colormaps["tab20"].colors[1::2]
    marks = "os^DvP"
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.4, 6.6), layout="constrained")
        ax = figure.subplots()
        for number, kind in enumerate(kinds):
            mine = points[speakers == kind]
            color, mark = palette[number % len(palette)], marks[number // len(palette) % len(marks)]
            ax.plot(*mine.T, mark, color=color, markersize=5, alpha=0.85, markeredgecolor="white", markeredgewidth=0.4)
            if len(kinds) <= names_of_most:
                ax.annotate(
                    str(kind),
                    np.median(mine, axis=0),
                    fontsize=7.5,
                    color=INK,
                    ha="center",
                    va="center",
                    path_effects=HALO,
                    zorder=5,
                )
        ax.set(xticks=[], yticks=[])
        ax.grid(False)
        ax.spines[["left", "bottom"]].set_visible(False)
        ax.set_title(title, loc="left", fontsize=13, weight="bold", pad=12)
    return figure
