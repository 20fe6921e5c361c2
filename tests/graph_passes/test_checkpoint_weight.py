"""Checkpoint tensors as graph weights, written in many chunks."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from dlo_export.checkpoints import lazy_tensors
from dlo_export.checkpoints.formats import gguf_tensor
from dlo_export.checkpoints.lazy_tensors import ArrayTensor, BlockTensor
from dlo_export.checkpoints.opening import open_checkpoint
from dlo_export.exporter.plain_graph.llama import plain_graph
from dlo_export.exporter.weight_file import save_weights
from dlo_export.graph_passes.checkpoint_weight import CheckpointWeight
from dlo_export.graph_passes.cleanup.fuse_sibling_matmuls import FuseSiblingMatMulsPass
from tests.tiny_gguf import save_tiny_gguf
from tests.tiny_models import save_tiny_llama

# Two and three blocks of 32 columns, or of 256, in the rows of its matrices.
SIZES = {"Q4_0": {"hidden": 64, "intermediate": 96}, "Q6_K": {"hidden": 512, "intermediate": 768, "vocab": 64}}
CHUNK_BYTES = {"Q4_0": 9_000, "Q6_K": 200_000}


@pytest.fixture
def dequantised(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Elements of every call of the package's dequantisation, which goes on as it is."""
    counts: list[int] = []
    original = gguf_tensor.dequantize

    def counted(blocks: np.ndarray, kind: gguf_tensor.GGMLQuantizationType) -> np.ndarray:
        elements = original(blocks, kind)
        counts.append(elements.size)
        return elements

    monkeypatch.setattr(gguf_tensor, "dequantize", counted)
    return counts


def _chunks(weight: CheckpointWeight) -> list[bytes]:
    """What a weight writes, write by write."""
    written: list[bytes] = []

    class Recorder(io.BytesIO):
        def write(self, data: bytes) -> int:  # type: ignore[override]
            written.append(bytes(data))
            return len(data)

    weight.tofile(Recorder())
    return written


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("quantisation", SIZES)
def test_every_block_is_dequantised_once_when_a_gguf_is_written_in_many_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dequantised: list[int], quantisation: str, *, fused: bool
) -> None:
    folder = save_tiny_llama(tmp_path / "tiny", layers=1, **SIZES[quantisation])
    with open_checkpoint(save_tiny_gguf(folder, tmp_path / "tiny.gguf", quantisation)) as checkpoint:
        matrices = {name: tensor for name, tensor in checkpoint.tensors.items() if len(tensor.shape) == 2}
        whole = {name: tensor.numpy() for name, tensor in matrices.items()}
        assert sum(dequantised) == sum(array.size for array in whole.values())
        dequantised.clear()
        monkeypatch.setattr(lazy_tensors, "CHUNK_BYTES", CHUNK_BYTES[quantisation])
        model = plain_graph(checkpoint.config, checkpoint.tensors)
        if fused:
            FuseSiblingMatMulsPass()(model)
        save_weights(model, tmp_path / "weights")
        assert sum(dequantised) == sum(array.size for array in whole.values())
        assert len(dequantised) > 2 * len(matrices)
        embedding = model.graph.initializers["model.embed_tokens.weight"].const_value.numpy()
        np.testing.assert_array_equal(embedding, whole["model.embed_tokens.weight"])
        down = "model.layers.0.mlp.down_proj.weight"
        np.testing.assert_array_equal(model.graph.initializers[down].const_value.numpy(), whole[down].T)


@pytest.mark.parametrize("dtype", [ir.DataType.FLOAT, ir.DataType.BFLOAT16])
@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight"])
@pytest.mark.parametrize("quantisation", SIZES)
def test_chunks_are_whole_blocks_when_a_quantised_matrix_is_transposed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantisation: str, name: str, dtype: ir.DataType
) -> None:
    folder = save_tiny_llama(tmp_path / "tiny", layers=1, **SIZES[quantisation])
    with open_checkpoint(save_tiny_gguf(folder, tmp_path / "tiny.gguf", quantisation)) as checkpoint:
        tensor = checkpoint.tensors[name]
        assert isinstance(tensor, BlockTensor)
        expected = np.ascontiguousarray(tensor.numpy().T).astype(dtype.numpy())
        monkeypatch.setattr(lazy_tensors, "CHUNK_BYTES", 1)  # one block at a time
        weight = CheckpointWeight("weight", tensor, dtype, transposed=True)
        chunks = _chunks(weight)
        assert len(chunks) == len(expected) // tensor.block_columns > 1
        assert b"".join(chunks) == expected.tobytes()
        np.testing.assert_array_equal(weight.rows(3, 41), expected[3:41])  # whatever the blocks


def test_weight_is_written_in_chunks_when_its_source_is_an_array(monkeypatch: pytest.MonkeyPatch) -> None:
    source = np.arange(35, dtype=np.float32).reshape(5, 7)
    monkeypatch.setattr(lazy_tensors, "CHUNK_BYTES", 41)
    for transposed, expected in ((False, source), (True, source.T)):
        weight = CheckpointWeight("weight", ArrayTensor(source), ir.DataType.FLOAT16, transposed=transposed)
        chunks = _chunks(weight)
        assert len(chunks) > 1
        assert max(map(len, chunks)) <= 41
        assert b"".join(chunks) == expected.astype(np.float16).tobytes()
        np.testing.assert_array_equal(weight.numpy(), expected)
