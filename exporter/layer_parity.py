"""Parity of an artefact a layer at a time: for models that no memory holds, and to find the layer that is wrong."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir

from dlo_export.checkpoints.errors import InputError
from dlo_export.checkpoints.llama_layer import EMBEDDING
from dlo_export.checkpoints.router_thresholds import ONE_HALF
from dlo_export.exporter.artefact_runner import held_tokens, serialized
from dlo_export.exporter.artefact_source import check_made_from
from dlo_export.exporter.linked_weights import weights_folder
from dlo_export.exporter.named_operators import plugin_operators
from dlo_export.exporter.parity_check import why_not_run
from dlo_export.exporter.pipeline import exposed_part
from dlo_export.exporter.sources.base_model import check_use
from dlo_export.exporter.sources.graph_file import load_graph
from dlo_export.exporter.sources.reduced_source import without_layers
from dlo_export.exporter.sources.source import ExportSource
from dlo_export.graph_passes.find.padding import takes_left_padding
from dlo_export.runtimes.artefact.description import MODEL_NAME, ArtefactDescription
from dlo_export.runtimes.onnxruntime.part_runner import OnnxRuntimePart
from dlo_export.runtimes.onnxruntime.providers import CPU
from dlo_export.runtimes.parity.by_layer import compare_by_layer
from dlo_export.runtimes.parity.cases import parity_cases
from dlo_export.runtimes.parity.layer_report import LayerReport


def check_parity_by_layer(
    source: ExportSource,
    folder: Path,
    description: ArtefactDescription,
    plugin_library: Path | None = None,
    *,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> LayerReport:
    """Compares the released model.onnx with the PyTorch model of its source, both cut into layers, on the CPU.

    Memory is that of the largest part (a layer, the embedding or the head) on one side at a time, and of the residual
    streams, whatever the depth: in float32, and as ONNX Runtime packs it for its kernels, as much again. Every layer's
    weights are read once from either side.

    Args:
        source: What the artefact was made from.
        folder: The artefact.
        description: Its dlo_artifact.json.
        plugin_library: libdlo_ort.so, for an artefact with dlo operators.
        progress: Told how many parts of how many are done.

    Raises:
        InputError: There is no PyTorch model of the source, the artefact was made from another one, or its cache is
            written in place.
        dlo_export.graph_passes.errors.GraphPassError: The graph cannot be cut between its layers.
    """
    check_use(source.base, "parity")
    if not source.removed_layers:
        source = without_layers(source, description.source.removed_layers)
    released = load_graph(folder / MODEL_NAME)
    check_made_from(source, folder, description, released)
    if held_tokens(description) is not None:
        raise InputError(
            f"{folder}: its cache is written in place, which one layer alone does not do",
            hint="leave --by-layer out",
        )
    if (reason := why_not_run(source, description, released, plugin_library, CPU, engines=False)) is not None:
        return LayerReport("", "", description.dtype, None, reason=reason)
    # Imported here: torch takes seconds.
    from dlo_export.runtimes.torch.part_reference import TorchReference  # noqa: PLC0415

    tensors = source.tensors()
    reference = TorchReference(source.config_json(), tensors)
    library = plugin_library if plugin_operators(released) else None
    routed, padded = source.routing is not None, takes_left_padding(released.graph)
    return compare_by_layer(
        reference.open_part,
        functools.partial(_open_part, released, weights_folder(released, folder), library),
        parity_cases(tensors[EMBEDDING].shape[0], routed=routed, padded=padded),
        num_layers=reference.num_layers,
        thresholds={layer: description.router_thresholds.get(layer, ONE_HALF) for layer in description.routed_layers},
        dtype=description.dtype,
        names=(TorchReference.name, "dense" if description.lowering == "none" else description.lowering),
        progress=progress,
    )


def _open_part(released: ir.Model, folder: Path, library: Path | None, part: int) -> OnnxRuntimePart:
    model = serialized(exposed_part(released, part))
    # PyTorch runs in the same process: spinning threads would take its cores.
    return OnnxRuntimePart(model, f"part {part}", weights_folder=folder, allow_spinning=False, plugin_library=library)
