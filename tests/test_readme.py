"""The README's commands run, as they stand, in its order, on folders of the names that it uses."""

import re
import shlex
import shutil

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

README = (tiny.ROOT / "README.md").read_text(encoding="utf-8")


def commands(text):
    """The command lines of the ```sh blocks."""
    blocks = re.findall(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.replace("\\\n", " ").splitlines()]


def leaves(config, prefix=""):
    """{"key.sub": value} of a config."""
    found = {}
    for key, value in config.items():
        found |= leaves(value, f"{prefix}{key}.") if hasattr(value, "items") else {f"{prefix}{key}": value}
    return found


def shrinking(config_file):
    """The overrides that turn a config into the tests' tiny one; the same for all, so that XLA compiles once."""
    ours = leaves(tiny.tiny_config("total_steps=3", "model.branches=ecapa,"))
    theirs = leaves(load_config(config_file))
    own = {key: value for key, value in ours.items() if value != theirs[key] or key in ("gate.rule", "data.workers")}
    return [f"--config.{key}={value}" for key, value in own.items()]


def torch_resnet():
    """A small ResNet by the names of PyTorch."""
    module = build_backbone("resnet", base_channels=2, blocks=(1, 1, 1, 1), embedding_dim=16)
    random = np.random.default_rng(0)
    shapes = interop.shapes_of(module)
    variables = jax.tree.map(lambda x: random.uniform(0.1, 0.2, x.shape).astype(np.float32), shapes)
    return interop.backbone_to_torch(variables, "wespeaker", "resnet")


@pytest.fixture
def folder_of_a_reader(tmp_path, monkeypatch):
    """A folder with recordings, trials, MUSAN and RIRS_NOISES in miniature, in which the commands are typed."""
    corpus = tiny.write_corpus(tmp_path / "recordings" / "train")
    for copy in ("recordings/test", "voxceleb2/dev/aac", "voxceleb1/wav"):
        shutil.copytree(corpus, tmp_path / copy)
    for trials in ("recordings/trials.txt", "voxceleb1/veri_test2.txt"):
        tiny.write_trials(tmp_path / trials)
    shutil.make_archive(tmp_path / "voxceleb2" / "vox2_aac", "zip", corpus)
    (tmp_path / "kaldi" / "train").mkdir(parents=True)
    (tmp_path / "kaldi" / "train" / "wav.scp").write_text(f"utterance-1 {corpus}/s0/1.wav\n")
    rng = np.random.default_rng(0)
    for bank in ("musan/noise", "musan/music", "musan/speech", "RIRS_NOISES/simulated_rirs"):
        (tmp_path / bank).mkdir(parents=True)
        soundfile.write(tmp_path / bank / "1.wav", 0.1 * rng.standard_normal(16000), 16000)
    (tmp_path / "configs").symlink_to(tiny.ROOT / "configs")
    save_file(torch_resnet(), tmp_path / "resnet34.safetensors")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_memo_jax_command_runs_and_writes_what_is_said(folder_of_a_reader):
    ran, said = [], ""
    for program, *arguments in commands(README):
        if program == "memo-jax":
            if arguments[0] == "train":
                arguments += shrinking(arguments[arguments.index("--config") + 1])
            status, text = tiny.here(*arguments)
            assert status == 0, text
            ran.append(arguments[0])
            said += text
    converted = ["convert", "eval", "convert", "convert"]
    used = ["embed", "verify", "enroll", "identify", "embed"] + ["score"] * 3 + ["export", "report", "reproduce"]
    assert ran == (
        ["prepare"] * 2
        + ["train", "eval"]
        + ["prepare"] * 2
        + ["train", "eval"]
        + converted
        + ["prepare"] * 2
        + ["train"]
        + used
    )
    assert "EER" in said and "log-mel statistics" in said and said.endswith("identical\n")
    for workdir in ("runs/small", "runs/memo", "runs/longer"):
        assert (folder_of_a_reader / workdir / "checkpoints" / "3").is_dir()
    for name in re.findall(r"`(\w+\.(?:json|jsonl|tsv|txt|png))`", README):
        assert list(folder_of_a_reader.rglob(name)), f"{name} is in the README, but no command has written it"


def test_the_python_example_runs(folder_of_a_reader):
    """On an untrained network, which the example does not mind."""
    shutil.copy(tiny.model_file(), "model")
    (example,) = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    exec(example.replace('"runs/small"', '"model"'), names := {})
    assert names["embedder"].gallery.names == ["Ada"] and -1 <= names["score"] <= 1


def test_other_commands_are_the_makefiles_and_pips():
    """`make demo`, `make test`, `make parity` and `pip install .` have tests of their own, which need no network."""
    makefile = (tiny.ROOT / "Makefile").read_text()
    for program, *arguments in commands(README):
        if program != "memo-jax":
            known = f"\n{arguments[0]}:" in makefile if program == "make" else arguments == ["install", "."]
            assert program in ("make", "pip") and known


def test_commands_for_pods_are_understood(monkeypatch):
    """Those of the blocks that no test can run, and of the JobSet: options, config and its keys are known."""
    monkeypatch.chdir(tiny.ROOT)
    yaml = pytest.importorskip("yaml")
    manifest = yaml.safe_load((tiny.ROOT / "experiments" / "jobset.yaml").read_text(encoding="utf-8"))
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    assert job["completions"] == job["parallelism"] == 4 and container["resources"]["limits"]["google.com/tpu"] == 4
    found = [[*container["command"], *container["args"]]]
    for block in re.findall(r"^```bash\n(.*?)^```$", README, re.MULTILINE | re.DOTALL):
        lines = block.replace("\\\n", "")
        found += [shlex.split(part) for part in re.findall(r"memo-jax (?:train|plan) [^\"\n]+", lines)]
    assert [words[1] for words in found] == ["train"] * 6 + ["plan"] * 2
    for _, *words in found:
        options, overrides = cli.build_parser().parse_known_args(words)
        assert all(text.startswith("--config.") for text in overrides), overrides
        config = load_config(options.config.removeprefix("/app/"), overrides)
        assert options.command == "plan" or options.distributed or options.coordinator
        assert config.data.batch_size % 16 == 0 or options.coordinator


def test_config_keys_that_the_readme_names_exist():
    known = leaves(load_config(tiny.ROOT / "configs" / "base.py"))
    named = re.findall(r"`((?:augment|collapse|gate|loss|optimizer|teacher)\.\w+)`", README)
    assert len(named) > 10 and not set(named) - set(known)


def test_files_that_the_readme_links_to_exist():
    links = re.findall(r"\]\((?!http)([^)]+)\)", README)
    assert links and not [link for link in links if not (tiny.ROOT / link).exists()]
