"""An artefact as a runner."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import onnx_ir as ir

from dlo_export.checkpoints.device_options import ProviderOption
from dlo_export.checkpoints.errors import InputError
from dlo_export.checkpoints.interface import LOGITS, past_name
from dlo_export.exporter.linked_weights import leads_out, weights_folder
from dlo_export.exporter.pipeline import exposed
from dlo_export.exporter.provider_gaps import gaps_explained
from dlo_export.exporter.sources.graph_file import load_graph
from dlo_export.plugins.ort_registration import no_library
from dlo_export.runtimes.artefact.description import MODEL_NAME, ArtefactDescription, load_description
from dlo_export.runtimes.artefact.files import check_model_files
from dlo_export.runtimes.decoder_interface import cache_kind
from dlo_export.runtimes.onnxruntime.in_place_runner import InPlaceRunner
from dlo_export.runtimes.onnxruntime.providers import BY_OPTION as BY_PROVIDER
from dlo_export.runtimes.onnxruntime.runner import OnnxRuntimeRunner
from dlo_export.runtimes.runner import Runner


def open_artefact(
    folder: Path,
    *,
    scores: bool = True,
    threads: int | None = None,
    allow_spinning: bool = True,
    plugin_library: Path | None = None,
    provider: ProviderOption | None = None,
) -> OnnxRuntimeRunner | InPlaceRunner:
    """Opens an artefact in ONNX Runtime.

    Args:
        folder: The artefact.
        scores: Give out the routers' scores too, in memory: the released graph does not. False for timing it as it is.
        threads: Of one operator.
        allow_spinning: Let idle threads spin; False where several runners share a process.
        plugin_library: libdlo_ort.so; loaded where the artefact has dlo operators, and never else.
        provider: What runs it; None: what it was exported for. No other one takes its place.

    Raises:
        InputError: The folder is no artefact, or its files are not of the sizes its description says.
        dlo_export.runtimes.errors.BackendUnavailableError: The provider is not there, does not start, or has no kernels
            for the graph.
        dlo_export.runtimes.errors.RuntimeInputError: ONNX Runtime refuses the graph.
        dlo_export.plugins.errors.PluginLibraryError: It has dlo operators, and no library that computes them is given.
    """
    description = load_description(folder)
    check_model_files(description, folder)
    operators = description.plugin_operators
    if operators and plugin_library is None:
        raise no_library(operators)
    shown = scores and description.routing is not None
    runs_it = BY_PROVIDER[provider or description.provider]
    model: Path | bytes = folder / MODEL_NAME
    weights: Path | None = None
    if shown or leads_out(folder, (file.name for file in description.files)):
        released = load_graph(folder / MODEL_NAME)
        weights = weights_folder(released, folder)
        model = exposed_model(released) if shown else serialized(released)
    with gaps_explained(description, folder, runs_it):
        return runner_for(value.name for value in description.interface.inputs)(
            model,
            weights_folder=weights,
            name=folder.name or folder.resolve().name,
            thresholds=description.router_thresholds,
            threads=threads,
            allow_spinning=allow_spinning,
            plugin_library=plugin_library if operators else None,
            provider=runs_it,
        )


def runner_for(inputs: Iterable[str]) -> type[OnnxRuntimeRunner] | type[InPlaceRunner]:
    """What runs a graph of ours in ONNX Runtime, by the names of its inputs."""
    return InPlaceRunner if cache_kind(tuple(inputs)) == "in_place" else OnnxRuntimeRunner


def held_tokens(description: ArtefactDescription) -> int | None:
    """Tokens per sequence that the cache of an artefact's model.onnx holds; None where it grows with them."""
    shapes = {spec.name: spec.shape for spec in description.interface.inputs}
    if cache_kind(tuple(shapes)) == "growing":
        return None
    slots = shapes[past_name(0, "key")][2]
    assert isinstance(slots, int), "what is written in place has a size"
    return slots


def gives_last_logits(description: ArtefactDescription) -> bool:
    """Whether an artefact computes logits of each sequence's last token alone."""
    return next(spec for spec in description.interface.outputs if spec.name == LOGITS).shape[1] == 1


def require_all_logits(folder: Path, description: ArtefactDescription, hint: str) -> None:
    """Refuses to score text by an artefact that does not compute what that takes, before any of it is read.

    Args:
        folder: The artefact.
        description: Its own.
        hint: What the command can do in place of it.

    Raises:
        InputError: So.
    """
    if gives_last_logits(description):
        raise InputError(
            f"{folder}: gives the logits of each sequence's last token alone, which tell nothing of a text's other "
            "tokens",
            hint=hint,
        )


def open_engines(folder: Path, plugin_library: Path | None = None) -> Runner:
    """Opens an artefact's TensorRT engines.

    Args:
        folder: The artefact.
        plugin_library: libdlo_plugins.so, where the engines were built with it.

    Raises:
        dlo_export.runtimes.errors.RuntimeInputError: There are none, or they cannot run here.
    """
    # Imported here: only this needs CUDA's bindings.
    from dlo_export.runtimes.tensorrt.runner import TensorRtRunner  # noqa: PLC0415

    return TensorRtRunner.of_artefact(folder, plugin_library=plugin_library)


def serialized(model: ir.Model) -> bytes:
    """As ONNX Runtime takes it from memory; its weights stay where they are."""
    return bytes(ir.to_proto(model).SerializeToString())


def exposed_model(released: ir.Model, *, force: bool = False, streams: bool = False) -> bytes:
    """A serialised copy of a released graph that shows what is inside; never released itself.

    Args:
        released: Left as it is.
        force: Take the routers' decisions from inputs.
        streams: Give out the residual stream behind every layer.
    """
    return serialized(exposed(released, force=force, streams=streams))
