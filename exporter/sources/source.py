"""What is exported: a checkpoint or someone else's graph, with or without an adapter."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from dlo_export.checkpoints.adapter.adapter import DloAdapter, InjectedLayer, load_adapter
from dlo_export.checkpoints.config import RoutingConfig
from dlo_export.checkpoints.errors import InputError
from dlo_export.checkpoints.lazy_tensors import LazyTensor, rows_at_once
from dlo_export.checkpoints.llama_layer import LLAMA_LAYER, layer_tensor_name, parse_layer_tensor, router_name
from dlo_export.checkpoints.opening import Checkpoint, open_checkpoint
from dlo_export.exporter.plain_graph.llama import plain_graph
from dlo_export.exporter.sources.foreign_graph import ForeignGraph, open_foreign_graph


@dataclasses.dataclass(frozen=True)
class ExportSource:
    """A base model and what is added to it.

    Attributes:
        base: Checkpoint or foreign graph.
        kind: "checkpoint", "gguf" or "onnx".
        adapter: Injected layers and routers, where given.
        routing: From the adapter, else from the checkpoint's configuration; None for a dense model.
    """

    base: Checkpoint | ForeignGraph
    kind: str
    adapter: DloAdapter | None
    routing: RoutingConfig | None

    @property
    def num_layers(self) -> int:
        """Layers of the deepened model."""
        if self.adapter is not None:
            return self.adapter.num_layers
        assert self.base.config is not None, "only a foreign graph lacks a configuration, and it needs an adapter"
        return self.base.config.num_layers

    @property
    def injected_layers(self) -> tuple[InjectedLayer, ...]:
        """Layers the adapter adds, or that the checkpoint's configuration says were added."""
        if self.adapter is not None:
            return self.adapter.injected_layers
        assert self.base.config is not None
        return tuple(InjectedLayer(**entry) for entry in self.base.config.raw.get("injected_layers") or ())

    def plain_model(self, dtype: ir.DataType) -> ir.Model:
        """The base model's graph, before any pass: a new one with every call."""
        if isinstance(self.base, ForeignGraph):
            return self.base.model()
        return plain_graph(self.base.config, self.base.tensors, dtype)

    def routers(self) -> dict[int, np.ndarray]:
        """Router weights by layer, float32 [hidden]."""
        if self.routing is None:
            return {}
        tensors: Mapping[str, LazyTensor] = self.adapter.tensors if self.adapter is not None else self.base.tensors
        return {
            layer: tensors[router_name(layer)].numpy().astype(np.float32).reshape(-1) for layer in self.routing.layers
        }

    def tensors(self) -> dict[str, LazyTensor]:
        """The deepened model's weights under Hugging Face names; empty where a foreign graph's cannot be told."""
        if self.adapter is None or not self.base.tensors:
            return dict(self.base.tensors)
        injected = {layer.position for layer in self.adapter.injected_layers}
        positions = [i for i in range(self.adapter.num_layers) if i not in injected]
        return {_renumbered(name, positions): tensor for name, tensor in self.base.tensors.items()} | dict(
            self.adapter.tensors
        )

    def config_values(self) -> dict[str, Any]:
        """What the artefact's config.json says beyond the base model's: depth and routing, in the authors' keys."""
        if self.adapter is None:
            return {}
        values: dict[str, Any] = {
            "num_hidden_layers": self.num_layers,
            "injected_layers": [dataclasses.asdict(layer) for layer in self.injected_layers],
        }
        if self.routing is not None:
            values |= {
                "model_type": "llama_dlo_exattn",
                "architectures": ["LlamaDloForCausalLM"],
                "is_dlo": list(self.adapter.is_dlo),
                "rescale_hidden_states": self.adapter.rescale_hidden_states,
                "scale_factor": self.adapter.scale_factor,
                "scale_gap": self.adapter.scale_gap,
            }
        return values

    def identity_layers(self) -> tuple[int, ...]:
        """Layers that pass the residual stream through: o_proj and down_proj, and their biases, are all zeros."""
        tensors = self.tensors()
        if not tensors:
            return ()
        return tuple(layer for layer in range(self.num_layers) if _is_identity(tensors, layer))

    def close(self) -> None:
        """Unmaps the base model's files."""
        self.base.close()


