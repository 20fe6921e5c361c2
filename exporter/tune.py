"""`dlo bench --tune`: which lowering of an artefact is the fastest on this machine; the artefact rewritten to it."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from dlo_export.checkpoints.device_options import ProviderOption
from dlo_export.checkpoints.dtypes import BY_OPTION
from dlo_export.checkpoints.errors import InputError
from dlo_export.checkpoints.files.disk_space import no_room_reported
from dlo_export.checkpoints.files.folder_kind import FolderKind
from dlo_export.checkpoints.files.json_file import read_json, save_json
from dlo_export.checkpoints.files.output_check import check_output_folder
from dlo_export.checkpoints.files.whole_folder import whole_folder
from dlo_export.checkpoints.files.written_files import LIST_NAME, unfamiliar_files, written_names
from dlo_export.exporter.artefact_check import open_description
from dlo_export.exporter.artefact_description import complete_description
from dlo_export.exporter.artefact_runner import held_tokens, runner_for
from dlo_export.exporter.genai_config import GENAI_CONFIG_NAME, check_genai_config, with_operator_library
from dlo_export.exporter.kernel_widths import kernel_width_problem
from dlo_export.exporter.named_operators import plugin_operators
from dlo_export.exporter.progress import Reporter
from dlo_export.exporter.provider_gaps import gaps_explained
from dlo_export.exporter.relowering import ReloweredGraph
from dlo_export.graph_passes.errors import GraphPassError
from dlo_export.graph_passes.lowerings.record import PROVIDER_TARGETS
from dlo_export.graph_passes.lowerings.registry import find_lowering, skipping_lowerings
from dlo_export.plugins.ort_registration import check_library, no_library
from dlo_export.runtimes.artefact.description import (
    FILE_NAME,
    MODEL_NAME,
    PARITY_NAME,
    ArtefactDescription,
    load_description,
)
from dlo_export.runtimes.artefact.engine_record import ParityVerdict
from dlo_export.runtimes.artefact.files import check_model_files
from dlo_export.runtimes.bench import Subject, Timing, Workload, compare_speed, spread
from dlo_export.runtimes.onnxruntime.providers import BY_OPTION as BY_PROVIDER
from dlo_export.runtimes.parity.tolerances import TOLERANCES
from dlo_export.runtimes.runner import FloatArray, Runner

_NAMED_FILES = 5  # of those that a message lists


@dataclasses.dataclass(frozen=True)
class Tuning:
    """What was measured of an artefact's lowerings.

    Attributes:
        before: The lowering that the artefact had.
        after: The one that it has now.
        timings: By lowering.
        differences: By lowering, how far its logits of the prompt are from those of `before`, relative to the largest.
        totals: By lowering, time of the workload over that of `before`: median, p10 and p90 over blocks.
    """

    before: str
    after: str
    timings: Mapping[str, Timing]
    differences: Mapping[str, float]
    totals: Mapping[str, Mapping[str, float]]


def tunable(folder: Path, provider: ProviderOption | None, plugin_library: Path | None) -> ArtefactDescription:
    """The description of an artefact whose lowering can be measured and replaced, all of its files verified.

    Args:
        folder: The artefact.
        provider: What it is to be measured on; None for what it was made for.
        plugin_library: libdlo_ort.so, where it is given.

    Raises:
        InputError: It is no artefact, damaged, dense, has engines or steps that a CUDA graph captures, files of the
            user's lie in it, or it cannot be replaced where it is.
        MachineError: Nor written beside it.
        dlo_export.plugins.errors.PluginLibraryError: It has dlo operators, and no library that computes them is given.
    """
    description = open_description(folder)  # first: what is no artefact is told so, not that it cannot be replaced
    _check_rewritable(folder)
    check_model_files(description, folder)
    again = "export the model again with another --lowering, and compare the artefacts with dlo bench"
    if description.routing is None:
        raise InputError(
            f"{folder}: nothing is routed, so it has no lowering", hint="dlo bench times it without --tune"
        )
    if description.engines:
        raise InputError(f"{folder}: has TensorRT engines, whose lowering is built into them", hint=again)
    if held_tokens(description) is not None and description.provider != "cpu":
        raise InputError(
            f"{folder}: has a static cache for a CUDA graph, which captures one lowering alone of those that skip",
            hint="nothing is left to choose; dlo bench times it without --tune",
        )
    if provider not in (None, description.provider):
        raise InputError(
            f"{folder}: was made for --provider {description.provider}, and is tuned for it alone",
            hint=f"export the model again with --provider {provider}",
        )
    if description.plugin_operators and plugin_library is None:
        raise no_library(description.plugin_operators)
    if plugin_library is not None:
        check_library(plugin_library)
    BY_PROVIDER[description.provider].check_here()
    return description


def _check_rewritable(folder: Path) -> None:
    """Refuses an artefact that could not be written anew, before hours are spent on measuring it."""
    if unfamiliar := unfamiliar_files(folder):
        raise InputError(
            f"{folder}: its folder is replaced as a whole, and holds what dlo-export did not write: "
            f"{', '.join(unfamiliar[:_NAMED_FILES])}",
            hint="move that away, or tune a copy of the artefact",
        )
    try:
        check_output_folder(folder, overwrite=True, makes=FolderKind.ARTEFACT)
    except InputError as err:  # whose hints are about names for what is made
        raise InputError(err.message, hint="run it from another folder, or tune a copy that can be replaced") from err
    _genai_config(folder)


def _genai_config(folder: Path) -> dict[str, Any] | None:
    """An artefact's genai_config.json, which may be the user's by now; None where there is none."""
    if not (path := folder / GENAI_CONFIG_NAME).is_file():
        return None
    settings = read_json(path)
    check_genai_config(settings, path)
    return settings


def tune(
    folder: Path,
    description: ArtefactDescription,
    token_ids: Sequence[int],
    workload: Workload,
    reporter: Reporter,
    *,
    threads: int | None = None,
    plugin_library: Path | None = None,
) -> Tuning:
    """Measures an artefact in every lowering that skips, and rewrites it to the fastest one.

    All lowerings are open at once, each with a copy of the weights. One takes the place of the artefact's own where it
    computes the same, and the workload took less time in nine of ten blocks: prompt and decode together.

    Args:
        folder: The artefact.
        description: As `tunable` gave it.
        token_ids: To feed, see `Subject`.
        workload: What to feed.
        reporter: Told about stages, and of lowerings that compute something else.
        threads: Of one operator.
        plugin_library: libdlo_ort.so; without it, lowerings that need it are left out.

    Raises:
        InputError: The graph cannot be lowered again.
        MachineError: The artefact cannot be written; it is as it was.
    """
    before = description.lowering
    with reporter.stage("lowerings"):
        graph = ReloweredGraph(folder, description)
        models = _lowered(graph, _candidates(description, plugin_library), reporter)
    with ExitStack() as stack, reporter.stage("timing"):
        runners = {
            name: stack.enter_context(_open(model, name, folder, description, threads, plugin_library))
            for name, model in models.items()
        }
        logits = {name: _prompt_logits(runner, token_ids, workload) for name, runner in runners.items()}
        subjects = [Subject(runner, token_ids) for runner in runners.values()]
        timings = dict(zip(runners, compare_speed(subjects, workload), strict=True))
    largest = float(np.abs(logits[before]).max())
    differences = {name: float(np.abs(values - logits[before]).max()) / largest for name, values in logits.items()}
    seconds = {name: timing.prefill + workload.decode_tokens * timing.decode for name, timing in timings.items()}
    totals = {name: spread(values / seconds[before]) for name, values in seconds.items()}
    allowed = TOLERANCES[description.dtype].largest
    for name, difference in differences.items():
        if not difference <= allowed:
            reporter.warn(f"{name}: its logits differ by {difference:.1e} of the largest: it is not chosen")
    faster = [name for name in totals if totals[name]["p90"] < 1 and differences[name] <= allowed]
    after = min(faster, key=lambda name: totals[name]["median"], default=before)
    if after != before:
        with reporter.stage("artefact"):
            reason = (
                f"measured by dlo bench --tune: {totals[after]['median']:.2f} of the time of {before}, batch "
                f"{workload.batch}, a prompt of {workload.prompt_tokens} tokens and {workload.decode_tokens} more"
            )
            rewrite_lowering(folder, description, models[after], after, reason, differences[after])
    return Tuning(before, after, timings, differences, totals)


def _candidates(description: ArtefactDescription, plugin_library: Path | None) -> list[str]:
    """Lowerings that can be measured, the artefact's own first."""
    assert description.routing is not None, "asked by tunable"
    target, runs_it = PROVIDER_TARGETS[description.provider], BY_PROVIDER[description.provider]
    records = skipping_lowerings(target, description.routing.kind)
    usable = [each for each in records if plugin_library is not None or not each.domains]
    kind = BY_OPTION[description.dtype]
    able = [each.name for each in usable if runs_it.why_not_run(kind, each.operators) is None]
    return list(dict.fromkeys((description.lowering, *able)))


