"""Compiles the Triton kernels to PTX and cubin for named GPUs, on a machine that needs none.

`python -m dlo_export.plugins.compile` prints what the compiler reports for every variant; `--output DIR`
also writes the files.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from dlo_export.graph_passes.spec.ops import PLUGIN_OPS
from dlo_export.plugins.contract import T_DTYPES
from dlo_export.plugins.errors import PluginError
from dlo_export.plugins.ptx import ptx_of
from dlo_export.plugins.variants import TARGETS, Variant, variants


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


def compile_kernel(variant: Variant) -> CompiledKernel:
    """PTX by Triton, cubin and resource report by the ptxas that Triton brings.

    Raises:
        PluginError: As `ptx_of`; or ptxas refuses the PTX, or reports in other words than those that are known.
    """
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


def compile_all(wanted: Sequence[Variant]) -> list[CompiledKernel]:
    """Compiles variants in parallel processes, one per processor, in the order given."""
    # a fresh interpreter per worker: Triton's compiler holds threads, which a fork would lose
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
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
    """Writes `<variant>.ptx` and `<variant>.cubin` of each into an existing folder."""
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
    parser = argparse.ArgumentParser(prog="python -m dlo_export.plugins.compile", description=__doc__)
    parser.add_argument("--output", type=Path, help="folder for PTX and cubins")
    parser.add_argument("--op", action="append", choices=list(PLUGIN_OPS), help="default: all")
    parser.add_argument("--target", type=int, action="append", choices=TARGETS, help="default: all")
    parser.add_argument("--dtype", action="append", choices=T_DTYPES, help="default: all")
    options = parser.parse_args(arguments)
    wanted = variants(options.target or TARGETS, options.dtype or T_DTYPES, ops=options.op or PLUGIN_OPS)
    try:
        if options.output:
            options.output.mkdir(parents=True, exist_ok=True)  # before the work, which takes minutes
        kernels = compile_all(wanted)
    except (PluginError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(resource_table(kernels))
    if options.output:
        write_kernels(kernels, options.output)
        print(f"wrote {2 * len(kernels)} files to {options.output}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
