"""Galleries: people who enrol at the same time, files of any embeddings, strangers, and removal."""

import multiprocessing

import numpy as np
import pytest

import tiny
from memo_jax.inference.gallery import Gallery, changing_gallery, remove_person
from memo_jax.scoring.embedding_file import Embeddings, write_embeddings


def enroll(path, name, seed):
    with changing_gallery(path, "a model") as gallery:
        gallery.add(name, np.random.default_rng(seed).normal(size=(2, 8)))


@pytest.mark.parametrize("name", ["people.npz", "people.parquet"])
def test_people_who_enrol_at_the_same_time_are_all_there(name, tmp_path):
    context = multiprocessing.get_context("spawn")
    started = [context.Process(target=enroll, args=(tmp_path / name, f"P{i}", i)) for i in range(6)]
    for process in started:
        process.start()
    for process in started:
        process.join()
    assert [process.exitcode for process in started] == [0] * 6
    assert sorted(Gallery.load(tmp_path / name).names) == [f"P{i}" for i in range(6)]
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_scores_are_cosines_whatever_the_norms_in_the_file(tmp_path):
    """As in a file from `memo-jax embed`: a stranger is no nearer for having an embedding of larger norm."""
    rows = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32) * 10.0 ** np.arange(-1, 4)[:, None]
    write_embeddings(tmp_path / "e.npz", Embeddings(list("abcde"), rows, "a model"))
    gallery = Gallery.load(tmp_path / "e.npz", "a model", 8)
    for stranger in 30 * np.random.default_rng(1).normal(size=(20, 8)):
        cosines = rows @ stranger / np.linalg.norm(rows, axis=1) / np.linalg.norm(stranger)
        ranking = gallery.ranking(stranger)
        assert [name for name, _ in ranking] == ["abcde"[i] for i in np.argsort(-cosines)]
        np.testing.assert_allclose([score for _, score in ranking], np.sort(cosines)[::-1], atol=1e-5)
    for name, row in zip("abcde", rows):
        nearest, score = gallery.ranking(row)[0]
        assert nearest == name and 1 - 1e-5 < score <= 1


def test_embeddings_of_another_size_are_refused(tmp_path):
    write_embeddings(tmp_path / "e.npz", Embeddings(["a"], np.ones((1, 9), np.float32)))
    with pytest.raises(
        ValueError, match="e.npz has 9-dimensional embeddings, those of the model in use have 8 dimensions"
    ):
        Gallery.load(tmp_path / "e.npz", "", 8)


@pytest.mark.parametrize("name", ["", "a\tb", "a\nb", "a\0b", "M\udcfcller"])
def test_names_that_a_gallery_cannot_have_are_refused(name):
    """The last one is as the shell passes a name in another encoding."""
    with pytest.raises(ValueError, match="cannot be the name of a person"):
        Gallery("m").add(name, np.ones((1, 8), np.float32))


def test_a_file_of_windows_is_not_changed_into_a_gallery(tmp_path):
    times = np.array([[0.0, 0.5], [0.25, 0.75]])
    path = write_embeddings(tmp_path / "w.npz", Embeddings(["a:0-0.5", "a:0.25-0.75"], np.eye(2, 8), "a model", times))
    before = path.read_bytes()
    with pytest.raises(ValueError, match="w.npz holds windows of recordings"):
        enroll(path, "Ada", 0)
    assert path.read_bytes() == before


@pytest.mark.parametrize("name", ["people.npz", "people.parquet"])
def test_people_are_removed_down_to_the_last_and_may_return(name, tmp_path):
    path = tmp_path / name
    for i, person in enumerate(("Ada", "Jürgen M")):
        enroll(path, person, i)
    status, text = tiny.here("remove", "Bob", "--gallery", path)
    assert status == 2 and "nobody is enrolled as 'Bob'" in text
    status, text = tiny.here("remove", "Ada", "--gallery", path)
    assert status == 0 and "Ada is removed; 1 left in" in text
    remove_person(path, "Jürgen M")
    assert Gallery.load(path).names == [] and Gallery.load(path).model == "a model"
    enroll(path, "Ada", 5)
    assert Gallery.load(path, "a model", 8).names == ["Ada"]
    status, text = tiny.here("remove", "Ada", "--gallery", tmp_path / "none.npz")
    assert status == 2 and "no such gallery" in text
