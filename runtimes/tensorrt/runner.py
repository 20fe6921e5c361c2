"""Runs the TensorRT engines of an artefact: TensorRT and TensorRT-RTX behind the `Runner` protocol.

What happens before the first CUDA call (reading and checking engines, finding the backend) is tested without a GPU.
What needs one has not been run on one yet: loading an engine, executing it, capturing it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from dlo_export.checkpoints import interface as names
from dlo_export.runtimes.artefact.engine_record import EngineRecord
from dlo_export.runtimes.decoder_interface import DecoderInterface
from dlo_export.runtimes.errors import ModelLoadError
from dlo_export.runtimes.runner import StepRequest
from dlo_export.runtimes.static_cache.batches import StaticCacheStep
from dlo_export.runtimes.static_cache.runner import StaticRunner
from dlo_export.runtimes.tensorrt.device import Device
from dlo_export.runtimes.tensorrt.engine_check import require_runnable
from dlo_export.runtimes.tensorrt.engine_runtime import EngineRuntime
from dlo_export.runtimes.tensorrt.engines import load_engines
from dlo_export.runtimes.tensorrt.execution import Execution
from dlo_export.runtimes.tensorrt.gpu import find_gpu
from dlo_export.runtimes.tensorrt.shapes import choose_profile, profiles_of


class TensorRtRunner(StaticRunner):
    """Of TensorRT engines with a static KV cache.

    Buffers are allocated once, for the largest profile; the cache is updated in place. Decode steps are captured in a
    CUDA graph where the lowering allows it, and `cuda_graph` says whether they are; a capture that fails warns.

    Args:
        engines: Of one model: one engine, or prefill and decode apart.
        name: For reports; the first engine's file name by default.
        plugin_library: libdlo_plugins.so, where the engines were built with it.
        capture: Capture decode steps.
        layer_seconds: Gets every layer's durations by name, one per step; steps are slower and never captured.

    Raises:
        ModelLoadError: The engines are not of one model, not for this GPU, or damaged, or lack their plugin library.
        BackendUnavailableError: There is no GPU, driver, or backend of the engines' version.
        dlo_export.plugins.errors.PluginError: The plugin library cannot be loaded.
    """

    def __init__(
        self,
        engines: Sequence[EngineRecord],
        *,
        name: str | None = None,
        plugin_library: Path | None = None,
        capture: bool = True,
        layer_seconds: dict[str, list[float]] | None = None,
    ) -> None:
        first = _one_model(engines)
        super().__init__(
            name or first.file.name,
            first.static_cache,
            max_batch=max(engine.max_batch for engine in engines),
            max_sequence=max(engine.max_sequence for engine in engines),
        )
        self._profiles = profiles_of(engines)
        require_runnable(engines, find_gpu().target, plugin_library)
        runtime = EngineRuntime(first, plugin_library)
        device = Device()
        try:
            self._execution = Execution(runtime, device, engines, capture=capture, layer_seconds=layer_seconds)
        except BaseException:
            device.close()
            raise

    @classmethod
    def of_artefact(
        cls,
        folder: str | Path,
        *,
        name: str | None = None,
        plugin_library: Path | None = None,
        capture: bool = True,
        layer_seconds: dict[str, list[float]] | None = None,
    ) -> TensorRtRunner:
        """Opens an artefact's engines.

        Args:
            folder: That dlo-export wrote with --trt.
            name: For reports; the folder's name by default.
            plugin_library: As for the class.
            capture: Likewise.
            layer_seconds: Likewise.

        Raises:
            RuntimeInputError: As for the class; or the artefact has no engines, or they were changed.
        """
        return cls(
            load_engines(folder),
            name=name or Path(folder).name,
            plugin_library=plugin_library,
            capture=capture,
            layer_seconds=layer_seconds,
        )

    @property
    def cuda_graph(self) -> str:
        """Whether decode steps run from a captured graph: "captured", "not captured yet", or why not."""
        self._check_open()
        return self._execution.cuda_graph

    def _zero_slots(self, batch: int) -> None:
        self._execution.reset()

    def _run(self, step: StaticCacheStep, request: StepRequest) -> Mapping[str, np.ndarray]:
        choice = choose_profile(self._profiles, step.batch, step.ragged, self.name)
        self._execution.run(choice, step.feeds)
        # Of all tokens' logits only the wanted rows leave the device.
        rows = {names.LOGITS: np.maximum(step.counts - 1, 0).tolist()} if request.last_logits else {}
        return {
            key: self._execution.fetch(key, step.batch, step.ragged, rows.get(key))
            for key in self._interface.observed(hidden_states=request.hidden_states)
        }

    def _free(self) -> None:
        self._execution.close()


def _one_model(engines: Sequence[EngineRecord]) -> EngineRecord:
    """The first engine, once all are known to be of one model."""
    if not engines:
        raise ModelLoadError("TensorRT: got no engines, expected at least one", hint="export the model with --trt")
    first = engines[0]
    for engine in engines[1:]:
        if _kind(engine) != _kind(first):
            raise ModelLoadError(
                f"{engine.file.name} and {first.file.name}: differ in backend, version or interface, expected engines "
                "of one model",
                hint="export the model again with --trt",
            )
    return first


def _kind(engine: EngineRecord) -> tuple[str, str, DecoderInterface]:
    """What engines of one model have in common."""
    return engine.build.backend, engine.build.version, engine.static_cache
