"""Files of embeddings: what is written is read back, other programs' npz are read, and anything else is named."""

import numpy as np
import pytest

from memo_jax.scoring.embedding_file import (
    Embeddings,
    OtherModelError,
    check_output_name,
    check_same_model,
    read_embeddings,
    write_embeddings,
)

ROWS = np.arange(1, 13, dtype=np.float32).reshape(3, 4)
NAMES = ["a/1.wav", "zwei Wörter.wav", "你好"]


TIMES = np.array([[0.0, 3.0], [1.5, 4.5], [0.1, 1 / 3]])
WINDOWS = ["a/1.wav:0-3", "a/1.wav:1.5-4.5", "你好:0.1-0.333"]


@pytest.mark.parametrize("times", [None, TIMES], ids=["whole", "windows"])
@pytest.mark.parametrize("name", ["e.npz", "e.parquet", "E.NPZ"])
def test_what_is_written_comes_back(name, times, tmp_path):
    path = write_embeddings(tmp_path / name, Embeddings(NAMES, ROWS, "f" * 32, times))
    read = read_embeddings(path)
    assert read.names == NAMES and read.model == "f" * 32 and len(read) == 3
    np.testing.assert_array_equal(read.embeddings, ROWS)
    np.testing.assert_array_equal(read.times, times)
    assert [left.name for left in tmp_path.iterdir()] == [name]


def test_numpy_takes_the_matrix_and_the_names_are_beside_it(tmp_path):
    path = write_embeddings(tmp_path / "e.npy", Embeddings(NAMES, ROWS, "f" * 32))
    np.testing.assert_array_equal(np.load(path), ROWS)
    assert (tmp_path / "e.names.txt").read_text(encoding="utf-8").splitlines() == NAMES
    read = read_embeddings(path)
    assert read.names == NAMES and read.model == "" and read.times is None
    np.testing.assert_array_equal(read.embeddings, ROWS)
    write_embeddings(path, Embeddings(WINDOWS, ROWS, times=TIMES))
    read = read_embeddings(path)
    assert read.names == WINDOWS
    np.testing.assert_array_equal(read.times, TIMES)

    (tmp_path / "e.names.txt").write_text("only one\n")
    with pytest.raises(ValueError, match=r"e.npy: `embeddings` must be floats \[N, D\] for the 1 `names`"):
        read_embeddings(path)
    (tmp_path / "e.names.txt").unlink()
    with pytest.raises(ValueError, match="e.names.txt is missing, which has the name of each row"):
        read_embeddings(path)
    with pytest.raises(ValueError, match=r"e.npy: 'a\\tb' has white space"):
        write_embeddings(path, Embeddings(["a\tb", "c", "d"], ROWS))


@pytest.mark.parametrize("ending", [".ark", ".scp"])
def test_kaldi_tools_read_the_archive_and_so_do_we(ending, tmp_path):
    """wespeaker and ESPnet read archives with kaldiio."""
    kaldiio = pytest.importorskip("kaldiio")
    path = write_embeddings(tmp_path / f"e{ending}", Embeddings(WINDOWS, ROWS, "f" * 32, TIMES))
    assert {file.name for file in tmp_path.iterdir()} == {"e.ark", "e.scp", "e.segments"}
    for theirs in (dict(kaldiio.load_ark(str(tmp_path / "e.ark"))), dict(kaldiio.load_scp(str(tmp_path / "e.scp")))):
        assert list(theirs) == WINDOWS
        np.testing.assert_array_equal(np.stack(list(theirs.values())), ROWS)
    assert (tmp_path / "e.segments").read_text(encoding="utf-8").splitlines()[1] == "a/1.wav:1.5-4.5 a/1.wav 1.5 4.5"
    (tmp_path / "moved").mkdir()
    for name in ("e.ark", "e.scp"):
        (tmp_path / name).rename(tmp_path / "moved" / name)
    read = read_embeddings(tmp_path / "moved" / path.name)
    assert read.names == WINDOWS and read.model == ""
    np.testing.assert_array_equal(read.embeddings, ROWS)
    write_embeddings(path, Embeddings(["x", "y", "z"], ROWS))
    assert not (tmp_path / "e.segments").exists()
    with pytest.raises(ValueError, match="'zwei Wörter.wav' has white space"):
        write_embeddings(path, Embeddings(NAMES, ROWS))
    assert read_embeddings(path).names == ["x", "y", "z"]


