"""What README and the guides show runs as it stands: commands, Python, and the pages generated from other files."""

import importlib.util
import re
import shlex
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import soundfile
from safetensors.numpy import save_file

import tiny
from memo_jax import cli
from memo_jax.config import load_config
from memo_jax.inference import interop
from memo_jax.models import build_backbone

pytestmark = pytest.mark.usefixtures("compiled_once")
GUIDES = sorted((tiny.ROOT / "docs" / "guides").glob("*.md"))
PAGES = [tiny.ROOT / "README.md", *sorted((tiny.ROOT / "docs").rglob("*.md"))]
OTHER_PAGES = [
    tiny.ROOT / name
    for name in (
        "CONTRIBUTING.md",
        "CHANGELOG.md",
        "experiments/README.md",
        "experiments/faults.md",
        "experiments/learning.md",
        "experiments/many_epochs.md",
    )
]


def blocks(path: Path, language: str) -> list[str]:
    """The code blocks of a page in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands(path: Path) -> list[list[str]]:
    """The command lines of a page's `sh` blocks."""
    text = "".join(blocks(path, "sh")).replace("\\\n", " ")
    return [shlex.split(line, comments=True) for line in text.splitlines() if line.strip()]


def leaves(config, prefix=""):
    """{"key.sub": value} of a config."""
    found = {}
    for key, value in config.items():
        found |= leaves(value, f"{prefix}{key}.") if hasattr(value, "items") else {f"{prefix}{key}": value}
    return found


def shrinking(config_file):
    """The overrides that turn a config into the tests' tiny one; the same for all, so that XLA compiles once.

    Of the backbones, the ResNet compiles soonest.
    """
    ours = leaves(tiny.tiny_config("total_steps=3", "model.branches=resnet,", "data.local_crops=0"))
    theirs = leaves(load_config(config_file))
    own = {key: value for key, value in ours.items() if value != theirs[key] or key in ("gate.rule", "data.workers")}
    return [f"--config.{key}={value}" for key, value in own.items()]


def weights(toolkit: str, name: str, **sizes) -> dict[str, np.ndarray]:
    """Weights of a small backbone, with the names of a toolkit."""
    random = np.random.default_rng(0)
    shapes = interop.shapes_of(build_backbone(name, embedding_dim=16, **sizes))
    variables = jax.tree.map(lambda x: random.uniform(0.1, 0.2, x.shape).astype(np.float32), shapes)
    return interop.backbone_to_torch(variables, toolkit, name)


def run(*arguments) -> str:
    """Runs a command of a page on tiny data; returns what it printed."""
    arguments = list(arguments)
    if arguments[0] in ("train", "pseudo-label"):
        learns_table = arguments[0] == "pseudo-label" or any("supervised.labels" in text for text in arguments)
        settings = shrinking(arguments[arguments.index("--config") + 1])
        arguments += [text for text in settings if not (learns_table and ".supervised." in text)]
    if "ecapa,resnet" in arguments:  # the miniature run has one branch; test_ensemble.py has both
        arguments[arguments.index("ecapa,resnet")] = "resnet"
    if arguments[0] == "convert":  # without PyTorch, the same weights in safetensors
        arguments[1] = arguments[1].replace(".pt", ".safetensors")
    status, text = tiny.here(*arguments)
    # Two networks that have learned nothing may say no.
    assert status == 0 or (status == 1 and arguments[0] in ("verify", "identify")), f"{arguments}: {text}"
    return text


