"""The command itself: help without heavy imports, exit statuses, and errors in one line."""

import json
import subprocess
import sys

import pytest

import memo_jax
import tiny
from memo_jax import cli, options

COMMANDS = (
    "prepare",
    "train",
    "eval",
    "embed",
    "verify",
    "enroll",
    "identify",
    "app",
    "report",
    "export",
    "score",
    "convert",
    "plan",
)
HEAVY = (
    "jax",
    "flax",
    "optax",
    "orbax",
    "grain",
    "tensorflow_datasets",
    "matplotlib",
    "numpy",
    "scipy",
    "librosa",
    "ml_collections",
)
HELP = f"""
import sys
from memo_jax import cli, options
for command in ([], *([name] for name in {COMMANDS!r})):
    try:
        cli.main([*command, "--help"])
    except SystemExit as stop:
        assert stop.code == 0
print("HEAVY:", *(name for name in {HEAVY!r} if name in sys.modules))
"""


def test_help_lists_all_commands_and_imports_nothing_heavy():
    done = subprocess.run([sys.executable, "-c", HELP], env=tiny.environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "HEAVY:"
    for text in (*COMMANDS, "--input", "--output", "--config", "--workdir", "--trials", "--branch", "--step"):
        assert text in done.stdout


def test_the_package_is_a_command():
    done = tiny.memo_jax("--version")
    assert (done.returncode, done.stdout) == (0, f"memo-jax {memo_jax.__version__}\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "COMMAND"),
        (["trian"], "invalid choice: 'trian'"),
        (["train", "--workdir", "w"], "--config"),
        (["train", "--config", "c.py", "--workdir", "w", "--quick"], "unknown argument '--quick'"),
        (["train", "--config", "c.py", "--workdir", "w", "--config.seed", "3"], "--config.seed=VALUE"),
        (["train", "--config", "c.py", "--workdir", "w"], "c.py: no such config file"),
        (["train", "--conf", "c.py", "--workdir", "w"], "--config"),
        (["prepare", "--input", "a", "--output", "b", "--config.seed=3"], "unknown argument '--config.seed=3'"),
        (
            ["prepare", "--input", "a", "--output", "b", "--workers", "many"],
            "'many' is not a whole number of at least 1",
        ),
        (["prepare", "--input", "no folder", "--output", "b"], "no folder: no such folder"),
        ("eval --workdir w --data d --trials t --output o --step x".split(), "--step: 'x' is not a whole number"),
        ("score --embeddings e --trials t --replicates -1".split(), "--replicates: '-1' is not a whole number"),
        (
            "score --embeddings e --trials t --replicates 9999999".split(),
            "--replicates: 9999999 is more than 1,000,000",
        ),
        ("eval --model m --data d --trials t --output o --crop-seconds inf".split(), "'inf' is not a finite number"),
        ("eval --model m --data d --trials t --output o --crops -2".split(), "--crops: '-2' is not a whole number"),
        ("eval --model m --data d --trials t --output o --crop-seconds 1".split(), "add --crops R"),
        ("prepare --input a --output b --min-seconds nan".split(), "--min-seconds: 'nan' is not a finite number"),
        ("verify a b --threshold ١".split(), "--threshold: '١' is not a finite number"),
        ("trials a --output b --seed 1_0".split(), "--seed: '1_0' is not a whole number of at least 0"),
    ],
)
def test_a_wrong_command_line_is_reported_and_exits_2(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, text = tiny.here(*arguments)
    assert status == 2 and message in text and "error: " in text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": 1}', "run/config.json has no key config.augment.babble_from_batch and 1"),
        ("[" * 100_000, "config.json: not the JSON of a config: JSON that is nested too deeply"),
        ("[]", "config.json: not the JSON of a config: the outermost value is not a group"),
    ],
)
def test_a_config_of_a_run_that_is_not_whole_is_named(text, said, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(text)
    status, printed = tiny.here("export", "--model", tmp_path / "run", "--output", tmp_path / "m.safetensors")
    assert status == 2 and said in printed and printed.count("\n") == 1, printed


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (ValueError("seed is -1"), 2, "memo-jax: error: seed is -1\n"),
        (FileNotFoundError(2, "No such file", "a b.txt"), 2, "memo-jax: error: a b.txt: No such file\n"),
        (BrokenPipeError(32, "Broken pipe"), 2, "memo-jax: error: Broken pipe\n"),
        (OSError("cannot write x: disk full"), 2, "memo-jax: error: cannot write x: disk full\n"),
        (ImportError("No module named 'matplotlib'"), 2, "memo-jax: error: No module named 'matplotlib'\n"),
        (ValueError(), 2, "memo-jax: error: ValueError\n"),
        (KeyboardInterrupt(), 130, "memo-jax: interrupted\n"),
    ],
)
def test_errors_of_users_are_one_line_and_a_status(error, status, text, monkeypatch):
    def fail(_):
        raise error

    monkeypatch.setitem(cli.RUN, "prepare", fail)
    assert tiny.here("prepare", "--input", "a", "--output", "b") == (status, text)


