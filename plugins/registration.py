"""What TensorRT's two Pythons share: looking into the plugin registry, and loading the C++ library into it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dlo_export.graph_passes.spec.ops import DOMAIN, PLUGIN_OPS, VERSION
from dlo_export.plugins.errors import PluginError

_loaded: dict[str, Path] = {}
_BUILD = "build it: make -C plugins/library TensorRT_ROOT=<your TensorRT>"


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


def require_file(path: Path) -> None:
    """Raises PluginError unless there is a file at `path`."""
    if not path.is_file():
        raise PluginError(f"plugin library {path}: no such file; expected libdlo_plugins.so", hint=_BUILD)


def load_into_registry(trt: Any, path: Path) -> None:
    """Loads `libdlo_plugins.so` into the registry of `trt`.

    Loading the same file again is harmless.

    Args:
        trt: The module tensorrt or tensorrt_rtx.
        path: The library.

    Raises:
        PluginError: It cannot be loaded, does not bring every `dlo` plugin, or the process has them from elsewhere.
    """
    path = path.resolve()
    if _loaded.get(trt.__name__) == path:
        return
    if present := [name for name in PLUGIN_OPS if name not in missing_creators(trt)]:
        source = _loaded.get(trt.__name__, "somewhere else")
        raise PluginError(
            f"plugin library {path}: {', '.join(present)} came from {source} already; expected nothing registered",
            hint="a process holds one implementation of a plugin: use a fresh process for this one",
        )
    handle = trt.get_plugin_registry().load_library(str(path))
    if handle is None:
        raise PluginError(
            f"plugin library {path}: {trt.__name__} {trt.__version__} could not load it; its log says why", hint=_BUILD
        )
    if missing := missing_creators(trt):
        raise PluginError(
            f"plugin library {path}: it brings no {', '.join(missing)}; expected {', '.join(PLUGIN_OPS)}", hint=_BUILD
        )
    _loaded[trt.__name__] = path
