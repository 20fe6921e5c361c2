"""Everything a training run depends on besides its model and its data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from dlo_export.checkpoints.device_options import parse_device
from dlo_export.modeling.training.errors import TrainingError

# The words of settings that are choices, as the command offers them.
Mode = Literal["full", "routers", "new-layers", "lora"]
Labels = Literal["cos-global", "cos", "self"]
Selection = Literal["top-k", "threshold", "annealed"]
LongChats = Literal["error", "truncate", "skip"]
Dtype = Literal["fp32", "bf16"]
_COLDEST = 0.1
_LOSSES = ("language_weight", "distill_weight", "skip_weight", "rate_weight")
_RANGES: Mapping[tuple[str, ...], tuple[Callable[[float], bool], str]] = {
    ("target",): (lambda value: 0 < value <= 1, "a capacity above 0 and at most 1"),
    ("epochs", "learning_rate", "router_learning_rate", "max_grad_norm"): (lambda value: value > 0, "more than 0"),
    (*_LOSSES, "anneal_steps", "soft_steps"): (lambda value: value >= 0, "at least 0"),
    ("seed",): (lambda value: 0 <= value < 2**32, "from 0 to below 2**32"),
    ("warmup", "held_out"): (lambda value: 0 <= value < 1, "a share from 0 to below 1"),
    ("batch", "accumulate", "max_steps", "lora_rank", "eval_every", "save_every"): (
        lambda value: value >= 1,
        "at least 1",
    ),
    ("sequence",): (lambda value: value >= 2, "at least 2 tokens"),
}


@dataclass(frozen=True)
class TrainingSettings:
    """How a model is trained. A run is resumed with the same values or not at all.

    Attributes:
        mode: What learns: ``full``: all; ``routers``: these alone; ``new-layers``: they and the injected layers;
            ``lora``: they and low-rank matrices beside the projections of attention and MLP, merged at the end.
        target: Share of tokens that are not to skip, over the routed layers.
        anneal_steps: Steps over which the target falls from 1.
        labels: How tokens are labelled: ``cos-global`` pools the layers' similarities, ``cos`` takes each layer alone,
            ``self`` takes the tokens that were selected.
        selection: Which tokens do not skip in training: ``top-k`` as DLO has it; ``threshold`` as inference does; or
            ``annealed``: as inference does, by soft gates that harden over `soft_steps`.
        soft_steps: Steps over which annealed gates harden.
        language_weight: Of the language loss.
        distill_weight: Of the divergence, on the learned tokens, from the model as it is before the run, unrouted.
        skip_weight: Of the cross entropy between scores and labels.
        rate_weight: Of the squared distance between the rate at inference and the target.
        exact_rate: Shift the routers' thresholds in the end where held-out text is more than a hundredth of the tokens
            off the target.
        epochs: Passes over the data.
        max_steps: Optimiser steps, in place of epochs; None for epochs.
        batch: Sequences of a micro-batch, per process.
        accumulate: Micro-batches of a step, per process.
        sequence: Tokens of a sequence, which short documents share.
        long_chats: What to do about chats longer than a sequence.
        learning_rate: Of everything but the routers, at its height; cosine.
        router_learning_rate: Of the routers, likewise.
        relative_router_rate: Multiply each router's rate by the root mean square of its weights as the run starts, or
            that of the others where it is all zeros. The residual stream grows by orders of magnitude from layer to
            layer, and fitted routers are the smaller: a rate that is right for one sweeps away what another was fitted
            to in a single step.
        layer_wise: Multiply each layer's rate by its capacity + 1 - the mean capacity.
        warmup: Share of the steps over which learning rates rise.
        max_grad_norm: To which gradients are clipped.
        dtype: ``fp32``, or ``bf16``: by autocast, with weights and routers in fp32.
        gradient_checkpointing: Compute each layer twice instead of keeping its activations.
        compile: Compile the layers by torch.compile, in training; evaluation runs them as they are.
        lora_rank: Of ``lora``'s matrices.
        held_out: Share of the documents kept for evaluation where no others are given.
        eval_every: Steps between evaluations.
        save_every: Steps between checkpoints.
        seed: Of the order of the data, of what is held out, and of LoRA's matrices.
        device: "cpu" or "cuda": which GPU, CUDA_VISIBLE_DEVICES says, or whoever starts several processes.
    """

    mode: str = "full"
    target: float = 0.9
    anneal_steps: int = 1000
    labels: str = "cos-global"
    selection: str = "top-k"
    soft_steps: int = 100
    language_weight: float = 1.0
    distill_weight: float = 0.0
    skip_weight: float = 1.0
    rate_weight: float = 10.0
    exact_rate: bool = True
    epochs: float = 1.0
    max_steps: int | None = None
    batch: int = 4
    accumulate: int = 1
    sequence: int = 1024
    long_chats: str = "error"
    learning_rate: float = 2e-5
    router_learning_rate: float = 1e-3
    relative_router_rate: bool = False
    layer_wise: bool = True
    warmup: float = 0.03
    max_grad_norm: float = 1.0
    dtype: str = "fp32"
    gradient_checkpointing: bool = False
    compile: bool = False
    lora_rank: int = 16
    held_out: float = 0.02
    eval_every: int = 200
    save_every: int = 200
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        """Raises TrainingError, which lists every value out of range."""
        if problems := [*self._problems()]:
            raise TrainingError(f"training: {'; '.join(problems)}", hint="`dlo train --help` says what each one does")

    def rate(self, step: int) -> float:
        """The share of tokens to keep active at a step: falls linearly from 1 to the target, then stays."""
        if step >= self.anneal_steps:
            return self.target
        return 1.0 - (1.0 - self.target) * step / self.anneal_steps

    def temperature(self, step: int) -> float | None:
        """Of annealed gates at a step: falls geometrically from 1 to `_COLDEST`; None once decisions are hard."""
        return None if step >= self.soft_steps else _COLDEST ** (step / self.soft_steps)

    def _problems(self) -> Iterator[str]:
        choices = {
            "mode": get_args(Mode),
            "labels": get_args(Labels),
            "selection": get_args(Selection),
            "long_chats": get_args(LongChats),
            "dtype": get_args(Dtype),
        }
        for name, values in choices.items():
            if getattr(self, name) not in values:
                yield f"{name} is {getattr(self, name)!r}, expected one of {', '.join(values)}"
        if not any(getattr(self, name) for name in _LOSSES):
            yield f"{', '.join(_LOSSES)} are all 0, expected one of them to be learned from"
        if parse_device(self.device).index not in (None, 0):
            yield f"device is {self.device!r}, expected cpu or cuda; CUDA_VISIBLE_DEVICES chooses the GPU"
        for names, (is_allowed, expected) in _RANGES.items():
            for name in names:
                if (value := getattr(self, name)) is not None and not (math.isfinite(value) and is_allowed(value)):
                    yield f"{name} is {value}, expected {expected}"
