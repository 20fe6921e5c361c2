"""Write the zeros that skipped tokens leave in a cache once, in front of the projections that keep them zero."""

from __future__ import annotations

import onnx_ir as ir

from dlo_export.graph_passes.find.data_flow import constant_tensor, element_type, is_op, producer_of
from dlo_export.graph_passes.find.masked_attention import HiddenTokens, MaskedAttention
from dlo_export.graph_passes.rewriting import remove_with_sources
from dlo_export.graph_passes.spec.provenance import TaggedNodes


def zero_in_front(graph: ir.Graph, masked: MaskedAttention, made_by: str) -> list[ir.Node]:
    """Replaces the Where of the keys and that of the values by one of what both are projected from.

    Before::

        k', v' = Where(column, Rotary(MatMul(n, Wk)), 0), Where(column, MatMul(n, Wv), 0)

    After::

        m      = Where(column, n, 0)
        k', v' = Rotary(MatMul(m, Wk)), MatMul(m, Wv)

    The query is projected from m as well: what attention computes for a skipped token is masked behind it. A Where is
    among the dearest of ONNX Runtime's small operators. Left alone where a projection has a bias, or the two
    read different values.

    Args:
        graph: Holds the layer.
        masked: Its attention.
        made_by: Name of the pass.

    Returns:
        The block's nodes that serve active tokens only, as `MaskedAttention.nodes`; in no order.
    """
    hidden, nodes = masked.hidden, list(masked.nodes)
    source = None if hidden is None else _common_source(masked, hidden)
    if hidden is None or source is None:
        return nodes
    column, _, zero = hidden.key_select.inputs
    assert column is not None, "asked by the matcher"
    assert zero is not None, "asked by the matcher"
    unsqueeze = column.producer()
    assert unsqueeze is not None, "asked by the matcher"

    # One Where in front of all that projects the value. Who else reads it (a router, the sum) reads it as it was.
    new = TaggedNodes(made_by, masked.layer.index)
    name = f"{masked.path}.active_tokens"
    zeroed = new.add("Where", column, source, zero, name=name, dtype=element_type(source), shape=source.shape)
    products = [node for node in source.consumers() if node in masked.projections and is_op(node, "MatMul")]
    first = min(products, key=masked.projections.index)
    for product in products:
        product.replace_input_with(0, zeroed)
    graph.remove(unsqueeze)  # it stands behind the projections
    graph.insert_before(first, [unsqueeze, *new.nodes])
    # The two behind the projections go.
    for select in (hidden.key_select, hidden.value_select):
        computed = select.inputs[1]
        assert computed is not None, "asked by the matcher"
        for use in tuple(select.outputs[0].uses()):
            use.node.replace_input_with(use.idx, computed)
        remove_with_sources(graph, select)
    return [*(node for node in nodes if node.graph is graph), *new.nodes]


def _common_source(masked: MaskedAttention, hidden: HiddenTokens) -> ir.Value | None:
    """What keys and values are projected from, by products alone; None where it is not one value."""
    sources = {_projected_from(masked, select.inputs[1]) for select in (hidden.key_select, hidden.value_select)}
    return sources.pop() if len(sources) == 1 else None


def _projected_from(masked: MaskedAttention, value: ir.Value | None) -> ir.Value | None:
    # From what is written to the cache back to the product.
    node = producer_of(value)
    while node is not None and node in masked.projections and _keeps_zeros(node):
        node = producer_of(node.inputs[0])
    if node is None or node not in masked.projections or not is_op(node, "MatMul"):
        return None
    return node.inputs[0] if constant_tensor(node.inputs[1]) is not None else None


def _keeps_zeros(node: ir.Node) -> bool:
    """Of zeros, in its first operand, it makes zeros: rotation, norms of heads, and what only turns shapes."""
    if is_op(node, "RMSNormalization"):
        return node.attributes.get_float("epsilon", 1e-5) > 0  # else zero by zero
    return is_op(node, "RotaryEmbedding", "Reshape", "Transpose")
