"""The plugins for enterprise TensorRT's builder as quick-deploy plugins: their PTX goes into the engine.

An engine built with them needs no plugin library to run, in Python or C++. Importing this module registers them
(`plugins.registration.register_quick_deploy` does it); tensorrt.plugin reads the functions' own signatures, so operands
are spelled out here, in the schema's order and names. TensorRT calls `aot_impl` once per tactic, times the kernels on
the build's GPU, and keeps the faster.

The PTX is for compute capability 8.0: the driver compiles it for any later GPU, so the kernels are the portable ones,
without Hopper's and Blackwell's own matrix instructions. Needs a driver for PTX 8.8 (CUDA 12.9) or newer.
"""

# mypy: disable-error-code="untyped-decorator"
# No `from __future__ import annotations`: tensorrt.plugin needs the annotations themselves, not their text.
import enum
from collections.abc import Sequence
from typing import Any

import tensorrt.plugin as trtp

from dlo_export.checkpoints.dtypes import BY_NAME, BY_TENSORRT
from dlo_export.graph_passes.spec.ops import DOMAIN, PLUGIN_OPS
from dlo_export.plugins.contract import SIZES_HINT, T_DTYPES, size_problems, weight_input
from dlo_export.plugins.errors import PluginError
from dlo_export.plugins.ptx import ptx_of
from dlo_export.plugins.tiles import TILE_NAMES, TileName
from dlo_export.plugins.variants import Variant

PTX_TARGET = 80
Implementation = tuple[bytes, bytes, trtp.KernelLaunchParams, trtp.SymIntExprs]


class Tactic(enum.IntEnum):
    """The tiles TensorRT chooses from; a tactic must be positive."""

    DECODE = 1
    PREFILL = 2

    @property
    def tile(self) -> TileName:
        """The tile's name in plugins/tiles.py."""
        return TILE_NAMES[self - 1]


@trtp.register(f"{DOMAIN}::SkipGateUp")
def skip_gate_up(
    hidden_states: trtp.TensorDesc, scale: trtp.TensorDesc, gate_weight: trtp.TensorDesc, up_weight: trtp.TensorDesc
) -> trtp.TensorDesc:
    """T [batch, sequence, intermediate]."""
    batch, sequence, _ = hidden_states.shape_expr
    return trtp.from_shape_expr((batch, sequence, gate_weight.shape_expr[1]), hidden_states.dtype)


@trtp.autotune(f"{DOMAIN}::SkipGateUp")
def skip_gate_up_tactics(
    hidden_states: trtp.TensorDesc,
    scale: trtp.TensorDesc,
    gate_weight: trtp.TensorDesc,
    up_weight: trtp.TensorDesc,
    outputs: tuple[trtp.TensorDesc],
) -> list[trtp.AutoTuneCombination]:
    """Both tiles, T the same for all operands but scale."""
    return [_combination("SkipGateUp")]


@trtp.aot_impl(f"{DOMAIN}::SkipGateUp")
def skip_gate_up_kernel(
    hidden_states: trtp.TensorDesc,
    scale: trtp.TensorDesc,
    gate_weight: trtp.TensorDesc,
    up_weight: trtp.TensorDesc,
    outputs: tuple[trtp.TensorDesc],
    tactic: int,
) -> Implementation:
    """PTX and launch geometry."""
    return _implementation("SkipGateUp", (hidden_states, scale, gate_weight, up_weight), Tactic(tactic))


@trtp.register(f"{DOMAIN}::SkipDown")
def skip_down(
    gated: trtp.TensorDesc, scale: trtp.TensorDesc, down_weight: trtp.TensorDesc, residual: trtp.TensorDesc
) -> trtp.TensorDesc:
    """T [batch, sequence, hidden]."""
    batch, sequence, _ = gated.shape_expr
    return trtp.from_shape_expr((batch, sequence, down_weight.shape_expr[1]), gated.dtype)


@trtp.autotune(f"{DOMAIN}::SkipDown")
def skip_down_tactics(
    gated: trtp.TensorDesc,
    scale: trtp.TensorDesc,
    down_weight: trtp.TensorDesc,
    residual: trtp.TensorDesc,
    outputs: tuple[trtp.TensorDesc],
) -> list[trtp.AutoTuneCombination]:
    """Both tiles, T the same for all operands but scale."""
    return [_combination("SkipDown")]


@trtp.aot_impl(f"{DOMAIN}::SkipDown")
def skip_down_kernel(
    gated: trtp.TensorDesc,
    scale: trtp.TensorDesc,
    down_weight: trtp.TensorDesc,
    residual: trtp.TensorDesc,
    outputs: tuple[trtp.TensorDesc],
    tactic: int,
) -> Implementation:
    """PTX and launch geometry."""
    return _implementation("SkipDown", (gated, scale, down_weight, residual), Tactic(tactic))


def _combination(op_name: str) -> trtp.AutoTuneCombination:
    """Row-major tensors; "FP32|FP16|BF16" ties all operands that say so to one choice."""
    op = PLUGIN_OPS[op_name]
    any_t = "|".join(map(_combination_word, T_DTYPES))
    types = [
        any_t if operand.dtype == "T" else _combination_word(operand.dtype) for operand in (*op.inputs, *op.outputs)
    ]
    return trtp.AutoTuneCombination(", ".join(types), "LINEAR", [int(tactic) for tactic in Tactic])


def _combination_word(dtype: str) -> str:
    """What quick-deploy plugins call a type: "FP32", "FP16" or "BF16"."""
    return (BY_NAME[dtype].option or "").upper()


def _implementation(op_name: str, inputs: Sequence[Any], tactic: Tactic) -> Implementation:
    """Compiles the tactic's kernel; sizes stay symbolic, so that one kernel serves every shape of the profile."""
    op = PLUGIN_OPS[op_name]
    shapes = [[size.constant_value() if size.is_constant else -1 for size in desc.shape_expr] for desc in inputs]
    if problems := size_problems(op, shapes):
        raise PluginError("\n".join(problems), hint=SIZES_HINT)
    dtype = BY_TENSORRT[inputs[0].dtype.name].name
    variant = Variant(op_name, dtype, tactic.tile, PTX_TARGET)
    entry, ptx, threads, shared_bytes = ptx_of(variant)
    batch, sequence, _ = inputs[0].shape_expr
    tokens = batch * sequence
    depth, columns = inputs[weight_input(op)].shape_expr
    tile = variant.sizes
    launch = trtp.KernelLaunchParams()
    launch.grid_x = trtp.cdiv(tokens, tile.rows)
    launch.grid_y = trtp.cdiv(columns, tile.columns)
    launch.block_x = threads
    launch.shared_mem = shared_bytes
    integers = trtp.SymIntExprs.from_tuple([trtp.SymInt32(size) for size in (tokens, depth, columns)])
    return entry.encode(), ptx.encode(), launch, integers
