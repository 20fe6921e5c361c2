"""A model in shards on several processes: FSDP2, as `accelerate launch --use_fsdp --fsdp_version 2` asks for it."""

from __future__ import annotations

import os

import torch
from accelerate import Accelerator, PartialState
from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from dlo_export.modeling.llama_dlo import LlamaDloForCausalLM
from dlo_export.modeling.training.errors import TrainingError
from dlo_export.modeling.training.settings import TrainingSettings


def is_switched_on(variable: str) -> bool:
    """Whether a launcher has switched something on by a variable of the environment, as Accelerate reads them."""
    return os.environ.get(variable, "").lower() in {"1", "true"}


def is_sharded() -> bool:
    """Whether this process was launched to hold a shard of the model."""
    return is_switched_on("ACCELERATE_USE_FSDP")


def receives_weights() -> bool:
    """Whether this process gets its weights from the first one, whatever its own model holds."""
    wanted = is_switched_on("FSDP_CPU_RAM_EFFICIENT_LOADING")
    return is_sharded() and wanted and os.environ.get("RANK", "0") != "0"


def check_sharding(settings: TrainingSettings) -> None:
    """Checks that what was launched can be trained in shards.

    Raises:
        TrainingError: It is the first FSDP, which hides parameters from the optimiser's groups, or there is a teacher,
            whose weights nothing shards.
    """
    if not is_sharded():
        return
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise TrainingError("training: FSDP 1 was launched", hint="launch with --fsdp_version 2")
    if settings.distill_weight:
        raise TrainingError(
            "training: distill_weight needs a second model on each process, which FSDP does not shard",
            hint="distil without FSDP",
        )


def check_processes() -> None:
    """Checks that there are processes to hold the shards; Accelerate has found out by now.

    Raises:
        TrainingError: This process is alone, and would train the whole model whatever was asked for.
    """
    if is_sharded() and PartialState().distributed_type == DistributedType.NO:
        raise TrainingError(
            "training: FSDP is asked for by ACCELERATE_USE_FSDP, but this process was launched alone",
            hint="start it by accelerate launch --use_fsdp, or unset the variable",
        )


def shard_on_cpus(accelerator: Accelerator) -> None:
    """Has a model on CPUs sharded as it would be on GPUs.

    Accelerate (1.15) looks at FSDP's settings only where each process has a GPU or the like. Those on CPUs are
    `MULTI_CPU` whatever was launched, and each would silently get a copy of the model.
    """
    if not is_sharded() or accelerator.distributed_type != DistributedType.MULTI_CPU:
        return
    state = accelerator.state
    state.fsdp_plugin = FullyShardedDataParallelPlugin()
    for each in (state, PartialState()):  # the second is what its collectives ask
        each.distributed_type = DistributedType.FSDP
    # Without a mesh of CPUs, PyTorch would make one of the GPUs that the machine may have beside them.
    state.parallelism_config = ParallelismConfig(dp_shard_size=accelerator.num_processes)
    state.device_mesh = state.parallelism_config.get_device_mesh("cpu")


def configure_sharding(accelerator: Accelerator, model: LlamaDloForCausalLM) -> None:
    """Tells FSDP what a launcher cannot know of the model.

    A layer's class goes by its routing, and has to be named right for the layer to be gathered alone. Casts are left to
    autocast, as without shards: FSDP's own would take the routers to 16 bits with the rest.
    """
    plugin = accelerator.state.fsdp_plugin
    plugin.transformer_cls_names_to_wrap = sorted({type(layer).__name__ for layer in model.model.layers})
    plugin.mixed_precision_policy = MixedPrecisionPolicy()


def whole(value: torch.Tensor) -> torch.Tensor:
    """A tensor that may lie in shards on several processes, all of which have to ask for it."""
    return value.full_tensor() if isinstance(value, DTensor) else value
