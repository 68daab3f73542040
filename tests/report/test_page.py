"""`memo-jax report` as it is typed: one page that needs nothing else, and what it says."""

import base64
import html.parser
import io
import re
import shutil

import numpy as np
import pytest
import soundfile

import tiny
from memo_jax.report.page import embedding_map


class Page(html.parser.HTMLParser):
    """Every address that a page refers to, and its text."""

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
    inside = [address for address in page.addresses if address.startswith("#")]
    assert {address[1:] for address in inside} == set(re.findall(r'<section id="(\w+)"', made))
    rest = [address for address in page.addresses if not address.startswith("#")]
    kinds = {address.partition(",")[0] for address in rest}
    assert kinds == {"data:image/svg+xml;base64", "data:audio/mpeg;base64"}
    assert "link" not in page.tags and "@import" not in made and "url(" not in made


def test_pictures_are_whole_and_refer_to_nothing_either(made):
    images = re.findall(r'src="data:image/svg\+xml;base64,([^"]+)" alt="([^"]+)"', made)
    assert len(images) == 7 and all(description for _, description in images)  # curves, DET, four histograms, the map
    for content, _ in images:
        svg = base64.b64decode(content).decode()
        assert svg.rstrip().endswith("</svg>")
        assert not [address for address in re.findall(r'(?:xlink:)?href="([^"]+)"', svg) if not address.startswith("#")]


def test_the_page_says_what_was_trained_and_how_it_does(made):
    text = Page(made).text
    for said in (
        "20 utterances",
        "parameters, embeddings of 16 numbers",
        "closed at step 3",
        "45 trials of trials.txt",
        "ecapa teacher, step 6",
        "resnet teacher, step 6",
        "all branches, scores averaged",
        "log-mel statistics",
        "95 % interval",
        "minDCF(0.01)",
        "5 speakers",
        "One speaker, but least alike",
        "self-distillation × 1",
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
