"""The page in a real browser: recording, comparing, people, and bad recordings, wide and narrow, light and dark."""

import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import soundfile

import tiny
from memo_jax import cli
from memo_jax.audio import speech
from memo_jax.inference.embedder import Embedder
from memo_jax.inference.gallery import Gallery

if importlib.util.find_spec("gradio") is None:  # importing it takes seconds, which all workers would spend
    pytest.skip("needs the extra app", allow_module_level=True)
playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright, of the extra test")

from memo_jax.app.answers import Answers
from memo_jax.app.page import served

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian's package chromium)")
WIDTHS, SCHEMES = (1400, 390), ("light", "dark")


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """Two recordings of one person, one of another, and three that cannot be used."""
    folder, corpus = tmp_path_factory.mktemp("recordings"), tiny.material().corpus
    for name, source in {"ada1": "s0/0", "ada2": "s0/1", "bob": "s4/0"}.items():
        shutil.copy(corpus / f"{source}.wav", folder / f"{name}.wav")
    soundfile.write(folder / "short.wav", np.ones(1600) * 0.1, 16000)
    soundfile.write(folder / "silent.wav", np.zeros(16000), 16000)
    (folder / "broken.wav").write_bytes((folder / "ada1.wav").read_bytes()[:4000])
    (folder / "text.wav").write_text("no recording")
    return folder


@pytest.fixture(scope="module")
def gallery_file(tmp_path_factory):
    return tmp_path_factory.mktemp("people") / "people.npz"


@pytest.fixture(scope="module")
def address(gallery_file):
    with served(Embedder.load(tiny.model_file(), gallery=gallery_file)) as address:
        yield address


@pytest.fixture(scope="module")
def browser(recordings):
    """Chromium with a recording as its microphone."""
    microphone = [
        "--use-fake-device-for-media-stream",
        "--use-fake-ui-for-media-stream",
        f"--use-file-for-fake-audio-capture={recordings / 'ada1.wav'}",
    ]
    with playwright.sync_playwright() as control:
        browser = control.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", *microphone])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, address):
    """The page, wide and light; any request that leaves this machine, and any script error, fails the test."""
    yield from opened(browser, address, 1400, "light")


def opened(browser, address, width, scheme):
    size = {"width": width, "height": 900}
    context = browser.new_context(viewport=size, color_scheme=scheme, permissions=["microphone"])
    page = context.new_page()
    elsewhere, errors = [], []
    page.on("request", lambda it: elsewhere.append(it.url) if not it.url.startswith((address, "data:", "blob:")) else 0)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(address)
    page.wait_for_selector("#compare")
    yield page
    context.close()
    assert elsewhere == [] and errors == []


def drop(page, element, *paths):
    """Drops files into one of the page's fields and waits until they have arrived."""
    page.set_input_files(f"#{element} input[type=file]", [str(path) for path in paths])
    page.wait_for_selector(f"#{element} button[aria-label=Clear], #{element} .file-preview")
    page.wait_for_selector(f"#{element} input[type=file]", state="detached") if element != "files" else None


def pressed(page, button, answer):
    """Clicks a button; returns the text of the new answer."""
    shown = f"#{answer} :is(.memo-answer, .memo-notice)"
    page.evaluate("shown => document.querySelectorAll(shown).forEach(node => node.setAttribute('data-old', ''))", shown)
    page.click(f"#{button}")
    new = page.locator(f"{shown}:not([data-old])")
    new.wait_for(timeout=60_000)
    return new.inner_text()


@needs_browser
def test_two_recordings_are_compared_as_verify_does(page, recordings):
    drop(page, "first", recordings / "ada1.wav")
    drop(page, "second", recordings / "bob.wav")
    assert {path.name for path in Path(os.environ["GRADIO_TEMP_DIR"]).rglob("*.wav")} >= {"ada1.wav", "bob.wav"}
    text = pressed(page, "compare", "compared")
    wanted = Embedder.load(tiny.model_file()).verify(recordings / "ada1.wav", recordings / "bob.wav")
    assert ("Same person" if wanted.decision else "Different people") in text
    assert f"{wanted.score:.3f}" in text and "0.400" in text and "Threshold: a list." in text
    assert re.search(r"(\d\.\d|over 99\.9|under 0\.1) ?%", text)  # scale 20 and offset -8, of the model's description
    assert page.locator("#map .memo-dot.recording").count() == 2
    assert Embedder.load(tiny.model_file()).fingerprint in page.inner_text("body")


@needs_browser
def test_a_voice_is_recorded_by_the_microphone(page, recordings):
    """The fake microphone plays ada1.wav over and over, so what it records is close to it."""
    page.click("#first button[aria-label='Record audio']")
    page.click("#first .record-button")
    page.wait_for_timeout(2500)
    page.click("#first .stop-button")
    page.wait_for_selector("#first button[aria-label='Play']", timeout=20_000)
    drop(page, "second", recordings / "ada1.wav")
    text = pressed(page, "compare", "compared")
    assert "Same person" in text and "score" in text


