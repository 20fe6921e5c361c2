"""What is legal in a graph at each border of the pipeline, and in which order passes may run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import onnx_ir as ir

from dlo_export.graph_passes.errors import GraphPassError, place
from dlo_export.graph_passes.spec import graph_checks
from dlo_export.graph_passes.spec.data_dependent_shapes import data_dependent_shapes
from dlo_export.graph_passes.spec.ops import DOMAIN
from dlo_export.graph_passes.spec.provenance import PASS_KEY

Stage = Literal["plain", "injected", "routed", "lowered", "selected", "plugged"]
Check = Callable[[ir.Graph], Iterator[str]]


class GraphInvariantError(ir.passes.PostconditionError):
    """A graph of ours is not what its stage promises: a bug of this package, not of its input."""


@dataclasses.dataclass(frozen=True)
class StageSpec:
    """What is legal in the graph after a stage.

    Attributes:
        domains: Operator domains of our nodes. A graph that someone else exported keeps its own beside them.
        makers: Passes whose nodes may occur.
        checks: What else holds.
    """

    domains: frozenset[str]
    makers: frozenset[str]
    checks: tuple[Check, ...]


_ALWAYS: tuple[Check, ...] = (
    graph_checks.unused_inputs,
    graph_checks.broken_values,
    graph_checks.foreign_branch_outputs,
    graph_checks.incomplete_cache,
)
_STANDARD = frozenset({""})
# Fusions, and what undoes those of other exporters, may run at any point after the source graph is there.
_FUSIONS = frozenset({"FuseSiblingMatMulsPass", "SplitSkipNormsPass"})
# TensorRT's interface and precision, after routing.
_TENSORRT = frozenset(
    {
        "ReduceRouterProductsPass",
        "UseStaticCachePass",
        "GrowCacheOutsideAttentionPass",
        "ComputeNormsInFloat32Pass",
        "KeepLastLogitsPass",
    }
)
_INJECTED = _FUSIONS | _TENSORRT | {"InjectLayersPass"}
_ROUTED = _INJECTED | {"RouteLayersPass"}

STAGES: dict[Stage, StageSpec] = {
    # Straight from the checkpoint or from another exporter.
    "plain": StageSpec(_STANDARD, frozenset(), _ALWAYS),
    "injected": StageSpec(_STANDARD, _INJECTED, _ALWAYS),
    # The oracle: every routed layer in masked form.
    "routed": StageSpec(_STANDARD, _ROUTED, (*_ALWAYS, graph_checks.unmasked_routing)),
    # Ready for the target: no masked layer left, run on active rows or in conditionals.
    "lowered": StageSpec(
        _STANDARD,
        _ROUTED | {"LowerSkipToCompactionPass", "LowerSkipToIfPass"},
        (*_ALWAYS, graph_checks.unlowered_routing, graph_checks.eager_branches),
    ),
    # The same for TensorRT, active rows chosen by TopK.
    "selected": StageSpec(_STANDARD, _ROUTED | {"LowerSkipToTopKPass"}, (*_ALWAYS, graph_checks.unselected_routing)),
    # The same in TensorRT plugins: no shape may depend on data, or a CUDA graph cannot capture the step.
    "plugged": StageSpec(
        _STANDARD | {DOMAIN},
        _ROUTED | {"LowerSkipToPluginPass"},
        (*_ALWAYS, graph_checks.unplugged_routing, data_dependent_shapes),
    ),
}


def check_stage(model: ir.Model, stage: Stage) -> None:
    """Check a model at a stage border.

    Args:
        model: The model. One that dlo-export did not produce may use domains of its own.
        stage: The stage it has just left.

    Raises:
        GraphPassError: Someone else's graph breaks an invariant before any pass has run; with all violations.
        GraphInvariantError: A graph of ours, or one our passes have changed, breaks one; with all violations.
    """
    spec, ours = STAGES[stage], model.producer_name == "dlo-export"
    violations: list[str] = []
    for node in model.graph.all_nodes():
        maker = node.metadata_props.get(PASS_KEY)
        if maker is not None and maker not in spec.makers:
            violations.append(f"{place(node)} was made by {maker}")
        if (ours or maker is not None) and node.domain not in spec.domains and maker != "InjectLayersPass":
            violations.append(f"{place(node)} is of domain '{node.domain}'")
    for check in spec.checks:
        violations += check(model.graph)
    if not violations:
        return
    listed = "\n  ".join(violations)
    if stage == "plain" and not ours:
        raise GraphPassError(f"check_stage: the source graph cannot be used:\n  {listed}", hint="export it again")
    raise GraphInvariantError(
        f"check_stage: the graph is not legal after stage '{stage}':\n  {listed}"
        "\n\nhint: this is a bug of dlo-export, please report it"
    )


def check_order(passes: Sequence[ir.passes.PassBase]) -> None:
    """Check that no pass precedes one that its class says it runs after (`runs_after`).

    A pass need not be in the list for others to declare that they run after it.

    Raises:
        GraphPassError: With all violations.
    """
    problems = []
    for position, pass_ in enumerate(passes):
        earlier = tuple(getattr(type(pass_), "runs_after", ()))
        problems += [
            f"{type(pass_).__name__} stands at {position}, before {type(later).__name__} at {late}"
            for late, later in enumerate(passes[position + 1 :], position + 1)
            if isinstance(later, earlier)
        ]
    if problems:
        raise GraphPassError(
            "check_order: " + "; ".join(problems) + "; expected each after the passes its runs_after names.",
            hint="reorder the pipeline's list",
        )
