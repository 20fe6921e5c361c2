"""`dlo calibrate`: routers for a model, fitted to text, and what they cost on other text."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import dlo_export.runtimes  # noqa: F401 - before torch: sets how its threads wait
from dlo_export.checkpoints.adapter.adapter import DloAdapter, save_adapter
from dlo_export.checkpoints.checkpoint_folder import save_checkpoint
from dlo_export.checkpoints.depth.expansion import routed_config
from dlo_export.checkpoints.files.folder_kind import FolderKind
from dlo_export.checkpoints.files.output_check import check_output_folder, check_output_space
from dlo_export.checkpoints.files.scratch_folder import scratch_folder
from dlo_export.checkpoints.lazy_tensors import ArrayTensor, LazyTensor
from dlo_export.checkpoints.llama_layer import layer_tensor_name, parse_router, router_name
from dlo_export.checkpoints.model_types import RoutingKind
from dlo_export.checkpoints.tokenization.encoder import load_encoder
from dlo_export.exporter.progress import Reporter
from dlo_export.exporter.sources.base_model import check_use
from dlo_export.exporter.sources.source import ExportSource, open_source
from dlo_export.modeling.calibration.evaluation import Evaluation, evaluate, with_routers
from dlo_export.modeling.calibration.router_calibration import CalibratedRouters, CalibrationSettings, calibrate_routers
from dlo_export.modeling.calibration.text import CalibrationText, calibration_text, read_documents
from dlo_export.modeling.from_tensors import llama_dlo_from_tensors


@dataclasses.dataclass(frozen=True)
class CalibrationRequest:
    """Arguments of `dlo calibrate`.

    Attributes:
        model: Checkpoint folder, `.gguf` file, or hub id in the local cache.
        output: Folder to make.
        adapter: Adapter on the model; the output is then an adapter too.
        as_adapter: Write the routers alone, as an adapter on the model.
        settings: Of the fit, but for what tokens skip.
        text: File or folder of .txt; Python's own documentation where None.
        tokens: To fit on.
        evaluation_tokens: To measure on, from other documents.
        seed: Of the choice of documents to fit on.
        force: Replace an output of this program's.
        force_base: Let the adapter be made from other weights.
        routing: What tokens are to skip; None for what the model's routers skip, and MLPs where it has none.
    """

    model: str
    output: Path
    adapter: Path | None
    as_adapter: bool
    settings: CalibrationSettings
    text: Path | None
    tokens: int
    evaluation_tokens: int
    seed: int
    force: bool
    force_base: bool = False
    routing: RoutingKind | None = None

    @property
    def makes_adapter(self) -> bool:
        """Whether the output is an adapter."""
        return self.as_adapter or self.adapter is not None


@dataclasses.dataclass(frozen=True)
class CalibrationResult:
    """What was fitted and measured.

    Attributes:
        fitted: The routers.
        routing: What tokens skip.
        injected: Positions of injected layers.
        dense: Without routers, on the held-out text.
        routed: With them, on the same.
    """

    fitted: CalibratedRouters
    routing: RoutingKind
    injected: tuple[int, ...]
    dense: Evaluation
    routed: Evaluation

    def active_rate(self, *, injected: bool) -> float | None:
        """Mean over original or injected layers, a layer without router counting as always active."""
        layers = [i for i in range(self.fitted.num_layers) if (i in self.injected) is injected]
        rates = [self.routed.active_rates.get(layer, 1.0) for layer in layers]
        return sum(rates) / len(rates) if rates else None

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "routing": self.routing,
            "perplexity": {"dense": self.dense.perplexity, "routed": self.routed.perplexity},
            "evaluation_tokens": self.routed.tokens,
            "active_rate": {
                "original": self.active_rate(injected=False),
                "injected": self.active_rate(injected=True),
                "layers": self.routed.active_rates,
            },
            "label_rates": self.fitted.label_rates,
            "agreement": self.fitted.agreement,
            "injected_layers": list(self.injected),
            "identity_layers": list(self.fitted.identity_layers),
        }


def calibrate(request: CalibrationRequest, reporter: Reporter) -> CalibrationResult:
    """Fits routers and writes the routed model.

    Raises:
        ValueError: Of our packages: the model, the text or the settings are not usable.
    """
    inputs = (Path(request.model), request.adapter, request.text)
    makes = FolderKind.ADAPTER if request.makes_adapter else FolderKind.CHECKPOINT
    check_output_folder(request.output, overwrite=request.force, makes=makes, inputs=inputs)
    source = open_source(request.model, request.adapter, force_base=request.force_base)
    try:
        check_use(source.base, "calibration")
        for warning in source.base.warnings:
            reporter.warn(warning)
        # The routers that are there are replaced, so theirs is a default and no more.
        routing = request.routing or (source.routing.kind if source.routing is not None else "mlp")
        text = source_text(source, request)
        with reporter.stage("model"):
            tensors = {n: t for n, t in source.tensors().items() if parse_router(n) is None}
            config = {**source.config_json(), "is_dlo": False}
            kept = _kept_tensors(source, tensors, request)
            routers = source.num_layers * config["hidden_size"] * np.dtype(np.float32).itemsize
            check_output_space(request.output, sum(tensor.nbytes for tensor in kept.values()) + routers)
            model = llama_dlo_from_tensors(config | {"rescale_hidden_states": False}, tensors)
        with reporter.count("routers") as progress:
            settings = dataclasses.replace(request.settings, routing=routing)
            fitted = calibrate_routers(model, text.calibration, settings, progress=progress)
        with reporter.stage("evaluation"):
            dense = evaluate(model, text.evaluation)
            routed = evaluate(with_routers(model, fitted.routers, routing), text.evaluation)
        with reporter.bytes("writing") as written:
            _save(source, fitted, routing, kept, request, written)
        injected = tuple(layer.position for layer in source.injected_layers)
        return CalibrationResult(fitted, routing, injected, dense, routed)
    finally:
        source.close()


def source_text(source: ExportSource, request: CalibrationRequest) -> CalibrationText:
    """Tokens to fit on and to measure on, by the model's own tokenizer."""
    with scratch_folder() as folder:
        source.base.save_companions(folder)
        encode = load_encoder(folder, source.base.path)
    return calibration_text(
        read_documents(request.text),
        encode,
        calibration_tokens=request.tokens,
        evaluation_tokens=request.evaluation_tokens,
        seed=request.seed,
    )


