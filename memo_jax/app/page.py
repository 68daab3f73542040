"""The page: two tabs, a map, and a server on this machine only."""

import json
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from memo_jax.app.answers import Answers
from memo_jax.audio import speech
from memo_jax.inference.embedder import Embedder

if TYPE_CHECKING:
    import gradio

HOST = "127.0.0.1"
LARGEST_FILE = "500mb"
STYLE_FILE = Path(__file__).with_name("style.css")
FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]  # of the machine: nothing is downloaded
CODE_FONTS = ["ui-monospace", "Consolas", "monospace"]
DESCRIBED = "Compare two voices, or enrol people and ask who is speaking. A machine's estimate, not proof of identity."


@contextmanager
def served(
    embedder: Embedder,
    port: int | None = None,
    open_browser: bool = False,
    prior: float = 0.5,
    check_speech: bool = False,
) -> Iterator[str]:
    """Serves the page on this machine while the block runs; yields its address.

    Recordings are kept in a temporary folder, which is removed at the end.

    Args:
      embedder: the network, with its gallery.
      port: None for the first free one from 7860.
      open_browser: also show the page in the user's browser.
      prior: see `Answers`.
      check_speech: see `Answers`.

    Raises:
      ImportError: the extra `app` is not installed.
      OSError: the port is taken.
    """
    # gradio reads the first when it is imported; the Hub's library, which it imports, reads the second.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        import gradio
    except ImportError as error:
        raise ImportError(f"the page needs the extra `app`: pip install 'memo-jax[app]' ({error})") from error
    with _recordings_in_a_temporary_folder():
        blocks = build(Answers(embedder, prior, check_speech))
        theme = gradio.themes.Base(primary_hue="indigo", font=FONTS, font_mono=CODE_FONTS)
        try:
            _, address, _ = blocks.launch(
                server_name=HOST,
                server_port=port,
                inbrowser=open_browser,
                share=False,
                quiet=True,
                prevent_thread_lock=True,
                max_file_size=LARGEST_FILE,
                footer_links=[],
                ssr_mode=False,
                pwa=False,
                mcp_server=False,
                enable_monitoring=False,
                theme=theme,
                css_paths=STYLE_FILE,
            )
            yield address
        finally:
            blocks.close(verbose=False)


@contextmanager
def _recordings_in_a_temporary_folder() -> Iterator[None]:
    """Makes gradio keep what it is given in a folder that is removed at the end."""
    name = "GRADIO_TEMP_DIR"
    before = os.environ.get(name)
    with tempfile.TemporaryDirectory(prefix="memo-jax-app-") as folder:
        os.environ[name] = folder
        try:
            yield
        finally:
            os.environ.pop(name)
            if before is not None:
                os.environ[name] = before


def serve(embedder: Embedder, port: int | None, open_browser: bool, prior: float, as_json: bool) -> None:
    """Serves the page until Ctrl-C and prints its address; arguments and errors as for `served`.

    SIGTERM and a closed terminal end it as well, and the recordings are removed as at Ctrl-C.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    with served(embedder, port, open_browser, prior, speech.is_installed()) as address:
        told = json.dumps({"address": address, "model": embedder.fingerprint})
        print(told if as_json else f"{address} (Ctrl-C ends it)", flush=True)
        threading.Event().wait()


def build(answers: Answers) -> "gradio.Blocks":
    """Returns the page as gradio's Blocks."""
    import gradio as gr

    def audio(label, name):
        return gr.Audio(
            sources=["upload", "microphone"], type="filepath", label=label, elem_id=name, editable=False, buttons=[]
        )

    with gr.Blocks(title="memo-jax: who is speaking?", analytics_enabled=False) as blocks:
        current = gr.State({})
        gr.HTML(
            f'<h1 class="memo-title">Who is speaking?</h1><p class="memo-lead">{DESCRIBED}</p>{answers.description()}'
        )
        with gr.Tab("Same person?", elem_id="compare-tab"):
            with gr.Row():
                first, second = audio("First recording", "first"), audio("Second recording", "second")
            compare = gr.Button("Compare", variant="primary", elem_id="compare")
            compared = gr.HTML(elem_id="compared")
        with gr.Tab("People", elem_id="people-tab"), gr.Row():
            with gr.Column():
                gr.HTML('<h2 class="memo-heading">Who is this?</h2>')
                unknown = audio("Recording", "unknown")
                identify = gr.Button("Identify", variant="primary", elem_id="identify")
                identified = gr.HTML(elem_id="identified")
            with gr.Column():
                gr.HTML('<h2 class="memo-heading">Enrol somebody</h2>')
                name = gr.Textbox(label="Name", elem_id="name", max_lines=1)
                voice = audio("Their voice", "voice")
                files = gr.File(
                    label="More recordings of them (optional)", file_count="multiple", elem_id="files", height=150
                )
                enroll = gr.Button("Enrol", variant="primary", elem_id="enroll")
                enrolled = gr.HTML(elem_id="enrolled")
                gr.HTML('<h2 class="memo-heading">Remove somebody</h2>')
                people = gr.Dropdown(answers.people(), label="Enrolled people", elem_id="people", value=None)
                remove = gr.Button("Remove", elem_id="remove")
                removed = gr.HTML(elem_id="removed")
        with gr.Accordion("Map of voices", elem_id="map-part"):
            drawn = gr.HTML(answers.map({}), elem_id="map")

        def after_compare(*given):
            answer, shown = answers.compare(*given)
            return answer, shown, answers.map(shown)

        def after_identify(*given):
            answer, shown = answers.identify(*given)
            return answer, shown, answers.map(shown)

        def choices():
            return gr.Dropdown(answers.people(), value=None)

        def after_enroll(name, voice, files, shown):
            answer, done = answers.enroll(name, [*([voice] if voice else []), *(files or [])])
            left = [gr.skip()] * 3 if not done else ["", None, None]
            return answer, *left, choices(), answers.map(shown)

        def after_remove(name, shown):
            return answers.remove(name), choices(), answers.map(shown)

        def on_click(button, function, given, changed):
            button.click(function, given, changed, api_visibility="private", show_progress_on=changed[0])

        on_click(compare, after_compare, [first, second, current], [compared, current, drawn])
        on_click(identify, after_identify, [unknown, current], [identified, current, drawn])
        on_click(enroll, after_enroll, [name, voice, files, current], [enrolled, name, voice, files, people, drawn])
        on_click(remove, after_remove, [people, current], [removed, people, drawn])
        blocks.load(  # somebody may have enrolled people in another tab
            lambda shown: (choices(), answers.map(shown)),
            [current],
            [people, drawn],
            api_visibility="private",
            show_progress="hidden",
        )
    return blocks
