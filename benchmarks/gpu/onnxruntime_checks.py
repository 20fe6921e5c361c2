"""Whether the dlo operators and a captured decoder compute what they should in ONNX Runtime."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch

from benchmarks.common.threshold_inputs import ACTIVE, SKIPPED, threshold_name, thresholds_as_inputs
from benchmarks.gpu.captured_decoder import OPTIONS, CapturedDecoder
from benchmarks.gpu.decoder_edits import NORMS
from benchmarks.gpu.device_session import DeviceSession, weights_as_inputs
from benchmarks.gpu.evidence import Evidence
from benchmarks.gpu.random_decoder import RandomDecoder
from dlo_export.checkpoints.dtypes import BY_NAME, BY_OPTION
from dlo_export.checkpoints.interface import (
    ATTENTION_MASK,
    CACHE_PARTS,
    INPUT_IDS,
    KV_LENGTHS,
    LOGITS,
    POSITION_IDS,
    past_name,
    present_name,
)
from dlo_export.exporter.pipeline import exposed
from dlo_export.exporter.target_graphs import build_captured_model, build_model
from dlo_export.exporter.weight_file import save_weights
from dlo_export.graph_passes.spec.ops import DOMAIN, ORT_OPS, PLUGIN_OPS, VERSION, Operand
from dlo_export.plugins.router_scores.reference import router_scores
from dlo_export.plugins.skip_down.reference import skip_down
from dlo_export.plugins.skip_gate_up.reference import skip_gate_up
from dlo_export.runtimes.onnxruntime.in_place_runner import InPlaceRunner
from dlo_export.runtimes.onnxruntime.providers import CPU, CUDA
from dlo_export.runtimes.onnxruntime.runner import OnnxRuntimeRunner
from dlo_export.runtimes.parity.cases import step_feeds

# Of a row's largest output: the operators, whose sums are float32; a decoder's logits, which every layer rounds.
OPERATOR_ERROR = {"float32": 1e-5, "float16": 2**-10, "bfloat16": 2**-7}
ROUTER_ERROR = 2e-6  # of sums of thousands of products, in float32, through a sigmoid
LOGITS_ERROR = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 5e-2}
REFERENCES: dict[str, Callable[..., np.ndarray]] = {"SkipGateUp": skip_gate_up, "SkipDown": skip_down}


def operator_model(name: str, dtype: str) -> ir.Model:
    """A graph of one dlo operator, its operands the graph's inputs."""
    op = ORT_OPS[name]

    def declared(operands: tuple[Operand, ...]) -> str:
        words = []
        for operand in operands:
            kind = BY_NAME[dtype if operand.dtype == "T" else operand.dtype].onnx
            words.append(f"{kind}[{', '.join(operand.dims)}] {operand.name}")
        return ", ".join(words)

    attributes = ", ".join(f'{key}: string = "{value}"' for key, value in op.attributes.items())
    operands = ", ".join(operand.name for operand in op.inputs)
    return ir.from_onnx_text(
        f'<ir_version: 11, opset_import: ["" : 23, "{DOMAIN}" : {VERSION}]>\n'
        f"graph ({declared(op.inputs)}) => ({declared(op.outputs)}) "
        f"{{{op.outputs[0].name} = {DOMAIN}.{name} <{attributes}> ({operands})}}"
    )


def check_operators(evidence: Evidence, device: str, library: Path, *, small: bool, capture: bool) -> None:
    """Both operators against NumPy: every type, decode and prefill tiles, decisions that change between replays."""
    tokens = [(1, 1), (2, 5), (1, 70)] if small else [(1, 1), (3, 1), (2, 5), (16, 1), (1, 37), (2, 120)]
    widths = [(72, 200)] if small else [(72, 200), (264, 520), (1024, 2048)]
    dtypes = [torch.float32] if device == "cpu" else list(OPTIONS)
    for name in PLUGIN_OPS:
        for dtype in dtypes:
            word = str(dtype).removeprefix("torch.")
            with evidence.guard(f"operator {name}", dtype=word):
                session = DeviceSession(operator_model(name, word), device, library, capture=capture)
                worst, wrong, runs = 0.0, 0, 0
                for shape in tokens:
                    for width in widths:
                        for error, damaged in _operator_errors(session, name, shape, width, dtype, device):
                            worst, wrong, runs = max(worst, error), wrong + damaged, runs + 1
                evidence.row(
                    f"operator {name}",
                    passed=worst <= OPERATOR_ERROR[word] and not wrong,
                    dtype=word,
                    captured=capture and device == "cuda",
                    largest_error=worst,
                    bar=OPERATOR_ERROR[word],
                    skipped_rows_changed=wrong,
                    runs=runs,
                    elsewhere=session.operators_elsewhere(),
                )


