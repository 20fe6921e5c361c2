"""Export of large models: peak memory and wall time do not grow beyond what writing the bytes takes.

An 8B-shaped bf16 checkpoint (Llama 3.1 8B's config.json and shapes, 16 GB of random numbers) becomes a bf16 graph, and
TensorRT's bf16 graph without its engine; the time of a copy of the checkpoint's files is taken in the same run. All are
synced, and take turns. Peak memory is what the kernel counted for the finished process, mapped pages of the checkpoint
included. Then Llama 3.1 405B's config.json becomes a graph without weights: plain, all MLPs routed, and deepened by an
adapter of two layers with routers.

With --by-layer the checkpoint becomes an fp16 graph (a CPU has no bf16 kernels), and what is measured is its parity by
layer.

It needs room for the checkpoint and one copy of it, and removes what it wrote, also when it is stopped. With --sparse
the checkpoint takes none: its tensors are holes but for their heads, read from no disk, and zeros in the page cache.

    python -m benchmarks.export_size [--layers 32] [--rounds 1] [--sparse]
    python -m benchmarks.export_size --by-layer [--layers 32]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from benchmarks.common.measure import Samples, print_report, versions
from benchmarks.common.plain_copy import copy_command
from benchmarks.common.workspace import WORKSPACE, temporary_folder
from benchmarks.expand_memory import TiledTensor
from benchmarks.export_speed import run_once
from dlo_export.checkpoints.checkpoint_folder import save_model_tensors
from dlo_export.checkpoints.config import LlamaConfig
from dlo_export.checkpoints.files.disk_space import check_disk_space
from dlo_export.checkpoints.formats.huggingface_folder import SINGLE_FILE
from dlo_export.checkpoints.llama_layer import layer_tensor_name, router_name

COPY = "copy"
Cost = tuple[float, float]  # seconds, peak megabytes
BAR_MEGABYTES, BAR_COPIES, BAR_SECONDS = 500, 1.5, 20
_SHARED = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_key_value_heads": 8,
    "vocab_size": 128_256,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "tie_word_embeddings": False,
    "bos_token_id": 128_000,
    "eos_token_id": 128_001,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
}
LLAMA_8B = {
    **_SHARED,
    **{"hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "num_attention_heads": 32},
}
LLAMA_405B = {
    **_SHARED,
    **{"hidden_size": 16_384, "intermediate_size": 53_248, "num_hidden_layers": 126, "num_attention_heads": 128},
}
_HEAD = np.random.default_rng(0).standard_normal(4096).astype(ml_dtypes.bfloat16).tobytes()


def save_sparse(shapes: Mapping[str, tuple[int, ...]], path: Path) -> None:
    """Writes a safetensors file of bf16 tensors: a few numbers at the head of each, then a hole."""
    places: dict[str, tuple[int, int]] = {}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        places[name] = start, end
    entries = {name: {"dtype": "BF16", "shape": shapes[name], "data_offsets": places[name]} for name in shapes}
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for start, stop in places.values():
            file.seek(8 + len(header) + start)
            file.write(_HEAD[: stop - start])
        file.truncate(8 + len(header) + end)


def save_config(config: Mapping[str, Any], folder: Path) -> LlamaConfig:
    """Writes config.json into a new folder; returns it as it is read."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return LlamaConfig.from_json(folder / "config.json")


def save_checkpoint(config: Mapping[str, Any], folder: Path, *, sparse: bool) -> None:
    """Writes a checkpoint of the same random numbers over and over, its norms ones; or one that takes no disk."""
    shapes = save_config(config, folder).tensor_shapes()
    if sparse:
        save_sparse(shapes, folder / SINGLE_FILE)
        return
    tile = (np.random.default_rng(0).standard_normal(1 << 20, np.float32) * 0.02).astype(ml_dtypes.bfloat16)
    ones = np.ones(1, ml_dtypes.bfloat16)
    tensors = {name: TiledTensor(shape, tile if len(shape) > 1 else ones) for name, shape in shapes.items()}
    save_model_tensors(tensors, folder)


