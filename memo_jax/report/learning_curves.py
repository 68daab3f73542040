"""The learning curves of a run as a picture."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator

from memo_jax.log import read_metrics
from memo_jax.scoring.figures import (
    COLORS,
    DASHES,
    INK,
    MUTED,
    STYLE,
    add_title,
    label_ends,
    name_line,
    running_mean,
    save_figure,
    system_looks,
)
from memo_jax.training.goodput import GOODPUT_METRICS


def plot_learning_curve(metrics_jsonl: str | os.PathLike, out_png: str | os.PathLike, **options: Any) -> Path:
    """Draws the learning curves of a run's metrics.jsonl into a picture; options as for `learning_curve_figure`.

    Raises:
      FileNotFoundError: no such file. ValueError: it holds no metric to draw, or a line that is not a row of metrics.
      OSError: the picture cannot be written.
    """
    rows = read_metrics(metrics_jsonl)
    if not rows:
        raise ValueError(f"{metrics_jsonl}: no metrics yet, so there is nothing to draw")
    return save_figure(learning_curve_figure(rows, **options), out_png)


class Panel(NamedTuple):
    """One panel of the learning curves: the metrics it shows (a pattern of names), its title, what its axis means."""

    pattern: str
    title: str
    unit: str
    while_open: bool = False  # its metrics mean nothing once the gate is closed
    noisy: bool = True  # drawn as running means; a schedule is drawn as it is


EER = Panel(r"eer/.+", "Equal error rate", "percent of trials, lower is better")
COSTS = tuple(
    Panel(rf"min_dcf_{prior}/.+", f"minDCF at a prior of {prior}", "detection cost; 1: no better than accepting nobody")
    for prior in (0.01, 0.05)
)
PANELS = (
    EER,
    *COSTS,
    Panel(r"loss/(self|cross)/.+", "Distillation loss", "cross-entropy to the teacher, nats"),
    Panel(r"loss/contrastive/.+|gate/loss", "Contrastive loss", "NT-Xent times its weight, nats", True),
    Panel(r"alignment/.+|gate/alignment", "Do both losses agree?", "cosine of their gradients at the embedding", True),
    Panel(r"kl/.+", "KL divergence", "student from teacher, nats; 0 with low entropy: collapse"),
    Panel(r"teacher_entropy/.+", "Teacher entropy", "nats; towards 0: one-hot collapse"),
    Panel(r"mean_teacher_entropy/.+", "Entropy of the mean teacher", "nats; high: all prototypes are in use"),
    Panel(r"embedding_std/.+", "Embedding spread", "standard deviation; towards 0: collapse"),
    Panel(r"loss(/[^/]+)?", "Total loss", "nats, with the contrastive term while its gate is open"),
    Panel(r"gradient_norm", "Gradient norm", "all parameters, before clipping"),
    Panel(r"lr", "Learning rate", "of the optimiser", noisy=False),
    Panel(r"momentum", "Teacher momentum", "share of the old one kept each step", noisy=False),
    Panel(r"teacher_temp", "Teacher temperature", "of the softmax", noisy=False),
    Panel(r"utterances_per_second", "Speed", "utterances a second"),
)
# Axes, marks, or drawn otherwise.
NOT_DRAWN = {"step", "epoch", "seconds_per_step", "cpu_seconds", "gate/open", "gate/closed_at", *GOODPUT_METRICS}
HEADS = ("self", "cross", "contrastive")


class Series(NamedTuple):
    """One metric over training."""

    name: str
    steps: np.ndarray
    values: np.ndarray


def learning_curve_figure(
    rows: Sequence[Mapping], *, title: str = "Learning curves", references: Mapping[str, float] | None = None
) -> Figure:
    """Draws the learning curves of a run as one figure, a panel for each kind of metric that occurs in the rows.

    Thick lines are running means, faint ones the values; each line is labelled with its name and last value. A dotted
    vertical line marks the step at which the gate closed. Metrics of an unknown kind get a panel of their own.

    Args:
      rows: metrics.jsonl as dicts, each with "step".
      title: heading of the figure.
      references: error rates in percent to compare the EER with, by name (drawn as horizontal lines).

    Raises:
      ValueError: when the rows hold no metric to draw.
    """
    panels, branches = _panels_with_series(rows)
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.2 * columns, 0.75 + 2.75 * lines), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.11, wspace=0.02, hspace=0.02)
        heading = "  ·  ".join([title, *progress_texts(rows)])
        figure.suptitle(heading, x=0.012, ha="left", fontsize=13, weight="bold")
        axes = figure.subplots(lines, columns, squeeze=False).ravel()
        for number, (ax, (panel, found)) in enumerate(zip(axes, panels)):
            add_title(ax, panel.title, panel.unit)
            _draw_panel(ax, panel, found, branches, references or {}, rows)
            _mark_closing(ax, gate_closing_step(rows), named=panel.while_open)
            if number + columns >= len(panels):
                ax.set_xlabel("step")
        for ax in axes[len(panels) :]:
            ax.remove()
    return figure


def learning_curve_panels(
    rows: Sequence[Mapping], *, branches: Sequence[str] = (), references: Mapping[str, float] | None = None
) -> list[tuple[Panel, Figure]]:
    """Draws the panels of `learning_curve_figure` as figures of their own, without titles, for a page.

    Args:
      rows: as there.
      branches: of the run, which decide the colours; by default in the order in which the metrics name them.
      references: as there.

    Raises:
      ValueError: when the rows hold no metric to draw.
    """
    panels, named = _panels_with_series(rows)
    branches = [*branches, *(branch for branch in named if branch not in branches)]
    made = []
    with matplotlib.rc_context(STYLE):
        for panel, found in panels:
            figure = Figure(figsize=(4.3, 2.3), layout="constrained")
            ax = figure.subplots()
            _draw_panel(ax, panel, found, branches, references or {}, rows)
            _mark_closing(ax, gate_closing_step(rows), named=False)
            ax.set_xlabel("step")
            made.append((panel, figure))
    return made


def _panels_with_series(rows) -> tuple[list[tuple[Panel, list[Series]]], list[str]]:
    """The panels that rows have metrics for, with their series, and the names of the branches."""
    series = _series_by_name(rows)
    panels = [(panel, found) for panel in _panels(series) if (found := _panel_series(panel, series))]
    if not panels:
        raise ValueError("the rows hold no metric to draw, only " + ", ".join(sorted(set().union(*rows))))
    return panels, _branches(series)


def progress_texts(rows: Sequence[Mapping]) -> list[str]:
    """Returns how far a run is: its last step and epoch, and what became of the contrastive loss if it has one."""
    last, closed_at = rows[-1], gate_closing_step(rows)
    texts = [f"step {last['step']:,}"]
    if "epoch" in last:
        texts.append(f"epoch {last['epoch']:.1f}")
    if any(name.startswith("loss/contrastive/") for row in rows for name in row):
        texts.append(
            "contrastive loss still on"
            if closed_at is None
            else f"contrastive loss stopped by its gate at step {closed_at:,}"
        )
    return texts


def gate_closing_step(rows: Sequence[Mapping]) -> int | None:
    """Returns the step at which the gate closed, or None while it is open, and where it was never open."""
    return next((int(at) for row in rows if (at := row.get("gate/closed_at", -1)) > 0), None)


def _mark_closing(ax: Axes, step: int | None, named: bool):
    """A dotted vertical line where the gate closed, if it did, with a name if asked for."""
    if step is None:
        return
    ax.axvline(step, color=MUTED, linewidth=1, linestyle=(0, (1, 1.5)), zorder=1)
    if named:
        on_left = step >= 0.65 * ax.get_xlim()[1]  # where there is more room
        name_line(ax, step, f"gate closes,\nstep {step:,}", on_left=on_left, color=MUTED)


def _series_by_name(rows) -> dict[str, Series]:
    """Every numeric metric; a step at which it is missing, not finite, or meaningless for a closed gate is left out."""
    of_open_gate = re.compile("|".join(panel.pattern for panel in PANELS if panel.while_open))
    points = {}
    for row in rows:
        is_open = row.get("gate/open") in (None, 1)
        for name, value in row.items():
            drawn = name not in NOT_DRAWN and isinstance(value, (int, float)) and np.isfinite(value)
            if drawn and (is_open or not of_open_gate.fullmatch(name)):
                points.setdefault(name, []).append((row["step"], value))
    return {name: Series(name, *np.array(pairs, float).T) for name, pairs in points.items()}


def _panels(series) -> list[Panel]:
    """The known panels, then one for each further kind of metric."""
    known = re.compile("|".join(panel.pattern for panel in PANELS))
    kinds = {}
    for name in series:
        if not known.fullmatch(name):
            kinds.setdefault(name.split("/")[0], []).append(re.escape(name))
    others = [Panel("|".join(names), kind.replace("_", " ").capitalize(), "") for kind, names in kinds.items()]
    return [*PANELS, *others]


def _panel_series(panel: Panel, series: Mapping[str, Series]) -> list[Series]:
    found = [one for name, one in series.items() if re.fullmatch(panel.pattern, name)]
    if len(found) == 2:  # with a single branch, the sum over branches says nothing new
        found = [one for one in found if one.name != "loss"]
    # the gate's running mean is informative beside the losses it watches, but not alone
    return [] if all(one.name.startswith("gate/") for one in found) else found


def _identity(name: str) -> tuple[str, str]:
    """The (branch, head) that a metric is about, each "" where it is about none."""
    parts = name.split("/")[1:]
    head = next((part for part in parts if part in HEADS), "")
    return "/".join(part for part in parts if part not in HEADS), head


def _branches(series) -> list[str]:
    """Branch names, which get the same colour in every panel, in order of appearance."""
    named = (_identity(name)[0] for name in series if not name.startswith(("eer/", "min_dcf_", "gate/")))
    return list(dict.fromkeys(branch.split("-")[0] for branch in named if branch))


def _draw_panel(ax: Axes, panel: Panel, found: list[Series], branches: list[str], references, rows) -> None:
    """Draws a panel's lines and their labels; `references` only where the panel shows error rates."""
    ax.set_xlim(0, max(1, rows[-1]["step"]))
    labels, shown = [], []
    for number, one in enumerate(found):
        smooth = running_mean(one.values, len(one.values) // 60 if panel.noisy else 0)
        name, color, dashes = _look(one.name, number, branches)
        if smooth is not one.values:
            ax.plot(one.steps, one.values, color=color, linewidth=0.6, alpha=0.22, zorder=2)
        ax.plot(
            one.steps,
            smooth,
            color=color,
            linewidth=1.7,
            linestyle=dashes,
            zorder=3,
            marker="o" if len(one.steps) <= 30 else None,
            markersize=4,
            clip_on=len(one.steps) > 30,
        )
        value = f"\n{one.values[-1]:.2f} %, best {one.values.min():.2f} %" if panel is EER else f"  {smooth[-1]:.4g}"
        labels.append((smooth[-1], f"{name}{value}".strip(), color))
        shown.append(smooth)
    for name, value in references.items() if panel is EER else ():
        color, dashes = system_looks([name])[name]
        ax.axhline(value, color=color, linewidth=1.1, linestyle=dashes, zorder=1)
        labels.append((value, f"{name}\n{value:.2f} %", color))
        shown.append([value])
    # limits around the running means, so that single outliers do not flatten everything else
    low, high = np.concatenate(shown).min(), np.concatenate(shown).max()
    pad = 0.08 * (high - low) or 0.1 * abs(high) or 0.1
    ax.set_ylim(0 if panel in (EER, *COSTS) else low - pad, high + pad)
    ax.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.8g}"))
    ax.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10], integer=True))
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    ends = max(one.steps[-1] for one in found)
    label_ends(ax, labels, ends / ax.get_xlim()[1] if panel.while_open else 1.0)


def _look(name: str, number: int, branches: list[str]) -> tuple[str, str, object]:
    """What a metric's line is called in its panel, its colour and its dashes: colour means branch, dashes mean head."""
    if name in ("gate/loss", "gate/alignment"):
        return "gate's mean", INK, DASHES[2]
    if name == "loss":
        return "sum", INK, "-"
    branch, head = _identity(name)
    if branch.split("-")[0] not in branches:
        return branch, COLORS[number % len(COLORS)], DASHES[number % len(DASHES)]
    said = branch if head in ("", "contrastive") else f"{branch} {head}"
    return said, system_looks(branches)[branch.split("-")[0]].color, DASHES[1] if head == "cross" else "-"
