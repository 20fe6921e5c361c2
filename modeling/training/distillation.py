"""The model before routing as the teacher of the routed one."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F

from dlo_export.modeling.calibration.evaluation import with_routers
from dlo_export.modeling.llama_dlo import LlamaDloForCausalLM
from dlo_export.modeling.training.packing import IGNORED

_LEARNING_WEIGHTS = ("full", "new-layers")


def dense_teacher(model: LlamaDloForCausalLM, mode: str) -> LlamaDloForCausalLM:
    """The model as it is now, without routers, frozen. Where its weights are not to learn it shares them.

    Args:
        model: Before LoRA's matrices are added.
        mode: What will learn, see `TrainingSettings`.
    """
    teacher = with_routers(copy.deepcopy(model) if mode in _LEARNING_WEIGHTS else model, {})
    return teacher.requires_grad_(False)


def distillation_loss(logits: torch.Tensor, teacher_logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Summed KL divergence of the teacher's next tokens from the model's, where a label counts.

    Args:
        logits: [batch, sequence, vocabulary].
        teacher_logits: The same.
        labels: int64 [batch, sequence], `IGNORED` where a token does not count.
    """
    learned = labels[:, 1:] != IGNORED
    found = F.log_softmax(logits[:, :-1][learned].float(), dim=-1)
    wanted = F.log_softmax(teacher_logits[:, :-1][learned].float(), dim=-1)
    return F.kl_div(found, wanted, reduction="sum", log_target=True)