def _lowered(graph: ReloweredGraph, names: Sequence[str], reporter: Reporter) -> dict[str, ir.Model]:
    """The graph in the artefact's own lowering, the first, and in those others that it can be had in."""
    own, *others = names
    models = {own: graph.lowered(own)}
    for name in others:
        try:
            model = graph.lowered(name)
        except GraphPassError as err:
            reporter.warn(f"{name}: is left out: {err.message.splitlines()[0]}")
            continue
        if (problem := kernel_width_problem(model.graph)) is not None:
            reporter.warn(f"{name}: is left out: its kernels do not take {problem}")
        else:
            models[name] = model
    return models


def _open(
    model: ir.Model,
    name: str,
    folder: Path,
    description: ArtefactDescription,
    threads: int | None,
    plugin_library: Path | None,
) -> Runner:
    provider = BY_PROVIDER[description.provider]
    with gaps_explained(description, folder, provider):
        return runner_for(value.name or "" for value in model.graph.inputs)(
            bytes(ir.to_proto(model).SerializeToString()),
            weights_folder=folder,
            name=name,
            thresholds=description.router_thresholds,
            threads=threads,
            allow_spinning=False,
            plugin_library=plugin_library if plugin_operators(model) else None,
            provider=provider,
        )


def _prompt_logits(runner: Runner, token_ids: Sequence[int], workload: Workload) -> FloatArray:
    """Of the last token of each sequence's prompt."""
    shape = workload.batch, workload.prompt_tokens
    ids = np.array(token_ids[: shape[0] * shape[1]], np.int64).reshape(shape)
    runner.reset(workload.batch)
    positions = np.tile(np.arange(workload.prompt_tokens), (workload.batch, 1))
    return runner.step(ids, np.ones_like(ids), positions, last_logits=True).logits


