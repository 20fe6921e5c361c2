"""What of a TensorRT-RTX engine's size comes from skipping: copies of weights, or code per routed layer?

Random Llamas of six layers whose MLPs differ in size, each dense and with a router on every layer, built with both
profiles (prefill and decode) and with decode alone. What a lowering adds per layer is code where it stays the same as
the MLP grows, and copied weights where it grows along. Sizes do not vary between runs or targets; nothing is timed.

    python -m benchmarks.engine_size
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from benchmarks.common.measure import print_report, versions
from benchmarks.common.random_llama import H2048, random_llama_folder
from benchmarks.common.workspace import temporary_folder
from dlo_export.exporter.progress import Reporter
from dlo_export.exporter.sources.source import open_source
from dlo_export.exporter.tensorrt.engines import build_engine
from dlo_export.exporter.tensorrt.export import engine_request, save_graphs
from dlo_export.exporter.tensorrt.plan import TensorRtRequest, plan_tensorrt
from dlo_export.graph_passes.lowerings.registry import skipping_lowerings

LAYERS = 6
SIZES = ((576, 768), (576, 1536), (576, 6144), (1152, 6144))  # hidden, intermediate
LOWERINGS = tuple(record.name for record in skipping_lowerings("tensorrt"))


def engine_bytes(hidden: int, intermediate: int, lowering: str) -> tuple[int, int]:
    """Bytes of the engine with both profiles, and with decode alone; bf16, for one target."""
    config: dict[str, Any] = H2048 | {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 192,
        "vocab_size": 1024,
    }
    if lowering != "none":
        routing = {"is_dlo": [True] * LAYERS, "rescale_hidden_states": False, "scale_factor": 2.0, "scale_gap": 0.0}
        config |= {"model_type": "llama_dlo_exattn", **routing}
    kind = "dense" if lowering == "none" else "routed"
    source = open_source(str(random_llama_folder(f"random-{hidden}-{intermediate}-{kind}", config)), None)
    with temporary_folder() as temporary:
        request = TensorRtRequest(backend="rtx", targets=("sm89",))
        plan = plan_tensorrt(source, request, "auto" if lowering == "none" else lowering, "bf16")
        save_graphs(plan, temporary, Reporter())
        source.close()
        both = dataclasses.replace(engine_request(plan, plan.engines[0], temporary), use_cache=False)
        decode = dataclasses.replace(both, profiles=both.profiles[1:])
        return build_engine(both, Reporter()).bytes, build_engine(decode, Reporter()).bytes


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    rows: list[list[Any]] = []
    record = []
    for hidden, intermediate in SIZES:
        dense = engine_bytes(hidden, intermediate, "none")
        mlp = 3 * hidden * intermediate * 2
        for lowering in LOWERINGS:
            sizes = engine_bytes(hidden, intermediate, lowering)
            added = [(size - without) / LAYERS / 2**20 for size, without in zip(sizes, dense, strict=True)]
            rows.append(
                [
                    f"{hidden}, {intermediate}",
                    f"{mlp / 2**20:.1f}",
                    lowering,
                    f"{sizes[0] / dense[0]:.2f}",
                    *(f"{megabytes:.2f}" for megabytes in added),
                ]
            )
            record.append(
                {
                    "hidden": hidden,
                    "intermediate": intermediate,
                    "lowering": lowering,
                    "ratio": round(sizes[0] / dense[0], 4),
                    "added_per_layer_megabytes": {"both": round(added[0], 3), "decode": round(added[1], 3)},
                }
            )
    print_report(
        f"What skipping adds to an engine, {LAYERS} routed layers, bf16, sm89",
        ["H, I", "MLP, MB", "lowering", "size / dense", "added per layer, MB", "with decode alone, MB"],
        rows,
        {"dtype": "bfloat16", "layers": LAYERS, "results": record, "versions": versions("dlo-export", "tensorrt-rtx")},
    )


if __name__ == "__main__":
    main()
