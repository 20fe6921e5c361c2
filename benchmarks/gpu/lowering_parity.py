"""Parity of a model's lowerings in ONNX Runtime with the PyTorch model in float32, and which nodes run elsewhere."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx_ir as ir
import torch  # noqa: F401 - before onnxruntime, which finds CUDA's libraries among PyTorch's

from benchmarks.common.workspace import REPOSITORY
from benchmarks.gpu.evidence_bars import DTYPES
from benchmarks.gpu.placement import placement_facts
from dlo_export.checkpoints.device_options import ProviderOption
from dlo_export.checkpoints.model_types import KV_KEY
from dlo_export.exporter.graph_dtype import graph_dtype
from dlo_export.exporter.named_operators import plugin_operators
from dlo_export.exporter.parity_candidates import graph_candidate
from dlo_export.exporter.sources.graph_file import load_graph
from dlo_export.exporter.sources.source import ExportSource, open_source
from dlo_export.exporter.target_graphs import build_model
from dlo_export.exporter.weight_file import save_weights
from dlo_export.graph_passes.lowerings.record import PROVIDER_TARGETS
from dlo_export.graph_passes.lowerings.registry import find_lowering
from dlo_export.runtimes.artefact.description import WEIGHTS_NAME
from dlo_export.runtimes.onnxruntime.providers import BY_OPTION as PROVIDERS
from dlo_export.runtimes.onnxruntime.providers import Provider
from dlo_export.runtimes.onnxruntime.session import DecoderSession
from dlo_export.runtimes.parity.cases import parity_cases
from dlo_export.runtimes.parity.compare import OtherPrecision, compare
from dlo_export.runtimes.torch.reference import open_reference

DATA: Final = REPOSITORY / "tests" / "data"
ADAPTER: Final = DATA / "smollm2_routers"
NATIVE: Final = ("masked", "compact", "if")
# What config.json says where tokens skip attention alone, and leave keys and values, or none.
ATTENTION: Final = {
    "reference_attention_routed": {"model_type": "llama_dlo_attn"},
    "reference_active_attention_routed": {"model_type": "llama_dlo_attn", KV_KEY: "active"},
}


@dataclasses.dataclass(frozen=True)
class Job:
    """What one process compares.

    Attributes:
        subject: Name of the model, for rows.
        model: Checkpoint folder or GGUF file.
        dtype: Of the graphs.
        lowerings: To compare; "none" where the model has no routers.
        adapter: On the model.
        library: libdlo_ort.so, for the plugin lowering.
        provider: What runs the graphs.
        device: Of the reference.
        settings: Of config.json, in place of the checkpoint's.
    """

    subject: str
    model: str
    dtype: str
    lowerings: tuple[str, ...]
    adapter: str | None = None
    library: str | None = None
    provider: ProviderOption = "cuda"
    device: str = "cuda"
    settings: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def row(self, kind: str, lowering: str) -> dict[str, Any]:
        """The beginning of a row of one lowering, or of several that are written with a plus."""
        facts = {"kind": kind, "subject": self.subject, "dtype": self.dtype, "lowering": lowering}
        return {"what": f"{kind} {self.subject}, {self.dtype}, {lowering}", **facts}


def jobs(model: Path | None, library: str | None, *, smoke: bool) -> Iterator[Job]:
    """What is compared, each in a process of its own."""
    routed: list[tuple[str, str, str | None]] = [
        ("reference_mlp_routed", str(DATA / "reference_mlp_routed"), None),
        ("reference_layer_routed", str(DATA / "reference_layer_routed"), None),
    ]
    if model is not None:
        routed.append(("smollm2", str(model), str(ADAPTER)))
    for subject, path, adapter in routed:
        # Everything once, and no more: the largest model in the type it is used in.
        for dtype in ("bf16",) if smoke and adapter is not None else DTYPES:
            # Where the reference is small, it is the CPU's: two GPU programs are then not compared with each other.
            job = Job(subject, path, dtype, NATIVE, adapter, device="cpu" if adapter is None else "cuda")
            yield job
            if library is not None:
                yield dataclasses.replace(job, lowerings=("plugin",), library=library)
    for subject, settings in ATTENTION.items():
        for dtype in DTYPES:
            path = str(DATA / "reference_mlp_routed")
            yield Job(subject, path, dtype, NATIVE, device="cpu", settings=settings)
    if model is not None:
        yield Job("smollm2 dense", str(model), "bf16", ("none",))


def rows_of(job: Job, provider: Provider | None = None) -> Iterator[dict[str, Any]]:
    """Compares the lowerings of one model in one type: rows of parity, and of who was given which node.

    Args:
        job: What to compare.
        provider: In place of the job's.
    """
    provider = provider or PROVIDERS[job.provider]
    library = None if job.library is None else Path(job.library)
    with contextlib.ExitStack() as stack:
        folder, model = (Path(stack.enter_context(tempfile.TemporaryDirectory())) for _ in range(2))
        adapter = None if job.adapter is None else Path(job.adapter)
        path = with_settings(Path(job.model), model, job.settings) if job.settings else job.model
        source = stack.enter_context(contextlib.closing(open_source(str(path), adapter)))
        files = save_graphs(source, job, folder)
        for lowering, file in files.items():
            yield placement_row(job, lowering, file, provider, library)
        config, tensors = source.config_json(), source.tensors()
        routed = source.routing is not None and job.lowerings != ("none",)
        rng = np.random.default_rng(0)
        prompts = [rng.integers(0, config["vocab_size"], tokens).tolist() for tokens in (24, 15)]
        other = OtherPrecision.of_pytorch(
            job.dtype, lambda dtype: open_reference(config, tensors, dtype=dtype, device=job.device)
        )
        with open_reference(config, tensors, device=job.device) as reference:
            for lowering, file in files.items():
                begin = time.monotonic()
                candidate = graph_candidate(
                    lowering,
                    load_graph(file),
                    folder,
                    file=file,
                    routed=routed,
                    plugin_library=library,
                    provider=provider,
                )
                row = job.row("parity", lowering)
                try:
                    report = compare(
                        reference,
                        [candidate],
                        parity_cases(config["vocab_size"], routed=routed),
                        dtype=job.dtype,
                        greedy_prompts=prompts,
                        greedy_tokens=32,
                        other=other,
                    )
                except Exception as err:  # whatever a new card brings is a finding, and costs the other rows nothing
                    yield {**row, "passed": False, "error": f"{type(err).__name__}: {err}"[:1500]}
                    continue
                judged = [(result.case, result.judge(report.tolerance)) for result in report.cases if report.tolerance]
                judged += [("greedy", result.judge()) for result in report.greedy]
                reasons = [f"{case}: {judgement.reason}" for case, judgement in judged if judgement.reason]
                yield {
                    **row,
                    "passed": None if report.verdict == "AMBIGUOUS" else report.verdict == "PASS",
                    "verdict": report.verdict,
                    "provider": provider.name,
                    "mean_of_peak": max(result.logits.mean for result in report.cases),
                    "largest_of_peak": max(result.logits.largest for result in report.cases),
                    "flips": sum(len(result.flips) for result in report.cases),
                    "decisions": sum(result.decisions for result in report.cases),
                    "greedy": [f"{result.identical} of {result.total}" for result in report.greedy],
                    "reasons": reasons[:9],
                    "seconds": round(time.monotonic() - begin, 1),
                }


def placement_row(job: Job, lowering: str, file: Path, provider: Provider, library: Path | None) -> dict[str, Any]:
    """Which nodes ONNX Runtime gave to the CPU; none of a layer may be among them."""
    row = job.row("placement", lowering)
    needs = library if plugin_operators(load_graph(file)) else None
    try:
        session = DecoderSession(
            file, lowering, "growing", {"provider": provider, "placement": True, "plugin_library": needs}
        )
        placed = session.placement()
    except Exception as err:  # as above
        return {**row, "passed": False, "error": f"{type(err).__name__}: {err}"[:1500]}
    capturable = find_lowering(lowering, "onnxruntime-cuda").capturable
    return {**row, **placement_facts(placed, provider.name), "capturable": capturable}


def with_settings(model: Path, folder: Path, settings: Mapping[str, str]) -> Path:
    """The same weights under another config.json, in an empty folder."""
    shutil.copytree(model, folder, dirs_exist_ok=True)  # small, and nothing reads through links
    values = json.loads((model / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**values, **settings}), encoding="utf-8")
    return folder


def save_graphs(source: ExportSource, job: Job, folder: Path) -> dict[str, Path]:
    """Writes a graph for each lowering; they share one file of weights."""
    files: dict[str, Path] = {}
    for lowering in job.lowerings:
        model = build_model(source, lowering, graph_dtype(job.dtype), PROVIDER_TARGETS[job.provider])
        save_weights(model, folder / WEIGHTS_NAME, write=not files)
        files[lowering] = folder / f"{lowering}.onnx"
        ir.save(model, files[lowering])
    return files
