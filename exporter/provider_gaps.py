"""What a provider of ONNX Runtime is known to lack, told of a graph it was to run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx_ir as ir

from dlo_export.checkpoints.dtypes import BY_OPTION
from dlo_export.exporter.sources.foreign_graph import load_graph
from dlo_export.graph_passes.find.projections import HEAD_NORM_INPUTS
from dlo_export.graph_passes.weights.storage import Place
from dlo_export.runtimes.artefact.description import MODEL_NAME, ArtefactDescription
from dlo_export.runtimes.errors import BackendUnavailableError, ModelLoadError
from dlo_export.runtimes.onnxruntime.providers import NORMING_ATTENTION, Provider


@contextmanager
def gaps_explained(description: ArtefactDescription, folder: Path, provider: Provider) -> Iterator[None]:
    """Says what a provider is known to lack where ONNX Runtime refuses an artefact's graph for that.

    Args:
        description: Of the artefact.
        folder: The artefact.
        provider: That was to run it.

    Raises:
        BackendUnavailableError: In place of the block's ModelLoadError: its kernels do not compute the graph.
    """
    try:
        yield
    except ModelLoadError as err:
        operators = named_operators(load_graph(folder / MODEL_NAME))
        reason = provider.why_not_run(BY_OPTION[description.dtype], operators)
        if reason is None:
            raise
        raise BackendUnavailableError(
            f"{folder}: {reason}",
            hint="run it with another --provider, or export the model again with --dtype fp32",
        ) from err


def named_operators(model: ir.Model) -> set[str]:
    """What of a graph providers' gaps may name: operators with their `reduction`, and those of other domains."""
    nodes = list(model.graph.all_nodes())
    norming = {
        NORMING_ATTENTION
        for node in nodes
        for index in HEAD_NORM_INPUTS.get((node.domain, node.op_type), {}).values()
        if Place(node, index).value is not None
    }
    reductions = {
        f"{node.op_type}({node.attributes['reduction'].as_string()})"
        for node in nodes
        if "reduction" in node.attributes
    }
    return norming | reductions | {f"{node.domain}::{node.op_type}" for node in nodes if node.domain}
