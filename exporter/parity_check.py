"""The parity ladder of an artefact: PyTorch oracle, masked graph, lowered graph.

Where there is no PyTorch model of somebody's graph, its own masked form is the oracle; where it was deepened only, and
by layers that add nothing, the graph as it was. Its engines' twins are then compared with the graph itself.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from dlo_export.checkpoints.dtypes import BY_OPTION
from dlo_export.checkpoints.files.scratch_folder import scratch_folder
from dlo_export.checkpoints.llama_layer import EMBEDDING
from dlo_export.exporter.artefact_runner import held_tokens
from dlo_export.exporter.artefact_source import check_made_from
from dlo_export.exporter.exact_products import asks_to_round, rounds_activations
from dlo_export.exporter.linked_weights import weights_folder
from dlo_export.exporter.named_operators import named_operators
from dlo_export.exporter.parity_candidates import (
    graph_candidate,
    masked_graph,
    twin_candidates,
)
from dlo_export.exporter.parity_references import (
    dequantising_reference,
    graph_as_it_was,
    masked_reference,
    pytorch_reference,
)
from dlo_export.exporter.pipeline import TensorRtOptions
from dlo_export.exporter.sources.graph_file import load_graph
from dlo_export.exporter.sources.reduced_source import without_layers
from dlo_export.exporter.sources.source import ExportSource
from dlo_export.graph_passes.find.padding import takes_left_padding
from dlo_export.graph_passes.lowerings.record import PROVIDER_TARGETS
from dlo_export.graph_passes.lowerings.registry import find_lowering
from dlo_export.plugins.ort_registration import no_library
from dlo_export.runtimes.artefact.description import MODEL_NAME, ArtefactDescription
from dlo_export.runtimes.onnxruntime.providers import CPU, Provider
from dlo_export.runtimes.parity.cases import parity_cases
from dlo_export.runtimes.parity.compare import Candidate, OtherPrecision, compare
from dlo_export.runtimes.parity.report import ParityReport
from dlo_export.runtimes.parity.tolerances import EIGHT_BIT_ACTIVATIONS

_ROUNDING = "its masked form rounded to 8 bits is off that without"
_SEED = 0
_GREEDY_PROMPTS = (24, 15)  # tokens: of unequal length, so that one is padded
_GREEDY_TOKENS = 32
MOST_TOKENS = _GREEDY_PROMPTS[0] + _GREEDY_TOKENS
"""Slots of a KV cache that parity's longest case fills; it makes do with fewer."""


