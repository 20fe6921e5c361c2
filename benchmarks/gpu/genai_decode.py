"""onnxruntime-genai on a GPU: our artefacts in it, and a dense decode step beside its own builder's graph."""

from __future__ import annotations

import cProfile
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch  # noqa: F401 - before onnxruntime, which finds CUDA's libraries among PyTorch's

from benchmarks.common.random_llama import H2048, random_llama_folder
from benchmarks.common.smollm2 import save_dequantised
from benchmarks.gpu.genai_graphs import DENSE, IN_PLACE, PEER, ROUTED
from benchmarks.gpu.lowering_parity import DATA
from dlo_export.checkpoints.device_options import ProviderOption
from dlo_export.exporter.artefact_runner import open_artefact
from dlo_export.exporter.export import ExportRequest, export_model
from dlo_export.exporter.progress import Reporter
from dlo_export.runtimes.generation.generate import Generation
from dlo_export.runtimes.runner import Runner

PROMPT, STEPS, REPEATS = 128, 64, 5
Runtime = Literal["onnxruntime", "onnxruntime-genai"]
RUNTIMES: Final[Mapping[Runtime, tuple[str, ...]]] = {
    "onnxruntime-genai": (PEER, DENSE, ROUTED),
    "onnxruntime": (IN_PLACE, DENSE, ROUTED),
}
"""What each of them runs, in a process of its own: on CUDA a process has one copy of ONNX Runtime."""
GAP: Final[Mapping[ProviderOption, float]] = {"cuda": 2**-7, "cpu": 1e-6}
"""How far below our largest logit, of its size, the other runtime's token may be: two roundings of the type."""


def save_graphs(
    model: Path | None,
    folder: Path,
    provider: ProviderOption,
    *,
    routed_alone: bool = False,
    builder: bool = True,
) -> Iterator[dict[str, Any]]:
    """Exports what is run, and has onnxruntime-genai's builder make its graph of the same weights.

    Args:
        model: Checkpoint folder or GGUF file; None makes a random one.
        folder: To hold a folder of each.
        provider: That they are for; the type is bfloat16 on CUDA, float32 on a CPU.
        routed_alone: Leave out all but the routed reference.
        builder: Whether to run the builder, which takes a quarter of a minute.

    Yields:
        A row of each.
    """
    steps: dict[str, Callable[[], None]] = {
        ROUTED: lambda: _export(DATA / "reference_mlp_routed", folder / ROUTED, provider, lowering="compact")
    }
    if not routed_alone:
        chosen = random_llama_folder("random-h2048", H2048) if model is None else model
        steps[DENSE] = lambda: _export(chosen, folder / DENSE, provider)
        steps[IN_PLACE] = lambda: _export(chosen, folder / IN_PLACE, provider, static_cache=512)
        if builder:
            steps[PEER] = lambda: _build(chosen, folder, provider)
    for name, step in steps.items():
        begin = time.monotonic()
        row: dict[str, Any] = {"what": f"graph for onnxruntime-genai, {name}"}
        try:
            step()
        except Exception as err:  # as in `lowering_parity.rows_of`
            yield {**row, "passed": False, "error": f"{type(err).__name__}: {err}"[-1500:]}
            continue
        yield {**row, "passed": None, "seconds": round(time.monotonic() - begin, 1)}


def rows_of_decode(
    folder: Path,
    runtime: Runtime,
    names: Sequence[str],
    *,
    smoke: bool,
    theirs: Mapping[str, Sequence[int]] | None = None,
    vocabulary: int = 32_000,
) -> Iterator[dict[str, Any]]:
    """Greedy tokens and milliseconds of each, known to the host: a row of each graph that is there.

    Args:
        folder: Of `save_graphs`.
        runtime: That runs them.
        names: Of `RUNTIMES`, which graphs.
        smoke: Few steps.
        theirs: The other runtime's tokens by graph; our runner says how far each is below its own largest logit.
        vocabulary: Of the model, at least.
    """
    for name in names:
        if not (folder / name).exists():
            continue
        # The routed checkpoint has few positions and tokens.
        count, steps, tokens = (12, 8, 128) if name == ROUTED else (PROMPT, 4 if smoke else STEPS, vocabulary)
        prompt = np.random.default_rng(0).integers(3, tokens, count)
        row: dict[str, Any] = {"what": f"decode {runtime}, {name}", "kind": "decode", "runtime": runtime, "graph": name}
        try:
            if runtime == "onnxruntime":
                found, times = ours(folder / name, prompt, steps, (theirs or {}).get(name, ()))
            else:
                found, times = genais(folder / name, prompt, steps)
        except Exception as err:  # as above
            yield {**row, "passed": False, "error": f"{type(err).__name__}: {err}"[:1500]}
            continue
        yield {**row, "passed": None, "prompt": count, "batch": 1, **times, "tokens": found}


