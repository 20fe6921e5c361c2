"""`dlo calibrate`: routers for a model, fitted to text or given another rate, and what they cost on other text."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import dlo_export.runtimes  # noqa: F401 - before torch: sets how its threads wait
from dlo_export.checkpoints.adapter.adapter import CONFIG_NAME, LORA_FOLDER, DloAdapter, save_adapter
from dlo_export.checkpoints.adapter.lora import TENSORS_NAME as LORA_TENSORS
from dlo_export.checkpoints.checkpoint_folder import save_checkpoint
from dlo_export.checkpoints.depth.expansion import dense_config, routed_config
from dlo_export.checkpoints.errors import InputError
from dlo_export.checkpoints.files.folder_kind import FolderKind
from dlo_export.checkpoints.files.output_check import check_output_folder, check_output_space
from dlo_export.checkpoints.files.scratch_folder import scratch_folder
from dlo_export.checkpoints.lazy_tensors import ArrayTensor, LazyTensor
from dlo_export.checkpoints.llama_layer import layer_tensor_name, parse_router, router_name
from dlo_export.checkpoints.model_types import RoutingKind, family_of, kv_keys
from dlo_export.checkpoints.router_thresholds import replaced_thresholds, thresholds_json
from dlo_export.checkpoints.tokenization.encoder import load_encoder
from dlo_export.exporter.progress import Reporter
from dlo_export.exporter.sources.base_model import check_use
from dlo_export.exporter.sources.source import ExportSource, open_source
from dlo_export.modeling.calibration.evaluation import Evaluation, evaluate, with_routers
from dlo_export.modeling.calibration.rate_control import sequence_scores, shift_thresholds
from dlo_export.modeling.calibration.router_calibration import CalibratedRouters, CalibrationSettings, calibrate_routers
from dlo_export.modeling.calibration.text import CalibrationText, calibration_text, read_documents
from dlo_export.modeling.devices import torch_device
from dlo_export.modeling.from_tensors import llama_dlo_from_tensors
from dlo_export.modeling.identity_layers import identity_layers
from dlo_export.modeling.llama_dlo import LlamaDloForCausalLM
from dlo_export.modeling.training.router_distillation import DistillationSettings, distilled_routers
from dlo_export.modeling.training.settings import TrainingSettings

_FIT_TOKENS = 16_384
_DISTILLATION_TOKENS = 49_152
_SHIFT_TOKENS = 8_192  # to fit one number to
_UNREACHED = 0.02


@dataclasses.dataclass(frozen=True)
class CalibrationRequest:
    """Arguments of `dlo calibrate`.

    Attributes:
        model: Checkpoint folder, `.gguf` file, or hub id in the local cache.
        output: Folder to make.
        adapter: Adapter on the model; the output is then an adapter too.
        as_adapter: Write the routers alone, as an adapter on the model.
        settings: Of the fit, but for what tokens skip.
        distillation: Train the fitted routers on; None leaves them as they are fitted.
        retarget: Share of tokens that the routers the model has are to keep active, in place of fitting any.
        text: File or folder of .txt; Python's own documentation where None.
        tokens: To fit on; None for a number that suits what is done.
        evaluation_tokens: To measure on, from other documents.
        seed: Of the choice of documents to fit on.
        device: Of the model and the text, as `--device` names it.
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
    tokens: int | None
    evaluation_tokens: int
    seed: int
    force: bool
    force_base: bool = False
    routing: RoutingKind | None = None
    distillation: DistillationSettings | None = None
    retarget: float | None = None
    device: str = "cpu"

    @property
    def makes_adapter(self) -> bool:
        """Whether the output is an adapter."""
        return self.as_adapter or self.adapter is not None


@dataclasses.dataclass(frozen=True)
class RateChange:
    """How thresholds moved the active rate, over all layers but identities.

    Attributes:
        target: What was asked for.
        before: What it was, on the held-out text.
        after: What it is there. Thresholds are fitted on other text.
    """

    target: float
    before: float
    after: float


@dataclasses.dataclass(frozen=True)
class CalibrationResult:
    """What was fitted and measured.

    Attributes:
        fitted: The routers.
        routing: What tokens skip.
        injected: Positions of injected layers.
        dense: Without routers, on the held-out text.
        routed: With them, on the same.
        rate: How thresholds moved their rate; None where they did not.
    """

    fitted: CalibratedRouters
    routing: RoutingKind
    injected: tuple[int, ...]
    dense: Evaluation
    routed: Evaluation
    rate: RateChange | None = None

    def active_rate(self, *, injected: bool) -> float | None:
        """Mean over original or injected layers; None where there are none."""
        layers = [i for i in range(self.fitted.num_layers) if (i in self.injected) is injected]
        return _mean_rate(self.routed, layers) if layers else None

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
            "router_thresholds": thresholds_json(self.fitted.thresholds),
            "rate_control": None if self.rate is None else dataclasses.asdict(self.rate),
            "injected_layers": list(self.injected),
            "identity_layers": list(self.fitted.identity_layers),
        }