def check_parity(
    source: ExportSource,
    folder: Path,
    description: ArtefactDescription,
    tensorrt: Iterable[TensorRtOptions] = (),
    plugin_library: Path | None = None,
    *,
    provider: Provider = CPU,
    device: str = "cpu",
) -> ParityReport:
    """Compares an artefact, and the fp32 twins of its TensorRT graphs, with the PyTorch model of its source.

    Every rung runs from the artefact's own weights. Where logits differ, the case is repeated with the residual streams
    exposed, so that the report names the first layer that diverges.

    Args:
        source: What the artefact was made from.
        folder: The artefact.
        description: Its dlo_artifact.json.
        tensorrt: Options of its TensorRT graphs.
        plugin_library: libdlo_ort.so, for an artefact with dlo operators; without it there is nothing to run.
        provider: What runs the artefact; the twins of TensorRT graphs are the CPU's.
        device: Of the reference, as `--device` names it.

    Raises:
        BackendUnavailableError: The provider does not start here.
        MachineError: There is no such device, or no place for temporary files.
        InputError: The artefact was made from another source, or by another version, or the library cannot be used.
    """
    if not source.removed_layers:  # of an artefact without some, the source as it was opened has all
        source = without_layers(source, description.source.removed_layers)
    released = load_graph(folder / MODEL_NAME)
    check_made_from(source, folder, description, released)
    tensorrt = tuple(dict.fromkeys(tensorrt))
    reason = why_not_run(source, description, released, plugin_library, provider, engines=bool(tensorrt))
    if reason is not None:
        return ParityReport.not_run(reason)
    has_model = source.base.why_not("parity") is None
    weights = weights_folder(released, folder)
    file = folder / MODEL_NAME if weights == folder else None
    rungs = functools.partial(_rungs, source, weights, description, released, plugin_library, provider)
    candidates = rungs(file=file)
    comparison = _comparison(source, description, released, tensorrt)
    with scratch_folder() as scratch:
        twins = twin_candidates(source, weights, description, released, tensorrt, scratch)
        if has_model:
            opened = functools.partial(pytorch_reference, source, device=device)
            with opened() as reference:
                other = OtherPrecision.of_pytorch(
                    description.dtype, lambda dtype: opened(name=f"PyTorch in {dtype}", dtype=dtype)
                )
                return comparison(reference, [*candidates, *twins], other=other)
        # What a graph with quantised weights computes depends on its kernels: what it is lowered to runs on the same
        # ones, engines on weights that were dequantised.
        reports, has_oracle, routed = [], _why_no_oracle(source, description) is None, source.routing is not None
        unlowered = released
        if routed:
            unlowered = masked_graph(source, folder, released, description, equal_weights=has_oracle)
        thresholds = description.router_thresholds
        exactly = functools.partial(dequantising_reference, unlowered, weights, thresholds, provider, routed=routed)
        if has_oracle:
            rounds = routed and rounds_activations(released.graph)
            unrounded = OtherPrecision(exactly, True, _ROUNDING) if rounds else None
            own = (
                masked_reference(unlowered, weights, thresholds, provider)
                if routed
                else graph_as_it_was(source, provider)
            )
            with own as reference:
                # The same kernels, which may round a token of a prompt otherwise than one that comes by itself.
                report = comparison(reference, candidates, steps_matter=True, other=unrounded)
            if rounds and not report.within_table:
                with exactly() as reference:
                    exact = comparison(reference, rungs(file=None, exact_products=True), steps_matter=True)
                report = _up_to_rounding(report, exact)
            reports.append(report)
        if twins:
            with exactly() as reference:
                reports.append(comparison(reference, twins))
        return ParityReport.joined(reports)


def _up_to_rounding(released: ParityReport, exact: ParityReport) -> ParityReport:
    """What is said of a graph that its own products' rounding to 8 bits keeps from its masked form.

    That its lowering is right shows where nothing is rounded so, by the table; that what is shipped is it, too, where
    it differs from its masked form by no more than that rounding makes either differ.

    Args:
        released: As it is shipped, against its masked form; with what the rounding does to that.
        exact: The same two without rounding to 8 bits.
    """
    by_rounding = dataclasses.replace(released, tolerance=EIGHT_BIT_ACTIVATIONS)
    if by_rounding.verdict == "FAIL":
        return by_rounding
    if exact and not by_rounding:
        return dataclasses.replace(
            by_rounding, reference=f"{released.reference}, which it equals without rounding to 8 bits"
        )
    off = max(case.logits.largest for case in released.cases)
    name = f"{released.reference}, multiplying by activations as they are (rounded to 8 bits, {off:.1e} of the peak)"
    return dataclasses.replace(exact, reference=name)


def _rungs(
    source: ExportSource,
    folder: Path,
    description: ArtefactDescription,
    released: ir.Model,
    plugin_library: Path | None,
    provider: Provider,
    *,
    file: Path | None,
    exact_products: bool = False,
) -> list[Candidate]:
    """The released graph, behind its masked form where that says more than the reference alone.

    Its weights lie in the folder; it is read from the file, or run from memory where links make that necessary.
    """
    has_model, routed = source.base.why_not("parity") is None, source.routing is not None
    graphs = {description.lowering: released}
    # An artefact made from a graph, compared with a checkpoint: its weights lie as they did in that graph.
    from_graph = description.source.kind == "onnx" and source.base.is_built_here
    target = PROVIDER_TARGETS[description.provider]
    if has_model and not from_graph and find_lowering(description.lowering, target).make_pass is not None:
        graphs = {"masked": masked_graph(source, folder, released, description), **graphs}
    candidates = [
        graph_candidate(
            name,
            graph,
            folder,
            # What is shipped is what runs, byte for byte.
            file=file if graph is released else None,
            routed=routed,
            plugin_library=plugin_library,
            provider=provider,
            exact_products=exact_products,
        )
        for name, graph in graphs.items()
    ]
    if not has_model and not routed:
        # The graph as it was has fewer layers: there is no telling at which one the streams part.
        candidates = [dataclasses.replace(candidate, open_streams=None) for candidate in candidates]
    return candidates


