"""Attention that tokens skip, alone or with the MLP: graphs against NumPy, with a cache and without."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from dlo_export.checkpoints.model_types import RoutingKind
from dlo_export.checkpoints.opening import open_checkpoint
from dlo_export.exporter.plain_graph.llama import plain_graph
from dlo_export.graph_passes.cleanup.attend_active_queries import AttendActiveQueriesPass
from dlo_export.graph_passes.cleanup.fuse_sibling_matmuls import FuseSiblingMatMulsPass
from dlo_export.graph_passes.errors import GraphPassError
from dlo_export.graph_passes.find.data_flow import subgraphs_of
from dlo_export.graph_passes.find.decoder_layers import find_decoder_layers
from dlo_export.graph_passes.lowerings.lower_skip_to_compaction import LowerSkipToCompactionPass
from dlo_export.graph_passes.lowerings.lower_skip_to_if import LowerSkipToIfPass
from dlo_export.graph_passes.routing.expose_routing import ExposeRoutingPass
from dlo_export.graph_passes.routing.route_layers import RouteLayersPass
from dlo_export.graph_passes.spec.invariants import ROUTED, check_stage, lowered_stage
from dlo_export.graph_passes.spec.pass_contract import GraphPass
from tests.bare_session import left_padded
from tests.graph_passes.harness import make_session, run_model
from tests.graph_passes.injections import injection_pass
from tests.graph_passes.numpy_llama import NumpyLlama, Routing
from tests.graph_passes.test_skipping_profile import profiled_shapes
from tests.tiny_models import save_tiny_llama

LAYERS, HIDDEN, HEADS, KV_HEADS, VOCAB = 3, 32, 4, 2, 97
ROUTED_LAYERS = (0, 2)
LOWERINGS: dict[str, tuple[GraphPass, ...]] = {
    "masked": (),
    "compact": (LowerSkipToCompactionPass(),),
    "queries": (LowerSkipToCompactionPass(), AttendActiveQueriesPass(least=2)),
    "rows_fused": (LowerSkipToCompactionPass(branches=False), FuseSiblingMatMulsPass()),
    "if": (LowerSkipToIfPass(),),
}
KINDS: tuple[RoutingKind, ...] = ("layer", "attention", "attention-active")
RULES = {"unscaled": {}, "scaled": {"rescale": True, "scale_factor": 1.6, "scale_gap": 0.4}}


@functools.cache
def _checkpoint(folder: Path, biases: bool) -> Path:
    return save_tiny_llama(folder / f"tiny-{biases}", attention_bias=biases, mlp_bias=False)


def _routers(depth: int, layers: Sequence[int] = ROUTED_LAYERS) -> dict[int, np.ndarray]:
    weights = np.random.default_rng(5).standard_normal((depth, HIDDEN)).astype(np.float32)
    return {layer: weights[layer] for layer in layers}


@dataclasses.dataclass(frozen=True)
class _Model:
    """A graph under test and the weights it was made of."""

    graph: ir.Model
    weights: dict[str, np.ndarray]
    depth: int

    @property
    def numpy(self) -> NumpyLlama:
        return NumpyLlama(self.weights, self.depth, HEADS, KV_HEADS)


def _built(
    folder: Path,
    lowering: str,
    *,
    kind: RoutingKind = "layer",
    rule: str = "scaled",
    biases: bool = False,
    force: bool = False,
) -> _Model:
    with open_checkpoint(str(_checkpoint(folder, biases))) as checkpoint:
        weights = {name: tensor.numpy().astype(np.float32) for name, tensor in checkpoint.tensors.items()}
        graph = plain_graph(checkpoint.config, checkpoint.tensors)
        for value in graph.graph.initializers.values():  # the checkpoint is closed behind this
            assert value.const_value is not None
            value.const_value = ir.tensor(np.array(value.const_value.numpy()), name=value.name)
    for pass_ in (RouteLayersPass(_routers(LAYERS), **RULES[rule], kind=kind), *LOWERINGS[lowering]):
        pass_(graph)
    if force:
        ExposeRoutingPass(force=True)(graph)
    return _Model(graph, weights, LAYERS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("whole_layers")


def _batch() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    return left_padded([rng.integers(0, VOCAB, (1, length)) for length in (9, 5, 2)])


def _run(
    model: ir.Model, cuts: Sequence[int], force: dict[int, np.ndarray] | None = None
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Logits of all tokens, fed in the pieces that `cuts` ends; and the state behind them."""
    ids, mask, positions = _batch()
    session = make_session(model)
    names = [output.name for output in session.get_outputs()]
    state: dict[str, np.ndarray] = {}
    for value in session.get_inputs():
        if value.name.startswith("past_"):
            sizes = [size if isinstance(size, int) else 0 for size in value.shape[1:]]
            state[value.name] = np.zeros((len(ids), *sizes), bool if "active" in value.name else np.float32)
    logits = []
    for start, stop in zip([0, *cuts[:-1]], cuts, strict=True):
        feeds = {"input_ids": ids[:, start:stop], "attention_mask": mask[:, :stop]}
        feeds |= {"position_ids": positions[:, start:stop], **state}
        feeds |= {f"force_active.{layer}": active[:, start:stop] for layer, active in (force or {}).items()}
        outputs = dict(zip(names, session.run(names, feeds), strict=True))
        logits.append(outputs["logits"])
        state = {
            name: outputs[name.replace("past_key_values", "present").replace("past_active", "present_active")]
            for name in state
        }
    return np.concatenate(logits, 1), state


