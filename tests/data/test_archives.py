"""Archives: nothing in them is lost silently, and nothing that they claim costs memory, disk or time."""

import bz2
import gzip
import io
import lzma
import os
import random
import tarfile
import time
import tracemalloc
import zipfile

import pytest

from memo_jax.data import archives
from memo_jax.data import prepare as prepare_module
from memo_jax.data.archives import Extent, TarStream, is_compressed_tar, members, open_member
from memo_jax.data.prepare import prepare
from memo_jax.data.recordings import find_recordings
from recording_files import WRITERS, audio_bytes, noise, write_tar, write_zip

COMPRESSED = {".tar": bytes, ".tar.gz": gzip.compress, ".tar.bz2": bz2.compress, ".tar.xz": lzma.compress}
CONTENT = {f"s{index}/{index}.wav": bytes([index]) * 700 for index in range(8)}


def names(path):
    return [member.name for member in members(path)]


def header(size, kind=tarfile.REGTYPE, name="bomb.wav"):
    """The header of a member that claims a size, which need not be what follows."""
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize("suffix", WRITERS)
def test_members_and_their_content(tmp_path, suffix):
    path = WRITERS[suffix](tmp_path / f"in{suffix}", CONTENT)
    found = list(members(path))
    assert [(member.name, member.problem) for member in found] == [(name, "") for name in CONTENT]
    if not is_compressed_tar(path):
        for member in found:
            with open_member(path, member.extent) as file:
                assert file.read() == CONTENT[member.name]
        return
    before = os.listdir("/proc/self/fd")
    stream, file = TarStream(path), io.BytesIO()
    for member in (found[2], found[5]):
        stream.copy(member.extent, file)
    stream.close()
    assert os.listdir("/proc/self/fd") == before, "its file is closed"
    assert file.getvalue() == CONTENT["s2/2.wav"] + CONTENT["s5/5.wav"]


def test_every_flipped_bit_in_a_header_of_a_tar_is_noticed(tmp_path):
    """A tar that ended at a damaged header would silently lose all that follows."""
    whole = write_tar(tmp_path / "whole.tar", CONTENT).read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as tar:
        headers = [info.offset for info in tar.getmembers()]
    rng, refused = random.Random(0), 0
    for _ in range(200):
        damaged = bytearray(whole)
        damaged[rng.choice(headers) + rng.randrange(512)] ^= 1 << rng.randrange(8)
        (tmp_path / "damaged.tar").write_bytes(damaged)
        try:
            assert names(tmp_path / "damaged.tar") == list(CONTENT)  # harmless, as in the filling of the checksum
        except ValueError as error:
            assert "damaged.tar: not an archive, damaged or cut short" in str(error)
            refused += 1
    assert refused > 190


@pytest.mark.parametrize("suffix", [".tar.gz", ".tar.bz2", ".tar.xz", ".zip"])
def test_every_flipped_bit_in_a_compressed_archive_is_noticed(tmp_path, suffix):
    """Either the archive is refused, or all members and their content are intact, or the damaged ones are named."""
    whole, rng = WRITERS[suffix](tmp_path / f"in{suffix}", CONTENT).read_bytes(), random.Random(0)
    path = tmp_path / f"damaged{suffix}"
    for _ in range(150):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            found = list(members(path))
            if suffix == ".zip":
                for member in found:
                    if member.extent:
                        with open_member(path, member.extent) as file:
                            assert file.read() == CONTENT[member.name]
        except ValueError:
            continue
        assert len(found) == len(CONTENT)
        if suffix != ".zip":
            assert [member.name for member in found if not member.problem] == list(CONTENT)