def _kept_tensors(
    source: ExportSource, tensors: dict[str, LazyTensor], request: CalibrationRequest
) -> dict[str, LazyTensor]:
    """What is written beside the routers: all of a checkpoint, the injected layers of an adapter."""
    if not request.makes_adapter:
        return tensors
    injected = source.adapter.injected_layers if source.adapter is not None else ()
    prefixes = tuple(layer_tensor_name(layer.position, "") for layer in injected)
    return {name: tensor for name, tensor in tensors.items() if name.startswith(prefixes)}


def _save(
    source: ExportSource,
    fitted: CalibratedRouters,
    routing: RoutingKind,
    kept: dict[str, LazyTensor],
    request: CalibrationRequest,
    progress: Callable[[int, int], None],
) -> None:
    routers: dict[str, LazyTensor] = {
        router_name(layer): ArrayTensor(np.asarray(router, np.float32).reshape(1, -1))
        for layer, router in fitted.routers.items()
    }
    is_dlo = tuple(layer in fitted.routers for layer in range(fitted.num_layers))
    if request.makes_adapter:
        injected = source.adapter.injected_layers if source.adapter is not None else ()
        adapter = DloAdapter(
            routing, is_dlo, injected_layers=injected, base_sha256=source.base.sha256(), tensors=kept | routers
        )
        save_adapter(adapter, request.output, overwrite=request.force)
        return
    save_checkpoint(
        kept | routers,
        request.output,
        save_companions=source.base.save_companions,
        config_changes=routed_config(is_dlo, routing=routing),
        overwrite=request.force,
        progress=progress,
    )
