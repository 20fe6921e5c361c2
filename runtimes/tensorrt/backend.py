"""TensorRT or TensorRT-RTX: the module, its log, and engines read from disk."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from dlo_export.checkpoints.files.file_digest import file_sha256
from dlo_export.runtimes.errors import BackendUnavailableError, ModelLoadError
from dlo_export.runtimes.tensorrt.engine_file import EngineFile

_INSTALL = {
    "tensorrt": "pip install tensorrt=={version} (needs the vendor's package index)",
    "rtx": "pip install tensorrt-rtx=={version}",
}
# Follows real errors where there is no GPU, and says nothing about them.
_NOISE = "catchCudaError"

# Plugin libraries in the process-wide registries, by the backend's module.
_LOADED: set[tuple[str, Path]] = set()


class Backend:
    """The backend an engine was built with.

    Args:
        file: The engine.

    Raises:
        BackendUnavailableError: The backend is not installed, or in another version than the engine's.
    """

    def __init__(self, file: EngineFile) -> None:
        hint = _INSTALL[file.backend].format(version=file.version)
        try:
            self.module: Any = importlib.import_module(file.module)
        except ImportError as err:
            raise BackendUnavailableError(
                f"{file.path.name}: was built with {file.module} {file.version}, which cannot be imported: {err}",
                hint=hint,
            ) from err
        found = str(self.module.__version__)
        if found != file.version:
            raise BackendUnavailableError(
                f"{file.path.name}: was built with {file.module} {file.version}, this machine has {found}; an engine "
                "runs only in the version that built it",
                hint=f"{hint}, or export the model again with --trt",
            )
        self.errors: list[str] = []
        self._logger = _logger(self.module, self.errors)
        self._runtime = self.module.Runtime(self._logger)

    def load_plugins(self, file: EngineFile, library: Path | None = None) -> None:
        """Loads the plugin library, for an engine that was built with it.

        Args:
            file: The engine.
            library: libdlo_plugins.so of this backend; the artefact's by default.

        Raises:
            ModelLoadError: It is missing, another one than the engine was built with, or cannot be loaded; or the
                engine's plugins have no kernels.
        """
        if file.plugins == "twins":
            raise ModelLoadError(
                f"{file.path.name}: was built with the Python twins of the plugins, which describe shapes and have no "
                "kernels",
                hint="build libdlo_plugins.so (docs/tensorrt.md) and export with --trt-plugin-library",
            )
        if file.plugins != "library":
            return
        library = library or file.plugin_library
        if library is None:
            raise ModelLoadError(
                f"{file.path.name}: was built with a plugin library, and none was given",
                hint="give the libdlo_plugins.so it was exported with",
            )
        if not library.is_file():
            raise ModelLoadError(f"{library}: no such file, expected libdlo_plugins.so")
        if (found := file_sha256(library)) != file.plugin_library_sha256:
            raise ModelLoadError(
                f"{library}: its sha256 is {found[:12]}…, {file.path.name} was built with "
                f"{str(file.plugin_library_sha256)[:12]}…",
                hint="give that library, or export again with this one",
            )
        # A process's registry takes a library once; a second engine built with it finds its creators there.
        place = (self.module.__name__, library.resolve())
        if place in _LOADED:
            return
        if self._runtime.get_plugin_registry().load_library(str(library)) is None:
            raise ModelLoadError(
                f"{library}: {self.module.__name__} cannot load it{self.explanation()}",
                hint="build it for this backend: see docs/tensorrt.md",
            )
        _LOADED.add(place)

    def check_target(self, file: EngineFile, target: str) -> None:
        """Checks that an engine was built for a GPU.

        Args:
            file: The engine.
            target: Of the GPU, such as "sm89".

        Raises:
            ModelLoadError: It was not.
        """
        if file.targets and target not in file.targets:
            raise ModelLoadError(
                f"{file.path.name}: was built for {', '.join(file.targets)}, this GPU is {target}",
                hint=f"export again with --trt-target {target}",
            )

    def deserialize(self, file: EngineFile) -> Any:
        """Reads an engine. Needs a GPU.

        Raises:
            ModelLoadError: It is not one this backend runs here, or its tensors are not the described ones.
        """
        plan = file.path.read_bytes()
        engine = self._runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise ModelLoadError(
                f"{file.path}: {file.module} {file.version} cannot load it{self.explanation()}{self._invalidity(plan)}",
                hint="export again with --trt on, or for, this machine",
            )
        found = {engine.get_tensor_name(i) for i in range(engine.num_io_tensors)}
        expected = {*file.interface.inputs, *file.interface.outputs}
        if found != expected:
            raise ModelLoadError(
                f"{file.path}: its tensors are not those of dlo_artifact.json: missing {sorted(expected - found)}, "
                f"unexpected {sorted(found - expected)}",
                hint="export again with --trt",
            )
        aliases = {out: engine.get_aliased_input_tensor(out) for out in file.interface.present_of.values()}
        if wrong := sorted(out for past, out in file.interface.present_of.items() if aliases[out] != past):
            raise ModelLoadError(f"{file.path}: {wrong} do not update the cache in place, as a static cache must")
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
            raise ModelLoadError(f"TensorRT: no execution context could be made{self.explanation()}")
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


def _logger(module: Any, errors: list[str]) -> Any:
    class ErrorLog(module.ILogger):  # type: ignore[misc]
        """Keeps errors; the rest is not for users."""

        def __init__(self) -> None:
            module.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (module.ILogger.ERROR, module.ILogger.INTERNAL_ERROR) and _NOISE not in message:
                errors.append(message.strip())

    return ErrorLog()
