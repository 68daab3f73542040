"""Trial lists: the published forms are parsed, broken ones are refused with file and line."""

from pathlib import Path

import numpy as np
import pytest

from memo_jax.scoring.trials import read_enrollments, read_trials, speaker_pairs, trial_pairs

SHARED_TRIALS = Path(__file__).parents[3] / "shared" / "speech" / "trials"
LINES = ["1 a/x.wav a/y.wav", "0 a/x.wav b/z.wav"]


def write(tmp_path, content):
    path = tmp_path / "trials.txt"
    path.write_bytes(content.encode())
    return path


@pytest.mark.parametrize(
    "content",
    [
        "\n".join(LINES) + "\n",
        "\n".join(LINES),
        "\r\n".join(LINES) + "\r\n",
        "\ufeff" + "\n".join(LINES) + "\n\n \n",
        "\n".join(LINES).replace(" ", "\t"),
        "a/x.wav a/y.wav target\na/x.wav b/z.wav nontarget\n",
        "a/x.wav\ta/y.wav\ttarget\r\na/x.wav   b/z.wav nontarget",
        "a/x.wav a/y.wav 1\na/x.wav b/z.wav 0\n",
        "\ufeffa/x.wav a/y.wav 1\r\na/x.wav b/z.wav 0\r\n",
    ],
)
def test_every_form_gives_the_same_trials(tmp_path, content):
    trials = read_trials(write(tmp_path, content))
    assert (trials.enrol, trials.test) == (["a/x.wav", "a/x.wav"], ["a/y.wav", "b/z.wav"])
    assert trials.target.dtype == bool and trials.target.tolist() == [True, False]
    assert len(trials) == 2 and trials.recordings == ["a/x.wav", "a/y.wav", "b/z.wav"]


def test_tabs_allow_names_with_spaces_and_other_alphabets(tmp_path):
    trials = read_trials(write(tmp_path, "1\tJürgen 李/a b.wav\tJürgen 李/c.wav\n"))
    assert trials.enrol == ["Jürgen 李/a b.wav"] and trials.test == ["Jürgen 李/c.wav"]


@pytest.mark.parametrize(
    "content, said",
    [
        ("", "the trial list is empty"),
        ("\n\r\n  \n", "the trial list is empty"),
        ("1 a b\n1 a\n0 a b c\n", r"line 2: 2 fields where the first trial has 3: '1 a'"),
        ("1 a b\n1 my file.wav b\n", r"line 2: 4 fields .*'1 my file.wav b'.*tabs"),
        ("1 a b\n\n0 a c\n", r"line 2: 0 fields"),
        ("1 a b\n2 a b\n", r"line 2: the label '2' is not 1 or 0: '2 a b'"),
        ("a b target\na b nontarget\na b impostor\n", r"line 3: the label 'impostor' is not target or nontarget"),
        ("1 a b\na b target\n", r"line 2: the label 'a'.*one form throughout"),
    ],
)
def test_broken_lists_are_refused_with_file_and_line(tmp_path, content, said):
    path = write(tmp_path, content)
    with pytest.raises(ValueError, match=said) as error:
        read_trials(path)
    assert str(path) in str(error.value)


def test_bytes_that_are_no_text_are_refused(tmp_path):
    path = tmp_path / "trials.txt"
    path.write_bytes(b"RIFF\xff\xfe\x00\x80WAVE")
    with pytest.raises(ValueError, match="not a trial list"):
        read_trials(path)
    with pytest.raises(FileNotFoundError):
        read_trials(tmp_path / "absent.txt")


@pytest.mark.skipif(not SHARED_TRIALS.is_dir(), reason="the published trial lists are not on this machine")
@pytest.mark.parametrize(
    "name, trials, targets",
    [
        ("voxceleb1-O.txt", 37_720, 18_860),
        ("voxceleb1-O-cleaned.txt", 37_611, 18_802),
        ("voxceleb1-O-cleaned-crlf.txt", 37_611, 18_802),
        ("speechocean762-test.txt", 40_000, 10_000),
        ("speechocean762-test-same-gender.kaldi", 32_000, 8_000),
        ("librispeech-test.txt", 4_950, 450),
    ],
)
def test_published_lists_parse(name, trials, targets):
    read = read_trials(SHARED_TRIALS / name)
    assert (len(read), int(read.target.sum())) == (trials, targets)
    pairs = speaker_pairs(read)  # raises where folders and labels disagree
    np.testing.assert_array_equal(pairs[:, 0] == pairs[:, 1], read.target)


def test_pairs_index_the_names_given(tmp_path):
    trials = read_trials(write(tmp_path, "\n".join(LINES)))
    names = ["b/z.wav", "unused.wav", "a/y.wav", "a/x.wav"]
    assert trial_pairs(trials, names).tolist() == [[3, 2], [3, 0]]


def test_missing_recordings_are_named_and_counted(tmp_path):
    trials = read_trials(write(tmp_path, "\n".join(LINES)))
    with pytest.raises(ValueError, match=r"2 of the 3 recordings .* 'a/x.wav', 'b/z.wav'"):
        trial_pairs(trials, ["a/y.wav"])


