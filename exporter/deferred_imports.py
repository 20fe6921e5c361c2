"""Libraries that another one loads at once, loaded when they are used."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import LazyLoader
from types import ModuleType

# onnx_ir adds and multiplies the symbolic dimensions of shapes by sympy, which takes longer to load than all of
# onnx_ir. Nothing here computes with them. The second module asks sympy for functions as soon as it is loaded.
DEFERRED = ("sympy", "onnx_ir._symbolic_shapes")


class _DeferringFinder(MetaPathFinder):
    """Finds what everybody finds, and has it executed at the first access to something in it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The usual spec with a lazy loader; None, which asks the next finder, for all but `DEFERRED`."""
        spec = PathFinder.find_spec(fullname, path, target) if fullname in DEFERRED else None
        if spec is not None and spec.loader is not None:
            spec.loader = LazyLoader(spec.loader)
        return spec


def defer_imports() -> None:
    """Makes this process load `DEFERRED` at their first use; what it loaded before stays as it is."""
    sys.meta_path.insert(0, _DeferringFinder())