def _check_equal(model: _Model, routing: Routing, force: dict[int, np.ndarray] | None = None) -> None:
    ids, mask, positions = _batch()
    expected, real = model.numpy.run(ids, mask, positions, routing, force), mask.astype(bool)
    length = ids.shape[1]
    for cuts in ([length], [length - 3, length - 2, length - 1, length], list(range(1, length + 1))):
        logits, state = _run(model.graph, cuts, force)
        np.testing.assert_allclose(logits[real], expected.logits[real], rtol=0, atol=2e-5)
        for layer in routing.routers:
            active = expected.active[layer]
            if routing.kind == "attention":
                continue
            np.testing.assert_array_equal(state[f"past_active.{layer}"][real], active[real])
            for part in ("key", "value"):
                rows = state[f"past_key_values.{layer}.{part}"].any(axis=(1, 3))
                np.testing.assert_array_equal(rows, state[f"past_active.{layer}"])


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", KINDS)
def test_graph_equals_numpy_when_tokens_skip_attention(
    folder: Path, lowering: str, rule: str, kind: RoutingKind
) -> None:
    model = _built(folder, lowering, rule=rule, kind=kind)
    routing = Routing(_routers(LAYERS), **RULES[rule], kind=kind)
    active, real = model.numpy.run(*_batch(), routing).active, _batch()[1].astype(bool)
    assert all(0.2 < layer[real].mean() < 0.8 for layer in active.values()), "the test needs tokens of both kinds"
    _check_equal(model, routing)


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_graph_equals_numpy_when_projections_have_biases(folder: Path, lowering: str, kind: RoutingKind) -> None:
    routing = Routing(_routers(LAYERS), **RULES["scaled"], kind=kind)
    _check_equal(_built(folder, lowering, biases=True, kind=kind), routing)


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0], ids=["none", "mixed", "all"])
@pytest.mark.parametrize("kind", KINDS)
def test_graph_equals_numpy_when_decisions_are_forced(
    folder: Path, lowering: str, share: float, kind: RoutingKind
) -> None:
    rng = np.random.default_rng(9)
    force = {layer: rng.random(_batch()[0].shape) < share for layer in ROUTED_LAYERS}
    routing = Routing(_routers(LAYERS), **RULES["scaled"], kind=kind)
    _check_equal(_built(folder, lowering, force=True, kind=kind), routing, force)


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_layers_are_found_and_legal_when_tokens_skip_attention(folder: Path, lowering: str, kind: RoutingKind) -> None:
    model = _built(folder, lowering, kind=kind).graph
    layers = find_decoder_layers(model.graph)
    remembering = [] if kind == "attention" else list(ROUTED_LAYERS)
    assert [layer.index for layer in layers if layer.past_active is not None] == remembering
    assert [layer.index for layer in layers if layer.present_active is not None] == remembering
    for layer in layers:
        inner = (each for node in layer.attention.nodes for branch in subgraphs_of(node) for each in branch)
        assert any(node.op_type == "Attention" for node in (*layer.attention.nodes, *inner))
        in_branch = lowering in ("if", "compact", "queries") and layer.index in ROUTED_LAYERS
        assert (layer.attention.conditional is not None) == in_branch
        assert (layer.mlp.conditional is not None) == (in_branch and kind == "layer")
    passes = LOWERINGS[lowering]
    check_stage(model, lowered_stage(type(passes[0]).__name__) if passes else ROUTED)


