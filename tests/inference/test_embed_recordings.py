"""`memo-jax embed`, `verify`, `enroll` and `identify` as users run them, above all with unusable recordings."""

import dataclasses
import json
import shutil
import zipfile

import numpy as np
import pytest
import soundfile

import tiny
from memo_jax.inference import embed_recordings as module
from memo_jax.inference.embedder import Embedder
from memo_jax.inference.model_file import Decision, write_decision, write_model
from memo_jax.scoring.embedding_file import read_embeddings

RATE = 16000


def embed(output, *inputs, model=None):
    return tiny.here("embed", *inputs, "--model", model or tiny.model_file(), "--output", output)


def json_of(text):
    return json.loads(text[text.index("{\n") : text.rindex("}") + 1])


@pytest.fixture(scope="module")
def corpus():
    return tiny.material().corpus


def test_files_folders_and_datasets_give_the_same_embeddings_by_name(corpus, tmp_path):
    status, text = embed(tmp_path / "folder.npz", corpus)
    assert status == 0 and "20 embeddings of 8 dimensions" in text and "20/20 recording" in text, text
    folder = read_embeddings(tmp_path / "folder.npz")
    assert folder.names == [f"s{i}/{j}.wav" for i in range(5) for j in range(4)]
    assert folder.model == tiny.untrained_model().fingerprint
    with np.load(tmp_path / "folder.npz") as file:  # as anybody would read it
        assert file["names"].tolist() == folder.names and str(file["model"]) == folder.model
        assert file["embeddings"].dtype == np.float32 and file["embeddings"].shape == (20, 8)

    status, text = tiny.here(
        "embed",
        tiny.material().dataset,
        corpus / "s0" / "0.wav",
        "--model",
        tiny.model_file(),
        "--output",
        tmp_path / "both.parquet",
        "--json",
    )
    assert status == 0, text
    report = json_of(text)
    both = read_embeddings(tmp_path / "both.parquet")
    assert report["recordings"] == 21 and report["left_out"] == [] and report["model"] == both.model == folder.model
    assert both.names == [*folder.names, str(corpus / "s0" / "0.wav")]
    np.testing.assert_allclose(both.embeddings[:20], folder.embeddings, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(both.embeddings[20], folder.embeddings[0], rtol=1e-4, atol=1e-5)
    alone = Embedder.load(tiny.model_file()).embed(corpus / "s3" / "2.wav")
    np.testing.assert_allclose(folder.embeddings[folder.names.index("s3/2.wav")], alone, rtol=1e-4, atol=1e-5)


def tone(seconds, rate=RATE, level=0.3):
    time = np.arange(round(seconds * rate)) / rate
    return level * (np.sin(2 * np.pi * 220 * time) + 0.3 * np.random.default_rng(0).normal(size=len(time)))


@pytest.fixture(scope="module")
def odd_recordings(tmp_path_factory):
    """A folder of recordings that are odd but fine, and of unusable files: {name: reason, None for fine}."""
    folder = tmp_path_factory.mktemp("odd") / "mit Leerzeichen"
    folder.mkdir()
    expected = {}

    def write(name, samples, rate=RATE, reason=None, **options):
        soundfile.write(folder / name, samples, rate, **options)
        expected[name] = reason
        return folder / name

    write("8 kHz.wav", tone(1, 8000), 8000)
    write("48 kHz.wav", tone(1, 48000), 48000)
    write("stereo.flac", np.stack([tone(1), -tone(1) / 2], axis=1))
    write("24 bit.wav", tone(1), subtype="PCM_24")
    write("float.wav", tone(1), subtype="FLOAT")
    write("clipping.wav", tone(1, level=3.0))
    write("grüße 你好.wav", tone(0.7))
    write("silence.wav", np.zeros(RATE), reason="silence")
    write("10 ms.wav", tone(0.01), reason="shorter than 0.5 s")
    broken = tone(1)
    broken[100] = np.nan
    write("nan.wav", broken, subtype="FLOAT", reason="NaN or infinite samples")
    whole = write("cut.wav", tone(1), reason="truncated").read_bytes()
    (folder / "cut.wav").write_bytes(whole[: len(whole) // 2])
    for name, content, reason in (
        ("empty.wav", b"", "empty file"),
        ("zeros.wav", bytes(5000), "not readable as audio"),
        ("text.wav", b"no sound at all\n" * 50, "not readable as audio"),
    ):
        (folder / name).write_bytes(content)
        expected[name] = reason
    (folder / "notes.txt").write_text("not even called a recording, so not missed")
    return folder, expected


def test_what_cannot_be_used_is_counted_told_and_left_out_and_the_rest_is_embedded(odd_recordings, tmp_path):
    folder, expected = odd_recordings
    status, text = embed(tmp_path / "odd.npz", folder)
    assert status == 1 and "7 embeddings" in text and "left out 7 recordings" in text, text
    assert set(read_embeddings(tmp_path / "odd.npz").names) == {name for name, reason in expected.items() if not reason}
    rows = [line.split("\t") for line in (tmp_path / "odd.left_out.tsv").read_text(encoding="utf-8").splitlines()]
    assert rows[0] == ["name", "reason"] and len(rows) == 8
    for name, reason in rows[1:]:
        assert reason.startswith(expected[name]) and f"left out: {name}: {expected[name]}" in text
    status, text = embed(tmp_path / "odd.npz", folder / "float.wav")
    assert status == 0 and not (tmp_path / "odd.left_out.tsv").exists()  # that of another run would be a lie


def test_verify_names_what_it_cannot_use_and_takes_what_is_odd_but_fine(odd_recordings):
    folder, expected = odd_recordings
    good = folder / "float.wav"
    for name, reason in expected.items():
        status, text = tiny.here("verify", good, folder / name, "--model", tiny.model_file())
        if reason is None:
            assert status in (0, 1) and "score" in text, text
        else:
            assert status == 2 and f"{name}: {reason}" in text, text


def test_nothing_usable_is_an_error_with_the_list(odd_recordings, tmp_path):
    folder, _ = odd_recordings
    status, text = embed(tmp_path / "none.npz", folder / "empty.wav", folder / "silence.wav")
    assert status == 2 and "none of 2 recordings can be used" in text
    assert not (tmp_path / "none.npz").exists() and (tmp_path / "none.left_out.tsv").exists()
    (tmp_path / "folder").mkdir()
    status, text = embed(tmp_path / "none.npz", tmp_path / "folder")
    assert status == 2 and f"no recordings in {tmp_path / 'folder'}" in text


def test_impossible_inputs_and_outputs_are_named(corpus, tmp_path):
    shutil.copytree(corpus / "s0", tmp_path / "s0")
    for inputs, output, message in (
        ((tmp_path / "gone",), "a.npz", "gone: no such file, folder or dataset"),
        ((corpus / "s0", tmp_path / "s0"), "a.npz", "two recordings would be called '0.wav'"),
        ((corpus,), "a.csv", "ends in .npz, .parquet, .npy, .ark or .scp"),
        ((corpus,), "file/a.npz", "file"),
    ):
        (tmp_path / "file").write_text("")
        status, text = embed(tmp_path / output, *inputs)
        assert status == 2 and message in text, text
    assert not list(tmp_path.glob("*.npz"))


def test_a_disk_that_takes_nothing_is_named(corpus, unwritable):
    """No partial file remains."""
    folder, message = unwritable
    status, text = embed(folder / "a.npz", corpus)
    assert status == 2 and str(folder) in text and message in text, text
    assert not list(folder.glob("*.npz"))


def test_an_interrupted_run_resumes_where_it_was(corpus, tmp_path, monkeypatch):
    """Interrupted after 8 of 20 recordings: these are not read again, and the result is the same."""
    embed(tmp_path / "whole.npz", corpus)
    embedder, read = Embedder.load(tiny.model_file()), []
    apply = module.apply_to_stream

    def interrupted(function, waves):
        for count, item in enumerate(apply(function, ((key, wave) for key, wave in waves))):
            if count == 8:
                raise KeyboardInterrupt
            yield item

    monkeypatch.setattr(module, "apply_to_stream", interrupted)
    with pytest.raises(KeyboardInterrupt):
        module.embed_recordings(embedder, [corpus], tmp_path / "cut.npz", quiet=True)
    assert not (tmp_path / "cut.npz").exists()
    monkeypatch.setattr(module, "apply_to_stream", apply)
    original = module.read_recording
    monkeypatch.setattr(
        module, "read_recording", lambda item, **options: read.append(item) or original(item, **options)
    )
    report = module.embed_recordings(embedder, [corpus], tmp_path / "cut.npz", quiet=True)
    assert len(read) == 12 and report["recordings"] == 20
    assert report["seconds"] == module.embed_recordings(embedder, [corpus], tmp_path / "o.npz", quiet=True)["seconds"]
    (tmp_path / "o.npz").unlink()
    whole, cut = read_embeddings(tmp_path / "whole.npz"), read_embeddings(tmp_path / "cut.npz")
    assert whole.names == cut.names and whole.model == cut.model
    np.testing.assert_allclose(whole.embeddings, cut.embeddings, rtol=1e-4, atol=1e-5)
    assert {path.name for path in tmp_path.iterdir()} == {"whole.npz", "cut.npz"}


def test_verify_says_and_returns_its_decision(corpus):
    a, b = corpus / "s0" / "0.wav", corpus / "s1" / "0.wav"
    status, text = tiny.here("verify", a, a, "--model", tiny.model_file())
    assert status == 0 and "same speaker: score 1.0000, threshold 0.4000 (a list)" in text
    status, text = tiny.here("verify", a, b, "--model", tiny.model_file(), "--threshold", "1", "--json")
    result = json_of(text)
    assert status == 1 and result["decision"] is False and result["threshold"] == 1 and -1 <= result["score"] < 1
    assert result["threshold_source"] == "given" and result["model"] == tiny.untrained_model().fingerprint


def test_verify_and_identify_tell_the_probability_by_the_calibration_and_the_prior(corpus, tmp_path):
    """By Bayes' rule from scale · score + offset, the logarithm of the likelihood ratio."""
    a, b = corpus / "s0" / "0.wav", corpus / "s1" / "0.wav"
    model = ["--model", tiny.model_file()]
    status, text = tiny.here("verify", a, a, *model)
    assert "probability of the same person over 99.9 % (prior 0.5; calibrated by the same trials)" in text, text
    status, text = tiny.here("verify", a, b, *model, "--prior", "0.01", "--threshold", "0.2", "--json")
    result = json_of(text)
    ratio = np.exp(20 * result["score"] - 8)
    assert result["probability"] == pytest.approx(ratio * 0.01 / (ratio * 0.01 + 0.99))
    assert (result["prior"], result["threshold_source"], result["calibration_source"]) == (0.01, "given", "a list")
    people = [*model, "--gallery", tmp_path / "people.npz"]
    tiny.here("enroll", "Ada", a, *people)
    status, text = tiny.here("identify", b, *people, "--json")
    assert json_of(text)["probability"] == pytest.approx(ratio / (ratio + 1))
    status, text = tiny.here("identify", b, *people, "--threshold", "1")
    assert "(given)\n  probability of the same person" in text and "(prior 0.5; calibrated by a list)" in text

    untuned = write_model(tmp_path / "m.safetensors", dataclasses.replace(tiny.untrained_model(), decision=None))
    status, text = tiny.here("verify", a, a, "--model", untuned)
    assert status == 0 and "not tuned" in text and "probability" not in text
    status, text = tiny.here("verify", a, a, "--model", untuned, "--json")
    assert json_of(text)["probability"] is json_of(text)["calibration_source"] is None
    for prior in ("0", "1", "nan", "half"):
        status, text = tiny.here("verify", a, a, *model, "--prior", prior)
        assert status == 2 and "--prior" in text


def test_a_calibration_of_a_file_takes_the_place_of_that_in_the_model(corpus, tmp_path):
    model, file = tiny.untrained_model(), tmp_path / "calibration.json"
    write_decision(file, Decision(0.9, 3.0, -1.0, "another list"), model.fingerprint)
    command = ["verify", corpus / "s0" / "0.wav", corpus / "s0" / "0.wav", "--model", tiny.model_file()]
    status, text = tiny.here(*command, "--calibration", file)
    assert status == 0 and "threshold 0.9000 (another list)\n  probability of the same person 88.1 %" in text
    for content, message in (
        (file.read_text().replace(model.fingerprint, "0" * 32), f"of another model ({'0' * 32}, not"),
        ("{}", "not a calibration that"),
        ("no JSON", "not a calibration that"),
        (file.read_text().replace("0.9", "1.9"), "the threshold is 1.9"),
    ):
        file.write_text(content)
        status, text = tiny.here(*command, "--calibration", file)
        assert status == 2 and "calibration.json" in text and message in text, text


def test_a_gallery_is_enrolled_asked_and_guarded(corpus, tmp_path):
    gallery = tmp_path / "people.npz"

    def command(name, *arguments):
        return tiny.here(name, *arguments, "--model", tiny.model_file(), "--gallery", gallery)

    status, text = command("identify", corpus / "s0" / "0.wav")
    assert status == 2 and "no such gallery" in text
    status, text = command("enroll", "Ada", corpus / "s0" / "0.wav", corpus / "s0" / "1.wav")
    assert status == 0 and "Ada is enrolled; 1 in" in text
    status, text = command("enroll", "Ada", corpus / "s1" / "0.wav")
    assert status == 2 and "'Ada' is enrolled already" in text
    status, text = command("identify", corpus / "s0" / "0.wav")
    assert status == 0 and text.startswith("Ada: nearest is Ada, score")
    status, text = command("identify", corpus / "s0" / "0.wav", "--threshold", "1", "--json")
    assert status == 1 and json_of(text)["name"] is None and json_of(text)["nearest"] == "Ada"


class Norms:
    """An embedder without a network: the embedding is the level of a recording, and calls are counted."""

    fingerprint, dimension, channel, vad = "levels", 2, "mean", False

    def __init__(self, stop_after=None):
        self.calls, self.stop_after = 0, stop_after

    def apply(self, waves, lengths):
        if self.stop_after is not None and self.calls >= self.stop_after:
            raise KeyboardInterrupt
        self.calls += len(waves)
        return np.stack([np.abs(waves.astype(np.float64)).sum(1) / lengths, lengths], axis=1)


def write_levels(folder, level, count=40):
    folder.mkdir()
    for i in range(count):
        soundfile.write(folder / f"{i:02d}.wav", tone(1, level=level), RATE)
    return folder


def interrupted_run(folder, output):
    """Embeds a folder until the first batches are done; returns how many recordings are saved."""
    with pytest.raises(KeyboardInterrupt):
        module.embed_recordings(Norms(stop_after=16), [folder], output, quiet=True)
    (begun,) = output.parent.glob(f".{output.name}.begun.npz")
    with np.load(begun) as file:
        return len(file["names"])


def test_a_run_resumed_with_other_recordings_of_the_same_names_embeds_those(tmp_path):
    """Another folder, or files of the same folder that were replaced meanwhile."""
    quiet, loud = write_levels(tmp_path / "a", 0.05), write_levels(tmp_path / "b", 0.3)
    whole = module.embed_recordings(Norms(), [loud], tmp_path / "whole.npz", quiet=True)
    assert whole["recordings"] == 40
    assert 0 < interrupted_run(quiet, tmp_path / "o.npz") < 40
    module.embed_recordings(Norms(), [loud], tmp_path / "o.npz", quiet=True)
    wanted = read_embeddings(tmp_path / "whole.npz").embeddings
    np.testing.assert_array_equal(read_embeddings(tmp_path / "o.npz").embeddings, wanted)

    kept = interrupted_run(quiet, tmp_path / "o.npz")
    for path in sorted(quiet.iterdir())[:5]:
        shutil.copy(loud / path.name, path)
    embedder = Norms()
    module.embed_recordings(embedder, [quiet], tmp_path / "o.npz", quiet=True)
    found = read_embeddings(tmp_path / "o.npz").embeddings
    np.testing.assert_array_equal(found[:5], wanted[:5])
    assert (found[5:, 0] < wanted[5:, 0] / 2).all() and embedder.calls >= 40 - kept
    assert not list(tmp_path.glob(".o*"))


def test_other_options_start_afresh(tmp_path):
    folder = write_levels(tmp_path / "a", 0.1)
    assert interrupted_run(folder, tmp_path / "o.npz") > 0
    report = module.embed_recordings(Norms(), [folder], tmp_path / "o.npz", min_seconds=0.6, quiet=True)
    assert report["recordings"] == 40 and report["seconds"] == 40.0


def test_names_that_no_list_can_hold_and_members_that_cannot_be_read_are_listed(tmp_path):
    """One such name costs nothing else, whether in a folder or archive or given itself."""
    folder = tmp_path / "in"
    folder.mkdir()
    soundfile.write(folder / "ok.wav", tone(1), RATE)
    for name in ("M\udcfcller.wav", "line\nbreak.wav", "._hidden.wav"):
        shutil.copy(folder / "ok.wav", folder / name)
    (folder / "notes.txt").write_text("no recording, so not missed")
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as file:
        file.write(folder / "ok.wav", "s/1.wav", zipfile.ZIP_LZMA)
        file.write(folder / "ok.wav", "s/2.wav", zipfile.ZIP_STORED)
    odd = ["M\\xfcller.wav", "line\\nbreak.wav"]
    for inputs, used, listed in (
        ([folder], ["ok.wav"], odd),
        ([folder / "ok.wav", folder / "M\udcfcller.wav"], [str(folder / "ok.wav")], odd[:1]),
        ([tmp_path / "z.zip"], ["s/2.wav"], ["s/1.wav"]),
    ):
        report = module.embed_recordings(Norms(), inputs, tmp_path / "e.npz", quiet=True)
        assert read_embeddings(tmp_path / "e.npz").names == used
        assert sorted(name.rpartition("in/")[2].rpartition("z.zip/")[2] for name, _ in report["left_out"]) == listed
        lines = (tmp_path / "e.left_out.tsv").read_text(encoding="utf-8").splitlines()
        assert lines[1:] == ["\t".join(item) for item in report["left_out"]]


def test_windows_slide_over_recordings_and_have_their_times(tmp_path):
    """The last one ends with the recording; it is left out below half a window, unless it is the only one."""
    folder = tmp_path / "in"
    folder.mkdir()
    for name, seconds in (("a.wav", 4.0), ("b.wav", 3.6), ("c.wav", 0.7)):
        soundfile.write(folder / name, tone(seconds), RATE)
    report = module.embed_recordings(Norms(), [folder], tmp_path / "w.npz", window=2.0, hop=0.8, quiet=True)
    read = read_embeddings(tmp_path / "w.npz")
    spans = [("a.wav", 0, 2), ("a.wav", 0.8, 2.8), ("a.wav", 1.6, 3.6), ("a.wav", 2.4, 4)]
    spans += [("b.wav", 0, 2), ("b.wav", 0.8, 2.8), ("b.wav", 1.6, 3.6), ("c.wav", 0, 0.7)]
    assert read.names == [f"{name}:{start:g}-{end:g}" for name, start, end in spans]
    np.testing.assert_allclose(read.times, [span[1:] for span in spans])
    assert (report["recordings"], report["embeddings"], report["left_out"]) == (3, 8, [])
    assert "8 embeddings of 2 dimensions, windows of 3 recordings" in module.embedding_text(report | {"dimension": 2})
    one = module.Windows(2.0, 0.8, 0.5)
    assert [end - begin for begin, end in one.spans(2 * RATE + 10)] == [2 * RATE, round(1.2 * RATE) + 10]
    assert one.spans(2 * RATE) == [(0, 2 * RATE)] and one.spans(RATE) == [(0, RATE)]
    assert module.Windows(2.0, 1.5, 0.5).spans(2 * RATE + 10) == [(0, 2 * RATE)]  # 0.5 s would be left


def test_a_window_is_embedded_as_the_excerpt_that_it_is_called(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    soundfile.write("long.wav", np.tile(soundfile.read(corpus / "s0" / "0.wav")[0], 4), RATE)
    command = ["embed", "--model", tiny.model_file(), "-o"]
    status, text = tiny.here(*command, "w.parquet", "long.wav", "--window", 1)
    assert status == 0 and "windows of 1 recording" in text, text
    windows = read_embeddings("w.parquet")
    assert windows.names[:2] == ["long.wav:0-1", "long.wav:0.5-1.5"]
    status, text = tiny.here(*command, "e.npz", *windows.names)
    assert status == 0, text
    excerpts = read_embeddings("e.npz")
    assert excerpts.names == windows.names and excerpts.times is None
    np.testing.assert_allclose(windows.embeddings[:-1], excerpts.embeddings[:-1], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(windows.embeddings[-1], excerpts.embeddings[-1], atol=1e-3)  # cut at a millisecond
    status, text = tiny.here(*command, "x.ark", "long.wav:0.5-2.5", "--window", 1, "--hop", 1)
    assert status == 0 and read_embeddings("x.ark").names == ["long.wav:0.5-1.5", "long.wav:1.5-2.5"], text
    at = windows.names.index("long.wav:0.5-1.5")
    np.testing.assert_allclose(read_embeddings("x.scp").embeddings[0], windows.embeddings[at], rtol=1e-4, atol=1e-5)


def test_silent_windows_are_listed_and_again_by_a_resumed_run(tmp_path, capsys):
    folder = write_levels(tmp_path / "a", 0.1)
    soundfile.write(folder / "00.wav", np.concatenate([tone(1), np.zeros(RATE), tone(1)]), RATE)
    with pytest.raises(KeyboardInterrupt):
        module.embed_recordings(Norms(stop_after=20), [folder], tmp_path / "o.npz", window=1.0, hop=1.0, quiet=True)
    report = module.embed_recordings(Norms(), [folder], tmp_path / "o.npz", window=1.0, hop=1.0)
    said = capsys.readouterr().err
    assert report["left_out"] == [["00.wav:1-2", "silence: all samples are equal"]]
    assert "embedded before the interruption" in said and "changed since" not in said
    assert "left out 1 recording or window" in module.embedding_text(report | {"dimension": 2})
    assert read_embeddings(tmp_path / "o.npz").names[:3] == ["00.wav:0-1", "00.wav:2-3", "01.wav:0-1"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--hop", 1], "add --window"),
        (["--window", 0.2], "windows of 0.2 s: give at least the 0.5 s"),
        (["--window", 1, "--hop", 0], "a hop of 0 s: give more than 0, and at most the 1 s"),
        (["--window", 1, "--hop", 1.5], "a hop of 1.5 s"),
    ],
)
def test_impossible_windows_are_refused(options, message, corpus, tmp_path):
    status, text = tiny.here("embed", corpus, "--model", tiny.model_file(), "-o", tmp_path / "w.npz", *options)
    assert status == 2 and message in text and not list(tmp_path.iterdir()), text


def test_names_that_an_archive_cannot_hold_are_reported_before_the_work(tmp_path):
    folder = write_levels(tmp_path / "a", 0.1, count=2)
    (folder / "00.wav").rename(folder / "with space.wav")
    embedder = Norms()
    with pytest.raises(ValueError, match="'with space.wav' has white space"):
        module.embed_recordings(embedder, [folder], tmp_path / "o.ark", quiet=True)
    assert embedder.calls == 0


def test_excerpts_of_a_recording(corpus, tmp_path, monkeypatch):
    """For embed, verify, enroll and identify; a file that really has such a name takes precedence."""
    monkeypatch.chdir(tmp_path)
    a, b = (soundfile.read(corpus / f"s{i}" / "0.wav")[0] for i in range(2))
    soundfile.write("both.wav", np.concatenate([a, b]), RATE)
    soundfile.write("a.wav", a, RATE)
    cut = len(a) / RATE
    first, second = f"both.wav:0-{cut:.4f}", f"both.wav:{cut:.4f}-"
    status, text = tiny.here("verify", "a.wav", first, "--model", tiny.model_file())
    assert status == 0 and "score 1.0000" in text, text
    people = ["--model", tiny.model_file(), "--gallery", "people.npz"]
    for name, excerpt in (("Ada", first), ("Bo", second)):
        status, text = tiny.here("enroll", name, excerpt, *people)
        assert status == 0, text
    status, text = tiny.here("identify", corpus / "s1" / "0.wav", *people, "--threshold", "0.99")
    assert status == 0 and text.startswith("Bo:"), text
    soundfile.write("both.wav:0-1", b, RATE, format="WAV")  # a whole file
    status, text = tiny.here("identify", "both.wav:0-1", *people, "--threshold", "0.99")
    assert status == 0 and text.startswith("Bo:"), text
    for excerpt, message in (
        ("both.wav:1-0.5", "both.wav:1-0.5: no excerpt: it ends before it begins"),
        ("both.wav:0.1-0.2", "both.wav:0.1-0.2: shorter than 0.5 s"),
        ("both.wav:3600-", "both.wav: no such part: 3600 s to the end; the recording has"),
        ("gone.wav:0-1", "gone.wav: no such file"),
    ):
        status, text = tiny.here("verify", "a.wav", excerpt, "--model", tiny.model_file())
        assert status == 2 and message in text, text
    status, text = embed("e.npz", "gone.wav:0-1")
    assert status == 2 and "gone.wav:0-1: no such file, folder or dataset" in text


def test_an_archive_does_not_replace_a_list_of_recordings(corpus, tmp_path):
    listed = f"u1 {corpus}/s0/0.wav\n"
    (tmp_path / "wav.scp").write_text(listed)
    status, text = embed(tmp_path / "wav.ark", tmp_path)
    assert status == 2 and "wav.scp would be replaced" in text
    assert (tmp_path / "wav.scp").read_text() == listed and not (tmp_path / "wav.ark").exists()


def test_an_excerpt_up_to_the_end_has_windows_named_as_excerpts(corpus, tmp_path):
    given = f"{corpus}/s0/0.wav:0-"
    options = ("--window", "0.5", "--hop", "0.5", "--model", tiny.model_file(), "--output", tmp_path / "w.npz")
    assert tiny.here("embed", given, *options)[0] == 0
    assert read_embeddings(tmp_path / "w.npz").names[0] == f"{corpus}/s0/0.wav:0-0.5"


def test_galleries_and_scores_from_archives_and_matrices(corpus, tmp_path):
    """identify and score read every kind; enroll and remove write only those that keep the model."""
    for ending in ("npz", "npy", "ark"):
        status, text = embed(tmp_path / f"e.{ending}", corpus)
        assert status == 0, text
    scores = []
    for ending in ("npz", "npy", "ark", "scp"):
        command = ["score", "--trials", tiny.material().trials, "--replicates", 0, "--json"]
        status, text = tiny.here(*command, "--embeddings", tmp_path / f"e.{ending}")
        assert status == 0, text
        scores.append(json_of(text)["eer"])
        known = ["--model", tiny.model_file(), "--gallery", tmp_path / f"e.{ending}"]
        status, text = tiny.here("identify", corpus / "s2" / "1.wav", *known, "--threshold", "0.999")
        assert status == 0 and text.startswith("s2/1.wav:"), text
    assert len(set(scores)) == 1
    before = (tmp_path / "e.ark").read_bytes()
    for command in (["enroll", "Ada", corpus / "s0" / "0.wav", "--model", tiny.model_file()], ["remove", "s0/0.wav"]):
        status, text = tiny.here(*command, "--gallery", tmp_path / "e.ark")
        assert status == 2 and "a gallery that is written to ends in .npz or .parquet" in text, text
    assert (tmp_path / "e.ark").read_bytes() == before


def test_an_embedding_that_is_not_finite_names_the_recording(tmp_path):
    folder = write_levels(tmp_path / "a", 0.1, count=3)
    embedder = Norms()
    embedder.apply = lambda waves, lengths: np.full((len(waves), 2), np.nan)
    with pytest.raises(ValueError, match=r"0\d.wav: its embedding is not finite"):
        module.embed_recordings(embedder, [folder], tmp_path / "e.npz", quiet=True)
    assert {path.name for path in tmp_path.iterdir()} == {"a"}


def test_two_processes_cannot_write_the_same_output(tmp_path):
    from memo_jax.locks import LockedError, exclusive

    folder = write_levels(tmp_path / "a", 0.1, count=2)
    with exclusive(tmp_path / "e.npz"), pytest.raises(LockedError, match="e.npz is in use by process"):
        module.embed_recordings(Norms(), [folder], tmp_path / "e.npz", quiet=True)
