"""Gives TensorRT-RTX the `dlo` plugins, for the engine builder and for runners.

Call either function after `import tensorrt_rtx` and before an ONNX parser or a runtime meets a plugin node.
`register_twins` is enough to build an engine and learn whether it builds; for one that is to run, load the library.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dlo_export.graph_passes.spec.ops import DOMAIN, PLUGIN_OPS
from dlo_export.plugins import registration
from dlo_export.plugins.errors import PluginError
from dlo_export.plugins.rtx_shim import provide_unversioned_library

_twins: list[Any] = []


def register_twins() -> None:
    """Registers the Python twins of all `dlo` plugins; what is registered already stays.

    Raises:
        PluginError: The platform has no way to parse plugin nodes, or TensorRT-RTX refused a creator.
        ModuleNotFoundError: tensorrt_rtx is not installed.
    """
    import tensorrt_rtx as trt  # noqa: PLC0415 - heavy

    from dlo_export.plugins.rtx_twins import PluginTwinCreator  # noqa: PLC0415 - its classes derive from tensorrt_rtx's

    provide_unversioned_library()
    registry = trt.get_plugin_registry()
    for name in missing_creators():
        creator = PluginTwinCreator(PLUGIN_OPS[name])
        if not registry.register_creator(creator, DOMAIN):
            raise PluginError(
                f"TensorRT-RTX {trt.__version__} refused the creator of dlo::{name}",
                hint="its log says why; please report it with the version above",
            )
        _twins.append(creator)


def load_library(path: Path | str) -> None:
    """Loads `libdlo_plugins.so`, which takes the place of the twins.

    Raises:
        PluginError: The file is missing, cannot be loaded, or does not bring every `dlo` plugin.
        ModuleNotFoundError: tensorrt_rtx is not installed.
    """
    import tensorrt_rtx as trt  # noqa: PLC0415 - heavy

    registration.require_file(Path(path))
    provide_unversioned_library()
    while _twins:
        trt.get_plugin_registry().deregister_creator(_twins.pop())
    registration.load_into_registry(trt, Path(path))


def missing_creators() -> tuple[str, ...]:
    """Names of the `dlo` plugins that TensorRT-RTX's registry does not hold."""
    import tensorrt_rtx as trt  # noqa: PLC0415 - heavy

    return registration.missing_creators(trt)