@needs_browser
def test_people_are_enrolled_identified_and_removed(page, recordings, gallery_file):
    page.click("button[role=tab]:has-text('People')")
    drop(page, "unknown", recordings / "ada2.wav")
    assert "Nobody is enrolled yet" in pressed(page, "identify", "identified")
    assert "Type the person's name" in pressed(page, "enroll", "enrolled")
    page.fill("#name input, #name textarea", "Ada <b>")
    assert "at least one recording of Ada <b>" in pressed(page, "enroll", "enrolled")
    drop(page, "voice", recordings / "ada1.wav")
    assert "Ada <b> is enrolled from 1 recording." in pressed(page, "enroll", "enrolled")
    page.fill("#name input, #name textarea", "Bob")
    drop(page, "files", recordings / "bob.wav", recordings / "silent.wav")
    assert "silent.wav: silence" in pressed(page, "enroll", "enrolled")
    assert Gallery.load(gallery_file).names == ["Ada <b>"]
    text = pressed(page, "identify", "identified")
    assert "This is Ada <b>" in text and "threshold" in text
    assert page.locator("#map .memo-label").all_inner_texts() == ["Ada <b>", "Unknown voice"]
    page.click("#people input")
    page.click("#people [role=option]:has-text('Ada <b>')")
    assert "Ada <b> is removed." in pressed(page, "remove", "removed")
    assert Gallery.load(gallery_file).names == []


@needs_browser
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("short.wav", "shorter than 0.5 s"),
        ("silent.wav", "silence"),
        ("broken.wav", "truncated"),
        ("text.wav", "not readable as audio"),
        (None, "record something, or drop a file"),
    ],
)
def test_a_recording_that_cannot_be_used_is_explained_and_the_page_keeps_working(page, recordings, name, said):
    drop(page, "first", recordings / "ada1.wav")
    if name:
        drop(page, "second", recordings / name)
    text = pressed(page, "compare", "compared")
    assert "Second recording: " in text and said in text
    if name:
        page.click("#second button[aria-label=Clear]")
    drop(page, "second", recordings / "ada2.wav")
    assert "score" in pressed(page, "compare", "compared")


@needs_browser
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_is_cut_off_and_text_is_readable(browser, address, recordings, width, scheme):
    """No sideways scrolling, and a contrast of 4.5 between our text and its background."""
    for page in opened(browser, address, width, scheme):
        drop(page, "first", recordings / "ada1.wav")
        drop(page, "second", recordings / "bob.wav")
        pressed(page, "compare", "compared")
        for tab in ("Same person?", "People"):
            page.click(f"button[role=tab]:has-text('{tab}')")
            assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.click("button[role=tab]:has-text('Same person?')")
        ratios = page.evaluate(CONTRASTS)
        assert len(ratios) > 8 and min(ratios) > 4.5, ratios
        dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", dark)[:3])) < 200) == (scheme == "dark")


# Contrast, by WCAG 2, of every visible text of ours with the nearest background that is not transparent.
CONTRASTS = """() => {
  const rgb = text => text.match(/[0-9.]+/g).map(Number)
  const light = c => { const [r, g, b] = c.slice(0, 3).map(v => v / 255).map(
    v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b }
  const behind = node => { for (; node; node = node.parentElement) {
    const c = rgb(getComputedStyle(node).backgroundColor); if (c.length < 4 || c[3] > 0.5) return c }
    return [255, 255, 255] }
  return [...document.querySelectorAll('[class^=memo-], .memo-answer *')]
    .filter(n => n.offsetParent && [...n.childNodes].some(c => c.nodeType == 3 && c.data.trim()))
    .map(n => [light(rgb(getComputedStyle(n).color)), light(behind(n))].sort((a, b) => b - a))
    .map(([a, b]) => (a + 0.05) / (b + 0.05)) }"""


def test_the_page_is_on_this_machine_only_and_recordings_are_not_kept(tmp_path):
    folder = None
    with served(Embedder.load(tiny.model_file())) as address:
        assert address.startswith("http://127.0.0.1:")
        folder = os.environ["GRADIO_TEMP_DIR"]
        assert os.path.isdir(folder)
        port = int(re.search(r":(\d+)", address.removeprefix("http:"))[1])
        with socket.socket() as other:  # another address of this machine, as other machines would see it
            other.settimeout(2)
            assert other.connect_ex(("127.0.0.2", port)) != 0
        taken = str(port)
        assert cli.main(["app", "--model", str(tiny.model_file()), "--port", taken, "--no-open"]) == 2
    assert not os.path.exists(folder)


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_the_command_serves_until_it_is_interrupted(number, status, tmp_path):
    """Or until its terminal is closed. Either way nothing that was recorded is left behind."""
    command = [sys.executable, "-m", "memo_jax", "app", "--no-open", "--json", "--model", str(tiny.model_file())]
    environment = tiny.environment() | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as server:
        started = json.loads(server.stdout.readline())
        assert started["model"] == tiny.untrained_model().fingerprint
        page = urllib.request.urlopen(started["address"]).read().decode()
        assert "who is speaking?" in page
        server.send_signal(number)
        try:
            out, err = server.communicate(timeout=60)
        finally:
            server.kill()
    said = "memo-jax: interrupted\n" if number == signal.SIGINT else ""
    assert (server.returncode, out, err) == (status, "", said)
    assert not list(tmp_path.glob("memo-jax-app-*"))


@pytest.mark.skipif(not speech.is_installed(), reason="needs the extra vad")
def test_noise_without_speech_is_refused(tmp_path, recordings):
    """Where this can be recognised; test_speech shows that speech is found."""
    soundfile.write(tmp_path / "noise.wav", np.random.default_rng(0).normal(0, 0.01, 32000), 16000)
    answers = Answers(Embedder.load(tiny.model_file()), check_speech=True)
    assert "First recording: no speech in its 2.00 s." in answers.compare(str(tmp_path / "noise.wav"), None, {})[0]
    said, done = answers.enroll("Ada", [str(tmp_path / "noise.wav")])
    assert "noise.wav: no speech in its 2.00 s." in said and not done and answers.people() == []
