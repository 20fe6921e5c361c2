"""ONNX Runtime on memory that PyTorch holds: inputs, weights, cache and outputs at fixed addresses, steps captured."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxruntime as ort
import torch

from benchmarks.gpu.placement import placement_facts
from dlo_export.graph_passes.row_tensor import RowTensor
from dlo_export.plugins.ort_registration import register_library

TORCH_TYPES = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
    ir.DataType.INT64: torch.int64,
}
_ONNX_TYPES = {torch_type: int(onnx_type) for onnx_type, torch_type in TORCH_TYPES.items()}
_BLOCKS = 5  # of runs, whose means give a median and a spread


def weights_as_inputs(model: ir.Model) -> dict[str, ir.Value]:
    """Makes graph inputs of a graph's weights, in place, so that nobody needs to write them to a file.

    Returns:
        The new inputs by name.
    """
    graph = model.graph
    weights = {name: value for name, value in graph.initializers.items() if isinstance(value.const_value, RowTensor)}
    for name, value in weights.items():
        tensor = value.const_value
        assert tensor is not None, "asked above"
        del graph.initializers[name]
        value.const_value = None
        value.dtype, value.shape = tensor.dtype, ir.Shape(tensor.shape.numpy())
        graph.inputs.append(value)
    return weights


def random_weights(values: Mapping[str, ir.Value], device: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """Normal weights of a size that keeps the stream's, norms of 1, drawn on the device; the same for equal names."""
    weights = {}
    for number, (name, value) in enumerate(sorted(values.items())):
        assert value.dtype is not None, "weights are typed"
        assert value.shape is not None, "and have shapes"
        shape, dtype = value.shape.numpy(), TORCH_TYPES[value.dtype]
        generator = torch.Generator(device).manual_seed(seed * 100_003 + number)
        if len(shape) == 1:
            weights[name] = torch.ones(shape, dtype=dtype, device=device)
            continue
        drawn = torch.empty(shape, dtype=dtype, device=device).normal_(generator=generator)
        # embeddings, [vocab, hidden], are rows of the stream; everything else is multiplied with it, [in, out]
        weights[name] = drawn if name.endswith("embed_tokens.weight") else drawn.mul_(shape[0] ** -0.5)
    return weights


class DeviceSession:
    """A session whose inputs and outputs are PyTorch's tensors; on a GPU, every binding is captured in a CUDA graph.

    Args:
        model: Its weights initializers or inputs.
        device: "cpu" or "cuda".
        library: libdlo_ort.so, for graphs with dlo operators.
        capture: On a GPU, whether bindings are captured at all.

    Attributes:
        stream: Of all runs on a GPU.
    """

    def __init__(self, model: ir.Model, device: str, library: Path | None = None, *, capture: bool = True) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 2
        options.enable_mem_pattern = False  # what it plans anew would be allocated while a graph is captured
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        if library is not None:
            register_library(options, library)
        provider: tuple[str, dict[str, str]] = ("CPUExecutionProvider", {})
        self.stream: torch.cuda.Stream | None = None
        if device == "cuda":
            # One stream for PyTorch and ONNX Runtime: what one writes, the other reads without waiting.
            self.stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            settings = {
                "enable_cuda_graph": str(int(capture)),
                "use_tf32": "0",
                "user_compute_stream": str(self.stream.cuda_stream),
            }
            provider = ("CUDAExecutionProvider", settings)
        self._session = ort.InferenceSession(
            ir.to_proto(model).SerializeToString(), options, providers=[provider[0]], provider_options=[provider[1]]
        )
        if self._session.get_providers()[0] != provider[0]:
            raise RuntimeError(f"ONNX Runtime dropped {provider[0]}")
        self._device = device
        self._captures = capture
        self._bindings = 0

    def placement(self) -> dict[str, Any]:
        """Who was given which nodes, and whether none of a layer went to another provider than the one asked for."""
        placed: dict[str, list[tuple[str, str]]] = {}
        for part in self._session.get_provider_graph_assignment_info():
            placed.setdefault(part.ep_name, []).extend((node.name, node.op_type) for node in part.get_nodes())
        return placement_facts(placed, self._session.get_providers()[0])

    def operators_elsewhere(self) -> dict[str, int]:
        """Operators that ONNX Runtime put on another provider than the one asked for, and how many nodes."""
        elsewhere: dict[str, int] = self.placement()["elsewhere"]
        return elsewhere

    def bind(
        self, inputs: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor], *, capture: bool = True
    ) -> BoundRun:
        """Ties the session to tensors, which live at least as long.

        Args:
            inputs: By name, written completely when runs begin.
            outputs: By name; a tensor that is an input too is written in place.
            capture: On a GPU, whether runs become a CUDA graph.
        """
        binding = self._session.io_binding()
        for name, tensor in inputs.items():
            binding.bind_input(name, self._device, 0, _ONNX_TYPES[tensor.dtype], tuple(tensor.shape), tensor.data_ptr())
        for name, tensor in outputs.items():
            binding.bind_output(
                name, self._device, 0, _ONNX_TYPES[tensor.dtype], tuple(tensor.shape), tensor.data_ptr()
            )
        options = ort.RunOptions()
        self._bindings += 1
        if self.stream is not None:
            # Whatever filled the tensors ran on another stream.
            torch.cuda.synchronize()
            options.add_run_config_entry("gpu_graph_id", str(self._bindings if capture and self._captures else -1))
            options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        return BoundRun(self._session, binding, options, self.stream, {**inputs, **outputs})


