"""Compiles what a training step repeats, the layers, and what its largest values go through, the language loss."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

_COMPILATIONS = 64
"""In one process, which may train many models: routed ones and others, with this learning and with that."""

# A step of another size, as an epoch's last one, is compiled for itself; else all would be, for any size, and slower.
_STATIC = {"dynamic": False}


def compile_layers(model: PreTrainedModel, **options: Any) -> None:
    """Has torch.compile take each layer where it is called; the model keeps its modules and their names.

    All routed layers share one compilation, all others another: nothing of a layer is compiled in but its shapes. What
    changes from step to step, as how many tokens are selected, is a tensor. Models of the same shapes that the process
    trains later share both.

    Args:
        model: About to be trained, ours or transformers' Llama.
        options: As torch.compile takes them.
    """
    options = _STATIC | options
    # Beyond the limit, 8 as PyTorch has it, layers would run as they are, without a word.
    torch._dynamo.config.recompile_limit = max(_COMPILATIONS, torch._dynamo.config.recompile_limit)
    for layer in model.model.layers:
        layer.compile(**options)


def compile_loss(model: PreTrainedModel, **options: Any) -> None:
    """Compiles the language loss: as it is, it copies logits, the largest values of a step, to float32 several times.

    Args:
        model: As above.
        options: As above.
    """
    model.loss_function = torch.compile(model.loss_function, **(_STATIC | options))


def uncompiled() -> Any:
    """While this is entered layers run as they are: at inference, each batch has another number of active tokens."""
    return torch.compiler.set_stance("force_eager")
