"""Gives TensorRT and TensorRT-RTX the `dlo` plugins, for the engine builder and for runners.

Call these after the import of TensorRT's module and before an ONNX parser or a runtime meets a plugin node. For an
engine that is to run, `load_library`. To build one and learn whether it builds, TensorRT-RTX is content with
`register_twins`; enterprise TensorRT takes `register_quick_deploy`, whose kernels end up in the engine.

Not run against enterprise TensorRT's own library here: it needs a GPU. `register_quick_deploy` has been run with its
Python module on TensorRT-RTX's library (tests/plugins/test_quick_deploy.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dlo_export.graph_passes.spec.ops import DOMAIN, PLUGIN_OPS, VERSION
from dlo_export.plugins.errors import PluginError
from dlo_export.plugins.library_places import build_hint
from dlo_export.plugins.rtx_shim import provide_unversioned_library
from dlo_export.plugins.shared_object import file_problem, has_name

_LIBRARY = "libdlo_plugins.so"
_RTX = "tensorrt_rtx"
# What a library gives its plugins out by. Source: NvInferRuntime.h, IPluginRegistry::loadLibrary.
_ENTRY = "getCreators"
_BUILD = build_hint("TensorRT_ROOT=<your TensorRT>")

# Both are the process's, like the registry.
_loaded: dict[str, Path] = {}
_twins: list[Any] = []


def missing_creators(trt: Any) -> tuple[str, ...]:
    """Names of the `dlo` plugins that the registry does not hold.

    Args:
        trt: The module tensorrt or tensorrt_rtx.
    """
    # get_creator logs an error for each one it lacks; the list does not
    held = {
        (creator.name, creator.plugin_version, creator.plugin_namespace)
        for creator in trt.get_plugin_registry().all_creators
    }
    return tuple(name for name in PLUGIN_OPS if (name, str(VERSION), DOMAIN) not in held)


def register_twins() -> None:
    """Registers the Python twins of all `dlo` plugins with TensorRT-RTX; what is registered already stays.

    Raises:
        PluginError: The platform has no way to parse plugin nodes, or TensorRT-RTX refused a creator.
        ModuleNotFoundError: tensorrt_rtx is not installed.
    """
    import tensorrt_rtx as trt  # noqa: PLC0415 - heavy

    from dlo_export.plugins.rtx_twins import PluginTwinCreator  # noqa: PLC0415 - its classes derive from tensorrt_rtx's

    provide_unversioned_library()
    registry = trt.get_plugin_registry()
    for name in missing_creators(trt):
        creator = PluginTwinCreator(PLUGIN_OPS[name])
        if not registry.register_creator(creator, DOMAIN):
            raise PluginError(
                f"TensorRT-RTX {trt.__version__} refused the creator of dlo::{name}",
                hint="its log says why; please report it with the version above",
            )
        _twins.append(creator)


def register_quick_deploy() -> None:
    """Registers the quick-deploy plugins with enterprise TensorRT for building; repeating it is harmless.

    Engines built with them carry the kernels and need no library to run.

    Raises:
        ModuleNotFoundError: tensorrt or triton is not installed.
    """
    import dlo_export.plugins.quick_deploy  # noqa: F401, PLC0415 - its decorators register


def check_library(path: Path) -> None:
    """Refuses what cannot be `libdlo_plugins.so`, by its file alone: without TensorRT, and before any work.

    Raises:
        PluginError: It is missing, cut short, or holds no plugins of TensorRT's.
    """
    if (problem := file_problem(path, _LIBRARY)) is not None:
        raise PluginError(f"plugin library {path}: {problem}", hint=_BUILD)
    if not has_name(path, _ENTRY):
        raise PluginError(
            f"plugin library {path}: has no {_ENTRY}, which TensorRT asks for plugins; expected {_LIBRARY}",
            hint=_BUILD,
        )


def load_library(trt: Any, path: Path | str) -> None:
    """Loads `libdlo_plugins.so` into a registry, where it takes the place of twins; loading it again is harmless.

    Args:
        trt: The module tensorrt or tensorrt_rtx.
        path: The library, built for that module.

    Raises:
        PluginError: As `check_library`; or it cannot be loaded, does not bring every `dlo` plugin, or the process has
            them from elsewhere.
    """
    path = Path(path)
    check_library(path)
    path = path.resolve()
    if trt.__name__ == _RTX:
        provide_unversioned_library()
        while _twins:
            trt.get_plugin_registry().deregister_creator(_twins.pop())
    if _loaded.get(trt.__name__) == path:
        return
    if present := [name for name in PLUGIN_OPS if name not in missing_creators(trt)]:
        source = _loaded.get(trt.__name__, "somewhere else")
        raise PluginError(
            f"plugin library {path}: {', '.join(present)} came from {source} already; expected nothing registered",
            hint="a process holds one implementation of a plugin: use a fresh process for this one",
        )
    if trt.get_plugin_registry().load_library(str(path)) is None:
        raise PluginError(
            f"plugin library {path}: {trt.__name__} {trt.__version__} could not load it; its log says why", hint=_BUILD
        )
    if missing := missing_creators(trt):
        raise PluginError(
            f"plugin library {path}: it brings no {', '.join(missing)}; expected {', '.join(PLUGIN_OPS)}", hint=_BUILD
        )
    _loaded[trt.__name__] = path
