"""TensorRT's runtime: reads engines from disk and makes contexts to run them in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dlo_export.plugins.registration import load_library
from dlo_export.runtimes.artefact.engine_record import EngineRecord
from dlo_export.runtimes.errors import ModelLoadError
from dlo_export.runtimes.tensorrt.backend import BACKENDS, Backend


class EngineRuntime:
    """A runtime of the backend that built an engine, with the plugins it needs.

    Args:
        record: Of an engine that `require_runnable` accepted.
        plugin_library: libdlo_plugins.so of this backend, for engines that need it.

    Raises:
        MachineError: The backend cannot be loaded.
        dlo_export.plugins.errors.PluginError: The library cannot be.
    """

    def __init__(self, record: EngineRecord, plugin_library: Path | None = None) -> None:
        self._backend = BACKENDS[record.build.backend]
        self.module: Any = self._backend.load()
        self.errors: list[str] = []
        self._logger = _logger(self.module, self._backend, self.errors)
        # Before the runtime, which finds creators in the process-wide registry.
        if plugin_library is not None and record.plugin_operators:
            load_library(self.module, plugin_library)
        self._runtime = self.module.Runtime(self._logger)

    def deserialize(self, record: EngineRecord) -> Any:
        """Reads an engine. Needs a GPU.

        Raises:
            ModelLoadError: It is not one this backend runs here, or its tensors are not the described ones.
        """
        plan = record.file.read_bytes()
        engine = self._runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise ModelLoadError(
                f"{record.file}: {self._backend.title} {record.build.version} cannot load it{self.explanation()}"
                f"{self._invalidity(plan)}",
                hint="export again with --trt on, or for, this machine",
            )
        interface = record.static_cache
        found = {engine.get_tensor_name(i) for i in range(engine.num_io_tensors)}
        expected = {*interface.inputs, *interface.outputs}
        if found != expected:
            raise ModelLoadError(
                f"{record.file}: its tensors are not those of dlo_artifact.json: missing {sorted(expected - found)}, "
                f"unexpected {sorted(found - expected)}",
                hint="export again with --trt",
            )
        aliases = {out: engine.get_aliased_input_tensor(out) for out in interface.present_of.values()}
        if wrong := sorted(out for past, out in interface.present_of.items() if aliases[out] != past):
            raise ModelLoadError(
                f"{record.file}: {wrong} do not update the cache in place, as a static cache must",
                hint="export again with --trt",
            )
        return engine

    def context(self, engine: Any, *, eager_kernels: bool) -> Any:
        """A context to run an engine in.

        Args:
            engine: Of `deserialize`.
            eager_kernels: RTX: compile the kernels of a shape before it first runs, not meanwhile, so that what a graph
                captures is what runs from then on.

        Raises:
            ModelLoadError: There is no memory for it, say.
        """
        if eager_kernels and hasattr(self.module, "DynamicShapesKernelSpecializationStrategy"):
            config = engine.create_runtime_config()
            strategy = self.module.DynamicShapesKernelSpecializationStrategy.EAGER
            config.dynamic_shapes_kernel_specialization_strategy = strategy
            context = engine.create_execution_context(config)
        else:
            context = engine.create_execution_context()
        if context is None:
            raise ModelLoadError(
                f"{self._backend.title}: no execution context could be made{self.explanation()}",
                hint="free GPU memory, or export with a smaller --trt-max-cache",
            )
        return context

    def _invalidity(self, plan: bytes) -> str:
        """What RTX finds wrong with an engine; enterprise TensorRT does not say."""
        if not hasattr(self._runtime, "get_engine_validity"):
            return ""
        _, found = self._runtime.get_engine_validity(plan)
        reasons = self.module.EngineInvalidityDiagnostics.__members__
        names = [name for name, reason in reasons.items() if int(found) & int(reason)]
        return f" ({', '.join(names)})" if names else ""

    def explanation(self) -> str:
        """What the backend logged since the last call, for the end of a message."""
        errors = "; ".join(dict.fromkeys(self.errors))
        self.errors.clear()
        return f": {errors}" if errors else ""


def _logger(module: Any, backend: Backend, errors: list[str]) -> Any:
    class ErrorLog(module.ILogger):  # type: ignore[misc]
        """Keeps errors; the rest is not for users."""

        def __init__(self) -> None:
            module.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            serious = severity in (module.ILogger.ERROR, module.ILogger.INTERNAL_ERROR)
            # What an engine is refused for is followed by errors of cleaning up, which say nothing about it.
            if serious and "catchCudaError" not in message and not backend.is_noise(message):
                errors.append(message.strip())

    return ErrorLog()
