"""What every base model answers, whatever it is stored in: a checkpoint folder, a GGUF file, someone else's graph."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import onnx_ir as ir

from dlo_export.checkpoints.adapter.adapter import InjectedLayer
from dlo_export.checkpoints.adapter.lora import LoraAdapter
from dlo_export.checkpoints.config import LlamaConfig, RoutingConfig
from dlo_export.checkpoints.device_options import ProviderOption
from dlo_export.checkpoints.errors import InputError
from dlo_export.checkpoints.lazy_tensors import LazyTensor

# What a base model is wanted for; not every kind serves every use.
Use = Literal["export without adapter", "injection", "calibration", "training", "TensorRT", "parity"]


class Refusal(NamedTuple):
    """Why a base model does not serve a use.

    Attributes:
        reason: Continues the model's name in a message.
        hint: What to do instead.
    """

    reason: str
    hint: str


class BaseModel(Protocol):
    """A model before anything is injected into it, or routed by an adapter."""

    @property
    def kind(self) -> str:
        """For the artefact's description: "checkpoint", "gguf" or "onnx". Nothing is decided by it."""

    @property
    def path(self) -> Path:
        """The folder or file."""

    @property
    def config(self) -> LlamaConfig | None:
        """Its config.json; None where a graph lies without one, which then has no parity and no genai_config.json."""

    @property
    def stored_dtype(self) -> str:
        """The type of most of the weights' bytes, "float32", "float16", "bfloat16", or a GGUF quantisation."""

    @property
    def num_layers(self) -> int:
        """Decoder layers."""

    @property
    def injected_layers(self) -> tuple[InjectedLayer, ...]:
        """Those of its layers that it says were injected before."""

    @property
    def routing(self) -> RoutingConfig | None:
        """Of its own routers; None where it has none."""

    @property
    def tensors(self) -> Mapping[str, LazyTensor]:
        """Its weights under Hugging Face names, in Hugging Face orientation."""

    @property
    def lora(self) -> LoraAdapter | None:
        """The LoRA adapter that is merged into its weights; None where there is none."""

    @property
    def packs_weights(self) -> bool:
        """Whether matrices of its graph may be joined, which changes the bytes of its weights."""

    @property
    def is_built_here(self) -> bool:
        """Whether its graph is written by this project; ONNX Runtime is asked whether it loads any other one."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """What it has that is not taken over as it is, one sentence each, for the user to be shown."""

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of `tensors`, routers left out."""

    def sha256(self) -> str:
        """Identity of the weights."""

    @property
    def data_files(self) -> Mapping[Path, str]:
        """Files that its graph's weights lie in as the graph reads them: paths relative to its folder, by place."""

    def graph_dtype(self, choice: str, provider: ProviderOption = "cpu") -> str:
        """What `--dtype` comes to in its graph.

        Args:
            choice: "auto", "fp32", "fp16" or "bf16".
            provider: Of ONNX Runtime, which auto is for.

        Returns:
            "fp32", "fp16" or "bf16".

        Raises:
            InputError: Its graph cannot have that type.
        """

    def plain_model(self, dtype: ir.DataType) -> ir.Model:
        """Its graph before any pass, weights still lazy: a new one with every call.

        Args:
            dtype: Of weights, KV cache and logits, as `graph_dtype` gave it.
        """

    @property
    def dtype_beside_engines(self) -> str:
        """Type of the model.onnx that goes with TensorRT's engines and proves them on a CPU, as `--dtype` names it."""

    def engine_model(self, dtype: ir.DataType) -> ir.Model:
        """Its decoder in the form that passes turn into TensorRT's, weights still lazy: a new one with every call.

        Args:
            dtype: Of weights, KV cache and logits.

        Raises:
            InputError: There is none; `why_not("TensorRT")` says why.
        """

    def why_not(self, use: Use) -> Refusal | None:
        """Why it does not serve a use; None where it does."""

    @property
    def client_settings(self) -> Mapping[str, Any] | None:
        """The genai_config.json it came with, which goes with it; None where there is none."""

    def save_companions(self, folder: Path, config_overrides: Mapping[str, Any] | None = None) -> None:
        """Writes config.json with the overrides, generation_config.json and the tokenizer, as far as it has them."""

    def close(self) -> None:
        """Unmaps its files."""


def check_use(base: BaseModel, use: Use) -> None:
    """Refuses a use.

    Raises:
        InputError: With the model's own reason.
    """
    if (refusal := base.why_not(use)) is not None:
        raise InputError(f"{base.path}: {refusal.reason}", hint=refusal.hint)
