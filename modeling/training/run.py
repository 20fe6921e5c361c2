"""Trains a model: from its settings to transformers' Trainer and back."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch._dynamo.exc import BackendCompilerFailed
from torch._inductor.exc import InductorError
from transformers import TrainingArguments
from transformers.utils import logging as transformers_logging

from dlo_export.checkpoints.errors import MachineError
from dlo_export.modeling.devices import torch_device
from dlo_export.modeling.llama_dlo import LlamaDloForCausalLM
from dlo_export.modeling.training.compilation import compile_layers, compile_loss
from dlo_export.modeling.training.distillation import dense_teacher
from dlo_export.modeling.training.fused_norm import use_fused_norms
from dlo_export.modeling.training.packing import PackedSets
from dlo_export.modeling.training.parameters import choose_parameters
from dlo_export.modeling.training.reports import HeldOut, RateControl, StepReport
from dlo_export.modeling.training.run_folder import RunFolder
from dlo_export.modeling.training.settings import TrainingSettings
from dlo_export.modeling.training.sharding import check_processes, check_sharding
from dlo_export.modeling.training.trainer import DloTrainer
from dlo_export.modeling.training.zero import check_zero, is_zero, process_backend


@dataclass(frozen=True)
class TrainingResult:
    """A finished or stopped run.

    Attributes:
        step: Steps done.
        steps: Steps there are.
        stopped: It was asked to stop, and can be resumed.
        held_out: What held-out text says of the trained model; None for a stopped run.
        rate_control: How its rate was brought to the target; None for a stopped run, without routers, or where that was
            not asked for.
        others: What other text says of it, by name; empty for a stopped run.
        is_main: Whether this process is the one that writes.
    """

    step: int
    steps: int
    stopped: bool
    held_out: HeldOut | None
    rate_control: RateControl | None
    others: Mapping[str, HeldOut]
    is_main: bool


def train_model(
    model: LlamaDloForCausalLM,
    settings: TrainingSettings,
    data: PackedSets,
    *,
    folder: RunFolder,
    description: Mapping[str, Any],
    resume: bool = False,
    report: Callable[[StepReport], None] = lambda _report: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> TrainingResult:
    """Trains a model in place.

    Several processes that `accelerate launch` started train it together; each calls this with the same arguments.

    Args:
        model: In float32.
        settings: Of the run.
        data: To learn from and to measure on.
        folder: Of the run; it must be new, or `resume` set.
        description: What `training.json` says, see `RunFolder.begin`.
        resume: Go on from the folder's last checkpoint.
        report: Called after each step, in the main process.
        should_stop: Asked after each step; the run is saved and ends, to be resumed later.

    Raises:
        TrainingError: The settings do not fit the model, or the run to resume is another one.
        TrainingDivergedError: A loss or gradient is not finite; the last checkpoint is intact.
        MachineError: There is no such device, or a checkpoint cannot be written.
    """
    torch_device(settings.device)  # or it says why not, before anything is written
    check_sharding(settings)
    check_zero(settings)
    transformers_logging.disable_progress_bar()  # of its own, of each file it saves
    teacher = dense_teacher(model, settings.mode) if settings.distill_weight else None
    choose_parameters(model, settings)
    if settings.device != "cpu":  # where launching and rereading is what a step's time goes to
        for each in filter(None, (model, teacher)):
            use_fused_norms(each)
    if settings.compile:
        for each in filter(None, (model, teacher)):
            compile_layers(each)
        compile_loss(model)
    arguments = training_arguments(settings, folder.path, saves=folder.resumable)
    check_processes()
    if arguments.process_index == 0:
        folder.begin(description, resume=resume)
    trainer = DloTrainer(
        model,
        settings,
        arguments,
        teacher=teacher,
        data=data,
        folder=folder,
        report=report,
        should_stop=should_stop,
    )
    if arguments.process_index == 0 and importlib.util.find_spec("tensorboard") is not None:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - where it is installed
        from transformers.integrations.integration_utils import TensorBoardCallback  # noqa: PLC0415

        trainer.add_callback(TensorBoardCallback(SummaryWriter(log_dir=str(folder.path / "tensorboard"))))
    try:
        trainer.train_from(folder.checkpoint_to_resume() if resume else None)
    except (BackendCompilerFailed, InductorError) as err:
        raise MachineError(
            f"training: torch.compile failed: {str(err).splitlines()[0]}",
            hint="it needs a C++ compiler, and Triton on a GPU; or train without --compile",
        ) from err
    # A run that was resumed at its very end has nothing measured yet.
    measured = None if trainer.stopped else trainer.measured or trainer.measuring.measure()
    controlled = None
    if settings.exact_rate and trainer.capacities and not trainer.stopped:
        controlled = trainer.measuring.control_rate()
        if controlled.after != controlled.before:
            measured = trainer.measuring.measure()
    others = {} if trainer.stopped else {name: trainer.measuring.measure(text) for name, text in data.others.items()}
    return TrainingResult(
        step=trainer.state.global_step,
        steps=trainer.state.max_steps,
        stopped=trainer.stopped,
        held_out=measured,
        rate_control=controlled,
        others=others,
        is_main=trainer.is_world_process_zero(),
    )


def training_arguments(settings: TrainingSettings, folder: Path, *, saves: bool = True) -> TrainingArguments:
    """The settings in transformers' words.

    Args:
        settings: Of the run.
        folder: Of the run.
        saves: Whether there are checkpoints to go on from.
    """
    return TrainingArguments(
        output_dir=str(folder),
        # Accelerate asks for DeepSpeed only where it was not told of a CPU, and DeepSpeed's bf16 is no autocast.
        use_cpu=settings.device == "cpu" and not is_zero(),
        ddp_backend=process_backend(settings),
        bf16=settings.dtype == "bf16" and not is_zero(),
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        per_device_train_batch_size=settings.batch,
        gradient_accumulation_steps=settings.accumulate,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=settings.warmup,
        weight_decay=0.0,
        max_grad_norm=settings.max_grad_norm,
        **_checkpointing(settings),
        seed=settings.seed,
        data_seed=settings.seed,
        eval_strategy="steps",
        eval_steps=settings.eval_every,
        save_strategy="steps" if saves else "no",
        save_steps=settings.save_every,
        ddp_find_unused_parameters=False,
        remove_unused_columns=False,
        # Steps report themselves, exactly and each one.
        logging_strategy="no",
        logging_nan_inf_filter=False,
        report_to=[],
        disable_tqdm=True,
    )


def _checkpointing(settings: TrainingSettings) -> dict[str, Any]:
    """What has each layer computed twice: transformers 5.23 calls it by another name than its predecessors."""
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    return {name: settings.gradient_checkpointing, f"{name}_kwargs": {"use_reentrant": False}}
