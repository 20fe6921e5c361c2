"""Export of an 8B-shaped Q4_0 GGUF file as fp32: peak memory and wall time of `dlo-export --no-parity`.

The file is synthetic: the shapes of Llama 3 8B with a head of its own (128,256 × 4,096), random 4-bit blocks. A layer
takes 0.9 GB of disk in fp32, embedding and head 4.2 GB; memory does not depend on the number of layers.

    python -m benchmarks.gguf_export [--layers 32]
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, quant_shape_to_byte_shape

from benchmarks.common.measure import print_report, versions
from benchmarks.common.workspace import WORKSPACE, temporary_folder
from benchmarks.export_speed import run_once
from dlo_export.checkpoints.files.disk_space import check_disk_space
from dlo_export.checkpoints.llama_layer import GGUF_OUTER_NAMES, LLAMA_LAYER

BAR_MEGABYTES = 500
VOCABULARY = 128_256
SIZES = {"hidden": 4096, "query": 4096, "key-value": 1024, "intermediate": 14_336}
HEADS, KV_HEADS = 32, 8
Q4_0_BLOCK = 18  # bytes: a float16 scale and 32 elements of 4 bits


def tensor_shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """Every tensor of the model by its name in the file."""
    shapes: dict[str, tuple[int, ...]] = {
        name: (SIZES["hidden"],) if name == "output_norm.weight" else (VOCABULARY, SIZES["hidden"])
        for name in GGUF_OUTER_NAMES
    }
    for layer in range(layers):
        for module in LLAMA_LAYER:
            if module.only_with is None:  # a Llama has no norms of queries and keys
                shapes[f"blk.{layer}.{module.gguf}.weight"] = tuple(SIZES[axis] for axis in module.axes)
    return shapes


def save_synthetic_gguf(path: Path, layers: int) -> None:
    """Writes the file, one tensor in memory at a time.

    Args:
        path: Of the file.
        layers: How many.
    """
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(layers)
    writer.add_context_length(8192)
    writer.add_embedding_length(SIZES["hidden"])
    writer.add_feed_forward_length(SIZES["intermediate"])
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(500_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCABULARY)
    kind = GGMLQuantizationType.Q4_0
    stored = {
        name: shape if len(shape) == 1 else tuple(quant_shape_to_byte_shape(shape, kind))
        for name, shape in tensor_shapes(layers).items()
    }
    for name, shape in stored.items():
        if len(shape) == 1:
            writer.add_tensor_info(name, shape, np.dtype(np.float32), 4 * shape[0])
        else:
            writer.add_tensor_info(name, shape, np.dtype(np.uint8), math.prod(shape), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    blocks = np.random.default_rng(0).integers(0, 256, (1 << 16, Q4_0_BLOCK), dtype=np.uint8)
    blocks[:, :2] = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
    for shape in stored.values():
        writer.write_tensor_data(np.ones(shape, np.float32) if len(shape) == 1 else np.resize(blocks, shape))
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--write", type=Path, help="only write the GGUF file there")
    arguments = parser.parse_args()
    layers = arguments.layers
    if arguments.write is not None:
        save_synthetic_gguf(arguments.write, layers)
        return
    elements = sum(math.prod(shape) for shape in tensor_shapes(layers).values())
    with temporary_folder() as folder:
        check_disk_space(folder, elements * 5, WORKSPACE, "the file and its export need")
        model, log = folder / "model.gguf", folder / "log"
        # By another process: what this one ever held would count as the export's, which starts as a copy of it.
        module = ["-m", "benchmarks.gguf_export", "--layers", str(layers), "--write", str(model)]
        subprocess.run([sys.executable, *module], check=True)
        command = [str(Path(sys.executable).parent / "dlo-export"), str(model), "-o", f"{folder}/out", "--no-parity"]
        seconds, megabytes = run_once(command, log)
        written = (folder / "out" / "model.onnx.data").stat().st_size
        stored = model.stat().st_size
    print_report(
        f"Export of an 8B-shaped Q4_0 GGUF file, {layers} layers, as fp32",
        ["", "measured", "bar"],
        [
            ["peak memory, MB", f"{megabytes:.0f}", f"≤ {BAR_MEGABYTES}"],
            ["wall, s", f"{seconds:.1f}", ""],
            ["read, GB", f"{stored / 1e9:.2f}", ""],
            ["written, GB", f"{written / 1e9:.2f}", ""],
        ],
        {
            "layers": layers,
            "dtype": "float32",
            "peak_megabytes": round(megabytes, 1),
            "seconds": round(seconds, 2),
            "bytes_read": stored,
            "bytes_written": written,
            "versions": versions("dlo-export", "gguf", "onnx-ir", "numpy"),
        },
    )


if __name__ == "__main__":
    main()
