"""A Llama checkpoint, in Hugging Face form or GGUF, as a base model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from dlo_export.checkpoints.adapter.adapter import InjectedLayer
from dlo_export.checkpoints.config import LlamaConfig, RoutingConfig
from dlo_export.checkpoints.lazy_tensors import LazyTensor
from dlo_export.checkpoints.opening import Checkpoint
from dlo_export.exporter.plain_graph.llama import plain_graph
from dlo_export.exporter.sources.base_model import Refusal, Use


@dataclasses.dataclass(frozen=True)
class CheckpointModel:
    """An open checkpoint that answers as a `BaseModel`: it serves every use.

    Attributes:
        checkpoint: Open.
    """

    checkpoint: Checkpoint

    @property
    def kind(self) -> str:  # noqa: D102 - BaseModel's questions, here and below
        return "gguf" if self.path.suffix.lower() == ".gguf" else "checkpoint"

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

    @property
    def tensors(self) -> Mapping[str, LazyTensor]:  # noqa: D102
        return self.checkpoint.tensors

    @property
    def warnings(self) -> tuple[str, ...]:  # noqa: D102
        return self.checkpoint.warnings

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:  # noqa: D102
        return self.config.tensor_shapes()

    def sha256(self) -> str:  # noqa: D102
        return self.checkpoint.sha256()

    def graph_dtype(self, choice: str) -> str:
        """As asked: the graph is built from the weights. auto is for ONNX Runtime's CPU provider, fp32."""
        return "fp32" if choice == "auto" else choice

    def plain_model(self, dtype: ir.DataType) -> ir.Model:  # noqa: D102
        return plain_graph(self.config, self.checkpoint.tensors, dtype)

    def why_not(self, use: Use) -> Refusal | None:  # noqa: D102
        return None

    def save_companions(self, folder: Path, config_overrides: Mapping[str, Any] | None = None) -> None:  # noqa: D102
        self.checkpoint.save_companions(folder, config_overrides)

    def close(self) -> None:  # noqa: D102
        self.checkpoint.close()
