"""What all lowerings share: find the masked blocks, check each, rewrite each."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import ClassVar

import onnx_ir as ir

from dlo_export.graph_passes.errors import GraphPassError
from dlo_export.graph_passes.find.decoder_layers import find_decoder_layers
from dlo_export.graph_passes.find.masked_attention import MaskedAttention
from dlo_export.graph_passes.find.masked_blocks import MaskedBlock, match_masked_blocks
from dlo_export.graph_passes.find.masked_branch import Mismatch
from dlo_export.graph_passes.find.masked_mlp import MaskedMlp
from dlo_export.graph_passes.find.routers import find_routers
from dlo_export.graph_passes.routing.route_layers import RouteLayersPass
from dlo_export.graph_passes.spec.pass_contract import GraphPass
from dlo_export.graph_passes.spec.provenance import PASS_KEY, closed_branch, layer_of


class LoweringPass(GraphPass):
    """Base of the lowerings: rewrites every routed decoder layer of the main graph from its masked form.

    A lowering says in `problems` which masked MLPs it cannot take, and rewrites one in `lower`; where it takes layers
    that tokens skip whole, it does the same for their attention in `attention_problems` and `lower_attention`. The node
    that closes a rewritten block carries the tag `closes` (`spec/provenance.py`): by it alone the layer is found
    afterwards.
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
        # From the last block to the first: each replaces the stream behind it, which only those behind it read.
        blocks = self._masked_blocks(graph)
        while blocks:
            masked, before = blocks.pop(), blocks[-1] if blocks else None
            if isinstance(masked, MaskedAttention):
                self.lower_attention(graph, masked)
            elif isinstance(before, MaskedAttention) and before.layer is masked.layer:
                blocks.pop()
                self.lower_layer(graph, before, masked)
            else:
                self.lower(graph, masked)
        # What was put in front of a block may read what stands between the block's nodes.
        graph.sort()
        return True

    def problems(self, masked: MaskedMlp) -> Sequence[str]:
        """Why a masked MLP cannot be lowered; none if it can, as by default."""
        del masked
        return ()

    def attention_problems(self, masked: MaskedAttention) -> Sequence[str]:
        """Why a masked attention cannot be lowered; by default because the lowering knows MLPs only."""
        del masked
        return ("tokens skip its attention, and this lowering skips MLPs only",)

    @abc.abstractmethod
    def lower(self, graph: ir.Graph, masked: MaskedMlp) -> None:
        """Rewrite one layer's MLP; the node that closes its block is tagged."""

    def lower_attention(self, graph: ir.Graph, masked: MaskedAttention) -> None:
        """Rewrite one layer's attention; the node that closes its block is tagged. Its MLP is lowered already."""
        raise NotImplementedError(f"{self._name} refuses masked attention")

    def lower_layer(self, graph: ir.Graph, attention: MaskedAttention, mlp: MaskedMlp) -> None:
        """Rewrite a layer that tokens skip whole; by default block by block."""
        self.lower(graph, mlp)
        self.lower_attention(graph, attention)

    def ensures(self, model: ir.Model) -> None:
        """Every layer with a router is closed by a node of this pass; that it is found there, the stage checks.

        Raises:
            ir.passes.PostconditionError: The lowering left a layer out, or did not tag what closes it.
        """
        closed = {
            layer_of(node)
            for node in model.graph.all_nodes()
            if closed_branch(node) is not None and node.metadata_props[PASS_KEY] == self._name
        }
        if left := sorted(find_routers(model.graph).keys() - closed):
            raise ir.passes.PostconditionError(
                f"{self._name}: no node of it closes layers {left}\n\nhint: a bug of dlo-export, please report it"
            )

    def _masked_blocks(self, graph: ir.Graph) -> list[MaskedBlock]:
        """Every masked block in the order of the stream, all of them fit for this lowering."""
        # All layers are asked before the first is rewritten: a graph is lowered as a whole or left as it is.
        layers = find_decoder_layers(graph)
        matches = [match for layer in layers for _, match in match_masked_blocks(layer)]
        masked = [match for match in matches if not isinstance(match, Mismatch)]
        problems = [match.reason for match in matches if isinstance(match, Mismatch) and match.masked]
        if graph.opset_imports.get("", 0) < self.oldest_opset:
            problems.append(
                f"the graph uses opset {graph.opset_imports.get('')}, expected {self.oldest_opset} or newer"
            )
        if not masked and not problems:
            problems.append(f"none of the {len(layers)} decoder layers is routed")
        problems += [f"layer {block.layer.index}: {reason}" for block in masked for reason in self._reasons(block)]
        if problems:
            raise GraphPassError(
                f"{self._name}: " + "; ".join(problems) + ".",
                hint="route the layers first, or choose another --lowering: masked is always possible",
            )
        return masked

    def _reasons(self, masked: MaskedBlock) -> Sequence[str]:
        return self.attention_problems(masked) if isinstance(masked, MaskedAttention) else self.problems(masked)


def cast_problems(masked: MaskedBlock) -> list[str]:
    """That a block adds to a cast of the stream, and not to the stream itself; nothing where it does not."""
    operand = masked.block.stream_operand
    return [] if operand is masked.block.stream_in else [f"adds to '{operand.name}', a cast of the stream"]
