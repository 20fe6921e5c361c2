"""Similarities, labels and selection against NumPy's computation from the weights: another one, not ours again."""

import math
from collections.abc import Mapping

import numpy as np
import pytest
import torch

from dlo_export.modeling.configuration import LlamaDloConfig
from dlo_export.modeling.llama_dlo import LlamaDloForCausalLM
from dlo_export.modeling.training.selection import top_k_selection
from dlo_export.modeling.training.skip_loss import skip_labels

RATE = 0.6
CAPACITIES = {0: 0.3, 2: 0.9}
COUNTED = np.array([[True] * 9 + [False] * 3, [True] * 12])


@pytest.fixture(scope="module")
def model() -> LlamaDloForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 60, "hidden_size": 24, "intermediate_size": 40, "max_position_embeddings": 64}
    heads = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    scale = {"rescale_hidden_states": True, "scale_factor": 3.0, "scale_gap": 0.5}  # labels know nothing of it
    built = LlamaDloForCausalLM(LlamaDloConfig(**sizes, **heads, **scale, is_dlo=[True, False, True]))
    for name, parameter in built.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return built


@pytest.fixture(scope="module")
def routing(model: LlamaDloForCausalLM) -> tuple[Mapping[int, object], Mapping[int, np.ndarray], list[np.ndarray]]:
    """What the model says of a batch; beside it, what its MLPs were given and the stream before each layer."""
    before: dict[int, np.ndarray] = {}
    for layer in CAPACITIES:
        norm = model.model.layers[layer].post_attention_layernorm

        def note(_norm: torch.nn.Module, given: tuple[torch.Tensor], layer: int = layer) -> None:
            before[layer] = given[0].detach().numpy().reshape(*COUNTED.shape, -1)

        norm.register_forward_pre_hook(note)
    ids = torch.arange(24).reshape(2, 12)
    select = top_k_selection(CAPACITIES, torch.from_numpy(COUNTED))
    output = model(ids, use_cache=False, select_tokens=select, output_hidden_states=True)
    return output.training_routing, before, [stream.detach().numpy() for stream in output.hidden_states]


def numpy_similarity(model: LlamaDloForCausalLM, layer: int, stream: np.ndarray) -> np.ndarray:
    """cos(h, h + MLP(RMS(h))) in float64."""
    weights = {name: value.detach().double().numpy() for name, value in model.model.layers[layer].named_parameters()}
    stream = stream.astype(np.float64)
    mean = (stream**2).mean(-1, keepdims=True)
    normed = stream / np.sqrt(mean + model.config.rms_norm_eps) * weights["post_attention_layernorm.weight"]
    gate = normed @ weights["mlp.gate_proj.weight"].T
    hidden = gate / (1 + np.exp(-gate)) * (normed @ weights["mlp.up_proj.weight"].T)
    after = stream + hidden @ weights["mlp.down_proj.weight"].T
    return (stream * after).sum(-1) / np.linalg.norm(stream, axis=-1) / np.linalg.norm(after, axis=-1)


def numpy_lowest(values: np.ndarray, rate: float) -> np.ndarray:
    chosen = np.zeros(values.shape, bool)
    chosen[np.argsort(values, kind="stable")[: math.ceil(len(values) * rate)]] = True
    return chosen


def test_similarity_is_the_cosine_around_the_whole_unscaled_mlp(model, routing) -> None:
    ours, before, _ = routing
    for layer in CAPACITIES:
        expected = numpy_similarity(model, layer, before[layer])
        np.testing.assert_allclose(ours[layer].similarity, expected, atol=1e-6)
        assert np.ptp(expected) > 0.05


def test_top_k_selection_equals_numpys(model, routing) -> None:
    ours, _, streams = routing
    for layer, capacity in CAPACITIES.items():
        router = model.model.router(layer).weight.detach().double().numpy()[0]
        scores = 1 / (1 + np.exp(-(streams[layer].astype(np.float64) @ router)))
        wanted = math.ceil(COUNTED.sum() * capacity)
        lowest = np.sort(scores[COUNTED])[-wanted]
        np.testing.assert_array_equal(ours[layer].active.numpy()[COUNTED], scores[COUNTED] >= lowest)


@pytest.mark.parametrize("kind", ["cos-global", "cos", "self"])
def test_labels_equal_numpys(model, routing, kind: str) -> None:
    ours, before, _ = routing
    similarities = {layer: numpy_similarity(model, layer, before[layer])[COUNTED] for layer in CAPACITIES}
    if kind == "cos-global":
        pooled = numpy_lowest(np.concatenate([*similarities.values()]), RATE)
        expected = dict(zip(CAPACITIES, np.split(pooled, len(CAPACITIES)), strict=True))
    elif kind == "cos":
        expected = {layer: numpy_lowest(values, RATE) for layer, values in similarities.items()}
    else:
        expected = {layer: ours[layer].active.numpy()[COUNTED] for layer in CAPACITIES}
    labels = skip_labels(kind, ours, torch.from_numpy(COUNTED), RATE)
    for layer in CAPACITIES:
        np.testing.assert_array_equal(labels[layer].numpy()[COUNTED], expected[layer])
        assert not labels[layer].numpy()[~COUNTED].any()
