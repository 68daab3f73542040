"""The study's plots: EER while training with bands over seeds, where gates closed, how well the two gradients agree."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

import ablation
from memo_jax.scoring.figures import (
    COLORS,
    DASHES,
    HALO,
    INK,
    MUTED,
    STYLE,
    add_title,
    label_ends,
    name_line,
    running_mean,
    save_figure,
)

Rows = Mapping[str, Sequence[dict]]  # {row: results of its seeds}

# What belongs in one picture; the reference is in each of them, to compare with.
PANELS = (
    ("What each part adds", ("dino-ecapa", "dino-resnet", "two-branches", "shared-head", "multi-head", "memo-always")),
    (
        "When contrastive learning stops",
        ("multi-head", "memo-always", "memo-step-early", "memo-step", "memo-step-late", "memo-conflict"),
    ),
    (
        "Other choices",
        ("memo-campplus", "no-augmentation", "contrastive-alone", "memo-slow-teacher", "multi-head-quick-teacher"),
    ),
)
SHORT = {
    "dino-ecapa": "DINO, ECAPA",
    "dino-resnet": "DINO, ResNet",
    "two-branches": "two branches",
    "shared-head": "shared head",
    "multi-head": "Multi-Head",
    "memo-always": "contrastive, always on",
    "memo-step": "stopped by step",
    "memo-plateau": "MeMo: stopped at plateau",
    "memo-conflict": "stopped by conflict",
    "memo-step-early": "stopped early",
    "memo-step-late": "stopped late",
    "memo-campplus": "with CAM++",
    "contrastive-alone": "contrastive alone",
    "no-augmentation": "no augmentation",
    "memo-slow-teacher": "slower teachers",
    "multi-head-quick-teacher": "Multi-Head, quick teachers",
}
LINES = (*COLORS[:5], "#7F4F24")


class Curve(NamedTuple):
    """Mean and standard deviation over seeds of one metric, at the steps that all seeds have."""

    steps: np.ndarray
    mean: np.ndarray
    deviation: np.ndarray


def plot_all(by_budget: Mapping[str, Rows], folder: Path) -> list[Path]:
    """Draws every picture that the results allow into `folder`; returns their paths."""
    pictures = {}
    for budget, rows in by_budget.items():
        pictures[f"eer_{budget}.png"] = eer_figure(rows, in_minutes=budget == "time")
    rows = by_budget.get("steps", {})
    pictures["gate.png"] = gate_figure(rows)
    pictures["alignment.png"] = alignment_figure(rows)
    return [save_figure(figure, folder / name) for name, figure in pictures.items() if figure is not None]


def main_branch(result: dict) -> str:
    """Returns the branch whose teacher is reported: the ECAPA-TDNN, or the only one."""
    return "ecapa" if "ecapa" in result["branches"] else result["branches"][0]


def curve(results: Sequence[dict], name: str | None = None, each: float | None = None) -> Curve | None:
    """Returns a metric over steps (times `each`, where given); None where no result has it.

    Without a name it is the EER of the reported branch.
    """
    named = [one["curves"].get(name or f"eer/{main_branch(one)}") for one in results]
    found = [dict(map(tuple, values)) for values in named if values]
    if not found:
        return None
    steps = sorted(set.intersection(*(set(one) for one in found)))
    values = np.array([[one[step] for step in steps] for one in found])
    deviation = values.std(axis=0, ddof=1) if len(values) > 1 else np.zeros(len(steps))
    return Curve(np.array(steps) * (each or 1), values.mean(axis=0), deviation)


def eer_figure(rows: Rows, in_minutes: bool = False) -> Figure | None:
    """EER against steps, or against CPU-minutes of training: lines are means, bands standard deviations over seeds."""
    panels = [(title, [name for name in names if name in rows]) for title, names in PANELS]
    panels = [(title, names) for title, names in panels if names]
    if not panels:
        return None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.4 * len(panels), 4.8), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.08, wspace=0.03)
        axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
        lows, highs, ends, labels = [], [], [], []
        for ax, (title, names) in zip(axes, panels):
            labels.append([])
            for number, name in enumerate([*names, *({ablation.REFERENCE} & rows.keys())]):
                each = np.mean([one["cpu_seconds_a_step"] or 0 for one in rows[name]]) / 60 if in_minutes else None
                found = curve(rows[name], each=each)
                if found is None:
                    continue
                of_reference = name == ablation.REFERENCE
                color = INK if of_reference else LINES[number]
                dashes, width, order = ("-", 2.4, 4) if of_reference else (DASHES[number % 4], 1.6, 3)
                ax.plot(
                    found.steps,
                    found.mean,
                    color=color,
                    linewidth=width,
                    marker="o",
                    markersize=3.2,
                    linestyle=dashes,
                    zorder=order,
                )
                low, high = found.mean - found.deviation, found.mean + found.deviation
                ax.fill_between(found.steps, low, high, color=color, alpha=0.14, linewidth=0)
                labels[-1].append((found.mean[-1], f"{SHORT.get(name, name)}  {found.mean[-1]:.1f}", color))
                lows, highs, ends = [*lows, low.min()], [*highs, high.max()], [*ends, found.steps[-1]]
            ax.set_title(title, loc="left", fontsize=11, weight="bold", pad=8)
            ax.set_xlabel("CPU-minutes of training steps" if in_minutes else "step")
            ax.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        if not ends:  # no run was followed
            return None
        axes[0].set_ylabel("EER of the followed trials (%), lower is better")
        for ax, of_panel in zip(axes, labels):
            ax.set(ylim=(max(np.floor(min(lows)) - 1, 0), max(highs) + 0.5), xlim=(0, max(ends)))
            label_ends(ax, of_panel, 1.0, line_height=0.055)
    return figure


def gate_figure(rows: Rows) -> Figure | None:
    """The final EER against the step at which the contrastive loss stopped; small marks are seeds, large ones means.

    A line joins the rows whose step was fixed beforehand, from never on to never off: is a rule's mark below it?
    """
    fixed = [
        name for name in ("multi-head", "memo-step-early", "memo-step", "memo-step-late", "memo-always") if name in rows
    ]
    rules = [name for name in (ablation.REFERENCE, "memo-conflict") if name in rows]
    tests = list(dict.fromkeys(test for name in fixed + rules for one in rows[name] for test in one["tests"]))
    if not rules or not tests:
        return None
    total = max(one["total_steps"] for name in fixed + rules for one in rows[name])
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(1.6 + 4.4 * len(tests), 4.4), layout="constrained")
        axes = figure.subplots(1, len(tests), squeeze=False)[0]
        for ax, test in zip(axes, tests):
            means = []
            looks = [(name, MUTED, "o", "stopped at a fixed step") for name in fixed]
            looks += [(name, color, mark, SHORT[name]) for name, color, mark in zip(rules, LINES, "sD")]
            for name, color, mark, said in looks:
                points = [
                    (closing_point(one), one["tests"][test][main_branch(one)]["eer"])
                    for one in rows[name]
                    if test in one["tests"]
                ]
                if points:
                    x, y = np.array(points, float).T
                    ax.plot(x, y, mark, color=color, markersize=5, alpha=0.5, markeredgewidth=0, zorder=3)
                    ax.plot(
                        x.mean(),
                        y.mean(),
                        mark,
                        color=color,
                        markersize=9,
                        markeredgecolor="white",
                        zorder=4,
                        label=said if said not in ax.get_legend_handles_labels()[1] else None,
                    )
                    if name in fixed:
                        means.append((x.mean(), y.mean()))
            ax.plot(*zip(*sorted(means)), color=MUTED, linewidth=1.2, zorder=2)
            ax.set_title(test, loc="left", fontsize=11, weight="bold", pad=8)
            ax.set_xlabel("step at which the contrastive loss stopped")
            ax.set_xlim(-0.05 * total, 1.05 * total)
            ticks = np.linspace(0, total, 5)
            ax.set_xticks(ticks, ["never on", *(f"{tick:.0f}" for tick in ticks[1:-1]), "never off"])
        axes[0].set_ylabel("EER at the end (%), lower is better")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9)
    return figure


def closing_point(result: dict) -> int:
    """Returns the step from which on there was no contrastive loss: 0 for never on, the last for never off."""
    if result["gate"]["rule"] == "never":
        return 0
    closed = result["gate"]["closed_at"]
    return result["total_steps"] if closed is None else closed


def alignment_figure(rows: Rows, source: str = "memo-always") -> Figure | None:
    """The cosine between the two losses' gradients at the embedding while both are on, above the contrastive loss.

    Both are from the row whose gate never closes; marks tell where the rules closed it in the other rows.
    """
    results = rows.get(source, [])
    panels = (
        ("alignment/", "Do both losses agree?", "cosine of their gradients at the embedding"),
        ("loss/contrastive/", "What the plateau rule watches", "NT-Xent times its weight, nats"),
    )
    if not results or curve(results, f"alignment/{results[0]['branches'][0]}") is None:
        return None
    closings = [
        (f"{name.removeprefix('memo-')} rule", float(np.mean(points)), number)
        for number, name in enumerate(("memo-step", "memo-plateau", "memo-conflict"))
        if (points := [one["gate"]["closed_at"] for one in rows.get(name, []) if one["gate"]["closed_at"] is not None])
    ]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.6, 6.2), layout="constrained")
        axes = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        for ax, (prefix, title, unit) in zip(axes, panels):
            labels = []
            for number, branch in enumerate(results[0]["branches"]):
                found = curve(results, prefix + branch)
                half = max(len(found.steps) // 60, 1)
                mean, color = running_mean(found.mean, half), COLORS[number]
                deviation = running_mean(found.deviation, half)
                ax.plot(found.steps, found.mean, color=color, linewidth=0.6, alpha=0.3)
                ax.plot(found.steps, mean, color=color, linewidth=1.8, linestyle=DASHES[number])
                ax.fill_between(found.steps, mean - deviation, mean + deviation, color=color, alpha=0.14, linewidth=0)
                labels.append((mean[-1], f"{branch}  {mean[-1]:.3g}", color))
            low, high = ax.get_ylim()
            ax.set_ylim(min(0.0, low), high)
            ax.set_xlim(0, results[0]["total_steps"])
            add_title(ax, title, unit)
            for _, step, number in closings:
                ax.axvline(step, color=INK, linewidth=1, linestyle=DASHES[number + 1], zorder=2)
            label_ends(ax, labels, 1.0)
        threshold = results[0]["gate"].get("min_alignment")
        if threshold is not None:
            axes[0].axhline(threshold, color=MUTED, linewidth=1, linestyle=DASHES[2])
            axes[0].annotate(
                f"threshold of the conflict rule, {threshold:g}",
                (0.005, threshold),
                fontsize=8,
                xycoords=("axes fraction", "data"),
                xytext=(0, 3),
                textcoords="offset points",
                color=MUTED,
                path_effects=HALO,
            )
        for place, (name, step, _) in enumerate(sorted(closings, key=lambda one: one[1])):
            on_left = step >= 0.65 * results[0]["total_steps"]
            name_line(axes[0], step, f"{name}, {step:.0f}", on_left=on_left, height=0.97 - 0.09 * place)
        axes[-1].set_xlabel("step")
    return figure
