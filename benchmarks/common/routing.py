"""Routers for measurements: real ones, in the graph, whose decisions on the benchmark's tokens are known beforehand.

What a benchmark wants to happen is a pattern: which tokens are active in which layer. A router is a linear function of
the layer's input, and with more hidden units than tokens there is one that gives every token the wanted logit: the
solution of least norm of X·w = ±MARGIN. Later layers' inputs depend on the decisions of earlier ones, so each router is
fitted just before its layer runs, in one forward pass of the PyTorch model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dlo_export.checkpoints.adapter.adapter import DloAdapter, save_adapter
from dlo_export.checkpoints.depth.expansion import routed_config
from dlo_export.checkpoints.lazy_tensors import ArrayTensor, LazyTensor
from dlo_export.checkpoints.llama_layer import router_name
from dlo_export.checkpoints.model_types import RoutingKind
from dlo_export.modeling.from_tensors import llama_dlo_from_tensors
from dlo_export.modeling.llama_dlo import LlamaDloForCausalLM

MARGIN = 4.0  # logits of ±4: scores of 0.982 and 0.018, far from the threshold


def layers_active(rate: float, layers: int, tokens: int) -> np.ndarray:
    """A share of the layers is active, evenly spread, each for all tokens: bool [layers, tokens]."""
    steps = np.floor(np.arange(layers + 1) * rate + 1e-9)
    return np.repeat(np.diff(steps)[:, np.newaxis] > 0, tokens, axis=1)


def tokens_active(rate: float, layers: int, tokens: int, seed: int = 0) -> np.ndarray:
    """In every layer a random share of the tokens is active: bool [layers, tokens]."""
    ranks = np.random.default_rng(seed).random((layers, tokens)).argsort(axis=1)
    return ranks < round(rate * tokens)


def routable_model(
    config: Mapping[str, Any],
    tensors: Mapping[str, LazyTensor],
    routing: RoutingKind = "mlp",
    *,
    dtype: torch.dtype = torch.float32,
) -> LlamaDloForCausalLM:
    """The PyTorch model with a router on every layer, still to be fitted.

    Args:
        config: A plain Llama's.
        tensors: Its weights under Hugging Face names.
        routing: What a token skips.
        dtype: It computes in.
    """
    layers, hidden = config["num_hidden_layers"], config["hidden_size"]
    unfitted = {router_name(layer): ArrayTensor(np.ones((1, hidden), np.float32)) for layer in range(layers)}
    return llama_dlo_from_tensors(
        {**config, **routed_config([True] * layers, routing=routing)}, {**tensors, **unfitted}, dtype=dtype
    )


def fit_routers(model: LlamaDloForCausalLM, tokens: np.ndarray, wanted: np.ndarray) -> None:
    """Replaces the routers by ones that decide as wanted.

    Args:
        model: Routed on every layer.
        tokens: int64 [batch, tokens], none twice.
        wanted: bool [layers, batch·fitted], for the last tokens of every sequence; fewer than there are hidden units.

    Raises:
        RuntimeError: A decision came out otherwise.
    """
    fitted = wanted.shape[1] // len(tokens)

    def fit(index: int) -> Any:
        def before_layer(_layer: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            targets = np.where(wanted[index], MARGIN, -MARGIN)
            states = inputs[0][:, -fitted:].flatten(0, 1).double().numpy()
            weight = np.linalg.lstsq(states, targets, rcond=None)[0]
            router = model.model.router(index)
            assert router is not None
            router.weight.copy_(torch.from_numpy(weight[np.newaxis]))

        return before_layer

    handles = [layer.register_forward_pre_hook(fit(index)) for index, layer in enumerate(model.model.layers)]
    with torch.no_grad():
        scores = model(torch.from_numpy(tokens)).router_scores
    for handle in handles:
        handle.remove()
    decided = np.stack([scores[layer][:, -fitted:].flatten().numpy() > 0.5 for layer in range(len(wanted))])
    if wrong := int((decided != wanted).sum()):
        raise RuntimeError(f"{wrong} of {wanted.size} decisions of the fitted routers are not the wanted ones")


def router_tensors(model: LlamaDloForCausalLM) -> dict[str, LazyTensor]:
    """The routers under their checkpoint names."""
    return {
        router_name(layer): ArrayTensor(router.weight.detach().numpy().copy())
        for layer, router in model.model.routers.items()
    }


def save_routers(model: LlamaDloForCausalLM, folder: Path) -> Path:
    """Writes the routers as an adapter for the plain checkpoint."""
    routers = router_tensors(model)
    save_adapter(
        DloAdapter(model.config.routing, is_dlo=(True,) * len(routers), tensors=routers), folder, overwrite=True
    )
    return folder
