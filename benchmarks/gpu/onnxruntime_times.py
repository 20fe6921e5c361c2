"""How long captured decoders take in ONNX Runtime: dense, and with so many of their MLPs skipped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common.threshold_inputs import ACTIVE, SKIPPED, threshold_name
from benchmarks.gpu.captured_decoder import OPTIONS, CapturedDecoder
from benchmarks.gpu.copy_rate import copy_rate
from benchmarks.gpu.evidence import Evidence
from benchmarks.gpu.random_decoder import RandomDecoder
from dlo_export.checkpoints.interface import KV_LENGTHS, LOGITS

PAST = 512  # tokens in the cache of a decode step
PROMPT = 512
RATES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of MLPs that are skipped
BAR_SHAPE = "8b"  # whose batch of 1 has bars
DENSE_BAR, EFFICIENCY_BAR = 1.03, 0.9


def time_decoders(evidence: Evidence, device: str, library: Path, shape: str, *, small: bool, capture: bool) -> None:
    """A decode step, dense and with so many MLPs skipped, and a prompt."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    seconds = 0.05 if small else 0.4
    copy = copy_rate(device, 3 if small else 10)
    evidence.row("copy rate", model=shape, gb_per_s=round(copy / 1e9, 1))
    dense = CapturedDecoder.open(RandomDecoder(shape, routed=False), dtype, device, library, capture=capture)
    routed = CapturedDecoder.open(
        # Where a step cannot be captured, leave out what else is of our own.
        RandomDecoder(shape, routed=True),
        dtype,
        device,
        library,
        dense.weights,
        capture=capture,
        fuse_routers=capture,
    )
    for name, decoder in (("dense", dense), ("routed", routed)):
        with evidence.guard("placement", model=shape, graph=name):
            elsewhere = decoder.session.operators_elsewhere()
            evidence.row("placement", model=shape, graph=name, elsewhere=elsewhere, open_s=decoder.open_s)
    batches = (1, 16) if small else (1, 4, 16)
    for batch in batches:
        if evidence.fits(f"decode {shape}, batch {batch}", 8 * seconds):
            with evidence.guard("decode", model=shape, batch=batch):
                _time_decode(evidence, dense, routed, batch, seconds, copy)
    prompt = 32 if small else PROMPT
    if evidence.fits(f"prefill {shape}", 4 * seconds):
        with evidence.guard("prefill", model=shape):
            _time_prefill(evidence, dense, routed, prompt, seconds)
    if capture and evidence.fits(f"routers of standard operators {shape}", 6):
        with evidence.guard("routers of standard operators", model=shape):
            source = RandomDecoder(shape, routed=True)
            plain = CapturedDecoder.open(source, dtype, device, library, dense.weights, fuse_routers=False)
            _time_all_active(evidence, {"routed": routed, "routed, routers of standard operators": plain}, seconds)
    if device == "cuda" and evidence.fits(f"kernels {shape}", 4):
        _show_kernels(evidence, dense, routed)


def _time_all_active(evidence: Evidence, graphs: dict[str, CapturedDecoder], seconds: float) -> None:
    for graph, decoder in graphs.items():
        step = decoder.step(1, 1, decoder.cache(1))
        step.tensors[KV_LENGTHS].fill_(PAST + 1)
        _synchronize(decoder.device)
        common: dict[str, Any] = {"model": decoder.source.name, "batch": 1, "past": PAST}
        evidence.row("decode, all active", graph=graph, **common, **step.time(seconds))


def _show_kernels(evidence: Evidence, dense: CapturedDecoder, routed: CapturedDecoder) -> None:
    """What a decode step of batch 1 consists of; last, because a profiler looks on."""
    for graph, decoder in (("dense", dense), ("routed", routed)):
        with evidence.guard("kernels of a step", graph=graph, model=dense.source.name):
            step = decoder.step(1, 1, decoder.cache(1))
            step.tensors[KV_LENGTHS].fill_(PAST + 1)
            _synchronize(decoder.device)
            kernels = step.kernels()
            evidence.row("kernels of a step", graph=graph, model=dense.source.name, kernels_us=kernels)


