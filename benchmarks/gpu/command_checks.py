"""Whether the commands do what they should with a device: export with its parity, run, calibrate, evaluate."""

from __future__ import annotations

import contextlib
import functools
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks.gpu.lowering_parity import ADAPTER, DATA
from benchmarks.gpu.random_torch_llama import TINY, random_model
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

_FORMS: Final[Mapping[str, Mapping[str, Any]]] = {
    "last logits": {"last_logits": True},
    "layers, last logits": {"model": str(DATA / "reference_layer_routed"), "lowering": "if", "last_logits": True},
}
"""Of a graph, beside the one that `export` is asked for first: what of an `ExportRequest` makes them."""


def rows_of_commands(model: Path | None, device: str, library: Path | None) -> Iterator[dict[str, Any]]:
    """What the commands do on a GPU, small: exports with their parity, generation, calibration, evaluation.

    Args:
        model: Checkpoint or GGUF file with a tokenizer; None leaves out what needs one.
        device: "cuda", or "cpu" to see that it runs.
        library: libdlo_ort.so; None leaves out what needs it.
    """
    provider: ProviderOption = "cpu" if device == "cpu" else "cuda"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        steps: list[tuple[str, Callable[[], dict[str, Any]]]] = [
            (f"export --provider {provider}", lambda: _export_row(folder / "artefact", provider)),
            (f"run --provider {provider}", lambda: _run_row(folder / "artefact")),
            (f"parity --device {device}", lambda: _parity_row(folder / "artefact", device)),
        ]
        for kind, options in _FORMS.items():
            steps.append((f"export, run: {kind}", functools.partial(_form_row, folder / kind, provider, **options)))
        if library is not None:
            steps.append(("export, run: cache in place", lambda: _in_place_row(folder / "in-place", provider, library)))
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


def _form_row(output: Path, provider: ProviderOption, **options: Any) -> dict[str, Any]:
    """An artefact of another form: its parity, and tokens of it."""
    exported = _export_row(output, provider, **options)
    generated = _run_row(output, options.get("ort_plugin_library"))
    return {**exported, **generated, "passed": exported["passed"] and generated["passed"]}


def _in_place_row(folder: Path, provider: ProviderOption, library: Path) -> dict[str, Any]:
    """Of a model whose heads are as wide as CUDA's attention on one cache takes."""
    model = folder / "model"
    random_model(TINY, routed=True, device="cpu", dtype=torch.float32).save_pretrained(model)
    asked = {"static_cache": 256, "ort_plugin_library": library, "lowering": "plugin", "model": str(model)}
    return _form_row(folder / "artefact", provider, **asked)


def _export_row(output: Path, provider: ProviderOption, **options: Any) -> dict[str, Any]:
    asked = {"model": str(DATA / "reference_mlp_routed"), "lowering": "compact", **options}
    description = export_model(ExportRequest(output=output, provider=provider, **asked), Reporter()).description
    parity = description.parity
    values = {"verdict": parity.verdict, "reason": parity.reason, "dtype": description.dtype}
    return {"passed": parity.verdict in ("PASS", "AMBIGUOUS"), **values}


def _run_row(artefact: Path, library: Path | None = None) -> dict[str, Any]:
    with open_artefact(artefact, threads=1, plugin_library=library) as runner:
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
