"""Large files are written past the page cache, and hold what was written whatever the pieces and where they lay."""

import fcntl
import hashlib
import resource
from pathlib import Path

import numpy as np
import pytest

from dlo_export.checkpoints.files import direct_file
from dlo_export.checkpoints.files.direct_file import BLOCK, DirectFile, aligned, open_forwards
from dlo_export.checkpoints.files.file_digest import HashedFile, known_sha256

CONTENT = np.random.default_rng(0).integers(0, 256, 40 * BLOCK + 777, np.uint8)
SIZES = {
    "whole blocks": [8 * BLOCK] * 5,
    "less than a block": [1, 100, 64, 4000],
    "ragged": [3 * BLOCK + 5, 1, BLOCK - 6, 7 * BLOCK, 64, 2 * BLOCK - 64, 9],
    "larger than the scratch memory": [100, 20 * BLOCK + 3],
    "nothing": [0],
}


@pytest.fixture(autouse=True)
def small_scratch(monkeypatch):
    monkeypatch.setattr(direct_file, "_SCRATCH_BYTES", 4 * BLOCK)


@pytest.mark.parametrize("shift", [None, 0, 17], ids=["as in the file", "at a block's begin", "anywhere"])
@pytest.mark.parametrize("sizes", SIZES)
def test_content_is_what_was_written_when_pieces_are(tmp_path, sizes, shift):
    path, position = tmp_path / "file", 0
    with DirectFile(path) as file:
        for size in SIZES[sizes]:
            memory = aligned(np.empty(size + BLOCK, np.uint8), size, position if shift is None else shift)
            memory[:] = CONTENT[position : position + size]
            assert file.write(memory) == size
            memory[:] = 0
            position += size
    assert path.read_bytes() == CONTENT[:position].tobytes()


def test_last_bytes_are_not_written_when_writing_failed(tmp_path):
    with pytest.raises(BufferError), DirectFile(tmp_path / "file") as file:  # noqa: PT012 - what was written before counts
        file.write(CONTENT[: BLOCK + 5])
        raise BufferError
    assert (tmp_path / "file").stat().st_size == BLOCK


def test_writes_go_through_the_cache_where_there_are_no_direct_ones():
    """A device of characters has none."""
    with DirectFile(Path("/dev/null")) as file:
        assert not fcntl.fcntl(file.fileno(), fcntl.F_GETFL) & direct_file._DIRECT
        assert file.write(CONTENT) == CONTENT.size


def test_error_is_the_systems_when_a_file_may_not_be_so_long(tmp_path):
    """The limit ends within a block: direct writes alone would call that invalid, which says nothing."""
    allowed = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10 * BLOCK + 3, allowed[1]))
    try:
        with pytest.raises(OSError, match="File too large"), DirectFile(tmp_path / "file") as file:
            file.write(CONTENT)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, allowed)


@pytest.mark.skipif(not direct_file._DIRECT, reason="this system has no direct writes")
def test_files_are_written_past_the_cache_when_all_together_are_large(tmp_path, monkeypatch):
    monkeypatch.setattr(direct_file, "DIRECT_BYTES", 1000)
    with open_forwards(tmp_path / "small", 999) as small, open_forwards(tmp_path / "large", 1000) as large:
        flags = [fcntl.fcntl(file.fileno(), fcntl.F_GETFL) & direct_file._DIRECT for file in (small, large)]
    assert flags == [0, direct_file._DIRECT]


def test_hash_is_that_of_the_file_when_it_is_written_past_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(direct_file, "DIRECT_BYTES", 1000)
    path, position = tmp_path / "weights", 0
    with HashedFile(path, total=1000) as file:
        for size in SIZES["ragged"]:
            chunk = file.buffer(size)
            assert (chunk.ctypes.data - position) % BLOCK == 0
            chunk[:] = CONTENT[position : position + size]
            file.write(chunk)
            file.pad_to(-(-(position + size) // 64) * 64)
            position = -(-(position + size) // 64) * 64
    written = path.read_bytes()
    assert len(written) == position
    assert written[: SIZES["ragged"][0]] == CONTENT[: SIZES["ragged"][0]].tobytes()
    assert known_sha256(path) == hashlib.sha256(written).hexdigest()


def test_failure_of_a_write_is_raised_when_it_happens_beside_the_next_chunk():
    with pytest.raises(OSError, match="No space left"), HashedFile(Path("/dev/full")) as file:
        file.write(CONTENT)
