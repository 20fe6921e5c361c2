"""Compiles the Triton kernels to PTX and cubin for named GPUs, on a machine that needs none.

`python -m plugins.compile` prints what the compiler reports for every variant; `--output DIR` also writes the files.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import itertools
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from graph_passes.ops import PLUGIN_OPS
from plugins.contract import T_DTYPES, WIDTH_MULTIPLE, operand_dtypes
from plugins.errors import PluginError
from plugins.tiles import TileName, tile_of

TARGETS: Final = (80, 86, 89, 90, 100, 120)
"""Compute capabilities, tens and units: A100, consumer Ampere, Ada, Hopper, Blackwell (data centre, consumer)."""

_POINTEE: Final = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
_POINTER_ALIGNMENT: Final = 16  # TensorRT aligns tensors to 256 bytes


@dataclasses.dataclass(frozen=True)
class Variant:
    """One compilation of one kernel.

    Attributes:
        op_name: The operator.
        dtype: T, as the schema names it.
        tile: Name of the tile.
        target: Compute capability, such as 89.
    """

    op_name: str
    dtype: str
    tile: TileName
    target: int

    @property
    def name(self) -> str:
        """Stem of the variant's files."""
        return f"{self.op_name}_{self.dtype}_{self.tile}_sm{self.target}"


@dataclasses.dataclass(frozen=True)
class CompiledKernel:
    """A variant's code and what the compiler reports of it.

    Attributes:
        variant: What was compiled.
        entry: Name of the kernel in PTX and cubin. Its parameters are the inputs, three int32, the output.
        ptx: Text.
        cubin: ELF for this target alone; of sm_80 to sm_89 also for later minor versions.
        threads: Per program.
        shared_bytes: Dynamic shared memory the launch asks for.
        registers: Per thread.
        stack_bytes: Of local memory per thread.
        spill_bytes: Stored to and loaded from local memory, together.
    """

    variant: Variant
    entry: str
    ptx: str
    cubin: bytes
    threads: int
    shared_bytes: int
    registers: int
    stack_bytes: int
    spill_bytes: int


def variants(
    targets: Iterable[int] = TARGETS,
    dtypes: Iterable[str] = T_DTYPES,
    tiles: Iterable[TileName] = ("decode", "prefill"),
) -> list[Variant]:
    """Every combination of operator, dtype, tile and target."""
    return [Variant(*choice) for choice in itertools.product(PLUGIN_OPS, dtypes, tiles, targets)]


def ptx_of(variant: Variant) -> tuple[str, str, int, int]:
    """Compiles a kernel with Triton.

    Returns:
        Entry name, PTX without Triton's scratch parameters, threads per program, bytes of shared memory.
    """
    import triton  # noqa: PLC0415 - heavy
    from triton import knobs  # noqa: PLC0415
    from triton.backends.compiler import GPUTarget  # noqa: PLC0415

    from plugins.kernels import INTEGERS, KERNELS  # noqa: PLC0415 - imports triton

    if "TRITON_INTERPRET" in os.environ:
        raise PluginError(
            "compiling plugins: TRITON_INTERPRET is set, so Triton interprets and cannot compile",
            hint="unset TRITON_INTERPRET for this command",
        )
    op, kernel = PLUGIN_OPS[variant.op_name], KERNELS[variant.op_name]
    tile = tile_of(variant.op_name, variant.tile, variant.dtype)
    pointers = [f"*{_POINTEE[dtype]}" for dtype in operand_dtypes(op, variant.dtype)]
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


def compile_kernel(variant: Variant) -> CompiledKernel:
    """PTX by Triton, cubin and resource report by the ptxas that Triton brings."""
    entry, ptx, threads, shared_bytes = ptx_of(variant)
    with tempfile.TemporaryDirectory(prefix="dlo-ptxas-") as folder:
        source, image = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        source.write_text(ptx)
        architecture = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
        assert architecture is not None, "PTX names its target"
        command = [*_ptxas(variant.target), f"--gpu-name={architecture[1]}", str(source), "-o", str(image)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            raise PluginError(
                f"ptxas refused {variant.name}:\n{result.stderr.strip()}",
                hint="please report this with Triton's version",
            )
        cubin = image.read_bytes()
    report = result.stderr + result.stdout

    def figure(pattern: str) -> int:
        match = re.search(pattern, report)
        if match is None:
            raise PluginError(
                f"ptxas reports nothing like '{pattern}' for {variant.name}:\n{report}",
                hint="please report this with Triton's version",
            )
        return int(match[1])

    return CompiledKernel(
        variant,
        entry,
        ptx,
        cubin,
        threads,
        shared_bytes,
        registers=figure(r"Used (\d+) registers"),
        stack_bytes=figure(r"(\d+) bytes stack frame"),
        spill_bytes=figure(r"(\d+) bytes spill stores") + figure(r"(\d+) bytes spill loads"),
    )


def compile_all(wanted: Sequence[Variant], workers: int | None = None) -> list[CompiledKernel]:
    """Compiles variants in parallel processes, in the order given.

    Args:
        wanted: What to compile.
        workers: Processes; by default one per processor.
    """
    # a fresh interpreter per worker: Triton's compiler holds threads, which a fork would lose
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers or os.cpu_count(), mp_context=context) as pool:
        return list(pool.map(compile_kernel, wanted))


def resource_table(kernels: Iterable[CompiledKernel]) -> str:
    """Markdown: registers, shared memory, spills and code size of each variant."""
    lines = [
        "| operator | T | tile | target | threads | registers | shared memory, bytes | spills, bytes | cubin, bytes |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {k.variant.op_name} | {k.variant.dtype} | {k.variant.tile} | sm_{k.variant.target} | {k.threads} "
        f"| {k.registers} | {k.shared_bytes:,} | {k.spill_bytes} | {len(k.cubin):,} |"
        for k in kernels
    ]
    return "\n".join(lines)


def write_kernels(kernels: Iterable[CompiledKernel], folder: Path) -> None:
    """Writes `<variant>.ptx` and `<variant>.cubin` of each."""
    folder.mkdir(parents=True, exist_ok=True)
    for kernel in kernels:
        (folder / f"{kernel.variant.name}.ptx").write_text(kernel.ptx)
        (folder / f"{kernel.variant.name}.cubin").write_bytes(kernel.cubin)


def _ptxas(target: int) -> list[str]:
    """Triton's choice of its two ptxas (the one named blackwell is the newer, used from Hopper on) and its flags."""
    from triton import knobs  # noqa: PLC0415 - heavy

    tool = knobs.nvidia.ptxas if target < 90 else knobs.nvidia.ptxas_blackwell
    return [tool.path, "-v", "--regAllocOptLevel=2"]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m plugins.compile", description=__doc__)
    parser.add_argument("--output", type=Path, help="folder for PTX and cubins")
    parser.add_argument("--op", action="append", choices=list(PLUGIN_OPS), help="default: all")
    parser.add_argument("--target", type=int, action="append", choices=TARGETS, help="default: all")
    parser.add_argument("--dtype", action="append", choices=T_DTYPES, help="default: all")
    options = parser.parse_args(arguments)
    wanted = [
        variant
        for variant in variants(options.target or TARGETS, options.dtype or T_DTYPES)
        if variant.op_name in (options.op or PLUGIN_OPS)
    ]
    try:
        kernels = compile_all(wanted)
    except PluginError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(resource_table(kernels))
    if options.output:
        write_kernels(kernels, options.output)
        print(f"wrote {2 * len(kernels)} files to {options.output}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
