"""`memo-jax report` as users run it: one page that needs nothing else, and what it says."""

import base64
import html
import html.parser
import io
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import soundfile

import tiny
from memo_jax.config import workdir_config
from memo_jax.log import read_metrics
from memo_jax.report.page import embedding_map, labels_text, run_facts
from memo_jax.scoring.figures import HUES


class Page(html.parser.HTMLParser):
    """Every address that a page refers to, and the page's text."""

    def __init__(self, text):
        super().__init__()
        self.addresses, self.text, self.tags = [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href", "srcset", "poster", "data")]

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    output = tmp_path_factory.mktemp("report") / "new" / "page.html"
    status, text = tiny.here("report", tiny.trained_run()[0], "--output", output)
    assert status == 0 and text.splitlines()[-1] == str(output), text
    return output.read_text(encoding="utf-8")


def test_the_page_refers_to_nothing_outside_it(made):
    page = Page(made)
    assert re.findall(r'<a href="#(\w+)"', made) == re.findall(r'<section id="(\w+)"', made)
    rest = [address for address in page.addresses if not address.startswith("#")]
    kinds = {address.partition(",")[0] for address in rest}
    assert kinds == {"data:audio/mpeg;base64"}
    assert "link" not in page.tags and "@import" not in made and "http" not in made
    assert all(address.startswith("#") for address in re.findall(r"url\(([^)]*)", made))


def charts(page):
    """The <svg> elements of a page's pictures, as text."""
    return re.findall(r'<svg class="chart.*?</svg>', page, re.DOTALL)


def test_pictures_are_part_of_the_page_and_share_no_identifier(made):
    curves = len(re.findall("<b>", made.partition("<div class=panels>")[2].partition("</section>")[0]))
    assert curves > 8
    pictures = charts(made)
    assert len(pictures) == curves + 1 + 4 + 2  # DET, four histograms, the map twice
    described = [re.search('aria-label="([^"]+)"', one)[1] for one in pictures]
    assert len(set(described)) == len(pictures) - 1
    ids = re.findall(r' id="([^"]+)"', made)
    assert len(ids) == len(set(ids))
    used = re.findall(r'href="#([^"]+)"', made) + re.findall(r"url\(#([^)]+)\)", made)
    assert set(used) <= set(ids) | set(re.findall(r"id=(\w+)", made))


def test_pictures_follow_the_theme_of_the_page(made):
    """All colours are variables with a value for each scheme, except those of the map's speakers, which suit both."""
    theme = re.search(
        r":root \{ color-scheme: light dark;(.*?)\}\n@media \(prefers-color-scheme: dark\)(.*?)\} \}", made
    )
    light, dark = (dict(re.findall(r"--(\w+): (#\w+);", rules)) for rules in theme.groups())
    assert light.keys() == dark.keys() and all(light[name] != dark[name] for name in light)
    assert contrast(light["ink"], light["surface"]) > 10 < contrast(dark["ink"], dark["surface"])
    for values in (light, dark):
        assert all(
            contrast(values[name], values["surface"]) > 3 for name in {*values} - {"surface", "faint", "grid", "axis"}
        )
    for chart in charts(made):
        fixed = set(re.findall(r"#[0-9a-fA-F]{6}", chart))
        assert not fixed or "Two-dimensional map" in chart and fixed <= {hue.lower() for hue in HUES}
        assert "var(--ink)" in chart or "var(--muted)" in chart
    (bar,) = set(re.findall(r'border-top-color: var\(--(\w+)\)"><b>[\d.]+ %</b><span>EER, resnet', made))
    row = made.partition("<th scope=row>")[2]
    assert f"var(--{bar})" in re.search(r"<svg class=swatch[^>]*>[^>]*>(?=</svg>resnet teacher)", made)[0] and row


def contrast(one, other):
    """The contrast ratio of two colours, 1 to 21 (WCAG 2)."""

    def luminance(color):
        channels = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4) @ (
            0.2126,
            0.7152,
            0.0722,
        )

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("width", [390, 820, 1400])
def test_nothing_overflows_the_page(made, width, tmp_path):
    """As a browser lays it out: no sideways scrolling, and no picture, table or player wider than its section."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium is installed")
    script = """addEventListener("load", () => {
      const page = document.querySelector("iframe").contentDocument, edge = page.documentElement.clientWidth;
      const out = [...page.querySelectorAll("svg.chart, table, audio, p, figure, .card")].filter(one => {
        const box = one.getBoundingClientRect();
        return box.width > 0 && (box.right > edge - 8 || box.left < 8);
      });
      document.title = `wide ${page.scrollingElement.scrollWidth} edge ${edge} out ${out.length}`; });"""
    (tmp_path / "frame.html").write_text(
        f'<body style="margin:0"><iframe style="border:0;width:{width}px;height:800px" '
        f'srcdoc="{html.escape(made)}"></iframe><script>{script}</script>',
        encoding="utf-8",
    )
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --virtual-time-budget=3000 --window-size=1600,900 --dump-dom"
    )
    command = [browser, *flags.split(), f"--user-data-dir={tmp_path / 'profile'}", f"file://{tmp_path / 'frame.html'}"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    found = re.search(r"<title>wide (\d+) edge (\d+) out (\d+)</title>", shown)
    assert found, shown[-500:]
    assert int(found[1]) == int(found[2]) <= width and int(found[3]) == 0


def test_the_page_says_what_was_trained_and_how_it_does(made):
    text = Page(made).text
    for said in (
        "20 utterances",
        "parameters, 16-dimensional embeddings",
        "closed at step 3",
        "45 trials of trials.txt",
        "ecapa teacher, step 6",
        "resnet teacher, step 6",
        "ecapa,resnet teacher, step 6",
        "log-mel statistics",
        "95 % interval",
        "minDCF(0.01)",
        "5 speakers",
        "One speaker, but least alike",
        "self-distillation × 1, cross-distillation (cross head) × 1, contrastive, while the gate is open × ",
    ):
        assert said in text, said


def test_the_hardest_trials_can_be_heard(made):
    """Five of one speaker (there are no more) and six of different ones, two players each, with the recordings."""
    clips = re.findall(r"<code>([^<]+)</code><audio [^>]*src=\"data:audio/mpeg;base64,([^\"]+)\"", made)
    assert len(clips) == 2 * (5 + 6)
    name, content = clips[0]
    samples, rate = soundfile.read(io.BytesIO(base64.b64decode(content)))
    original, _ = soundfile.read(tiny.material().corpus / name)
    assert rate == 16000 and abs(len(samples) - len(original)) < 2500
    scores = [float(value) for value in re.findall(r"<td class=score>(-?\d\.\d+)<", made)]
    assert scores[:5] == sorted(scores[:5]) and scores[5:] == sorted(scores[5:], reverse=True)


def test_intervals_are_those_of_an_evaluation(made, tmp_path):
    """The same scores have the same interval in `eval` and in `report`."""
    run, tiny_data = tiny.trained_run()[0], tiny.material()
    options = ("--data", tiny_data.dataset, "--trials", tiny_data.trials, "--output", tmp_path, "--json")
    status, text = tiny.here("eval", "--model", run, "--branch", "ecapa", *options)
    assert status == 0, text
    found = json.loads((tmp_path / "results.json").read_text())
    row = Page(re.search(r"<tr><th scope=row><svg[^>]*>[^>]*></svg>ecapa teacher.*?</tr>", made)[0]).text
    (low, high), (least, most) = found["eer_interval"], found["min_dcf_0.01_interval"]
    assert f"{found['eer']:.2f} % ({low:.2f}–{high:.2f}){found['min_dcf_0.01']:.3f} ({least:.3f}–{most:.3f})" in row


def test_the_dataset_is_the_one_of_the_run_wherever_the_report_is_made(tmp_path, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(tiny.trained_run()[0], run)
    config = (run / "config.json").read_text()
    for path in (str(tiny.material().dataset), str(tiny.material().trials)):
        config = config.replace(f'"{path}"', '""')
    config = re.sub(r'("train": )"[^"]*"', r'\1"ds"', config)
    (run / "config.json").write_text(config)
    monkeypatch.chdir(tmp_path)

    def said(fact="Recordings"):
        return run_facts(run, workdir_config(run), read_metrics(run))[fact]

    assert "20 utterances, fingerprint" in said() and "no longer there" in said()
    status, text = tiny.here("report", run)
    assert status == 0 and f"Recordings</th><td>{html.escape(said())}</td>" in (run / "report.html").read_text(), text
    corpus = tiny.write_corpus(tmp_path / "corpus", speakers=2, utterances=2)
    assert tiny.here("prepare", "--input", corpus, "--output", tmp_path / "ds")[0] == 0
    assert "20 utterances, fingerprint" in said() and "another dataset is there now" in said()
    shutil.rmtree(tmp_path / "ds")
    shutil.copytree(tiny.material().dataset, tmp_path / "ds")
    assert "20 utterances, fingerprint" in said() and said("Labels") == "none read"


def test_it_says_which_labels_were_read():
    for settings, text in (
        ((), "none read"),
        (("supervised.weight=1",), "the speakers of the recordings"),
        (("supervised.weight=1", "supervised.labels=clusters.tsv"), "those of clusters.tsv"),
    ):
        assert labels_text(tiny.tiny_config(*settings)) == text


def test_a_run_without_trials_has_its_curves_and_says_so(tmp_path):
    run = tmp_path / "<run> & more"
    shutil.copytree(tiny.trained_run()[0], run)
    config = run / "config.json"
    text = config.read_text()
    for path in (str(tiny.material().dataset), str(tiny.material().trials)):
        text = text.replace(f'"{path}"', '""')
    config.write_text(text)
    status, said = tiny.here("report", run)
    assert status == 0 and said.strip() == str(run / "report.html"), said
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "has no trial list" in page and "<audio" not in page and "<h1>&lt;run&gt; &amp; more</h1>" in page


def test_what_cannot_be_reported_is_named(tmp_path):
    run = tiny.trained_run()[0]
    shutil.copy(run / "config.json", tmp_path)
    for arguments, message in (
        ((tmp_path / "gone",), "gone is not the workdir of a run"),
        ((tmp_path,), "metrics.jsonl: no metrics here"),
        ((run, "--trials", tmp_path / "none.txt"), "none.txt: No such file"),
        ((run, "--step", "5"), "no such checkpoint"),
        ((run, "--output", tmp_path / "config.json" / "page.html"), "config.json"),
    ):
        status, text = tiny.here("report", *arguments)
        assert status == 2 and message in text, text


def test_neighbours_in_the_map_are_those_of_the_embeddings():
    rng = np.random.default_rng(0)
    speakers = np.repeat(np.arange(6), 12)
    rows = rng.normal(size=(6, 32))[speakers] + 0.2 * rng.normal(size=(72, 32))
    points = embedding_map(rows)
    distance = np.linalg.norm(points[:, None] - points, axis=-1) + 1e9 * np.eye(72)
    assert (speakers[distance.argmin(axis=1)] == speakers).mean() > 0.95
    np.testing.assert_array_equal(points, embedding_map(rows))
    assert embedding_map(rows[:2]).shape == (2, 2)
