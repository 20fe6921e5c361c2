"""How long a dense decode step takes: ONNX Runtime's, and that of transformers' `generate`."""

from __future__ import annotations

import contextlib
import gc
import json
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch  # before onnxruntime, which finds CUDA's libraries among PyTorch's

# isort: split
import onnxruntime as ort

from benchmarks.gpu.evidence import Evidence
from benchmarks.gpu.lowering_parity import Job, save_graphs
from dlo_export.checkpoints.dtypes import BY_OPTION
from dlo_export.exporter.sources.source import ExportSource, open_source
from dlo_export.runtimes.onnxruntime.providers import BY_OPTION as PROVIDERS
from dlo_export.runtimes.onnxruntime.providers import Provider
from dlo_export.runtimes.onnxruntime.runner import OnnxRuntimeRunner

PROMPT, STEPS = 128, 64


def time_decode(
    evidence: Evidence, model: Path, *, smoke: bool, provider: Provider = PROVIDERS["cuda"], device: str = "cuda"
) -> None:
    """A dense decode step at batch 1 behind a prompt: ONNX Runtime's and that of transformers' `generate`.

    Args:
        evidence: Where rows go.
        model: Checkpoint folder or GGUF file.
        smoke: Few steps, nothing compiled, no bars.
        provider: Of ONNX Runtime.
        device: Of transformers.
    """
    # What a CPU can do is the same in float32.
    dtype = "bf16" if device == "cuda" else "fp32"
    steps = 4 if smoke else STEPS
    source = open_source(str(model), None)
    with contextlib.closing(source), tempfile.TemporaryDirectory() as temporary:
        with evidence.guard(f"decode onnxruntime, {dtype}"):
            job = Job("dense", str(model), dtype, ("none",))
            file = save_graphs(source, job, Path(temporary))["none"]
            # The CPU's threads have nothing to do but to launch kernels.
            with OnnxRuntimeRunner(file, threads=1, provider=provider) as runner:
                onnxruntime_step(runner, steps)
                ours = decode_row(
                    evidence, f"decode onnxruntime, {dtype}", [onnxruntime_step(runner, steps) for _ in range(5)]
                )
        with evidence.guard("decode nodes"):
            evidence.row("decode nodes", passed=None, **profile(file, provider, Path(temporary)))
        with evidence.guard(f"decode transformers, {dtype}"):
            llama = transformers_llama(source, dtype, device)
            what = f"decode transformers, static cache, {dtype}"
            transformers_step(llama, steps)
            theirs = decode_row(evidence, what, [transformers_step(llama, steps) for _ in range(3)])
            ratio = round(ours / theirs, 3)
            evidence.row(
                "decode onnxruntime against transformers, static cache",
                passed=None if smoke else ratio < 1,
                ratio=ratio,
            )


def decode_row(evidence: Evidence, what: str, times: Sequence[float]) -> float:
    """Writes a row of milliseconds; returns their median."""
    least, median, most = (round(float(value), 4) for value in np.percentile(times, [0, 50, 100]))
    evidence.row(what, median_ms=median, least_ms=least, most_ms=most, prompt=PROMPT, batch=1)
    return median


def onnxruntime_step(runner: OnnxRuntimeRunner, steps: int) -> float:
    """Milliseconds of a greedy step, its token known to the host: the mean of all behind a prompt."""
    ids = _prompt()
    runner.reset(1)
    result = runner.step(ids, np.ones((1, PROMPT), np.int64), np.arange(PROMPT)[np.newaxis], last_logits=True)
    begin = time.perf_counter()
    for past in range(PROMPT, PROMPT + steps):
        token = result.logits[:, -1].argmax(-1, keepdims=True)
        result = runner.step(token, np.ones((1, past + 1), np.int64), np.array([[past]]), last_logits=True)
    return (time.perf_counter() - begin) / steps * 1e3


def profile(file: Path, provider: Provider, folder: Path) -> dict[str, Any]:
    """Which nodes a decode step runs where, by ONNX Runtime's own profile; copies between providers are among them.

    Args:
        file: The graph.
        provider: What runs it.
        folder: For the profile.

    Returns:
        Nodes by provider, those of copies, and microseconds by operator: on a GPU, those of launching it.
    """
    options = ort.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "profile")
    steps = 4
    with OnnxRuntimeRunner(file, threads=1, provider=provider, options=options) as runner:
        onnxruntime_step(runner, steps)
    del runner
    gc.collect()  # with the session, the profile is written
    (written,) = folder.glob("profile*.json")
    events = [event for event in json.loads(written.read_text()) if event["name"].endswith("_kernel_time")]
    nodes = events[len(events) // (steps + 1) :]  # without the prompt's
    times: Counter[str] = Counter()
    for event in nodes:
        times[event["args"]["op_name"]] += event["dur"]
    return {
        "nodes_per_step": {
            name: count / steps for name, count in Counter(event["args"]["provider"] for event in nodes).items()
        },
        "copies_per_step": sum(event["args"]["op_name"].startswith("Memcpy") for event in nodes) / steps,
        "us_per_step": {name: round(time_us / steps, 1) for name, time_us in times.most_common(8)},
    }


def transformers_llama(source: ExportSource, dtype: str, device: str) -> Any:
    """The Llama of transformers with the source's weights."""
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415 - heavy

    from dlo_export.modeling.from_tensors import released_parameter  # noqa: PLC0415

    torch_dtype = getattr(torch, BY_OPTION[dtype].name)
    values = {key: value for key, value in source.config_json().items() if key not in ("dtype", "torch_dtype")}
    with torch.device("meta"):
        llama: Any = LlamaForCausalLM(LlamaConfig(**values, dtype=torch_dtype))
    wanted = {name for name, _ in llama.named_parameters()}
    tensors = {name: tensor for name, tensor in source.tensors().items() if name in wanted}
    weights = {name: released_parameter(tensor, torch_dtype).to(device) for name, tensor in tensors.items()}
    llama.load_state_dict(weights, strict=False, assign=True)
    llama.tie_weights()
    llama.model.rotary_emb = type(llama.model.rotary_emb)(config=llama.config).to(device)
    return llama.eval()


def transformers_step(llama: Any, steps: int) -> float:
    """Milliseconds of a greedy step of `generate`, by what more steps take longer.

    Args:
        llama: The model.
        steps: How many more.
    """
    ids = torch.from_numpy(_prompt()).to(llama.device)
    seconds = []
    for new in (1, 1 + steps):
        begin = time.perf_counter()
        tokens = llama.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=new,
            max_new_tokens=new,
            # The same cache for both, so that both run what was compiled once.
            cache_implementation="static",
            disable_compile=True,
            pad_token_id=0,
        )
        tokens.cpu()
        seconds.append(time.perf_counter() - begin)
    return (seconds[1] - seconds[0]) / steps * 1e3


def _prompt() -> np.ndarray:
    """Tokens that every model has, int64 [1, PROMPT]."""
    return np.random.default_rng(0).integers(0, 64, (1, PROMPT))