def check_router(evidence: Evidence, device: str, library: Path, *, small: bool, capture: bool) -> None:
    """The router's operator against NumPy; its scores lie between 0 and 1, so errors are absolute."""
    for dtype in [torch.float32] if device == "cpu" else list(OPTIONS):
        word = str(dtype).removeprefix("torch.")
        with evidence.guard("operator RouterScores", dtype=word):
            session = DeviceSession(operator_model("RouterScores", word), device, library, capture=capture)
            worst, generator = 0.0, torch.Generator(device).manual_seed(7)
            for tokens, hidden in [((1, 1), 72), ((2, 5), 1032)] + (
                [] if small else [((16, 1), 4096), ((1, 130), 2048)]
            ):
                stream = torch.empty((*tokens, hidden), dtype=dtype, device=device)
                weight = torch.empty((hidden, 1), device=device).normal_(generator=generator).mul_(2 * hidden**-0.5)
                scores = torch.empty(tokens, device=device)
                bound = session.bind({"hidden_states": stream, "router_weight": weight}, {"scores": scores})
                for _ in range(3):
                    with bound.on_stream():
                        stream.normal_(generator=generator)
                        scores.fill_(torch.nan)
                    bound.run()
                    bound.finish()
                    expected = router_scores(stream.float().cpu().numpy(), weight.cpu().numpy())
                    error = np.abs(scores.cpu().numpy() - expected).max()
                    worst = max(worst, float(error) if np.isfinite(error) else float("inf"))
            evidence.row(
                "operator RouterScores", passed=worst <= ROUTER_ERROR, dtype=word, largest_error=worst, bar=ROUTER_ERROR
            )


def _operator_errors(
    session: DeviceSession, name: str, tokens: tuple[int, int], width: tuple[int, int], dtype: torch.dtype, device: str
) -> Iterator[tuple[float, int]]:
    """Of one binding, run with several decisions: the largest error, and how many skipped rows are not as promised."""
    generator = torch.Generator(device).manual_seed(sum(tokens) * 7 + width[0])

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device).normal_(generator=generator).mul_(scale)

    hidden, intermediate = width
    down = name == "SkipDown"
    scale = torch.zeros(tokens, device=device)
    if down:
        inputs = {"gated": normal(*tokens, intermediate), "scale": scale}
        inputs |= {"down_weight": normal(intermediate, hidden, scale=intermediate**-0.5)}
        inputs |= {"residual": normal(*tokens, hidden)}
    else:
        inputs = {"hidden_states": normal(*tokens, hidden), "scale": scale}
        inputs |= {key: normal(hidden, intermediate, scale=hidden**-0.5) for key in ("gate_weight", "up_weight")}
    output = torch.empty((*tokens, hidden if down else intermediate), dtype=dtype, device=device)
    bound = session.bind(inputs, {PLUGIN_OPS[name].outputs[0].name: output})
    arrays = {key: value.float().cpu().numpy() for key, value in inputs.items()}
    for share in (1.0, 0.5, 0.0, 0.5, 1.0):
        with bound.on_stream():
            active = torch.rand(tokens, generator=generator, device=device) < share
            scale.copy_(torch.where(active, torch.rand(tokens, generator=generator, device=device) + 0.5, 0.0))
            output.fill_(torch.nan)
        bound.run()
        bound.finish()
        arrays["scale"] = scale.cpu().numpy()
        chosen = active.cpu().numpy()
        got = output.float().cpu().numpy()
        expected = REFERENCES[name](**arrays)
        wrong = int((got[~chosen] != arrays["residual"][~chosen]).any(-1).sum()) if down else 0
        yield _row_error(got[chosen], expected[chosen]), wrong