def _time_decode(
    evidence: Evidence, dense: CapturedDecoder, routed: CapturedDecoder, batch: int, seconds: float, copy: float
) -> None:
    source = routed.source
    layers = source.config.num_layers
    cache = dense.cache(batch)
    common: dict[str, Any] = {"model": source.name, "batch": batch, "past": PAST, "dtype": OPTIONS[dense.dtype]}
    steps = {"dense": dense.step(batch, 1, cache), "routed": routed.step(batch, 1, cache)}
    for step in steps.values():
        step.tensors[KV_LENGTHS].fill_(PAST + 1)
    _synchronize(dense.device)
    base = steps["dense"].time(seconds)
    evidence.row("decode", graph="dense", **common, **base)
    if batch == 1:
        loose = dense.step(batch, 1, cache, capture=False)
        loose.tensors[KV_LENGTHS].fill_(PAST + 1)
        _synchronize(dense.device)
        evidence.row("decode, not captured", graph="dense", **common, **loose.time(seconds))
    order = np.random.default_rng(0).permutation(layers)
    item = steps["routed"].tensors[LOGITS].element_size()
    for count in dict.fromkeys(round(rate * layers) for rate in RATES):
        skipped = order[:count]
        for layer in range(layers):
            steps["routed"].tensors[threshold_name(layer)].fill_(SKIPPED if layer in skipped else ACTIVE)
        _synchronize(dense.device)
        figures = steps["routed"].time(seconds)
        ratio = figures["step_ms"] / base["step_ms"]
        # Ideal: the weights that are not read would have taken what the card copies as many bytes in.
        ideal = count * source.mlp_bytes * item / 2 / copy * 1e3
        efficiency = (base["step_ms"] - figures["step_ms"]) / ideal if ideal else None
        passed = None
        if source.name == BAR_SHAPE and batch == 1:
            passed = ratio <= DENSE_BAR if count == 0 else None
            if 2 * count == layers and efficiency is not None:
                passed = efficiency >= EFFICIENCY_BAR
        evidence.row(
            "decode",
            passed=passed,
            graph="routed",
            **common,
            skipped=round(count / layers, 3),
            **figures,
            ratio_to_dense=round(ratio, 4),
            ideal_saving_ms=round(ideal, 4),
            skip_efficiency=None if efficiency is None else round(efficiency, 3),
        )
    if batch > 1:
        # Every token for itself: a layer's weights are read where any of the batch is active.
        rng = np.random.default_rng(1)
        for layer in range(layers):
            drawn = np.where(rng.random((batch, 1)) < 0.5, ACTIVE, SKIPPED).astype(np.float32)
            steps["routed"].tensors[threshold_name(layer)].copy_(torch.from_numpy(drawn))
        _synchronize(dense.device)
        figures = steps["routed"].time(seconds)
        ratio = round(figures["step_ms"] / base["step_ms"], 4)
        evidence.row("decode, half of the tokens", graph="routed", **common, **figures, ratio_to_dense=ratio)


def _time_prefill(
    evidence: Evidence, dense: CapturedDecoder, routed: CapturedDecoder, prompt: int, seconds: float
) -> None:
    layers = routed.source.config.num_layers
    cache = dense.cache(1)
    common: dict[str, Any] = {
        "model": routed.source.name,
        "prompt": prompt,
        "logits": "of all tokens",
        "dtype": OPTIONS[dense.dtype],
    }
    step = dense.step(1, prompt, cache)
    _synchronize(dense.device)
    base = step.time(seconds)
    evidence.row("prefill", graph="dense", **common, **base)
    step = routed.step(1, prompt, cache)
    rng = np.random.default_rng(2)
    for rate in (0.0, 0.5, 1.0):
        for layer in range(layers):
            drawn = np.where(rng.random((1, prompt)) < rate, SKIPPED, ACTIVE).astype(np.float32)
            step.tensors[threshold_name(layer)].copy_(torch.from_numpy(drawn))
        _synchronize(dense.device)
        figures = step.time(seconds)
        ratio = round(figures["step_ms"] / base["step_ms"], 4)
        evidence.row("prefill", graph="routed", **common, tokens_skipped=rate, **figures, ratio_to_dense=ratio)


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
