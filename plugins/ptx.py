"""The Triton kernels as PTX that takes a kernel's own parameters and no others."""

from __future__ import annotations

import os
import re
from typing import Final

from dlo_export.checkpoints.dtypes import BY_NAME
from dlo_export.graph_passes.spec.ops import ORT_OPS, WIDTH_MULTIPLE
from dlo_export.plugins.contract import operand_dtypes
from dlo_export.plugins.errors import PluginError
from dlo_export.plugins.variants import Variant

_POINTER_ALIGNMENT: Final = 16  # TensorRT aligns tensors to 256 bytes


def ptx_of(variant: Variant) -> tuple[str, str, int, int]:
    """Compiles a kernel with Triton.

    Returns:
        Entry name, PTX without Triton's scratch parameters, threads per program, bytes of shared memory.

    Raises:
        PluginError: Triton interprets instead, or the kernel uses memory that its caller does not give.
    """
    import triton  # noqa: PLC0415 - heavy
    from triton import knobs  # noqa: PLC0415
    from triton.backends.compiler import GPUTarget  # noqa: PLC0415

    from dlo_export.plugins.kernels import INTEGERS, KERNELS  # noqa: PLC0415 - imports triton

    if "TRITON_INTERPRET" in os.environ:
        raise PluginError(
            "compiling plugins: TRITON_INTERPRET is set, so Triton interprets and cannot compile",
            hint="unset TRITON_INTERPRET for this command",
        )
    op, kernel = ORT_OPS[variant.op_name], KERNELS[variant.op_name]
    tile = variant.sizes
    # Triton has the same words for these types as `--dtype`.
    pointers = [f"*{BY_NAME[dtype].option}" for dtype in operand_dtypes(op, variant.dtype)]
    inputs = len(op.inputs)
    types = [*pointers[:inputs], *["i32"] * INTEGERS, *pointers[inputs:]]
    constants = {**tile.constants(), "UPCAST": False}
    # tokens, the first integer, is any number; the two widths let weights be loaded as vectors
    divisors = {index: _POINTER_ALIGNMENT for index, type_ in enumerate(types) if type_.startswith("*")}
    divisors |= dict.fromkeys(range(inputs + 1, inputs + INTEGERS), WIDTH_MULTIPLE)
    names = kernel.arg_names
    source = triton.compiler.ASTSource(
        fn=kernel,
        signature={**dict(zip(names, types, strict=False)), **dict.fromkeys(constants, "constexpr")},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(index,): [["tt.divisibility", divisor]] for index, divisor in divisors.items()},
    )
    with knobs.compilation.scope():
        knobs.compilation.disable_line_info = True  # most of a cubin, and names folders of this machine
        compiled = triton.compile(
            source,
            target=GPUTarget("cuda", variant.target, 32),
            options={"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True},
        )
    metadata = compiled.metadata
    ptx = without_scratch_parameters(compiled.asm["ptx"], len(types))
    return metadata.name, ptx, metadata.num_warps * 32, metadata.shared


def without_scratch_parameters(ptx: str, parameters: int) -> str:
    """PTX whose kernel takes its own parameters alone.

    Triton appends pointers to scratch memory that these kernels never touch. TensorRT's quick-deploy plugins pass
    inputs, integers and outputs and nothing behind them, so a kernel with more parameters would read past their end.

    Args:
        ptx: Of one kernel.
        parameters: How many it has of its own.

    Raises:
        PluginError: A parameter behind the kernel's own is used, or it has fewer than its own.
    """
    start, end = ptx.index("(", ptx.index(".entry")), ptx.index(")\n", ptx.index(".entry"))
    declared = ptx[start + 1 : end].split(",")
    if len(declared) < parameters:
        raise PluginError(
            f"compiled kernel: it has {len(declared)} parameters; expected at least {parameters}",
            hint="please report this with Triton's version",
        )
    for scratch in (declaration.split()[-1] for declaration in declared[parameters:]):
        if re.search(rf"\b{scratch}\b", ptx[end:]):
            raise PluginError(
                f"compiled kernel: it reads its scratch parameter {scratch}; expected no use of scratch memory",
                hint="a kernel of this folder must not use tensor descriptors, global scratch or profiling",
            )
    return ptx[: start + 1] + ",".join(declared[:parameters]) + "\n" + ptx[end:]
