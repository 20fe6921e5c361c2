"""A model in DeepSpeed's hands (ZeRO), as `accelerate launch --use_deepspeed` asks for it.

DeepSpeed takes the optimiser's step itself, inside the backward pass of a step's last micro-batch: what has to come
before that step comes before the backward pass.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import nn

from dlo_export.checkpoints.errors import MachineError
from dlo_export.modeling.llama_dlo import LlamaDloForCausalLM
from dlo_export.modeling.training.errors import TrainingError
from dlo_export.modeling.training.settings import TrainingSettings
from dlo_export.modeling.training.sharding import is_switched_on


def is_zero() -> bool:
    """Whether this process was launched for DeepSpeed."""
    return is_switched_on("ACCELERATE_USE_DEEPSPEED")


def check_zero(settings: TrainingSettings) -> None:
    """Checks that what was launched can be trained by DeepSpeed.

    Raises:
        TrainingError: This process was not launched as one of several, computes elsewhere than DeepSpeed does, or there
            is a teacher, which it does not know.
        MachineError: DeepSpeed is not installed.
    """
    if not is_zero():
        return
    if importlib.util.find_spec("deepspeed") is None:
        raise MachineError(
            "training: DeepSpeed is asked for by ACCELERATE_USE_DEEPSPEED, and is not installed",
            hint="pip install 'dlo-export[deepspeed]', or shard by FSDP: accelerate launch --use_fsdp --fsdp_version 2",
        )
    if "LOCAL_RANK" not in os.environ:
        raise TrainingError(
            "training: DeepSpeed is asked for by ACCELERATE_USE_DEEPSPEED, but this process was launched alone",
            hint="start it by accelerate launch --use_deepspeed, or unset the variable",
        )
    if settings.distill_weight:
        raise TrainingError(
            "training: distill_weight needs a second model on each process, which DeepSpeed does not shard",
            hint="distil without DeepSpeed",
        )
    from deepspeed.accelerator import get_accelerator  # noqa: PLC0415 - where it is installed

    for handler in logging.getLogger("DeepSpeed").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(sys.stderr)  # stdout is data
    found = get_accelerator().device_name()
    if found != settings.device:
        raise TrainingError(
            f"training: device is {settings.device!r}, DeepSpeed computes on {found!r}",
            hint=f"set DS_ACCELERATOR={settings.device}, or give --device {found}",
        )


def process_backend(settings: TrainingSettings) -> str | None:
    """What processes talk by; None for what Accelerate chooses, which knows nothing for DeepSpeed on CPUs."""
    return "gloo" if is_zero() and settings.device == "cpu" else None


def configure_zero(accelerator: Accelerator, model: LlamaDloForCausalLM, settings: TrainingSettings) -> None:
    """Tells DeepSpeed what a launcher cannot know of the model.

    A layer's weights are gathered together: of routed layers, a process runs an MLP only if one of its tokens wants it,
    and one that gathered alone would wait for the others for ever. Casts are left to autocast: DeepSpeed's own 16-bit
    modes would take the routers to 16 bits with the rest, and it switches off an autocast around its forward pass.

    Raises:
        TrainingError: What was launched casts weights, or shards nothing.
    """
    plugin = accelerator.state.deepspeed_plugin
    config = plugin.deepspeed_config
    for kind in ("bf16", "fp16", "torch_autocast"):
        if str(config.get(kind, {}).get("enabled", False)).lower() == "true":
            raise TrainingError(
                f"training: DeepSpeed's configuration enables {kind}, which takes routers to 16 bits",
                hint="leave it out there, and give --dtype bf16",
            )
    if plugin.zero_stage not in (1, 2, 3):
        raise TrainingError(
            f"training: DeepSpeed's ZeRO stage {plugin.zero_stage} shards nothing",
            hint="launch with --zero_stage 2 or 3; or without DeepSpeed, for copies of the model",
        )
    if plugin.zero_stage == 3:
        from deepspeed.utils import set_z3_leaf_modules  # noqa: PLC0415 - where it is installed

        set_z3_leaf_modules(model, [*{type(layer) for layer in model.model.layers}])
        model.enable_input_require_grads()  # what tells DeepSpeed that a frozen first layer is done with
    if settings.dtype == "bf16":
        model.forward = torch.autocast(settings.device, torch.bfloat16)(model.forward)


@contextmanager
def gathered(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """While this is entered, parameters of which each process has a shard are whole; all processes have to enter."""
    partitioned = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not partitioned:
        yield
        return
    import deepspeed  # noqa: PLC0415 - where it is installed

    with deepspeed.zero.GatheredParameters(partitioned):
        yield
