"""What is exported: a checkpoint or someone else's graph, with or without an adapter."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from dlo_export.checkpoints.adapter.adapter import LORA_FOLDER, DloAdapter, InjectedLayer, load_adapter
from dlo_export.checkpoints.adapter.lora import is_peft_adapter, load_lora
from dlo_export.checkpoints.config import RoutingConfig
from dlo_export.checkpoints.depth.expansion import ExpansionPlan, expanded_config, routed_config
from dlo_export.checkpoints.errors import InputError
from dlo_export.checkpoints.finite_weights import finite_tensors
from dlo_export.checkpoints.lazy_tensors import LazyTensor, all_zeros
from dlo_export.checkpoints.llama_layer import LLAMA_LAYER, layer_tensor_name, parse_layer_tensor, router_name
from dlo_export.checkpoints.model_types import ROUTED_BLOCKS, family_of, leaves_keys
from dlo_export.checkpoints.opening import open_checkpoint
from dlo_export.checkpoints.router_thresholds import ONE_HALF
from dlo_export.exporter.sources.adapter_base import check_adapter_base
from dlo_export.exporter.sources.base_model import BaseModel, check_use
from dlo_export.exporter.sources.checkpoint_model import CheckpointModel
from dlo_export.exporter.sources.foreign_graph import open_foreign_graph
from dlo_export.exporter.sources.untrained_routers import untrained_router_warning
from dlo_export.runtimes.artefact.description import AdapterBase


@dataclasses.dataclass(frozen=True)
class ExportSource:
    """A base model and what is added to it.

    Attributes:
        base: What everything is added to.
        adapter: Injected layers and routers, where given.
        routing: From the adapter, else from the base model; None for a dense model.
        adapter_name: Of the folder of an adapter, a LoRA one included; None where there is none.
        adapter_base: Whether that was made from the base model's weights.
        removed_layers: Indices of layers that pass everything on and are left out: none here, see `ReducedSource`.
        weightless: Whether the graph alone is wanted. Then no weight is read, and nothing is said that only weights
            tell: they need not be there.
    """

    base: BaseModel
    adapter: DloAdapter | None
    routing: RoutingConfig | None
    adapter_name: str | None = None
    adapter_base: AdapterBase | None = None
    removed_layers: tuple[int, ...] = ()
    weightless: bool = False

    @property
    def kind(self) -> str:
        """The base model's, for descriptions."""
        return self.base.kind

    @property
    def num_layers(self) -> int:
        """Layers of the deepened model."""
        return self.base.num_layers if self.adapter is None else self.adapter.num_layers

    @property
    def packs_weights(self) -> bool:
        """Whether matrices of its graph may be joined."""
        return self.base.packs_weights

    @property
    def remembers_activity(self) -> bool:
        """Whether its graph has a state beside the KV cache: which cached tokens were active in a layer."""
        return self.routing is not None and not leaves_keys(self.routing.kind)

    @property
    def injected_layers(self) -> tuple[InjectedLayer, ...]:
        """All that are not the first model's, in the order of their positions; sources count in the first model."""
        if self.adapter is None:
            return self.base.injected_layers
        return tuple(InjectedLayer(**entry) for entry in self.config_values()["injected_layers"])

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the user is to be shown, one sentence each: the base model's, and of routers that skip everything."""
        if self.weightless:
            return self.base.warnings
        thresholds = {} if self.routing is None else self.routing.thresholds
        zero = [layer for layer, router in self.routers().items() if not router.any()]
        zero = [layer for layer in zero if thresholds.get(layer, ONE_HALF) >= ONE_HALF]  # their scores are one half
        if self.routing is None or not zero:
            return self.base.warnings
        # Where what is skipped adds nothing, as in a new layer of zero_out, skipping it loses nothing.
        skipped = [module for module in LLAMA_LAYER if module.block in ROUTED_BLOCKS[self.routing.kind]]
        ends = [name for module in skipped if module.ends_branch for name in module.tensors()]
        tensors = self.tensors()
        untrained = [layer for layer in zero if not _are_zeros(tensors, layer, ends)]
        own = [untrained_router_warning(untrained, self.routing.kind)] if untrained else []
        return (*self.base.warnings, *own)

    @property
    def routers_removed(self) -> bool:
        """Whether nothing is routed because the layers that were routed are left out."""
        return False

    def plain_model(self, dtype: ir.DataType) -> ir.Model:
        """The base model's graph, before any pass: a new one with every call."""
        return self.base.plain_model(dtype)

    def engine_model(self, dtype: ir.DataType) -> ir.Model:
        """The base model's decoder as TensorRT's graph begins: a new one with every call."""
        return self.base.engine_model(dtype)

    def routers(self) -> dict[int, np.ndarray]:
        """Router weights by layer, float32 [hidden]; zeros, which are not written, where no weights are read."""
        if self.routing is None:
            return {}
        tensors: Mapping[str, LazyTensor] = self.adapter.tensors if self.adapter is not None else self.base.tensors
        routers = {layer: tensors[router_name(layer)] for layer in self.routing.layers}
        if self.weightless:
            return {layer: np.zeros(math.prod(router.shape), np.float32) for layer, router in routers.items()}
        return {layer: router.numpy().astype(np.float32).reshape(-1) for layer, router in routers.items()}

    def tensors(self) -> dict[str, LazyTensor]:
        """The deepened model's weights under Hugging Face names."""
        if self.adapter is None:
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
        base = {} if self.base.config is None else self.base.config.raw
        values = expanded_config(base, ExpansionPlan(self.base.num_layers, self.adapter.injected_layers))
        if self.routing is not None:
            values |= routed_config(
                self.adapter.is_dlo,
                routing=self.routing.kind,
                rescale=self.adapter.rescale_hidden_states,
                scale_factor=self.adapter.scale_factor,
                scale_gap=self.adapter.scale_gap,
                thresholds=self.adapter.router_thresholds,
                family=family_of(base),
            )
        return values

    def config_json(self) -> dict[str, Any]:
        """What of the deepened and routed model's config.json decides what is computed, for its PyTorch form.

        Raises:
            InputError: The base model has none.
        """
        check_use(self.base, "parity")
        assert self.base.config is not None, "or it would have refused"
        return {**self.base.config.model_values(), **self.config_values()}

    def identity_layers(self) -> tuple[int, ...]:
        """Layers that pass the residual stream through: o_proj and down_proj, and their biases, are all zeros.

        Raises:
            InputError: Their weights are not read.
        """
        if self.weightless:
            raise InputError(
                f"{self.base.path}: which layers pass everything on, only their weights tell",
                hint="export with weights",
            )
        tensors = self.tensors()
        ends = LLAMA_LAYER.branch_ends
        return tuple(layer for layer in range(self.num_layers) if _are_zeros(tensors, layer, ends))

    def close(self) -> None:
        """Unmaps the base model's files."""
        self.base.close()


