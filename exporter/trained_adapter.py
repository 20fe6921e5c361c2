"""What training made of a model, as an adapter: routers, and beside them a LoRA adapter of what else it changed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dlo_export.checkpoints.adapter.adapter import LORA_FOLDER, DloAdapter, save_adapter
from dlo_export.checkpoints.adapter.lora import TENSORS_NAME, LoraFactors, merged_sha256, save_lora
from dlo_export.checkpoints.files.file_digest import file_sha256
from dlo_export.checkpoints.files.json_file import save_json
from dlo_export.checkpoints.files.scratch_folder import scratch_folder
from dlo_export.checkpoints.lazy_tensors import ArrayTensor, LazyTensor
from dlo_export.checkpoints.llama_layer import router_name
from dlo_export.exporter.sources.source import ExportSource
from dlo_export.modeling.llama_dlo import LlamaDloForCausalLM
from dlo_export.modeling.training.errors import TrainingError
from dlo_export.modeling.training.parameters import lora_factors, router_weights
from dlo_export.modeling.training.run_folder import DESCRIPTION_NAME

_ADAPTED_MODES = ("routers", "lora")


def check_makes_adapter(source: ExportSource, mode: str, routers: str) -> None:
    """Refuses what an adapter cannot hold before anything is trained.

    Args:
        source: The model, and the adapter that training starts from.
        mode: What learns, see `TrainingSettings`.
        routers: ``keep``, ``add`` or ``none``, see `TrainRequest`.

    Raises:
        TrainingError: Whole weights learn; the base has routers, so no adapter goes on it; it is without any; or the
            adapter has layers or LoRA matrices of its own, which the new ones would lie beside.
    """
    has_lora = source.base.lora is not None
    reasons = (
        (mode not in _ADAPTED_MODES, f"mode {mode} trains whole weights", "--mode lora or routers"),
        (routers == "none", "--routers none leaves no router", "leave one of the two out"),
        (source.base.routing is not None, f"{source.base.path} has routers of its own", "start from a plain model"),
        (bool(source.injected_layers), "the model has injected layers", "write a checkpoint, without --as-adapter"),
        (has_lora, "the adapter has LoRA matrices already", "write a checkpoint, without --as-adapter"),
    )
    for holds, reason, hint in reasons:
        if holds:
            raise TrainingError(f"--as-adapter: {reason}", hint=hint)


def save_trained_adapter(
    model: LlamaDloForCausalLM,
    source: ExportSource,
    folder: Path,
    description: Mapping[str, Any],
    *,
    overwrite: bool,
    is_main: bool,
) -> None:
    """Writes it, whole or not at all. LoRA's matrices are stored in 16 bits, routers as they are.

    Args:
        model: Trained; every process has to hand over its shards, where it has some.
        source: What training started from.
        folder: To make.
        description: What `training.json` says.
        overwrite: Replace an adapter that is there.
        is_main: Whether this process writes.

    Raises:
        MachineError: The disk is full.
    """
    factors = {
        name: LoraFactors(ArrayTensor(_half(a)), ArrayTensor(_half(b)), scale)
        for name, a, b, scale in lora_factors(model)
    }
    routers: dict[str, LazyTensor] = {
        router_name(layer): ArrayTensor(weight.float().cpu().numpy()) for layer, weight in router_weights(model)
    }
    if not is_main:
        return
    config = model.config
    with scratch_folder() as scratch:
        base_sha256 = source.base.sha256()
        if factors:  # the routers belong to the base with these in it
            save_lora(factors, scratch / LORA_FOLDER)
            base_sha256 = merged_sha256(base_sha256, file_sha256(scratch / LORA_FOLDER / TENSORS_NAME))

    def save_companions(staging: Path) -> None:
        save_json(staging / DESCRIPTION_NAME, description)
        if factors:
            save_lora(factors, staging / LORA_FOLDER)

    adapter = DloAdapter(
        routing=config.routing,
        is_dlo=tuple(layer in config.routed_layers for layer in range(config.num_hidden_layers)),
        rescale_hidden_states=source.adapter.rescale_hidden_states if source.adapter is not None else False,
        scale_factor=source.adapter.scale_factor if source.adapter is not None else 2.0,
        scale_gap=source.adapter.scale_gap if source.adapter is not None else 0.0,
        router_thresholds=config.thresholds,
        base_sha256=base_sha256,
        tensors=routers,
    )
    save_adapter(adapter, folder, overwrite=overwrite, save_companions=save_companions)


def _half(values: Any) -> np.ndarray:
    half: np.ndarray = values.float().cpu().numpy().astype(np.float16)
    return half
