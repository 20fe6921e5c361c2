"""What skipping costs a TensorRT-RTX build: the routed model's lowerings against the same model dense.

SmolLM2-135M deepened by TLI (36 layers), a router on every layer; the dense model is the same 36 layers without routers
and with the same attention, profiles (prefill and decode) and targets. Each engine is built in a process of its own,
without the engine cache; the lowerings alternate. Memory is the building process's peak. Builds need no GPU.

The other table has the engine's size when it holds one profile instead of two: what of an excess comes with the second.

    python -m benchmarks.engine_build
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common.measure import Samples, print_report, versions
from benchmarks.common.smollm2 import smollm2_gguf
from benchmarks.common.workspace import temporary_folder
from dlo_export.checkpoints.adapter.adapter import save_adapter
from dlo_export.checkpoints.depth.expansion import expansion_adapter
from dlo_export.checkpoints.depth.placements import placements
from dlo_export.checkpoints.lazy_tensors import ArrayTensor
from dlo_export.checkpoints.llama_layer import router_name
from dlo_export.checkpoints.opening import open_checkpoint
from dlo_export.exporter.progress import Reporter
from dlo_export.exporter.sources.source import open_source
from dlo_export.exporter.tensorrt.engines import build_engine
from dlo_export.exporter.tensorrt.export import engine_request, save_graphs
from dlo_export.exporter.tensorrt.plan import TensorRtPlan, TensorRtRequest, plan_tensorrt
from dlo_export.graph_passes.lowerings.registry import skipping_lowerings
from dlo_export.runtimes.artefact.engine_record import EngineBuild

BARS = {"seconds": 2.0, "peak_bytes": 1.5, "bytes": 1.15}
LOWERINGS = tuple(record.name for record in skipping_lowerings("tensorrt"))
TARGETS = ("sm89", "sm120")


def save_adapters(folder: Path) -> dict[str, Path]:
    """Adapters that deepen SmolLM2-135M to 36 layers: "dense", and "routed" with a random router on every layer."""
    rng = np.random.default_rng(0)
    with open_checkpoint(str(smollm2_gguf())) as checkpoint:
        plan = placements("tli", checkpoint.config.num_layers, every=5, init="zero_out")
        hidden = checkpoint.config.hidden_size
        layers = expansion_adapter(checkpoint.tensors, plan)
        routers = {
            router_name(layer): ArrayTensor(rng.standard_normal((1, hidden), np.float32))
            for layer in range(plan.num_layers)
        }
        routed = dataclasses.replace(layers, is_dlo=(True,) * plan.num_layers, tensors={**layers.tensors, **routers})
        save_adapter(layers, folder / "dense")
        save_adapter(routed, folder / "routed")
    return {"dense": folder / "dense", "routed": folder / "routed"}


def build(adapter: Path, lowering: str, dtype: str, folder: Path, phases: slice = slice(None)) -> EngineBuild:
    """Builds one engine anew and removes it again.

    Args:
        adapter: What makes the model of SmolLM2-135M.
        lowering: "none" for the dense model.
        dtype: "bf16" or "fp16".
        folder: Made, and left empty.
        phases: Which of the profiles to build for.
    """
    source = open_source(str(smollm2_gguf()), adapter)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        request = TensorRtRequest(backend="rtx", targets=TARGETS)
        plan: TensorRtPlan = plan_tensorrt(source, request, "auto" if lowering == "none" else lowering, dtype)
        target = Path(temporary)
        save_graphs(plan, target, Reporter())
        asked = engine_request(plan, plan.engines[0], target)
        source.close()
        return build_engine(dataclasses.replace(asked, profiles=asked.profiles[phases], use_cache=False), Reporter())


def costs_of(engines: list[EngineBuild]) -> dict[str, Samples]:
    """What the builds of one lowering took, by the names of BARS."""
    return {field: Samples(np.array([float(getattr(engine, field)) for engine in engines])) for field in BARS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    runs = parser.parse_args().runs
    names = ("none", *LOWERINGS)
    rows: list[list[Any]] = []
    sizes: list[list[Any]] = []
    record: dict[str, Any] = {}
    with temporary_folder() as folder:
        adapters = save_adapters(folder)
        for dtype in ("bf16", "fp16"):
            built: dict[str, list[EngineBuild]] = {name: [] for name in names}
            for run in range(runs):
                for name in names if run % 2 == 0 else reversed(names):
                    adapter = adapters["dense" if name == "none" else "routed"]
                    built[name].append(build(adapter, name, dtype, folder))
            for name in names:
                found, dense = costs_of(built[name]), costs_of(built["none"])
                ratios = {field: found[field] / dense[field] for field in BARS}
                rows.append(
                    [
                        dtype,
                        name,
                        f"{found['seconds'].median:.1f}",
                        f"{found['peak_bytes'].median / 2**20:.0f}",
                        f"{found['bytes'].median / 2**20:.0f}",
                        *(["", "", ""] if name == "none" else [ratios[field] for field in BARS]),
                    ]
                )
                record[f"{dtype}, {name}"] = {
                    field: {"measured": found[field].summary(), "ratio": ratios[field].summary()} for field in BARS
                }
        for name in names:
            adapter = adapters["dense" if name == "none" else "routed"]
            alone = [build(adapter, name, "bf16", folder, slice(i, i + 1)).bytes / 2**20 for i in range(2)]
            sizes.append([name, *(f"{megabytes:.0f}" for megabytes in alone)])
            record[f"one profile, bf16, {name}"] = {"prefill, MB": round(alone[0]), "decode, MB": round(alone[1])}
    bars = ", ".join(f"{field} ≤ {bar}" for field, bar in BARS.items())
    print("Engine size with one profile, bf16\n")
    for row in (["lowering", "prefill, MB", "decode, MB"], ["---"] * 3, *sizes):
        print("| " + " | ".join(row) + " |")
    print()
    print_report(
        f"TensorRT-RTX builds of SmolLM2-135M, 36 layers, {' and '.join(TARGETS)}; bars against dense: {bars}",
        ["dtype", "lowering", "seconds", "peak, MB", "engine, MB", "seconds / dense", "peak / dense", "size / dense"],
        rows,
        {
            "runs": runs,
            "warm_up": 0,
            "targets": TARGETS,
            "results": record,
            "versions": versions("dlo-export", "tensorrt-rtx", "onnx-ir"),
        },
    )


if __name__ == "__main__":
    main()
