"""The dlo kernels on a GPU against NumPy, one way of launching them per process, since a fault ends a process' GPU.

Prints a JSON line per operator and type: how many cases, the largest error, and what failed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np

from benchmarks.gpu.kernel_cases import LARGEST_ERROR, POISON, Case, cases, operands, reference, scales
from dlo_export.graph_passes.spec.ops import PLUGIN_OPS
from dlo_export.plugins.contract import weight_input
from dlo_export.plugins.tiles import TILE_NAMES, TileName

Launch = Callable[..., None]
"""Takes the schema's inputs and the output, as tensors on the device."""
REPLAYED: tuple[str, ...] = ("random", "none", "all", "alternating", "one")


def judged(found: Iterable[tuple[Case, np.ndarray]], way: str, what: str) -> dict[str, Any]:
    """One row of many cases.

    Args:
        found: What came out of each.
        way: That they were launched.
        what: The way in more words, for people.
    """
    count, largest, failed = 0, 0.0, []
    facts: dict[str, Any] = {}
    for case, output in found:
        verdict = case.judge(output)
        count += 1
        largest = max(largest, verdict["error"])
        facts = {"op": case.op_name, "dtype": case.dtype, "bar": LARGEST_ERROR[case.dtype]}
        if not verdict["passed"]:
            failed.append(f"{case.name}: {verdict}")
    return {
        "what": f"{what}: against NumPy",
        "passed": bool(count) and not failed,
        "kind": "right",
        "way": way,
        **facts,
        "cases": count,
        "largest_error": largest,
        "failed": failed[:6],
    }


def on_device(case: Case, launch: Launch) -> np.ndarray:
    """Uploads, poisons, launches, and brings the output back."""
    import torch  # noqa: PLC0415 - heavy

    inputs = [as_tensor(array) for array in case.inputs]
    output = poisoned(case)
    launch(*inputs, output)
    torch.cuda.synchronize()
    return as_array(output, case)


