"""Captured decode in PyTorch with the dlo kernels, on a GPU: right against the model on the CPU, then how fast.

Of shapes of 1B and 8B, random bfloat16 weights made on the device: a decode step behind 512 tokens and a prefill of
512, dense (the same decoder, every product cuBLAS') and with a share of the MLPs skipped, at batch 1, 4 and 16.

* ``layers``: the share is skipped layer by layer, each for all tokens; thresholds of -1 and 2 decide so.
* ``tokens``: random routers decide per token, for about half of them; at batch 1 that is some layers.

Skip efficiency is (T_dense / T - 1) / (T_dense / T_ideal - 1), T_ideal being T_dense times the share of the step's
bytes (weights, cache) that are still read. `efficiency_line` has T_ideal on the line between the same decoder's times
with everything active and everything skipped.

    python -m benchmarks.gpu_pytorch --out DIR
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Final, cast

import numpy as np
import torch
from torch import nn

from benchmarks.evidence import Evidence, run_part
from benchmarks.kernel_timing import copy_rate, product_rate, timed
from dlo_export.checkpoints.config import LlamaConfig
from dlo_export.checkpoints.depth.expansion import routed_config
from dlo_export.modeling.from_tensors import empty_llama_dlo
from dlo_export.modeling.llama_dlo import LlamaDloForCausalLM
from dlo_export.runtimes.torch.captured.decoder import CapturedDecoder
from dlo_export.runtimes.torch.captured.step_ops import (
    KernelOps,
    Routing,
    StepOps,
    TorchOps,
)
from dlo_export.runtimes.torch.captured.step_weights import KernelMlp, PlainMlp, StepWeights

CONTEXT: Final = 512
CAPACITY: Final = 640
ROUNDS, STEPS = 8, 8
EFFICIENCY_BAR, ACTIVE_BAR = 0.9, 1.03
"""At 8B, batch 1: half of the MLPs skipped; none skipped, over dense."""
LOGITS_BAR = {"float32": 2e-5, "bfloat16": 2**-5}
"""Largest difference, of the largest logit; bfloat16 against float32 on the same weights."""


def llama(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocab: int, **other: Any) -> Any:
    """Content of config.json of a plain Llama."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "vocab_size": vocab,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
        "tie_word_embeddings": False,
        "max_position_embeddings": 8192,
        "hidden_act": "silu",
        **other,
    }


TINY = llama(64, 136, 3, 4, 2, 199)
SIZES = {
    "1B": llama(2048, 8192, 16, 32, 8, 128_256, tie_word_embeddings=True),
    "8B": llama(4096, 14_336, 32, 32, 8, 128_256),
}
"""Shapes of Llama-3.2-1B and Llama-3.1-8B."""


def random_model(config: dict[str, Any], *, routed: bool, device: str, dtype: torch.dtype) -> LlamaDloForCausalLM:
    """A model with random weights, made on the device; the same on every call there.

    Args:
        config: Of a plain Llama.
        routed: Whether every layer has a router.
        device: Where.
        dtype: Of all parameters but the routers.
    """
    layers = config["num_hidden_layers"]
    config = {**config, **(routed_config([True] * layers) if routed else {})}
    shapes = LlamaConfig.from_dict(config, "random").tensor_shapes()
    model = empty_llama_dlo(config, shapes, dtype=dtype)
    # Names in order, routers last: routed or not, the other weights are the same.
    order = sorted(shapes, key=lambda name: (name.startswith("model.routers"), name))
    generator = torch.Generator(device).manual_seed(0)
    tensors = {}
    for name in order:
        shape = shapes[name]
        kind = torch.float32 if name.startswith("model.routers") else dtype
        values = torch.empty(shape, dtype=kind, device=device)
        if len(shape) == 1:
            values.fill_(1.0)
        else:
            values.normal_(
                std=1.0 if "embed" in name and not model.config.tie_word_embeddings else shape[-1] ** -0.5,
                generator=generator,
            )
        tensors[name] = values
    model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    model.model.rotary_emb.to(device)
    return model


