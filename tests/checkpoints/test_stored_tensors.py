import dataclasses

import numpy as np
import pytest

from dlo_export.checkpoints.config import LlamaConfig
from dlo_export.checkpoints.files.mapped_file import MappedFile, MappedTensor
from dlo_export.checkpoints.formats.stored_tensors import StoredName, model_tensors
from dlo_export.checkpoints.llama_layer import EMBEDDING, HEAD
from tests.tiny_models import save_tiny_llama

NORM = "model.norm.weight"


@pytest.fixture
def config(tmp_path):
    return LlamaConfig.from_json(save_tiny_llama(tmp_path / "model", layers=1) / "config.json")


@pytest.fixture
def tensors(tmp_path):
    """Two equal tensors and another one, of one file."""
    (tmp_path / "weights").write_bytes(np.array([1, 2, 1, 2, 3, 4], np.float32).tobytes())
    file = MappedFile(tmp_path / "weights")
    return [MappedTensor((2,), np.dtype(np.float32), file, offset) for offset in (0, 8, 16)]


@pytest.mark.parametrize("stored", ["norm.weight", "model.norm.weight", "model.model.norm.weight"])
def test_tensor_has_the_models_name_when_prefixes_are_missing_or_doubled(config, tensors, stored):
    assert model_tensors([StoredName(stored, tensors[0])], config) == ({NORM: tensors[0]}, [])


def test_tensor_keeps_its_name_when_the_model_has_none_for_it(config, tensors):
    found, problems = model_tensors([StoredName("model.model.model.norm.weight", tensors[0])], config)
    assert list(found) == ["model.model.model.norm.weight"]
    assert problems == []


def test_first_copy_is_taken_when_all_are_equal(config, tensors):
    stored = [StoredName("norm.weight", tensors[1]), StoredName(NORM, tensors[0])]
    assert model_tensors(stored, config) == ({NORM: tensors[1]}, [])


def test_each_copy_is_told_when_it_differs_from_the_first(config, tensors):
    names = ("norm.weight", NORM, f"model.{NORM}")
    stored = [StoredName(name, tensor) for name, tensor in zip(names, tensors, strict=True)]
    _, problems = model_tensors(stored, config)
    assert problems == [f"norm.weight in weights and model.{NORM} in weights: are not equal"]


@pytest.mark.parametrize(("tied", "name"), [(True, EMBEDDING), (False, HEAD)])
def test_head_is_the_embedding_when_tied_and_alone(config, tensors, tied, name):
    config = dataclasses.replace(config, tie_word_embeddings=tied)
    assert model_tensors([StoredName(HEAD, tensors[0])], config) == ({name: tensors[0]}, [])
