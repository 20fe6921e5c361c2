"""What is legal in a graph at each border of the pipeline."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator

import onnx_ir as ir

from dlo_export.checkpoints.llama_layer import Block
from dlo_export.graph_passes.errors import GraphPassError, place
from dlo_export.graph_passes.spec import graph_checks
from dlo_export.graph_passes.spec.pass_contract import Border, makers_at
from dlo_export.graph_passes.spec.provenance import ORIGIN_KEY, PASS_KEY

Check = Callable[[ir.Graph], Iterator[str]]


class GraphInvariantError(ir.passes.PostconditionError):
    """A graph of ours is not what its stage promises: a bug of this package, not of its input."""


@dataclasses.dataclass(frozen=True)
class StageSpec:
    """What is legal in the graph after a stage.

    Attributes:
        name: What reports call it.
        border: Which passes' nodes may occur: those that say so of themselves (`GraphPass.nodes_from`).
        checks: What else holds.
        domains: Operator domains of our nodes. A graph that someone else exported keeps its own beside them.
        lowering: The lowering's pass, whose nodes may occur besides.
    """

    name: str
    border: Border
    checks: tuple[Check, ...]
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
    graph_checks.incomplete_cache,
)

PLAIN = StageSpec("plain", "plain", _ALWAYS)
"""From the checkpoint, or from another exporter and prepared for finding its layers."""
INJECTED = StageSpec("injected", "injected", _ALWAYS)
ROUTED = StageSpec("routed", "routed", (*_ALWAYS, graph_checks.unmasked_routing))
"""The oracle: every routed layer in masked form."""


def lowered_stage(
    pass_name: str,
    *checks: Check,
    domains: frozenset[str] = frozenset(),
    blocks: tuple[Block, ...] = ("self_attn", "mlp"),
) -> StageSpec:
    """What is legal after a lowering: every routed layer is closed by it, none is masked any more.

    Args:
        pass_name: The lowering's pass, of all lowerings the only one that may have run.
        *checks: What else it promises.
        domains: Of the operators it writes, besides ONNX's own.
        blocks: Of a layer, those that it lowers where they are masked.
    """
    return StageSpec(
        f"lowered by {pass_name}",
        "routed",
        (*_ALWAYS, functools.partial(graph_checks.unlowered_routing, pass_name=pass_name, blocks=blocks), *checks),
        domains=frozenset({""}) | domains,
        lowering=pass_name,
    )


def released_stage(before: StageSpec) -> StageSpec:
    """What is legal when a foreign graph's own fusions are back: layers are not looked for any more.

    Args:
        before: The last stage in which they are.
    """
    checks = (graph_checks.unused_inputs, graph_checks.broken_values, graph_checks.foreign_branch_outputs)
    return dataclasses.replace(
        before, name=f"released, {before.name}", checks=checks, domains=before.domains | {"com.microsoft"}
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
    # Then what the stage promises of the graph as a whole.
    for check in stage.checks:
        violations += check(model.graph)
    if not violations:
        return
    listed = "\n  ".join(violations)
    if stage is PLAIN and not ours:
        raise GraphPassError(f"check_stage: the source graph cannot be used:\n  {listed}", hint="export it again")
    raise GraphInvariantError(
        f"check_stage: the graph is not legal after stage '{stage.name}':\n  {listed}"
        "\n\nhint: this is a bug of dlo-export, please report it"
    )
