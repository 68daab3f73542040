"""Write errors of all commands that write: one line that names what was asked for, and nothing half-written."""

import functools
import shutil
import tempfile
from pathlib import Path

import tiny
from soak.faults import ERRORS, FOR_EVER, check_told, command, contents, failing


@functools.cache
def material() -> dict[str, list]:
    """{command: its arguments}; "OUT" stands for the folder that it writes to."""
    folder = Path(tempfile.mkdtemp(dir=tiny.temporary_folder()))
    model, tiny_data = tiny.model_file(), tiny.material()
    voice = tiny_data.corpus / "s0"
    status, text = command("convert", model, "--output", folder / "w.safetensors", "--to", "wespeaker")
    assert status == 0, text
    assert command("embed", tiny_data.corpus, "--model", model, "--output", folder / "e.npz")[0] == 0
    data = ["--data", tiny_data.dataset, "--trials", tiny_data.trials]
    kept = {
        "prepare": ["prepare", "--input", voice, "--workers", 1, "--overwrite", "--output", "OUT/set"],
        "embed npz": ["embed", voice, "--model", model, "--output", "OUT/e.npz"],
        "embed parquet": ["embed", voice, "--model", model, "--output", "OUT/new/e.parquet"],
        "enroll": ["enroll", "Bea", voice / "1.wav", "--model", model, "--gallery", "OUT/people.npz"],
        "remove": ["remove", "Ada", "--gallery", "OUT/people.npz"],
        "export model": ["export", "--model", model, "--output", "OUT/m.safetensors"],
        "export program": ["export", "--model", model, "--output", "OUT/m.zip"],
        "export onnx": ["export", "--model", model, "--output", "OUT/m.onnx"],
        "convert": ["convert", folder / "w.safetensors", "--output", "OUT/m.safetensors"],
        "convert back": ["convert", model, "--to", "wespeaker", "--output", "OUT/w.safetensors"],
        "eval": ["eval", "--model", model, *data, "--replicates", 0, "--output", "OUT/ev"],
        "eval threshold": ["eval", "--model", "OUT/m.safetensors", *data, "--output", "OUT/ev"],
        "score": ["score", "--embeddings", folder / "e.npz", "--trials", data[-1], "--scores", "OUT/scores.txt"],
        "trials": ["trials", tiny_data.corpus, "--output", "OUT/trials.txt"],
        "init-config": ["init-config", "small", "--output", "OUT/small.py"],
        "cluster": ["cluster", "--embeddings", folder / "e.npz", "--clusters", 3, "--output", "OUT/clusters.tsv"],
        "report": ["report", tiny.whole_run(), *data, "--output", "OUT/report.html"],
    }
    kept["eval threshold"] += ["--replicates", 0, "--save-threshold", "eer"]
    return kept


def new_output(name: str) -> Path:
    """A folder with what the command changes in it."""
    output = Path(tempfile.mkdtemp(dir=tiny.temporary_folder())) / "out"
    output.mkdir()
    if name in ("enroll", "remove"):
        gallery = output / "people.npz"
        voice = tiny.material().corpus / "s0" / "0.wav"
        status, text = command("enroll", "Ada", voice, "--model", tiny.model_file(), "--gallery", gallery)
        assert status == 0, text
    if name == "eval threshold":
        shutil.copy(tiny.model_file(), output / "m.safetensors")
    return output


def arguments_for(name: str, output: Path) -> list[str]:
    return [str(argument).replace("OUT/", f"{output}/") for argument in material()[name]]


@functools.cache
def changes_of(name: str) -> int:
    """How many changes to files an undisturbed call makes."""
    output = new_output(name)
    with failing(output) as changes:
        status, text = command(*arguments_for(name, output))
    assert status == 0, (name, text)
    return changes.count


def write_errors(trials, rng, only=()):
    """Returns how many calls ended with an error, by command."""
    names = [name for name in material() if not only or name in only]
    told = dict.fromkeys(names, 0)
    for number in trials:
        name = names[number % len(names)]
        output = new_output(name)
        before, code, times = contents(output), rng.choice(ERRORS), rng.choice((1, FOR_EVER))
        with failing(output, rng.randrange(changes_of(name)), code, times) as made:
            status, text = command(*arguments_for(name, output))
        if status:
            check_told(status, text, output, code)
            after = contents(output)
            assert times > 1 or before.items() <= after.items(), (name, made.failed, list(after))
            told[name] += 1
        written = set(contents(output))
        if status or name not in ("enroll", "remove", "init-config"):  # which are refused the second time
            again, text = command(*arguments_for(name, output))
            assert again == 0, (name, text)
        left = set(contents(output))
        assert status or written == left, (name, written, left)
        hidden = {Path(path).name for path in left if Path(path).name.startswith(".")}
        if made.failed == "unlink":  # a lock that could not be removed: the next process takes it over
            hidden = {path for path in hidden if not path.endswith(".lock")}
        assert times > 1 or not hidden, (name, made.failed, left)
        shutil.rmtree(output.parent)
    return {"told": told}