def test_stage_refuses_when_attention_is_left_unmasked_or_unlowered(folder: Path) -> None:
    model = _built(folder, "masked").graph
    with pytest.raises(ir.passes.PostconditionError, match="layer 0 is still masked"):
        check_stage(model, lowered_stage("LowerSkipToCompactionPass"))
    (layer, *_) = find_decoder_layers(model.graph)
    select = layer.attention.branch.producer()
    assert select is not None
    layer.attention.add.replace_input_with(1, select.inputs[1])
    with pytest.raises(ir.passes.PostconditionError, match="adds the attention branch unmasked"):
        check_stage(model, ROUTED)


@pytest.mark.parametrize("lowering", ["masked", "compact", "if"])
def test_skipped_tokens_leave_zeros_when_their_keys_are_no_numbers(folder: Path, lowering: str) -> None:
    model = _built(folder, lowering, force=True).graph
    for role in ("k_proj", "v_proj"):
        weight = model.graph.initializers[f"model.layers.0.self_attn.{role}.weight"]
        assert weight.const_value is not None
        nothing = np.full(weight.const_value.shape.numpy(), np.nan, np.float32)
        weight.const_value = ir.tensor(nothing, name=weight.name)
    length = _batch()[0].shape[1]
    logits, state = _run(model, [length - 1, length], {layer: np.zeros((3, length), bool) for layer in ROUTED_LAYERS})
    assert np.isfinite(logits).all()
    assert not state["past_key_values.0.key"].any()
    assert not state["past_key_values.0.value"].any()


@pytest.mark.parametrize("lowering", ["compact", "if"])
@pytest.mark.parametrize("share", [0.0, 0.5], ids=["none", "some"])
@pytest.mark.parametrize("kind", KINDS)
def test_projections_process_active_rows_only_when_tokens_skip_attention(
    folder: Path, lowering: str, share: float, tmp_path: Path, kind: RoutingKind
) -> None:
    model = _built(folder, lowering, force=True, kind=kind).graph
    feeds, active = _empty_feeds(model), np.random.default_rng(2).random(_batch()[0].shape) < share
    feeds |= {f"force_active.{layer}": active for layer in ROUTED_LAYERS}
    shapes = profiled_shapes(model, feeds, tmp_path)
    everybodys = {"layer": (), "attention-active": ("mlp.up_proj",)}.get(
        kind, ("self_attn.k_proj", "self_attn.v_proj", "mlp.up_proj")
    )
    for layer in range(LAYERS):
        for role in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj"):
            found = [shape[:-1] for shape in shapes.get(f"model.layers.{layer}.{role}", [])]
            rows = ([[int(active.sum())]] if lowering == "compact" else [list(active.shape)]) * bool(active.any())
            skipped = layer in ROUTED_LAYERS and role not in everybodys
            assert found == (rows if skipped else [list(active.shape)]), (layer, role)


def test_routing_refuses_whole_layers_when_attention_is_another_exporters() -> None:
    graph = ir.load(Path(__file__).parents[1] / "data" / "optimum_llama" / "model.onnx")
    with pytest.raises(GraphPassError, match="the graph has no Attention node") as error:
        RouteLayersPass({0: np.zeros(32, np.float32)}, kind="layer")(graph)
    assert "hint: " in str(error.value)


def test_injected_layers_are_routed_whole_when_they_are_identities(folder: Path) -> None:
    with open_checkpoint(str(_checkpoint(folder, False))) as checkpoint:
        graph = plain_graph(checkpoint.config, checkpoint.tensors)
        injection_pass(graph, [(1, 0), (4, 2)], "zero_out")(graph)
        RouteLayersPass(_routers(5, (1, 2, 4)), kind="layer")(graph)
        LowerSkipToCompactionPass()(graph)
        names = {value.name for value in graph.graph.inputs}
        assert {name for name in names if name.startswith("past_active")} == {f"past_active.{i}" for i in (1, 2, 4)}
        outputs = run_model(graph, _empty_feeds(graph))
    assert np.isfinite(outputs["logits"]).all()


def _empty_feeds(model: ir.Model) -> dict[str, np.ndarray]:
    ids, mask, positions = _batch()
    feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    for value in model.graph.inputs:
        if (value.name or "").startswith("past_"):
            assert value.shape is not None
            sizes = [size if isinstance(size, int) else 0 for size in tuple(value.shape)[1:]]
            feeds[value.name or ""] = np.zeros((len(ids), *sizes), value.dtype.numpy() if value.dtype else None)
    return feeds
