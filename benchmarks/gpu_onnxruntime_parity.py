"""ONNX Runtime on CUDA: parity of every lowering in every float type, who runs which node, and a dense decode step.

    python -m benchmarks.gpu_onnxruntime_parity --out DIR [--model SmolLM2.gguf] [--ort-plugin-library libdlo_ort.so]

Models are the two reference checkpoints of tests/data and, with --model, SmolLM2-135M-Instruct's GGUF file dense and
under tests/data/smollm2_routers. A process per model and float type (and one more for the plugin lowering) compares all
lowerings with the PyTorch model in float32, that of the reference checkpoints on the CPU, several at once: nothing is
timed meanwhile, and what ends one process costs its own rows only. Then the dense model's decode step in bfloat16,
IOBinding and a cache that stays on the GPU, is timed against transformers' static cache, as it is and compiled.

Without a GPU the same comparison runs once on the CPU provider. Exit codes as benchmarks/evidence.py has them.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import gc
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch  # before onnxruntime, which finds CUDA's libraries among PyTorch's

# isort: split
import onnx_ir as ir
import onnxruntime as ort

from benchmarks.evidence import Evidence, run_part
from dlo_export.checkpoints.device_options import ProviderOption
from dlo_export.checkpoints.dtypes import BY_OPTION
from dlo_export.checkpoints.errors import InputError
from dlo_export.exporter.artefact_runner import open_artefact
from dlo_export.exporter.calibrate import CalibrationRequest, calibrate
from dlo_export.exporter.evaluate import EvaluationRequest, evaluate_model
from dlo_export.exporter.export import ExportRequest, export_model
from dlo_export.exporter.graph_dtype import graph_dtype
from dlo_export.exporter.parity_check import check_parity, graph_candidate
from dlo_export.exporter.pipeline import build_model
from dlo_export.exporter.progress import Reporter
from dlo_export.exporter.sources.foreign_graph import load_graph
from dlo_export.exporter.sources.source import ExportSource, open_source
from dlo_export.exporter.tensorrt.engine_request import plugin_operators
from dlo_export.exporter.weight_file import save_weights
from dlo_export.graph_passes.lowerings.registry import find_lowering
from dlo_export.modeling.calibration.router_calibration import CalibrationSettings
from dlo_export.modeling.calibration.text import read_documents
from dlo_export.modeling.training.router_distillation import DistillationSettings
from dlo_export.plugins.library_places import ORT_LIBRARY_VARIABLE
from dlo_export.runtimes.artefact.description import WEIGHTS_NAME, load_description
from dlo_export.runtimes.generation.generate import Generation
from dlo_export.runtimes.onnxruntime.providers import BY_OPTION as PROVIDERS
from dlo_export.runtimes.onnxruntime.providers import CPU, Provider
from dlo_export.runtimes.onnxruntime.runner import OnnxRuntimeRunner
from dlo_export.runtimes.onnxruntime.session import DecoderSession
from dlo_export.runtimes.parity.cases import parity_cases
from dlo_export.runtimes.parity.compare import compare
from dlo_export.runtimes.torch.reference import open_reference

DATA: Final = Path(__file__).parents[1] / "tests" / "data"
ADAPTER: Final = DATA / "smollm2_routers"
NATIVE: Final = ("masked", "compact", "if")
DTYPES: Final = ("fp32", "fp16", "bf16")
PROMPT, STEPS = 128, 64
# By their names: what computes shapes for all layers has no number, and belongs on the host.
_OF_A_LAYER: Final = re.compile(r"\.(layers|routers)\.\d+\.")


@dataclasses.dataclass(frozen=True)
class Process:
    """This program in a process of its own, which says its rows on stdout, a line each.

    Attributes:
        what: For a row, where it fails.
        arguments: Of its command line.
    """

    what: str
    arguments: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Job:
    """What one process compares.

    Attributes:
        subject: Name of the model, for rows.
        model: Checkpoint folder or GGUF file.
        dtype: Of the graphs.
        lowerings: To compare; "none" where the model has no routers.
        adapter: On the model.
        library: libdlo_ort.so, for the plugin lowering.
        provider: What runs the graphs.
        device: Of the reference.
    """

    subject: str
    model: str
    dtype: str
    lowerings: tuple[str, ...]
    adapter: str | None = None
    library: str | None = None
    provider: ProviderOption = "cuda"
    device: str = "cuda"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--ort-plugin-library", type=Path, default=os.environ.get(ORT_LIBRARY_VARIABLE) or None)
    parser.add_argument("--job", type=json.loads)
    parser.add_argument("--commands", action="store_true")
    own, others = parser.parse_known_args(arguments)
    if own.job is not None or own.commands:
        rows = rows_of_commands(own.model, "cuda") if own.commands else rows_of(Job(**own.job))
        for row in rows:
            print(json.dumps(row), flush=True)
        return 0
    return run_part(
        "onnxruntime_parity",
        __doc__,
        check,
        functools.partial(measure, model=own.model, library=own.ort_plugin_library),
        others,
    )


def check() -> None:
    """The comparison that a GPU gets, on the CPU provider.

    Raises:
        InputError: It does not hold.
    """
    job = Job("mlp", str(DATA / "reference_mlp_routed"), "fp32", NATIVE, provider="cpu", device="cpu")
    # Outputs stay where the provider computes, as they do on a GPU.
    rows = list(rows_of(job, dataclasses.replace(CPU, reads_back=True)))
    if failed := [row for row in rows if row["passed"] is False]:
        raise InputError(f"on the CPU: {failed}", hint="the graphs are wrong, or this ONNX Runtime is")


def measure(evidence: Evidence, smoke: bool, *, model: Path | None, library: Path | None) -> None:
    """All rows that need a GPU."""
    library_given = None if library is None else str(Path(library).absolute())
    # What follows needs the rest, where it follows.
    seconds = 30.0 if smoke else evidence.left * (1 if model is None else 0.65)
    processes = [process_of(job) for job in jobs(model, library_given, smoke=smoke)]
    commands = ["--commands", *([] if model is None else ["--model", str(model)])]
    run_processes(evidence, [*processes, Process("commands", tuple(commands))], seconds=seconds)
    if model is None:
        evidence.row("decode", left_out="no --model is given")
        return
    time_decode(evidence, model, smoke=smoke)


def jobs(model: Path | None, library: str | None, *, smoke: bool) -> Iterator[Job]:
    """What is compared, each in a process of its own."""
    routed: list[tuple[str, str, str | None]] = [
        ("reference_mlp_routed", str(DATA / "reference_mlp_routed"), None),
        ("reference_layer_routed", str(DATA / "reference_layer_routed"), None),
    ]
    if model is not None:
        routed.append(("smollm2", str(model), str(ADAPTER)))
    for subject, path, adapter in routed:
        # Everything once, and no more: the largest model in the type it is used in.
        for dtype in ("bf16",) if smoke and adapter is not None else DTYPES:
            # Where the reference is small, it is the CPU's: two GPU programs are then not compared with each other.
            job = Job(subject, path, dtype, NATIVE, adapter, device="cpu" if adapter is None else "cuda")
            yield job
            if library is not None and subject != "reference_layer_routed":  # the plugin takes MLP routing
                yield dataclasses.replace(job, lowerings=("plugin",), library=library)
    if model is not None:
        yield Job("smollm2 dense", str(model), "bf16", ("none",))


def process_of(job: Job) -> Process:
    """The process that does a job."""
    what = f"parity {job.subject}, {job.dtype}, {'+'.join(job.lowerings)}"
    return Process(what, ("--job", json.dumps(dataclasses.asdict(job))))


def run_processes(evidence: Evidence, processes: Sequence[Process], seconds: float) -> None:
    """Runs processes side by side, and writes their rows as they end."""
    with contextlib.ExitStack() as stack:
        running = []
        for process in processes:
            # Rows go to a file, so that none waits for somebody to read; what else is said shows where it fails.
            rows, said = (stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(2))
            command = [sys.executable, "-m", "benchmarks.gpu_onnxruntime_parity", *process.arguments]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            running.append((process, subprocess.Popen(command, stdout=rows, stderr=said, env=environment), rows, said))
        end = time.monotonic() + min(seconds, max(5.0, evidence.left - 5.0))
        for process, started, rows, said in running:
            try:
                code = started.wait(timeout=max(0.1, end - time.monotonic()))
                problem = f"ended with {code}" if code else None
            except subprocess.TimeoutExpired:
                started.kill()
                started.wait()
                problem = "was not done in time"
            rows.seek(0)
            for line in rows:
                with contextlib.suppress(json.JSONDecodeError):  # the last line of a process that was ended
                    evidence.row(**json.loads(line))
            if problem is not None:
                said.seek(0)
                evidence.row(process.what, passed=False, error=f"{problem}: {said.read()[-1500:]}")


def rows_of(job: Job, provider: Provider | None = None) -> Iterator[dict[str, Any]]:
    """Compares the lowerings of one model in one type: rows of parity, and of who was given which node.

    Args:
        job: What to compare.
        provider: In place of the job's.
    """
    provider = provider or PROVIDERS[job.provider]
    library = None if job.library is None else Path(job.library)
    source = open_source(job.model, None if job.adapter is None else Path(job.adapter))
    with contextlib.closing(source), tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        files = save_graphs(source, job, folder)
        for lowering, file in files.items():
            yield placement_row(job, lowering, file, provider, library)
        config, tensors = source.config_json(), source.tensors()
        routed = source.routing is not None and job.lowerings != ("none",)
        rng = np.random.default_rng(0)
        prompts = [rng.integers(0, config["vocab_size"], tokens).tolist() for tokens in (24, 15)]
        other = "float64" if job.dtype == "fp32" else BY_OPTION[job.dtype].name
        another = functools.partial(open_reference, config, tensors, dtype=other, device=job.device)
        with open_reference(config, tensors, device=job.device) as reference:
            for lowering, file in files.items():
                begin = time.monotonic()
                candidate = graph_candidate(
                    lowering,
                    load_graph(file),
                    folder,
                    file=file,
                    routed=routed,
                    plugin_library=library,
                    provider=provider,
                )
                row: dict[str, Any] = {"what": f"parity {job.subject}, {job.dtype}, {lowering}"}
                try:
                    report = compare(
                        reference,
                        [candidate],
                        parity_cases(config["vocab_size"], routed=routed),
                        dtype=job.dtype,
                        greedy_prompts=prompts,
                        greedy_tokens=32,
                        open_other=another,
                    )
                except Exception as err:  # whatever a new card brings is a finding, and costs the other rows nothing
                    yield {**row, "passed": False, "error": f"{type(err).__name__}: {err}"[:1500]}
                    continue
                judged = [(result.case, result.judge(report.tolerance)) for result in report.cases if report.tolerance]
                judged += [("greedy", result.judge()) for result in report.greedy]
                reasons = [f"{case}: {judgement.reason}" for case, judgement in judged if judgement.reason]
                yield {
                    **row,
                    "passed": None if report.verdict == "AMBIGUOUS" else report.verdict == "PASS",
                    "verdict": report.verdict,
                    "provider": provider.name,
                    "mean_of_peak": max(result.logits.mean for result in report.cases),
                    "largest_of_peak": max(result.logits.largest for result in report.cases),
                    "flips": sum(len(result.flips) for result in report.cases),
                    "decisions": sum(result.decisions for result in report.cases),
                    "greedy": [f"{result.identical} of {result.total}" for result in report.greedy],
                    "reasons": reasons[:9],
                    "seconds": round(time.monotonic() - begin, 1),
                }


def save_graphs(source: ExportSource, job: Job, folder: Path) -> dict[str, Path]:
    """Writes a graph for each lowering; they share one file of weights."""
    files: dict[str, Path] = {}
    for lowering in job.lowerings:
        model = build_model(source, lowering, graph_dtype(job.dtype))
        save_weights(model, folder / WEIGHTS_NAME, write=not files)
        files[lowering] = folder / f"{lowering}.onnx"
        ir.save(model, files[lowering])
    return files


def rows_of_commands(model: Path | None, device: str) -> Iterator[dict[str, Any]]:
    """What the commands do on a GPU, small: export with its parity, generation, calibration, evaluation.

    Args:
        model: Checkpoint or GGUF file with a tokenizer; None leaves out what needs one.
        device: "cuda", or "cpu" to see that it runs.
    """
    provider: ProviderOption = "cpu" if device == "cpu" else "cuda"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        steps: list[tuple[str, Callable[[], dict[str, Any]]]] = [
            (f"export --provider {provider}", lambda: _export_row(folder / "artefact", provider)),
            (f"run --provider {provider}", lambda: _run_row(folder / "artefact")),
            (f"parity --device {device}", lambda: _parity_row(folder / "artefact", device)),
        ]
        if model is not None:
            steps += [
                (f"calibrate --device {device}", lambda: _calibration_row(str(model), folder / "fitted", device, 0)),
                (f"evaluate --device {device}", lambda: _evaluation_row(str(model), folder, device)),
                (
                    f"calibrate --objective distill --device {device}",
                    lambda: _calibration_row(str(model), folder / "distilled", device, 2),
                ),
            ]
        for what, step in steps:
            begin = time.monotonic()
            try:
                yield {"what": what, **step(), "seconds": round(time.monotonic() - begin, 1)}
            except Exception as err:  # as in `rows_of`
                yield {"what": what, "passed": False, "error": f"{type(err).__name__}: {err}"[:1500]}


def _export_row(output: Path, provider: ProviderOption) -> dict[str, Any]:
    request = ExportRequest(str(DATA / "reference_mlp_routed"), output, provider=provider, lowering="compact")
    description = export_model(request, Reporter()).description
    parity = description.parity
    values = {"verdict": parity.verdict, "reason": parity.reason, "dtype": description.dtype}
    return {"passed": parity.verdict in ("PASS", "AMBIGUOUS"), **values}


def _parity_row(artefact: Path, device: str) -> dict[str, Any]:
    description = load_description(artefact)
    with contextlib.closing(open_source(str(DATA / "reference_mlp_routed"), None)) as source:
        report = check_parity(source, artefact, description, provider=PROVIDERS[description.provider], device=device)
    return {"passed": report.verdict in ("PASS", "AMBIGUOUS"), "verdict": report.verdict, "reason": report.reason}


def _run_row(artefact: Path) -> dict[str, Any]:
    with open_artefact(artefact, threads=1) as runner:
        generation = Generation(runner, [[3, 1, 4, 1, 5]], max_new_tokens=8)
        tokens = [step[0] for step in generation]
    return {"passed": len(tokens) == 8, "active_rates": {str(k): v for k, v in generation.stats.active_rate.items()}}


def _calibration_row(model: str, output: Path, device: str, steps: int) -> dict[str, Any]:
    request = CalibrationRequest(
        model=model,
        output=output,
        adapter=None,
        as_adapter=True,
        settings=CalibrationSettings(target_active=0.9),
        text=None,
        tokens=8192,
        evaluation_tokens=2048,
        seed=0,
        force=False,
        distillation=DistillationSettings(steps=steps) if steps else None,
        device=device,
    )
    result = calibrate(request, Reporter())
    rate, target = result.active_rate(injected=False), request.settings.target_active
    return {
        "passed": rate is not None and abs(rate - target) < 0.1,
        "active_rate": rate,
        "perplexity_dense": result.dense.perplexity,
        "perplexity_routed": result.routed.perplexity,
    }


def _evaluation_row(model: str, folder: Path, device: str) -> dict[str, Any]:
    text = folder / "text.txt"
    text.write_text("\n\n".join(document.text for document in read_documents()[:4]), encoding="utf-8")
    found = {}
    for place in dict.fromkeys(("cpu", device)):
        request = EvaluationRequest(
            model=model, texts=(text,), tasks=(), adapter=ADAPTER, device=place, sequence=128, limit=2
        )
        found[place] = evaluate_model(request, Reporter()).result.perplexities[0].perplexity.value
    return {"passed": abs(found[device] / found["cpu"] - 1) < 1e-3, "perplexity": found}


def placement_row(job: Job, lowering: str, file: Path, provider: Provider, library: Path | None) -> dict[str, Any]:
    """Which nodes ONNX Runtime gave to the CPU; none of a layer may be among them."""
    row: dict[str, Any] = {"what": f"placement {job.subject}, {job.dtype}, {lowering}"}
    needs = library if plugin_operators(load_graph(file)) else None
    try:
        session = DecoderSession(
            file, lowering, "growing", {"provider": provider, "placement": True, "plugin_library": needs}
        )
        placed = session.placement()
    except Exception as err:  # as above
        return {**row, "passed": False, "error": f"{type(err).__name__}: {err}"[:1500]}
    elsewhere = [node for name, nodes in placed.items() if name != provider.name for node in nodes]
    of_layers = [f"{name} ({operator})" for name, operator in elsewhere if _OF_A_LAYER.search(name)]
    return {
        **row,
        "passed": not of_layers,
        "given": {name: len(nodes) for name, nodes in placed.items()},
        "elsewhere": dict(Counter(operator for _, operator in elsewhere)),
        "of_layers": of_layers[:8],
        "capturable": find_lowering(lowering, "onnxruntime-cuda").capturable,
    }


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
    times: dict[str, float] = {}
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
            for kind, compiles in (("static cache", False), ("static cache, compiled", True)):
                what = f"decode transformers, {kind}, {dtype}"
                if compiles and (smoke or not evidence.fits(what, 40)):
                    continue
                transformers_step(llama, steps, compiles=compiles)
                times[kind] = decode_row(
                    evidence, what, [transformers_step(llama, steps, compiles=compiles) for _ in range(5)]
                )
    for kind, theirs in times.items():
        ratio = round(ours / theirs, 3)
        evidence.row(
            f"decode onnxruntime against transformers, {kind}", passed=None if smoke else ratio < 1, ratio=ratio
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


def transformers_step(llama: Any, steps: int, *, compiles: bool) -> float:
    """Milliseconds of a greedy step of `generate`, by what more steps take longer.

    Args:
        llama: The model.
        steps: How many more.
        compiles: Whether `generate` may compile the step and capture it, as it does for a static cache on a GPU.
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
            disable_compile=not compiles,
            pad_token_id=0,
        )
        tokens.cpu()
        seconds.append(time.perf_counter() - begin)
    return (seconds[1] - seconds[0]) / steps * 1e3


def _prompt() -> np.ndarray:
    """Tokens that every model has, int64 [1, PROMPT]."""
    return np.random.default_rng(0).integers(0, 64, (1, PROMPT))


if __name__ == "__main__":
    sys.exit(main())
