"""Put the bodies of model-local functions where they are called."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from dlo_export.graph_passes.errors import GraphPassError
from dlo_export.graph_passes.spec.pass_contract import GraphPass


@dataclasses.dataclass(frozen=True)
class InlineFunctionsPass(GraphPass):
    """Put the bodies of model-local functions where they are called, and drop the functions.

    Before::

        y = custom.mlp (x, w)
        custom.mlp (a, b) => (c) { c = MatMul (a, b) }

    After::

        y = MatMul (x, w)

    Layers are found by the operators they consist of, and a function's constants have no place in the data file.
    Optional: a graph without functions is left alone. Scope: the whole model.
    """

    def rewrite(self, model: ir.Model) -> bool:
        """Inline all of them.

        Raises:
            GraphPassError: A function calls itself, or of two domains' operator sets one function needs another version
                than the graph.
        """
        if not model.functions:
            return False
        try:
            InlinePass()(model)
        except (ir.passes.InvariantError, ir.passes.PassError, ValueError) as err:
            raise GraphPassError(
                f"InlineFunctionsPass: the model-local functions cannot be inlined: {err.__cause__ or err}",
                hint="export the graph without functions",
            ) from err
        model.functions.clear()
        return True