def tokens_of(model: LlamaDloForCausalLM, batch: int, sequence: int, seed: int = 1) -> torch.Tensor:
    """Random token ids, int64 [batch, sequence], on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, model.config.vocab_size, (batch, sequence), generator=generator)


def model_logits(model: LlamaDloForCausalLM, ids: torch.Tensor, lengths: Sequence[int]) -> tuple[torch.Tensor, Any]:
    """What the model says from each prompt's last token on: float32 [steps, batch, vocabulary], and active tokens.

    Every sequence is as long as its prompt and the same number of steps.
    """
    steps = ids.shape[1] - max(lengths)
    logits, active = [], []
    for row, length in enumerate(lengths):
        with torch.inference_mode():
            output = model(input_ids=ids[row : row + 1, : length + steps].to(model.device))
        logits.append(output.logits[0, length - 1 :].float().cpu())
        scores = torch.stack([scores[0, length:] for scores in output.router_scores.values()])
        active.append((scores > 0.5).cpu())
    return torch.stack(logits, 1), torch.stack(active, -1)


def decoder_logits(decoder: CapturedDecoder, ids: torch.Tensor, lengths: Sequence[int]) -> tuple[torch.Tensor, Any]:
    """The same of a decoder."""
    first = max(lengths)
    logits = [decoder.prefill(ids[:, :first], lengths).logits.float().cpu()]
    active = []
    for step in range(ids.shape[1] - first):
        output = decoder.decode(torch.stack([ids[row, length + step] for row, length in enumerate(lengths)]))
        logits.append(output.logits.float().cpu())
        active.append(torch.stack([scores[:, 0] > 0.5 for scores in output.scores.values()]).cpu())
    return torch.stack(logits), torch.stack(active, 1)


def compare(
    model: LlamaDloForCausalLM, decoder: CapturedDecoder, batch: int, prompt: int, steps: int
) -> dict[str, Any]:
    """How far a decoder is from a model: prompts of several lengths, then steps.

    Returns:
        Largest difference by the largest logit, decisions that differ, and how many there were.
    """
    ids = tokens_of(model, batch, prompt + steps)
    lengths = [max(1, prompt - 3 * row) for row in range(batch)]
    expected, decided = model_logits(model, ids, lengths)
    got, decisions = decoder_logits(decoder, ids, lengths)
    return {
        "error": float((got - expected).abs().max() / expected.abs().max()),
        "flipped": int((decided != decisions).sum()),
        "decisions": decided.numel(),
        "active": round(float(decided.float().mean()), 3),
    }


def check() -> None:
    """On the CPU: the decoder without kernels and without a graph says what the model says.

    Raises:
        RuntimeError: It does not.
    """
    model = random_model(TINY, routed=True, device="cpu", dtype=torch.float32)
    decoder = CapturedDecoder(StepWeights(model, kernels=True), batch=3, capacity=32)
    found = compare(model, decoder, batch=3, prompt=12, steps=8)
    if found["error"] > LOGITS_BAR["float32"] or found["flipped"]:
        raise RuntimeError(f"gpu_pytorch: the decoder is not the model: {found}")


def measure(evidence: Evidence, smoke: bool) -> None:
    """Everything that needs a GPU, the most valuable first."""
    torch.backends.cuda.matmul.allow_tf32 = False
    copy = tflops = float("nan")
    with evidence.guard("ceilings"):
        copy, tflops = copy_rate(3 if smoke else 10) * 1e-9, product_rate(3 if smoke else 10) * 1e-12
        evidence.row("ceilings", copy_gb_s=round(copy), bf16_matmul_tflop_s=round(tflops))
    for dtype in (torch.bfloat16, torch.float32):
        check_ops(evidence, dtype)
    check_models(evidence, torch.float32, ("kernels",))
    for name in ("8B", "1B"):
        config = {**SIZES[name], **({"num_hidden_layers": 4, "vocab_size": 32_768} if smoke else {})}
        with evidence.guard(name):
            if evidence.fits(name, 12 if smoke else 20):
                Size(evidence, name, config, smoke, copy, tflops).measure()
        torch.cuda.empty_cache()
    if evidence.fits("captured decoder, other forms", 10):
        check_models(evidence, torch.float32, FORMS[1:])
        check_models(evidence, torch.bfloat16, FORMS)
    with evidence.guard("transformers"):
        if evidence.fits("transformers", 5):
            outside_reference(evidence, {**SIZES["1B"], **({"num_hidden_layers": 2} if smoke else {})}, smoke)


def check_ops(evidence: Evidence, dtype: torch.dtype) -> None:
    """Each kernel by itself, at an 8B's widths, against its definition in PyTorch."""
    kind = str(dtype).removeprefix("torch.")
    batch, heads, kv_heads, width, hidden, intermediate = 4, 32, 8, 128, 4096, 1024
    generator = torch.Generator("cuda").manual_seed(0)

    def random(*shape: int, kind: torch.dtype = dtype, std: float = 1.0) -> torch.Tensor:
        return torch.empty(shape, dtype=kind, device="cuda").normal_(std=std, generator=generator)

    stream, added, weight = random(batch, hidden), random(batch, hidden), random(hidden)
    half = torch.tensor([0.5], device="cuda")
    routing = Routing(random(hidden, kind=torch.float32, std=hidden**-0.5), half, (0.9, 0.2))
    start = torch.tensor([0, 5, 300, 638], device="cuda")
    qkv = random(batch, (heads + 2 * kv_heads) * width)
    rotary = (random(CAPACITY, width // 2), random(CAPACITY, width // 2))
    keys, values = random(batch, kv_heads, CAPACITY, width), random(batch, kv_heads, CAPACITY, width)
    mlp = KernelMlp(
        random(hidden, intermediate, std=hidden**-0.5),
        random(hidden, intermediate, std=hidden**-0.5),
        random(intermediate, hidden, std=intermediate**-0.5),
    )
    scale = torch.tensor([0.0, 1.5, 0.0, 0.7], device="cuda")

    def rotated(ops: StepOps) -> tuple[torch.Tensor, ...]:
        cache = keys.clone(), values.clone()
        return (ops.rotate_and_store(qkv, start, rotary, *cache), *cache)

    def attended(ops: StepOps) -> tuple[torch.Tensor, ...]:
        cache = keys.clone(), values.clone()
        return (ops.attend(qkv, start, rotary, *cache), *cache)

    def normed(ops: StepOps) -> tuple[torch.Tensor, ...]:
        total, norm, made = ops.add_norm_route(stream, added, weight, 1e-5, routing)
        return total, norm, made.scores, made.scale

    cases: dict[str, Callable[[StepOps], tuple[torch.Tensor, ...]]] = {
        "add_norm": lambda ops: ops.add_norm(stream, None, weight, 1e-5),
        "add_norm_route": normed,
        "rotate_and_store": rotated,
        "attend": attended,
        "gated": lambda ops: (ops.gated(qkv),),
        "skip_mlp": lambda ops: (ops.skip_mlp(stream, scale, mlp, added),),
    }
    bar = {"float32": 1e-5, "bfloat16": 2**-6}[kind]
    for name, case in cases.items():
        with evidence.guard(f"op {name}", dtype=kind):
            with torch.inference_mode():
                pairs = list(zip(case(KernelOps()), case(TorchOps()), strict=True))
            torch.cuda.synchronize()
            errors = [largest_error(got, wanted) for got, wanted in pairs]
            passed = all(error <= bar for error in errors)  # which no NaN is
            evidence.row(f"op {name}", passed=passed, dtype=kind, errors=errors, bar=bar)


def largest_error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference, of the largest of what is wanted; 0 where all of both is 0."""
    largest = wanted.float().abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    return float((got - wanted).float().abs().max() / largest)


FORMS: Final = ("kernels", "masked, kernels between products", "masked, PyTorch alone")


def check_models(evidence: Evidence, dtype: torch.dtype, names: Sequence[str]) -> None:
    """The captured decoder on the device against the model in float32 on the CPU, on the same weights."""
    kind = str(dtype).removeprefix("torch.")
    with evidence.guard("captured decoder against the model", dtype=kind):
        model = random_model(TINY, routed=True, device="cpu", dtype=dtype)
        on_device = random_model(TINY, routed=True, device="cpu", dtype=dtype)
        cast("nn.Module", on_device).to("cuda")
        cast("nn.Module", model).float()
        forms = (True, KernelOps), (False, KernelOps), (False, TorchOps)
        for name in names:
            kernels, ops_class = forms[FORMS.index(name)]
            for batch in (1, 3):
                with evidence.guard("captured decoder against the model", dtype=kind, form=name, batch=batch):
                    weights = StepWeights(on_device, kernels=kernels)
                    # One of the prompts is recorded, padded; a longer one would run launch by launch.
                    decoder = CapturedDecoder(
                        weights, batch=batch, capacity=96, ops=ops_class(), prompt=80 if batch == 1 else 0
                    )
                    found = compare(model, decoder, batch=batch, prompt=70, steps=16)
                    weights.release()
                    # In 16 bits a score may fall on the other side of its threshold, and all logits behind it differ.
                    bar = LOGITS_BAR[kind]
                    right = found["error"] <= bar and not found["flipped"]
                    evidence.row(
                        "captured decoder against the model",
                        passed=right if dtype == torch.float32 or not found["flipped"] else None,
                        dtype=kind,
                        form=name,
                        batch=batch,
                        bar=bar,
                        **found,
                    )


def block_us(run: Callable[[], object], runs: int) -> float:
    """Microseconds of the device per run, over so many runs in a row."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    for _ in range(runs):
        run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e3 / runs


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


class Size:
    """One shape of model.

    Args:
        evidence: Where rows go.
        name: For the rows.
        config: Of a plain Llama.
        smoke: Little of everything.
        copy: The card's copy bandwidth, GB/s.
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

    def row(self, what: str, **values: Any) -> None:
        """A row of this size."""
        self.evidence.row(what, model=self.name, **values)

    def measure(self) -> None:
        """Decode, then prefill, then where a step's time goes."""
        once = self.smoke and self.name == "1B"  # the same code as of the other size
        for batch in (1,) if once else (1, 4) if self.smoke else (1, 4, 16):
            with self.evidence.guard("decode", model=self.name, batch=batch):
                if self.evidence.fits(f"decode {self.name}, batch {batch}", 4 if self.smoke else 8):
                    self.decode(batch)
        if once:
            return
        with self.evidence.guard("prefill", model=self.name):
            if self.evidence.fits(f"prefill {self.name}", 3 if self.smoke else 6):
                self.prefill()
        for batch in (1,) if self.smoke else (1, 16):
            with self.evidence.guard("breakdown", model=self.name, batch=batch):
                if self.evidence.fits(f"breakdown {self.name}, batch {batch}", 3 if self.smoke else 5):
                    self.breakdown(batch)
        with self.evidence.guard("masked", model=self.name):
            if self.evidence.fits(f"masked {self.name}", 3 if self.smoke else 5):
                self.masked()

    def skipping(self, share: float) -> torch.Tensor:
        """Thresholds that skip a share of the layers, evenly spread."""
        steps = np.floor(np.arange(self.layers + 1) * share + 1e-9)
        return torch.tensor(np.where(np.diff(steps) > 0, 2.0, -1.0), dtype=torch.float32, device="cuda")

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
        dense = CapturedDecoder(self.dense, batch=batch, capacity=CAPACITY)
        routed = CapturedDecoder(self.routed, batch=batch, capacity=CAPACITY)
        found = [Subject("dense", dense)]
        for decoder in (dense, routed):
            decoder.prefill(ids)
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
        for subject in subjects:
            ms = samples[subject.name]
            values: dict[str, Any] = {"ms": _spread(ms), "over_dense": _spread(ms / dense)}
            values["step_ms"] = values["ms"]["median"]
            # What is plotted is the share of layers; of tokens, it is the MLPs that no token of the batch needed.
            share = "skipped" if subject.name.startswith("layers") else "weights_skipped"
            values[share] = round(subject.skipped, 3)
            nbytes = self.step_bytes(batch, subject.skipped)
            values["gb_s"] = round(nbytes / float(np.median(ms)) * 1e-6)
            values["of_copy_bandwidth"] = round(values["gb_s"] / self.copy, 3)
            passed = None
            if subject.name.startswith("layers") and 0 < subject.skipped < 1:
                ideal = dense * nbytes / self.step_bytes(batch, 0)
                line = whole + subject.skipped * (none - whole)
                values["ideal_ms"] = round(float(np.median(ideal)), 4)
                values["efficiency"] = _spread(_efficiency(dense, ms, ideal))
                values["efficiency_line"] = _spread(_efficiency(dense, ms, line))
                if (self.name, batch, subject.name) == ("8B", 1, "layers 50%"):
                    values["bar"] = EFFICIENCY_BAR
                    passed = values["efficiency"]["median"] >= EFFICIENCY_BAR
            if (self.name, batch, subject.name) == ("8B", 1, "layers 0%"):
                values["bar"] = ACTIVE_BAR
                passed = values["over_dense"]["median"] <= ACTIVE_BAR
            self.row(
                "decode",
                # Four layers and a small vocabulary are no 8B: a smoke run's times are held to nothing.
                passed=None if self.smoke else passed,
                batch=batch,
                subject=subject.name,
                **values,
            )

    def prefill(self) -> None:
        """A prompt of 512, captured; and where the host counts active tokens, launch by launch."""
        ids = torch.randint(0, self.vocab, (1, CONTEXT), device="cuda")
        halves = torch.full((self.layers,), 0.5, device="cuda")
        decoders = {
            "dense": CapturedDecoder(self.dense, batch=1, capacity=CAPACITY, prompt=CONTEXT),
            "kernels": CapturedDecoder(self.routed, batch=1, capacity=CAPACITY, prompt=CONTEXT),
            "gathered": CapturedDecoder(self.routed, batch=1, capacity=CAPACITY, gather_prompts=True),
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
                ms=_spread(ms),
                over_dense=_spread(ms / dense),
                mlps_at_matmul_rate_ms=round(mlp_flops / self.tflops * 1e-9, 3),
            )

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
            self.row("decode", batch=1, subject=name, ms=_spread(np.array(times[2:])))


def outside_reference(evidence: Evidence, config: dict[str, Any], smoke: bool) -> None:
    """Dense decode by transformers with its static cache: as it comes, and compiled by PyTorch."""
    from transformers import LlamaConfig as TransformersConfig  # noqa: PLC0415 - heavy, and only here
    from transformers import LlamaForCausalLM, StaticCache  # noqa: PLC0415

    values = {key: value for key, value in config.items() if key not in {"model_type", "architectures"}}
    with torch.device("cuda"):
        model = LlamaForCausalLM(TransformersConfig(**values, dtype=torch.bfloat16))
    cast("nn.Module", model).to(torch.bfloat16).eval()
    ids = torch.randint(0, config["vocab_size"], (1, CONTEXT), device="cuda")
    compiled = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True)
    needed = 12 if smoke else 60  # to compile
    for name, forward, seconds in (
        ("transformers, eager", model.forward, 3),
        ("transformers, compiled", compiled, needed),
    ):
        if not evidence.fits(name, seconds):
            continue
        with evidence.guard("outside reference", subject=name), torch.inference_mode():
            begin = time.monotonic()
            cache = StaticCache(config=model.config, max_cache_len=CAPACITY)
            model(input_ids=ids, past_key_values=cache, logits_to_keep=1)
            token, place = ids[:, :1].clone(), torch.full((1, 1), CONTEXT, device="cuda")

            def step(forward: Any = forward, cache: Any = cache, token: Any = token, place: Any = place) -> None:
                forward(input_ids=token, position_ids=place, past_key_values=cache, logits_to_keep=1)
                place.add_(1)

            for _ in range(3):
                step()
            torch.cuda.synchronize()
            warm = time.monotonic() - begin
            times = np.array([block_us(step, 4) * 1e-3 for _ in range(2 if smoke else 8)])
            evidence.row(
                "outside reference", model="1B", batch=1, subject=name, ms=_spread(times), warm_up_s=round(warm, 1)
            )


def _spread(values: np.ndarray) -> dict[str, float]:
    found = np.percentile(values, (50, 10, 90))
    return dict(zip(("median", "p10", "p90"), (round(float(value), 4) for value in found), strict=True))


def _efficiency(dense: np.ndarray, routed: np.ndarray, ideal: np.ndarray) -> np.ndarray:
    efficiency: np.ndarray = (dense / routed - 1) / (dense / ideal - 1)
    return efficiency


if __name__ == "__main__":
    sys.exit(run_part("pytorch", __doc__, check, measure))
