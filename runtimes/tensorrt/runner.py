"""Runs the TensorRT engines of an artefact: TensorRT and TensorRT-RTX behind the `Runner` protocol.

What happens before the first CUDA call (reading and checking engines, finding the backend) is tested without a GPU.
What needs one has not been run on one yet: loading an engine, executing it, capturing it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from dlo_export.runtimes.artefact.engine_record import EngineRecord
from dlo_export.runtimes.errors import ModelLoadError, StepError
from dlo_export.runtimes.runner import Decisions, Int64Array, StepResult, check_forcing, check_step
from dlo_export.runtimes.static_cache.batches import StaticCache, StaticCacheLimits
from dlo_export.runtimes.static_cache.results import check_logits, step_result
from dlo_export.runtimes.tensorrt.device import Device
from dlo_export.runtimes.tensorrt.engine_check import require_runnable
from dlo_export.runtimes.tensorrt.engine_runtime import EngineRuntime
from dlo_export.runtimes.tensorrt.engines import load_engines
from dlo_export.runtimes.tensorrt.execution import Execution
from dlo_export.runtimes.tensorrt.gpu import find_gpu
from dlo_export.runtimes.tensorrt.shapes import choose_profile, profiles_of


class TensorRtRunner:
    """A `Runner` of TensorRT engines with a static KV cache.

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
        self._name = name or first.file.name
        self._interface = first.static_cache
        self._profiles = profiles_of(engines)
        limits = StaticCacheLimits(
            self._interface.max_cache,
            max(engine.max_batch for engine in engines),
            max(engine.max_sequence for engine in engines),
        )
        self._tokens = StaticCache(self._name, limits)
        require_runnable(engines, find_gpu().target, plugin_library)
        runtime = EngineRuntime(first, plugin_library)
        device = Device()
        try:
            self._execution: Execution | None = Execution(
                runtime, device, engines, capture=capture, layer_seconds=layer_seconds
            )
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
    def name(self) -> str:
        """See `Runner`."""
        return self._name

    @property
    def num_layers(self) -> int:
        """See `Runner`."""
        return self._interface.num_layers

    @property
    def routed_layers(self) -> tuple[int, ...]:
        """See `Runner`."""
        return self._interface.routed_layers

    @property
    def cuda_graph(self) -> str:
        """Whether decode steps run from a captured graph: "captured", "not captured yet", or why not."""
        return self._open().cuda_graph

    def reset(self, batch: int) -> None:
        """See `Runner`.

        Raises:
            StepError: The batch is larger than the largest profile.
        """
        self._tokens.reset(batch)
        self._open().reset()

    def step(
        self,
        input_ids: Int64Array,
        attention_mask: Int64Array,
        position_ids: Int64Array,
        *,
        force_active: Decisions | None = None,
        last_logits: bool = False,
        hidden_states: bool = False,
    ) -> StepResult:
        """See `Runner`; what is computed for padding comes back as 0.

        Raises:
            StepError: As `Runner.step`; or the step does not fit into the cache or a profile, or all logits are asked
                for of an engine that keeps the last token's; or TensorRT fails.
        """
        check_step(self, self._tokens.batch, self._tokens.past, input_ids, attention_mask, position_ids, force_active)
        check_forcing(self._name, self._interface.forced_layers, force_active)
        check_logits(self._name, self._interface, input_ids.shape[1], last_logits)
        step = self._tokens.next_step(input_ids, attention_mask, position_ids, force_active)
        choice = choose_profile(self._profiles, step.batch, step.ragged, self._name)
        execution = self._open()
        execution.run(choice, step.feeds)
        wanted = [name for name in self._interface.observed if hidden_states or not name.startswith("hidden.")]
        rows = np.maximum(step.counts - 1, 0).tolist() if last_logits else None
        outputs = {
            name: execution.fetch(name, step.batch, step.ragged, rows if name == "logits" else None) for name in wanted
        }
        self._tokens.append(step)
        return step_result(self._interface, step, outputs, last_logits=last_logits, hidden_states=hidden_states)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._execution is not None:
            execution, self._execution = self._execution, None
            execution.close()

    def _open(self) -> Execution:
        if self._execution is None:
            raise StepError(f"{self._name}: step after the runner was closed")
        return self._execution


def _one_model(engines: Sequence[EngineRecord]) -> EngineRecord:
    """The first engine, once all are known to be of one model."""
    if not engines:
        raise ModelLoadError("TensorRT: got no engines, expected at least one", hint="export the model with --trt")
    first = engines[0]
    for engine in engines[1:]:
        here, there = ((e.build.backend, e.build.version, e.static_cache) for e in (engine, first))
        if here != there:
            raise ModelLoadError(
                f"{engine.file.name} and {first.file.name}: differ in backend, version or interface, expected engines "
                "of one model",
                hint="export the model again with --trt",
            )
    return first