def calibrate(request: CalibrationRequest, reporter: Reporter) -> CalibrationResult:
    """Fits routers, or moves the rate of those there are, and writes the routed model.

    Raises:
        ValueError: Of our packages: the model, the text or the settings are not usable.
        MachineError: There is no such device.
    """
    inputs = (Path(request.model), request.adapter, request.text)
    makes = FolderKind.ADAPTER if request.makes_adapter else FolderKind.CHECKPOINT
    check_output_folder(request.output, overwrite=request.force, makes=makes, inputs=inputs)
    device = torch_device(request.device)  # or it says why not, before the work
    if request.distillation is not None:
        TrainingSettings(device=request.device)  # refuses a GPU that training cannot choose
    source = open_source(request.model, request.adapter, force_base=request.force_base)
    try:
        check_use(source.base, "calibration")
        lora = _carried_lora(source)
        if request.retarget is not None:
            _check_retarget(source, request)
        for warning in source.base.warnings:
            reporter.warn(warning)
        # The routers that are there are replaced, so theirs is a default and no more.
        routing = request.routing or (source.routing.kind if source.routing is not None else "mlp")
        text = source_text(source, request).to(device)
        with reporter.stage("model"):
            tensors = {n: t for n, t in source.tensors().items() if parse_router(n) is None}
            kept = _kept_tensors(source, tensors, request)
            config = source.config_json()
            routers = source.num_layers * config["hidden_size"] * np.dtype(np.float32).itemsize
            check_output_space(request.output, sum(tensor.nbytes for tensor in kept.values()) + routers)
            if request.retarget is None:
                model = llama_dlo_from_tensors(config | dense_config(config), tensors, device=device)
            else:
                model = llama_dlo_from_tensors(config, source.tensors(), device=device)
        if request.retarget is None:
            fitted, routed = _fitted(model, text, request, routing, reporter)
        else:
            fitted, routed = _as_they_are(model, source), model
        target = request.settings.target_active if request.retarget is None else request.retarget
        before = None
        if request.retarget is not None or request.distillation is not None:
            with reporter.stage("thresholds"):
                before = _rate(fitted, evaluate(routed, text.evaluation))
                fitted = _shifted(routed, fitted, target, text)
        with reporter.stage("evaluation"):
            dense_evaluation = evaluate(with_routers(model, {}), text.evaluation)
            routed_evaluation = evaluate(routed, text.evaluation)
        rate = None if before is None else RateChange(target, before, _rate(fitted, routed_evaluation))
        with reporter.bytes("writing") as written:
            _save(source, fitted, routing, kept, request, written, lora)
        injected = tuple(layer.position for layer in source.injected_layers)
        return CalibrationResult(fitted, routing, injected, dense_evaluation, routed_evaluation, rate)
    finally:
        source.close()