def compared(rows: Sequence[Mapping[str, Any]], provider: ProviderOption) -> Iterator[dict[str, Any]]:
    """What rows of both runtimes say together: the same tokens of the same graph, and who is faster.

    Of two logits that are as good as equal, and in 16 bits many are, a runtime may take either. So every token of the
    other runtime is held against our logits behind the tokens in front of it, and not only those up to the first that
    differs.

    Args:
        rows: Of `rows_of_decode`, among others.
        provider: That they ran on.
    """
    decoded = {(row["runtime"], row["graph"]): row for row in rows if "tokens" in row}
    for name in (ROUTED, DENSE):
        other, one = (decoded.get((runtime, name)) for runtime in RUNTIMES)
        if one is not None and other is not None:
            gap, bar = max(one["gaps"]), GAP[provider]
            alike = {"same": _shared(one["tokens"], other["tokens"]), "of": len(one["tokens"])}
            what = f"tokens of both runtimes, {name}"
            yield {"what": what, "passed": gap <= bar, "largest_gap": gap, "bar": bar, "alike_from_the_first": alike}
    for mine, theirs in ((DENSE, DENSE), (IN_PLACE, PEER)):
        one, other = decoded.get(("onnxruntime", mine)), decoded.get(("onnxruntime-genai", theirs))
        if one is not None and other is not None:
            ratio = round(one["step_ms"] / other["step_ms"], 3)
            what = f"decode onnxruntime, {mine}, against onnxruntime-genai, {theirs}"
            yield {"what": what, "passed": None, "kind": "ratio", "ours": mine, "theirs": theirs, "ratio": ratio}


def ours(folder: Path, prompt: np.ndarray, steps: int, theirs: Sequence[int] = ()) -> tuple[list[int], dict[str, Any]]:
    """Greedy tokens behind a prompt in our runner, milliseconds of each, and how far `theirs` are from being those."""
    begin = time.monotonic()
    with open_artefact(folder, scores=False, threads=1) as runner:
        load_s = round(time.monotonic() - begin, 1)
        tokens, times = _measured(lambda: _our_tokens(runner, prompt, steps))
        facts: dict[str, Any] = {
            "load_s": load_s,
            **times,
            "host_us": _host_us(lambda: _our_tokens(runner, prompt, steps)),
        }
        if theirs:
            facts["gaps"] = _gaps(runner, prompt, theirs)
        return tokens, facts


def genais(folder: Path, prompt: np.ndarray, steps: int) -> tuple[list[int], dict[str, Any]]:
    """The same in onnxruntime-genai, as its own loop has it."""
    begin = time.monotonic()
    import onnxruntime_genai as og  # noqa: PLC0415 - loads a library of ONNX Runtime of its own

    model = og.Model(str(folder))
    load_s = round(time.monotonic() - begin, 1)

    def generate() -> tuple[list[int], float]:
        parameters = og.GeneratorParams(model)
        length = len(prompt) + steps + 1
        parameters.set_search_options(do_sample=False, max_length=length, min_length=length)
        generator = og.Generator(model, parameters)
        generator.append_tokens(prompt.astype(np.int32))
        generator.generate_next_token()
        tokens = [int(generator.get_next_tokens()[0])]
        begin = time.perf_counter()
        for _ in range(steps):
            generator.generate_next_token()
            tokens.append(int(generator.get_next_tokens()[0]))
        return tokens, (time.perf_counter() - begin) / steps * 1e3

    tokens, times = _measured(generate)
    return tokens, {"load_s": load_s, **times}


