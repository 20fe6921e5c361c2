"""How long captured decode in PyTorch takes: dense, and with a share of its MLPs skipped."""

from __future__ import annotations

import copy
import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import torch
from torch import nn

from benchmarks.gpu.evidence import Evidence
from benchmarks.gpu.kernel_timing import timed
from benchmarks.gpu.model_kernels import generate_times
from benchmarks.gpu.random_torch_llama import random_model
from benchmarks.gpu.skip_efficiency import BAR, skip_efficiency
from dlo_export.modeling.skip_kernels import KernelMlp
from dlo_export.runtimes.torch.captured.decoder import CapturedDecoder
from dlo_export.runtimes.torch.captured.kernel_ops import KernelOps
from dlo_export.runtimes.torch.captured.step_ops import Routing, StepOps, TorchOps
from dlo_export.runtimes.torch.captured.step_weights import PlainMlp, StepWeights

CONTEXT: Final = 512
CAPACITY: Final = 640
ROUNDS, STEPS = 5, 8
ACTIVE_BAR = 1.03
"""At 8B, batch 1: none skipped, over dense."""
REMOVED: Final = (0.5,)
"""Shares of the MLPs that a dense model has not."""
OVERLAP_BAR: Final = 2**-5
"""Largest difference of bfloat16 logits, of the largest: products may sum in another order; nothing else differs."""


@dataclasses.dataclass(frozen=True)
class Piece:
    """What is timed in one go.

    Attributes:
        what: For a row, where it is left out.
        seconds: It takes, about.
        run: It.
    """

    what: str
    seconds: float
    run: Callable[[], None]


