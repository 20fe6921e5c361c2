"""How long captured decoders take in ONNX Runtime: dense, and with so many of their MLPs skipped."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from benchmarks.common.threshold_inputs import ACTIVE, SKIPPED, threshold_name
from benchmarks.gpu.captured_decoder import OPTIONS, CapturedDecoder
from benchmarks.gpu.copy_rate import copy_rate
from benchmarks.gpu.decoder_edits import NORMS, Edit, remove_mlps
from benchmarks.gpu.evidence import Evidence
from benchmarks.gpu.onnxruntime_checks import LOGITS_ERROR
from benchmarks.gpu.random_decoder import RandomDecoder
from benchmarks.gpu.skip_efficiency import skip_efficiency
from dlo_export.checkpoints.interface import KV_LENGTHS, LOGITS

PAST = 512  # tokens in the cache of a decode step
PROMPT = 512
RATES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of MLPs that are skipped
BAR_SHAPE = "8b"  # whose batch of 1 has bars
DENSE_BAR = 1.03


def time_decoders(evidence: Evidence, device: str, library: Path, shape: str, *, small: bool, capture: bool) -> None:
    """A decode step, dense and with so many MLPs skipped, and a prompt."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    seconds = 0.05 if small else 0.3
    copy = copy_rate(device, 3 if small else 10)
    evidence.row("copy rate", model=shape, gb_per_s=round(copy / 1e9, 1))
    source = RandomDecoder(shape, routed=False)
    # Where a step cannot be captured, leave out what else is of our own.
    opened = functools.partial(
        CapturedDecoder.open, dtype=dtype, device=device, library=library, capture=capture, fuse_routers=capture
    )
    weights = opened(source).weights
    dense, norms = _fastest(
        evidence, {name: opened(source, weights=weights, edit=edit) for name, edit in NORMS.items()}, seconds
    )
    routed_source = dataclasses.replace(source, routed=True)
    forms = {name: opened(routed_source, weights=weights, edit=edit) for name, edit in NORMS.items()}
    routed, routed_norms = _fastest(evidence, forms, seconds)
    layers = np.random.default_rng(0).permutation(source.config.num_layers)
    removed = opened(
        source,
        weights=weights,
        edit=_both(functools.partial(remove_mlps, layers=layers[: len(layers) // 2]), NORMS[norms]),
    )
    decoders = _Decoders(dense, routed, removed, tuple(layers.tolist()), copy)
    for name, decoder in (("dense", dense), ("routed", routed)):
        with evidence.guard("placement", kind="placement", model=shape, graph=name):
            facts = decoder.session.placement()
            evidence.row("placement", kind="placement", model=shape, graph=name, **facts, open_s=decoder.open_s)
    batches = (1, 16) if small else (1, 4, 16)
    for batch in batches:
        if evidence.fits(f"decode {shape}, batch {batch}", 8 * seconds):
            with evidence.guard("decode", model=shape, batch=batch):
                _time_decode(evidence, decoders, batch, seconds)
    prompt = 32 if small else PROMPT
    if evidence.fits(f"prefill {shape}", 4 * seconds):
        with evidence.guard("prefill", model=shape):
            _time_prefill(evidence, dense, routed, prompt, seconds)
    if capture and evidence.fits(f"routers of standard operators {shape}", 6):
        with evidence.guard("routers of standard operators", model=shape):
            plain = opened(routed_source, weights=weights, edit=NORMS[routed_norms], fuse_routers=False)
            _time_all_active(evidence, {"routed": routed, "routed, routers of standard operators": plain}, seconds)
    if device == "cuda" and evidence.fits(f"kernels {shape}", 4):
        _show_kernels(evidence, dense, routed)


@dataclasses.dataclass(frozen=True)
class _Decoders:
    """What is compared.

    Attributes:
        dense: Without routers.
        routed: The same with a router in every layer.
        removed: The dense one without the MLPs of the first half of `layers`.
        layers: In the order in which their MLPs are skipped.
        copy_rate: Of the card.
    """

    dense: CapturedDecoder
    routed: CapturedDecoder
    removed: CapturedDecoder
    layers: tuple[int, ...]
    copy_rate: float


def _both(first: Edit, second: Edit | None) -> Edit:
    """One edit of two."""

    def edit(model: ir.Model) -> None:
        first(model)
        if second is not None:
            second(model)

    return edit


def _fastest(evidence: Evidence, forms: Mapping[str, CapturedDecoder], seconds: float) -> tuple[CapturedDecoder, str]:
    """Times every way to norm, everything active; returns the fastest and its name, the first one where none runs.

    Logits are compared with the first's: a norm of a wide row may add up in more or fewer bits.
    """
    times: dict[str, float] = {}
    logits: list[torch.Tensor] = []
    for norms, decoder in forms.items():
        source = decoder.source
        with evidence.guard("norms", model=source.name, norms=norms):
            step = decoder.step(1, 1, decoder.cache(1))
            step.tensors[KV_LENGTHS].fill_(PAST + 1)
            _synchronize(decoder.device)
            figures, graph = step.time(seconds), "routed" if source.routed else "dense"
            times[norms] = figures["step_ms"]
            logits.append(step.tensors[LOGITS].float().cpu())
            off = float((logits[-1] - logits[0]).abs().max() / logits[0].abs().max())
            common: dict[str, Any] = {"graph": graph, "norms": norms, "model": source.name, "batch": 1, "past": PAST}
            evidence.row(
                "norms", passed=off <= LOGITS_ERROR[OPTIONS[decoder.dtype]], **common, **figures, off_the_first_by=off
            )
    fastest = min(times, key=lambda name: times[name]) if times else next(iter(forms))
    return forms[fastest], fastest


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


def _time_decode(evidence: Evidence, decoders: _Decoders, batch: int, seconds: float) -> None:
    dense, routed, source = decoders.dense, decoders.routed, decoders.routed.source
    layers = source.config.num_layers
    cache = dense.cache(batch)
    common: dict[str, Any] = {"model": source.name, "batch": batch, "past": PAST, "dtype": OPTIONS[dense.dtype]}
    steps = {name: decoder.step(batch, 1, cache) for name, decoder in (("dense", dense), ("routed", routed))}
    steps["removed"] = decoders.removed.step(batch, 1, cache)
    for step in steps.values():
        step.tensors[KV_LENGTHS].fill_(PAST + 1)
    _synchronize(dense.device)
    base = steps["dense"].time(seconds)
    evidence.row("decode", kind="decode", graph="dense", **common, **base)
    removed = steps["removed"].time(seconds)
    evidence.row("decode", graph="dense, half of its MLPs removed", **common, **removed)
    if batch == 1:
        loose = dense.step(batch, 1, cache, capture=False)
        loose.tensors[KV_LENGTHS].fill_(PAST + 1)
        _synchronize(dense.device)
        evidence.row("decode, not captured", graph="dense", **common, **loose.time(seconds))
    item = steps["routed"].tensors[LOGITS].element_size()
    for count in dict.fromkeys(round(rate * layers) for rate in RATES):
        skipped = decoders.layers[:count]
        for layer in range(layers):
            steps["routed"].tensors[threshold_name(layer)].fill_(SKIPPED if layer in skipped else ACTIVE)
        _synchronize(dense.device)
        figures = steps["routed"].time(seconds)
        ratio = figures["step_ms"] / base["step_ms"]
        passed = ratio <= DENSE_BAR if source.name == BAR_SHAPE and batch == 1 and count == 0 else None
        efficiencies: dict[str, float | str | None] = {}
        if count:
            half = count == layers // 2
            efficiency = skip_efficiency(
                base["step_ms"],
                figures["step_ms"],
                dense_bytes=_bytes_of_a_step(dense, batch),
                unread_bytes=count * source.mlp_bytes * item / 2,
                copy_rate=decoders.copy_rate,
                removed_ms=removed["step_ms"] if half else None,
            )
            efficiencies = efficiency.facts
            if half and source.name == BAR_SHAPE and batch == 1:
                passed = efficiency.passed
        evidence.row(
            "decode",
            passed=passed,
            kind="decode",
            graph="routed",
            **common,
            skipped=round(count / layers, 3),
            **figures,
            ratio_to_dense=round(ratio, 4),
            **efficiencies,
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


def _bytes_of_a_step(decoder: CapturedDecoder, batch: int) -> float:
    """What a dense step reads at least: weights, but of the embedding a row only, and the filled slots of the cache."""
    config = decoder.source.config
    weights = {name: value for name, value in decoder.weights.items() if not name.endswith("embed_tokens.weight")}
    if config.tie_word_embeddings:
        weights = decoder.weights
    item = next(iter(weights.values())).element_size()
    cache = 2 * config.num_layers * batch * (PAST + 1) * config.num_kv_heads * config.head_dim * item
    return cache + sum(value.numel() * value.element_size() for value in weights.values())


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
