"""Changes the files of a tiny checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

WEIGHTS = "model.safetensors"


def rewrite_tensors(folder: Path, changes: dict[str, torch.Tensor | None]) -> None:
    """Adds, replaces and (None) removes tensors of a single-file checkpoint."""
    tensors = load_file(folder / WEIGHTS) | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / WEIGHTS)


def rewrite_json(path: Path, **changes: Any) -> None:
    """Adds and replaces values of a JSON object."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
