"""What a provider of ONNX Runtime is known to lack, told of a graph it was to run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dlo_export.checkpoints.dtypes import BY_OPTION
from dlo_export.exporter.named_operators import named_operators
from dlo_export.exporter.sources.graph_file import load_graph
from dlo_export.runtimes.artefact.description import MODEL_NAME, ArtefactDescription
from dlo_export.runtimes.errors import BackendUnavailableError, ModelLoadError
from dlo_export.runtimes.onnxruntime.providers import Provider


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
