"""`dlo train`: fine-tunes a model with its routers in place and writes the trained checkpoint."""

from __future__ import annotations

import dataclasses
import math
import platform
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import dlo_export.runtimes  # noqa: F401 - before torch: sets how its threads wait
from dlo_export import __version__
from dlo_export.checkpoints.adapter.adapter import TENSORS_NAME
from dlo_export.checkpoints.checkpoint_folder import save_checkpoint
from dlo_export.checkpoints.files.file_digest import file_sha256
from dlo_export.checkpoints.files.folder_kind import FolderKind
from dlo_export.checkpoints.files.json_file import save_json
from dlo_export.checkpoints.files.output_check import check_output_folder, check_output_space
from dlo_export.checkpoints.files.scratch_folder import scratch_folder
from dlo_export.checkpoints.lazy_tensors import ArrayTensor, LazyTensor
from dlo_export.checkpoints.model_types import (
    RoutingKind,
    routing_kind,
)
from dlo_export.checkpoints.router_thresholds import thresholds_json
from dlo_export.exporter.progress import Reporter
from dlo_export.exporter.sources.base_model import check_use
from dlo_export.exporter.sources.source import ExportSource, open_source
from dlo_export.exporter.stop_signals import stopped_between_steps
from dlo_export.exporter.trained_adapter import check_makes_adapter, save_trained_adapter
from dlo_export.exporter.training_config import starting_model, trained_config
from dlo_export.exporter.training_data import packed_sets
from dlo_export.modeling.from_tensors import llama_dlo_from_tensors, unfilled_llama_dlo
from dlo_export.modeling.llama_dlo import LlamaDloForCausalLM
from dlo_export.modeling.training.documents import open_tokenizer
from dlo_export.modeling.training.errors import TrainingError
from dlo_export.modeling.training.parameters import merged_state
from dlo_export.modeling.training.records import described_files
from dlo_export.modeling.training.reports import HeldOut, StepReport
from dlo_export.modeling.training.run import TrainingResult, train_model
from dlo_export.modeling.training.run_folder import DESCRIPTION_NAME, RunFolder
from dlo_export.modeling.training.settings import TrainingSettings
from dlo_export.modeling.training.sharding import receives_weights
from dlo_export.modeling.untrained_routers import UntrainedRoutersWarning

_SEQUENCE = 1024
_RATE_PROMISED = 0.02  # how far from the target a rate may be before a warning says so
_VERSIONS = ("torch", "transformers", "accelerate", "numpy")


@dataclasses.dataclass(frozen=True)
class TrainRequest:
    """Arguments of `dlo train`.

    Attributes:
        model: Checkpoint folder, `.gguf` file, or hub id in the local cache.
        output: Checkpoint folder to make; the run lives beside it, in a folder of its name and `.run`.
        data: .jsonl or .txt file, or a folder of them.
        held_out: The same, to measure on; None takes some documents out of `data`.
        other_text: The same, to measure the trained model on, each alone.
        adapter: Adapter on the model.
        as_adapter: Make an adapter, routers and LoRA's matrices alone, instead of a checkpoint.
        routers: ``keep`` those the model has, ``add`` an all-zero one to each layer without, or ``none``: train it
            without any.
        routing: What tokens skip; None for what the model's routers skip, and MLPs where it has none.
        settings: Of the run, but for its sequence.
        sequence: Tokens of a sequence; None for 1024, or what the model takes if that is less.
        resume: Go on with the run that is there.
        force: Replace an output of this program's.
        force_base: Let the adapter be made from other weights.
    """

    model: str
    output: Path
    data: Path
    held_out: Path | None
    other_text: Sequence[Path]
    adapter: Path | None
    as_adapter: bool
    routers: str
    routing: RoutingKind | None
    settings: TrainingSettings
    sequence: int | None
    resume: bool
    force: bool
    force_base: bool

    @property
    def run_folder(self) -> Path:
        """Where the run lives."""
        return self.output.with_name(self.output.name + ".run")


def train(request: TrainRequest, reporter: Reporter, on_step: Callable[[StepReport], None]) -> TrainingResult:
    """Trains and, unless it was stopped, writes the trained checkpoint.

    Raises:
        ValueError: Of our packages: the model, the data or the settings are not usable, or training diverged.
        MachineError: Of our packages: no room on the disk, no such device.
    """
    inputs = (Path(request.model), request.adapter, request.data, request.held_out, *request.other_text)
    kind = FolderKind.ADAPTER if request.as_adapter else FolderKind.TRAINED_CHECKPOINT
    check_output_folder(request.output, overwrite=request.force, makes=kind, inputs=inputs)
    RunFolder(request.run_folder).check_place()
    source = open_source(request.model, request.adapter, force_base=request.force_base)
    try:
        check_use(source.base, "training")
        for warning in source.base.warnings:
            reporter.warn(warning)
        if request.as_adapter:
            check_makes_adapter(source, request.settings.mode, request.routers)
        config, tensors = starting_model(source, request.routers, request.routing)
        request = _with_sequence(request, config["max_position_embeddings"])
        check_output_space(request.output, 4 * sum(math.prod(tensor.shape) for tensor in tensors.values()))
        with scratch_folder() as folder:
            source.base.save_companions(folder)
            tokenizer, lacks_template = open_tokenizer(folder, source.base.path)
        if lacks_template:
            reporter.warn(f"{source.base.path}: has no chat template; a plain one is used, and saved with the model")
        with reporter.stage("data"):
            data = packed_sets(
                request.data,
                request.held_out,
                request.other_text,
                request.settings,
                tokenizer,
                config["vocab_size"],
                reporter,
            )
        with reporter.stage("model"), warnings.catch_warnings():
            warnings.simplefilter("ignore", UntrainedRoutersWarning)  # they are about to be trained
            model = (
                unfilled_llama_dlo(config, tensors) if receives_weights() else llama_dlo_from_tensors(config, tensors)
            )
        description = _description(request, source, config)
        with stopped_between_steps() as should_stop:
            result = train_model(
                model,
                request.settings,
                data,
                folder=RunFolder(request.run_folder),
                description=description,
                resume=request.resume,
                report=on_step,
                should_stop=should_stop,
            )
            if result.is_main:
                for warning in rate_warnings(result, request.settings.target):
                    reporter.warn(warning)
            if result.stopped and result.is_main:
                reporter.warn(f"stopped after step {result.step} of {result.steps}; go on with --resume")
        if not result.stopped:
            made_with = description | {"result": report_json(result)}
            template = tokenizer.chat_template if lacks_template else None
            _save(model, source, request, config, made_with, template, is_main=result.is_main)
        return result
    finally:
        source.close()


