"""Whether the commands do what they should with a device: export with its parity, run, calibrate, evaluate."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.gpu.lowering_parity import ADAPTER, DATA
from dlo_export.checkpoints.device_options import ProviderOption
from dlo_export.exporter.artefact_runner import open_artefact
from dlo_export.exporter.calibrate import CalibrationRequest, calibrate
from dlo_export.exporter.evaluate import EvaluationRequest, evaluate_model
from dlo_export.exporter.export import ExportRequest, export_model
from dlo_export.exporter.parity_check import check_parity
from dlo_export.exporter.progress import Reporter
from dlo_export.exporter.sources.source import open_source
from dlo_export.modeling.calibration.router_calibration import CalibrationSettings
from dlo_export.modeling.calibration.text import read_documents
from dlo_export.modeling.training.router_distillation import DistillationSettings
from dlo_export.runtimes.artefact.description import load_description
from dlo_export.runtimes.generation.generate import Generation
from dlo_export.runtimes.onnxruntime.providers import BY_OPTION as PROVIDERS


def rows_of_commands(model: Path | None, device: str) -> Iterator[dict[str, Any]]:
    """What the commands do on a GPU, small: export with its parity, generation, calibration, evaluation.

    Args:
        model: Checkpoint or GGUF file with a tokenizer; None leaves out what needs one.
        device: "cuda", or "cpu" to see that it runs.
    """
    provider: ProviderOption = "cpu" if device == "cpu" else "cuda"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        steps: list[tuple[str, Callable[[], dict[str, Any]]]] = [
            (f"export --provider {provider}", lambda: _export_row(folder / "artefact", provider)),
            (f"run --provider {provider}", lambda: _run_row(folder / "artefact")),
            (f"parity --device {device}", lambda: _parity_row(folder / "artefact", device)),
        ]
        if model is not None:
            steps += [
                (f"calibrate --device {device}", lambda: _calibration_row(str(model), folder / "fitted", device, 0)),
                (f"evaluate --device {device}", lambda: _evaluation_row(str(model), folder, device)),
                (
                    f"calibrate --objective distill --device {device}",
                    lambda: _calibration_row(str(model), folder / "distilled", device, 2),
                ),
            ]
        for what, step in steps:
            begin = time.monotonic()
            try:
                yield {"what": what, **step(), "seconds": round(time.monotonic() - begin, 1)}
            except Exception as err:  # as in `lowering_parity.rows_of`
                yield {"what": what, "passed": False, "error": f"{type(err).__name__}: {err}"[:1500]}


def _export_row(output: Path, provider: ProviderOption) -> dict[str, Any]:
    request = ExportRequest(str(DATA / "reference_mlp_routed"), output, provider=provider, lowering="compact")
    description = export_model(request, Reporter()).description
    parity = description.parity
    values = {"verdict": parity.verdict, "reason": parity.reason, "dtype": description.dtype}
    return {"passed": parity.verdict in ("PASS", "AMBIGUOUS"), **values}


def _run_row(artefact: Path) -> dict[str, Any]:
    with open_artefact(artefact, threads=1) as runner:
        generation = Generation(runner, [[3, 1, 4, 1, 5]], max_new_tokens=8)
        tokens = [step[0] for step in generation]
    return {"passed": len(tokens) == 8, "active_rates": {str(k): v for k, v in generation.stats.active_rate.items()}}


def _parity_row(artefact: Path, device: str) -> dict[str, Any]:
    description = load_description(artefact)
    with contextlib.closing(open_source(str(DATA / "reference_mlp_routed"), None)) as source:
        report = check_parity(source, artefact, description, provider=PROVIDERS[description.provider], device=device)
    return {"passed": report.verdict in ("PASS", "AMBIGUOUS"), "verdict": report.verdict, "reason": report.reason}


def _calibration_row(model: str, output: Path, device: str, steps: int) -> dict[str, Any]:
    request = CalibrationRequest(
        model=model,
        output=output,
        adapter=None,
        as_adapter=True,
        settings=CalibrationSettings(target_active=0.9),
        text=None,
        tokens=8192,
        evaluation_tokens=2048,
        seed=0,
        force=False,
        distillation=DistillationSettings(steps=steps) if steps else None,
        device=device,
    )
    result = calibrate(request, Reporter())
    rate, target = result.active_rate(injected=False), request.settings.target_active
    return {
        "passed": rate is not None and abs(rate - target) < 0.1,
        "active_rate": rate,
        "perplexity_dense": result.dense.perplexity,
        "perplexity_routed": result.routed.perplexity,
    }


def _evaluation_row(model: str, folder: Path, device: str) -> dict[str, Any]:
    text = folder / "text.txt"
    text.write_text("\n\n".join(document.text for document in read_documents()[:4]), encoding="utf-8")
    found = {}
    for place in dict.fromkeys(("cpu", device)):
        request = EvaluationRequest(
            model=model, texts=(text,), tasks=(), adapter=ADAPTER, device=place, sequence=128, limit=2
        )
        found[place] = evaluate_model(request, Reporter()).result.perplexities[0].perplexity.value
    return {"passed": abs(found[device] / found["cpu"] - 1) < 1e-3, "perplexity": found}
