"""Compiles what a training step repeats: the layers."""

from __future__ import annotations

from typing import Any

import torch

from dlo_export.modeling.llama_dlo import LlamaDloForCausalLM


def compile_layers(model: LlamaDloForCausalLM, **options: Any) -> None:
    """Has torch.compile take each layer where it is called; the model keeps its modules and their names.

    All routed layers share one compilation, all others another: nothing of a layer is compiled in but its shapes. What
    changes from step to step, as how many tokens are selected, is a tensor.

    Args:
        model: About to be trained.
        options: As torch.compile takes them.
    """
    for layer in model.model.layers:
        layer.compile(**options)


def uncompiled() -> Any:
    """While this is entered layers run as they are: at inference, each batch has another number of active tokens."""
    return torch.compiler.set_stance("force_eager")