def source_text(source: ExportSource, request: CalibrationRequest) -> CalibrationText:
    """Tokens to fit on and to measure on, by the model's own tokenizer."""
    with scratch_folder() as folder:
        source.base.save_companions(folder)
        encode = load_encoder(folder, source.base.path)
    usual = _FIT_TOKENS if request.distillation is None else _DISTILLATION_TOKENS
    return calibration_text(
        read_documents(request.text),
        encode,
        calibration_tokens=usual if request.tokens is None else request.tokens,
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


def _carried_lora(source: ExportSource) -> Path | None:
    """The LoRA matrices that an adapter has beside its routers, and the written one will have; None for none."""
    lora = source.base.lora
    if lora is None:
        return None
    if source.adapter is None:
        raise InputError(
            f"{source.base.path}: would be calibrated under the LoRA adapter {lora.path}, which has no routers",
            hint="merge it with PEFT's merge_and_unload, save the model, and calibrate that",
        )
    return lora.path


def _check_retarget(source: ExportSource, request: CalibrationRequest) -> None:
    if source.routing is None:
        raise InputError(
            f"{source.base.path}: has no routers whose rate could be moved",
            hint="fit some without --retarget, or name the adapter that holds them with --adapter",
        )
    assert request.retarget is not None, "or nothing asks"
    if not 0 < request.retarget < 1:
        raise InputError(
            f"calibration: --retarget is {request.retarget}, expected a share between 0 and 1",
            hint="0.8 keeps four fifths of the tokens active, as the mean over the layers",
        )
    if request.routing not in (None, source.routing.kind):
        raise InputError(
            f"calibration: --routing {request.routing}, but the routers to retarget are for {source.routing.kind}",
            hint="leave --routing out, or fit other routers without --retarget",
        )
    if request.as_adapter:
        raise InputError(
            f"{source.base.path}: has its routers in the checkpoint, and an adapter goes on one without",
            hint="leave --as-adapter out: of a checkpoint with routers another one is written",
        )


def _fitted(
    model: LlamaDloForCausalLM,
    text: CalibrationText,
    request: CalibrationRequest,
    routing: RoutingKind,
    reporter: Reporter,
) -> tuple[CalibratedRouters, LlamaDloForCausalLM]:
    """Routers by similarity, on request distilled, and the model with them."""
    length = text.calibration.shape[1]
    sequences = text.calibration if request.distillation is None else text.calibration[: _FIT_TOKENS // length]
    with reporter.count("routers") as progress:
        settings = dataclasses.replace(request.settings, routing=routing)
        fitted = calibrate_routers(model, sequences, settings, progress=progress)
    if request.distillation is not None:
        start = {layer: fitted.routers[layer] for layer in fitted.choosing}
        with reporter.count("distillation") as progress:
            learned = distilled_routers(
                model,
                start,
                text.calibration,
                fitted.rate_of_choosing(request.settings.target_active),
                request.distillation,
                routing=routing,
                held_out=text.evaluation,
                progress=progress,
            )
        fitted = dataclasses.replace(fitted, routers=fitted.routers | learned)
    return fitted, with_routers(model, fitted.routers, routing)


def _as_they_are(model: LlamaDloForCausalLM, source: ExportSource) -> CalibratedRouters:
    """The routers a model has."""
    return CalibratedRouters(
        num_layers=source.num_layers,
        routers={layer: router.reshape(1, -1) for layer, router in source.routers().items()},
        label_rates={},
        agreement={},
        identity_layers=tuple(identity_layers(model, model.config.routing)),
        thresholds=model.config.thresholds,
    )


def _shifted(
    routed: LlamaDloForCausalLM, fitted: CalibratedRouters, target: float, text: CalibrationText
) -> CalibratedRouters:
    """Brings the model's rate to the target by its thresholds, on the text that routers are fitted on."""
    wanted = fitted.rate_of_choosing(target)
    sequences = text.calibration[: max(1, _SHIFT_TOKENS // text.calibration.shape[1])]
    shift = shift_thresholds(routed, lambda: sequence_scores(routed, sequences), wanted, fitted.choosing)
    if abs(shift.after - wanted) > _UNREACHED:
        raise InputError(
            f"calibration: no thresholds let {wanted:.1%} of the tokens through routers {list(fitted.choosing)}: "
            f"the nearest is {shift.after:.1%}, since too many scores are the same",
            hint="are these routers trained? `dlo calibrate` without --retarget fits new ones",
        )
    return dataclasses.replace(fitted, thresholds=shift.thresholds)


def _rate(fitted: CalibratedRouters, measured: Evaluation) -> float:
    """Mean active rate over all layers but identities."""
    return _mean_rate(measured, [layer for layer in range(fitted.num_layers) if layer not in fitted.identity_layers])


def _mean_rate(measured: Evaluation, layers: Sequence[int]) -> float:
    """Mean active rate, a layer without router counting as always active."""
    return sum(measured.active_rates.get(layer, 1.0) for layer in layers) / len(layers)


def _save(
    source: ExportSource,
    fitted: CalibratedRouters,
    routing: RoutingKind,
    kept: dict[str, LazyTensor],
    request: CalibrationRequest,
    progress: Callable[[int, int], None],
    lora: Path | None,
) -> None:
    def save_companions(staging: Path) -> None:
        # Copied byte by byte: the hash of the model that the routers belong to is made of its own.
        if lora is not None:
            (staging / LORA_FOLDER).mkdir()
            for name in (CONFIG_NAME, LORA_TENSORS):
                shutil.copyfile(lora / name, staging / LORA_FOLDER / name)

    routers: dict[str, LazyTensor] = {
        router_name(layer): ArrayTensor(np.asarray(router, np.float32).reshape(1, -1))
        for layer, router in fitted.routers.items()
    }
    is_dlo = tuple(layer in fitted.routers for layer in range(fitted.num_layers))
    if request.makes_adapter:
        if request.retarget is not None and source.adapter is not None:
            adapter = dataclasses.replace(source.adapter, router_thresholds=fitted.thresholds)
        else:
            adapter = DloAdapter(
                routing,
                is_dlo,
                router_thresholds=fitted.thresholds,
                injected_layers=source.adapter.injected_layers if source.adapter is not None else (),
                base_sha256=source.base.sha256(),
                tensors=kept | routers,
            )
        save_adapter(adapter, request.output, overwrite=request.force, save_companions=save_companions)
        return
    rule: dict[str, Any] = {}
    if request.retarget is not None and source.routing is not None:
        own = source.routing
        rule = {"rescale": own.rescale, "scale_factor": own.scale_factor, "scale_gap": own.scale_gap}
    given = source.config_json()
    family = family_of(given)
    changes = routed_config(is_dlo, routing=routing, thresholds=fitted.thresholds, family=family, **rule)
    save_checkpoint(
        kept | routers,
        request.output,
        save_companions=source.base.save_companions,
        config_changes=changes | kv_keys(routing, given) | replaced_thresholds(given, fitted.thresholds),
        overwrite=request.force,
        progress=progress,
    )
