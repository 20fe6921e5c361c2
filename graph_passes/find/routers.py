"""Routers as they stand in a graph: what decides about a layer's tokens, in whatever form passes have left it."""

from __future__ import annotations

import dataclasses
from typing import Literal, TypeGuard

import onnx_ir as ir

from dlo_export.checkpoints.router_thresholds import logit_threshold
from dlo_export.graph_passes.find.data_flow import constant_scalar, constant_tensor, is_op, producer_of
from dlo_export.graph_passes.spec.ops import DOMAIN, GATHER_ACTIVE
from dlo_export.graph_passes.spec.provenance import (
    ROUTER_ACTIVE,
    ROUTER_LOGITS,
    ROUTER_SCORES,
    THRESHOLD_KEY,
    role_values,
)


@dataclasses.dataclass(frozen=True, eq=False)
class Router:
    """A layer's router, in one of three forms.

    It compares scores, as `RouteLayersPass` writes it; logits (`DecideByLogitsPass`); or an operator decides by itself
    and gathers (`FuseRouterGatherPass`).

    Attributes:
        scores: float32 [batch, sequence]; None where none are computed, since logits decide.
        logits: Where they do, float32 [batch, sequence, 1], or [batch, 1, sequence] (`single_axis`).
        active: The decision, bool, of the shape of what is compared; None where an operator keeps it to itself.
    """

    scores: ir.Value | None
    logits: ir.Value | None
    active: ir.Value | None

    @property
    def gathering(self) -> ir.Node | None:
        """The operator that decides by itself, None where a comparison decides."""
        node = producer_of(self.scores)
        return node if gathers_active(node) else None

    @property
    def product(self) -> ir.Value | None:
        """What a MatMul gives, with its `single_axis`; None where an operator multiplies and computes scores."""
        if self.logits is not None or self.scores is None:
            return self.logits
        return router_product(self.scores)

    @property
    def weight(self) -> ir.Value | None:
        """What the stream is multiplied by; None where it cannot be told."""
        # An operator of the library gives out scores, and multiplies itself.
        node = producer_of(self.product or self.scores)
        if node is None or len(node.inputs) <= 1:
            return None
        return node.inputs[0 if single_axis(node.outputs[0]) == 1 else 1]

    @property
    def threshold(self) -> float | None:
        """The score that an active token's exceeds; None where it cannot be told."""
        decision = self.gathering or producer_of(self.active)
        place = 1 if self.gathering is None else 2
        limit = None if decision is None or len(decision.inputs) <= place else constant_scalar(decision.inputs[place])
        if decision is None or limit is None or self.logits is None:
            return limit
        # Several scores may have one logit: the decision says which of them was meant, and its constant must agree.
        try:
            said = float(decision.metadata_props.get(THRESHOLD_KEY, ""))
            return said if logit_threshold(said) == limit else None
        except ValueError:
            return None


def find_routers(graph: ir.Graph) -> dict[int, Router]:
    """The routers of a graph, by layer and in its order, as passes have tagged them."""
    scores, logits, active = (role_values(graph, role) for role in (ROUTER_SCORES, ROUTER_LOGITS, ROUTER_ACTIVE))
    layers = sorted({*scores, *logits})
    return {layer: Router(scores.get(layer), logits.get(layer), active.get(layer)) for layer in layers}


def gathers_active(node: ir.Node | None) -> TypeGuard[ir.Node]:
    """Whether it is the operator that decides by itself."""
    return is_op(node, GATHER_ACTIVE.name, domain=DOMAIN)


def router_product(scores: ir.Value) -> ir.Value | None:
    """The product whose sigmoids scores are, with its `single_axis`; None where they are computed otherwise."""
    value = scores
    for op in ("Sigmoid", "Squeeze"):
        node = value.producer()
        if not is_op(node, op) or node.inputs[0] is None:
            return None
        value = node.inputs[0]
    return value if is_op(value.producer(), "MatMul") else None


def single_axis(product: ir.Value) -> Literal[1, 2]:
    """The axis of a router's product that is no token's, and 1 wide.

    2, of [batch, sequence, 1], where the weights are a column, as RouteLayersPass writes it; 1, of [batch, 1,
    sequence], where they are a row (`MultiplyRouterRowsPass`).

    Args:
        product: A MatMul's output.
    """
    node = producer_of(product)
    return 1 if node is not None and constant_tensor(node.inputs[0]) is not None else 2


def router_operands(scores: ir.Value) -> tuple[ir.Value, ir.Value] | None:
    """The stream, of any type, and the router's weight [hidden, 1]; None where the score is computed otherwise."""
    product = router_product(scores)
    node = producer_of(product)
    if node is None:
        return None
    stream, weight = node.inputs
    tensor = constant_tensor(weight)
    if stream is None or weight is None or tensor is None or len(tensor.shape) != 2 or tensor.shape[1] != 1:
        return None
    cast = stream.producer()
    source = cast.inputs[0] if is_op(cast, "Cast") else stream
    return None if source is None else (source, weight)
