"""Artefacts with engines, described by the schema the exporter fills; the engines' content is whatever a test needs."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import tensorrt_rtx

from dlo_export.checkpoints.interface import (
    CACHE_PARTS,
    INPUT_IDS,
    KV_LENGTHS,
    LOGITS,
    POSITION_IDS,
    WRITE_INDICES,
    past_name,
    present_name,
)
from dlo_export.runtimes.artefact.description import (
    FORMAT_VERSION,
    ArtefactDescription,
    LayerDescription,
    RoutingDescription,
    SourceIdentity,
    save_description,
)
from dlo_export.runtimes.artefact.engine_record import (
    EngineBuild,
    EngineRecord,
    GraphInterface,
    LayerCensus,
    OptimizationProfile,
    ParityVerdict,
    StageCost,
)
from dlo_export.runtimes.artefact.files import describe_file
from dlo_export.runtimes.decoder_interface import TensorSpec
from tests.runtimes.static_cache_graphs import HEAD_DIM, KV_HEADS, LAYERS, MAX_CACHE, VOCAB

MAX_BATCH, MAX_SEQUENCE = 4, 16
PREFILL = OptimizationProfile("prefill", {INPUT_IDS: ((1, 1), (1, 8), (MAX_BATCH, MAX_SEQUENCE))})
DECODE = OptimizationProfile("decode", {INPUT_IDS: ((1, 1), (1, 1), (MAX_BATCH, 1))})
PLAN = b"no engine"


def interface(**changed: tuple[TensorSpec, ...]) -> GraphInterface:
    """Of the handmade decoder."""
    names = [(layer, part) for layer in range(LAYERS) for part in CACHE_PARTS]
    shape = ("batch", KV_HEADS, MAX_CACHE, HEAD_DIM)
    inputs = (
        *(TensorSpec(name, "int64", ("batch", "sequence")) for name in (INPUT_IDS, POSITION_IDS)),
        *(TensorSpec(name, "int64", ("batch",)) for name in (WRITE_INDICES, KV_LENGTHS)),
        *(TensorSpec(past_name(layer, part), "float16", shape) for layer, part in names),
    )
    outputs = (
        TensorSpec(LOGITS, "float16", ("batch", "sequence", VOCAB)),
        *(TensorSpec(present_name(layer, part), "float16", shape) for layer, part in names),
    )
    return GraphInterface(**({"inputs": inputs, "outputs": outputs} | changed))


def build(**changed: Any) -> EngineBuild:
    """What made an engine that is `PLAN`."""
    values: dict[str, Any] = {
        "backend": "rtx",
        "version": tensorrt_rtx.__version__,
        "targets": ("sm89",),
        "plugins": "none",
        "plugin_library_sha256": None,
        "bytes": len(PLAN),
        "sha256": hashlib.sha256(PLAN).hexdigest(),
        "stages": (StageCost("parse", 0.5, 2**20), StageCost("build", 3.0, 2**21)),
        "census": LayerCensus({"TOPK": 2}, {0: {"TOPK": 1}, 1: {"TOPK": 1}}),
        "decomposed_attentions": 2,
        "checks": ("inputs are used",),
        "cache_key": "0" * 64,
        "from_cache": False,
    }
    return EngineBuild(**(values | changed))


def record(folder: Path, name: str = "model", **changed: Any) -> EngineRecord:
    """An engine of the artefact in a folder."""
    values: dict[str, Any] = {
        "lowering": "plugin",
        "lowering_reason": "asked for",
        "capture_problem": None,
        "plugin_operators": (),
        "file": folder / "engines" / f"{name}.engine",
        "graph": folder / "engines" / f"{name}.onnx",
        "phase": "both",
        "dtype": "fp16",
        "cache": "static",
        "max_batch": MAX_BATCH,
        "max_sequence": MAX_SEQUENCE,
        "max_cache": MAX_CACHE,
        "last_logits": False,
        "backend_reason": "asked for",
        "profiles": (PREFILL, DECODE),
        "interface": interface(),
        "float32_nodes": {},
        "float16_stream_peak": 12.5,
        "parity": ParityVerdict("NOT RUN", "no GPU"),
        "build": build(),
    }
    return EngineRecord(**(values | changed))


def description(*engines: EngineRecord) -> ArtefactDescription:
    """Of an artefact whose layers are all routed; `files` are the engines' and must exist."""
    return ArtefactDescription(
        lowering="compact",
        lowering_reason="asked for",
        capture_problem="the host reads shapes back",
        plugin_operators=(),
        format_version=FORMAT_VERSION,
        tools={"dlo-export": "0.1.0"},
        source=SourceIdentity("checkpoint", "tiny", "0" * 64, "llama"),
        files=tuple(describe_file(path) for engine in engines for path in (engine.file, engine.graph)),
        kept_data=(),
        dtype="fp32",
        provider="cpu",
        routing=RoutingDescription("mlp", "in words", tuple(range(LAYERS)), True, 2.0, 0.05, {LAYERS - 1: 0.25}),
        layers=tuple(LayerDescription(i, i == 1, 0 if i == 1 else None, None, True, False) for i in range(LAYERS)),
        interface=interface(),
        engines=engines,
        parity=ParityVerdict("PASS"),
    )


def save_artefact(folder: Path, *engines: EngineRecord) -> Path:
    """Writes the description, and the files its engines name."""
    for engine in engines:
        for path in (engine.file, engine.graph):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(PLAN)
    save_description(description(*engines), folder)
    return folder


def changed_build(engine: EngineRecord, **changed: Any) -> EngineRecord:
    """The engine, its build changed."""
    return dataclasses.replace(engine, build=dataclasses.replace(engine.build, **changed))
