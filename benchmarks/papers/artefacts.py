"""Exports models, and measures and times what came of it; needs ONNX Runtime."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.papers.experiment import Experiment
from benchmarks.papers.run_names import DEEPENED, DLO, SHIPPED
from dlo_export.exporter.artefact_runner import exposed_model, open_artefact
from dlo_export.exporter.export import ExportRequest, export_model
from dlo_export.exporter.progress import Reporter
from dlo_export.exporter.sources.graph_file import load_graph
from dlo_export.runtimes.artefact.description import MODEL_NAME, load_description, mean_active_rates
from dlo_export.runtimes.bench import Subject, Timing, Workload, compare_speed, ratio
from dlo_export.runtimes.evaluation.encoding import Window
from dlo_export.runtimes.evaluation.perplexity import measure_perplexity
from dlo_export.runtimes.evaluation.scorer import RunnerScorer, Segment
from dlo_export.runtimes.onnxruntime.runner import OnnxRuntimeRunner


@contextmanager
def _scorer(folder: Path) -> Iterator[RunnerScorer]:
    with open_artefact(folder) as runner:
        yield RunnerScorer(runner)


def artefact_scorer(experiment: Experiment, name: str) -> tuple[Path, AbstractContextManager[RunnerScorer]]:
    """The artefact of a run's model, and what evaluation asks it by."""
    folder = _artefact(experiment, name)
    return folder, _scorer(folder)


def exported(experiment: Experiment, name: str) -> dict[str, Any]:
    """Exports a run's model, with parity, and measures the artefact on held-out text."""
    folder = _artefact(experiment, name)
    model = experiment.results.model(name)
    export_model(ExportRequest(str(model), folder, dtype="fp32", force=True), Reporter())
    description = load_description(folder)
    count = max(1, experiment.form.artefact_tokens // experiment.form.sequence)  # of each domain
    ids = torch.cat([windows[:count] for windows in experiment.windows.values()])
    windows = [Window(Segment(window, 1), 0) for window in ids.numpy()]
    with open_artefact(folder) as runner:
        measured = measure_perplexity(RunnerScorer(runner), windows)
    return {
        "parity": description.parity.verdict if description.parity is not None else None,
        "lowering": description.lowering,
        "perplexity": measured.perplexity.value,
        "standard_error": measured.perplexity.standard_error,
        "active": mean_active_rates(description, measured.active_rate),
        "active_by_layer": {str(layer): rate for layer, rate in measured.active_rate.items()},
    }


def timed(experiment: Experiment) -> dict[str, Any]:
    """Times all artefacts in alternating blocks, and the routed one with nothing active."""
    form = experiment.form
    workload = Workload(prompt_tokens=form.prompt_tokens, decode_tokens=form.decode_tokens, rounds=form.rounds)
    # A text's tokens: routers decide about them as they do in use.
    tokens = torch.cat([*experiment.windows.values()]).reshape(-1).tolist()
    with ExitStack() as stack:
        runners = [
            stack.enter_context(open_artefact(_artefact(experiment, name), scores=False, allow_spinning=False))
            for name in SHIPPED
        ]
        routed = _artefact(experiment, DLO)
        forced = stack.enter_context(
            OnnxRuntimeRunner(
                exposed_model(load_graph(routed / MODEL_NAME), force=True),
                weights_folder=routed,
                name="nothing active",
                allow_spinning=False,
            )
        )
        subjects = [*(Subject(runner, tokens) for runner in runners), Subject(forced, tokens, active_rate=0.0)]
        timings = dict(zip([*SHIPPED, "nothing-active"], compare_speed(subjects, workload), strict=True))
    return {
        "workload": vars(workload),
        "timings": {
            name: {
                **timing.summary(),
                "prefill_ratio": ratio(timings[DEEPENED].prefill, timing.prefill),
                "decode_ratio": ratio(timings[DEEPENED].decode, timing.decode),
            }
            for name, timing in timings.items()
        },
        "allowed": {
            phase: _allowed(timings, phase, experiment.results[f"shipped-{DLO}"]["active_by_layer"])
            for phase in ("prefill", "decode")
        },
    }


def _allowed(timings: dict[str, Timing], phase: str, active: dict[str, float]) -> dict[str, float]:
    """How much faster than dense the routed model would be if a skipped MLP cost nothing, and a run one its share.

    On the line from the time with nothing active to that of the dense model, which has as many layers.
    """
    dense, skipped = (np.asarray(getattr(timings[name], phase)) for name in (DEEPENED, "nothing-active"))
    rate = float(np.mean([*active.values()]))
    return ratio(dense, skipped + rate * (dense - skipped))


def _artefact(experiment: Experiment, name: str) -> Path:
    return experiment.results.folder / "artefacts" / name
