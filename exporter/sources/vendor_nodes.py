"""Whether a graph's nodes of ONNX Runtime's own operators are what it declares; ONNX's checker does not know them."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from dlo_export.graph_passes.errors import GraphPassError, place
from dlo_export.graph_passes.find.data_flow import is_op
from dlo_export.graph_passes.weights.matmul_nbits import part_problems
from dlo_export.runtimes.onnxruntime.operators import DOMAIN, IN_ONNX_DOMAIN, Operator, own_operators


def check_vendor_nodes(model: ir.Model, *, for_inspection: bool) -> None:
    """Refuses nodes that ONNX Runtime would refuse, or that passes would read wrongly.

    Args:
        model: The graph.
        for_inspection: Nothing is to be made of it: what a newer ONNX Runtime may know is let pass.

    Raises:
        GraphPassError: With all places.
    """
    nodes = _vendor_nodes(model)
    problems = [
        f"{place(node)}: {problem}"
        for node in nodes
        for problem in _problems(node, own_operators().get(node.op_type), for_inspection=for_inspection)
    ]
    version = model.graph.opset_imports.get(DOMAIN)
    if version != 1 and any(node.domain for node in nodes):
        problems.append(f"the graph imports version {version} of {DOMAIN}, expected 1")
    _refuse(problems)


def check_vendor_types(model: ir.Model) -> None:
    """Refuses nodes that read values of other types than their operators take, or weights of other shapes.

    Args:
        model: The graph, with what type inference knows of its values.

    Raises:
        GraphPassError: With all places.
    """
    operators = own_operators()
    problems: list[str] = []
    for node in _vendor_nodes(model):
        if (operator := operators.get(node.op_type)) is not None:
            problems += [f"{place(node)}: {problem}" for problem in _type_problems(node, operator)]
        if is_op(node, "MatMulNBits", domain=DOMAIN):
            problems += [f"{place(node)}: its weight has {problem}" for problem in part_problems(node)]
    _refuse(problems)


def _refuse(problems: list[str]) -> None:
    if problems:
        raise GraphPassError(
            "nodes are not what the installed ONNX Runtime declares:\n  " + "\n  ".join(problems),
            hint="export the graph again, or install the ONNX Runtime that it was made for",
        )


def _vendor_nodes(model: ir.Model) -> list[ir.Node]:
    graphs: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    return [node for graph in graphs for node in ir.traversal.RecursiveGraphIterator(graph) if _is_vendors(node)]


def _is_vendors(node: ir.Node) -> bool:
    return node.domain == DOMAIN or (not node.domain and node.op_type in IN_ONNX_DOMAIN)


def _problems(node: ir.Node, operator: Operator | None, *, for_inspection: bool) -> Iterator[str]:
    if operator is None:
        if not for_inspection:
            yield "no such operator"
        return
    for name, attribute in node.attributes.items():
        expected = operator.attributes.get(name)
        if expected is None:
            if not for_inspection:
                yield f"no such attribute as {name}"
        elif attribute.type.name != expected:
            yield f"attribute {name} is {attribute.type.name}, expected {expected}"
    for name in sorted(operator.required - node.attributes.keys()):
        yield f"attribute {name} is missing"
    for what, values, (fewest, most) in (
        ("inputs", node.inputs, operator.inputs),
        ("outputs", node.outputs, operator.outputs),
    ):
        if not fewest <= len(values) <= most:
            yield f"has {len(values)} {what}, expected {fewest} to {most}"


def _type_problems(node: ir.Node, operator: Operator) -> Iterator[str]:
    shared: dict[str, str] = {}
    # The last one stands for all that follow, where an operator takes any number.
    for (letter, allowed), value in zip(operator.input_types, node.inputs, strict=False):
        if value is None or value.dtype is None:
            continue
        found = value.dtype.name.lower()
        if found not in allowed:
            yield f"input '{value.name}' is {found}, expected {' or '.join(sorted(allowed))}"
        elif letter and shared.setdefault(letter, found) != found:
            yield f"input '{value.name}' is {found}, others of its type {shared[letter]}"
