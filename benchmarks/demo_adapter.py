"""Routers of adapters on one model, at one active rate: held-out perplexity, side by side.

Each adapter's thresholds are shifted until the rate on the calibration text is the one asked for; perplexity and rate
are then those of other documents of the language reference, the ones that `dlo calibrate` measures on and that neither
calibration nor the demo's adapter was trained on. The dense model stands beside them.

    python -m benchmarks.demo_adapter MODEL ADAPTER [ADAPTER …] [--target 0.9] [--tokens 8192]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import dlo_export.runtimes  # noqa: F401 - before torch: sets how its threads wait

# isort: split
import torch

from benchmarks.common.measure import print_report, versions
from benchmarks.papers.subjects import BaseModel
from dlo_export.exporter.sources.source import open_source
from dlo_export.modeling.calibration.evaluation import evaluate, with_routers
from dlo_export.modeling.calibration.rate_control import sequence_scores, shift_thresholds
from dlo_export.modeling.calibration.text import calibration_text, read_documents
from dlo_export.modeling.from_tensors import llama_dlo_from_tensors
from dlo_export.modeling.llama_dlo import LlamaDloForCausalLM


def opened(model: Path, adapter: Path) -> LlamaDloForCausalLM:
    """The model with an adapter's routers, and whatever else the adapter changes."""
    source = open_source(model, adapter, force_base=True)
    try:
        return llama_dlo_from_tensors(source.config_json(), source.tensors())
    finally:
        source.close()


def measured(model: LlamaDloForCausalLM, evaluation: torch.Tensor) -> dict[str, float]:
    """Perplexity, and the share of all layers' MLPs that ran."""
    found, layers = evaluate(model, evaluation), model.config.num_hidden_layers
    active = 1 - sum(1 - rate for rate in found.active_rates.values()) / layers
    return {"perplexity": round(found.perplexity, 3), "active": round(active, 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("adapters", type=Path, nargs="+")
    parser.add_argument("--target", type=float, default=0.9, help="active rate over all layers")
    parser.add_argument("--tokens", type=int, default=8192, help="to measure on")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with BaseModel(arguments.model) as base:
        text = calibration_text(read_documents(), base.encode, evaluation_tokens=arguments.tokens)
        results: dict[str, Any] = {"dense": measured(with_routers(base.model(), {}), text.evaluation)}
        layers = base.layers
    rows = [["dense", "", *results["dense"].values()]]
    for adapter in arguments.adapters:
        model = opened(arguments.model, adapter)
        before = measured(model, text.evaluation)
        rate = 1 - (1 - arguments.target) * layers / len(model.config.routed_layers)
        shift_thresholds(model, lambda model=model: sequence_scores(model, text.calibration), rate)  # type: ignore[misc]
        after = measured(model, text.evaluation)
        results[adapter.name] = {"as it is": before, "shifted": after}
        rows += [[adapter.name, "as it is", *before.values()], ["", "shifted", *after.values()]]
    print_report(
        f"Adapters at {arguments.target:.0%} active, {text.evaluation.numel():,} held-out tokens",
        ["adapter", "thresholds", "perplexity", "active"],
        rows,
        {"target": arguments.target, "results": results, "versions": versions("torch", "transformers")},
    )


if __name__ == "__main__":
    main()
