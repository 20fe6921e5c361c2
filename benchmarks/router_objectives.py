"""What routers of SmolLM2-135M cost in held-out perplexity, base frozen, all brought to the same active rates.

* similarity: fitted by `dlo calibrate`, then retargeted to exactly the rate;
* distilled: the same routers trained on by `dlo calibrate --objective distill`, retargeted likewise;
* static: as many whole MLPs removed, those that leave the stream most similar on the calibration text, and of the next
  one a random share of the tokens.

A second table moves fitted routers (those of the first rate, or an adapter's) to other rates without fitting any: by
one shift of all thresholds, as `dlo calibrate --retarget` does, and by thresholds layer by layer, each layer's rate
moved alike.

    python -m benchmarks.router_objectives [--rates 0.9,0.8] [--steps 24] [--retarget 0.95,0.8,0.7]
    python -m benchmarks.router_objectives --rates "" --adapter tests/data/smollm2_routers --tokens 2048
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Mapping
from typing import Any

import dlo_export.runtimes  # noqa: F401 - before torch: sets how its threads wait

# isort: split
import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from benchmarks.calibration_quality import by_similarity, evaluate_at_rates, static_rates
from benchmarks.common.measure import print_report, versions
from benchmarks.common.smollm2 import smollm2_folder
from dlo_export.checkpoints.adapter.adapter import load_adapter
from dlo_export.modeling.calibration.evaluation import evaluate, with_routers
from dlo_export.modeling.calibration.rate_control import sequence_scores, shift_thresholds, use_thresholds
from dlo_export.modeling.calibration.router_calibration import CalibrationSettings, calibrate_routers
from dlo_export.modeling.calibration.text import CalibrationText, calibration_text, read_documents
from dlo_export.modeling.llama_dlo import LlamaDloForCausalLM
from dlo_export.modeling.training.router_distillation import DistillationSettings, distilled_routers

FIT_SEQUENCES, SHIFT_SEQUENCES = 32, 16
LAYER_ROUNDS = 4


def _rate_of_routed(rate: float, model: PreTrainedModel, routers: Mapping[int, np.ndarray]) -> float:
    """What the routed layers' mean must be where that over all layers is a rate, the others being always active."""
    layers: int = model.config.num_hidden_layers
    return 1 - (1 - rate) * layers / len(routers)


def measured(
    model: PreTrainedModel, routers: Mapping[int, np.ndarray], rate: float, text: CalibrationText
) -> dict[str, Any]:
    """Perplexity and active rate over all layers on the evaluation text, after one shift of the thresholds."""
    routed = with_routers(model, routers)
    wanted = _rate_of_routed(rate, model, routers)
    shift_thresholds(routed, lambda: sequence_scores(routed, text.calibration[:SHIFT_SEQUENCES]), wanted)
    return evaluated(routed, text)


def evaluated(routed: LlamaDloForCausalLM, text: CalibrationText) -> dict[str, Any]:
    """Perplexity and active rate over all layers on the evaluation text."""
    result = evaluate(routed, text.evaluation)
    layers = routed.config.num_hidden_layers
    active = 1 - sum(1 - rate for rate in result.active_rates.values()) / layers
    return {"active": round(active, 4), "perplexity": round(result.perplexity, 3)}


def layer_by_layer(
    model: PreTrainedModel, routers: Mapping[int, np.ndarray], rate: float, text: CalibrationText
) -> dict[str, Any]:
    """The same with a threshold per layer, from its own quantile: the odds of all layers' rates are moved alike."""
    routed = with_routers(model, routers)
    wanted = _rate_of_routed(rate, model, routers)
    sequences = text.calibration[:SHIFT_SEQUENCES]
    scores = sequence_scores(routed, sequences)
    before = {layer: float((values > 0.5).double().mean()) for layer, values in scores.items()}
    rates = moved_rates(before, wanted)
    for _ in range(LAYER_ROUNDS):  # what a layer skips changes the scores behind it
        quantiles = {layer: float(values.quantile(1 - rates[layer])) for layer, values in scores.items()}
        use_thresholds(routed, {layer: min(max(value, 1e-6), 1 - 1e-6) for layer, value in quantiles.items()})
        scores = sequence_scores(routed, sequences)
    return evaluated(routed, text)


