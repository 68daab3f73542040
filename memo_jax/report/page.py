"""The report of a run: one HTML page that holds its pictures and sounds and needs no other file and no internet."""

import base64
import dataclasses
import html
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from memo_jax import config as configs
from memo_jax.audio import SAMPLE_RATE
from memo_jax.data.batches import Utterances
from memo_jax.files import as_path, check_bucket, write_text
from memo_jax.inference.evaluate import TrialEvaluation
from memo_jax.inference.workdir import workdir_model
from memo_jax.log import plural, read_metrics
from memo_jax.models import parameter_count
from memo_jax.report.learning_curves import gate_closing_step, learning_curve_panels, progress_texts
from memo_jax.report.pictures import figure_element, picture, swatch, theme_css, variable
from memo_jax.report.template import PAGE, SCRIPT, STYLE_SHEET
from memo_jax.scoring import metrics
from memo_jax.scoring.figures import BASELINE, det_figure, embedding_map_figure, score_histogram_figure, system_looks
from memo_jax.scoring.score import P_TARGETS, error_intervals, error_report, in_brackets
from memo_jax.training.goodput import PARTS, shares_text
from memo_jax.training.recipe import reads_labels
from memo_jax.training.run_record import read_run
from memo_jax.version import __version__

HARDEST = 6  # trials of each kind
CLIP_SECONDS = 8.0  # of a recording that can be listened to
MAP_SPEAKERS, MAP_RECORDINGS = 60, 1500  # most on the map: more would be unreadable


@dataclasses.dataclass
class Tested:
    """What the trials say about a run: scores and error rates by system, the embeddings of the best branch."""

    evaluation: TrialEvaluation
    scores: dict[str, np.ndarray]
    rates: dict[str, dict]
    best: str
    embeddings: np.ndarray


def write_report(
    workdir: str | os.PathLike,
    output: str | os.PathLike | None = None,
    *,
    data: str | os.PathLike | None = None,
    trials: str | os.PathLike | None = None,
    step: int | None = None,
) -> Path:
    """Writes the report of a run; returns its path.

    Args:
      workdir: of a training run.
      output: the page; report.html in the workdir by default.
      data: dataset to test on; that of the run's config by default.
      trials: trial list of its recordings, likewise. Without any, the page covers the training alone, and says so.
      step: which checkpoint to test; the latest by default.

    Raises:
      FileNotFoundError: no such run, dataset or list. ValueError: the workdir has no metrics, or bad trials.
      OSError: the page cannot be written.
    """
    workdir = as_path(workdir)
    check_bucket(workdir)
    config = configs.workdir_config(workdir)
    rows = read_metrics(workdir)
    if not rows:
        raise ValueError(f"{workdir} has no metrics yet, so there is nothing to report")
    data, trials = data or config.evaluation.data or None, trials or config.evaluation.trials or None
    if (data is None) != (trials is None):
        raise ValueError("give both the dataset and the trial list: --data DATASET --trials FILE")
    tested = None if trials is None else tested_run(workdir, config, data, trials, step)
    output = workdir / "report.html" if output is None else Path(output)
    write_text(output, page(workdir, config, rows, tested, data, trials))
    return output


def tested_run(
    workdir: str | os.PathLike,
    config: configs.ConfigDict,
    data: str | os.PathLike,
    trials: str | os.PathLike,
    step: int | None = None,
) -> Tested:
    """Returns how the teachers of a run do on trials, each branch alone, their average, and the log-mel statistics.

    Raises ValueError where the trials are not of both kinds, or their recordings are missing from the dataset.
    """
    evaluation = TrialEvaluation(Utterances(data), trials)
    evaluation.trials.require_both_kinds()
    scores, embeddings = {}, {}
    for branch in config.model.branches:
        model = workdir_model(workdir, branch, "teacher", step)
        name = model.name
        embeddings[name] = evaluation.embeddings(model.function)
        scores[name] = evaluation.scores(embeddings[name])
    if len(scores) > 1:
        together = f"{','.join(config.model.branches)} teacher, step {model.provenance['step']}"
        scores[together] = metrics.average_scores(list(scores.values()))
    scores[BASELINE] = evaluation.statistics_scores()
    rates = {
        name: error_report(found, evaluation.target) | error_intervals(found, evaluation.trials, evaluation.speakers())
        for name, found in scores.items()
    }
    best = min(embeddings, key=lambda name: rates[name]["eer"])
    return Tested(evaluation, scores, rates, best, embeddings[best])


