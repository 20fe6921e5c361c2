"""One artefact, several routings: variants of its graph with other routers, which share all other weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from benchmarks.common.onnxruntime_worker import DecoderStep
from dlo_export.checkpoints.interface import router_scores_name
from dlo_export.checkpoints.llama_layer import router_name
from dlo_export.exporter.export import ExportRequest, export_model
from dlo_export.exporter.pipeline import exposed
from dlo_export.exporter.progress import Reporter
from dlo_export.modeling.llama_dlo import LlamaDloForCausalLM
from dlo_export.runtimes.artefact.description import MODEL_NAME


def export(
    model: Path,
    output: Path,
    adapter: Path | None = None,
    lowering: str = "auto",
    static_cache: int | None = None,
) -> Path:
    """Does what `dlo-export MODEL -o OUTPUT --adapter ADAPTER --no-parity` does; returns the graph."""
    request = ExportRequest(
        str(model),
        output,
        adapter=adapter,
        lowering=lowering,
        parity=False,
        force=True,
        static_cache=static_cache,
    )
    export_model(request, Reporter())
    return output / MODEL_NAME


def with_routers_of(model: LlamaDloForCausalLM, graph: Path, name: str) -> Path:
    """Writes a variant beside an artefact's graph whose routers are a PyTorch model's.

    Args:
        model: Its routers are taken.
        graph: An artefact's model.onnx, routed on the same layers.
        name: Of the variant.
    """
    variant = ir.load(graph)
    for layer, router in model.model.routers.items():
        weight = router.weight.detach().numpy()
        initializer = variant.graph.initializers[router_name(layer)]
        assert initializer.shape is not None
        column = weight.reshape(initializer.shape.numpy())
        initializer.const_value = ir.tensor(np.ascontiguousarray(column), name=initializer.name)
    path = graph.with_name(f"{name}.onnx")
    ir.save(variant, path)
    return path


def active_rate(graph: Path, tokens: np.ndarray, sequence: int) -> float:
    """Share of (token, routed layer) pairs whose MLP runs, of a step's tokens, as the graph itself decides.

    Args:
        graph: Routed.
        tokens: int64 [batch, past + sequence].
        sequence: Tokens of the step.
    """
    path = graph.with_name(f"{graph.stem}-exposed.onnx")
    ir.save(exposed(ir.load(graph)), path)
    step = DecoderStep(path, tokens, sequence, threads=ort.SessionOptions().intra_op_num_threads)
    step()
    scores = [value for name, value in step.outputs().items() if name.startswith(router_scores_name(""))]
    path.unlink()
    return float(np.mean([score > 0.5 for score in scores]))
