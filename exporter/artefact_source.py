"""Whether an artefact can have been made from a source: what tells without a look at the weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx_ir as ir

from dlo_export.checkpoints.errors import InputError
from dlo_export.checkpoints.interface import LOGITS
from dlo_export.checkpoints.llama_layer import FINAL_NORM
from dlo_export.exporter.sources.source import ExportSource
from dlo_export.runtimes.artefact.description import ArtefactDescription


def check_made_from(source: ExportSource, folder: Path, description: ArtefactDescription, released: ir.Model) -> None:
    """Refuses a source that differs from an artefact in what no comparison of numbers can get over.

    Args:
        source: What the artefact is said to be made from, without the layers that were removed.
        folder: The artefact.
        description: Its dlo_artifact.json.
        released: Its model.onnx.

    Raises:
        InputError: It has other layers, routes others, or is of another vocabulary or width.
    """
    if problems := list(_differences(source, description, released)):
        raise InputError(
            f"{folder}: {'; '.join(problems)}", hint="give the model (and adapter) the artefact was made from"
        )


def _differences(source: ExportSource, description: ArtefactDescription, released: ir.Model) -> Iterator[str]:
    if len(description.layers) != source.num_layers:
        yield f"has {len(description.layers)} layers, its source {source.num_layers}"
        return  # all else follows from that
    routed = () if source.routing is None else source.routing.layers
    if description.routed_layers != routed:
        yield f"routes layers {list(description.routed_layers)}, its source {list(routed)}"
    config = source.base.config
    if config is None:
        return
    vocabulary = next(spec.shape[-1] for spec in description.interface.outputs if spec.name == LOGITS)
    if isinstance(vocabulary, int) and vocabulary != config.vocab_size:
        yield f"knows {vocabulary} tokens, its source {config.vocab_size}"
    norm = released.graph.initializers.get(FINAL_NORM)
    if norm is not None and norm.const_value is not None and norm.const_value.size != config.hidden_size:
        yield f"has a hidden size of {norm.const_value.size}, its source {config.hidden_size}"
