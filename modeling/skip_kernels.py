"""Routed MLPs in the dlo kernels, which read decisions where they lie: nobody waits to be told which tokens are active.

A layer's weights are turned to [in, out], as the kernels read them, in storage that the layer goes on using as before.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, Final, Literal, get_args

import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaMLP

from dlo_export.checkpoints.dtypes import FLOATS
from dlo_export.checkpoints.errors import InputError, MachineError
from dlo_export.plugins.contract import width_problems

SkipKernels = Literal["auto", True, False]
"""Whether a model's routed MLPs run in the kernels: where they can, or an error says why not, or never."""

_DTYPES: Final = frozenset(getattr(torch, kind.name) for kind in FLOATS)
_LEAST_CAPABILITY: Final = (8, 0)  # what the kernels' types need, and the least that they were compiled for


class SlowSkippingWarning(UserWarning):
    """A GPU skips, and its host waits for it, since the kernels cannot run."""


@dataclasses.dataclass(frozen=True)
class KernelMlp:
    """An MLP as the dlo kernels read it, all contiguous.

    Attributes:
        gate: T [hidden, intermediate].
        up: T [hidden, intermediate].
        down: T [intermediate, hidden].
    """

    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor


def turned_mlp(mlp: LlamaMLP) -> KernelMlp:
    """An MLP's weights, turned where they lie otherwise; see `turned_weight`."""
    return KernelMlp(*map(turned_weight, (mlp.gate_proj, mlp.up_proj, mlp.down_proj)))


def turned_weight(linear: nn.Linear) -> torch.Tensor:
    """A linear layer's weight as [in, out], contiguous; the layer's own becomes its transpose, and works as before.

    Where it lies so already nothing is done, and nothing is ever kept twice.
    """
    weight: torch.Tensor = linear.weight.data.t()
    if not weight.is_contiguous():
        # What is made in inference mode could never be trained again.
        with torch.inference_mode(False), torch.no_grad():
            weight = weight.contiguous()
            linear.weight.data = weight.t()
    return weight


def skip_mlp(
    normed: torch.Tensor,
    scale: torch.Tensor,
    mlp: KernelMlp,
    stream: torch.Tensor,
    *,
    gate_up_options: Mapping[str, Any] | None = None,
    down_options: Mapping[str, Any] | None = None,
) -> torch.Tensor:
    """The stream behind a routed MLP: two launches, and the host asks nothing.

    Args:
        normed: T [batch, sequence, hidden], what the MLP reads; contiguous, like all of these.
        scale: float32 [batch, sequence], factor of a token's branch; it skips where that is 0.
        mlp: Its weights.
        stream: T [batch, sequence, hidden].
        gate_up_options: For `plugins.kernels.launch`, beside what it needs.
        down_options: Likewise, of the second.
    """
    gated = normed.new_empty(*normed.shape[:2], mlp.gate.shape[1])
    output = torch.empty_like(stream)
    dtype, launch = str(normed.dtype).removeprefix("torch."), _kernels().launch
    with torch.cuda.device(normed.device) if normed.is_cuda else contextlib.nullcontext():
        launch("SkipGateUp", normed, scale, mlp.gate, mlp.up, gated, dtype=dtype, **(gate_up_options or {}))
        launch("SkipDown", gated, scale, mlp.down, stream, output, dtype=dtype, **(down_options or {}))
    return output


def checked_choice(wanted: object) -> None:
    """Refuses what is no choice.

    Raises:
        InputError: It is none.
    """
    if not any(wanted is choice or (choice == "auto" and wanted == choice) for choice in get_args(SkipKernels)):
        raise InputError(f"skip_kernels: got {wanted!r}", hint='it is "auto", True or False')


def size_problems(config: Any) -> list[str]:
    """Which of a Llama's sizes the kernels do not take, in words."""
    problems = ["mlp_bias true; expected false"] if config.mlp_bias else []
    return problems + width_problems({"hidden": config.hidden_size, "intermediate": config.intermediate_size})


def kernel_mlp(layer: Any, hidden_states: torch.Tensor, wanted: SkipKernels) -> KernelMlp | None:
    """A routed layer's MLP for the kernels; None where it is to run in PyTorch's operators.

    Args:
        layer: A decoder layer.
        hidden_states: What it is given, [batch, sequence, hidden].
        wanted: "auto" turns no weights and runs no kernel but on CUDA.

    Raises:
        InputError: `wanted` is True, and the kernels do not take this layer.
        MachineError: `wanted` is True, and they do not run here.
    """
    device = hidden_states.device
    if wanted is False or not hidden_states.numel() or (wanted == "auto" and device.type != "cuda"):
        return None
    if wanted is True:
        check_machine(device)
    elif (problem := machine_problem(device)) is not None:
        _warn_once(problem)
        return None
    problems = list(_layer_problems(layer, hidden_states))
    if problems and wanted is True:
        raise InputError(
            f"skip_kernels True: the kernels of routed MLPs do not take layer {layer.self_attn.layer_idx}: "
            f"{'; '.join(problems)}",
            hint='with skip_kernels "auto" such a layer runs in PyTorch\'s operators',
        )
    return None if problems else turned_mlp(layer.mlp)


