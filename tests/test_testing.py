"""`assert_parity`, as other people's CI calls it: one test per verdict, each of a real export."""

import json

import pytest

from dlo_export.exporter.export import ParityFailedError
from dlo_export.testing import assert_parity
from tests.foreign_graphs import save_foreign_graph, save_routed_adapter
from tests.tiny_models import save_tiny_llama


def test_assert_parity_returns_the_artefact_when_parity_passes(tmp_path):
    checkpoint = save_tiny_llama(tmp_path / "model", routed=[True, False, True])
    result = assert_parity(checkpoint, tmp_path / "out", lowering="if")
    assert result.folder == tmp_path / "out"
    assert (result.folder / "model.onnx").is_file()
    assert result.description.lowering == "if"
    assert result.description.parity.verdict == "PASS"


def test_assert_parity_raises_when_the_graph_is_not_the_model_beside_it(tmp_path):
    graph = save_foreign_graph(tmp_path / "foreign", "fp32")
    config = graph.parent / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rms_norm_eps": 1e-2}))
    adapter = save_routed_adapter(graph, tmp_path / "adapter")
    with pytest.raises(ParityFailedError, match=r"parity FAIL[\s\S]*logits differ[\s\S]*hint: .*out\.failed"):
        assert_parity(graph, tmp_path / "out", adapter=adapter, allow_ambiguous=True)
    assert not (tmp_path / "out").exists()


def test_assert_parity_asks_for_leave_when_parity_is_ambiguous(tmp_path):
    # Of some ten thousand decisions in 16 bits, a few are near-ties that rounding turns.
    graph = save_foreign_graph(tmp_path / "foreign", "fp16", layers=8)
    adapter = save_routed_adapter(graph, tmp_path / "adapter")
    with pytest.raises(AssertionError, match=r"parity AMBIGUOUS[\s\S]*near-ties flipped"):
        assert_parity(graph, tmp_path / "strict", adapter=adapter)
    result = assert_parity(graph, tmp_path / "lenient", adapter=adapter, allow_ambiguous=True)
    assert result.description.parity.verdict == "AMBIGUOUS"


def test_assert_parity_raises_when_parity_cannot_run(tmp_path):
    graph = save_foreign_graph(tmp_path / "foreign", "bf16")
    adapter = save_routed_adapter(graph, tmp_path / "adapter")
    with pytest.raises(AssertionError, match=r"parity NOT RUN: .*does not implement bfloat16"):
        assert_parity(graph, tmp_path / "out", adapter=adapter, allow_ambiguous=True)
