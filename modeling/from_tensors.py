"""The PyTorch model of any checkpoint's tensors: GGUF, safetensors, or a base model under an adapter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import torch

from dlo_export.checkpoints.errors import InputError
from dlo_export.checkpoints.lazy_tensors import LazyTensor
from dlo_export.checkpoints.llama_layer import parse_router
from dlo_export.checkpoints.model_types import LLAMA, MODEL_TYPES
from dlo_export.checkpoints.router_thresholds import KEY as THRESHOLDS
from dlo_export.modeling.family_modules import StepRotaryEmbedding
from dlo_export.modeling.float64_norm import use_float64_norms
from dlo_export.modeling.llama_dlo import LlamaDloForCausalLM, model_class_of
from dlo_export.modeling.untrained_routers import warn_of_untrained_routers


class ModelTensorsError(InputError):
    """The tensors are not those that the configuration describes."""


def llama_dlo_from_tensors(
    config: Mapping[str, Any],
    tensors: Mapping[str, LazyTensor],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device = torch.device("cpu"),  # noqa: B008 - a constant
) -> LlamaDloForCausalLM:
    """Builds the model in evaluation mode, in PyTorch's operators; a plain one becomes one without routers.

    Args:
        config: Of config.json.
        tensors: Under Hugging Face names; read, cast and released one after the other.
        dtype: Of all parameters but the routers, which are at least float32. In float64 everything but the angles of
            the rotary embedding, which are defined in float32, is computed in float64.
        device: Where they go, one after the other.

    Raises:
        ModelTensorsError: Tensors are missing or unexpected.
        RoutingConfigError: The routing keys contradict each other.
    """
    model = empty_llama_dlo(config, tensors.keys(), dtype=dtype)
    for name in sorted({name for name, _ in model.named_parameters()}):
        parameter_dtype = dtype if parse_router(name) is None else torch.promote_types(dtype, torch.float32)
        values = {name: released_parameter(tensors[name], parameter_dtype).to(device)}
        model.load_state_dict(values, strict=False, assign=True)
    model.tie_weights()
    model.model.rotary_emb.to(device)
    warn_of_untrained_routers(model)
    return model


def empty_llama_dlo(
    config: Mapping[str, Any], names: Iterable[str], *, dtype: torch.dtype = torch.float32
) -> LlamaDloForCausalLM:
    """Builds the model in evaluation mode without values: its parameters are on the meta device.

    Args:
        config: Of config.json.
        names: Of the tensors that are to become its parameters.
        dtype: Of all parameters but the routers.

    Raises:
        ValueError: As `llama_dlo_from_tensors`.
    """
    values = {key: value for key, value in config.items() if key not in ("model_type", "dtype", "torch_dtype")}
    kind = MODEL_TYPES[config.get("model_type", LLAMA.name)]
    model_class = model_class_of(kind, thresholds=bool(values.get(THRESHOLDS)))
    model_config = model_class.config_class(**values, dtype=dtype)
    with torch.device("meta"):
        model = model_class(model_config)
    if dtype == torch.float64:
        use_float64_norms(model)
    expected = {name for name, _ in model.named_parameters()}
    if problems := _name_problems(expected, set(names)):
        raise ModelTensorsError(f"PyTorch model: {'; '.join(problems)}", hint="config.json belongs to another model")
    # Its frequencies are computed, not stored, and were left on the meta device.
    model.model.rotary_emb = StepRotaryEmbedding(config=model_config)
    # What this project calibrates, trains, evaluates and compares with is defined by PyTorch's operators.
    model.skip_kernels = False
    model.eval()
    return model


def unfilled_llama_dlo(config: Mapping[str, Any], names: Iterable[str]) -> LlamaDloForCausalLM:
    """Builds the model in evaluation mode with whatever memory holds, for somebody else to fill.

    Until then it takes next to no memory: the system gives pages to what is written, and nothing is.

    Args:
        config: Of config.json.
        names: Of the tensors that are to become its parameters, in float32.

    Raises:
        ValueError: As `llama_dlo_from_tensors`.
    """
    model = empty_llama_dlo(config, names)
    unfilled = {name: torch.empty(value.shape) for name, value in model.named_parameters()}
    model.load_state_dict(unfilled, strict=False, assign=True)
    model.tie_weights()
    return model


def released_parameter(tensor: LazyTensor, dtype: torch.dtype) -> torch.Tensor:
    """Reads a tensor into memory of its own, and gives back what reading took."""
    values = _to_torch(tensor.numpy(), dtype)
    tensor.release()
    return values


def _to_torch(array: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """A tensor with memory of its own; NumPy's bfloat16 is foreign to torch, its bits are not."""
    own = np.array(array, copy=True)
    if own.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(own.view(np.uint16)).view(torch.bfloat16).to(dtype)
    return torch.from_numpy(own).to(dtype)


def _name_problems(expected: set[str], found: set[str]) -> list[str]:
    problems = [f"{name} is missing" for name in sorted(expected - found)]
    return problems + [f"{name} is unexpected" for name in sorted(found - expected)]