def save_sparse_adapter(config: LlamaConfig, folder: Path) -> None:
    """An adapter of two new layers, each a copy of the one before it, with a router."""
    folder.mkdir()
    new, depth = (32, 96), config.num_layers + 2
    layer = {name.removeprefix(layer_tensor_name(0, "")): shape for name, shape in config.tensor_shapes().items()}
    shapes = {
        layer_tensor_name(position, name): shape
        for position in new
        for name, shape in layer.items()
        if not name.startswith(("model.", "lm_head"))
    }
    save_sparse({**shapes, **{router_name(i): (1, config.hidden_size) for i in new}}, folder / "adapter.safetensors")
    injected = [{"position": position, "source": position - 1 - i, "init": "copy"} for i, position in enumerate(new)]
    values = {
        "format_version": 1,
        "routing": "mlp",
        "is_dlo": [index in new for index in range(depth)],
        "rescale_hidden_states": False,
        "scale_factor": 2.0,
        "scale_gap": 0.0,
        "injected_layers": injected,  # sources count in the model without new layers
    }
    (folder / "adapter_config.json").write_text(json.dumps(values))


def synced(command: list[str], output: Path, log: Path) -> Cost:
    """Runs a command and syncs what it wrote; returns seconds and peak megabytes. The output is removed again."""
    start = time.perf_counter()
    _, megabytes = run_once(command, log)
    for path in output.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    seconds = time.perf_counter() - start
    shutil.rmtree(output)
    return seconds, megabytes


def save_tensorrt_graph(model: Path, output: Path) -> None:
    """Writes the bf16 graph that an engine would be built from, its weights with it."""
    import onnx_ir as ir  # noqa: PLC0415 - of the measured process alone

    from dlo_export.exporter.pipeline import TensorRtOptions  # noqa: PLC0415
    from dlo_export.exporter.sources.source import open_source  # noqa: PLC0415
    from dlo_export.exporter.target_graphs import build_tensorrt_model  # noqa: PLC0415
    from dlo_export.exporter.weight_file import save_weights  # noqa: PLC0415

    output.mkdir()
    graph = build_tensorrt_model(open_source(str(model), None), TensorRtOptions("none"), ir.DataType.BFLOAT16)
    save_weights(graph, output / "model.onnx.data")
    ir.save(graph, output / "model.onnx")


def measure_8b(layers: int, rounds: int, folder: Path, *, sparse: bool) -> Iterator[tuple[str, list[Cost]]]:
    """By what was run, seconds and peak megabytes of each round; the copy first."""
    model, output, log = saved_8b(layers, folder, sparse=sparse), folder / "out", folder / "log"
    export = str(Path(sys.executable).parent / "dlo-export")
    plain = [export, str(model), "-o", str(output), "--dtype", "bf16", "--no-parity"]
    commands = {
        COPY: copy_command(model, output),
        "dlo-export --no-parity": plain,
        "--external-data-size 2GB": [*plain, "--external-data-size", "2GB"],
        "TensorRT's graph": [
            sys.executable,
            "-m",
            "benchmarks.export_size",
            "--tensorrt-graph",
            str(model),
            str(output),
        ],
    }
    costs: dict[str, list[Cost]] = {name: [] for name in commands}
    for number in range(rounds):
        for name in commands if number % 2 == 0 else reversed(commands):
            costs[name].append(synced(commands[name], output, log))
    yield from costs.items()


def saved_8b(layers: int, folder: Path, *, sparse: bool = False) -> Path:
    """The checkpoint, in a folder with room for a copy of it."""
    config = {**LLAMA_8B, "num_hidden_layers": layers}
    size = 2 * sum(math.prod(shape) for shape in LlamaConfig.from_dict(config, "8B").tensor_shapes().values())
    needed = (size if sparse else 2 * size) + (1 << 30)
    check_disk_space(folder, needed, WORKSPACE, "the checkpoint and a copy of it need")
    # By another process: what this one ever held would count as the commands', which start as copies of it.
    writer = ["-m", "benchmarks.export_size", "--layers", str(layers), "--write", str(folder / "8b")]
    subprocess.run([sys.executable, *writer, *(["--sparse"] if sparse else [])], check=True)
    return folder / "8b"


