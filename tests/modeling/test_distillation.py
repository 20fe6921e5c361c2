"""The dense teacher, and how far a model is from it."""

import torch
import torch.nn.functional as F

from dlo_export.modeling.training.distillation import dense_teacher, distillation_loss
from dlo_export.modeling.training.packing import IGNORED
from tests.modeling.training_runs import opened, save_routed


def test_loss_is_the_divergence_of_the_tokens_that_count():
    generator = torch.Generator().manual_seed(0)
    logits, teacher = torch.randn((2, 1, 4, 5), generator=generator)
    labels = torch.tensor([[7, IGNORED, 3, 1]])
    expected = sum(
        (F.softmax(teacher[0, i], -1) * (F.log_softmax(teacher[0, i], -1) - F.log_softmax(logits[0, i], -1))).sum()
        for i in (1, 2)  # what predicts the labels at 2 and 3
    )
    torch.testing.assert_close(distillation_loss(logits, teacher, labels), expected)
    assert distillation_loss(teacher, teacher, labels).abs() < 1e-6


def test_teacher_shares_weights_only_where_they_do_not_learn(tmp_path):
    model = opened(save_routed(tmp_path / "model"))
    name = "model.layers.0.mlp.up_proj.weight"
    for mode, shares in (("routers", True), ("lora", True), ("full", False), ("new-layers", False)):
        teacher = dense_teacher(model, mode)
        assert (teacher.get_parameter(name).data_ptr() == model.get_parameter(name).data_ptr()) is shares, mode
        assert not any(parameter.requires_grad for parameter in teacher.parameters()) or shares
        assert not [key for key, _ in teacher.named_parameters() if "router" in key]