@dataclasses.dataclass(frozen=True)
class BoundRun:
    """A session with everything it reads and writes.

    Attributes:
        session: It.
        binding: To the tensors.
        options: Of every run.
        stream: Where runs go on a GPU; None on a CPU.
        tensors: Inputs and outputs by name.
    """

    session: ort.InferenceSession
    binding: ort.IOBinding
    options: ort.RunOptions
    stream: torch.cuda.Stream | None
    tensors: dict[str, torch.Tensor]

    def run(self) -> None:
        """Computes; on a GPU it only submits the work, captured with the first call and replayed from then on."""
        self.session.run_with_iobinding(self.binding, self.options)

    def on_stream(self) -> contextlib.AbstractContextManager[Any]:
        """What PyTorch does inside is in the order of the runs."""
        return contextlib.nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def finish(self) -> None:
        """Waits for what was submitted."""
        if self.stream is not None:
            self.stream.synchronize()

    def time(self, seconds: float) -> dict[str, Any]:
        """Milliseconds per run, back to back.

        Args:
            seconds: About as long as it may take.

        Returns:
            step_ms, the median, lowest_ms and highest_ms of blocks of runs, and host_ms, what submitting one takes.
        """
        for _ in range(3):  # capture, and what the first replays load
            self.run()
        self.finish()
        start = time.perf_counter()
        self.run()
        self.finish()
        runs = max(1, int(seconds / _BLOCKS / max(time.perf_counter() - start, 1e-6)))
        blocks, host = [], []
        for _ in range(_BLOCKS):
            elapsed, submitted = self._block(runs)
            blocks.append(elapsed)
            host.append(submitted)
        figures = (statistics.median(blocks), min(blocks), max(blocks), statistics.median(host))
        keys = ("step_ms", "lowest_ms", "highest_ms", "host_ms")
        return {key: round(figure, 4) for key, figure in zip(keys, figures, strict=True)}

    def kernels(self, runs: int = 4) -> dict[str, list[float]]:
        """What a GPU runs, by the beginnings of kernels' names: how many per run, and microseconds of all of them."""
        self.run()  # captures
        self.finish()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
            for _ in range(runs):
                self.run()
            self.finish()
        found: dict[str, list[float]] = {}
        for event in trace.events():
            if event.device_type.name == "CUDA":
                entry = found.setdefault(event.name[:80], [0.0, 0.0])
                entry[0] += 1 / runs
                entry[1] += event.time_range.elapsed_us() / runs
        longest = sorted(found.items(), key=lambda item: -item[1][1])[:24]
        return {name: [round(count, 2), round(total, 2)] for name, (count, total) in longest}

    def _block(self, runs: int) -> tuple[float, float]:
        if self.stream is None:
            start = time.perf_counter()
            for _ in range(runs):
                self.run()
            elapsed = (time.perf_counter() - start) * 1e3 / runs
            return elapsed, elapsed
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        first.record(self.stream)
        start = time.perf_counter()
        for _ in range(runs):
            self.run()
        submitted = time.perf_counter() - start
        last.record(self.stream)
        self.finish()
        return first.elapsed_time(last) / runs, submitted * 1e3 / runs
