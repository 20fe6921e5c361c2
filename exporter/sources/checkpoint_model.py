"""A Llama checkpoint, in Hugging Face form or GGUF, as a base model."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from dlo_export.checkpoints.adapter.adapter import InjectedLayer
from dlo_export.checkpoints.adapter.lora import LoraAdapter, merged_sha256
from dlo_export.checkpoints.config import LlamaConfig, RoutingConfig
from dlo_export.checkpoints.device_options import ProviderOption
from dlo_export.checkpoints.finite_weights import finite_tensors
from dlo_export.checkpoints.lazy_tensors import LazyTensor
from dlo_export.checkpoints.opening import Checkpoint
from dlo_export.exporter.graph_dtype import sixteen_bits
from dlo_export.exporter.plain_graph.llama import plain_graph
from dlo_export.exporter.sources.base_model import Refusal, Use


@dataclasses.dataclass(frozen=True)
class CheckpointModel:
    """An open checkpoint that answers as a `BaseModel`: it serves every use.

    Attributes:
        checkpoint: Open.
        lora: Merged into its weights.
        allow_nonfinite: Let weights be NaN or infinite.

    Raises:
        AdapterError: The LoRA adapter was made for another model.
    """

    checkpoint: Checkpoint
    lora: LoraAdapter | None = None
    allow_nonfinite: bool = False

    def __post_init__(self) -> None:
        if self.lora is not None:
            self.lora.check_fits(self.checkpoint.tensors)

    @property
    def kind(self) -> str:  # noqa: D102 - BaseModel's questions, here and below
        return self.checkpoint.kind

    @property
    def path(self) -> Path:  # noqa: D102
        return self.checkpoint.path

    @property
    def config(self) -> LlamaConfig:  # noqa: D102
        return self.checkpoint.config

    @property
    def stored_dtype(self) -> str:  # noqa: D102
        return self.checkpoint.stored_dtype

    @property
    def num_layers(self) -> int:  # noqa: D102
        return self.config.num_layers

    @property
    def injected_layers(self) -> tuple[InjectedLayer, ...]:  # noqa: D102
        return tuple(InjectedLayer(**entry) for entry in self.config.raw.get("injected_layers") or ())

    @property
    def routing(self) -> RoutingConfig | None:  # noqa: D102
        return self.config.routing

    @functools.cached_property
    def tensors(self) -> Mapping[str, LazyTensor]:
        """Weights with the LoRA adapter merged in, which refuse to be NaN or infinite."""
        tensors = self.checkpoint.tensors
        if self.lora is not None:
            tensors = self.lora.merged(tensors)
        # Of the sums, because B·A may overflow where none of the three does.
        return tensors if self.allow_nonfinite else finite_tensors(tensors, self.path)

    @property
    def warnings(self) -> tuple[str, ...]:  # noqa: D102
        return self.checkpoint.warnings

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:  # noqa: D102
        return self.config.tensor_shapes()

    def sha256(self) -> str:
        """The checkpoint's; with a LoRA adapter, SHA-256 of both hashes in hexadecimal, a line each."""
        own = self.checkpoint.sha256()
        return own if self.lora is None else merged_sha256(own, self.lora.sha256())

    @property
    def data_files(self) -> dict[Path, str]:
        """None: its weights are transposed and cast for the graph."""
        return {}

    @property
    def packs_weights(self) -> bool:
        """Yes: its graph is ours."""
        return True

    @property
    def is_built_here(self) -> bool:
        """Yes."""
        return True

    @property
    def client_settings(self) -> None:
        """None: what fits its graph is written by the export."""

    def graph_dtype(self, choice: str, provider: ProviderOption = "cpu") -> str:
        """As asked: the graph is built from the weights. auto is fp32 on a CPU, 16 bits on a GPU."""
        if choice != "auto":
            return choice
        return "fp32" if provider == "cpu" else sixteen_bits(self.stored_dtype)

    def plain_model(self, dtype: ir.DataType) -> ir.Model:  # noqa: D102
        return plain_graph(self.config, self.tensors, dtype)

    @property
    def dtype_beside_engines(self) -> str:
        """fp32, whatever the engines are: nothing is rounded twice."""
        return "fp32"

    def engine_model(self, dtype: ir.DataType) -> ir.Model:
        """The plain graph, as for ONNX Runtime."""
        return self.plain_model(dtype)

    def why_not(self, use: Use) -> Refusal | None:  # noqa: D102 - it serves every use
        return None

    def save_companions(self, folder: Path, config_overrides: Mapping[str, Any] | None = None) -> None:  # noqa: D102
        self.checkpoint.save_companions(folder, config_overrides)

    def close(self) -> None:  # noqa: D102
        self.checkpoint.close()