def page(
    workdir: str | os.PathLike,
    config: configs.ConfigDict,
    rows: Sequence[Mapping],
    tested: Tested | None,
    data: str | os.PathLike | None,
    trials: str | os.PathLike | None,
) -> str:
    """Returns the page as HTML text."""
    name = Path(workdir).resolve().name
    last = rows[-1]
    sections = [
        ("run", "Model and data", facts_table(run_facts(workdir, config, rows))),
        ("curves", "Learning curves", curves_section(rows, config.model.branches, tested)),
    ]
    if tested is None:
        note = (
            "<p class=note>This run has no trial list, so this page says nothing about telling speakers apart. Give "
            "one: <code>memo-jax report WORKDIR --data DATASET --trials FILE</code>.</p>"
        )
        sections.append(("test", "Telling speakers apart", note))
    else:
        sections += [
            ("test", "Telling speakers apart", test_section(tested, data, trials)),
            ("map", "Map of the embeddings", map_section(tested)),
            ("hardest", "Hardest trials", hardest_section(tested)),
        ]
    links = "".join(f'<a href="#{key}">{html.escape(title)}</a>' for key, title, _ in sections)
    body = "".join(
        f'<section id="{key}"><h2>{html.escape(title)}</h2>{content}</section>' for key, title, content in sections
    )
    step = f"step {last['step']:,}" + (f", epoch {last['epoch']:.1f}" if "epoch" in last else "")
    return PAGE.format(
        title=html.escape(f"{name}: report of a run"),
        name=html.escape(name),
        step=step,
        style=theme_css() + STYLE_SHEET,
        cards="".join(headline(rows, tested)),
        links=links,
        body=body,
        script=SCRIPT,
        version=__version__,
    )


def headline(rows: Sequence[Mapping], tested: Tested | None) -> Iterator[str]:
    """Yields the few numbers that a reader looks for first, as cards."""
    if tested is not None:
        for name, look in system_looks(tested.rates).items():
            rates = tested.rates[name]
            interval = rates["eer_interval"]
            between = f"95 % interval {interval[0]:.2f} to {interval[1]:.2f}<br>" if interval else ""
            costs = ", ".join(f"minDCF({p}) {rates[f'min_dcf_{p}']:.3f}" for p in P_TARGETS)
            yield (
                f'<div class=card style="border-top-color: {variable(look.color)}"><b>{rates["eer"]:.2f} %</b>'
                f"<span>EER, {html.escape(name)}</span><small>{between}{costs}</small></div>"
            )
    closed = gate_closing_step(rows)
    if closed is not None:
        yield f"<div class=card><b>{closed:,}</b><span>step at which the gate closed</span></div>"
    elif any(row.get("gate/open") for row in rows):
        yield "<div class=card><b>open</b><span>gate, to the end of these metrics</span></div>"


