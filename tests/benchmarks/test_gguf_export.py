"""The synthetic GGUF file whose export is measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import gguf_export
from dlo_export.checkpoints.opening import open_checkpoint


def test_synthetic_file_is_a_llama_that_opens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_export, "SIZES", {"hidden": 64, "query": 64, "key-value": 32, "intermediate": 96})
    monkeypatch.setattr(gguf_export, "VOCABULARY", 128)
    monkeypatch.setattr(gguf_export, "HEADS", 2)
    monkeypatch.setattr(gguf_export, "KV_HEADS", 1)
    gguf_export.save_synthetic_gguf(tmp_path / "model.gguf", layers=2)
    with open_checkpoint(str(tmp_path / "model.gguf")) as checkpoint:
        assert checkpoint.config.num_layers == 2
        assert {name: tensor.shape for name, tensor in checkpoint.tensors.items()} == checkpoint.config.tensor_shapes()
