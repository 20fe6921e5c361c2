"""Steps of one lowered graph, of sizes and with tokens active as a cell of the grid says."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from benchmarks.common.lowering_grid import Cell
from benchmarks.common.threshold_inputs import ACTIVE, SKIPPED, threshold_name
from dlo_export.checkpoints.dtypes import BY_ONNX
from dlo_export.checkpoints.interface import (
    ATTENTION_MASK,
    INPUT_IDS,
    KV_LENGTHS,
    LOGITS,
    POSITION_IDS,
    continuation_of,
    is_state_input,
    layers_with,
)
from dlo_export.exporter.weight_file import save_weights
from dlo_export.plugins.ort_registration import register_library
from dlo_export.runtimes.onnxruntime.providers import Provider

PAST_ACTIVE = "past_active."


def share_threads(count: int) -> None:
    """Makes the pool of all sessions to come; once in a process.

    Args:
        count: Threads of one operator.
    """
    ort.set_global_thread_pool_sizes(count, 1)


def save_graph(model: ir.Model, path: Path) -> Path:
    """Writes a graph and, beside it, its weights; returns the graph's place."""
    save_weights(model, path.with_suffix(".data"))
    ir.save(model, path)
    return path


class GridSteps:
    """An open graph whose routers' thresholds are inputs.

    It computes with the process's one thread pool (`share_threads`): of several sessions with pools of their own, the
    idle ones' threads disturb the one that runs, and each finds its own threads asleep.

    Args:
        graph: A .onnx.
        provider: What runs it.
        library: libdlo_ort.so, for graphs with dlo operators.
    """

    def __init__(self, graph: Path, provider: Provider, library: Path | None = None) -> None:
        options = ort.SessionOptions()
        options.use_per_session_threads = False
        if library is not None:
            register_library(options, library)
        settings = [dict(provider.options)]
        self._session = ort.InferenceSession(str(graph), options, providers=[provider.name], provider_options=settings)
        if self._session.get_providers()[0] != provider.name:
            raise RuntimeError(f"ONNX Runtime dropped {provider.name}")
        self._provider = provider
        self._inputs = {value.name: value for value in self._session.get_inputs()}
        self._layers = layers_with(self._inputs, threshold_name("{i}"))
        self._in_place = KV_LENGTHS in self._inputs
        self._binding: ort.IOBinding | None = None

    def set_up(self, cell: Cell) -> np.ndarray:
        """Binds a step's inputs; its outputs are made anew with every run, as a client has them that keeps the cache.

        A cache that is written in place is past and present at once.

        Returns:
            The step's logits, [batch, sequence, vocab].
        """
        batch, sequence, total = cell.batch, cell.sequence, cell.past + cell.sequence
        feeds: dict[str, np.ndarray] = {
            INPUT_IDS: np.arange(batch * sequence, dtype=np.int64).reshape(batch, sequence) % 512,
            KV_LENGTHS: np.full(batch, total, np.int64),
            ATTENTION_MASK: np.ones((batch, total), np.int64),
            POSITION_IDS: np.tile(np.arange(cell.past, total, dtype=np.int64), (batch, 1)),
        }
        for layer, active in zip(self._layers, cell.active(len(self._layers)), strict=True):
            name = threshold_name(layer)
            limits = np.where(active, ACTIVE, SKIPPED).astype(np.float32)
            sizes = {"batch": batch, "sequence": sequence}
            feeds[name] = limits.reshape([sizes.get(size, size) for size in self._inputs[name].shape])
        for name, value in self._inputs.items():
            if not is_state_input(name):
                continue
            kind = BY_ONNX[value.type.removeprefix("tensor(").removesuffix(")")].numpy
            if value.name.startswith(PAST_ACTIVE) and len(value.shape) == 2:
                feeds[name] = np.broadcast_to(cell.past_active(), (batch, cell.past)).astype(kind)
            elif value.name.startswith(PAST_ACTIVE):
                feeds[name] = np.zeros((batch, *value.shape[1:]), kind)
                feeds[name][:, 0, : cell.past, 0] = cell.past_active()
            else:
                slots = value.shape[2] if self._in_place else cell.past
                feeds[name] = np.zeros((batch, value.shape[1], slots, value.shape[3]), kind)
        self._binding = self._session.io_binding()
        device = self._provider.device, self._provider.device_id
        bound = {name: ort.OrtValue.ortvalue_from_numpy(feeds[name], *device) for name in self._inputs}
        for name, buffer in bound.items():
            self._binding.bind_ortvalue_input(name, buffer)
        shared = {continuation_of(name): bound[name] for name in bound if self._in_place and is_state_input(name)}
        for value in self._session.get_outputs():
            if value.name in shared:
                self._binding.bind_ortvalue_output(value.name, shared[value.name])
            else:
                self._binding.bind_output(value.name, *device)
        self.run()
        return self.outputs()[LOGITS]

    def run(self) -> None:
        """One step; a GPU has computed it when this returns."""
        assert self._binding is not None, "set up before"
        self._session.run_with_iobinding(self._binding)

    def timed(self, runs: int) -> list[float]:
        """Milliseconds of each of so many steps."""
        durations = []
        for _ in range(runs):
            start = time.perf_counter()
            self.run()
            durations.append((time.perf_counter() - start) * 1e3)
        return durations

    def outputs(self) -> dict[str, np.ndarray]:
        """Of the last run, by name."""
        assert self._binding is not None, "set up before"
        names = [value.name for value in self._session.get_outputs()]
        return dict(zip(names, self._binding.copy_outputs_to_cpu(), strict=True))