@pytest.mark.parametrize("name, companion", [("e.npy", "e.names.txt"), ("e.ark", "e.scp"), ("e.SCP", "e.ark")])
def test_links_stay_links_and_endings_are_kept(name, companion, tmp_path):
    store = tmp_path / "store"
    store.mkdir()
    for one in (name, companion):
        (store / one).touch()
        (tmp_path / one).symlink_to(store / one)
    path = write_embeddings(tmp_path / name, Embeddings(["a", "b", "c"], ROWS))
    assert (tmp_path / name).is_symlink() and (tmp_path / companion).is_symlink()
    np.testing.assert_array_equal(read_embeddings(path).embeddings, ROWS)


def test_archives_of_kaldi_itself_are_read(tmp_path):
    kaldiio = pytest.importorskip("kaldiio")
    rows = {"a": ROWS[0].astype(np.float64), "b": ROWS[1].astype(np.float64)}
    kaldiio.save_ark(str(tmp_path / "e.ark"), rows, scp=str(tmp_path / "e.scp"))
    for name in ("e.ark", "e.scp"):
        read = read_embeddings(tmp_path / name)
        assert read.names == ["a", "b"] and read.embeddings.dtype == np.float32
        np.testing.assert_array_equal(read.embeddings, ROWS[:2])
    for content, message in (
        ({"a": ROWS}, "'a' is not a binary vector"),
        ({"a": ROWS[0], "b": ROWS[0, :2]}, "vectors of different lengths: 2 and 4"),
    ):
        kaldiio.save_ark(str(tmp_path / "e.ark"), content)
        with pytest.raises(ValueError, match=f"e.ark: not a file of embeddings.*{message}"):
            read_embeddings(tmp_path / "e.ark")
    (tmp_path / "e.scp").write_text("a cat secret |\n")
    with pytest.raises(ValueError, match="e.scp: .*line 1: expected `name file.ark:offset`"):
        read_embeddings(tmp_path / "e.scp")


def test_a_torn_archive_is_refused_wherever_it_was_torn(tmp_path):
    """Torn between vectors, it is a valid, shorter archive in Kaldi's format; the scp then names the missing one."""
    whole = write_embeddings(tmp_path / "e.ark", Embeddings(["x", "yy", "zzz"], ROWS)).read_bytes()
    between = {0, 28, 57, len(whole)}
    for size in range(1, len(whole)):
        (tmp_path / "e.ark").write_bytes(whole[:size])
        for name in ("e.scp",) if size in between else ("e.ark", "e.scp"):
            with pytest.raises(ValueError, match=f"{name}: not a file of embeddings, or damaged"):
                read_embeddings(tmp_path / name)
    (tmp_path / "e.ark").write_bytes(whole[:28] + whole[30:])  # the second without its name
    with pytest.raises(ValueError, match="e.ark: .*a vector without a name"):
        read_embeddings(tmp_path / "e.ark")


def test_a_gallery_is_written_only_where_the_model_is_kept(tmp_path):
    assert check_output_name(tmp_path / "g.parquet", gallery=True) == tmp_path / "g.parquet"
    with pytest.raises(ValueError, match=r"g.ark: a gallery that is written to ends in .npz or .parquet"):
        check_output_name(tmp_path / "g.ark", gallery=True)


def test_parquet_has_a_column_of_names_and_one_of_lists(tmp_path):
    from pyarrow import parquet

    table = parquet.read_table(write_embeddings(tmp_path / "e.parquet", Embeddings(NAMES, ROWS, "m")))
    assert table.column_names == ["name", "embedding"] and table["embedding"][1].as_py() == [5.0, 6.0, 7.0, 8.0]


