"""A random Llama checkpoint of a given shape: speed does not depend on what the weights say."""

from __future__ import annotations

import dataclasses
import json
import zlib
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from benchmarks.common.workspace import WORKSPACE, temporary_folder
from dlo_export.checkpoints.checkpoint_folder import save_model_tensors
from dlo_export.checkpoints.config import LlamaConfig
from dlo_export.checkpoints.lazy_tensors import TensorOfRows

# Eight layers of the size of a 1B model, where MLPs are most of the work.
H2048 = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 8,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 32000,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": True,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "dtype": "bfloat16",
}


@dataclasses.dataclass(frozen=True)
class RandomTensor(TensorOfRows):
    """A `LazyTensor`, drawn when it is read, the same each time."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype = dataclasses.field(default_factory=lambda: np.dtype(ml_dtypes.bfloat16))

    def numpy(self) -> np.ndarray:  # noqa: D102 - as LazyTensor says
        if self.name.endswith("norm.weight"):
            return np.ones(self.shape, self.dtype)
        values = np.random.default_rng(zlib.crc32(self.name.encode())).standard_normal(self.shape, np.float32)
        return (values * np.float32(self.shape[-1] ** -0.5)).astype(self.dtype)

    def rows(self, start: int, stop: int) -> np.ndarray:  # noqa: D102
        return self.numpy()[start:stop]


def random_llama_folder(name: str, config: dict[str, Any]) -> Path:
    """The checkpoint, in bfloat16, written once and kept.

    Args:
        name: Of the folder under .peers/.
        config: Content of config.json.
    """
    folder = WORKSPACE / name
    if not folder.exists():
        shapes = LlamaConfig.from_dict(config, name).tensor_shapes()
        with temporary_folder() as temporary:
            staging = temporary / name
            staging.mkdir()
            save_model_tensors({key: RandomTensor(key, shape) for key, shape in shapes.items()}, staging)
            (staging / "config.json").write_text(json.dumps(config, indent=2))
            staging.rename(folder)
    return folder