def measure_by_layer(layers: int, folder: Path) -> None:
    """Seconds, peak memory and verdict of parity by layer."""
    model, output, log = saved_8b(layers, folder), folder / "out", folder / "log"
    commands = Path(sys.executable).parent
    options = ["--dtype", "fp16", "--no-parity"]
    run_once([str(commands / "dlo-export"), str(model), "-o", str(output), *options], log)
    seconds, megabytes = run_once(
        [str(commands / "dlo"), "parity", str(output), str(model), "--by-layer", "--json"], log
    )
    said = log.read_text()
    report = json.loads(said[said.index("{") :])
    print_report(
        f"Parity by layer of an 8B-shaped fp16 graph, {layers} layers",
        ["verdict", "wall, s", "peak memory, MB"],
        [[report["verdict"], f"{seconds:.0f}", f"{megabytes:.0f}"]],
        {
            "layers": layers,
            "seconds": seconds,
            "megabytes": megabytes,
            "report": report,
            "versions": versions("dlo-export", "onnx-ir", "numpy", "torch", "onnxruntime"),
        },
    )


def measure_405b(rounds: int, folder: Path) -> Iterator[tuple[str, list[Cost]]]:
    """The same of graphs without weights."""
    routed = {"model_type": "llama_dlo_exattn", "is_dlo": True, "rescale_hidden_states": False}
    routed |= {"scale_factor": 2.0, "scale_gap": 0.0}
    plain = save_config(LLAMA_405B, folder / "405b")
    save_config({**LLAMA_405B, **routed}, folder / "405b-routed")
    save_sparse_adapter(plain, folder / "adapter")
    export = str(Path(sys.executable).parent / "dlo-export")
    output = folder / "out"
    for name, arguments in {
        "plain": [str(folder / "405b")],
        "routed": [str(folder / "405b-routed")],
        "two layers injected, routed": [str(folder / "405b"), "--adapter", str(folder / "adapter")],
        "routed, TensorRT's graph besides": [str(folder / "405b-routed"), "--trt"],
    }.items():
        command = [export, *arguments, "-o", str(output), "--dtype", "bf16", "--no-weights"]
        yield name, [synced(command, output, folder / "log") for _ in range(rounds)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=LLAMA_8B["num_hidden_layers"], help="of the 8B-shaped model")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--sparse", action="store_true", help="a checkpoint of holes, which takes no disk")
    parser.add_argument("--by-layer", action="store_true", help="only measure parity by layer")
    parser.add_argument("--write", type=Path, help="only write the checkpoint there")
    parser.add_argument("--tensorrt-graph", type=Path, nargs=2, metavar=("MODEL", "OUT"), help="only write that graph")
    arguments = parser.parse_args()
    if arguments.tensorrt_graph is not None:
        save_tensorrt_graph(*arguments.tensorrt_graph)
        return
    if arguments.write is not None:
        save_checkpoint({**LLAMA_8B, "num_hidden_layers": arguments.layers}, arguments.write, sparse=arguments.sparse)
        return
    with temporary_folder() as place:
        if arguments.by_layer:
            measure_by_layer(arguments.layers, place)
            return
        (place / "small").mkdir()
        small = dict(measure_405b(max(3, arguments.rounds), place / "small"))
        large = dict(measure_8b(arguments.layers, arguments.rounds, place, sparse=arguments.sparse))
    copy = Samples(np.array([seconds for seconds, _ in large[COPY]]))
    rows, ratios = [], {}
    for name, costs in {**large, **small}.items():
        seconds, megabytes = (Samples(np.array(column)) for column in zip(*costs, strict=True))
        if name in small:
            rows.append([f"405B, no weights, {name}", seconds, f"≤ {BAR_SECONDS}", megabytes, f"≤ {BAR_MEGABYTES}"])
        elif name == COPY:
            rows.append([f"8B, {arguments.layers} layers, {COPY}", seconds, "", megabytes, ""])
        else:
            ratios[name] = seconds / copy
            said = f"{ratios[name]} of the copy's, ≤ {BAR_COPIES}"
            rows.append([f"8B, {arguments.layers} layers, {name}", seconds, said, megabytes, f"≤ {BAR_MEGABYTES}"])
    print_report(
        "Export of large models, bf16",
        ["", "wall, s", "bar", "peak memory, MB", "bar"],
        rows,
        {
            "layers": arguments.layers,
            "sparse": arguments.sparse,
            "rounds": arguments.rounds,
            "costs": {name: [list(map(float, cost)) for cost in costs] for name, costs in {**large, **small}.items()},
            "copies": {name: samples.summary() for name, samples in ratios.items()},
            "versions": versions("dlo-export", "onnx-ir", "numpy"),
        },
    )


if __name__ == "__main__":
    main()