def test_errors_of_ours_keep_their_traceback(monkeypatch):
    def fail(_):
        raise KeyError("a bug")

    monkeypatch.setitem(cli.RUN, "prepare", fail)
    with pytest.raises(KeyError):
        tiny.here("prepare", "--input", "a", "--output", "b")


def test_a_fault_of_ours_ends_the_program_with_another_status_than_different_speakers(monkeypatch, capsys):
    monkeypatch.setitem(cli.RUN, "verify", lambda options: {}["odd"])
    monkeypatch.setattr(sys, "argv", ["memo-jax", "verify", "a.wav", "b.wav"])
    assert cli.main() == 70 and "KeyError: 'odd'" in capsys.readouterr().err


def test_json_has_null_where_there_is_no_number(monkeypatch):
    """The threshold at which a minDCF of 1 is reached is infinite, and one trial has no interval."""
    found = {"eer": float("nan"), "curve": [1.0, float("inf")], "of": {"name": "Zoë", "pair": (float("-inf"), 2)}}
    monkeypatch.setattr("memo_jax.scoring.score.score", lambda *arguments, **options: found)
    status, text = tiny.here("score", "--embeddings", "e.npz", "--trials", "t.txt", "--json")
    told = json.loads(text, parse_constant=pytest.fail)
    assert status == 0 and told == {"eer": None, "curve": [1.0, None], "of": {"name": "Zoë", "pair": [None, 2]}}


def test_prepare_as_typed(tmp_path):
    """Two inputs, names with spaces and letters beyond ASCII; what cannot be used is reported and listed."""
    one, two = tiny.write_corpus(tmp_path / "one", speakers=1, utterances=2), tmp_path / "zwei äöü"
    (two / "Jürgen Müller").mkdir(parents=True)
    (one / "s0" / "1.wav").rename(two / "Jürgen Müller" / "grüß dich.wav")
    (two / "broken.wav").write_text("no audio")
    status, text = tiny.here("prepare", "--input", one, "--input", two, "--output", tmp_path / "set", "--workers", "1")
    assert status == 0 and "2 utterances, 2 speakers" in text and "left out 1 file (1 × not readable as audio)" in text
    assert "broken.wav" in (tmp_path / "set" / "left_out.tsv").read_text(encoding="utf-8")
    assert "Jürgen Müller/grüß dich.wav" in (tmp_path / "set" / "manifest.tsv").read_text(encoding="utf-8")
    status, text = tiny.here("prepare", "--input", one, "--output", tmp_path / "set", "--workers", "1")
    assert status == 2 and "--overwrite" in text


