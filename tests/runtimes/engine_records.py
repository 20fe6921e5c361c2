"""Artefact folders with engines: described as dlo-export describes them, their content whatever a test needs."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import tensorrt_rtx

from tests.runtimes.static_cache_graphs import HEAD_DIM, KV_HEADS, LAYERS, MAX_CACHE, VOCAB

MAX_BATCH, MAX_SEQUENCE = 4, 16


def interface(**changed: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the handmade decoder."""
    cache = [
        {"name": f"{prefix}.{layer}.{part}", "dtype": "float16", "shape": ["batch", KV_HEADS, MAX_CACHE, HEAD_DIM]}
        for prefix in ("past_key_values", "present")
        for layer in range(LAYERS)
        for part in ("key", "value")
    ]
    half = len(cache) // 2
    tokens = [
        {"name": name, "dtype": "int64", "shape": ["batch", "sequence"]} for name in ("input_ids", "position_ids")
    ]
    lengths = [{"name": name, "dtype": "int64", "shape": ["batch"]} for name in ("write_indices", "kv_lengths")]
    logits = {"name": "logits", "dtype": "float16", "shape": ["batch", "sequence", VOCAB]}
    return {"inputs": [*tokens, *lengths, *cache[:half]], "outputs": [logits, *cache[half:]], **changed}


def record(plan: bytes = b"no engine", **changed: Any) -> dict[str, Any]:
    """One entry of `engines`."""
    profiles = [
        {"name": "prefill", "shapes": {"input_ids": [[1, 1], [1, 8], [MAX_BATCH, MAX_SEQUENCE]]}},
        {"name": "decode", "shapes": {"input_ids": [[1, 1], [1, 1], [MAX_BATCH, 1]]}},
    ]
    return {
        "file": "engines/model.engine",
        "graph": "engines/model.onnx",
        "backend": "rtx",
        "version": tensorrt_rtx.__version__,
        "targets": ["sm89"],
        "profiles": profiles,
        "lowering": "plugin",
        "dtype": "fp16",
        "cache": "static",
        "plugins": "none",
        "max_batch": MAX_BATCH,
        "max_sequence": MAX_SEQUENCE,
        "max_cache": MAX_CACHE,
        "sha256": hashlib.sha256(plan).hexdigest(),
        "interface": interface(),
        **changed,
    }


def save_artefact(folder: Path, *records: dict[str, Any], plan: bytes = b"no engine") -> Path:
    """Writes dlo_artifact.json, and the files its engines name."""
    for entry in records:
        for name in ("file", "graph"):
            path = folder / str(entry.get(name, "engines/unnamed"))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(plan)
    (folder / "dlo_artifact.json").write_text(json.dumps({"format_version": 1, "engines": list(records)}))
    return folder
