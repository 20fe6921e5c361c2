"""Files that protobuf can parse, and what of them is refused all the same."""

from pathlib import Path

import onnx
import pytest

from dlo_export.checkpoints.errors import InputError
from dlo_export.exporter.sources.graph_file import load_graph
from dlo_export.exporter.sources.model_proto import parsed_model
from tests.foreign_graphs import save_foreign_graph


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    return save_foreign_graph(tmp_path / "graph", "fp32", layers=1)


@pytest.mark.parametrize("read", [parsed_model, load_graph])
def test_model_is_refused_by_place_when_a_name_is_not_utf8(graph: Path, read) -> None:
    content = graph.read_bytes()
    graph.write_bytes(content.replace(b"embed_tokens", b"embed\xb9tokens"))
    with pytest.raises(InputError, match=r"not UTF-8:\n  graph\.node\[\d+\]\.input b'model"):
        read(graph)


def test_graph_is_refused_by_tensor_when_its_contents_are_not_as_long_as_it_says(graph: Path) -> None:
    proto = onnx.load(graph, load_external_data=False)
    tensor = next(tensor for tensor in proto.graph.initializer if not tensor.external_data)
    tensor.raw_data += b"\0"
    onnx.save(proto, graph)
    with pytest.raises(InputError, match=rf"initializer '{tensor.name}'"):
        load_graph(graph)


@pytest.mark.parametrize("content", [b"", b"\0", b"no protobuf at all", b"\x08\x0b"])
def test_model_is_refused_when_a_file_holds_no_graph(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(InputError, match=r"model\.onnx: (holds no graph|is no ONNX model)"):
        parsed_model(tmp_path / "model.onnx")