@pytest.fixture(scope="module")
def folder_of_a_reader(tmp_path_factory):
    """A folder with miniatures of all that the pages name, in which README's commands have been run."""
    folder = tmp_path_factory.mktemp("reader")
    corpus = tiny.write_corpus(folder / "recordings" / "train")
    for copy in ("recordings/test", "voxceleb2/dev/aac", "voxceleb1/wav"):
        shutil.copytree(corpus, folder / copy)
    for name, utterance in (("a.wav", "s0/0.wav"), ("b.wav", "s0/1.wav")):
        shutil.copy(corpus / utterance, folder / name)
    for trials in ("recordings/trials.txt", "voxceleb1/veri_test2.txt"):
        tiny.write_trials(folder / trials)
    (folder / "recordings" / "speakers.txt").write_text("Ada s0/0.wav s0/1.wav\nBo s1/0.wav s1/1.wav\n")
    (folder / "recordings" / "speaker_trials.txt").write_text("Ada s0/2.wav target\nBo s0/2.wav nontarget\n")
    (folder / "recordings" / "pairs.txt").write_text("s0/0.wav s1/0.wav\n")
    shutil.make_archive(folder / "voxceleb2" / "vox2_aac", "zip", corpus)
    (folder / "kaldi" / "train").mkdir(parents=True)
    (folder / "kaldi" / "train" / "wav.scp").write_text(f"utterance-1 {corpus}/s0/1.wav\n")
    rng = np.random.default_rng(0)
    for bank in ("musan/noise", "musan/music", "musan/speech", "RIRS_NOISES/simulated_rirs"):
        (folder / bank).mkdir(parents=True)
        soundfile.write(folder / bank / "1.wav", 0.1 * rng.standard_normal(16000), 16000)
    (folder / "configs").symlink_to(tiny.ROOT / "configs")
    sizes = {"layers": (1, 1, 1), "growth": 4, "stem_channels": 8, "plane_channels": 4}
    save_file(weights("3dspeaker", "campplus", **sizes), folder / "campplus_cn_en_common.safetensors")
    sizes = {"base_channels": 2, "blocks": (1, 1, 1, 1)}
    save_file(weights("wespeaker", "resnet", **sizes), folder / "resnet34.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        said = [run(*arguments) for program, *arguments in commands(PAGES[0]) if program == "memo-jax"]
    (folder / "said.txt").write_text("\n".join(said))
    return folder


@pytest.fixture
def folder(folder_of_a_reader, tmp_path, monkeypatch):
    """A copy of that folder, as the current one."""
    copy = shutil.copytree(folder_of_a_reader, tmp_path / "reader", symlinks=True)
    monkeypatch.chdir(copy)
    return copy


def test_the_commands_of_readme_run(folder_of_a_reader):
    said = (folder_of_a_reader / "said.txt").read_text()
    assert "EER" in said and "log-mel statistics" in said
    assert (folder_of_a_reader / "runs" / "small" / "checkpoints" / "3").is_dir()


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.stem)
def test_the_commands_of_a_guide_run_after_those_of_readme(page, folder):
    already = commands(PAGES[0])
    said = "".join(run(*words[1:]) for words in commands(page) if words[0] == "memo-jax" and words not in already)
    assert said or not blocks(page, "sh")
    for name in re.findall(r"^\| `([\w/.]+\.(?:json|jsonl|tsv|txt|png))` \|", page.read_text(), re.MULTILINE):
        assert list(folder.rglob(name)), f"{page.name} has {name}, but no command has written it"
    if page.stem == "reports":
        assert said.endswith("identical\n") and (folder / "runs" / "small" / "report.html").is_file()


def test_the_python_examples_run(folder):
    for page in PAGES:
        for example in blocks(page, "python"):
            exec(example, names := {})
            assert names["embedder"].gallery.names == ["Ada"]


def test_other_commands_are_known():
    """make and pip have tests of their own, which need no network; scripts of experiments/ must be there."""
    makefile = (tiny.ROOT / "Makefile").read_text()
    for page in PAGES + OTHER_PAGES:
        for program, *arguments in commands(page):
            if program == "make":
                assert f"\n{arguments[0]}:" in makefile, arguments
            elif program.endswith("python"):
                assert (tiny.ROOT / arguments[0]).is_file(), arguments
            else:
                assert program in ("memo-jax", "JAX_EXEC_TIME_OPTIMIZATION_EFFORT=-1") or arguments == ["install", "."]


def test_commands_that_no_test_runs_are_understood(monkeypatch):
    """Those for pods, the experiments and the JobSet: their options, configs and config keys exist."""
    monkeypatch.chdir(tiny.ROOT)
    yaml = pytest.importorskip("yaml")
    manifest = yaml.safe_load((tiny.ROOT / "experiments" / "jobset.yaml").read_text(encoding="utf-8"))
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    assert job["completions"] == job["parallelism"] == 4 and container["resources"]["limits"]["google.com/tpu"] == 4
    found = [[*container["command"], *container["args"]]]
    for page in PAGES:
        for line in "".join(blocks(page, "bash")).replace("\\\n", "").splitlines():
            found += [shlex.split(part) for part in re.findall(r"memo-jax [^\"\n]+", line) if "install" not in line]
    assert {words[1] for words in found} == {"app", "eval", "plan", "push", "train", "verify"} and len(found) > 12
    for page in OTHER_PAGES:
        found += [words[words.index("memo-jax") :] for words in commands(page) if "memo-jax" in words]
    assert len(found) > 12
    for _, *words in found:
        options, overrides = cli.build_parser().parse_known_args(words)
        assert all(text.startswith("--config.") for text in overrides), overrides
        if options.command in ("train", "plan"):
            load_config(options.config.removeprefix("/app/"), overrides)