def open_source(model: str | Path, adapter_folder: Path | None) -> ExportSource:
    """Opens a model and its adapter, and checks that they fit.

    Args:
        model: Checkpoint folder, `.gguf` or `.onnx` file, or hub id in the local cache.
        adapter_folder: DloAdapter; needed for an `.onnx`.

    Raises:
        InputError: The model cannot be read, or is routed in a way this version does not export.
        dlo_export.checkpoints.adapter.adapter.AdapterError: The adapter is damaged or does not fit the model.
    """
    adapter = load_adapter(adapter_folder) if adapter_folder is not None else None
    if Path(model).suffix.lower() == ".onnx":
        if adapter is None:
            raise InputError(
                f"{model}: is an ONNX graph and no adapter was given, so there is nothing to inject or route",
                hint="add --adapter DIR, as `dlo expand --adapter` or `dlo calibrate` write it",
            )
        graph = open_foreign_graph(Path(model))
        adapter.check_fits(graph.tensor_shapes(), graph.num_layers)
        return ExportSource(graph, "onnx", adapter, _adapter_routing(adapter))
    checkpoint = open_checkpoint(model)
    kind = "gguf" if Path(model).suffix.lower() == ".gguf" else "checkpoint"
    if adapter is None:
        _refuse_layer_routing(checkpoint.config.routing, checkpoint)
        return ExportSource(checkpoint, kind, None, checkpoint.config.routing)
    if checkpoint.config.routing is not None:
        raise InputError(
            f"{checkpoint.path}: already has routers, and so may the adapter {adapter_folder}",
            hint="an adapter goes on the plain checkpoint it was made from",
        )
    adapter.check_fits(checkpoint.config.tensor_shapes(), checkpoint.config.num_layers)
    return ExportSource(checkpoint, kind, adapter, _adapter_routing(adapter))


def _adapter_routing(adapter: DloAdapter) -> RoutingConfig | None:
    if not adapter.routed_layers:
        return None
    routing = RoutingConfig(
        adapter.routing,
        adapter.routed_layers,
        adapter.rescale_hidden_states,
        adapter.scale_factor,
        adapter.scale_gap,
    )
    _refuse_layer_routing(routing, None)
    return routing


def _refuse_layer_routing(routing: RoutingConfig | None, checkpoint: Checkpoint | None) -> None:
    if routing is not None and routing.kind == "layer":
        raise InputError(
            f"{checkpoint.path if checkpoint else 'adapter'}: uses layer routing (model_type llama_dlo), "
            "this version exports mlp routing (llama_dlo_exattn)",
            hint="train the routers with the authors' LlamaDLOExAttnForCausalLM, their default",
        )


def _renumbered(name: str, positions: list[int]) -> str:
    place = parse_layer_tensor(name)
    return name if place is None else layer_tensor_name(positions[place.layer], place.tensor)


def _is_identity(tensors: Mapping[str, LazyTensor], layer: int) -> bool:
    ends = (tensors.get(layer_tensor_name(layer, name)) for name in LLAMA_LAYER.branch_ends)
    return all(_all_zeros(tensor) for tensor in ends if tensor is not None)


def _all_zeros(tensor: LazyTensor) -> bool:
    # The first row settles it for all but the zero matrices, without reading (and dequantising) the others.
    step = rows_at_once(tensor.shape[0], tensor.nbytes)
    starts = range(0, tensor.shape[0], step)
    zeros = not tensor.rows(0, 1).any() and not any(tensor.rows(start, start + step).any() for start in starts)
    tensor.release()
    return zeros