def run_facts(workdir: str | os.PathLike, config: configs.ConfigDict, rows: Sequence[Mapping]) -> dict[str, str]:
    """Returns what the run is, by name, in the words of a methods section."""
    facts = {"Recordings": _dataset_text(config.data.train, (read_run(workdir) or {}).get("data", {}))}
    facts["Labels"] = labels_text(config)
    for branch in config.model.branches:
        model = workdir_model(workdir, branch)
        facts[f"Network {branch}"] = (
            f"{parameter_count(model.variables['params']):,} parameters, {model.dimension}-dimensional embeddings"
        )
    d, a, g = config.data, config.augment, config.gate
    seen_by = "teachers, without augmentation" if config.teacher.view == "clean" else "students and teachers"
    crops = f"{d.global_crops} of {d.global_seconds:g} s for {seen_by}"
    if d.local_crops:
        crops += f", {d.local_crops} of {d.local_seconds:g} s for students"
    facts["Crops"] = f"{crops}; {d.batch_size} utterances a step"
    banks = [f"{kind} from {a[kind]}" for kind in ("noise", "music", "speech", "rirs") if a[kind]]
    if not a.speech and a.babble_from_batch:
        banks.append("babble of the batch")
    facts["Augmentation"] = ", ".join(banks) or "none"
    weights = config.loss
    terms = {
        "self-distillation": weights.self,
        f"cross-distillation ({weights.cross_head} head)": weights.cross if len(config.model.branches) > 1 else 0,
        "mean entropy": weights.mean_entropy,
        "KoLeo": weights.koleo,
        "variance": weights.variance,
        "covariance": weights.covariance,
        "contrastive, while the gate is open": weights.contrastive if g.rule != "never" else 0,
        "AAM-softmax on labels": config.supervised.weight,
    }
    if terms["contrastive, while the gate is open"]:
        closed = gate_closing_step(rows)
        facts["Gate"] = f"rule “{g.rule}”, " + (f"closed at step {closed:,}" if closed is not None else "not closed")
    if p := config.positives.clusters:
        facts["Positives"] = f"the teachers' crops from partners by {p:,} clusters, {config.positives.cluster}"
    facts["Losses"] = ", ".join(f"{name} × {weight:g}" for name, weight in terms.items() if weight)
    facts["Losses"] += f"; {config.model.prototypes:,} prototypes"
    optimizer = config.optimizer
    facts["Optimiser"] = (
        f"{optimizer.name}, learning rate {optimizer.learning_rate:g} at a batch of 256; teacher "
        f"momentum {config.teacher.momentum:g} to {config.teacher.end_momentum:g}"
    )
    last = rows[-1]
    facts["Length"] = f"{last['step']:,} steps" + (f", {last['epoch']:.1f} epochs" if "epoch" in last else "")
    if "cpu_seconds" in last:
        facts["Length"] += f"; {last['cpu_seconds'] / 3600:.2f} processor hours since the last start"
    facts |= time_facts(last)
    facts["Seed"] = str(config.seed)
    return facts


def time_facts(row: Mapping) -> dict[str, str]:
    """Returns what a row of metrics says about the time since the last start."""
    facts = {}
    shares = {part: row[f"goodput/{part}"] for part in PARTS if row.get(f"goodput/{part}") is not None}
    if shares:
        facts["Wall time"] = f"{shares_text(shares)}, since the last start"
    if row.get("checkpoint_seconds") is not None:
        facts["Checkpoints"] = f"training paused for {row['checkpoint_seconds']:.3g} s at the last one"
    if "input" in shares:
        facts["Input"] = f"the devices waited for batches at most {shares['input']:.2%} of the time".replace("%", " %")
    return facts


def _dataset_text(path, recorded: Mapping) -> str:
    """What the run was trained on: as run.json has it, and its length where that very dataset is still there."""
    text = f"{recorded.get('train', path)}"
    if "utterances" in recorded:
        text += f": {plural(recorded['utterances'], 'utterance')}, fingerprint {recorded['fingerprint'][:12]}"
    try:
        utterances = Utterances(path)
    except FileNotFoundError:
        return f"{text} (no longer there)"
    except (OSError, ValueError):
        return f"{text} (can no longer be read)"
    if recorded.get("fingerprint", utterances.fingerprint) != utterances.fingerprint:
        return f"{text} (another dataset is there now)"
    return f"{text}; {utterances.seconds.sum() / 3600:.2f} h"


def labels_text(config: configs.ConfigDict) -> str:
    """Returns which labels a run has learned from."""
    if not reads_labels(config):
        return "none read"
    return f"those of {config.supervised.labels}" if config.supervised.labels else "the speakers of the recordings"


