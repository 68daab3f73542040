"""Damaged bytes in what commands read besides recordings and datasets: noticed, or harmless.

Checkpoints, model files, exported programs, files of embeddings and galleries: random bytes change, or the file is cut
short. What reads it must refuse it in one line that names it, or return exactly what it returns for the undamaged file.
"""

import dataclasses
import functools
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np

import tiny
from memo_jax.inference.embedder import load_model
from memo_jax.inference.export import write_program
from memo_jax.inference.gallery import Gallery
from memo_jax.inference.model_file import flattened
from memo_jax.scoring.embedding_file import Embeddings, read_embeddings, write_embeddings
from memo_jax.training.checkpoint import load_extra
from runs import arrays
from soak.faults import command, contents, damaged


def of_model(path):
    model = load_model(path)
    text = str([model.fingerprint, model.backbone, model.arguments, model.front_end, model.provenance, model.decision])
    return {name: np.asarray(leaf) for name, leaf in flattened(model.variables).items()} | {"text": text}


def of_embeddings(path):
    return {name: np.asarray(value) for name, value in dataclasses.asdict(read_embeddings(path)).items()}


def of_gallery(path):
    gallery = Gallery.load(path)
    return {"model": gallery.model, "ranking": str(gallery.ranking(np.arange(1.0, 9.0)))}


@functools.cache
def material() -> dict[str, tuple[Path, object]]:
    """{kind: (an undamaged file, the function that reads it)}."""
    folder, rng = Path(tempfile.mkdtemp(dir=tiny.temporary_folder())), np.random.default_rng(0)
    names = [f"Zoë {number}/a.wav" for number in range(20)]
    content = Embeddings(names, rng.standard_normal((20, 8)).astype(np.float32), tiny.untrained_model().fingerprint)
    for ending in (".npz", ".parquet"):
        write_embeddings(folder / f"embeddings{ending}", content)
        people = Gallery(content.model)
        for name, row in zip(names, content.embeddings):
            people.add(name, row[None])
        people.save(folder / f"gallery{ending}")
    return {
        "model file": (tiny.model_file(), of_model),
        "exported program": (write_program(folder / "program.zip", tiny.untrained_model()), of_model),
        **{f"embeddings in {kind}": (folder / f"embeddings.{kind}", of_embeddings) for kind in ("npz", "parquet")},
        **{f"gallery in {kind}": (folder / f"gallery.{kind}", of_gallery) for kind in ("npz", "parquet")},
    }


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(value, other[name]) for name, value in one.items())


def read_or_refusal(read, path):
    """What a reader returns, or None if it refuses as it should."""
    try:
        return read(path)
    except (OSError, ValueError) as error:
        assert str(path) in str(error) and "\n" not in str(error), error
        return None


def files(trials, rng):
    """Files that are read whole; returns how many damaged ones were noticed, by kind."""
    noticed = dict.fromkeys(material(), 0)
    expected = {kind: read(path) for kind, (path, read) in material().items()}
    folder = Path(tempfile.mkdtemp(dir=tiny.temporary_folder()))
    for number in trials:
        kind = list(noticed)[number % len(noticed)]
        path, read = material()[kind]
        changed = folder / path.name
        changed.write_bytes(damaged(path.read_bytes(), rng))
        found = read_or_refusal(read, changed)
        assert found is None or same(found, expected[kind]), f"{kind}: damage is not noticed"
        noticed[kind] += found is None
    return {"noticed": noticed}


def checkpoints(trials, rng):
    """Checkpoints; returns how many damaged ones were noticed by all that read them."""
    whole, noticed, by_command = tiny.whole_run(), 0, 0
    workdir = Path(tempfile.mkdtemp(dir=tiny.temporary_folder())) / "run"
    shutil.copytree(whole, workdir)
    latest = workdir / "checkpoints" / "12"
    before, expected = contents(latest), {"state": arrays(whole), "network": of_model(workdir)}
    exported = workdir.parent / "m.safetensors"
    assert command("export", "--model", workdir, "--output", exported)[0] == 0
    network = exported.read_bytes()
    for number in trials:
        name = rng.choice([name for name, content in before.items() if content])
        path = latest / name
        path.write_bytes(damaged(before[name], rng))
        changed = path.read_bytes() != before[name] and name != "commit_success.txt"  # of which only the name matters
        for part, read in (("state", arrays), ("network", of_model), ("extra", load_extra)):
            try:
                found = read(workdir)
                assert part == "extra" or same(found, expected[part]), f"{name}: damage is not noticed"
                assert not changed or part == "extra", name
            except (OSError, ValueError) as error:
                assert changed and str(latest) in str(error) and "\n" not in str(error), error
        if changed and number % 5 == 0:
            exported.unlink(missing_ok=True)
            output = ("--output", exported)
            data = ("--data", tiny.material().dataset, "--trials", tiny.material().trials)
            for arguments in (
                ("export", "--model", workdir, *output),
                ("embed", tiny.material().corpus, "--model", workdir, "--output", exported.with_suffix(".npz")),
                ("eval", "--model", workdir, *data, "--output", exported.with_suffix("")),
                ("report", workdir, *data, "--output", exported.with_suffix(".html")),
                tiny.train_arguments(workdir),
            ):
                status, text = command(*arguments)
                assert status == 2 and str(latest) in text and "Traceback" not in text, (arguments, text)
                by_command += 1
            assert os.listdir(workdir.parent) == ["run"]
        noticed += changed
        path.write_bytes(before[name])
    assert command("export", "--model", workdir, "--output", exported)[0] == 0 and exported.read_bytes() == network
    return {"noticed": noticed, "refusals of commands": by_command}
