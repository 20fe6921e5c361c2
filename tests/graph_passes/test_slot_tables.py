"""Cosines and sines of a cache's slots: one pair of constants for all layers that are rotated alike."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from dlo_export.exporter.sources.source import open_source
from dlo_export.exporter.target_graphs import build_model
from dlo_export.graph_passes.cache.rotary_tables import RotaryTables
from dlo_export.graph_passes.cache.slot_tables import SlotTables
from dlo_export.graph_passes.cache.use_group_query_attention import UseGroupQueryAttentionPass
from dlo_export.graph_passes.find.data_flow import is_op, producer_of
from tests.bare_session import BareSession, InPlaceSession
from tests.tiny_families import save_tiny_family
from tests.tiny_models import save_tiny_llama

FREQUENCIES = np.array([1.0, 0.3, 0.01, 1e-4], np.float32)
SLOTS = 24
IDS = np.random.default_rng(3).integers(3, 97, (1, 12))


def tables_of(graph: ir.Graph) -> list[tuple[ir.Value | None, ...]]:
    """Of every attention, in order."""
    return [tuple(node.inputs[7:9]) for node in graph if node.op_type == "GroupQueryAttention"]


def test_tables_are_one_pair_when_layers_are_rotated_alike() -> None:
    graph = ir.Graph([], [], nodes=[], name="graph")
    made = SlotTables(graph, SLOTS)
    first = made.of(RotaryTables(FREQUENCIES, np.float32(1)), ir.DataType.FLOAT)
    assert made.of(RotaryTables(FREQUENCIES.copy(), np.float32(1)), ir.DataType.FLOAT) is first
    others = [
        made.of(RotaryTables(FREQUENCIES / 2, np.float32(1)), ir.DataType.FLOAT),
        made.of(RotaryTables(FREQUENCIES, np.float32(1.25)), ir.DataType.FLOAT),
        made.of(RotaryTables(FREQUENCIES, np.float32(1)), ir.DataType.BFLOAT16),
    ]
    assert len({id(value) for tables in (first, *others) for value in tables}) == 8 == len(graph.initializers)


def test_tables_are_the_same_on_every_machine() -> None:
    """NumPy's own float32 cosine is another in one of six, by the CPU's vector instructions."""
    made = SlotTables(ir.Graph([], [], nodes=[], name="graph"), 5000)
    tables = made.of(RotaryTables(FREQUENCIES, np.float32(1)), ir.DataType.FLOAT)
    angles = np.arange(5000, dtype=np.float32)[:, np.newaxis] * FREQUENCIES
    for table, function in zip(tables, (np.cos, np.sin), strict=True):
        assert table.const_value is not None
        np.testing.assert_array_equal(table.const_value.numpy(), function(angles.astype(np.float64)).astype(np.float32))


@pytest.mark.parametrize("layers", [2, 6])
def test_graph_has_one_pair_of_tables_however_many_layers_it_has(tmp_path: Path, layers: int) -> None:
    save_tiny_llama(tmp_path / "model", hidden=64, head_dim=16, layers=layers)
    with_slots = {}
    for slots in (1000, 3000):
        source = open_source(str(tmp_path / "model"), None)
        graph = build_model(source, "none", static_cache=slots).graph
        assert len(set(tables_of(graph))) == 1
        with_slots[slots] = sum(value.const_value.nbytes for value in graph.initializers.values())  # type: ignore[union-attr]
    assert with_slots[3000] - with_slots[1000] == 2 * 2000 * 8 * 4


def test_layers_without_a_rope_have_no_tables_and_others_share_theirs(tmp_path: Path) -> None:
    save_tiny_family(tmp_path / "model", "smollm3", head_dim=16)
    graph = build_model(open_source(str(tmp_path / "model"), None), "none", static_cache=SLOTS).graph
    first, second, *others = tables_of(graph)
    assert (second, others) == ((), [first, ()])
    assert len([name for name in graph.initializers if name.endswith("_table")]) == 2


def test_each_rope_has_its_own_tables_when_layers_have_two(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path / "model", hidden=64, head_dim=16)
    growing, static = (two_ropes(tmp_path / "model") for _ in range(2))
    UseGroupQueryAttentionPass(SLOTS)(static)
    first, second, third = tables_of(static.graph)
    assert first == third
    assert not set(first) & set(second)
    for model, name in ((growing, "growing.onnx"), (static, "static.onnx")):
        ir.save(model, tmp_path / name)
    positions = np.arange(IDS.shape[1])[np.newaxis]
    wanted = BareSession(tmp_path / "growing.onnx").logits_of(IDS, np.ones_like(IDS), positions, (8, 9, 12))
    found = InPlaceSession(tmp_path / "static.onnx").logits_of(IDS, (8, 9, 12))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5)


def two_ropes(folder: Path) -> ir.Model:
    """A plain graph whose second layer turns half as fast."""
    model = open_source(str(folder), None).plain_model(ir.DataType.FLOAT)
    graph = model.graph
    rotations = [node for node in graph if is_op(node, "RotaryEmbedding")][2:4]
    cosine = producer_of(rotations[0].inputs[1])
    angles = None if cosine is None else cosine.inputs[0]
    product = producer_of(angles)
    assert product is not None
    frequencies = next(value for value in product.inputs if value is not None and value.const_value is not None)
    assert frequencies.const_value is not None
    slower = ir.tensor(frequencies.const_value.numpy() / 2, name="slower")
    value = ir.Value(name="slower", type=frequencies.type, shape=frequencies.shape, const_value=slower)
    graph.register_initializer(value)
    inputs = [value if given is frequencies else given for given in product.inputs]
    turned = ir.node("Mul", inputs, name="slower_angles")
    tables = [ir.node(name, [turned.outputs[0]], name=f"slower_{name}") for name in ("Cos", "Sin")]
    graph.insert_after(product, [turned, *tables])
    for node in rotations:
        for number, table in enumerate(tables, start=1):
            node.replace_input_with(number, table.outputs[0])
    return model
