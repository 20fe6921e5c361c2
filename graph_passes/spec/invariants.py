"""What is legal in a graph at each border of the pipeline."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator

import onnx_ir as ir

from dlo_export.checkpoints.llama_layer import Block
from dlo_export.graph_passes.errors import DecoderLayersNotFound, GraphPassError, place
from dlo_export.graph_passes.find.decoder_layers import find_decoder_layers
from dlo_export.graph_passes.spec import graph_checks, layer_checks
from dlo_export.graph_passes.spec.ops import MICROSOFT
from dlo_export.graph_passes.spec.pass_contract import Border, makers_at
from dlo_export.graph_passes.spec.provenance import ORIGIN_KEY, PASS_KEY

Check = Callable[[ir.Graph], Iterator[str]]
LayerCheck = Callable[[ir.Graph, layer_checks.Layers], Iterator[str]]


class GraphInvariantError(ir.passes.PostconditionError):
    """A graph of ours is not what its stage promises: a bug of this package, not of its input."""


@dataclasses.dataclass(frozen=True)
class StageSpec:
    """What is legal in the graph after a stage.

    Attributes:
        name: What reports call it.
        border: Which passes' nodes may occur: those that say so of themselves (`GraphPass.nodes_from`).
        layer_checks: What holds for the decoder layers, which must be found; empty where they are not looked for.
        checks: What else holds, besides what does everywhere.
        domains: Operator domains of our nodes. A graph that someone else exported keeps its own beside them.
        lowering: The lowering's pass, whose nodes may occur besides.
    """

    name: str
    border: Border
    layer_checks: tuple[LayerCheck, ...]
    checks: tuple[Check, ...] = ()
    domains: frozenset[str] = frozenset({""})
    lowering: str | None = None

    @property
    def makers(self) -> frozenset[str]:
        """Passes whose nodes may occur."""
        return makers_at(self.border) | ({self.lowering} if self.lowering is not None else frozenset())


_ALWAYS: tuple[Check, ...] = (
    graph_checks.unused_inputs,
    graph_checks.broken_values,
    graph_checks.foreign_branch_outputs,
)

PLAIN = StageSpec("plain", "plain", (layer_checks.incomplete_cache,))
"""From the checkpoint, or from another exporter and prepared for finding its layers."""
INJECTED = StageSpec("injected", "injected", (layer_checks.incomplete_cache,))
ROUTED = StageSpec("routed", "routed", (layer_checks.incomplete_cache, layer_checks.unmasked_routing))
"""The oracle: every routed layer in masked form."""


def lowered_stage(
    pass_name: str,
    *promised: LayerCheck,
    checks: tuple[Check, ...] = (),
    domains: frozenset[str] = frozenset(),
    blocks: tuple[Block, ...] = ("self_attn", "mlp"),
) -> StageSpec:
    """What is legal after a lowering: every routed layer is closed by it, none is masked any more.

    Args:
        pass_name: The lowering's pass, of all lowerings the only one that may have run.
        *promised: What else it promises of the layers.
        checks: Of the graph.
        domains: Of the operators it writes, besides ONNX's own.
        blocks: Of a layer, those that it lowers where they are masked.
    """
    lowered = functools.partial(layer_checks.unlowered_routing, pass_name=pass_name, blocks=blocks)
    return StageSpec(
        f"lowered by {pass_name}",
        "routed",
        (layer_checks.incomplete_cache, lowered, *promised),
        checks,
        domains=frozenset({""}) | domains,
        lowering=pass_name,
    )


def released_stage(before: StageSpec) -> StageSpec:
    """What is legal when a foreign graph's own fusions are back: layers are not looked for any more.

    Args:
        before: The last stage in which they are.
    """
    return dataclasses.replace(
        before,
        name=f"released, {before.name}",
        layer_checks=(),
        checks=(),
        domains=before.domains | {MICROSOFT},
    )


def check_stage(model: ir.Model, stage: StageSpec) -> None:
    """Check a model at a stage border.

    Args:
        model: The model. One that dlo-export did not produce may use domains of its own.
        stage: The stage it has just left.

    Raises:
        GraphPassError: Someone else's graph breaks an invariant before any pass has run; with all violations.
        GraphInvariantError: A graph of ours, or one our passes have changed, breaks one; with all violations.
    """
    ours = model.producer_name == "dlo-export"
    # Domains are checked on our own nodes only; an injected copy of somebody else's layer keeps its domain.
    violations: list[str] = []
    makers = stage.makers
    for node in model.graph.all_nodes():
        maker = node.metadata_props.get(PASS_KEY)
        if maker is not None and maker not in makers:
            violations.append(f"{place(node)} was made by {maker}")
        if (ours or maker is not None) and node.domain not in stage.domains and ORIGIN_KEY not in node.metadata_props:
            violations.append(f"{place(node)} is of domain '{node.domain}'")
    # Then what the stage promises of the graph as a whole, and of its layers, which are looked for once.
    for check in (*_ALWAYS, *stage.checks):
        violations += check(model.graph)
    if stage.layer_checks:
        violations += _layer_violations(model.graph, stage.layer_checks)
    if not violations:
        return
    listed = "\n  ".join(violations)
    if stage is PLAIN and not ours:
        raise GraphPassError(f"check_stage: the source graph cannot be used:\n  {listed}", hint="export it again")
    raise GraphInvariantError(
        f"check_stage: the graph is not legal after stage '{stage.name}':\n  {listed}"
        "\n\nhint: this is a bug of dlo-export, please report it"
    )


def _layer_violations(graph: ir.Graph, checks: tuple[LayerCheck, ...]) -> Iterator[str]:
    try:
        layers = find_decoder_layers(graph)
    except DecoderLayersNotFound as error:
        yield str(error)
        return
    for check in checks:
        yield from check(graph, layers)
