"""What all lowerings share: find the masked layers, check each, rewrite each."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import ClassVar

import onnx_ir as ir

from dlo_export.graph_passes.errors import GraphPassError
from dlo_export.graph_passes.find.decoder_layers import find_decoder_layers
from dlo_export.graph_passes.find.masked_mlp import MaskedMlp, match_masked_mlp
from dlo_export.graph_passes.routing.route_layers import RouteLayersPass
from dlo_export.graph_passes.spec.pass_contract import GraphPass
from dlo_export.graph_passes.spec.provenance import LAYER_KEY, PASS_KEY, ROUTER_SCORES, closed_branch, role_values


class LoweringPass(GraphPass):
    """Base of the lowerings: rewrites every routed decoder layer of the main graph from its masked form.

    A lowering says in `problems` which masked layers it cannot take, and rewrites one in `lower`. The node that closes
    the rewritten block carries the tag `closes` (`spec/provenance.py`): by it alone the layer is found afterwards.
    """

    runs_after: ClassVar[tuple[type[GraphPass], ...]] = (RouteLayersPass,)
    oldest_opset: ClassVar[int] = 13
    """The first opset it can write; 13 is the masked form's, whose Unsqueeze takes its axes as an input."""

    def rewrite(self, model: ir.Model) -> bool:
        """Lower every layer in masked form.

        Raises:
            GraphPassError: Nothing is routed, or a masked layer cannot be lowered; with all reasons.
        """
        graph = model.graph
        for masked in self._masked_layers(graph):
            self.lower(graph, masked)
        # What was put in front of a block may read what stands between the block's nodes.
        graph.sort()
        return True

    def problems(self, masked: MaskedMlp) -> Sequence[str]:
        """Why a masked layer cannot be lowered; none if it can, as by default."""
        del masked
        return ()

    @abc.abstractmethod
    def lower(self, graph: ir.Graph, masked: MaskedMlp) -> None:
        """Rewrite one layer; the node that closes its block is tagged."""

    def ensures(self, model: ir.Model) -> None:
        """Every layer with a router is closed by a node of this pass; that it is found there, the stage checks.

        Raises:
            ir.passes.PostconditionError: The lowering left a layer out, or did not tag what closes it.
        """
        closed = {
            int(node.metadata_props[LAYER_KEY])
            for node in model.graph.all_nodes()
            if closed_branch(node) is not None and node.metadata_props[PASS_KEY] == self._name
        }
        if left := sorted(role_values(model.graph, ROUTER_SCORES).keys() - closed):
            raise ir.passes.PostconditionError(
                f"{self._name}: no node of it closes layers {left}\n\nhint: a bug of dlo-export, please report it"
            )

    def _masked_layers(self, graph: ir.Graph) -> list[MaskedMlp]:
        """Every routed layer, all of them fit for this lowering."""
        # All layers are asked before the first is rewritten: a graph is lowered as a whole or left as it is.
        matches = [match_masked_mlp(layer) for layer in find_decoder_layers(graph)]
        masked = [match for match in matches if isinstance(match, MaskedMlp)]
        problems = [match.reason for match in matches if not isinstance(match, MaskedMlp) and match.masked]
        if graph.opset_imports.get("", 0) < self.oldest_opset:
            problems.append(
                f"the graph uses opset {graph.opset_imports.get('')}, expected {self.oldest_opset} or newer"
            )
        if not masked and not problems:
            problems.append(f"none of the {len(matches)} decoder layers is routed")
        problems += [f"layer {layer.layer.index}: {reason}" for layer in masked for reason in self.problems(layer)]
        if problems:
            raise GraphPassError(
                f"{self._name}: " + "; ".join(problems) + ".",
                hint="route the layers first, or choose another --lowering: masked is always possible",
            )
        return masked