def _row_error(got: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference as a share of the row's largest value; infinite where something is not finite."""
    if not got.size:
        return 0.0
    error = (np.abs(got - expected).max(-1) / np.abs(expected).max(-1)).max()
    return float(error) if np.isfinite(error) else float("inf")


def check_decoder(
    evidence: Evidence,
    device: str,
    library: Path,
    *,
    routed: bool,
    dtype: torch.dtype,
    capture: bool,
    unfilled: float = 0.0,
    norms: str = "as exported",
) -> None:
    """A small decoder, prompt and steps, against the masked form of the same weights in float32 on the CPU provider.

    The reference has no cache of fixed size, none of the dlo operators and none of ONNX Runtime's attention of its own:
    one step of all tokens. Decisions are drawn anew for every token and layer, so a replayed graph has to follow them.
    `unfilled` is what slots hold that nobody has filled: any number; ONNX Runtime's CUDA kernels multiply it by 0.
    `norms` is one of `decoder_edits.NORMS`.
    """
    what = f"decoder, {'routed' if routed else 'dense'}"
    source, slots, prompts, steps = RandomDecoder("small", routed), 64, (5, 9), 6
    config = source.config
    rng = np.random.default_rng(1)
    total = max(prompts) + steps
    tokens = rng.integers(0, config.vocab_size, (len(prompts), total))
    active = rng.random((config.num_layers, len(prompts), total)) < 0.5
    limits = torch.from_numpy(np.where(active, ACTIVE, SKIPPED).astype(np.float32)).to(device)
    ids = torch.from_numpy(tokens).to(device)

    decoder = CapturedDecoder.open(source, dtype, device, library, max_cache=slots, capture=capture, edit=NORMS[norms])
    cache = decoder.cache(len(prompts), slots)
    for value in cache.values():
        value.fill_(unfilled)
    got: list[list[np.ndarray]] = [[] for _ in prompts]
    # Prompts go in one by one, as the operator wants them, each into its own rows of the cache.
    for row, prompt in enumerate(prompts):
        step = decoder.step(1, prompt, {name: value[row : row + 1] for name, value in cache.items()})
        with step.on_stream():
            step.tensors[INPUT_IDS].copy_(ids[row : row + 1, :prompt])
            for layer in range(config.num_layers if routed else 0):
                step.tensors[threshold_name(layer)].copy_(limits[layer, row : row + 1, :prompt])
        step.run()
        step.finish()
        got[row] += list(np.array(step.tensors[LOGITS][0].float().cpu()))
    # Then they go on together, each at its own length.
    step = decoder.step(len(prompts), 1, cache)
    lengths = torch.tensor(prompts, device=device)
    rows = torch.arange(len(prompts), device=device)
    for _ in range(steps):
        with step.on_stream():
            step.tensors[INPUT_IDS].copy_(ids[rows, lengths][:, None])
            for layer in range(config.num_layers if routed else 0):
                step.tensors[threshold_name(layer)].copy_(limits[layer, rows, lengths][:, None])
            lengths = lengths + 1
            step.tensors[KV_LENGTHS].copy_(lengths)
            step.tensors[LOGITS].fill_(torch.nan)
        step.run()
        step.finish()
        # a copy: on a CPU the next step writes into the same memory
        for row, logits in enumerate(np.array(step.tensors[LOGITS][:, 0].float().cpu())):
            got[row].append(logits)

    expected = _reference_logits(source, decoder.weights, tokens, np.where(active, ACTIVE, SKIPPED))
    errors = [_row_error(np.array(each), reference[: len(each)]) for each, reference in zip(got, expected, strict=True)]
    option = OPTIONS[dtype]
    evidence.row(
        what,
        passed=max(errors) <= LOGITS_ERROR[option],
        dtype=option,
        captured=capture and device == "cuda",
        unfilled=str(unfilled),
        norms=norms,
        largest_error=max(errors),
        bar=LOGITS_ERROR[option],
        elsewhere=decoder.session.operators_elsewhere(),
    )


def check_runner(evidence: Evidence, device: str, library: Path) -> None:
    """The project's own runner from files: prompts of two lengths and six steps, against a growing cache on the CPU.

    On a GPU in memory that held NaN, which its cache must not.
    """
    source, rng = RandomDecoder("small", routed=True, rescale=True), np.random.default_rng(3)
    option = "fp32" if device == "cpu" else "bf16"
    feeds = step_feeds([rng.integers(0, source.config.vocab_size, length) for length in (14, 11)], 1, 1, 1, 1, 1, 1)
    layers, worst = range(source.config.num_layers), 0.0
    dtype = ir.DataType.from_numpy(BY_OPTION[option].numpy)
    with tempfile.TemporaryDirectory() as folder:
        captured = build_captured_model(source, "plugin", 64, dtype)
        plain = build_model(source, "masked")
        for name, model in (("captured", captured), ("plain", plain)):
            save_weights(model, Path(folder) / f"{name}.data")
        candidate, reference = (
            ir.to_proto(exposed(model, force=True)).SerializeToString() for model in (captured, plain)
        )
        provider = CPU if device == "cpu" else CUDA
        _leave_nan(device)
        with (
            OnnxRuntimeRunner(reference, weights_folder=folder) as oracle,
            InPlaceRunner(candidate, weights_folder=folder, plugin_library=library, provider=provider) as runner,
        ):
            for each in (oracle, runner):
                each.reset(2)
            for feed in feeds:
                active = {layer: rng.random(feed.input_ids.shape) < 0.5 for layer in layers}
                tokens = (feed.input_ids, feed.attention_mask, feed.position_ids)
                want, got = (each.step(*tokens, force_active=active).logits for each in (oracle, runner))
                real = feed.attention_mask[:, -feed.input_ids.shape[1] :].astype(bool)
                worst = max(worst, _row_error(got[real], want[real]))
    evidence.row(
        "runner", passed=worst <= LOGITS_ERROR[option], dtype=option, largest_error=worst, bar=LOGITS_ERROR[option]
    )


def _leave_nan(device: str) -> None:
    """Fills memory with NaN and gives it back, so that whoever allocates next may find it there."""
    if device == "cuda":
        torch.full((2**30,), torch.nan, device=device)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def _reference_logits(
    source: RandomDecoder, weights: dict[str, torch.Tensor], tokens: np.ndarray, limits: np.ndarray
) -> np.ndarray:
    """Of all tokens at once, float32 [batch, sequence, vocab]."""
    model = build_model(source, "masked" if source.routed else "none")
    thresholds_as_inputs(model)
    weights_as_inputs(model)
    session = DeviceSession(model, "cpu")
    batch, sequence = tokens.shape
    config = source.config
    inputs = {
        INPUT_IDS: torch.from_numpy(tokens),
        ATTENTION_MASK: torch.ones(tokens.shape, dtype=torch.int64),
        POSITION_IDS: torch.arange(sequence).expand(batch, sequence).contiguous(),
    }
    if source.routed:
        for layer in range(config.num_layers):
            inputs[threshold_name(layer)] = torch.from_numpy(limits[layer].astype(np.float32))
    names = [(layer, part) for layer in range(config.num_layers) for part in CACHE_PARTS]
    empty = {past_name(*name): torch.zeros((batch, config.num_kv_heads, 0, config.head_dim)) for name in names}
    shape = (batch, config.num_kv_heads, sequence, config.head_dim)
    outputs = {LOGITS: torch.empty((batch, sequence, config.vocab_size))}
    outputs |= {present_name(*name): torch.empty(shape) for name in names}
    plain = {name: value.float().cpu() for name, value in weights.items()}
    step = session.bind({**inputs, **empty, **plain}, outputs)
    step.run()
    return outputs[LOGITS].numpy()
