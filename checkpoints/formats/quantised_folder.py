"""Files by which quantisers say beside config.json what they have done to the weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dlo_export.checkpoints.errors import CheckpointError
from dlo_export.checkpoints.files.file_inside import file_inside
from dlo_export.checkpoints.files.json_file import read_json


def check_not_quantised(folder: Path) -> None:
    """Refuses a checkpoint whose weights such a file says to be quantised; config.json may say nothing of it.

    Raises:
        CheckpointError: One says so, with what it says, or is no JSON object of the folder.
    """
    for name, found_in in _SAID_IN.items():
        if not (folder / name).exists():
            continue
        if (found := found_in(read_json(file_inside(folder, name), CheckpointError))) is not None:
            raise CheckpointError(
                f"{folder / name}: {found}, expected unquantised weights",
                hint="export the checkpoint that it was quantised from; docs/checkpoints.md lists what can be exported",
            )


def _by_modelopt(values: Mapping[str, Any]) -> str | None:
    """Of NVIDIA's ModelOpt and TensorRT-LLM, such as "FP8" or "NVFP4". A cache that is quantised leaves the weights."""
    quantization = values.get("quantization")
    algorithm = quantization.get("quant_algo") if isinstance(quantization, dict) else quantization
    if algorithm in (None, "NO_QUANT"):
        return None
    return f"quantization.quant_algo is {algorithm!r}" if isinstance(quantization, dict) else "quantization is set"


def _by_bits(key: str) -> Callable[[Mapping[str, Any]], str | None]:
    return lambda values: None if values.get(key) is None else f"{key} is {values[key]!r}"


# By file: AutoGPTQ's and AutoAWQ's are of before config.json had a quantization_config.
_SAID_IN: dict[str, Callable[[Mapping[str, Any]], str | None]] = {
    "hf_quant_config.json": _by_modelopt,
    "quantize_config.json": _by_bits("bits"),
    "quant_config.json": _by_bits("w_bit"),
}
