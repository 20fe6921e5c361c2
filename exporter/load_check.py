"""Whether ONNX Runtime runs what was made of somebody's graph: asked before anything is written, without weights."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from dlo_export.checkpoints.dtypes import BY_OPTION
from dlo_export.checkpoints.errors import InputError
from dlo_export.exporter.artefact_description import interface
from dlo_export.exporter.named_operators import named_operators, plugin_operators
from dlo_export.exporter.pipeline import prepare_foreign, state_cache_sizes
from dlo_export.exporter.skeleton import without_weights
from dlo_export.exporter.sources.graph_file import load_graph
from dlo_export.runtimes.decoder_interface import DecoderInterface, cache_kind
from dlo_export.runtimes.onnxruntime.loading import Refusal, why_refused
from dlo_export.runtimes.onnxruntime.providers import CPU, Provider


def check_loads(
    model: ir.Model, path: Path, dtype: str, provider: Provider, plugin_library: Path | None, *, steps: bool
) -> None:
    """Refuses a graph that is no decoder to our runners, or that ONNX Runtime does not load.

    A session is made of the graph with inputs in place of its weights: that costs neither the memory of the weights
    nor the time to read them. Whether the sizes fit that only a step knows, a step tells: parity's, or one on zeros.

    Args:
        model: The finished graph; its weights are not read.
        path: The graph it was made of.
        dtype: "fp32", "fp16" or "bf16".
        provider: That it is made for. The session is the CPU's, which every machine has; kernels that it lacks are
            held against the graph only where it is to run on the CPU, and that is no gap which is known.
        plugin_library: libdlo_ort.so, for a graph with dlo operators; nothing loads one without it.
        steps: Try a prompt and a token behind it, too: nothing else will run the graph.

    Raises:
        InputError: It cannot be loaded, or run; with ONNX Runtime's reason.
    """
    said = interface(model.graph)
    kind = cache_kind([value.name for value in said.inputs])
    DecoderInterface.of(said.inputs, said.outputs, str(path), cache=kind)
    if plugin_operators(model) and plugin_library is None:
        return
    needs_kernels = provider is CPU and CPU.why_not_run(BY_OPTION[dtype], named_operators(model)) is None

    def refusal(graph: ir.Model) -> Refusal | None:
        skeleton = without_weights(graph).SerializeToString()
        return why_refused(skeleton, plugin_library, needs_kernels=needs_kernels, steps=steps and kind == "growing")

    if (found := refusal(model)) is None:
        return
    # As it was, but under the interface's names: a step says nothing of a graph that nobody knows what to feed.
    if refusal(state_cache_sizes(prepare_foreign(load_graph(path)))) is not None:
        raise InputError(
            f"{path}: cannot be {found.done}: {found.reason}",
            hint="export it again, or install the ONNX Runtime that it was made for",
        )
    raise InputError(
        f"{path}: is taken by ONNX Runtime, but what was made of it cannot be {found.done}: {found.reason}",
        hint="choose another --lowering (masked changes least), or export the checkpoint; please report it",
    )
