"""GGUF files in parts."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader

from dlo_export.checkpoints.errors import CheckpointError
from dlo_export.checkpoints.opening import open_checkpoint
from tests.tiny_gguf import save_tiny_gguf
from tests.tiny_models import save_tiny_llama


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny_llama(tmp_path / "tiny", layers=1, vocab=300)


@pytest.fixture
def parts(folder: Path, tmp_path: Path) -> list[Path]:
    first = save_tiny_gguf(folder, tmp_path / "model.gguf", tokenizer="gpt-2", tensors_per_part=5)
    parts = sorted(first.parent.glob("model-*.gguf"))
    assert [part.name for part in parts] == [f"model-{number:05}-of-00003.gguf" for number in (1, 2, 3)]
    return parts


@pytest.mark.parametrize("given", [0, 1, 2])
def test_gguf_parts_are_read_as_one_when_any_of_them_is_given(
    folder: Path, parts: list[Path], tmp_path: Path, given: int
) -> None:
    whole = open_checkpoint(save_tiny_gguf(folder, tmp_path / "whole.gguf", tokenizer="gpt-2"))
    with open_checkpoint(parts[given]) as checkpoint:
        assert checkpoint.config == whole.config
        for name, tensor in whole.tensors.items():
            np.testing.assert_array_equal(checkpoint.tensors[name].numpy(), tensor.numpy(), err_msg=name)
        assert checkpoint.sha256() == open_checkpoint(parts[0]).sha256()
        checkpoint.save_companions(tmp_path)
    assert (tmp_path / "tokenizer.json").exists()


@pytest.mark.parametrize(("given", "missing"), [(0, 1), (1, 0), (0, 2)])
def test_gguf_part_is_named_when_it_is_missing(parts: list[Path], given: int, missing: int) -> None:
    parts[missing].unlink()
    with pytest.raises(
        CheckpointError, match=rf"{parts[given].name}: is one of 3 parts.*\n  {parts[missing].name}: mis"
    ):
        open_checkpoint(parts[given])


def test_gguf_part_is_refused_when_it_was_renamed(parts: list[Path]) -> None:
    renamed = parts[0].rename(parts[0].with_name("renamed.gguf"))
    with pytest.raises(
        CheckpointError, match=r"renamed\.gguf: is one of 3 parts .*not named NAME-00001-of-00003\.gguf"
    ):
        open_checkpoint(renamed)


def test_gguf_parts_are_refused_when_one_is_there_twice(parts: list[Path]) -> None:
    shutil.copyfile(parts[1], parts[2])
    with pytest.raises(
        CheckpointError, match=r"model-00003-of-00003\.gguf: split\.no is 1, expected 2(.*\n)+.*duplicated"
    ):
        open_checkpoint(parts[0])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("split.count", 4, r"split\.count is 4, expected 3"),
        ("split.no", 2, r"split\.no is 2, expected 1"),
    ],
)
def test_gguf_parts_are_refused_when_they_are_of_other_files(
    parts: list[Path], key: str, value: int, message: str
) -> None:
    reader = GGUFReader(parts[1], "r+")
    field = reader.fields[key]
    field.parts[field.data[0]][0] = value
    reader.data.flush()
    with pytest.raises(CheckpointError, match=rf"do not belong together\n  model-00002-of-00003\.gguf: {message}"):
        open_checkpoint(parts[0])


def test_gguf_parts_are_refused_when_their_tensors_are_not_as_many_as_said(parts: list[Path]) -> None:
    reader = GGUFReader(parts[0], "r+")
    field = reader.fields["split.tensors.count"]
    field.parts[field.data[0]][0] = 99
    reader.data.flush()
    with pytest.raises(CheckpointError, match=r"split\.tensors\.count is 99, but the parts hold 12 tensors"):
        open_checkpoint(parts[0])