def test_config_keys_that_pages_name_exist():
    known = leaves(load_config(tiny.ROOT / "configs" / "base.py"))
    groups = "augment|collapse|data|gate|loss|model|optimizer|teacher"
    named = {
        key
        for page in PAGES + OTHER_PAGES
        for key in re.findall(rf"`((?:{groups})\.(?!py`|onnx`|safetensors`)\w+)`", page.read_text())
    }
    assert len(named) > 10 and not named - set(known)


def test_options_that_pages_name_exist():
    """Also in prose, where nothing runs them."""
    (commands_of_parser,) = (action for action in cli.build_parser()._actions if hasattr(action.choices, "values"))
    parsers = commands_of_parser.choices.values()
    known = {option for parser in parsers for action in parser._actions for option in action.option_strings}
    for page in [PAGES[0], *GUIDES]:
        named = set(re.findall(r"`(--[\w-]+)[` ]", page.read_text(encoding="utf-8")))
        assert not named - known, page


@pytest.mark.parametrize("page", PAGES + OTHER_PAGES, ids=lambda page: str(page.relative_to(tiny.ROOT)))
def test_files_and_headings_that_a_page_links_to_exist(page):
    for target in re.findall(r"\]\((?!\w+:)([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        linked = page.parent / path if path else page
        generated = page.parent / path == tiny.ROOT / "docs" / "reference" / "commands.md"  # by docs/hooks.py
        assert linked.exists() or generated, target
        if anchor and not generated:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert anchor in anchors, target


@pytest.fixture(scope="module")
def hooks():
    """docs/hooks.py, which MkDocs loads by its path."""
    spec = importlib.util.spec_from_file_location("docs_hooks", tiny.ROOT / "docs" / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_has_every_key_with_its_default_and_meaning(hooks):
    source = (tiny.ROOT / "configs" / "base.py").read_text(encoding="utf-8")
    keys = {key.name: key for key in hooks.config_keys(source)}
    assert set(keys) == set(leaves(load_config(tiny.ROOT / "configs" / "base.py")))
    page = hooks.configuration_page()
    for key in keys.values():
        assert key.meaning and f"| `{key.name}` |" in page
    assert keys["data.global_seconds"].unit == "s" and keys["data.global_seconds"].default == "4.0"
    assert keys["gate.window_steps"].meaning == "instead of `gate.window_epochs`"
    assert "prototypes" in keys["split_above_megabytes"].meaning
    with pytest.raises(ValueError, match="line 3: seed has no comment"):
        hooks.config_keys("def get_config():\n    config = ConfigDict()\n    config.seed = 0\n")


def test_the_reference_has_every_option(hooks):
    page = hooks.commands_page()
    for name in ("prepare", "train", "verify"):
        assert f"## {name}\n" in page
    assert "| `--stop-at-step` `N` | save a checkpoint at step N and stop |" in page


def test_links_lead_to_pages_of_the_site_or_become_text(hooks):
    text = "[a](../../configs/base.py#x), [b](../../Makefile), [c](data.md), [d](https://x.org), `[e](f)`"
    expected = "[a](../reference/configuration.md#x), b, [c](data.md), [d](https://x.org), `[e](f)`"
    assert hooks.with_links(text, "docs/guides/training.md") == expected
    assert hooks.with_links("![p](results/gate.png)", "experiments/README.md") == "![p](results/gate.png)"


def test_equations_become_mathml(hooks):
    pytest.importorskip("latex2mathml", reason="needs the extra docs")
    html = hooks.with_mathml(r'<p><span class="arithmatex">\(\lambda &lt; 1\)</span></p>')
    assert "<math" in html and "arithmatex" not in html and "&lt;" in html.replace("&#x0003C;", "&lt;")
