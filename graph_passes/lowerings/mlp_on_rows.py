"""Run a masked MLP on the active tokens' rows alone."""

from __future__ import annotations

import onnx_ir as ir

from dlo_export.graph_passes.find.data_flow import element_type
from dlo_export.graph_passes.find.masked_mlp import MaskedMlp
from dlo_export.graph_passes.find.token_wise import row_rank
from dlo_export.graph_passes.lowerings.active_rows import run_on_rows, stream_for_all_tokens
from dlo_export.graph_passes.lowerings.compacted_rows import CompactedRows


def run_mlp_on_rows(graph: ir.Graph, masked: MaskedMlp, access: CompactedRows) -> None:
    """Runs an MLP on the active tokens' rows, as `LowerSkipToCompactionPass` shows; `access` tags what is new.

    Args:
        graph: Holds the layer.
        masked: Its MLP, whose nodes compute each token by itself.
        access: To its active tokens.
    """
    layer, block, nodes = masked.layer, masked.layer.mlp, masked.nodes
    mlp, dtype = masked.path, element_type(block.stream_in)
    rank, _ = row_rank(nodes)

    # In front of the branch: where the active tokens are, and their rows. A branch that counts its axes from the
    # front gets them as a batch of one.
    gather = access.new_nodes()
    rows = gathered = access.gather(gather, block.stream_in, layer.hidden_size, f"{mlp}.rows")
    if rank == 3:
        rows = access.as_batch(gather, rows, layer.hidden_size, f"{mlp}.rows_3d")
    stream = stream_for_all_tokens(block, nodes, gather)

    # The branch itself stays, node by node: it reads rows now, and each row is scaled by its own token's factor.
    access.scale(gather)
    run_on_rows(nodes, block.stream_in, rows, (access.count,) if rank == 2 else (1, access.count))
    graph.insert_before(nodes[0], gather.nodes)

    # Behind it: the results are added to the rows, and these put in their places in the stream, in place of Where
    # and Add: a skipped token keeps h because nothing is put there.
    scatter, kept = access.new_nodes(), masked.kept
    if rank == 3:
        kept = access.from_batch(scatter, kept, layer.hidden_size, f"{mlp}.kept_rows", dtype)
    access.add(scatter, stream, gathered if stream is block.stream_in else None, kept)
