"""Our safetensors reader and writer, held against the safetensors package."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dlo_export.checkpoints import lazy_tensors
from dlo_export.checkpoints.errors import CheckpointError, InputError
from dlo_export.checkpoints.files.mapped_file import MappedFile
from dlo_export.checkpoints.formats.safetensors_reader import MAX_HEADER_BYTES, tensors_of_safetensors
from dlo_export.checkpoints.formats.safetensors_writer import save_safetensors
from dlo_export.checkpoints.lazy_tensors import ArrayTensor

ARRAYS = {
    "matrix": np.arange(60, dtype=np.float32).reshape(12, 5),
    "half": np.arange(7, dtype=np.float16),
    "brain": np.arange(6, dtype=np.float32).reshape(2, 3).astype(ml_dtypes.bfloat16),
    "double": np.arange(4, dtype=np.float64),
    "scalar": np.array(3.0, np.float32),
    "empty": np.empty((0, 4), np.float32),
    "turned": np.arange(6, dtype=np.float32).reshape(2, 3).T,
}


@pytest.mark.parametrize("chunk_bytes", [1, 50, lazy_tensors.CHUNK_BYTES])
def test_file_is_read_by_the_package_when_written_in_chunks_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int
) -> None:
    monkeypatch.setattr(lazy_tensors, "CHUNK_BYTES", chunk_bytes)
    steps: list[tuple[int, int]] = []
    save_safetensors(
        {name: ArrayTensor(array) for name, array in ARRAYS.items()},
        tmp_path / "file",
        progress=lambda done, total: steps.append((done, total)),
    )
    loaded = load_file(tmp_path / "file")
    assert loaded.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert loaded[name].dtype == array.dtype
        np.testing.assert_array_equal(loaded[name], array, err_msg=name)
    total = sum(array.nbytes for array in ARRAYS.values())
    assert steps == sorted(steps)
    assert steps[-1] == (total, total)


def test_tensors_are_views_of_the_file_when_the_package_wrote_it(tmp_path: Path) -> None:
    arrays = {name: np.ascontiguousarray(array) for name, array in ARRAYS.items()}
    save_file(arrays, tmp_path / "file")
    tensors = tensors_of_safetensors(MappedFile(tmp_path / "file"))
    assert set(tensors) == set(arrays)
    for name, tensor in tensors.items():
        read = tensor.numpy()
        assert (tensor.shape, tensor.dtype, tensor.nbytes) == (read.shape, read.dtype, read.nbytes)
        assert not read.flags.writeable
        np.testing.assert_array_equal(read, arrays[name], err_msg=name)
        tensor.release()
        if tensor.shape:
            np.testing.assert_array_equal(tensor.rows(1, 3), arrays[name][1:3], err_msg=name)


def test_nothing_is_written_when_a_dtype_is_not_of_weights(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"codes has dtype int32, expected one of float32, .*\n\nhint: cast"):
        save_safetensors({"codes": ArrayTensor(np.zeros(3, np.int32))}, tmp_path / "file")
    assert not list(tmp_path.iterdir())


def test_duplicates_are_named_when_the_header_is_long(tmp_path: Path) -> None:
    # As many entries as a large model's: what compares each with each takes a minute here.
    entry = json.dumps({"dtype": "F32", "shape": [0], "data_offsets": [0, 0]})
    names = [*(f"tensor.{index}" for index in range(10_000)), "tensor.77"]
    header = ("{" + ",".join(f'"{name}":{entry}' for name in names) + "}").encode()
    (tmp_path / "file").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(CheckpointError, match=r"file: .*duplicated: tensor\.77\)"):
        tensors_of_safetensors(MappedFile(tmp_path / "file"))


def test_header_is_refused_unread_when_it_is_longer_than_any(tmp_path: Path) -> None:
    length = MAX_HEADER_BYTES + 1
    with (tmp_path / "file").open("wb") as stream:  # takes no room on the disk
        stream.write(length.to_bytes(8, "little"))
        stream.truncate(8 + length)
    with pytest.raises(CheckpointError, match=f"its header would be {length} bytes long"):
        tensors_of_safetensors(MappedFile(tmp_path / "file"))


def test_every_entry_is_read_when_the_header_is_long(tmp_path: Path) -> None:
    # What compares each entry with each takes minutes here.
    entry = json.dumps({"dtype": "F32", "shape": [0], "data_offsets": [0, 0]})
    header = ("{" + ",".join(f'"tensor.{index}":{entry}' for index in range(100_000)) + "}").encode()
    (tmp_path / "file").write_bytes(len(header).to_bytes(8, "little") + header)
    assert len(tensors_of_safetensors(MappedFile(tmp_path / "file"))) == 100_000
