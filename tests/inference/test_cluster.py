"""`memo-jax cluster`: from embeddings, or a model and a dataset, to a table of clusters."""

import json

import numpy as np
import pytest

import tiny
from memo_jax.data.batches import Utterances
from memo_jax.inference.cluster import cluster, cluster_to_table, default_numbers
from memo_jax.scoring.embedding_file import Embeddings, write_embeddings
from memo_jax.scoring.trials import read_table


def clouds(people: int = 6, each: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings of various norms around a direction for each person, and whose each is."""
    random = np.random.default_rng(0)
    directions = np.linalg.qr(random.normal(size=(8, 8)))[0][:people]
    who = np.arange(people * each) % people
    rows = directions[who] + 0.05 * random.normal(size=(len(who), 8))
    return (rows * random.uniform(0.5, 2, (len(who), 1))).astype(np.float32), who


@pytest.fixture
def embedded(tmp_path):
    """A file of such embeddings and their utt2spk, which lacks the last one."""
    rows, who = clouds()
    names = [f"a folder/{i:02}.wav" for i in range(len(rows))]
    (tmp_path / "utt2spk").write_text("".join(f"{n}\tp{w}\n" for n, w in list(zip(names, who))[:-1]))
    return write_embeddings(tmp_path / "rows.npz", Embeddings(names, rows, "a model")), tmp_path / "utt2spk"


@pytest.mark.parametrize(
    "options", [{"kmeans": 30, "clusters": 6}, {"clusters": 6, "linkage": "average"}, {"clusters": 6}]
)
def test_clusters_are_the_people(options):
    rows, who = clouds()
    found = cluster(rows, **options)
    assert len({*zip(found.tolist(), who.tolist())}) == 6 and found.max() == 5
    np.testing.assert_array_equal(found, cluster(3 * rows, **options))


def test_kmeans_alone_depends_on_its_seed_and_repeats():
    rows, _ = clouds()
    again = [cluster(rows, kmeans=12, seed=seed) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(again[0], again[1])
    assert (again[0] != again[2]).any() and again[0].max() < 12


@pytest.mark.parametrize(
    "options, said",
    [
        ({"clusters": 61}, "there are 60 embeddings"),
        ({"kmeans": 61}, "there are 60 embeddings"),
        ({"kmeans": 5, "clusters": 6}, "more than --kmeans 5"),
        ({}, "give a number"),
        ({"clusters": 2, "linkage": "single"}, "choose ward or average"),
    ],
)
def test_impossible_numbers_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        cluster(clouds()[0], **options)


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_embeddings_without_direction_are_refused(value):
    rows, _ = clouds()
    rows[7] = value
    with pytest.raises(ValueError, match="row 7 is zero or not finite"):
        cluster(rows, clusters=2)


def test_default_numbers_are_those_of_the_recipe():
    assert default_numbers(1_092_009) == (49_637, 7480)
    assert default_numbers(1000) == (0, 7) and default_numbers(10) == (0, 2) and default_numbers(1) == (0, 1)
    assert default_numbers(10_000_000)[0] == 50_000


def test_the_command_writes_a_table_and_reports(embedded, tmp_path):
    path, labels = embedded
    arguments = ("cluster", "--embeddings", path, "--kmeans=30", "--clusters=6", f"--labels={labels}")
    table, figure = tmp_path / "new" / "clusters.tsv", tmp_path / "sizes.png"
    status, text = tiny.here(*arguments, "-o", table, "--figure", figure)
    assert status == 0, text
    assert "60 utterances in 6 clusters (k-means to 30 groups, then ward linkage)\n" in text
    assert "sizes 10 to 10, median 10, mean 10.0; 0 clusters of a single utterance" in text
    assert "purity 100.0 %, NMI 1.000 against 6 speakers of 59 utterances" in text and text.endswith(f"{table}\n")
    _, who = clouds()
    found = read_table(table, "name", "cluster")
    assert list(found)[3] == "a folder/03.wav"
    assert len({*zip(found.values(), who.tolist())}) == 6
    assert figure.read_bytes().startswith(b"\x89PNG")
    before = table.read_bytes()
    status, text = tiny.here(*arguments, "-o", table, "--json")
    assert status == 0 and table.read_bytes() == before
    report = json.loads(text)
    assert report["model"] == "a model" and report["labelled"] == 59 and report["largest"] == 10


def test_the_command_embeds_a_dataset(tmp_path):
    """Crops or whole utterances; labels of a dataset are its speakers; the default numbers are printed."""
    dataset = tiny.material().dataset
    for number, crops in enumerate(((), ("--crops=2", "--crop-seconds=0.5"))):
        table = tmp_path / f"{number}.tsv"
        status, text = tiny.here(
            *("cluster", "--model", tiny.model_file(), "--data", dataset, "-o", table, "--labels", dataset), *crops
        )
        assert status == 0, text
        assert "20 utterances in 2 clusters (ward linkage, defaults for this many utterances)" in text
        assert "against 5 speakers of 20 utterances" in text
        clusters = read_table(table, "name", "cluster")
        assert list(clusters) == Utterances(dataset).names and set(clusters.values()) == {"0", "1"}


def test_bad_input_is_named_and_nothing_is_written(embedded, tmp_path):
    path, labels = embedded
    output = tmp_path / "clusters.tsv"
    (tmp_path / "others").write_text("somebody else\n")
    unlabelled = tiny.write_dataset(
        tmp_path / "set", tiny.material().corpus, speakers=dict.fromkeys(Utterances(tiny.material().dataset).names, "")
    )
    for arguments, said in (
        (("--embeddings", path, "--clusters=61"), "--clusters 61: there are 60 embeddings"),
        (("--embeddings", path, f"--labels={tmp_path / 'others'}"), "has a speaker for none of the utterances"),
        (("--embeddings", path, f"--labels={unlabelled}"), "no speaker of its utterances is known"),
        (("--embeddings", path, f"--labels={tmp_path / 'missing'}"), "No such file"),
        (("--embeddings", path, "--crops=2"), "--crops is for --data"),
        (("--embeddings", path, "--data", tmp_path), "either --embeddings"),
        ((), "either --embeddings"),
        (("--data", tmp_path), f"{tmp_path}"),
        (("--embeddings", tmp_path / "missing.npz"), "no such file of embeddings"),
    ):
        status, text = tiny.here("cluster", *arguments, "-o", output)
        assert status == 2 and said in text and text.count("\n") == 1, text
        assert not output.exists()


def test_a_figure_of_no_known_kind_is_refused_before_the_work(embedded, tmp_path):
    arguments = ("--embeddings", embedded[0], "--clusters", 6, "--output", tmp_path / "c.tsv")
    status, text = tiny.here("cluster", *arguments, "--figure", tmp_path / "sizes")
    assert status == 2 and "end its name in .png, .svg, .pdf" in text and not (tmp_path / "c.tsv").exists()


def test_embeddings_of_windows_are_refused(tmp_path):
    rows, _ = clouds()
    names = [f"a.wav:{i}-{i + 1}" for i in range(len(rows))]
    times = np.stack([np.arange(len(rows)), np.arange(len(rows)) + 1.0], axis=1)
    path = write_embeddings(tmp_path / "rows.npz", Embeddings(names, rows, "", times))
    with pytest.raises(ValueError, match="embeddings of windows"):
        cluster_to_table(path, tmp_path / "clusters.tsv", clusters=2)