def rewrite_lowering(
    folder: Path, description: ArtefactDescription, model: ir.Model, lowering: str, reason: str, difference: float
) -> None:
    """Puts an artefact with another graph in the place of this one; all other files stay, its parity does not.

    Args:
        folder: The artefact.
        description: Of it as it is.
        model: Its graph in another lowering, as `ReloweredGraph` gives it.
        lowering: That one.
        reason: Why.
        difference: How far its logits were from those before, relative to the largest.

    Raises:
        InputError: Files of the user's lie in the folder, or it is not the described artefact any more.
        MachineError: It cannot be written; it is as it was.
    """
    verdict = description.parity.verdict
    parity = ParityVerdict(
        "NOT RUN",
        f"dlo bench --tune lowered the graph anew, from {description.lowering} (parity {verdict}) to {lowering}: "
        f"on its prompt, logits differ by {difference:.1e} of the largest",
    )
    tuned = dataclasses.replace(
        description,
        lowering=lowering,
        lowering_reason=reason,
        capture_problem=find_lowering(lowering, PROVIDER_TARGETS[description.provider]).why_not_captured(model.graph),
        plugin_operators=plugin_operators(model),
        parity=parity,
    )
    with no_room_reported(folder), whole_folder(folder, overwrite=True) as staging:
        for name in written_names(folder):
            if name not in (MODEL_NAME, FILE_NAME, PARITY_NAME, LIST_NAME) and (folder / name).is_file():
                _take_over(folder / name, staging / name)
        if (settings := _genai_config(folder)) is not None:
            # Under the staging name it may be the artefact's own file, which stays as it is.
            (staging / GENAI_CONFIG_NAME).unlink(missing_ok=True)
            values = with_operator_library(settings, needed=bool(tuned.plugin_operators))
            save_json(staging / GENAI_CONFIG_NAME, values)
        ir.save(model, staging / MODEL_NAME)
        complete_description(tuned, staging)
        _check_same(description, folder, staging)


def _check_same(description: ArtefactDescription, folder: Path, staging: Path) -> None:
    """Refuses weights that are not those the graph was measured with: another command may have put others there."""
    kept = [(file.name, file.sha256) for file in description.files if file.name != folder / MODEL_NAME]
    written = load_description(staging).files
    taken = [(folder / file.name.name, file.sha256) for file in written if file.name != staging / MODEL_NAME]
    if load_description(folder) != description or taken != kept:
        raise InputError(
            f"{folder}: was changed while its lowerings were measured; it stays as it is now",
            hint="run it again, and let nothing write to the artefact meanwhile",
        )


def _take_over(source: Path, target: Path) -> None:
    """The same file under a second name until the first is removed; a copy where the file system has no such names."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