def test_the_extension_of_a_recording_does_not_matter_where_it_is_clear_which_is_meant(tmp_path):
    """As with VoxCeleb2, whose recordings are .m4a, and with Kaldi's names, which have no extension."""
    trials = read_trials(write(tmp_path, "\n".join(LINES)))
    assert trial_pairs(trials, ["b/z.m4a", "a/y", "a/x.FLAC"]).tolist() == [[2, 1], [2, 0]]
    # an exact match takes precedence over similar names
    assert trial_pairs(trials, ["b/z.wav", "b/z.m4a", "a/y.wav", "a/x.wav"]).tolist() == [[3, 2], [3, 0]]
    with pytest.raises(ValueError, match="1 of the 3 recordings .* 'b/z.wav'"):
        trial_pairs(trials, ["b/z.flac", "b/z.m4a", "a/y.wav", "a/x.wav"])
    with pytest.raises(ValueError, match="'a/y.wav'"):  # other dots are part of the name
        trial_pairs(trials, ["b/z.wav", "a/y.2", "a/x.wav"])


def test_two_embeddings_of_one_recording_are_refused_only_where_a_trial_needs_them(tmp_path):
    trials = read_trials(write(tmp_path, "\n".join(LINES)))
    names = ["a/x.wav", "a/y.wav", "b/z.wav"]
    with pytest.raises(ValueError, match="'a/y.wav' has two embeddings"):
        trial_pairs(trials, [*names, "a/y.wav"])
    assert trial_pairs(trials, [*names, "other", "other"]).tolist() == [[0, 1], [0, 2]]


def test_speakers_come_from_folders_functions_or_tables(tmp_path):
    trials = read_trials(write(tmp_path, "\n".join(LINES)))
    table = {"a/x.wav": "anna", "a/y.wav": "anna", "b/z.wav": "bert"}
    for pairs in (speaker_pairs(trials), speaker_pairs(trials, lambda name: name[0]), speaker_pairs(trials, table)):
        assert pairs.tolist() == [[0, 0], [0, 1]]
    with pytest.raises(ValueError, match=r"contradict 1 trial labels, first trial 2: 'a/x.wav' and 'b/z.wav'"):
        speaker_pairs(trials, lambda name: "everyone")
    with pytest.raises(ValueError, match="lacks the recording 'b/z.wav'"):
        speaker_pairs(trials, {"a/x.wav": "anna", "a/y.wav": "anna"})
    with pytest.raises(ValueError, match="'x.wav' has no folder"):
        speaker_pairs(read_trials(write(tmp_path, "1 x.wav y.wav")))


def test_a_list_without_labels_has_no_error_rates(tmp_path):
    trials = read_trials(write(tmp_path, "\ufeffa/x.wav b/z.wav\r\nmy file.wav\tb/z.wav\n"))
    assert trials.target is None and trials.enrol == ["a/x.wav", "my file.wav"] and trials.test == ["b/z.wav"] * 2
    with pytest.raises(ValueError, match="has no labels"):
        trials.require_both_kinds()


@pytest.mark.parametrize("label", ["1", "0"])
def test_labels_of_one_kind_name_the_kind_that_is_missing(tmp_path, label):
    trials = read_trials(write(tmp_path, f"{label} a b\n{label} a c\n"))
    with pytest.raises(ValueError, match=f"trials.txt has no {'nontarget' if label == '1' else 'target'} trial"):
        trials.require_both_kinds()


@pytest.mark.parametrize("again", ["0 a b", "0 b a"])
def test_a_pair_that_is_target_and_nontarget_is_refused(tmp_path, again):
    with pytest.raises(ValueError, match="trials 1 and 3 compare 'a' and 'b', once as target and once as nontarget"):
        read_trials(write(tmp_path, f"1 a b\n0 a c\n{again}\n"))
    assert len(read_trials(write(tmp_path, "1 a b\n0 a c\n1 b a\n"))) == 3


def test_speakers_enrolled_by_several_recordings(tmp_path):
    table = tmp_path / "enroll.txt"
    table.write_text("\ufeffada a1.wav a2.wav\nbob b1.wav\nbob b2.wav b1.wav\n", encoding="utf-8")
    assert read_enrollments(table) == {"ada": ["a1.wav", "a2.wav"], "bob": ["b1.wav", "b2.wav"]}
    trials = read_trials(write(tmp_path, "1 ada a3.wav\n0 bob a3.wav\n0 ada b3.wav\n"), table)
    assert trials.sides == ["ada", "bob", "a3.wav", "b3.wav"]
    assert trials.recordings == ["a1.wav", "a2.wav", "b1.wav", "b2.wav", "a3.wav", "b3.wav"]
    embeddings = np.arange(12.0).reshape(6, 2)
    np.testing.assert_array_equal(trials.side_embeddings(embeddings), [[1, 2], [5, 6], [8, 9], [10, 11]])
    assert speaker_pairs(trials, lambda name: name[0]).tolist() == [[0, 0], [1, 0], [0, 1]]
    with pytest.raises(ValueError, match="'ada' is enrolled by recordings of several speakers: a1.wav, a2.wav"):
        speaker_pairs(trials, lambda name: name)
    for lines, said in (("1 eve a3.wav", "does not enrol 'eve'"), ("1 ada bob", "'bob' is a speaker in")):
        with pytest.raises(ValueError, match=said):
            read_trials(write(tmp_path, lines + "\n0 ada b3.wav\n"), table)
    table.write_text("ada\n")
    with pytest.raises(ValueError, match="line 1: expected `speaker recording …`"):
        read_enrollments(table)
