"""Which parameters learn, and how fast: the training modes, LoRA, and the optimiser's groups."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from dlo_export.checkpoints.llama_layer import LLAMA_LAYER, parse_layer_tensor, parse_router
from dlo_export.modeling.llama_dlo import LlamaDloForCausalLM
from dlo_export.modeling.training.errors import TrainingError
from dlo_export.modeling.training.settings import TrainingSettings
from dlo_export.modeling.training.sharding import whole
from dlo_export.modeling.training.zero import gathered

_LORA_MARK = ".lora_"


def choose_parameters(model: LlamaDloForCausalLM, settings: TrainingSettings) -> None:
    """Lets the mode's parameters learn and no others; ``lora`` adds its matrices to the model.

    Raises:
        TrainingError: The mode leaves nothing to learn, or does not know the model's family.
    """
    injected = {layer["position"] for layer in model.config.injected_layers or ()}
    if settings.mode == "new-layers" and not injected:
        raise TrainingError(
            "training: mode new-layers, but config.json names no injected_layers",
            hint="deepen the model with `dlo expand` first, or choose another mode",
        )
    if settings.mode == "routers" and not model.config.routed_layers:
        raise TrainingError("training: mode routers, but the model has none", hint="choose another mode")
    if settings.mode == "lora" and model.config.family.has_multipliers:
        # LoRA's product would be added behind the factor in training, and multiplied by it once it is merged.
        raise TrainingError(
            f"training: mode lora does not know the factors of a {model.config.family.name} model's branches",
            hint="train with --mode full or --mode routers",
        )
    if settings.mode == "lora":
        _add_lora(model, settings)
    for name, parameter in model.named_parameters():
        is_router = parse_router(name) is not None
        place = parse_layer_tensor(name)
        parameter.requires_grad_(
            is_router
            or settings.mode == "full"
            or (settings.mode == "new-layers" and place is not None and place.layer in injected)
            or (settings.mode == "lora" and _LORA_MARK in name)
        )


def parameter_groups(model: LlamaDloForCausalLM, settings: TrainingSettings) -> list[dict[str, Any]]:
    """The optimiser's groups: one per layer where capacities scale rates, the routers, and the rest.

    Each has its `lr`, and `layer`: the layer whose capacity scales it, None for routers, embedding, norm and head, and
    for all where nothing is scaled: a group costs the host as much as its kernels take.
    """
    scaled = settings.layer_wise and bool(model.config.routed_layers)
    sizes = _router_sizes(model) if settings.relative_router_rate else {}
    groups: dict[tuple[float, int | None, int | None], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            router = parse_router(name)
            rate = settings.learning_rate if router is None else settings.router_learning_rate
            alone = router if settings.relative_router_rate else None
            if alone is not None:
                rate *= sizes[alone]
            place = parse_layer_tensor(name)
            layer = place.layer if scaled and place is not None else None
            groups.setdefault((rate, layer, alone), []).append(parameter)
    return [{"params": parameters, "lr": rate, "layer": layer} for (rate, layer, _), parameters in groups.items()]


def _router_sizes(model: LlamaDloForCausalLM) -> dict[int, float]:
    """By layer, the root mean square of its router; of one that is all zeros, the median of the others' or else 1."""
    routers = {layer: model.model.router(layer) for layer in model.config.routed_layers}
    found = {
        layer: float(whole(router.weight.detach()).square().mean().sqrt())
        for layer, router in routers.items()
        if router is not None
    }
    usual = statistics.median([size for size in found.values() if size] or [1.0])
    return {layer: size or usual for layer, size in found.items()}


def merged_state(model: LlamaDloForCausalLM) -> Iterator[tuple[str, torch.Tensor]]:
    """The trained weights under the names a checkpoint has, LoRA's products added to what they lie beside.

    A tied head is left out. Each process has to go through all of them where the model is sharded.
    """
    lora = {
        f"{name}.base_layer": module for name, module in model.named_modules() if hasattr(module, "get_delta_weight")
    }
    for name, parameter in model.named_parameters():
        if _LORA_MARK in name:
            continue
        module, _, kind = name.rpartition(".")
        beside = lora.get(module) if kind == "weight" else None
        with gathered([parameter] if beside is None else beside.parameters()):
            value = whole(parameter.detach())
            if beside is not None:
                value = value + whole(beside.get_delta_weight("default").detach())
            elif hasattr(parameter, "ds_id"):
                value = value.clone()  # what was gathered is given back
        yield f"{module.removesuffix('.base_layer')}.{kind}", value


def lora_factors(model: LlamaDloForCausalLM) -> Iterator[tuple[str, torch.Tensor, torch.Tensor, float]]:
    """What ``lora`` learned, apart from what it lies beside: by a weight's name, A [r, in], B [out, r], their scale.

    Each process has to go through all of them where the model is sharded.
    """
    for name, module in model.named_modules():
        if hasattr(module, "get_delta_weight"):
            matrices = [getattr(module, kind)["default"].weight for kind in ("lora_A", "lora_B")]
            with gathered(matrices):
                a, b = (whole(matrix.detach().clone()) for matrix in matrices)
            yield f"{name}.weight", a, b, float(module.scaling["default"])


def router_weights(model: LlamaDloForCausalLM) -> Iterator[tuple[int, torch.Tensor]]:
    """By routed layer, its router [1, hidden]. Each process has to go through all where the model is sharded."""
    for layer in model.config.routed_layers:
        router = model.model.router(layer)
        assert router is not None, "the layer is routed"
        with gathered(router.parameters()):
            weight = whole(router.weight.detach().clone())
        yield layer, weight


def _add_lora(model: LlamaDloForCausalLM, settings: TrainingSettings) -> None:
    from peft import LoraConfig, inject_adapter_in_model  # noqa: PLC0415 - of an extra that other modes do not need

    # In place, so that the model stays what it is: a wrapper would have other names and another forward.
    config = LoraConfig(
        r=settings.lora_rank,
        lora_alpha=2 * settings.lora_rank,
        target_modules=[module.role for module in LLAMA_LAYER.modules if len(module.axes) == 2],
        lora_dropout=0.0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        inject_adapter_in_model(config, model)