class Size:
    """One shape of model.

    Args:
        evidence: Where rows go.
        name: For the rows.
        config: Of a plain Llama.
        smoke: Little of everything.
        copy: The card's copy bandwidth, bytes per second.
        tflops: Its rate of bfloat16 products, TFLOP/s.
    """

    def __init__(
        self, evidence: Evidence, name: str, config: dict[str, Any], smoke: bool, copy: float, tflops: float
    ) -> None:
        self.evidence, self.name, self.smoke, self.copy, self.tflops = evidence, name, smoke, copy, tflops
        self.config = config
        self.layers: int = config["num_hidden_layers"]
        begin = time.monotonic()
        dense = random_model(config, routed=False, device="cuda", dtype=torch.bfloat16)
        self.vocab: int = dense.config.vocab_size
        self.dense = StepWeights(dense, kernels=False)
        self.routed = StepWeights(random_model(config, routed=True, device="cuda", dtype=torch.bfloat16), kernels=True)
        torch.cuda.synchronize()
        self.row("made", seconds=round(time.monotonic() - begin, 1), gb=round(torch.cuda.memory_allocated() / 1e9, 1))

    def decoder(self, weights: StepWeights, batch: int, **options: Any) -> CapturedDecoder:
        """A decoder whose kernels overlap as those of any decoder do, where `ops` does not say otherwise."""
        return CapturedDecoder(weights, batch=batch, capacity=CAPACITY, **options)

    def row(self, what: str, **values: Any) -> None:
        """A row of this size."""
        self.evidence.row(what, model=self.name, **values)

    def pieces(self) -> list[Piece]:
        """Decode, the single step first, where a step's time goes, prefill; the last one ends the routed model."""
        once = self.smoke and self.name == "1B"  # the same code as of the other size
        found: list[Piece] = []
        for batch in (1,) if once else (1, 4) if self.smoke else (1, 4, 16):
            found.append(Piece(f"decode, batch {batch}", 4, functools.partial(self.decode, batch)))
            if batch == 1:
                found.append(Piece("one by one", 5, self.one_by_one))
        if once:
            return found
        for batch in (1,) if self.smoke else (1, 16):
            found.append(Piece(f"breakdown, batch {batch}", 3, functools.partial(self.breakdown, batch)))
        ends = [
            Piece("prefill", 6, self.prefill),
            Piece("generate", 12, self.generate),
            Piece("masked", 4, self.masked),
        ]
        return [*found, *ends]

    def run(self, piece: Piece) -> None:
        """Runs a piece where so many seconds are left; what breaks it is a row."""
        with self.evidence.guard(piece.what, model=self.name):
            if self.evidence.fits(f"{self.name}, {piece.what}", piece.seconds):
                piece.run()

    def one_by_one(self) -> None:
        """One token a step, kernels one by one: what overlapping ones are held against, and how fast it is.

        Half of the layers' MLPs are skipped where logits are compared.
        """
        ids = torch.randint(0, self.vocab, (1, CONTEXT), device="cuda")
        expected: list[torch.Tensor] = []
        for form, ops in (("one by one", KernelOps()), ("overlapping", None)):
            decoders = [self.decoder(weights, 1, ops=ops) for weights in (self.dense, self.routed)]
            found = [logits_of(decoder, self.skipping(0.5), ids) for decoder in decoders]
            expected = expected or found
            errors = [largest_difference(got, wanted) for got, wanted in zip(found, expected, strict=True)]
            subjects = [Subject("dense", decoders[0])]
            subjects += [Subject(f"layers {share:.0%}", decoders[1], self.skipping(share)) for share in (0.0, 0.5, 1.0)]
            ms = {
                subject.name: spread(np.array([subject.block_ms(ids[:, 0], [CONTEXT], 4) for _ in range(4)][1:]))[
                    "median"
                ]
                for subject in subjects
            }
            right = all(error <= OVERLAP_BAR for error in errors)  # which no NaN is
            self.row("form", passed=right, batch=1, form=form, errors=errors, bar=OVERLAP_BAR, ms=ms)

    def skipping(self, share: float) -> torch.Tensor:
        """Thresholds that skip a share of the layers, evenly spread."""
        return torch.tensor(np.where(spread_layers(self.layers, share), 2.0, -1.0), dtype=torch.float32, device="cuda")

    def step_bytes(self, batch: int, skipped: float) -> float:
        """Bytes that a decode step reads at least: weights but the embedding, and the cache."""
        c = self.config
        hidden, width = c["hidden_size"], c["head_dim"]
        attention = 2 * hidden * (c["num_attention_heads"] + c["num_key_value_heads"]) * width
        cache = 2 * batch * (CONTEXT + STEPS / 2) * c["num_key_value_heads"] * width
        mlp = 3 * hidden * c["intermediate_size"]
        elements = self.layers * (attention + cache + (1 - skipped) * mlp) + hidden * self.vocab
        return float(2 * elements)

    def subjects(self, batch: int, token: torch.Tensor, ids: torch.Tensor) -> list[Subject]:
        """Decoders behind their prompts; the routed one's states share a cache, whose content does not matter here."""
        dense, routed = self.decoder(self.dense, batch), self.decoder(self.routed, batch)
        found = [Subject("dense", dense)]
        for decoder in (dense, routed):
            decoder.prefill(ids)
        for share in REMOVED:
            fewer = self.decoder(without_mlps(self.dense, share), batch)
            fewer.prefill(ids)
            found.append(Subject(f"removed {share:.0%}", fewer, skipped=share))
        for share in (0.0, 0.25, 0.5, 0.75, 1.0):
            found.append(Subject(f"layers {share:.0%}", routed, self.skipping(share), share))
        # Scores are spread around one half: what each layer's tokens say of it decides for about half of them.
        halves = torch.full((self.layers,), 0.5, device="cuda")
        routed.thresholds.copy_(halves)
        scores = torch.stack([made[:, 0] for made in routed.decode(token).scores.values()])
        active = (scores > 0.5).float()
        self.row("tokens", batch=batch, active=round(float(active.mean()), 3))
        found.append(Subject("tokens 50%", routed, halves, float((active.sum(1) == 0).float().mean())))
        return found

    def decode(self, batch: int) -> None:
        """A step behind the context, subjects in turns."""
        generator = torch.Generator("cuda").manual_seed(2)
        ids = torch.randint(0, self.vocab, (batch, CONTEXT), device="cuda", generator=generator)
        token, lengths = ids[:, 0].contiguous(), [CONTEXT] * batch
        subjects = self.subjects(batch, token, ids)
        times: dict[str, list[float]] = {subject.name: [] for subject in subjects}
        for round_ in range(2 + (3 if self.smoke else ROUNDS)):
            for subject in subjects if round_ % 2 else reversed(subjects):
                times[subject.name].append(subject.block_ms(token, lengths, STEPS))
        samples = {name: np.array(values[2:]) for name, values in times.items()}  # two rounds to warm up
        dense, whole, none = samples["dense"], samples["layers 0%"], samples["layers 100%"]
        all_bytes = self.step_bytes(batch, 0)
        for subject in subjects:
            ms = samples[subject.name]
            values: dict[str, Any] = {"ms": spread(ms), "over_dense": spread(ms / dense)}
            values["step_ms"] = values["ms"]["median"]
            # What is plotted is the share of layers; of tokens, it is the MLPs that no token of the batch needed.
            share = "skipped" if subject.name.startswith("layers") else "weights_skipped"
            values[share] = round(subject.skipped, 3)
            nbytes = self.step_bytes(batch, subject.skipped)
            values["gb_s"] = round(nbytes / float(np.median(ms)) * 1e-6)
            values["of_copy_bandwidth"] = round(values["gb_s"] / self.copy * 1e9, 3)
            passed = None
            if subject.name.startswith("layers") and subject.skipped > 0:
                removed = samples.get(f"removed {subject.skipped:.0%}")
                found = skip_efficiency(
                    float(np.median(dense)),
                    values["step_ms"],
                    dense_bytes=all_bytes,
                    unread_bytes=all_bytes - nbytes,
                    copy_rate=self.copy,
                    removed_ms=None if removed is None else float(np.median(removed)),
                )
                line = whole + subject.skipped * (none - whole)
                values |= {**found.facts, "efficiency_line": _efficiency(dense, ms, line)}
                if (self.name, batch, subject.name) == ("8B", 1, "layers 50%"):
                    values["bar"] = BAR
                    passed = found.passed
            if (self.name, batch, subject.name) == ("8B", 1, "layers 0%"):
                values["bar"] = ACTIVE_BAR
                passed = values["over_dense"]["median"] <= ACTIVE_BAR
            self.row(
                "decode",
                # Four layers and a small vocabulary are no 8B: a smoke run's times are held to nothing.
                passed=None if self.smoke else passed,
                kind="decode",
                batch=batch,
                subject=subject.name,
                **values,
            )

    def prefill(self) -> None:
        """A prompt of 512, captured; and where the host counts active tokens, launch by launch."""
        ids = torch.randint(0, self.vocab, (1, CONTEXT), device="cuda")
        halves = torch.full((self.layers,), 0.5, device="cuda")
        decoders = {
            "dense": self.decoder(self.dense, 1, prompt=CONTEXT),
            "kernels": self.decoder(self.routed, 1, prompt=CONTEXT),
            "gathered": self.decoder(self.routed, 1, gather_prompts=True),
        }
        states = {"none skipped": self.skipping(0.0), "half of the tokens": halves, "all skipped": self.skipping(1.0)}
        cases = [("dense", "none skipped"), *((form, state) for form in ("kernels", "gathered") for state in states)]
        times: dict[tuple[str, str], list[float]] = {case: [] for case in cases}
        for _ in range(2 + (2 if self.smoke else 7)):
            for form, state in cases:
                decoders[form].thresholds.copy_(states[state])
                run = functools.partial(decoders[form].prefill, ids)
                times[form, state].append(block_us(run, 2) * 1e-3)
        dense = np.array(times["dense", "none skipped"][2:])
        c = self.config
        mlp_flops = 2 * CONTEXT * self.layers * 3 * c["hidden_size"] * c["intermediate_size"]
        for (form, state), values in times.items():
            ms = np.array(values[2:])
            self.row(
                "prefill",
                tokens=CONTEXT,
                form=form,
                state=state,
                ms=spread(ms),
                over_dense=spread(ms / dense),
                mlps_at_matmul_rate_ms=round(mlp_flops / self.tflops * 1e-9, 3),
            )

    def generate(self) -> None:
        """The model class' own `generate()`, half of the MLPs skipped, at the host's pace; in the kernels and not."""
        model = self.routed.model  # whose MLPs' weights lie as the kernels read them, either way
        half, tokens = spread_layers(self.layers, 0.5), 8 if self.smoke else 32
        times = generate_times(model, half, prompt=CONTEXT, tokens=tokens, rounds=1 if self.smoke else 3)
        for form, values in times.items():
            self.row("generate", kind="generate", batch=1, form=form, skipped=0.5, tokens=tokens, **values)

    def breakdown(self, batch: int) -> None:
        """Where a step's time goes: each part of all layers in a graph of its own, microseconds per layer."""
        hidden, width, kv_heads = (self.config[key] for key in ("hidden_size", "head_dim", "num_key_value_heads"))
        ops, layers = KernelOps(), self.routed.layers
        stream = torch.randn(batch, hidden, dtype=torch.bfloat16, device="cuda")
        start = torch.full((batch,), CONTEXT, device="cuda")
        cache = torch.randn(2, self.layers, batch, kv_heads, CAPACITY, width, dtype=torch.bfloat16, device="cuda")
        cosines, sines = torch.randn(2, CAPACITY, width // 2, dtype=torch.bfloat16, device="cuda")
        qkv = layers[0].qkv(stream)
        gate_up = torch.randn(batch, 2 * self.config["intermediate_size"], dtype=torch.bfloat16, device="cuda")
        ones, zeros = torch.ones(batch, device="cuda"), torch.zeros(batch, device="cuda")
        half = torch.full((1,), 0.5, device="cuda")
        head = self.routed.model.lm_head.weight.data

        def each(run: Callable[[int], object]) -> list[Callable[[], object]]:
            return [functools.partial(run, index) for index in range(self.layers)]

        def plain(index: int) -> PlainMlp:
            mlp = self.dense.layers[index].mlp
            assert isinstance(mlp, PlainMlp), "nothing of this model is routed"
            return mlp

        def skip(index: int, scale: torch.Tensor) -> torch.Tensor:
            mlp = layers[index].mlp
            assert isinstance(mlp, KernelMlp), "every layer of this model is routed"
            return ops.skip_mlp(stream, scale, mlp, stream)

        def routing(index: int) -> Routing:
            router = layers[index].router
            assert router is not None, "every layer of this model is routed"
            return Routing(router, half, (1.0, 0.0))

        norm = layers[0].mlp_norm
        gated = gate_up[:, : self.config["intermediate_size"]].contiguous()
        parts: dict[str, list[Callable[[], object]]] = {
            "add_norm": each(lambda index: ops.add_norm(stream, stream, norm, 1e-5)),
            "add_norm_route": each(lambda index: ops.add_norm_route(stream, stream, norm, 1e-5, routing(index))),
            "qkv product": each(lambda index: layers[index].qkv(stream)),
            "attend": each(lambda index: ops.attend(qkv, start, (cosines, sines), cache[0, index], cache[1, index])),
            "out product": each(lambda index: layers[index].out(stream)),
            "routed MLP, active": each(lambda index: skip(index, ones)),
            "routed MLP, skipped": each(lambda index: skip(index, zeros)),
            "gate and up product": each(lambda index: plain(index).gate_up(stream)),
            "gated": each(lambda index: ops.gated(gate_up)),
            "down product": each(lambda index: plain(index).down(gated)),
            "head product, once": [lambda: nn.functional.linear(stream, head)],
        }
        if batch == 1:
            vectors = KernelOps(vectors=True)
            parts["qkv product, own kernel"] = each(lambda index: vectors.product(stream, layers[index].qkv))
            parts["out product, own kernel"] = each(lambda index: vectors.product(stream, layers[index].out))
        with torch.inference_mode():
            for name, part in parts.items():
                with self.evidence.guard("breakdown", model=self.name, batch=batch, step=name):
                    self.row("breakdown", batch=batch, step=name, **timed(part, replays=5).facts)

    def masked(self) -> None:
        """What a captured step costs where nothing is skipped: routers, everything computed, and masked."""
        self.routed.release()
        weights = StepWeights(self.routed.model, kernels=False)
        forms: dict[str, StepOps] = {
            "masked, kernels between products": KernelOps(),
            "masked, PyTorch alone": TorchOps(),
        }
        ids = torch.randint(0, self.vocab, (1, CONTEXT), device="cuda")
        for name, ops in forms.items():
            decoder = CapturedDecoder(weights, batch=1, capacity=CAPACITY, ops=ops)
            decoder.prefill(ids)
            subject = Subject(name, decoder)
            times = [subject.block_ms(ids[:, 0], [CONTEXT], STEPS) for _ in range(2 + (2 if self.smoke else 5))]
            self.row("decode", batch=1, subject=name, ms=spread(np.array(times[2:])))


@dataclasses.dataclass
class Subject:
    """A decoder in a state of its thresholds.

    Attributes:
        name: "dense", or what is skipped.
        decoder: To time.
        thresholds: float32 [layers] to put in before a block; None where nothing is routed.
        skipped: Share of layers whose MLP weights are not read at all.
    """

    name: str
    decoder: CapturedDecoder
    thresholds: torch.Tensor | None = None
    skipped: float = 0.0

    def block_ms(self, token: torch.Tensor, lengths: Sequence[int], steps: int) -> float:
        """Milliseconds per decode step behind the context."""
        if self.thresholds is not None:
            self.decoder.thresholds.copy_(self.thresholds)
        self.decoder.crop(lengths)
        self.decoder.decode(token)  # so that the device is at work when the clock starts
        return block_us(lambda: self.decoder.decode(token), steps) * 1e-3


def spread_layers(layers: int, share: float) -> np.ndarray:
    """Which layers a share of them are, evenly spread: bool [layers]."""
    steps = np.floor(np.arange(layers + 1) * share + 1e-9)
    chosen: np.ndarray = np.diff(steps) > 0
    return chosen


def without_mlps(weights: StepWeights, share: float) -> StepWeights:
    """The same model without the MLPs, and their norms, of a share of its layers; the others' weights are shared."""
    fewer = copy.copy(weights)
    gone = spread_layers(len(weights.layers), share)
    fewer.layers = [
        dataclasses.replace(layer, mlp=None) if removed else layer
        for layer, removed in zip(weights.layers, gone, strict=True)
    ]
    return fewer


def logits_of(decoder: CapturedDecoder, thresholds: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Of three steps behind a prompt, float32 [3, batch, vocabulary]."""
    decoder.thresholds.copy_(thresholds)
    decoder.prefill(ids)
    return torch.stack([decoder.decode(ids[:, step]).logits.float().clone() for step in range(3)])


def largest_difference(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Of the largest number expected; NaN where one of them is not a number."""
    return float((got - expected).abs().max() / expected.abs().max())


def block_us(run: Callable[[], object], runs: int) -> float:
    """Microseconds of the device per run, over so many runs in a row."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    for _ in range(runs):
        run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e3 / runs


def spread(values: np.ndarray) -> dict[str, float]:
    """Median, and the 10th and 90th percentile."""
    found = np.percentile(values, (50, 10, 90))
    return dict(zip(("median", "p10", "p90"), (round(float(value), 4) for value in found), strict=True))


def _efficiency(dense: np.ndarray, routed: np.ndarray, ideal: np.ndarray) -> dict[str, float] | None:
    """Its spread; None where a block's ideal saves nothing."""
    return None if (ideal >= dense).any() else spread((dense / routed - 1) / (dense / ideal - 1))
