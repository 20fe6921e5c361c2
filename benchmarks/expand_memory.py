"""Peak memory and wall time of `dlo expand` on a checkpoint of an 8B model's true shapes.

The checkpoint is synthetic: bf16, the shapes of Llama 3 8B with a head of its own (128,256 × 4,096), tiles of random
numbers. Embedding and head take 2.1 GB of disk, a layer 0.44 GB; the deepened model, one layer in four larger, lies
beside it. Memory should not depend on the number of layers.

    python -m benchmarks.expand_memory [--layers 32]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from benchmarks.common.measure import print_report, versions
from benchmarks.common.workspace import WORKSPACE, temporary_folder
from benchmarks.export_speed import run_once
from dlo_export.checkpoints.checkpoint_folder import save_model_tensors
from dlo_export.checkpoints.config import LlamaConfig
from dlo_export.checkpoints.files.disk_space import check_disk_space
from dlo_export.checkpoints.lazy_tensors import TensorOfRows

BAR_MEGABYTES = 1000
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128_256,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
    "tie_word_embeddings": False,
    "max_position_embeddings": 8192,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "dtype": "bfloat16",
}
# What each way to make a new layer reads: one original, or the two around it; the last one has none behind it.
EXPANSIONS = {
    "copy": ("--init", "copy"),
    "zero_out, with routers": ("--init", "zero_out", "--routers"),
    "slerp": ("--source", "slerp", "--init", "copy"),
    "random": ("--init", "random"),
    "zero_out, as an adapter": ("--init", "zero_out", "--adapter"),
}


@dataclasses.dataclass(frozen=True)
class TiledTensor(TensorOfRows):
    """The same numbers over and over: quick to make, and none of them is zero or out of range.

    Attributes:
        shape: Of the whole.
        tile: The numbers, in a row.
    """

    shape: tuple[int, ...]
    tile: np.ndarray

    @property
    def dtype(self) -> np.dtype:  # noqa: D102 - a lazy tensor's questions, here and below
        return self.tile.dtype

    def rows(self, start: int, stop: int) -> np.ndarray:  # noqa: D102
        return np.resize(self.tile, (stop - start, *self.shape[1:]))


def save_synthetic_checkpoint(folder: Path, layers: int) -> None:
    """Writes the checkpoint, a chunk in memory at a time.

    Args:
        folder: To make.
        layers: How many.
    """
    config = CONFIG | {"num_hidden_layers": layers}
    shapes = LlamaConfig.from_dict(config, "synthetic").tensor_shapes()
    tile = (np.random.default_rng(0).standard_normal(1 << 20, np.float32) * 0.02).astype(ml_dtypes.bfloat16)
    folder.mkdir()
    save_model_tensors({name: TiledTensor(shape, tile) for name, shape in shapes.items()}, folder)
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=5, help="of the model to deepen, at least 5")
    parser.add_argument("--write", type=Path, help="only write the checkpoint there")
    arguments = parser.parse_args()
    layers = arguments.layers
    if arguments.write is not None:
        save_synthetic_checkpoint(arguments.write, layers)
        return
    shapes = LlamaConfig.from_dict(CONFIG | {"num_hidden_layers": layers}, "synthetic").tensor_shapes()
    nbytes = 2 * sum(math.prod(shape) for shape in shapes.values())
    costs: dict[str, tuple[float, float]] = {}
    with temporary_folder() as folder:
        check_disk_space(folder, int(2.3 * nbytes), WORKSPACE, "the model and the deepened one need")
        model = f"{folder}/model"
        # By another process: what this one ever held would count as the command's, which starts as a copy of it.
        writer = ["-m", "benchmarks.expand_memory", "--layers", str(layers), "--write", model]
        subprocess.run([sys.executable, *writer], check=True)
        dlo = str(Path(sys.executable).parent / "dlo")
        for name, options in EXPANSIONS.items():
            with tempfile.TemporaryDirectory(dir=folder) as output:
                command = [dlo, "expand", model, "-o", f"{output}/out", "--every", "4", *options]
                costs[name] = run_once(command, folder / "log")
    peak = max(megabytes for _, megabytes in costs.values())
    print_report(
        f"dlo expand on an 8B-shaped bf16 checkpoint, {layers} layers and one more after every 4",
        ["new layers", "peak memory, MB", "wall, s"],
        [[name, f"{megabytes:.0f}", f"{seconds:.1f}"] for name, (seconds, megabytes) in costs.items()],
        {
            "layers": layers,
            "dtype": "bfloat16",
            "bytes_read": nbytes,
            "bar_megabytes": BAR_MEGABYTES,
            "passed": peak <= BAR_MEGABYTES,
            "peak_megabytes": {name: round(megabytes, 1) for name, (_, megabytes) in costs.items()},
            "seconds": {name: round(seconds, 2) for name, (seconds, _) in costs.items()},
            "versions": versions("dlo-export", "numpy"),
        },
    )


if __name__ == "__main__":
    main()