def report_json(result: TrainingResult) -> dict[str, Any]:
    """What a finished run reports, as JSON values."""
    held_out, control = result.held_out, result.rate_control
    assert held_out is not None, "stopped runs report nothing"
    controlled = None
    if control is not None:
        controlled = dataclasses.asdict(control) | {"thresholds": thresholds_json(control.thresholds)}
    return {
        "steps": result.step,
        "held_out": _measured_json(held_out),
        "rate_control": controlled,
        "other_text": {name: _measured_json(measured) for name, measured in result.others.items()},
    }


def _measured_json(measured: HeldOut) -> dict[str, Any]:
    return {
        "loss": measured.loss,
        "perplexity": measured.perplexity,
        "training_selection_loss": measured.training_loss,
        "active_rate": measured.active_rate,
        "active_rate_by_layer": {str(layer): rate for layer, rate in measured.active.items()},
    }


def rate_warnings(result: TrainingResult, target: float) -> Iterator[str]:
    """On which text the trained model's rate is not what was asked for: text decides what routers let skip."""
    measured = dict(result.others) if result.held_out is None else {"held-out text": result.held_out, **result.others}
    for name, found in measured.items():
        if found.active_rate is not None and abs(found.active_rate - target) > _RATE_PROMISED:
            yield (
                f"{name}: {found.active_rate:.1%} active, the target is {target:.0%}; train on such text too, or move "
                "the rate by `dlo calibrate --retarget` with text of the mix it is for"
            )


def _with_sequence(request: TrainRequest, most: int) -> TrainRequest:
    """The request, its settings saying how long a sequence is."""
    if request.sequence is not None and request.sequence > most:
        raise TrainingError(
            f"training: a sequence of {request.sequence} tokens is longer than the model's max_position_embeddings, "
            f"{most}",
            hint="give --sequence fewer tokens",
        )
    length = min(_SEQUENCE, most) if request.sequence is None else request.sequence
    return dataclasses.replace(request, settings=dataclasses.replace(request.settings, sequence=length))


def _description(request: TrainRequest, source: ExportSource, config: Mapping[str, Any]) -> dict[str, Any]:
    """What `training.json` says."""
    adapter = None
    if request.adapter is not None and source.adapter is not None:  # a LoRA adapter is part of the base, and its hash
        adapter = file_sha256(request.adapter / TENSORS_NAME)
    data = {"training": [dataclasses.asdict(file) for file in described_files(request.data)]}
    if request.held_out is not None:
        data["held_out"] = [dataclasses.asdict(file) for file in described_files(request.held_out)]
    others = {str(path): [dataclasses.asdict(file) for file in described_files(path)] for path in request.other_text}
    routing = None if request.routers == "none" else routing_kind(config)
    return {
        "format_version": 1,
        "model": {"sha256": source.base.sha256(), "adapter": adapter, "routers": request.routers, "routing": routing},
        "data": data,
        "other_text": others,
        "settings": dataclasses.asdict(request.settings),
        "versions": {
            "dlo-export": __version__,  # it may run from its repository, where nothing is installed
            **{name: version(name) for name in _VERSIONS},
            "python": platform.python_version(),
        },
    }


def _trained_tensors(model: LlamaDloForCausalLM, *, is_main: bool) -> dict[str, LazyTensor]:
    """The weights in the main process; every other one has to hand over its shards, where it has some."""
    tensors: dict[str, LazyTensor] = {}
    for name, value in merged_state(model):
        if is_main:
            tensors[name] = ArrayTensor(value.cpu().numpy())
    return tensors


def _save(
    model: LlamaDloForCausalLM,
    source: ExportSource,
    request: TrainRequest,
    config: Mapping[str, Any],
    description: Mapping[str, Any],
    chat_template: str | None,
    *,
    is_main: bool,
) -> None:
    """Writes what was trained; every process but the main one has to hand over its shards, and writes nothing."""
    if request.as_adapter:
        save_trained_adapter(model, source, request.output, description, overwrite=request.force, is_main=is_main)
        return
    tensors = _trained_tensors(model, is_main=is_main)
    if not is_main:
        return

    def save_companions(folder: Path, config_changes: Mapping[str, Any]) -> None:
        source.base.save_companions(folder, config_changes)
        save_json(folder / DESCRIPTION_NAME, description)
        if chat_template is not None:
            (folder / "chat_template.jinja").write_text(chat_template, encoding="utf-8")

    save_checkpoint(
        tensors,
        request.output,
        save_companions=save_companions,
        config_changes=trained_config(source, config, request.settings, model.config.thresholds),
        overwrite=request.force,
    )
