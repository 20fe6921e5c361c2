"""What `dlo train` and transformers' own Trainer are both given, where they are compared."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaForCausalLM, Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from dlo_export.modeling.training.compilation import compile_layers, compile_loss
from dlo_export.modeling.training.documents import TokenDocument
from dlo_export.modeling.training.packing import PackedDocuments, stacked
from dlo_export.modeling.training.run import training_arguments
from dlo_export.modeling.training.settings import TrainingSettings


def random_sequences(settings: TrainingSettings, vocabulary: int, count: int) -> PackedDocuments:
    """So many sequences without padding, each of two documents."""
    half = settings.sequence // 2
    ids = np.random.default_rng(0).integers(0, vocabulary, (2 * count, half), np.int32)
    documents = [TokenDocument("", tokens, np.ones(half, bool)) for tokens in ids]
    return PackedDocuments(documents, 2 * half)


def train_by_trainer(
    model: LlamaForCausalLM,
    settings: TrainingSettings,
    data: PackedDocuments,
    run: Path,
    stepped: Callable[[], None],
) -> None:
    """Trains a dense model by transformers' Trainer alone.

    Args:
        model: To train.
        settings: Of `dlo train`, as far as it is the Trainer that heeds them.
        data: To learn.
        run: Folder that the Trainer may write to.
        stepped: Called after each step.
    """
    if settings.compile:  # as ours is
        compile_layers(model)
        compile_loss(model)
    arguments = training_arguments(settings, run, saves=False)
    arguments.eval_strategy = "no"
    trainer = Trainer(model, arguments, data_collator=_batch, train_dataset=data, callbacks=[_Stepped(stepped)])
    trainer.remove_callback(PrinterCallback)
    trainer.train()


class _Stepped(TrainerCallback):
    def __init__(self, stepped: Callable[[], None]) -> None:
        self._stepped = stepped

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # a fair clock: steps of `dlo train` wait for their loss
        self._stepped()


def _batch(sequences: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in stacked(sequences).items() if name != "counted"}
