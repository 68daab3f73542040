"""Pictures: what they show follows the data, they are saved whole, and bad input is named."""

import errno
import html
import json
import os

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.image import imread

from memo_jax.report import learning_curves as report
from memo_jax.report.pictures import picture
from memo_jax.scoring.figures import (
    BASELINE,
    Look,
    det_figure,
    embedding_map_figure,
    plot_det,
    save_figure,
    score_histogram_figure,
    system_looks,
)
from memo_jax.scoring.metrics import eer


def rows(steps=40, closed_at=20):
    """Rows as training writes them, with a gate that closes half-way."""
    made = []
    for step in range(1, steps + 1):
        is_open = closed_at is None or step <= closed_at
        row = {"step": step, "epoch": step / 10, "loss": 9.0 / step, "lr": 1e-3, "momentum": 0.99}
        row |= {"gate/open": int(is_open), "gate/closed_at": -1 if is_open else closed_at}
        row |= {"gate/loss": 3.0, "gate/alignment": 0.5}
        for branch in ("ecapa", "resnet"):
            row |= {f"loss/{kind}/{branch}": 5 + 1 / step for kind in ("self", "cross")}
            row |= {f"loss/contrastive/{branch}": 4 / step if is_open else 0.0, f"loss/{branch}": 8 / step}
            row |= {f"teacher_entropy/self/{branch}": 2.0, f"embedding_std/{branch}": 0.06}
        if step % 10 == 0:
            row |= {"eer/test": 20 - step / 4, "min_dcf_0.01/test": 0.9, "min_dcf_0.05/test": 0.8 - step / 1000}
        made.append(row)
    return made


def texts(figure):
    return " | ".join(text.get_text() for text in figure.findobj(lambda part: hasattr(part, "get_text")))


def panel(figure, title):
    return next(ax for ax in figure.axes if ax.get_title(loc="left") == title)


def titles(figure):
    return [ax.get_title(loc="left") for ax in figure.axes]


def test_panels_follow_the_metrics_there_are():
    found = titles(report.learning_curve_figure(rows()))
    assert len(found) == len(set(found))
    assert {"minDCF at a prior of 0.01", "minDCF at a prior of 0.05"} <= set(found)
    assert {"Equal error rate", "Distillation loss", "Contrastive loss", "Teacher entropy", "Total loss"} <= set(found)
    assert not {"KL divergence", "Teacher temperature", "Do both losses agree?", "Speed"} & set(found)
    plain = [{"step": 1, "loss/self/ecapa": 5.0, "loss": 5.0, "loss/ecapa": 5.0}, {"step": 2, "loss/self/ecapa": 4.0}]
    assert titles(report.learning_curve_figure(plain)) == ["Distillation loss", "Total loss"]


def test_an_unknown_metric_gets_a_panel_of_its_own():
    figure = report.learning_curve_figure([{"step": 1, "loss_scale": 2.0, "new_thing/a": 1.0, "new_thing/b": 2.0}])
    assert titles(figure) == ["Loss scale", "New thing"]
    assert len(panel(figure, "New thing").lines) == 2


def test_the_gate_is_marked_where_it_closed_and_its_loss_ends_there():
    figure = report.learning_curve_figure(rows(closed_at=20))
    assert "stopped by its gate at step 20" in texts(figure) and "gate closes,\nstep 20" in texts(figure)
    lines = panel(figure, "Contrastive loss").lines
    of_losses = [line for line in lines if len(line.get_xdata()) > 2]
    assert of_losses and all(max(line.get_xdata()) == 20 and min(line.get_ydata()) > 0 for line in of_losses)
    still_open = report.learning_curve_figure(rows(closed_at=None))
    assert "contrastive loss still on" in texts(still_open) and "gate closes" not in texts(still_open)


def test_branches_keep_their_colour_and_heads_their_dashes():
    """Colour means branch and dashes mean head, whichever of the two spellings of a metric's name is used."""
    made = [
        {"step": i, "loss/self/ecapa": 1.0, "loss/cross/ecapa": 2.0, "loss/self/resnet": 3.0, "kl/resnet/self": 4.0}
        for i in (1, 2)
    ]
    figure = report.learning_curve_figure(made)
    own, cross, other = panel(figure, "Distillation loss").lines
    assert to_hex(own.get_color()) == to_hex(cross.get_color()) != to_hex(other.get_color())
    assert own.get_linestyle() == other.get_linestyle() != cross.get_linestyle()
    assert to_hex(panel(figure, "KL divergence").lines[0].get_color()) == to_hex(other.get_color())


def test_error_rates_show_last_best_and_references():
    figure = report.learning_curve_figure(
        [{"step": 1, "eer/test": 20.0}, {"step": 2, "eer/test": 7.5}, {"step": 3, "eer/test": 8.25}],
        references={"log-mel statistics": 14.9},
    )
    shown = texts(figure)
    assert "8.25 %, best 7.50 %" in shown and "log-mel statistics\n14.90 %" in shown
    low, high = panel(figure, "Equal error rate").get_ylim()
    assert low == 0 and high > 20