def _host_us(generate: Callable[[], tuple[list[int], float]]) -> dict[str, float]:
    """Where the host is during a token, in microseconds under Python's profiler: the longest of all functions."""
    profiler = cProfile.Profile()
    tokens, _ = profiler.runcall(generate)
    rows = sorted(profiler.getstats(), key=lambda entry: -entry.inlinetime)[:12]
    names = [row.code if isinstance(row.code, str) else row.code.co_qualname for row in rows]
    return {name: round(row.inlinetime / len(tokens) * 1e6, 1) for name, row in zip(names, rows, strict=True)}


def _gaps(runner: Runner, prompt: np.ndarray, tokens: Sequence[int]) -> list[float]:
    """How far each token's logit is below the largest, of that one's size, behind the prompt and those before it."""
    runner.reset(1)
    fed, gaps = prompt[np.newaxis], list[float]()
    for token in tokens:
        past = len(prompt) + len(gaps)
        positions = np.arange(past - fed.shape[1], past)[np.newaxis]
        logits = runner.step(fed, np.ones((1, past), np.int64), positions, last_logits=True).logits[0, -1]
        gaps.append(float((logits.max() - logits[token]) / abs(logits.max())))
        fed = np.array([[token]])
    return gaps


def _our_tokens(runner: Runner, prompt: np.ndarray, steps: int) -> tuple[list[int], float]:
    generation = Generation(runner, [prompt.tolist()], max_new_tokens=steps + 1)
    tokens: list[int] = []
    begin = 0.0
    for (token,) in generation:
        if not tokens:
            begin = time.perf_counter()
        assert token is not None, "no end token ends it"
        tokens.append(token)
    return tokens, (time.perf_counter() - begin) / steps * 1e3


def _measured(generate: Callable[[], tuple[list[int], float]]) -> tuple[list[int], dict[str, float]]:
    """The tokens, and milliseconds of each: median, least and most of some runs behind the first."""
    tokens, _ = generate()
    times = sorted(generate()[1] for _ in range(REPEATS))
    return tokens, {
        "step_ms": round(statistics.median(times), 4),
        "lowest_ms": round(times[0], 4),
        "highest_ms": round(times[-1], 4),
    }


def _export(model: Path, output: Path, provider: ProviderOption, **options: Any) -> None:
    dtype = "bf16" if provider == "cuda" else "fp32"
    export_model(ExportRequest(str(model), output, dtype=dtype, provider=provider, parity=False, **options), Reporter())


def _build(model: Path, folder: Path, provider: ProviderOption) -> None:
    """Has the builder make a graph as it is fastest: attention of ONNX Runtime's own, on CUDA captured."""
    checkpoint = model
    if model.suffix == ".gguf":
        checkpoint = folder / "checkpoint"
        save_dequantised(model, checkpoint)
    elif not (model / "tokenizer.json").exists():
        checkpoint = folder / "checkpoint"
        _with_tokenizer(model, checkpoint)
    precision = ["-p", "bf16", "-e", "cuda"] if provider == "cuda" else ["-p", "fp32", "-e", "cpu"]
    extra = ["--extra_options", "enable_cuda_graph=true"] if provider == "cuda" else []
    places = ["-i", str(checkpoint), "-o", str(folder / PEER), "-c", str(folder / "cache")]
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", *places, *precision, *extra]
    built = subprocess.run(command, check=False, capture_output=True, text=True)
    if built.returncode:
        raise RuntimeError(f"the builder ended with {built.returncode}: {built.stderr[-1200:]}")


def _with_tokenizer(model: Path, folder: Path) -> None:
    """The same checkpoint with a tokenizer that nobody uses: the builder asks for one."""
    from tokenizers import Tokenizer, models  # noqa: PLC0415 - only where graphs are made
    from transformers import PreTrainedTokenizerFast  # noqa: PLC0415 - heavy

    folder.mkdir()
    for file in model.iterdir():
        (folder / file.name).symlink_to(file)
    words: Any = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>"))
    named: Any = PreTrainedTokenizerFast
    named(tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>").save_pretrained(folder)


def _shared(one: list[int], other: list[int]) -> int:
    """How many tokens they begin with alike."""
    return next((i for i, pair in enumerate(zip(one, other, strict=True)) if pair[0] != pair[1]), len(one))
