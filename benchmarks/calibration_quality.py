"""What post-hoc calibration costs SmolLM2-135M in held-out perplexity, against simpler ways to skip as much.

Routers are fitted three times, each time on other documents; the evaluation documents are the same throughout and none
of them is ever calibrated on. At the active rate each calibration reaches on them, two baselines skip as many MLPs (or
layers, with --routing layer):

* static: MLPs are removed as a whole, those that leave the stream most similar on the calibration text. A rate that is
  not a whole number of MLPs removes the next one for a random share of the tokens, so that exactly as much is skipped;
* random: in every layer that has a router, tokens are skipped at random, at that layer's own rate; or, as a router that
  knew nothing of layers either would, in every layer at the mean rate.

    python -m benchmarks.calibration_quality [--seeds 0,1,2] [--target 0.9] [--routing mlp]
"""

from __future__ import annotations

import argparse
import functools
import math
import time
from collections.abc import Mapping
from typing import Any, get_args

import dlo_export.runtimes  # noqa: F401 - before torch: sets how its threads wait

# isort: split
import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from benchmarks.common.measure import print_report, versions
from benchmarks.common.smollm2 import smollm2_folder
from dlo_export.checkpoints.model_types import RoutingKind
from dlo_export.modeling.calibration.evaluation import Evaluation, evaluate, with_routers
from dlo_export.modeling.calibration.layer_stream import LayerStream
from dlo_export.modeling.calibration.router_calibration import CalibrationSettings, calibrate_routers
from dlo_export.modeling.calibration.skip_labels import LABELS
from dlo_export.modeling.calibration.text import calibration_text, read_documents


def by_similarity(model: PreTrainedModel, sequences: torch.Tensor, routing: RoutingKind) -> list[int]:
    """Layers in the order in which they (or their MLPs) can best be spared: by mean similarity, highest first."""
    stream = LayerStream(model, sequences, routing)
    means = []
    with torch.no_grad():
        for layer in range(model.config.num_hidden_layers):
            output = stream.run_layer(layer)
            means.append(float(output.similarity.mean()))
            stream.advance(layer, output)
    return sorted(range(len(means)), key=means.__getitem__, reverse=True)


def evaluate_at_rates(
    model: PreTrainedModel, sequences: torch.Tensor, rates: Mapping[int, float], routing: RoutingKind
) -> Evaluation:
    """The model with tokens of these layers active at random, at the given rates."""
    hidden = model.config.hidden_size
    routed = with_routers(model, {layer: np.zeros((1, hidden), np.float32) for layer in rates}, routing)
    generator = torch.Generator().manual_seed(0)

    def decide(_batch: int, shape: torch.Size) -> dict[int, torch.Tensor]:
        return {layer: torch.rand(shape, generator=generator) < rate for layer, rate in rates.items()}

    return evaluate(routed, sequences, decide)


def static_rates(order: list[int], skipped: float) -> dict[int, float]:
    """Rates that remove so many MLPs or layers as a whole, and a share of the next."""
    whole, share = int(skipped), skipped - int(skipped)
    return {**dict.fromkeys(order[:whole], 0.0), **({order[whole]: 1 - share} if share > 1e-9 else {})}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--target", type=float, default=0.9)
    parser.add_argument("--labels", default="cos-global", choices=LABELS)
    parser.add_argument("--routing", default="mlp", choices=get_args(RoutingKind), help="What tokens skip.")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = AutoModelForCausalLM.from_pretrained(smollm2_folder(), dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder())
    routing: RoutingKind = arguments.routing
    settings = CalibrationSettings(target_active=arguments.target, labels=arguments.labels, routing=routing)
    layers = model.config.num_hidden_layers

    dense: Evaluation | None = None
    rows: list[list[Any]] = []
    record: list[dict[str, Any]] = []
    for seed in (int(seed) for seed in arguments.seeds.split(",")):
        text = calibration_text(
            read_documents(), lambda text: tokenizer(text, add_special_tokens=False).input_ids, seed=seed
        )
        dense = dense or evaluate(with_routers(model, {}), text.evaluation)
        start = time.perf_counter()
        calibrated = calibrate_routers(model, text.calibration, settings)
        seconds = time.perf_counter() - start
        routed = evaluate(with_routers(model, calibrated.routers, routing), text.evaluation)
        skipped = sum(1 - rate for rate in routed.active_rates.values())
        order = by_similarity(model, text.calibration[:: settings.share_every], routing)
        measure = functools.partial(evaluate_at_rates, model, text.evaluation, routing=routing)
        static = measure(static_rates(order, skipped))
        rounded = measure(static_rates(order, float(round(skipped))))
        random = measure(routed.active_rates)
        uniform = measure(dict.fromkeys(range(layers), 1 - skipped / layers))
        choosing = sum(0.10 <= rate <= 0.95 for rate in routed.active_rates.values())
        results = {
            "dense": dense,
            "routed": routed,
            "static, as many": static,
            "static, whole": rounded,
            "random, same layers": random,
            "random, every layer": uniform,
        }
        perplexities = {name: result.perplexity for name, result in results.items()}
        active = 1 - skipped / layers
        rows.append([seed, f"{active:.3f}", choosing, *(f"{value:.2f}" for value in perplexities.values())])
        record.append(
            {
                "seed": seed,
                "active": round(active, 4),
                "layers_10_to_95_percent": choosing,
                "removed": order[: math.ceil(skipped)],
                "perplexity": {name: round(value, 3) for name, value in perplexities.items()},
                "active_rates": {layer: round(rate, 3) for layer, rate in routed.active_rates.items()},
                "calibration_seconds": round(seconds, 1),
            }
        )
    print_report(
        f"Calibrated routers on SmolLM2-135M: held-out perplexity, {arguments.labels} labels, {routing} routing",
        ["seed", "active", "layers 10-95 %", *record[0]["perplexity"]],
        rows,
        {
            "target": arguments.target,
            "routing": routing,
            "calibration_tokens": text.calibration.numel(),
            "evaluation_tokens": text.evaluation.numel(),
            "dtype": "float32",
            "threads": arguments.threads,
            "bar": "routed < static for every seed",
            "passed": all(entry["perplexity"]["routed"] < entry["perplexity"]["static, as many"] for entry in record),
            "seeds": record,
            "versions": versions("torch", "transformers"),
        },
    )


if __name__ == "__main__":
    main()