def _layer_problems(layer: Any, hidden_states: torch.Tensor) -> Iterator[str]:
    """Why the kernels do not take a layer's MLP, in words: they would leave out what they know nothing of."""
    mlp, config = layer.mlp, layer.self_attn.config
    yield from size_problems(config)
    if config.hidden_act not in {"silu", "swish"}:
        yield f"hidden_act {config.hidden_act}; expected silu"
    if config.family.layer.block_norm("mlp", behind=True) is not None:
        yield "a norm behind the MLP; expected one in front of it"
    if hidden_states.dtype not in _DTYPES:
        yield f"a stream of {hidden_states.dtype}; expected float32, float16 or bfloat16"
    if type(mlp) is not LlamaMLP or _is_watched(mlp):
        yield f"an MLP of class {type(mlp).__name__}, or with hooks; expected a Llama's, bare"
        return
    for role in ("gate_proj", "up_proj", "down_proj"):
        linear = getattr(mlp, role)
        # Quantised layers, and those that an adapter wraps, are of other classes, and compute something else.
        if type(linear) is not nn.Linear or _is_watched(linear):
            yield f"{role} of class {type(linear).__name__}, or with hooks; expected a linear layer, bare"
            continue
        weight = linear.weight.data
        if (weight.device, weight.dtype) != (hidden_states.device, hidden_states.dtype):
            expected = f"{hidden_states.dtype} on {hidden_states.device}, as the stream is"
            yield f"{role} in {weight.dtype} on {weight.device}; expected {expected}"
        elif type(weight) is not torch.Tensor or weight.untyped_storage().nbytes() != weight.nbytes:
            # Turned, it would be kept twice, and whoever shares it would no longer.
            yield f"{role} in storage that others share; expected its own"


def _is_watched(module: nn.Module) -> bool:
    """Whether somebody wants to be called where this module is, or has put something else in its place."""
    hooks = (module._forward_hooks, module._forward_pre_hooks)
    return any(hooks) or "forward" in vars(module)


def check_machine(device: torch.device) -> None:
    """Refuses a device on which the kernels cannot run.

    Raises:
        MachineError: It is one, or Triton is missing.
    """
    if (problem := machine_problem(device)) is not None:
        raise MachineError(
            f"skip_kernels True: {problem}",
            hint='move the model to a CUDA device, where Triton is installed; skip_kernels "auto" runs anywhere',
        )


def machine_problem(device: torch.device) -> str | None:
    """Why the kernels cannot run on a device, in words: they take CUDA, or Triton's interpreter and the CPU."""
    if device.type not in {"cpu", "cuda"}:
        return f"the model is on {device}, expected CUDA"
    on_cuda = device.type == "cuda"
    if on_cuda and torch.version.cuda is None:
        return f"PyTorch {torch.__version__} has no CUDA"
    if (problem := _triton_problem(starts=on_cuda)) is not None:
        return problem
    if not on_cuda:
        return None if _kernels().INTERPRETED else "the model is on the CPU, expected CUDA"
    capability = torch.cuda.get_device_capability(device)
    if capability < _LEAST_CAPABILITY:
        return f"{device} has compute capability {capability[0]}.{capability[1]}, expected 8.0 or more"
    return None


@functools.cache
def _triton_problem(*, starts: bool) -> str | None:
    """Why there are no kernels to launch.

    Args:
        starts: On a GPU, where Triton has what launches them made by a C compiler.
    """
    try:
        kernels = _kernels()
    except ImportError as err:
        return f"Triton cannot be imported: {err}"
    if starts and not kernels.INTERPRETED:
        try:
            kernels.target()
        except Exception as err:  # of a compiler, the linker, the driver: whatever a machine lacks
            first = next(iter(str(err).strip().splitlines()), "")
            return f"Triton does not start: {type(err).__name__}: {first}"
    return None


@functools.cache
def _warn_once(problem: str) -> None:
    warnings.warn(
        f"routed MLPs run in PyTorch's operators, and the host waits for every decision: {problem}"
        "\n\nhint: skip_kernels False says that this is meant",
        SlowSkippingWarning,
        stacklevel=2,
    )


def _kernels() -> Any:
    """The kernels. Only here is Triton needed, and it may be missing."""
    from dlo_export.plugins import kernels  # noqa: PLC0415

    return kernels
