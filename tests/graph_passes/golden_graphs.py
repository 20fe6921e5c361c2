"""What each pass makes of a one-layer Llama, as text to be read.

After a deliberate change of a pass, write the golden files anew and read the difference before committing it:

    python -m tests.graph_passes.golden_graphs
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from dlo_export.graph_passes.cache.grow_cache_outside_attention import GrowCacheOutsideAttentionPass
from dlo_export.graph_passes.cache.use_static_cache import UseStaticCachePass
from dlo_export.graph_passes.cleanup.attend_active_queries import AttendActiveQueriesPass
from dlo_export.graph_passes.cleanup.fuse_sibling_matmuls import FuseSiblingMatMulsPass
from dlo_export.graph_passes.cleanup.keep_last_logits import KeepLastLogitsPass
from dlo_export.graph_passes.cleanup.name_batch_dimension import NameBatchDimensionPass
from dlo_export.graph_passes.cleanup.scatter_packed_rows import ScatterPackedRowsPass
from dlo_export.graph_passes.depth.remove_identity_layers import RemoveIdentityLayersPass
from dlo_export.graph_passes.lowerings.lower_skip_to_compaction import LowerSkipToCompactionPass
from dlo_export.graph_passes.lowerings.lower_skip_to_if import LowerSkipToIfPass
from dlo_export.graph_passes.lowerings.lower_skip_to_plugin import LowerSkipToPluginPass
from dlo_export.graph_passes.lowerings.lower_skip_to_topk import LowerSkipToTopKPass
from dlo_export.graph_passes.routing.decide_by_logits import DecideByLogitsPass
from dlo_export.graph_passes.routing.expose_routing import ExposeRoutingPass
from dlo_export.graph_passes.routing.fuse_router_gather import FuseRouterGatherPass
from dlo_export.graph_passes.routing.keep_part import KeepPartPass
from dlo_export.graph_passes.routing.multiply_router_rows import MultiplyRouterRowsPass
from dlo_export.graph_passes.routing.reduce_router_products import ReduceRouterProductsPass
from dlo_export.graph_passes.routing.route_layers import RouteLayersPass
from tests.graph_passes.injections import injection_pass

FOLDER = Path(__file__).parent / "golden"
SOURCE = FOLDER / "one_layer_llama.onnxtxt"
ROUTERS = {0: np.array([0.8, -0.4, 0.3, 0.9], np.float32)}

_ROUTE = RouteLayersPass(ROUTERS, rescale=True, scale_factor=2.0, scale_gap=0.5)
_ROUTE_UNSCALED = RouteLayersPass(ROUTERS)
_ROUTE_WHOLE = dataclasses.replace(_ROUTE, kind="layer")
_ROUTE_ATTENTION = dataclasses.replace(_ROUTE, kind="attention")
_ROUTE_ACTIVE = dataclasses.replace(_ROUTE, kind="attention-active")
# Each golden is what its last pass makes of the graph the passes before it leave.
GOLDENS: dict[str, tuple[ir.passes.InPlacePass, ...]] = {
    "inject_layers": (injection_pass(ir.from_onnx_text(SOURCE.read_text(encoding="utf-8")), [(1, 0)], "zero_out"),),
    "remove_identity_layers": (
        injection_pass(ir.from_onnx_text(SOURCE.read_text(encoding="utf-8")), [(0, 0), (2, 0)], "zero_out"),
        RemoveIdentityLayersPass((0, 2)),
    ),
    "route_layers": (_ROUTE,),
    "route_whole_layers": (_ROUTE_WHOLE,),
    "lower_skip_to_compaction": (_ROUTE, LowerSkipToCompactionPass()),
    "lower_skip_to_if": (_ROUTE, LowerSkipToIfPass(reduce_bool=True)),
    "lower_whole_layers_to_compaction": (_ROUTE_WHOLE, LowerSkipToCompactionPass()),
    "lower_whole_layers_to_if": (_ROUTE_WHOLE, LowerSkipToIfPass()),
    "route_attention": (_ROUTE_ATTENTION,),
    "route_attention_active": (_ROUTE_ACTIVE,),
    "lower_attention_to_compaction": (_ROUTE_ATTENTION, LowerSkipToCompactionPass()),
    "lower_attention_to_if": (_ROUTE_ATTENTION, LowerSkipToIfPass()),
    "decide_by_logits": (_ROUTE_UNSCALED, LowerSkipToIfPass(reduce_bool=True), DecideByLogitsPass()),
    "multiply_router_rows": (_ROUTE, LowerSkipToCompactionPass(), MultiplyRouterRowsPass()),
    "decide_by_rows": (
        dataclasses.replace(_ROUTE_UNSCALED, kind="layer"),
        LowerSkipToIfPass(reduce_bool=True),
        MultiplyRouterRowsPass(),
        DecideByLogitsPass(),
    ),
    "expose_routing": (_ROUTE, LowerSkipToCompactionPass(), ExposeRoutingPass(force=True)),
    "keep_part": (_ROUTE, ExposeRoutingPass(force=True), KeepPartPass(1)),
    "fuse_sibling_matmuls": (FuseSiblingMatMulsPass(),),
    "scatter_packed_rows": (
        _ROUTE_WHOLE,
        LowerSkipToCompactionPass(),
        FuseSiblingMatMulsPass(),
        ScatterPackedRowsPass(),
    ),
    "attend_active_queries": (_ROUTE_ATTENTION, LowerSkipToCompactionPass(), AttendActiveQueriesPass()),
    "attend_active_keys": (_ROUTE_WHOLE, LowerSkipToCompactionPass(), AttendActiveQueriesPass()),
    "name_batch_dimension": (NameBatchDimensionPass(),),
    "use_static_cache": (UseStaticCachePass(8),),
    "use_static_cache_with_activity": (_ROUTE_WHOLE, UseStaticCachePass(8)),
    "lower_static_cache_to_topk": (_ROUTE_WHOLE, UseStaticCachePass(8), LowerSkipToTopKPass(16)),
    "lower_static_cache_to_if": (_ROUTE_WHOLE, UseStaticCachePass(8), LowerSkipToIfPass()),
    "grow_cache_outside_attention": (GrowCacheOutsideAttentionPass(),),
    "keep_last_logits": (UseStaticCachePass(8), KeepLastLogitsPass()),
    "reduce_router_products": (_ROUTE, ReduceRouterProductsPass()),
    "lower_skip_to_topk": (_ROUTE, LowerSkipToTopKPass(16)),
    "lower_skip_to_plugin": (_ROUTE, LowerSkipToPluginPass()),
    "fuse_router_gather": (_ROUTE, LowerSkipToCompactionPass(), FuseRouterGatherPass()),
}


def source_text() -> str:
    """The one-layer Llama every golden starts from."""
    return SOURCE.read_text(encoding="utf-8")


def golden_graph(name: str) -> ir.Model:
    """The graph of a golden."""
    model = ir.from_onnx_text(source_text())
    for pass_ in GOLDENS[name]:
        pass_(model)
    return model


def golden_feeds(names: list[str], batch: int = 2, sequence: int = 4, past: int = 3) -> dict[str, np.ndarray]:
    """Inputs of a golden graph, some left padding among them."""
    rng = np.random.default_rng(0)
    attention_mask = np.ones((batch, past + sequence), np.int64)
    attention_mask[0, :2] = 0
    feeds = {
        "input_ids": rng.integers(0, 5, (batch, sequence)),
        "attention_mask": attention_mask,
        "position_ids": np.tile(np.arange(past, past + sequence), (batch, 1)),
    }
    for name in names:
        if name.startswith("past_key_values"):
            feeds[name] = rng.standard_normal((batch, 1, past, 2)).astype(np.float32)
        elif name.startswith("past_active"):
            feeds[name] = rng.random((batch, past)) < 0.5
        elif name.startswith("force_active"):
            feeds[name] = np.ones((batch, sequence), bool)
    return feeds


def golden_text(model: ir.Model) -> str:
    """Interface, weights by shape, small constants by value, nodes: what a reader needs, without node names."""
    graph = model.graph
    proto = ir.to_proto(model).graph
    lines = [f"in   {_typed(value)}" for value in graph.inputs]
    lines += [f"out  {_typed(value)}" for value in graph.outputs]
    for name, value in graph.initializers.items():
        contents = value.const_value.numpy()
        shown = f" = {contents.tolist()}" if contents.size <= 1 else ""
        lines.append(f"init {value.dtype.name} {list(contents.shape)} {name}{shown}")
    for node in proto.node:
        _clear_names(node)
        lines.append(onnx.printer.to_text(node).strip().replace('"', ""))
    return "\n".join(lines) + "\n"


def _clear_names(node: onnx.NodeProto) -> None:
    node.ClearField("name")
    for attribute in node.attribute:
        for inner in attribute.g.node:
            _clear_names(inner)


def _typed(value: ir.Value) -> str:
    return f"{value.dtype.name} {value.shape} {value.name}"


if __name__ == "__main__":
    argparse.ArgumentParser(description="Writes the goldens anew, to be read before they are committed.").parse_args()
    for golden in GOLDENS:
        (FOLDER / f"{golden}.txt").write_text(golden_text(golden_graph(golden)), encoding="utf-8")