def _comparison(
    source: ExportSource,
    description: ArtefactDescription,
    released: ir.Model,
    tensorrt: Sequence[TensorRtOptions],
) -> Callable[..., ParityReport]:
    """`compare` with all but its two sides: cases and prompts that fit every cache, the artefact's tolerances."""
    slots = [held_tokens(description) or MOST_TOKENS, *(options.max_cache for options in tensorrt)]
    longest = min(MOST_TOKENS, *slots)
    routed, vocab_size = source.routing is not None, source.tensors()[EMBEDDING].shape[0]
    padded = takes_left_padding(released.graph)
    rng = np.random.default_rng(_SEED)
    greedy_prompts = _GREEDY_PROMPTS if padded else (_GREEDY_PROMPTS[0],) * 2
    prompts = [max(1, tokens * longest // MOST_TOKENS) for tokens in greedy_prompts]
    return functools.partial(
        compare,
        cases=parity_cases(vocab_size, routed=routed, seed=_SEED, longest=longest, padded=padded),
        dtype=description.dtype,
        greedy_prompts=[rng.integers(0, vocab_size, tokens).tolist() for tokens in prompts],
        greedy_tokens=max(1, longest - prompts[0]),
        steps_matter=source.base.config is not None and source.base.config.rope.depends_on_length,
    )


def _why_no_oracle(source: ExportSource, description: ArtefactDescription) -> str | None:
    """Why a graph cannot be compared with itself either."""
    if source.routing is None:
        new = {layer.position for layer in source.injected_layers}
        return None if new.issubset(source.identity_layers()) else "its new layers change what it computes"
    masked = find_lowering(description.lowering, PROVIDER_TARGETS[description.provider]).make_pass is None
    return "the masked graph would be compared with itself" if masked else None


def why_not_run(
    source: ExportSource,
    description: ArtefactDescription,
    released: ir.Model,
    plugin_library: Path | None,
    provider: Provider,
    *,
    engines: bool,
) -> str | None:
    """Why there is nothing to compare: no PyTorch model, or a graph that the provider has no kernels for.

    Graphs of engines are compared with the graph they were made from, where there is nothing else.
    """
    if not engines and (refusal := source.base.why_not("parity")) is not None:
        no_oracle = _why_no_oracle(source, description)
        if no_oracle is not None:
            return f"{refusal.reason}, and {no_oracle}"
    if description.plugin_operators and plugin_library is None:
        return no_library(description.plugin_operators).message
    return provider.why_not_run(BY_OPTION[description.dtype], named_operators(released))


def doubt_about_kernels(released: ir.Model, description: ArtefactDescription, provider: Provider) -> str | None:
    """What a failed parity may come from other than the graph, and what tells the two apart; None: nothing known.

    ONNX Runtime 1.32 on a CPU: a float16 node between two that it has in float32 alone is computed in float32, its
    scales cast in front of it. In a branch nothing folds that Cast, and MatMulNBits packs the codes for products of 8
    bits without the scales that it sees as computed: what it gives then is off by as much as it is large.
    """
    if provider.device != CPU.device or description.dtype != "fp16":
        return None
    if not asks_to_round(released.graph):
        return None
    return (
        "ONNX Runtime's CPU provider may compute float16 MatMulNBits of accuracy_level 4 wrongly in branches, and "
        "rounds to 8 bits elsewhere: whether it is that, a graph built with accuracy_level 0 shows"
    )