def test_an_npz_of_another_program_is_read(tmp_path):
    np.savez(tmp_path / "e.npz", names=np.array(NAMES[:2], "U"), embeddings=ROWS[:2].astype(np.float64))
    read = read_embeddings(tmp_path / "e.npz")
    assert read.model == "" and read.embeddings.dtype == np.float32 and read.names == NAMES[:2]
    np.savez(tmp_path / "e.npz", names=np.array([b"a", b"b"]), embeddings=ROWS[:2])
    assert read_embeddings(tmp_path / "e.npz").names == ["a", "b"]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"names": np.array(NAMES)}, "expected `names`"),
        ({"names": np.array(NAMES, object), "embeddings": ROWS}, "not a file of embeddings.*pickle"),
        (
            {"names": np.array(NAMES[:2]), "embeddings": ROWS},
            r"floats \[N, D\] for the 2 `names`, not float32 \[3, 4\]",
        ),
        ({"names": np.array(NAMES), "embeddings": ROWS[0]}, r"not float32 \[4\]"),
        ({"names": np.array(["a", "b", "a"]), "embeddings": ROWS}, "'a' occurs twice"),
        ({"names": np.array(NAMES), "embeddings": ROWS * [[1.0], [0], [1]]}, "'zwei Wörter.wav' is zero"),
        (
            {"names": np.array(NAMES), "embeddings": ROWS * np.float32([[1], [np.inf], [1]])},
            "'zwei Wörter.wav' is not fin",
        ),
        ({"names": np.array(NAMES), "embeddings": ROWS * [[1.0], [1e300], [1]]}, "'zwei Wörter.wav' is not finite"),
        ({"names": np.array(NAMES), "embeddings": ROWS * [[1.0], [1e-300], [1]]}, "'zwei Wörter.wav' is zero"),
        ({"names": np.array(NAMES), "embeddings": ROWS * 1j, "checksum": "0"}, "must be floats, not complex"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_another_content_is_named(arrays, message, tmp_path):
    np.savez(tmp_path / "e.npz", **arrays)
    with pytest.raises(ValueError, match=f"e.npz: .*{message}"):
        read_embeddings(tmp_path / "e.npz")


def test_damaged_and_missing_files_are_named(tmp_path):
    for name in ("e.npz", "e.parquet"):
        with pytest.raises(FileNotFoundError, match=f"{name}: no such file"):
            read_embeddings(tmp_path / name)
        whole = write_embeddings(tmp_path / name, Embeddings(NAMES, ROWS)).read_bytes()
        for content in (b"", b"text", whole[: len(whole) // 2]):
            (tmp_path / name).write_bytes(content)
            with pytest.raises(ValueError, match=f"{name}: not a file of embeddings"):
                read_embeddings(tmp_path / name)
    with pytest.raises(ValueError, match="ends in .npz, .parquet, .npy, .ark or .scp"):
        write_embeddings(tmp_path / "e.csv", Embeddings(NAMES, ROWS))


def test_models_that_are_known_and_differ_do_not_mix():
    check_same_model("a", "one", "a", "other")
    check_same_model("", "one", "a", "other")
    with pytest.raises(OtherModelError, match="one and other are from different models"):
        check_same_model("a", "one", "b", "other")


@pytest.mark.parametrize("suffix", [".npz", ".parquet"])
def test_a_flipped_bit_is_noticed_or_changes_nothing(suffix, tmp_path):
    """Each bit of a file belongs to content that a checksum covers, or to padding and hints that nothing reads."""
    path = write_embeddings(tmp_path / f"e{suffix}", Embeddings(NAMES, ROWS, "f" * 32))
    whole = path.read_bytes()
    rng, noticed = np.random.default_rng(0), 0
    for bit in rng.choice(8 * len(whole), 300, replace=False).tolist():
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            read = read_embeddings(path)
        except ValueError as error:
            assert path.name in str(error) and "\n" not in str(error)
            noticed += 1
            continue
        assert read.names == NAMES and read.model == "f" * 32
        np.testing.assert_array_equal(read.embeddings, ROWS)
    assert noticed > 100


def test_ragged_rows_of_parquet_are_refused(tmp_path):
    import pyarrow
    from pyarrow import parquet

    for rows in ([[1.0, 2, 3], [4.0], [5.0, 6]], [[1.0, 2], None, [3.0, 4]]):
        parquet.write_table(pyarrow.table({"name": NAMES, "embedding": rows}), tmp_path / "e.parquet")
        with pytest.raises(ValueError, match="rows of `embedding` have different lengths"):
            read_embeddings(tmp_path / "e.parquet")


def test_a_torn_directory_of_an_npz_is_noticed(tmp_path):
    """Entries that the damage swallows would take the model and the checksum with them."""
    path = write_embeddings(tmp_path / "e.npz", Embeddings(NAMES, ROWS, "f" * 32))
    content = bytearray(path.read_bytes())
    entry = content.index(b"PK\x01\x02", content.index(b"model.npy", content.index(b"PK\x01\x02")) - 46)
    content[entry + 28 : entry + 30] = b"\xff\xff"  # as if the rest were the entry's name
    path.write_bytes(content)
    with pytest.raises(ValueError, match="damaged"):
        read_embeddings(path)