def curves_section(rows: Sequence[Mapping], branches: Sequence[str], tested: Tested | None) -> str:
    """Returns the learning curves, one picture per panel."""
    references = {BASELINE: tested.rates[BASELINE]["eer"]} if tested else {}
    said = f"{', '.join(progress_texts(rows))}. Thick lines are running means, faint ones the values."
    closed_at = gate_closing_step(rows)
    if closed_at is not None:
        said += f" The dotted vertical line marks step {closed_at:,}, at which the gate closed."
    panels = learning_curve_panels(rows, branches=branches, references=references)
    pictures = "".join(
        figure_element(picture(figure, f"{panel.title} over the steps of training"), panel.title, panel.unit)
        for panel, figure in panels
    )
    return f"<p>{html.escape(said[0].upper() + said[1:])}</p><div class=panels>{pictures}</div>"


def test_section(tested: Tested, data: str | os.PathLike, trials: str | os.PathLike) -> str:
    """Returns error rates as a table, DET curves and score histograms."""
    evaluation = tested.evaluation
    target, looks = evaluation.target, system_looks(tested.rates)
    columns = ("EER", *(f"minDCF({p})" for p in P_TARGETS), "threshold of EER")
    lines = []
    for name, rates in tested.rates.items():
        cells = (
            f"{rates['eer']:.2f} %" + in_brackets(rates["eer_interval"], 2),
            *(f"{rates[f'min_dcf_{p}']:.3f}" + in_brackets(rates[f"min_dcf_{p}_interval"], 3) for p in P_TARGETS),
            f"{rates['eer_threshold']:.3f}",
        )
        row = "".join(f'<td data-column="{column}">{cell}</td>' for column, cell in zip(columns, cells))
        lines.append(f"<tr><th scope=row>{swatch(looks[name])}{html.escape(name)}</th>{row}</tr>")
    reason = next((rates["no_interval"] for rates in tested.rates.values() if not rates["eer_interval"]), None)
    intervals = f"No interval: {reason}."
    if reason is None:
        intervals = "In brackets are 95 % intervals, by bootstrap over speakers."
    said = (
        f"<p>{plural(len(target), 'trial')} of {html.escape(Path(trials).name)}, {int(target.sum()):,} of them target "
        f"trials, over {plural(len(evaluation.rows), 'recording')} of {html.escape(str(data))}. "
        f"{html.escape(intervals)} The log-mel statistics show what room and microphone alone give away.</p>"
    )
    head = "<th></th>" + "".join(f"<th scope=col>{column}</th>" for column in columns)
    table = f"<table class=rates><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    det = det_figure({name: (scores, target) for name, scores in tested.scores.items()}, title=None)
    note = "Dots mark equal error, diamonds the least cost at a prior of 0.05."
    pictures = [
        figure_element(
            picture(det, "DET curves of all systems"),
            "Detection error trade-off (lines as in the table)",
            note,
            kind="tall",
        )
    ]
    for name, scores in tested.scores.items():
        thresholds = {}
        for p in P_TARGETS:
            point = metrics.min_dcf_point(scores, target, p)
            if np.isfinite(point.threshold):
                thresholds[f"minDCF({p}) {point.value:.3f}"] = point.threshold
        drawn = picture(
            score_histogram_figure(scores, target, looks[name], thresholds=thresholds),
            f"Histogram of the scores by {name}",
        )
        pictures.append(figure_element(drawn, f"Scores by {name}", mark=swatch(looks[name])))
    legend = (
        "<p>In the histograms, scores of one speaker (target trials) are in the system's colour, of different speakers "
        "(nontarget) in grey; the strongly filled parts are the errors at the threshold of equal error.</p>"
    )
    return f"{said}{table}{legend}<div class=pictures>{''.join(pictures)}</div>"


def map_section(tested: Tested) -> str:
    """Returns the map of the best branch's embeddings, with what can be read off it."""
    evaluation = tested.evaluation
    speakers = np.array(evaluation.row_speakers())
    if not all(speakers):
        return "<p class=note>The speakers of these recordings are unknown, so there is nothing to colour.</p>"
    chosen = _chosen_for_map(speakers)
    points = embedding_map(tested.embeddings[chosen])
    shown = len(np.unique(speakers[chosen]))
    every = len(np.unique(speakers))
    shown_text = plural(shown, "speaker") + (f" of {every}" if every > shown else "")
    said = (
        f"<p>{plural(len(chosen), 'recording')} of {shown_text}, reduced from {tested.embeddings.shape[1]} dimensions "
        "to two by t-SNE of the cosine distances: voices near in the map are near in the embedding, but distances "
        "between groups mean little. The network has not seen the speakers' names; they only colour the map, and "
        "are shown where there is room.</p>"
    )
    description = "Two-dimensional map of the embeddings, coloured by speaker"
    drawn = "".join(
        picture(embedding_map_figure(points, speakers[chosen], size), description, kind)
        for kind, size in (("wide", (9.6, 5.2)), ("narrow", (4.2, 4.8)))
    )
    look = system_looks(tested.rates)[tested.best]
    return said + figure_element(drawn, tested.best, mark=swatch(look))


