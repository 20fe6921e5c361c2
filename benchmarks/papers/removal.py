"""A model without some of its layers, and which layers it misses least, found greedily (SLEB, arXiv 2402.09025).

The order of whole MLPs and of whole layers by similarity (ShortGPT's block influence, arXiv 2403.03853) is
benchmarks.calibration_quality's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from dlo_export.checkpoints.llama_layer import layer_tensor_name, parse_layer_tensor
from dlo_export.modeling.calibration.evaluation import evaluate
from dlo_export.modeling.configuration import LlamaDloConfig
from dlo_export.modeling.llama_dlo import LlamaDloForCausalLM


def greedily(
    model: LlamaDloForCausalLM,
    sequences: torch.Tensor,
    count: int,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[int]:
    """Layers to remove, in order: each time the one without which perplexity is lowest.

    Args:
        model: Dense.
        sequences: Text, int64 [sequences, length].
        count: How many layers; each takes a pass over the text per layer that is left.
        should_stop: Asked before each; ends the search early.
    """
    removed: list[int] = []
    while len(removed) < count and not should_stop():
        left = [layer for layer in range(model.config.num_hidden_layers) if layer not in removed]
        costs = {layer: evaluate(without_layers(model, [*removed, layer]), sequences).perplexity for layer in left}
        removed.append(min(costs, key=costs.__getitem__))
    return removed


def without_layers(model: LlamaDloForCausalLM, removed: Sequence[int]) -> LlamaDloForCausalLM:
    """The same dense model, sharing its weights, without these layers."""
    kept = [layer for layer in range(model.config.num_hidden_layers) if layer not in removed]
    places = {layer: place for place, layer in enumerate(kept)}
    dropped = ("model_type", "architectures", "layer_types")
    values = {key: value for key, value in model.config.to_dict().items() if key not in dropped}
    values |= {"num_hidden_layers": len(kept), "is_dlo": False, "injected_layers": None}
    with torch.device("meta"):
        shorter = LlamaDloForCausalLM(LlamaDloConfig(**values))
    weights = {}
    for name, tensor in model.state_dict().items():
        place = parse_layer_tensor(name)
        if place is None:
            weights[name] = tensor
        elif place.layer in places:
            weights[layer_tensor_name(places[place.layer], place.tensor)] = tensor
    shorter.load_state_dict(weights, assign=True)
    shorter.model.rotary_emb = model.model.rotary_emb
    shorter.eval()
    return shorter