@pytest.mark.parametrize("suffix", COMPRESSED)
def test_joined_and_cut_tars_are_refused(tmp_path, suffix):
    compress = COMPRESSED[suffix]
    tar = write_tar(tmp_path / "one", CONTENT).read_bytes()
    end = len(tar.rstrip(b"\0")) // 512 * 512 + 512
    path = tmp_path / f"in{suffix}"
    for content, message in (
        (compress(tar) + compress(tar), "its end mark is at byte 12,288, but more follows"),
        (compress(tar[:end]), "ends without an end mark"),
        (compress(tar[: end // 2]), "cut short"),
        (compress(tar + bytes(2 << 20)), "but more follows"),
        (compress(b""), "it is empty"),
        (compress(tar) + b"PK and other bytes", "cut short"),
        (compress(tar) + gzip.compress(tar), "cut short"),
        (compress(tar) + bz2.compress(tar), "cut short"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"in{suffix}: not an archive.*{message}.*get the file again"):
            names(path)
    path.write_bytes(compress(tar[:end] + bytes(1024) + bytes(64 << 9)))  # filling of another record size
    assert names(path) == list(CONTENT)
    path.write_bytes(compress(bytes(1024)))  # an archive of nothing
    assert names(path) == []


def test_joined_zips_are_refused_but_not_those_that_extract_themselves(tmp_path):
    one = write_zip(tmp_path / "one.zip", CONTENT).read_bytes()
    (tmp_path / "two.zip").write_bytes(one + one)
    with pytest.raises(ValueError, match="two.zip: .*another archive begins at byte 0"):
        names(tmp_path / "two.zip")
    tar = gzip.compress(write_tar(tmp_path / "in.tar", CONTENT).read_bytes())
    (tmp_path / "more.zip").write_bytes(one + tar)
    with pytest.raises(ValueError, match="more.zip: .*more follows its end"):
        names(tmp_path / "more.zip")
    (tmp_path / "self.zip").write_bytes(b"#!/bin/sh\n" + one)
    assert names(tmp_path / "self.zip") == list(CONTENT)


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
@pytest.mark.parametrize(
    "content",
    [
        header(1 << 62) + bytes(4096),
        header(5 << 30) + bytes(4096),
        header(-512) + bytes(4096),
        header(1 << 30, tarfile.GNUTYPE_LONGNAME, "././@LongLink") + bytes(8 << 20),
        header(1 << 30, tarfile.XHDTYPE) + bytes(8 << 20),
        header(0, tarfile.XGLTYPE) * 3000 + bytes(1024),
        header(0, tarfile.GNUTYPE_SPARSE)[:482] + b"\1" + header(0)[483:] + bytes(8 << 20),
    ],
    ids=["2^62", "5 GB", "negative", "long name", "pax", "recursion", "sparse"],
)
def test_sizes_that_a_tar_only_claims_cost_nothing(tmp_path, suffix, content):
    path = tmp_path / f"in{suffix}"
    path.write_bytes(COMPRESSED[suffix](content))
    del content
    tracemalloc.start()
    began = time.process_time()
    with pytest.raises(ValueError, match=f"in{suffix}: not an archive, damaged or cut short"):
        names(path)
    assert time.process_time() - began < 5 and tracemalloc.get_traced_memory()[1] < 6e6
    tracemalloc.stop()


def test_a_large_member_is_left_out_before_it_is_copied(tmp_path, monkeypatch):
    """A member of zeros, a thousandth of its size in the archive, must not fill the disk beside the output."""
    monkeypatch.setattr(archives, "LARGEST_MEMBER", 1 << 20)
    path = write_tar(
        tmp_path / "in.tar.gz", {"a/zeros.wav": bytes(2 << 20), "a/good.wav": audio_bytes(noise())}, gzip.open
    )
    copied, copy = [], TarStream.copy
    monkeypatch.setattr(
        TarStream, "copy", lambda self, extent, file: (copied.append(extent.size), copy(self, extent, file))
    )
    report = prepare(path, tmp_path / "set", workers=1)
    assert report["utterances"] == 1 and copied == [len(audio_bytes(noise()))]
    assert report["left_out"] == [(f"{path}/a/zeros.wav", "too large to be read from an archive: 0.0 GB, unpack it")]


def test_what_is_copied_of_a_compressed_tar_at_a_time_is_bounded(tmp_path, monkeypatch):
    """Eight recordings of 19 kB, two of which may be copied beside the output at a time."""
    monkeypatch.setattr(prepare_module, "BYTES_PER_SPOOL", 45_000)
    content = {f"a/{index}.wav": audio_bytes(noise(seed=index)) for index in range(8)}
    path, sizes = write_tar(tmp_path / "in.tar.gz", content, gzip.open), []
    write = prepare_module._write_part
    monkeypatch.setattr(
        prepare_module,
        "_write_part",
        lambda number, recordings, spool, **options: (
            sizes.append(os.path.getsize(spool[0])),
            write(number, recordings, spool, **options),
        ),
    )
    assert prepare(path, tmp_path / "set", workers=1)["utterances"] == 8
    assert sizes == [2 * len(content["a/0.wav"])] * 4


def test_a_large_member_is_decompressed_to_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "IN_MEMORY", 1 << 20)
    path = write_zip(tmp_path / "in.zip", {"zeros.wav": bytes(50_000_000)})
    (member,) = members(path)
    tracemalloc.start()
    with open_member(path, member.extent) as file:
        assert tracemalloc.get_traced_memory()[1] < 8e6
        assert file.seek(0, os.SEEK_END) == 50_000_000
    tracemalloc.stop()


def test_a_full_temporary_folder_is_not_a_damaged_recording(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "IN_MEMORY", 100)
    path = write_zip(tmp_path / "in.zip", CONTENT)

    def full(**options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(archives.tempfile, "TemporaryFile", full)
    with pytest.raises(OSError, match="No space left on device"):
        open_member(path, next(members(path)).extent)


def test_a_zip_that_lies_about_a_size_takes_no_memory(tmp_path):
    """A hundred megabytes of zeros declared as 1,000 bytes."""
    path = write_zip(tmp_path / "in.zip", {"bomb.wav": bytes(100_000_000)})
    (member,) = members(path)
    tracemalloc.start()
    with pytest.raises(ValueError, match="wrong checksum"):
        open_member(path, member.extent._replace(size=1000))
    with pytest.raises(ValueError, match="too large to be read from an archive"):
        open_member(path, member.extent._replace(size=3 << 30))
    assert tracemalloc.get_traced_memory()[1] < 8e6
    tracemalloc.stop()


def test_a_name_that_differs_between_directory_and_header_of_a_zip_is_damage(tmp_path):
    path = write_zip(tmp_path / "in.zip", {"a/1.wav": b"content"}, zipfile.ZIP_STORED)
    data = bytearray(path.read_bytes())
    data[data.rindex(b"a/1.wav")] ^= 2  # in the directory
    path.write_bytes(data)
    (member,) = members(path)
    assert member.name == "c/1.wav"
    with pytest.raises(ValueError, match="a different name in its header"):
        open_member(path, member.extent)


def test_a_name_cannot_ask_for_its_content(tmp_path):
    """Content is read only for the requested suffix, whatever a name ends in."""
    info = tarfile.TarInfo("odd")
    info.pax_headers, info.size = {"path": "odd\0"}, 7
    with tarfile.open(tmp_path / "in.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(info, io.BytesIO(b"content"))
    assert [member.content for member in members(tmp_path / "in.tar")] == [None]
    assert find_recordings([tmp_path / "in.tar"])[0] == []


def test_what_changed_between_listing_and_reading_is_noticed(tmp_path):
    path = write_tar(tmp_path / "in.tar.gz", CONTENT, gzip.open)
    stream = TarStream(path)
    with pytest.raises(ValueError, match="in.tar.gz: .*it has changed"):
        stream.copy(Extent(0, 701, 701, number=3), io.BytesIO())
    with pytest.raises(ValueError, match="in.tar.gz: .*fewer files than before"):
        stream.copy(Extent(0, 700, 700, number=30), io.BytesIO())
    stream.close()


def test_files_of_a_zip_that_overlap_are_refused(tmp_path):
    """A thousand entries for one file of zeros would take a thousand times the time and disk."""
    path = write_zip(tmp_path / "in.zip", {f"{number}.wav": bytes(100_000) for number in range(3)})
    data = bytearray(path.read_bytes())
    offsets = [place for place in range(len(data)) if data[place : place + 4] == b"PK\1\2"]
    data[offsets[1] + 42 : offsets[1] + 46] = data[offsets[0] + 42 : offsets[0] + 46]
    path.write_bytes(data)
    with pytest.raises(ValueError, match="in.zip: .*files in it overlap"):
        names(path)


def test_a_zip_with_very_many_entries_and_comments(tmp_path):
    """More than 65,535, which need Zip64, and a comment at its end."""
    with zipfile.ZipFile(tmp_path / "in.zip", "w") as archive:
        archive.comment = b"PK made by hand"
        for number in range(65_537):
            archive.writestr(zipfile.ZipInfo(f"{number}.wav"), b"")
    assert sum(1 for _ in members(tmp_path / "in.zip")) == 65_537


@pytest.mark.parametrize("suffix", [".tar.bz2", ".tar.xz"])
def test_parallel_compressors_write_many_streams(tmp_path, suffix):
    """As pbzip2 and pixz do: a stream for each block, and xz pads them with zeros."""
    tar = write_tar(tmp_path / "in.tar", CONTENT).read_bytes()
    pieces = [COMPRESSED[suffix](tar[place : place + 3000]) for place in range(0, len(tar), 3000)]
    path = tmp_path / f"in{suffix}"
    path.write_bytes(b"".join(pieces) + bytes(8 if suffix == ".tar.xz" else 0))
    assert names(path) == list(CONTENT)
    stream, file = TarStream(path), io.BytesIO()
    stream.copy(Extent(0, 700, 700, number=7), file)
    stream.close()
    assert file.getvalue() == CONTENT["s7/7.wav"]
    path.write_bytes(b"".join(pieces[:2]) + pieces[2][:-9])
    with pytest.raises(ValueError, match="it ends early"):
        names(path)
