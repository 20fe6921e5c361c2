"""A file is hashed once: while it is written, or when somebody first asks."""

import hashlib
import os

import numpy as np
import pytest

from dlo_export.checkpoints.files import file_digest
from dlo_export.checkpoints.files.file_digest import HashedFile, file_sha256, known_sha256


def test_file_is_hashed_while_it_is_written(tmp_path, monkeypatch):
    path = tmp_path / "weights"
    with HashedFile(path) as file:
        file.write(np.arange(6, dtype=np.float32).reshape(2, 3).data)
        file.pad_to(64)
        file.write(b"end")
    content = np.arange(6, dtype=np.float32).tobytes() + bytes(40) + b"end"
    assert path.read_bytes() == content
    monkeypatch.setattr(file_digest, "file_sha256", lambda path: pytest.fail("it was read again"))
    assert known_sha256(path) == hashlib.sha256(content).hexdigest()


def test_content_is_hashed_right_when_chunks_are_made_in_turn_in_two_buffers(tmp_path):
    path, memory = tmp_path / "weights", set()
    with HashedFile(path) as file:
        for number in range(6):
            chunk = file.buffer(1 << 20 if number else 1 << 10)
            chunk[:] = number
            memory.add(chunk.ctypes.data)
            file.write(chunk)
    content = bytes(1 << 10) + b"".join(bytes([number]) * (1 << 20) for number in range(1, 6))
    assert path.read_bytes() == content
    assert known_sha256(path) == hashlib.sha256(content).hexdigest()
    assert len(memory) <= 3  # two, and what was too small


def test_file_is_hashed_again_when_it_changed(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(b"before")
    assert known_sha256(path) == file_sha256(path)
    path.write_bytes(b"behind")
    os.utime(path, ns=(1, 1))
    assert known_sha256(path) == hashlib.sha256(b"behind").hexdigest()


def test_hash_is_not_known_when_writing_failed(tmp_path):
    path = tmp_path / "weights"
    with pytest.raises(BufferError), HashedFile(path) as file:  # noqa: PT012 - what was written before counts
        file.write(b"half")
        raise BufferError
    path.write_bytes(b"whole")
    assert known_sha256(path) == hashlib.sha256(b"whole").hexdigest()