def open_source(
    model: str | Path,
    adapter_folder: Path | None,
    *,
    allow_nonfinite: bool = False,
    force_base: bool = False,
    weights: bool = True,
    engines: bool = False,
) -> ExportSource:
    """Opens a model and its adapter, and checks that they fit.

    Args:
        model: Checkpoint folder, `.gguf` or `.onnx` file, or hub id in the local cache.
        adapter_folder: DloAdapter, needed for an `.onnx` that no engine is built of; or a LoRA adapter of PEFT's,
            merged into a checkpoint.
        allow_nonfinite: Let weights be NaN or infinite.
        force_base: Let the adapter be made from other weights.
        weights: False opens a source of which no weight is read: of a folder, its config.json is enough.
        engines: Whether TensorRT engines are built of it, or were.

    Raises:
        InputError: The model cannot be read, or both it and the adapter are routed.
        dlo_export.checkpoints.adapter.adapter.AdapterError: The adapter is damaged or does not fit the model.
    """
    lora = None if adapter_folder is None else _lora_folder(adapter_folder)
    adapter = None if adapter_folder is None or adapter_folder == lora else load_adapter(adapter_folder)
    base = _open_base(model, lora, allow_nonfinite=allow_nonfinite, weights=weights)
    if adapter is None and adapter_folder is not None:  # a LoRA adapter, which is in the base's weights
        return ExportSource(base, None, base.routing, adapter_folder.name, "not stated", weightless=not weights)
    if adapter is None:
        if not engines:
            check_use(base, "export without adapter")
        return ExportSource(base, None, base.routing, weightless=not weights)
    assert adapter_folder is not None, "an adapter was loaded from it"
    if base.routing is not None:
        raise InputError(
            f"{base.path}: already has routers, and so may the adapter {adapter_folder}",
            hint="an adapter goes on the plain checkpoint it was made from",
        )
    if adapter.injected_layers:
        check_use(base, "injection")
    adapter.check_fits(base.tensor_shapes(), base.num_layers)
    routing = _adapter_routing(adapter)
    adapter_base = check_adapter_base(adapter, base, adapter_folder, force=force_base, weights=weights)
    if not allow_nonfinite:
        adapter = dataclasses.replace(adapter, tensors=finite_tensors(adapter.tensors, adapter_folder))
    return ExportSource(base, adapter, routing, adapter_folder.name, adapter_base, weightless=not weights)


def _lora_folder(adapter: Path) -> Path | None:
    """Where LoRA matrices lie: the adapter itself where it is PEFT's, or a folder in it; None where it has none."""
    if is_peft_adapter(adapter):
        return adapter
    inner = adapter / LORA_FOLDER
    return inner if inner.is_dir() else None


def _open_base(model: str | Path, lora_folder: Path | None, *, allow_nonfinite: bool, weights: bool) -> BaseModel:
    """The one place that tells the kinds apart, by what stands on the command line."""
    lora = None if lora_folder is None else load_lora(lora_folder, allow_nonfinite=allow_nonfinite)
    if not _is_graph(model):
        return CheckpointModel(open_checkpoint(model, weights=weights), lora, allow_nonfinite)
    if lora is not None:
        raise InputError(
            f"{model}: is a graph, the LoRA adapter {lora_folder} is merged into a checkpoint's weights",
            hint="export the checkpoint with that adapter",
        )
    return open_foreign_graph(Path(model), allow_nonfinite=allow_nonfinite)


def _is_graph(model: str | Path) -> bool:
    return Path(model).suffix.lower() == ".onnx"


def _adapter_routing(adapter: DloAdapter) -> RoutingConfig | None:
    if not adapter.routed_layers:
        return None
    return RoutingConfig(
        adapter.routing,
        adapter.routed_layers,
        adapter.rescale_hidden_states,
        adapter.scale_factor,
        adapter.scale_gap,
        adapter.router_thresholds,
    )


def _renumbered(name: str, positions: list[int]) -> str:
    place = parse_layer_tensor(name)
    return name if place is None else layer_tensor_name(positions[place.layer], place.tensor)


def _are_zeros(tensors: Mapping[str, LazyTensor], layer: int, names: Iterable[str]) -> bool:
    """Whether those of a layer's tensors that there are hold nothing but zeros."""
    ends = [tensors[full] for name in names if (full := layer_tensor_name(layer, name)) in tensors]
    return bool(ends) and all(map(all_zeros, ends))  # none at all: a graph whose weights have other roles
