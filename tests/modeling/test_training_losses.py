import itertools
import math
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dlo_export.modeling.routing import TrainingRouting, is_active, mixed, straight_through
from dlo_export.modeling.training.errors import TrainingError
from dlo_export.modeling.training.selection import annealed_gates, threshold_selection, top_k_selection
from dlo_export.modeling.training.settings import TrainingSettings
from dlo_export.modeling.training.skip_loss import router_losses, skip_labels

COUNTED = torch.tensor([[True, True, True, True, False], [True, True, True, False, False]])


def routing(*layers: int, seed: int = 0) -> dict[int, TrainingRouting]:
    """Random values, other ones for every layer, the same ones for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for layer in layers:
        scores, similarity = torch.rand(2, 2, 5, generator=generator)
        found[layer] = TrainingRouting(scores, scores > 0.5, similarity)
    return found


def test_top_k_takes_the_highest_scores_of_real_tokens() -> None:
    scores = torch.tensor([[0.1, 0.9, 0.3, 0.8, 1.0], [0.2, 0.4, 0.7, 1.0, 1.0]])
    select = top_k_selection({3: 0.5, 4: 0.01, 5: 1.0}, COUNTED)
    assert (select[3](scores) & COUNTED).nonzero().tolist() == [[0, 1], [0, 3], [1, 1], [1, 2]]  # ceil(7 · 0.5)
    assert (select[4](scores) & COUNTED).nonzero().tolist() == [[0, 1]]
    assert (select[5](scores) & COUNTED).equal(COUNTED)


def test_top_k_takes_no_token_more_when_the_product_of_number_and_share_is_rounded_up() -> None:
    select = top_k_selection({0: 0.07}, torch.ones(1, 100, dtype=torch.bool))  # in float64, 100 · 0.07 is more than 7
    assert int(select[0](torch.linspace(0, 1, 100)).sum()) == 7


def test_top_k_takes_all_equals_when_they_tie() -> None:
    assert top_k_selection({0: 0.2}, COUNTED)[0](torch.full((2, 5), 0.5)).masked_select(COUNTED).all()


def test_threshold_takes_what_inference_takes_and_what_a_new_router_scores() -> None:
    scores = torch.tensor([[0.4, 0.5, 0.5000001, 0.9]])
    assert threshold_selection({3: 0.5}, {})[3](scores).tolist() == [[False, True, True, True]]


@pytest.mark.parametrize(("rate", "count"), [(0.5, 7), (0.9, 13), (1.0, 14), (0.01, 1)])
def test_cos_global_labels_exactly_the_share_of_all_layers_tokens(rate: float, count: int) -> None:
    values = routing(1, 4)
    labels = skip_labels("cos-global", values, COUNTED, rate)
    assert sum(int(chosen.sum()) for chosen in labels.values()) == count  # ceil(14 · rate)
    assert not any((chosen & ~COUNTED).any() for chosen in labels.values())
    active = torch.cat([values[layer].similarity[labels[layer]] for layer in labels])
    skipped = torch.cat([values[layer].similarity[COUNTED & ~labels[layer]] for layer in labels])
    assert not len(skipped) or active.max() <= skipped.min()


def test_labels_are_exact_when_similarities_tie() -> None:
    values = {layer: TrainingRouting(*3 * [torch.ones(2, 5)]) for layer in (0, 1)}
    labels = skip_labels("cos-global", values, COUNTED, 0.5)
    assert [int(chosen.sum()) for chosen in labels.values()] == [7, 0]


def test_cos_labels_each_layer_alone_and_self_what_was_selected() -> None:
    values = routing(0, 1, 2)
    assert [int(chosen.sum()) for chosen in skip_labels("cos", values, COUNTED, 0.5).values()] == [4, 4, 4]
    labels = skip_labels("self", values, COUNTED, 0.5)
    assert all(labels[layer].equal(values[layer].active & COUNTED) for layer in values)


def test_padding_counts_nowhere() -> None:
    values = routing(0, 1)
    other = {
        layer: TrainingRouting(
            *(torch.where(COUNTED, value, ~value if value.dtype == torch.bool else 0.99) for value in v)
        )
        for layer, v in values.items()
    }
    results = []
    for each in (values, other):
        labels = skip_labels("cos-global", each, COUNTED, 0.6)
        results.append((labels, router_losses(each, labels, COUNTED, 0.6)))
    assert all(results[0][0][layer].equal(results[1][0][layer]) for layer in values)
    first, second = (result[1] for result in results)
    assert (first.skip, first.rate, first.active, first.selected) == (
        second.skip,
        second.rate,
        second.active,
        second.selected,
    )


def test_skip_loss_is_ln_2_when_routers_are_zero() -> None:
    values = {0: TrainingRouting(torch.full((2, 5), 0.5), *routing(0)[0][1:])}
    losses = router_losses(values, skip_labels("cos", values, COUNTED, 0.5), COUNTED, 0.5)
    assert losses.skip.item() == pytest.approx(math.log(2))
    assert losses.active == 0


@pytest.mark.parametrize("wanted", [0.2, 0.9])
def test_rate_loss_pulls_inferences_rate_towards_the_target(wanted: float) -> None:
    scores = torch.linspace(0.1, 0.9, 10).reshape(2, 5).requires_grad_()
    values = {0: TrainingRouting(scores, scores > 0.5, torch.rand(2, 5))}
    losses = router_losses(values, skip_labels("self", values, COUNTED, wanted), COUNTED, wanted)
    hard = float((scores > 0.5)[COUNTED].float().mean())
    assert losses.rate.item() == pytest.approx((hard - wanted) ** 2)
    losses.rate.backward()
    assert (scores.grad[COUNTED] * (hard - wanted) > 0).all()
    assert not scores.grad[~COUNTED].any()


def test_settings_list_all_that_is_out_of_range() -> None:
    with pytest.raises(
        TrainingError, match=r"mode is 'all'.*; target is 1\.5, expected a capacity above 0.*; batch is 0"
    ):
        TrainingSettings(mode="all", target=1.5, batch=0)
    with pytest.raises(TrainingError, match="learning_rate is nan"):
        TrainingSettings(learning_rate=math.nan)
    with pytest.raises(TrainingError, match=r"rate_weight are all 0.*; seed is 4294967296, expected from 0"):
        TrainingSettings(language_weight=0, skip_weight=0, rate_weight=0, seed=2**32)


def test_rate_falls_linearly_to_the_target_then_stays() -> None:
    settings = TrainingSettings(target=0.6, anneal_steps=4)
    assert [settings.rate(step) for step in (0, 1, 4, 9)] == pytest.approx([1.0, 0.9, 0.6, 0.6])
    assert TrainingSettings(target=0.6, anneal_steps=0).rate(0) == 0.6


def test_annealed_gates_harden_into_the_decision_when_the_temperature_falls() -> None:
    scores, threshold = torch.tensor([0.05, 0.29, 0.31, 0.9]), 0.3
    active = is_active(scores, threshold)
    found = [annealed_gates({4: 1.0}, {4: threshold}, temperature) for temperature in (1.0, 0.1, 0.001)]
    gates = [gate[4](scores) for gate in found if gate is not None]
    for gate in gates:
        assert ((gate > 0.5) == active).all()
    distances = [(gate - active.float()).abs() for gate in gates]
    assert all((later <= earlier).all() for earlier, later in itertools.pairwise(distances))
    assert annealed_gates({4: 1.0}, {4: threshold}, None) is None  # decisions are hard
    # At a temperature of 1 and a threshold of one half, the gate is the score.
    half = annealed_gates({3: 1.0}, {}, 1.0)
    assert half is not None
    torch.testing.assert_close(half[3](scores), scores)


@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_annealed_gates_have_a_gradient_for_skipped_tokens(temperature: float) -> None:
    scores = torch.tensor([0.2, 0.45, 0.8], requires_grad=True)
    gates = annealed_gates({0: 1.0}, {}, temperature)
    assert gates is not None
    computed, kept = torch.ones(1, 3, 2), torch.zeros(1, 3, 2)
    chosen = mixed(computed, kept, gates[0](scores).unsqueeze(0))
    torch.testing.assert_close(chosen[0, :, 0], gates[0](scores))
    chosen.sum().backward()
    assert scores.grad is not None
    assert (scores.grad > 0).all()


def test_temperature_falls_geometrically_and_then_decisions_are_hard() -> None:
    settings = TrainingSettings(soft_steps=10)
    assert [settings.temperature(step) for step in (0, 10, 11)] == [1.0, None, None]
    assert settings.temperature(5) == pytest.approx(math.sqrt(0.1))
    assert TrainingSettings(soft_steps=0).temperature(0) is None


def test_rate_is_that_of_the_thresholds_when_routers_have_their_own() -> None:
    values = routing(0, 1)
    labels = skip_labels("self", values, COUNTED, 0.5)
    losses = router_losses(values, labels, COUNTED, 0.5, {1: 0.8})
    scores = [values[layer].scores[COUNTED] for layer in (0, 1)]
    assert int(losses.active) == int((scores[0] > 0.5).sum()) + int((scores[1] > 0.8).sum())
    assert losses.labelled.tolist() == [int(chosen.sum()) for chosen in labels.values()]
    assert threshold_selection({1: 0.5}, {1: 0.8})[1](values[1].scores).equal(values[1].scores > 0.8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_choice_has_the_gradient_of_the_score_it_was_made_by(dtype: torch.dtype) -> None:
    def by_definition(
        computed: torch.Tensor, kept: torch.Tensor, scores: torch.Tensor, active: torch.Tensor
    ) -> torch.Tensor:
        step = (scores - scores.detach()).unsqueeze(-1)  # 0, with the score's gradient
        return torch.where(active.unsqueeze(-1), computed, kept) + step.to(dtype) * (computed - kept).detach()

    torch.manual_seed(0)
    computed, kept, outer = (torch.randn(2, 5, 8, dtype=dtype) for _ in range(3))
    inputs = [computed.requires_grad_(), kept.requires_grad_(), torch.rand(2, 5, requires_grad=True)]
    active = inputs[2].detach() > 0.5
    found, expected = (
        (choice.detach(), *torch.autograd.grad((choice * outer).sum(), inputs))
        for choice in (straight_through(*inputs, active), by_definition(*inputs, active))
    )
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


class _WhatWaits(TorchDispatchMode):
    """Notes what would have the host wait for a GPU: numbers copied there or fetched, sizes that depend on data."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = operator.name()
        if name in ("aten::lift_fresh", "aten::_local_scalar_dense", "aten::nonzero", "aten::index.Tensor"):
            self.found.add(name)
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize("labels", ["cos-global", "cos", "self"])
def test_routers_losses_never_wait_for_a_gpu(labels: str) -> None:
    values, thresholds, capacities = routing(1, 4), {4: 0.75}, {1: 0.5, 4: 0.25}
    with _WhatWaits() as noted:
        for select in (top_k_selection(capacities, COUNTED), threshold_selection(capacities, thresholds)):
            select[4](values[4].scores)
        gates = annealed_gates(capacities, thresholds, 0.5, COUNTED.device)
        assert gates is not None
        gates[4](values[4].scores)
        router_losses(values, skip_labels(labels, values, COUNTED, 0.5), COUNTED, 0.5, thresholds)
    assert not noted.found
    with _WhatWaits() as noted:  # it does note
        torch.tensor([1.0, 2.0])[COUNTED[0, :2]].sum().item()
    assert len(noted.found) == 3
