"""The PyTorch reference of any checkpoint, in memory or, where it does not fit, layer by layer.

There is one implementation of the model, modeling's. Streaming changes where a block's weights are while it does not
run, not what it computes, so a reference larger than memory is the same reference.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from dlo_export.checkpoints.lazy_tensors import LazyTensor
from dlo_export.checkpoints.llama_layer import EMBEDDING, HEAD, layer_path
from dlo_export.modeling.devices import torch_device
from dlo_export.modeling.from_tensors import empty_llama_dlo, llama_dlo_from_tensors, released_parameter
from dlo_export.modeling.llama_dlo import LlamaDloForCausalLM
from dlo_export.modeling.untrained_routers import UntrainedRoutersWarning
from dlo_export.runtimes.memory import available_memory
from dlo_export.runtimes.torch.runner import TorchRunner

# Of what is available: activations, logits and the candidates' weights need room too.
MEMORY_SHARE = 0.5


def open_reference(
    config: Mapping[str, Any],
    tensors: Mapping[str, LazyTensor],
    *,
    stream: bool | None = None,
    name: str = "PyTorch",
    dtype: str = "float32",
    device: str = "cpu",
) -> TorchRunner:
    """Opens the masked oracle of a checkpoint, in float32 or, to measure what rounding does, in another type.

    Args:
        config: Of config.json.
        tensors: Under Hugging Face names.
        stream: Read each layer's weights when it runs and drop them behind it; None decides by the memory available.
        name: For reports.
        dtype: PyTorch's word for what to compute in; routers do in float32 at least.
        device: Where to compute, as `--device` names it. A GPU's float32 products are not TF32's unless PyTorch was
            told so.

    Raises:
        MachineError: There is no such device.
        ValueError: Config and tensors do not fit each other, or the model is not supported; see modeling.from_tensors.
    """
    place = torch_device(device)
    kind: torch.dtype = getattr(torch, dtype)
    if stream is None:
        stream = float32_bytes(tensors) * kind.itemsize / 4 > MEMORY_SHARE * available_memory()
    with warnings.catch_warnings():
        # Whoever opened the source tells the user.
        warnings.simplefilter("ignore", UntrainedRoutersWarning)
        build = streamed_llama_dlo if stream else llama_dlo_from_tensors
        model = build(config, tensors, dtype=kind, device=place)
    return TorchRunner(model, masked=True, name=f"{name}, layer by layer" if stream else name, device=place)


def float32_bytes(tensors: Mapping[str, LazyTensor]) -> int:
    """Size of the model in float32."""
    return 4 * sum(math.prod(tensor.shape) for tensor in tensors.values())


def streamed_llama_dlo(
    config: Mapping[str, Any],
    tensors: Mapping[str, LazyTensor],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device = torch.device("cpu"),  # noqa: B008 - a constant
) -> LlamaDloForCausalLM:
    """Builds a model whose embedding, decoder layers and head hold weights only while they run.

    Args:
        config: Of config.json.
        tensors: Under Hugging Face names; read anew in every step. Needs memory for the largest block.
        dtype: Of all parameters but the routers, which are at least float32.
        device: Where a block's weights are while it runs.

    Raises:
        ValueError: As `open_reference`.
    """
    model = empty_llama_dlo(config, tensors.keys(), dtype=dtype)
    blocks: dict[str, nn.Module] = {"model.embed_tokens": model.model.embed_tokens, "lm_head": model.lm_head}
    blocks |= {layer_path(index): layer for index, layer in enumerate(model.model.layers)}
    small = {"model.norm": model.model.norm, "model.routers": model.model.routers}
    for prefix, module in small.items():
        # Routers are in float32 at least.
        exact = torch.promote_types(dtype, torch.float32) if module is model.model.routers else dtype
        load_block(module, block_tensors(module, prefix, tensors), exact, device)
    for prefix, module in blocks.items():
        _stream(module, block_tensors(module, prefix, tensors), dtype, device)
    model.model.rotary_emb.to(device)
    return model


def block_tensors(module: nn.Module, prefix: str, tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """A block's tensors under its own parameters' names; a tied head's is the embedding matrix."""
    names = {name: f"{prefix}.{name}" for name, _ in module.named_parameters()}
    return {name: tensors[EMBEDDING if full == HEAD and full not in tensors else full] for name, full in names.items()}


def load_block(module: nn.Module, tensors: Mapping[str, LazyTensor], dtype: torch.dtype, device: torch.device) -> None:
    """Gives a block its weights."""
    values = {name: released_parameter(tensor, dtype).to(device) for name, tensor in tensors.items()}
    module.load_state_dict(values, assign=True)


def _stream(module: nn.Module, tensors: Mapping[str, LazyTensor], dtype: torch.dtype, device: torch.device) -> None:
    module.register_forward_pre_hook(lambda block, _inputs: load_block(block, tensors, dtype, device))
    module.register_forward_hook(lambda block, _inputs, _output: _drop(block), always_call=True)


def _drop(module: nn.Module) -> None:
    module.to("meta")
