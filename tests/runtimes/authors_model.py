"""The routed checkpoint of the DLO authors' code, as config and tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

from dlo_export.checkpoints.lazy_tensors import ArrayTensor
from tests.runtimes.graphs import DATA

AUTHORS = DATA / "reference_mlp_routed"
ROUTED = (0, 1, 3)
WHOLE_LAYERS = DATA / "reference_layer_routed"
"""The same where tokens skip whole layers."""


def tensors_of(folder: Path) -> dict[str, ArrayTensor]:
    """Weights of a checkpoint folder."""
    return {name: ArrayTensor(array) for name, array in load_file(folder / "model.safetensors").items()}


def config_of(folder: Path) -> dict[str, Any]:
    """Its config.json."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config