def test_values_that_are_no_numbers_leave_gaps():
    made = [{"step": step, "loss": loss} for step, loss in enumerate([3.0, None, float("nan"), 1.0], 1)]
    (line,) = panel(report.learning_curve_figure(made), "Total loss").lines
    assert line.get_xdata().tolist() == [1, 4]
    with pytest.raises(ValueError, match="no metric to draw, only step"):
        report.learning_curve_figure([{"step": 1}])


def test_running_mean_is_the_mean_of_what_is_near():
    values = np.random.default_rng(0).normal(size=50)
    expected = [values[max(0, i - 4) : i + 5].mean() for i in range(50)]
    np.testing.assert_allclose(report.running_mean(values, 4), expected, atol=1e-12)


def test_labels_do_not_overlap():
    names = [f"kl/{head}/{branch}" for head in ("self", "cross") for branch in "abc"]
    made = [{"step": step} | dict.fromkeys(names, 1.0) for step in (1, 2)]
    figure = report.learning_curve_figure(made)
    figure.canvas.draw()
    ax = panel(figure, "KL divergence")
    boxes = sorted((t.get_window_extent() for t in ax.texts if t.get_text()[0] in "abc"), key=lambda box: box.y0)
    assert len(boxes) == 6
    assert all(above.y0 >= below.y1 - 1 for below, above in zip(boxes, boxes[1:]))


def test_learning_curves_are_saved_from_a_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows()) + '{"step": 41, "lo')  # a run being killed
    out = report.plot_learning_curve(path, tmp_path / "curves.png", title="A run")
    assert out == tmp_path / "curves.png" and imread(out).std() > 0.01
    assert sorted(file.name for file in tmp_path.iterdir()) == ["curves.png", "metrics.jsonl"]
    path.write_text("")
    with pytest.raises(ValueError, match="no metrics yet"):
        report.plot_learning_curve(path, tmp_path / "none.png")
    with pytest.raises(FileNotFoundError):
        report.plot_learning_curve(tmp_path / "absent.jsonl", tmp_path / "none.png")


def test_a_figure_is_saved_whole_or_not_at_all(tmp_path):
    figure = report.learning_curve_figure(rows(2))
    (tmp_path / "old.png").write_bytes(b"old")
    with pytest.raises(OSError, match="old.png"):
        save_figure(figure, tmp_path / "old.png" / "curves.png")

    def disk_is_full(part, **_):
        part.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    figure.savefig = disk_is_full
    with pytest.raises(OSError, match="No space left on device.*old.png"):
        save_figure(figure, tmp_path / "old.png")
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("old.png", b"old")]


def trials(separation, size=3000, seed=0):
    rng = np.random.default_rng(seed)
    target = np.arange(size) % 3 == 0
    return rng.normal(size=size) + separation * target, target


def test_det_curves_are_straight_for_gaussian_scores(tmp_path):
    """Unit normal classes d apart yield a line of slope -1 on normal-deviate axes: both deviates sum to -d."""
    figure = det_figure({"only": trials(2.0, size=100_000)})
    curve = next(line for line in figure.axes[0].lines if "only" in str(line.get_label()))
    x, y = curve.get_data()
    inside = (np.abs(x) < 2) & (np.abs(y) < 2)
    assert inside.sum() > 50
    np.testing.assert_allclose(x[inside] + y[inside], -2.0, atol=0.12)


def test_det_legend_goes_from_worst_to_best_and_dots_sit_on_the_diagonal(tmp_path):
    systems = {"good": trials(3.0), "bad": trials(0.5), "middle": trials(1.5)}
    figure = det_figure(systems, p_target=0.01)
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert [label.split("\n")[0] for label in labels] == ["bad", "middle", "good"]
    assert f"EER {100 * eer(*systems['good']):.2f} %" in labels[2] and "minDCF(0.01)" in labels[2]
    dots = [line.get_data() for line in figure.axes[0].lines if line.get_marker() == "o"]
    low, high = figure.axes[0].get_xlim()
    assert len(dots) == 3 and all(x == y and low < x[0] < high for x, y in dots)
    assert imread(plot_det(systems, tmp_path / "det.png")).shape[0] > 500


def test_det_of_extreme_systems(tmp_path):
    target = np.array([True, False] * 20)
    kinds = {"perfect": target.astype(float), "reversed": -1.0 * target, "ties": np.zeros(40)}
    systems = {name: (scores, target) for name, scores in kinds.items()}
    plot_det(systems, tmp_path / "det.png")
    assert "perfect\nEER 0.00 %" in texts(det_figure(systems))
    with pytest.raises(ValueError, match="system 'mine': .*are target trials"):
        det_figure({"mine": (np.zeros(2), np.ones(2, bool))})
    with pytest.raises(ValueError, match="no system"):
        det_figure({})