MODEL, AUDIO = "--model none.safetensors", "none.wav"
MISTAKES = [
    *(f"{command} --nonsense" for command in COMMANDS),
    *(f"{command} --json=1" for command in ("eval", "embed", "verify", "identify", "plan")),
    "embed",
    "embed a.wav",
    "app --gallery people.npy",
    f"embed a.wav {MODEL} --output e.csv",
    f"embed a.wav {MODEL} --output e",
    f"embed a.wav {MODEL} --output .",
    f"embed a.wav {MODEL} --output file/e.npz",
    f"embed a.wav {MODEL} --output e.npz",
    f"embed a.wav {MODEL} --output e.npz --min-seconds long",
    f"embed a.wav {MODEL} --output e.npz --channel 0",
    f"embed a.wav {MODEL} --output e.npz --channel left",
    f"embed a.wav {MODEL} --output gs://bucket/e.npz",
    "embed a.wav --model file --output e.npz",
    "embed a.wav --model . --output e.npz",
    f"verify a.wav {MODEL}",
    f"verify a.wav b.wav c.wav {MODEL}",
    *(f"verify a.wav b.wav {MODEL} --threshold {value}" for value in ("2", "-1.01", "nan", "inf", "high")),
    *(f"identify a.wav {MODEL} --gallery g.npz --threshold {value}" for value in ("1.5", "nan")),
    f"verify a.wav b.wav {MODEL} --role parent",
    f"verify a.wav b.wav {MODEL} --step last",
    f"verify a.wav b.wav {MODEL} --channel -1",
    f"enroll Ada {MODEL} --gallery g.npz",
    f"enroll Ada a.wav {MODEL}",
    f"enroll Ada a.wav {MODEL} --gallery g.txt",
    f"identify a.wav {MODEL} --gallery g.npz",
    "remove",
    "remove Ada",
    "remove Ada --gallery g.npz",
    "remove Ada --gallery file",
    f"export {MODEL}",
    f"export {MODEL} --output a.onx",
    f"export {MODEL} --output file/a.zip",
    f"export {MODEL} --output a.safetensors --weights float8",
    "convert",
    "convert none.pt",
    "convert none.pt --output m.safetensors",
    "convert file --output m.safetensors",
    "convert file --output m.safetensors --kind kaldi",
    "convert file --output m.safetensors --front-end mfcc",
    "convert file --output m.safetensors --branch ecapa",
    "convert file --output m.safetensors --to wespeaker --kind wespeaker",
    "convert file --output m.safetensors --to wespeaker --front-end log_mel",
    "convert file --output m.txt --to wespeaker",
    "convert file --output file/m.safetensors",
    "eval --model none --data d --trials t",
    "eval --model none --data d --trials t --output o",
    "eval --model none --data d --trials t --output o --save-threshold f1",
    "eval --model none --data d --trials t --output o --crops many",
    "eval --model none --data d --trials t --output o --replicates few",
    "score --trials t",
    "score --embeddings e.npz --trials t",
    "score --embeddings file --trials t",
    "score --embeddings e.npz --trials t --as-norm many",
    "app --gallery people.txt",
    "app --port 65536",
    "app --model none",
    "report",
    "report none",
    "report file",
    "reproduce none",
    "plan --config none.py --topology v5e:4x4",
    "train --config none.py --workdir w",
    "train --config file --workdir w",
    "train --config none.py --workdir s3://bucket/w",
    "train --workdir w",
    "prepare",
    "prepare --input none",
    "prepare --input none --output o",
    "prepare --input file --output o",
    "prepare --input none --output o --min-seconds short",
    "prepare --input none --output o --channel 1.5",
    "prepare --check none",
    "prepare --check file",
    "prepare --check none --input none",
    "prepare --input none --output gs://bucket/set",
    "prepare --input gs://bucket/in --output o",
    "prepare --input none --output o --workers -1",
    "prepare --check file --output o",
    f"embed a.wav {MODEL} --output e.npz --runtime tensorrt",
    f"embed a.wav {MODEL} --output e.npz --step 2.5",
    f"embed a.wav {MODEL} --output e.parquet --branch",
    f"verify a.wav b.wav {MODEL} --threshold",
    f"verify gs://bucket/a.wav b.wav {MODEL}",
    f"identify a.wav b.wav {MODEL} --gallery g.npz",
    f"identify a.wav {MODEL} --gallery gs://bucket/g.npz",
    f"enroll Ada a.wav {MODEL} --gallery file/g.npz",
    f"export {MODEL} --output a.onnx --onnx-input waves3",
    "convert file --output m.safetensors --to kaldi",
    "eval --model none --data d --trials t --output file/o",
    "eval --model none --data d --trials t --output o --step -x",
    "score --embeddings e.npz --trials t --replicates -1",
    "score --embeddings e.npz --trials t --cohort",
    "report none --output file/r.html",
    "plan --config none.py --topology v99:4x4",
    "train --config none.py --workdir w --stop-at-step soon",
    "--verzion",
    "verfy a.wav b.wav",
]


@pytest.mark.parametrize(
    "line, said",
    [
        ("embed a.wav --output e.npz --runtime onnx --min-seconds 0.1", "needs --runtime jax"),
        ("export --output a.safetensors --onnx-input feats", "--onnx-input is for an ONNX file"),
        ("export --output a.safetensors --other-front-end", "--other-front-end is for an ONNX file"),
        ("export --output a.onnx --onnx-input waveform --onnx-runtime sherpa-onnx", "takes features"),
        ("export --output a.onnx b.safetensors --weights int8", "int8 is for .onnx"),
        ("export --output a.zip --weights int8", "int8 is for .onnx"),
        ("export --output a.zip --weights float16", "float16 is for .safetensors and .onnx"),
        ("app --gallery people.npy", "people.npy"),
    ],
)
def test_options_that_do_not_fit_together_are_named(line, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command, *rest = line.split()
    status, text = tiny.here(command, *rest, "--model", tiny.model_file())
    assert status == 2 and said in text and text.count("\n") == 1 and not list(tmp_path.iterdir()), text


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_one_line_of_status_2_and_leaves_nothing(line, tmp_path, monkeypatch):
    """Errors found by argparse follow its usage; no traceback, and no file or folder is left."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("text")
    status, text = tiny.here(*line.split())
    assert status == 2, text
    error = [line for line in text.splitlines() if "error: " in line]
    assert len(error) == 1 and text.rstrip().endswith(error[0]) and "Traceback" not in text, text
    assert text.startswith("usage: ") or text.count("\n") == 1, text
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_names_listed_without_importing_are_those_that_exist():
    from memo_jax.features import FRONT_ENDS
    from memo_jax.inference.interop import TOOLKITS
    from memo_jax.inference.runtime import RUNTIMES

    assert options.RUNTIMES == RUNTIMES
    assert set(options.TOOLKITS) == set(TOOLKITS) and set(options.FRONT_END_NAMES) == set(FRONT_ENDS)
