import numpy as np
import onnx_ir as ir
import pytest

from dlo_export.checkpoints import lazy_tensors
from dlo_export.checkpoints.opening import open_checkpoint
from dlo_export.exporter.plain_graph.llama import plain_graph
from dlo_export.exporter.weight_file import ALIGNMENT, save_weights, weight_bytes
from tests.tiny_models import save_tiny_llama


@pytest.fixture
def checkpoint(tmp_path):
    with open_checkpoint(save_tiny_llama(tmp_path / "model", tie=True)) as opened:
        yield opened


def test_weights_are_read_back_as_they_were_when_saved_in_small_chunks(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(lazy_tensors, "CHUNK_BYTES", 1000)
    model = plain_graph(checkpoint.config, checkpoint.tensors)
    expected = {name: value.const_value.numpy().copy() for name, value in model.graph.initializers.items()}
    size = save_weights(model, tmp_path / "weights")
    assert (tmp_path / "weights").stat().st_size == size == weight_bytes(model)
    for name, value in model.graph.initializers.items():
        np.testing.assert_array_equal(value.const_value.numpy(), expected[name])
        if isinstance(value.const_value, ir.ExternalTensor):
            assert value.const_value.offset % ALIGNMENT == 0


def test_weights_are_transposed_for_matmul_and_the_tied_head_is_stored_once(checkpoint):
    model = plain_graph(checkpoint.config, checkpoint.tensors)
    gate = "model.layers.0.mlp.gate_proj.weight"
    np.testing.assert_array_equal(
        model.graph.initializers[gate].const_value.numpy(), checkpoint.tensors[gate].numpy().T
    )
    embedding = model.graph.initializers["model.embed_tokens.weight"]
    assert {node.op_type for node in embedding.consumers()} == {"Gather", "Gemm"}


def test_layout_is_the_same_when_the_file_is_not_written(checkpoint, tmp_path):
    written, described = (plain_graph(checkpoint.config, checkpoint.tensors) for _ in range(2))
    save_weights(written, tmp_path / "a")
    save_weights(described, tmp_path / "b", write=False)
    assert not (tmp_path / "b").exists()
    for name, value in written.graph.initializers.items():
        other = described.graph.initializers[name].const_value
        if isinstance(value.const_value, ir.ExternalTensor):
            assert (value.const_value.offset, value.const_value.length) == (other.offset, other.length)


@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("wanted", [ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16])
def test_weights_are_cast_while_they_stream(tmp_path, stored, wanted):
    with open_checkpoint(save_tiny_llama(tmp_path / "model", dtype=stored)) as checkpoint:
        model = plain_graph(checkpoint.config, checkpoint.tensors, wanted)
        save_weights(model, tmp_path / "weights")
        for name in ("model.layers.1.mlp.down_proj.weight", "model.norm.weight"):
            source = checkpoint.tensors[name].numpy()
            source = source.T if source.ndim == 2 else source
            expected = source.astype(wanted.numpy())
            np.testing.assert_array_equal(model.graph.initializers[name].const_value.numpy(), expected)