def replayed(case: Case, launch: Launch, device_scales: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Captures one launch and replays it with other decisions, the output poisoned before each."""
    import torch  # noqa: PLC0415 - heavy

    inputs = [as_tensor(array) for array in case.inputs]
    output = poisoned(case)
    launch(*inputs, output)  # loads and compiles, which a capture forbids
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch(*inputs, output)
    outputs = []
    for scale in device_scales:
        inputs[1].copy_(torch.from_numpy(scale))
        output.view(torch.uint8).fill_(POISON)
        graph.replay()
        torch.cuda.synchronize()
        outputs.append(as_array(output, case))
    return outputs


def replay_case(op_name: str, dtype: str, tile: TileName) -> tuple[Case, list[Case]]:
    """What is captured, and a case for each replay; skipped tokens' rows hold numbers, since decisions change."""
    rng = np.random.default_rng(5)
    batch, sequence = {"decode": (4, 3), "prefill": (2, 50)}[tile]
    decisions = [scales(rng, mask, batch, sequence) for mask in REPLAYED]
    inputs = operands(rng, op_name, dtype, np.ones((batch, sequence), np.float32), 136, 264)
    replays = []
    for number, scale in enumerate(decisions):
        changed = (inputs[0], scale, *inputs[2:])
        name = f"{op_name}_{dtype}_{tile}_replay{number}"
        replays.append(Case(name, op_name, dtype, tile, REPLAYED[number], changed, reference(op_name, changed)))
    return replays[0], replays


def as_tensor(array: np.ndarray) -> Any:
    """On the device, bit for bit."""
    import torch  # noqa: PLC0415 - heavy

    bits = np.ascontiguousarray(array).view({2: np.int16, 4: np.int32}[array.itemsize])
    return torch.from_numpy(bits.copy()).cuda().view(getattr(torch, str(array.dtype)))


def poisoned(case: Case) -> Any:
    """An output of the case on the device."""
    import torch  # noqa: PLC0415 - heavy

    dtype = getattr(torch, case.dtype)
    flat = torch.full((case.expected.nbytes,), POISON, dtype=torch.uint8, device="cuda")
    return flat.view(dtype).reshape(case.expected.shape)


def as_array(tensor: Any, case: Case) -> np.ndarray:
    """From the device, bit for bit."""
    import torch  # noqa: PLC0415 - heavy

    bits = tensor.contiguous().view(torch.uint8).cpu().numpy()
    array: np.ndarray = bits.view(case.expected.dtype).reshape(case.expected.shape)
    return array


def by_jit(dtype: str, tile: TileName) -> Iterator[dict[str, Any]]:
    """Triton compiles the kernels here."""
    from dlo_export.plugins.kernels import launch  # noqa: PLC0415 - imports triton

    for op_name in PLUGIN_OPS:

        def run(*tensors: Any, op_name: str = op_name) -> None:
            launch(op_name, *tensors, dtype=dtype, tile_name=tile)

        yield from _rows("Triton JIT", op_name, dtype, tile, run)


def by_image(folder: Path) -> Iterator[dict[str, Any]]:
    """The driver loads what was compiled elsewhere: cubins, and PTX that it compiles itself."""
    import torch  # noqa: PLC0415 - heavy

    from benchmarks.gpu.kernel_launch import LoadedImage, RefusedError  # noqa: PLC0415
    from benchmarks.kernel_images import images_in  # noqa: PLC0415

    torch.zeros(1, device="cuda")  # makes the context
    words = {"table": "cubin", "portable": "PTX for sm_80", "own": "PTX for sm_90a"}
    for image in images_in(folder):
        if image.kind not in words:
            continue
        way = words[image.kind]
        try:
            loaded = LoadedImage(image, folder)
        except RefusedError as err:
            # a driver older than the compiler cannot take the newest PTX: a fact, not a fault of the kernel
            yield {
                "what": f"{way}, {image.tile}: refused",
                "passed": None if image.kind == "own" else False,
                **({} if image.kind == "own" else {"kind": "right", "way": way}),
                "file": image.file,
                "error": str(err),
            }
            continue
        yield from _rows(way, image.op_name, image.dtype, image.tile, loaded)


def _rows(way: str, op_name: str, dtype: str, tile: TileName, launch: Launch) -> Iterator[dict[str, Any]]:
    what = f"{way}, {tile}"
    yield judged(((case, on_device(case, launch)) for case in cases(op_name, dtype, tile)), way, what)
    captured, replays = replay_case(op_name, dtype, tile)
    outputs = replayed(captured, launch, [case.scale for case in replays])
    yield judged(zip(replays, outputs, strict=True), way, f"{what}, replays with other decisions")


def by_library(library: Path, host: Path, sanitizer: str | None = None) -> Iterator[dict[str, Any]]:
    """libdlo_plugins.so, by a program that creates its plugins, captures, and replays.

    Args:
        library: libdlo_plugins.so.
        host: benchmarks/plugin_host.cpp, built.
        sanitizer: compute-sanitizer: one small case of each operator and tile runs under its memcheck.
    """
    with tempfile.TemporaryDirectory(prefix="dlo-plugin-host-") as name:
        folder = Path(name)
        launches = list(_library_launches(small=sanitizer is not None))
        (folder / "cases.txt").write_text("".join(_write_launch(folder, *launch) for launch in launches))
        command = [str(host), str(library), str(folder)]
        if sanitizer is not None:
            command = [sanitizer, "--tool", "memcheck", "--error-exitcode", "9", *command]
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
        said = (result.stdout + result.stderr)[-1500:]
        what = "libdlo_plugins.so by a C++ host" + (" under compute-sanitizer memcheck" if sanitizer else "")
        way = "compute-sanitizer" if sanitizer else "libdlo_plugins.so"
        row: dict[str, Any] = {"what": what, "kind": "right", "way": way}
        if result.returncode:
            yield {**row, "passed": False, "exit_code": result.returncode, "said": said}
            return
        if sanitizer is not None:
            yield {**row, "passed": "ERROR SUMMARY: 0 errors" in said, "said": said[-300:]}
        for op_name in PLUGIN_OPS:
            for dtype in LARGEST_ERROR:
                found = [
                    (case, _read_output(folder, captured, number, case))
                    for captured, replays in launches
                    for number, case in enumerate(replays)
                    if (case.op_name, case.dtype) == (op_name, dtype)
                ]
                if found:
                    yield judged(found, way, what)


def _library_launches(small: bool) -> Iterator[tuple[Case, list[Case]]]:
    """What is captured once, and its replays."""
    for op_name in PLUGIN_OPS:
        for dtype in ["bfloat16"] if small else LARGEST_ERROR:
            for tile in TILE_NAMES:
                yield replay_case(op_name, dtype, tile)
                if not small:
                    yield from ((case, [case]) for case in cases(op_name, dtype, tile))


def _write_launch(folder: Path, captured: Case, replays: Sequence[Case]) -> str:
    """Writes a launch's inputs; returns its line of cases.txt."""
    op = PLUGIN_OPS[captured.op_name]
    for operand, array in zip(op.inputs, captured.inputs, strict=True):
        if operand.name != "scale":
            (folder / f"{captured.name}.{operand.name}.bin").write_bytes(array.tobytes())
    for number, case in enumerate(replays):
        (folder / f"{captured.name}.scale.{number}.bin").write_bytes(case.scale.tobytes())
    batch, sequence = captured.scale.shape
    depth, columns = captured.inputs[weight_input(op)].shape
    return f"{captured.name} {captured.op_name} {captured.dtype} {batch} {sequence} {depth} {columns} {len(replays)}\n"


def _read_output(folder: Path, captured: Case, number: int, case: Case) -> np.ndarray:
    data = (folder / f"{captured.name}.output.{number}.bin").read_bytes()
    return np.frombuffer(data, case.expected.dtype).reshape(case.expected.shape)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jit", nargs=2, metavar=("DTYPE", "TILE"), help="Triton compiles here")
    parser.add_argument("--cubins", type=Path, help="folder of benchmarks.kernel_images")
    parser.add_argument("--library", type=Path, help="libdlo_plugins.so")
    parser.add_argument("--host", type=Path, help="the program plugin_host")
    parser.add_argument("--sanitizer", help="compute-sanitizer, to run the host under")
    options = parser.parse_args(arguments)
    if options.jit or options.cubins:
        from dlo_export.modeling.devices import torch_device  # noqa: PLC0415 - brings PyTorch, which a host needs none of
    if options.jit:
        dtype, tile = options.jit
        for value, known in ((dtype, tuple(LARGEST_ERROR)), (tile, get_args(TileName))):
            if value not in known:
                parser.error(f"argument --jit: {value!r} is none of {', '.join(known)}")
        torch_device("cuda")
        rows = by_jit(dtype, cast(TileName, tile))
    elif options.cubins:
        torch_device("cuda")
        rows = by_image(options.cubins)
    elif None in (options.library, options.host):
        parser.error("give --jit, --cubins, or --library with --host")
    else:
        rows = by_library(options.library, options.host, options.sanitizer)
    for row in rows:
        print(json.dumps(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