def _chosen_for_map(speakers: np.ndarray) -> np.ndarray:
    """Rows of evenly chosen speakers, with about equally many recordings of each."""
    kinds = np.unique(speakers)
    kinds = kinds[np.linspace(0, len(kinds) - 1, min(len(kinds), MAP_SPEAKERS)).round().astype(int)]
    most = max(MAP_RECORDINGS // len(kinds), 1)
    return np.sort(np.concatenate([np.flatnonzero(speakers == kind)[:most] for kind in kinds]))


def embedding_map(embeddings: np.ndarray) -> np.ndarray:
    """Returns points [N, 2] whose neighbours are those of the embeddings [N, D] by cosine; seeded."""
    from sklearn.manifold import TSNE

    units = metrics.unit_norm(embeddings)
    if len(units) < 4:
        return np.pad(units, ((0, 0), (0, 2)))[:, :2]
    perplexity = min(30.0, (len(units) - 1) / 3)
    return TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(units)


def hardest_section(tested: Tested) -> str:
    """Returns tables of the trials that the best branch gets most wrong, to listen to."""
    scores, evaluation = tested.scores[tested.best], tested.evaluation
    target, threshold = evaluation.target, tested.rates[tested.best]["eer_threshold"]
    clips: dict[int, str] = {}
    parts = [
        f"<p>By {html.escape(tested.best)}, which accepts from {threshold:.3f} on at equal error. "
        f"The first {CLIP_SECONDS:g} s of each recording.</p>"
    ]
    for title, wanted, order in (
        ("One speaker, but least alike", target, scores),
        ("Different speakers, but most alike", ~target, -scores),
    ):
        rows = np.flatnonzero(wanted)
        rows = rows[np.argsort(order[rows], kind="stable")][:HARDEST]
        lines = []
        for row in rows:
            wrong = (scores[row] >= threshold) != target[row]
            cells = "".join(_clip_cell(evaluation, position, clips) for position in evaluation.pairs[row])
            lines.append(
                f"<tr><td class=score>{scores[row]:.3f}<small>{'wrong' if wrong else 'right'}</small></td>{cells}</tr>"
            )
        parts.append(f"<h3>{title}</h3><table class=trials><tbody>{''.join(lines)}</tbody></table>")
    return "".join(parts)


def _clip_cell(evaluation: TrialEvaluation, position: int, clips: dict[int, str]) -> str:
    """A table cell with the name of a recording and a player."""
    row = int(evaluation.rows[position])
    if row not in clips:
        clips[row] = _sound(evaluation.utterances, row)
    name = html.escape(evaluation.utterances.names[row])
    return f'<td><code>{name}</code><audio controls preload="metadata" src="{clips[row]}"></audio></td>'


def _sound(utterances: Utterances, row: int) -> str:
    """The beginning of a recording as a data URL: MP3, which every browser plays."""
    import soundfile

    samples = utterances[row][: round(CLIP_SECONDS * SAMPLE_RATE)]
    file = io.BytesIO()
    soundfile.write(file, samples, SAMPLE_RATE, format="MP3")
    return "data:audio/mpeg;base64," + base64.b64encode(file.getvalue()).decode()


def facts_table(facts: Mapping[str, str]) -> str:
    """Returns names and texts as a table."""
    rows = ((html.escape(name), html.escape(text)) for name, text in facts.items())
    lines = "".join(f"<tr><th scope=row>{name}</th><td>{text}</td></tr>" for name, text in rows)
    return f"<table class=facts><tbody>{lines}</tbody></table>"
