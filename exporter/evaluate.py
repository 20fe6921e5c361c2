"""`dlo evaluate`: perplexity and tasks, of an artefact on ONNX Runtime or of a checkpoint on PyTorch."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from dlo_export.checkpoints.depth.expansion import dense_config
from dlo_export.checkpoints.device_options import ProviderOption
from dlo_export.checkpoints.errors import InputError
from dlo_export.checkpoints.files.scratch_folder import scratch_folder
from dlo_export.checkpoints.generation_config import GenerationConfig
from dlo_export.checkpoints.llama_layer import parse_router
from dlo_export.exporter.artefact_runner import held_tokens, open_artefact, require_all_logits
from dlo_export.exporter.progress import Reporter
from dlo_export.exporter.sources.source import ExportSource, open_source
from dlo_export.runtimes.artefact.description import FILE_NAME, load_description
from dlo_export.runtimes.evaluation.evaluate import (
    Evaluation,
    EvaluationPlan,
    EvaluationSettings,
    evaluate,
    plan_evaluation,
)
from dlo_export.runtimes.evaluation.requests import Task, read_task
from dlo_export.runtimes.evaluation.scorer import RunnerScorer
from dlo_export.runtimes.evaluation.texts import Text, read_text
from dlo_export.runtimes.generation.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class EvaluationRequest:
    """Arguments of `dlo evaluate`.

    Attributes:
        model: Artefact folder, or what `open_source` opens.
        texts: Files or folders to measure perplexity on.
        tasks: Files of requests.
        runner: "onnxruntime" for an artefact, "torch" for a checkpoint; "auto" is the one that fits.
        adapter: Adapter on a checkpoint.
        dense: Run a checkpoint without its routers.
        active_rate: Show an artefact's routers, which takes a copy of its graph; a checkpoint's always show.
        device: Of PyTorch, as `--device` names it.
        provider: Of ONNX Runtime; None: what the artefact was exported for.
        threads: Of ONNX Runtime.
        sequence: See `EvaluationSettings`, here and below.
        force_base: Let the adapter be made from other weights.
        ort_plugin_library: libdlo_ort.so, for an artefact with dlo operators.
    """

    model: str
    texts: tuple[Path, ...]
    tasks: tuple[Path, ...]
    runner: str = "auto"
    adapter: Path | None = None
    dense: bool = False
    active_rate: bool = False
    device: str = "cpu"
    provider: ProviderOption | None = None
    threads: int | None = None
    sequence: int | None = None
    stride: int | None = None
    batch: int | None = None
    limit: int | None = None
    force_base: bool = False
    ort_plugin_library: Path | None = None


@dataclasses.dataclass(frozen=True)
class ModelEvaluation:
    """A model, how it ran, and what was measured.

    Attributes:
        model: As it was given.
        runner: "onnxruntime" or "torch".
        device: What computed it: "cpu", "cuda" or "cuda:N".
        routed_layers: That skipped; empty for a dense model, and where routing was left out.
        result: The numbers.
    """

    model: str
    runner: str
    device: str
    routed_layers: tuple[int, ...]
    result: Evaluation

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "result"}
        return {**values, **self.result.to_json()}


def evaluate_model(request: EvaluationRequest, reporter: Reporter) -> ModelEvaluation:
    """Measures a model.

    Raises:
        InputError: Model, texts or tasks are not usable, or the options contradict the model.
        MachineError: There is no such device.
    """
    is_artefact = (Path(request.model) / FILE_NAME).is_file()
    on_torch = request.runner == "torch" or (request.runner == "auto" and not is_artefact)
    _check_options(request, is_artefact=is_artefact, on_torch=on_torch)
    texts = tuple(read_text(path) for path in request.texts)
    tasks = tuple(read_task(path) for path in request.tasks)
    if not texts and not tasks:
        raise InputError(
            f"{request.model}: nothing to measure", hint="add --text FILE_OR_FOLDER, --tasks FILE, or both"
        )
    run = _evaluate_on_torch if on_torch else _evaluate_artefact
    return run(request, texts, tasks, reporter)


def _check_options(request: EvaluationRequest, *, is_artefact: bool, on_torch: bool) -> None:
    if on_torch and is_artefact:
        raise InputError(
            f"{request.model}: is an artefact, which ONNX Runtime runs, not PyTorch",
            hint="leave --runner out, or give the checkpoint the artefact was made from",
        )
    if on_torch:
        if request.provider is not None:
            raise InputError(
                f"{request.model}: --provider {request.provider} is of ONNX Runtime, PyTorch runs a checkpoint",
                hint="--device says where PyTorch computes",
            )
        return
    given = {
        "--adapter": request.adapter is not None,
        "--dense": request.dense,
        f"--device {request.device}": request.device != "cpu",
    }
    if options := [option for option, is_given in given.items() if is_given]:
        raise InputError(
            f"{request.model}: {' and '.join(options)} cannot be had on ONNX Runtime, which runs an artefact as it was "
            "exported",
            hint="--provider says where; give the checkpoint, or export another artefact",
        )


def _evaluate_artefact(
    request: EvaluationRequest, texts: tuple[Text, ...], tasks: tuple[Task, ...], reporter: Reporter
) -> ModelEvaluation:
    folder = Path(request.model)
    description = load_description(folder)
    require_all_logits(
        folder, description, "export the model again without --last-logits, or give the checkpoint it was made from"
    )
    plan = _plan(request, texts, tasks, folder, reporter, slots=held_tokens(description))
    opened = open_artefact(
        folder,
        scores=request.active_rate,
        threads=request.threads,
        plugin_library=request.ort_plugin_library,
        provider=request.provider,
    )
    with opened as runner:
        result = evaluate(RunnerScorer(runner), plan, reporter.count)
    return ModelEvaluation(
        request.model, "onnxruntime", request.provider or description.provider, description.routed_layers, result
    )


def _evaluate_on_torch(
    request: EvaluationRequest, texts: tuple[Text, ...], tasks: tuple[Task, ...], reporter: Reporter
) -> ModelEvaluation:
    # Imported here: torch takes seconds, and an artefact does not need it.
    from dlo_export.runtimes.torch.scorer import TorchScorer  # noqa: PLC0415

    source = open_source(request.model, request.adapter, force_base=request.force_base)
    try:
        for warning in source.base.warnings if request.dense else source.warnings:
            reporter.warn(warning)
        config = source.config_json()  # refuses what has no PyTorch model, before anything is read
        with scratch_folder() as companions:
            source.base.save_companions(companions)
            plan = _plan(request, texts, tasks, companions, reporter)
        with reporter.stage("model"):
            model = _torch_model(source, config, dense=request.dense)
        scorer = TorchScorer(model, device=request.device, name=Path(request.model).name)
        result = evaluate(scorer, plan, reporter.count)
    finally:
        source.close()
    return ModelEvaluation(request.model, "torch", request.device, model.config.routed_layers, result)


def _plan(
    request: EvaluationRequest,
    texts: tuple[Text, ...],
    tasks: tuple[Task, ...],
    folder: Path,
    reporter: Reporter,
    *,
    slots: int | None = None,
) -> EvaluationPlan:
    """Tokens, by the tokenizer and the context length of a folder, or the slots of its cache where these are fewer."""
    if slots is not None and request.sequence is not None and request.sequence > slots:
        raise InputError(
            f"{folder}: sequence is {request.sequence}, its static cache holds {slots} tokens",
            hint=f"measure shorter sequences, or export with --static-cache {request.sequence} or more",
        )
    context = GenerationConfig.from_folder(folder, origin=Path(request.model)).context_length
    settings = EvaluationSettings(
        context=min((length for length in (context, slots) if length is not None), default=None),
        sequence=request.sequence,
        stride=request.stride,
        batch=request.batch,
        limit=request.limit,
    )
    tokenizer = Tokenizer(folder, origin=Path(request.model))
    with reporter.stage("tokens"):
        return plan_evaluation(tokenizer, texts, tasks, settings)


def _torch_model(source: ExportSource, config: dict[str, Any], *, dense: bool) -> Any:
    from dlo_export.modeling.from_tensors import llama_dlo_from_tensors  # noqa: PLC0415

    tensors = source.tensors()
    if dense:
        tensors = {name: tensor for name, tensor in tensors.items() if parse_router(name) is None}
        config = config | dense_config(config)
    return llama_dlo_from_tensors(config, tensors)
