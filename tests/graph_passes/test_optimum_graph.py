"""The passes on a Llama as optimum exports it: opset 18, decomposed attention and norms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from safetensors.numpy import load_file

from dlo_export.graph_passes.find.decoder_layers import find_decoder_layers
from dlo_export.graph_passes.lowerings.lower_skip_to_compaction import RECORD, LowerSkipToCompactionPass
from dlo_export.graph_passes.routing.expose_routing import ExposeRoutingPass
from dlo_export.graph_passes.routing.route_layers import RouteLayersPass
from dlo_export.graph_passes.spec.invariants import INJECTED, ROUTED, check_stage
from tests.graph_passes.harness import make_session
from tests.graph_passes.injections import injection_pass
from tests.graph_passes.numpy_llama import NumpyLlama, Routing
from tests.initial_arrays import init_tensor

FOLDER = Path(__file__).parent.parent / "data" / "optimum_llama"
LAYERS, HIDDEN, KV_HEADS, HEAD_DIM = 3, 32, 2, 8
BATCH, SEQUENCE, PADDING = 2, 9, 3
# New layers at both ends, next to each other, and before their source.
PLAN = ((0, 1), (2, 0), (3, 0), (6, 2))
TOLERANCE = 2e-5


def _graph() -> ir.Model:
    return ir.load(FOLDER / "model.onnx")


def _weights() -> dict[str, np.ndarray]:
    return load_file(FOLDER / "model.safetensors")


def _tokens() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids, mask (second sequence padded at the left) and positions, [batch, sequence] each."""
    expected = np.load(FOLDER / "expected.npz")
    return expected["input_ids"], expected["attention_mask"], expected["position_ids"]


def _numpy_llama(weights: Mapping[str, np.ndarray], layers: int) -> NumpyLlama:
    return NumpyLlama(weights, layers, num_heads=4, num_kv_heads=KV_HEADS)


def _deepened(weights: Mapping[str, np.ndarray], init: str) -> dict[str, np.ndarray]:
    """The checkpoint of the deepened model, built from the base checkpoint without looking at any graph."""
    sources = dict(PLAN)
    originals = iter(range(LAYERS))
    deepened = {name: array for name, array in weights.items() if ".layers." not in name}
    for position in range(LAYERS + len(PLAN)):
        layer = sources[position] if position in sources else next(originals)
        for name, array in weights.items():
            prefix = f"model.layers.{layer}."
            if not name.startswith(prefix):
                continue
            role = name.removeprefix(prefix)
            if position in sources:
                previous = weights.get(f"model.layers.{layer - 1}.{role}")
                array = init_tensor(init, role, array, previous, seed=(0, position))  # noqa: PLW2901
            deepened[f"model.layers.{position}.{role}"] = array
    return deepened


def _routing(depth: int, layers: Sequence[int], **scale: float | bool) -> Routing:
    rng = np.random.default_rng(1)
    routers = rng.standard_normal((depth, HIDDEN)).astype(np.float32)
    return Routing({layer: routers[layer] for layer in layers}, **scale)


def _route_pass(routing: Routing) -> RouteLayersPass:
    return RouteLayersPass(routing.routers, routing.rescale, routing.scale_factor, routing.scale_gap)


def _run(
    model: ir.Model, depth: int, chunks: Sequence[int], tokens: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None
) -> dict[str, np.ndarray]:
    """Feed the tokens in chunks of the given lengths, with the cache between them; outputs joined by token."""
    input_ids, attention_mask, position_ids = tokens or _tokens()
    session = make_session(model, ort.GraphOptimizationLevel.ORT_ENABLE_ALL)
    names = [output.name for output in session.get_outputs()]
    empty = np.zeros((input_ids.shape[0], KV_HEADS, 0, HEAD_DIM), np.float32)
    cache = {f"past_key_values.{layer}.{part}": empty for layer in range(depth) for part in ("key", "value")}
    joined: dict[str, list[np.ndarray]] = {}
    stop = 0
    for length in chunks:
        start, stop = stop, stop + length
        feeds = {
            "input_ids": input_ids[:, start:stop],
            "attention_mask": attention_mask[:, :stop],
            "position_ids": position_ids[:, start:stop],
            **cache,
        }
        outputs = dict(zip(names, session.run(names, feeds), strict=True))
        cache = {name.replace("past_key_values", "present"): name for name in cache}
        cache = {name: outputs[present] for present, name in cache.items()}
        for name, array in outputs.items():
            if not name.startswith("present."):
                joined.setdefault(name, []).append(array)
    assert stop == input_ids.shape[1]
    return {name: np.concatenate(arrays, 1) for name, arrays in joined.items()}


def _assert_equal_where_real(found: np.ndarray, expected: np.ndarray) -> None:
    real = _tokens()[1].astype(bool)
    np.testing.assert_allclose(found[real], expected[real], rtol=0, atol=TOLERANCE)


def test_numpy_reference_equals_transformers_when_not_routed() -> None:
    result = _numpy_llama(_weights(), LAYERS).run(*_tokens())
    _assert_equal_where_real(result.logits, np.load(FOLDER / "expected.npz")["logits"])


