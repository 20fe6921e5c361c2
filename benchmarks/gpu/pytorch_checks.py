"""Whether captured decode in PyTorch computes what it should: each kernel, and the decoder against the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, cast

import torch
from torch import nn

from benchmarks.gpu.evidence import Evidence
from benchmarks.gpu.pytorch_times import CAPACITY
from benchmarks.gpu.random_torch_llama import TINY, random_model
from dlo_export.modeling.llama_dlo import LlamaDloForCausalLM
from dlo_export.modeling.skip_kernels import KernelMlp
from dlo_export.runtimes.torch.captured.decoder import CapturedDecoder
from dlo_export.runtimes.torch.captured.kernel_ops import KernelOps
from dlo_export.runtimes.torch.captured.step_ops import Routing, StepOps, TorchOps
from dlo_export.runtimes.torch.captured.step_weights import StepWeights

LOGITS_BAR = {"float32": 2e-5, "bfloat16": 2**-5}
"""Largest difference, of the largest logit; bfloat16 against float32 on the same weights."""
FLIPS_BAR = 0.02
"""Share of decisions that bfloat16 may take otherwise: those beside their thresholds."""
FORMS: Final = ("kernels", "masked, kernels between products", "masked, PyTorch alone")


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
                    bar = LOGITS_BAR[kind]
                    evidence.row(
                        "captured decoder against the model",
                        passed=judge(found, kind),
                        dtype=kind,
                        form=name,
                        batch=batch,
                        bar=bar,
                        **found,
                    )


def judge(found: dict[str, Any], kind: str) -> bool | None:
    """Whether a decoder is the model.

    In 16 bits a few scores may fall on the other side of their thresholds, and all logits behind them differ: that
    says nothing of the logits, None. Many do not.

    Args:
        found: As `compare` says it.
        kind: The decoder's type.
    """
    if found["flipped"] and kind != "float32":
        return None if found["flipped"] <= FLIPS_BAR * found["decisions"] else False
    return bool(found["error"] <= LOGITS_BAR[kind]) and not found["flipped"]


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


def largest_error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference, of the largest of what is wanted; 0 where all of both is 0."""
    largest = wanted.float().abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    return float((got - wanted).float().abs().max() / largest)