def moved_rates(rates: Mapping[int, float], wanted: float) -> dict[int, float]:
    """Rates with this mean whose odds are those of others times one factor."""
    low, high = -20.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        moved = {layer: _moved(rate, middle) for layer, rate in rates.items()}
        low, high = (middle, high) if sum(moved.values()) / len(moved) < wanted else (low, middle)
    return moved


def _moved(rate: float, shift: float) -> float:
    rate = min(max(rate, 1e-4), 1 - 1e-4)
    return 1 / (1 + math.exp(-(math.log(rate / (1 - rate)) + shift)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", default="0.9,0.8")
    parser.add_argument("--retarget", default="0.95,0.8,0.7")
    parser.add_argument("--steps", type=int, default=DistillationSettings.steps)
    parser.add_argument("--learning-rate", type=float, default=DistillationSettings.learning_rate)
    parser.add_argument("--adapter", help="Routers for the second table.")
    parser.add_argument(
        "--tokens", type=int, default=49_152, help="To distill on; thresholds take up to 8,192 of them."
    )
    parser.add_argument("--evaluation-tokens", type=int, default=8_192)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = AutoModelForCausalLM.from_pretrained(smollm2_folder(), dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder())
    text = calibration_text(
        read_documents(),
        lambda document: tokenizer(document, add_special_tokens=False).input_ids,
        calibration_tokens=arguments.tokens,
        evaluation_tokens=arguments.evaluation_tokens,
        seed=arguments.seed,
    )
    fit = text.calibration[:FIT_SEQUENCES]
    rates = [float(rate) for rate in arguments.rates.split(",") if rate]
    order = by_similarity(model, fit[::8], "mlp") if rates else []
    rows: list[list[Any]] = []
    record: dict[str, Any] = {}
    fitted: Mapping[int, np.ndarray] = {}
    if arguments.adapter is not None:
        adapter = load_adapter(arguments.adapter)
        fitted = {layer: adapter.router(layer) for layer in adapter.routed_layers}
    for rate in rates:
        start = time.perf_counter()
        similar = calibrate_routers(model, fit, CalibrationSettings(target_active=rate))
        fitted = fitted or similar.routers
        fit_seconds = time.perf_counter() - start
        results = {"similarity": measured(model, similar.routers, rate, text)}
        start = time.perf_counter()
        distilled = distilled_routers(
            model,
            {layer: similar.routers[layer] for layer in similar.choosing},
            text.calibration,
            similar.rate_of_choosing(rate),
            DistillationSettings(arguments.steps, arguments.learning_rate, seed=arguments.seed),
            held_out=text.evaluation[:4],
        )
        distill_seconds = time.perf_counter() - start
        results["distilled"] = measured(model, distilled, rate, text)
        removed = static_rates(order, (1 - rate) * model.config.num_hidden_layers)
        static = evaluate_at_rates(model, text.evaluation, removed, "mlp")
        results["static"] = {"active": rate, "perplexity": round(static.perplexity, 3)}
        rows += [[f"{rate:.2f}", name, f"{each['active']:.3f}", each["perplexity"]] for name, each in results.items()]
        record[f"{rate}"] = results | {"seconds": {"fit": round(fit_seconds), "distill": round(distill_seconds)}}
        print(rate, record[f"{rate}"], flush=True)
    moved: dict[str, Any] = {}
    for rate in (float(rate) for rate in arguments.retarget.split(",") if rate):
        results = {
            "one shift": measured(model, fitted, rate, text),
            "by layer": layer_by_layer(model, fitted, rate, text),
        }
        print(rate, results, flush=True)
        rows += [[f"→ {rate:.2f}", name, f"{each['active']:.3f}", each["perplexity"]] for name, each in results.items()]
        moved[f"{rate}"] = results
    print_report(
        "Routers of SmolLM2-135M at equal active rates: held-out perplexity",
        ["rate", "routers", "active", "perplexity"],
        rows,
        {
            "dense": round(evaluate(with_routers(model, {}), text.evaluation).perplexity, 3),
            "steps": arguments.steps,
            "learning_rate": arguments.learning_rate,
            "tokens": text.calibration.numel(),
            "evaluation_tokens": text.evaluation.numel(),
            "seed": arguments.seed,
            "threads": arguments.threads,
            "rates": record,
            "retarget": moved,
            "versions": versions("torch", "transformers"),
        },
    )


if __name__ == "__main__":
    main()