def test_finder_reads_the_weights_when_graph_is_optimums() -> None:
    weights = _weights()
    layers = find_decoder_layers(_graph().graph)
    assert len(layers) == LAYERS
    for layer in layers:
        assert set(layer.projections) >= {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
        for projection in layer.projections.values():
            expected = weights[f"model.layers.{layer.index}.{projection.tensor}"]
            np.testing.assert_array_equal(projection.contents.numpy(), expected)


def test_logits_do_not_change_when_injected_layers_are_zero_out() -> None:
    before = _run(_graph(), LAYERS, [SEQUENCE])["logits"]
    model = _graph()
    injection_pass(model, PLAN, "zero_out")(model)
    check_stage(model, INJECTED)
    after = _run(model, LAYERS + len(PLAN), [4, 1, 1, 3])["logits"]
    np.testing.assert_allclose(after[0], before[0], rtol=0, atol=1e-6)
    _assert_equal_where_real(after, before)


@pytest.mark.parametrize("init", ["copy", "slerp", "random"])
def test_deepened_graph_equals_the_deepened_checkpoint_when_init_is(init: str) -> None:
    model = _graph()
    injection_pass(model, PLAN, init)(model)
    depth = LAYERS + len(PLAN)
    expected = _numpy_llama(_deepened(_weights(), init), depth).run(*_tokens()).logits
    for chunks in ([SEQUENCE], [5, 1, 1, 2]):
        _assert_equal_where_real(_run(model, depth, chunks)["logits"], expected)


@pytest.mark.parametrize("lowered", [False, True], ids=["masked", "compact"])
@pytest.mark.parametrize(
    "scale", [{}, {"rescale": True, "scale_factor": 1.6, "scale_gap": 0.7}], ids=["plain", "scaled"]
)
def test_injected_and_routed_graph_equals_the_reference_when(lowered: bool, scale: dict[str, float]) -> None:
    depth = LAYERS + len(PLAN)
    routing = _routing(depth, (0, 1, 2, 4, 5, 6), **scale)
    expected = _numpy_llama(_deepened(_weights(), "slerp"), depth).run(*_tokens(), routing)
    active = np.mean([decision.mean() for decision in expected.active.values()])
    assert 0.2 < active < 0.8, "the test needs tokens of both kinds"

    model = _graph()
    passes = [
        injection_pass(model, PLAN, "slerp"),
        _route_pass(routing),
        *([LowerSkipToCompactionPass()] if lowered else []),
    ]
    for pass_ in passes:
        assert pass_(model).modified
    check_stage(model, RECORD.stage if lowered else ROUTED)
    for pass_ in reversed(passes[1:]):
        assert not pass_(model).modified
    ExposeRoutingPass()(model)
    for chunks in ([SEQUENCE], [4, 1, 1, 3], [1] * SEQUENCE):
        outputs = _run(model, depth, chunks)
        for layer, scores in expected.scores.items():
            _assert_equal_where_real(outputs[f"router_scores.{layer}"], scores)
        _assert_equal_where_real(outputs["logits"], expected.logits)


@pytest.mark.parametrize("sign", [-1, 1], ids=["all_skipped", "all_active"])
def test_compacted_graph_equals_the_reference_when_every_token_is(sign: int) -> None:
    # Every embedding of the table leans to one side of this router, which routes layer 0 by embedding alone.
    weights = _weights()
    table = weights["model.embed_tokens.weight"]
    router = sign * 50 * np.linalg.lstsq(table, np.ones(len(table), np.float32), rcond=None)[0]
    input_ids, attention_mask, position_ids = _tokens()
    leaning = np.flatnonzero(table @ router * sign > 1)[:SEQUENCE]
    assert len(leaning) == SEQUENCE
    tokens = (np.tile(leaning, (BATCH, 1)), attention_mask, position_ids)
    expected = _numpy_llama(weights, LAYERS).run(*tokens, Routing({0: router}))
    assert expected.active[0].all() == (sign == 1)
    assert expected.active[0].any() == (sign == 1)
    model = _graph()
    RouteLayersPass({0: router})(model)
    LowerSkipToCompactionPass()(model)
    _assert_equal_where_real(_run(model, LAYERS, [6, 1, 2], tokens)["logits"], expected.logits)
    assert input_ids.shape == tokens[0].shape


def test_padding_does_not_change_real_tokens_when_graph_is_compacted() -> None:
    routing = _routing(LAYERS, range(LAYERS))
    model = _graph()
    _route_pass(routing)(model)
    LowerSkipToCompactionPass()(model)
    padded = _run(model, LAYERS, [SEQUENCE])["logits"][1, PADDING:]
    input_ids, attention_mask, position_ids = (array[1:, PADDING:] for array in _tokens())
    alone = _run(model, LAYERS, [SEQUENCE - PADDING], (input_ids, attention_mask, position_ids))["logits"][0]
    np.testing.assert_allclose(padded, alone, rtol=0, atol=TOLERANCE)
