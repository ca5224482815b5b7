"""Files are whole or not there, on the disk when written, and refused when a bit of them has changed."""

import io
import os
import threading
import zipfile
from pathlib import Path

import pytest
import torch

from dnw._files import read_tensors, read_text, write_whole

CONTENT = {
    "format": 1,
    "model": {"weight": torch.arange(12.0).view(3, 4), "count": torch.tensor(7)},
    "optimizer": {"state": {0: {"latent": torch.linspace(-1, 1, 6)}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
    "epoch": 3,
}


def stored(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def same(a: object, b: object) -> bool:
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    return type(a) is type(b) and a == b


def refused_or_same(file: Path, expected: object) -> bool:
    """Whether a file is refused; where it is not, it must hold what is expected, bit for bit."""
    try:
        found = read_tensors(file)
    except ValueError as error:
        return str(error).startswith(f"{file}: not a readable PyTorch file") or pytest.fail(str(error))
    assert same(found, expected)
    return False


def test_a_flipped_bit_is_refused_or_changes_nothing(tmp_path):
    """Every bit in turn of every seventh byte, so that headers, directory, names, pickle and numbers are all met."""
    whole, file = bytearray(stored(CONTENT)), tmp_path / "file.pt"
    refused = 0
    for at in range(0, len(whole), 7):
        bit = 1 << at % 8
        whole[at] ^= bit
        file.write_bytes(whole)
        whole[at] ^= bit
        refused += refused_or_same(file, CONTENT)
    assert refused > len(whole) / 7 / 3


def test_every_bit_of_an_archive_s_directory(tmp_path):
    """No checksum covers it: an entry that says it is a folder gives PyTorch a tensor of whatever the memory held."""
    whole, file = bytearray(stored({"weight": torch.arange(12.0)})), tmp_path / "file.pt"
    start = whole.rindex(b"PK\x01\x02", 0, whole.rindex(b"data/0"))
    for at in range(start, start + 60):
        for bit in range(8):
            whole[at] ^= 1 << bit
            file.write_bytes(whole)
            whole[at] ^= 1 << bit
            refused_or_same(file, {"weight": torch.arange(12.0)})


def test_a_cut_file_is_refused(tmp_path):
    whole, file = stored(CONTENT), tmp_path / "file.pt"
    for length in range(0, len(whole), 53):
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="not a readable PyTorch file"):
            read_tensors(file)


@pytest.mark.parametrize(("change", "message"), [("twice", "is there twice"), ("compressed", "is compressed")])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_archives_that_can_be_read_in_two_ways_are_refused(tmp_path, change, message):
    file = tmp_path / "file.pt"
    with zipfile.ZipFile(io.BytesIO(stored(CONTENT))) as old, zipfile.ZipFile(file, "w") as new:
        for record in old.infolist():
            kind = zipfile.ZIP_DEFLATED if change == "compressed" and record.filename.endswith("data.pkl") else None
            new.writestr(record.filename, old.read(record), compress_type=kind)
            if change == "twice" and record.filename.endswith("data/0"):
                new.writestr(record.filename, bytes(record.file_size))
    with pytest.raises(ValueError, match=message):
        read_tensors(file)


def test_the_old_format_of_pytorch_is_read(tmp_path):
    torch.save(CONTENT, tmp_path / "file.pt", _use_new_zipfile_serialization=False)
    assert same(read_tensors(tmp_path / "file.pt"), CONTENT)


def test_two_writers_of_one_file_leave_one_of_their_contents(tmp_path):
    contents = [bytes([i]) * 300_000 for i in range(4)]
    failures = []

    def write(content: bytes) -> None:
        try:
            for _ in range(5):
                write_whole(tmp_path / "file", content)
                assert (tmp_path / "file").read_bytes() in contents
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_writer_that_is_stopped_leaves_the_old_content_and_no_part(tmp_path, monkeypatch):
    write_whole(tmp_path / "file", b"old")

    def interrupted(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_written_file_has_the_rights_of_any_new_file(tmp_path):
    (tmp_path / "plain").touch()
    write_whole(tmp_path / "file", b"")
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_text_is_bounded_and_text(tmp_path):
    file = Path(tmp_path / "file")
    file.write_bytes(b"abc\xff")
    with pytest.raises(ValueError, match=r"file: damaged \(byte 3 is no text\)"):
        read_text(file, 10)
    with pytest.raises(ValueError, match="file: larger than 3 bytes"):
        read_text(file, 3)
