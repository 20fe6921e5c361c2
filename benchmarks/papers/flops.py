"""What a training step computes, counted by PyTorch while it computes it."""

from __future__ import annotations

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dlo_export.modeling.llama_dlo import LlamaDloForCausalLM
from dlo_export.modeling.routing import is_active
from dlo_export.modeling.training.packing import PackedDocuments, stacked


def training_flops(
    model: LlamaDloForCausalLM, data: PackedDocuments, teacher: LlamaDloForCausalLM | None = None
) -> float:
    """FLOPs of training per token, forward and backward: matrix products and attention, as they are computed.

    Routed training runs every MLP for every token and is counted so; a masked half of attention's scores is computed,
    and counted; weights that do not learn have no gradient, and none is counted.

    Args:
        model: Whose parameters that are to learn are chosen.
        data: One sequence of it is run.
        teacher: Runs forward beside it, where there is one.
    """
    sequence = stacked([data[0]])
    sequence.pop("counted")
    device = next(model.parameters()).device
    batch = {name: values.to(device) for name, values in sequence.items()}
    select = dict.fromkeys(model.config.routed_layers, is_active) or None
    # PyTorch's counter does not know the CPU's fused attention, but the products that the plain form is made of.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**batch, use_cache=False, select_tokens=select).loss.backward()
        if teacher is not None:
            with torch.no_grad():
                teacher(**batch, use_cache=False)
    model.zero_grad(set_to_none=True)
    return float(counter.get_total_flops() / batch["input_ids"].numel())
