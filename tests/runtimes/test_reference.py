from __future__ import annotations

import pytest
import torch

from dlo_export.runtimes.torch.reference import float32_bytes, open_reference, streamed_llama_dlo
from tests.runtimes.authors_model import AUTHORS, ROUTED, config_of, tensors_of


def test_streamed_model_holds_no_weights_when_it_does_not_run() -> None:
    model = streamed_llama_dlo(config_of(AUTHORS), tensors_of(AUTHORS))
    model(torch.zeros((1, 3), dtype=torch.int64))
    held = {name for name, parameter in model.named_parameters() if not parameter.is_meta}
    assert held == {"model.norm.weight", *(f"model.routers.{layer}.weight" for layer in ROUTED)}


def test_reference_streams_when_it_does_not_fit_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    config, tensors = config_of(AUTHORS), tensors_of(AUTHORS)
    assert open_reference(config, tensors).name == "PyTorch"
    monkeypatch.setattr("dlo_export.runtimes.torch.reference.available_memory", lambda: float32_bytes(tensors))
    assert open_reference(config, tensors).name == "PyTorch, layer by layer"