def test_histogram_shows_all_trials_and_the_errors_at_the_threshold(tmp_path):
    scores, target = trials(2.0)
    figure = score_histogram_figure(scores, target, Look("#112233"), thresholds={"strict": 2.5})
    patches = figure.axes[0].patches
    sums = [patch.get_data().values.sum() for patch in patches]
    # a class: outline, light fill (each all of it), errors; nontarget trials first
    assert sums[0] == sums[1] == pytest.approx(100) and sums[3] == sums[4] == pytest.approx(100)
    assert sums[2] == pytest.approx(100 * eer(scores, target), abs=0.2)
    assert sums[5] == pytest.approx(100 * eer(scores, target), abs=0.2)
    assert (
        patches[3].get_data().values @ patches[3].get_data().edges[:-1]
        > patches[0].get_data().values @ (patches[0].get_data().edges[:-1])
    )
    assert to_hex(patches[3].get_edgecolor()) == "#112233" != to_hex(patches[0].get_edgecolor())
    assert "strict, at 2.5" in texts(figure) and "equal error" in texts(figure)
    save_figure(score_histogram_figure(np.zeros(4), target[:4], Look("#112233")), tmp_path / "ties.png")


@pytest.mark.parametrize("thresholds", [(2.4, 2.5, 2.6), (-3.9, -3.8), (1.0, 1.0, 1.0)])
def test_names_of_thresholds_never_collide(thresholds):
    figure = score_histogram_figure(
        *trials(2.0), Look("#112233"), thresholds={f"operating point {i}": t for i, t in enumerate(thresholds)}
    )
    figure.canvas.draw()
    (ax,) = figure.axes
    names = [text for text in ax.texts if ", at " in text.get_text()]
    boxes = [name.get_window_extent() for name in names]
    lines = [line for line in ax.lines if line.get_xdata()[0] == line.get_xdata()[1]]
    assert len(boxes) == len(lines) == 1 + len(thresholds)
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:i])
        assert 0 <= box.x0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
        for line in lines:
            x = ax.transData.transform((line.get_xdata()[0], 0))[0]
            top = ax.transAxes.transform((0, line.get_ydata()[1]))[1]
            assert not (box.x0 < x < box.x1 and top > box.y0 + 1)
    tallest = max(patch.get_data().values.max() for patch in ax.patches)
    assert ax.transData.transform((0, tallest))[1] <= min(box.y0 for box in boxes)


def test_a_system_looks_the_same_in_every_picture():
    """The baseline keeps its own look, and others theirs, whether it comes first, last or not at all."""
    systems = ["ecapa", "resnet", "average"]
    looks = system_looks([*systems, BASELINE])
    assert len({look.color for look in looks.values()}) == 4
    assert system_looks(systems) == {name: looks[name] for name in systems}
    assert system_looks([BASELINE, *systems]) == looks
    det = det_figure({name: trials(1.0 + i) for i, name in enumerate(looks)}, title=None)
    drawn = {line.get_label().split("\n")[0]: to_hex(line.get_color()) for line in det.axes[0].lines}
    made = [{"step": i, "eer/resnet": 9.0, "eer/ecapa": 9.5, "loss/self/ecapa": 1.0} for i in (1, 2)]
    panels = report.learning_curve_panels(made, branches=["ecapa", "resnet"], references={BASELINE: 30.0})
    curves = {panel.title: figure.axes[0].lines for panel, figure in panels}
    resnet, ecapa, baseline = (to_hex(line.get_color()) for line in curves["Equal error rate"])
    (own,) = (to_hex(line.get_color()) for line in curves["Distillation loss"])
    assert (drawn["ecapa"], drawn["resnet"], drawn[BASELINE]) == (ecapa, resnet, baseline) and own == ecapa
    assert all(drawn[name] == look.color.lower() for name, look in looks.items())


def test_names_on_the_map_do_not_overlap():
    points = np.random.default_rng(0).normal(size=(400, 2))
    figure = embedding_map_figure(points, np.arange(400) // 4, size=(4.0, 4.0))
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert 5 < len(boxes) < 100
    assert not any(box.overlaps(other) for i, box in enumerate(boxes) for other in boxes[:i])


@pytest.mark.parametrize("name", [r"$x$ a\\frac{b} 100 $ a_b^c <b>&amp; Ünï", "$$"])
def test_no_name_is_parsed_as_markup(tmp_path, name):
    """Names come from folders, files and configs: any text is drawn as it is."""
    scores, target = trials(2.0)
    points, speakers = np.random.default_rng(0).normal(size=(6, 2)), np.array([name, "b"] * 3)
    kept = [{"step": 1, "lr": 1.0, f"eer/{name}": 3.0}]
    for figure in (
        det_figure({name: (scores, target)}, title=name),
        score_histogram_figure(scores, target, Look("#112233"), thresholds={name: 1.0}),
        embedding_map_figure(points, speakers),
        report.learning_curve_figure(kept, title=name, references={name: 20.0}),
    ):
        save_figure(figure, tmp_path / "a.svg")
        shown = [
            text for text in figure.findobj(lambda artist: hasattr(artist, "get_parse_math")) if name in text.get_text()
        ]
        assert shown and not any(text.get_parse_math() for text in shown)
        assert html.escape(name, quote=False) in picture(figure, name)
