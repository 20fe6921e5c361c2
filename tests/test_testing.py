"""`assert_parity`, as other people's CI calls it: one test per verdict, each of a real export."""

import json

import numpy as np
import pytest

from dlo_export.checkpoints.adapter.adapter import DloAdapter, save_adapter
from dlo_export.checkpoints.lazy_tensors import ArrayTensor
from dlo_export.exporter.export import ParityFailedError
from dlo_export.exporter.sources.foreign_graph import open_foreign_graph
from dlo_export.runtimes.artefact.engine_record import ParityVerdict
from dlo_export.runtimes.parity.cases import parity_cases
from dlo_export.runtimes.torch.reference import open_reference
from dlo_export.testing import assert_parity
from tests.foreign_graphs import save_foreign_graph, save_routed_adapter
from tests.tiny_models import save_tiny_llama


def test_assert_parity_returns_the_artefact_when_parity_passes(tmp_path):
    checkpoint = save_tiny_llama(tmp_path / "model", routed=[True, False, True])
    result = assert_parity(checkpoint, tmp_path / "out", lowering="if")
    assert result.folder == tmp_path / "out"
    assert (result.folder / "model.onnx").is_file()
    assert result.description.lowering == "if"
    assert result.description.parity == ParityVerdict("PASS")


def test_assert_parity_raises_when_the_graph_is_not_the_model_beside_it(tmp_path):
    graph = save_foreign_graph(tmp_path / "foreign", "fp32")
    config = graph.parent / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rms_norm_eps": 1e-2}))
    adapter = save_routed_adapter(graph, tmp_path / "adapter")
    with pytest.raises(ParityFailedError, match=r"parity FAIL[\s\S]*logits differ[\s\S]*hint: .*out\.failed"):
        assert_parity(graph, tmp_path / "out", adapter=adapter, allow_ambiguous=True)
    assert not (tmp_path / "out").exists()


def test_assert_parity_asks_for_leave_when_parity_is_ambiguous(tmp_path):
    graph = save_foreign_graph(tmp_path / "foreign", "fp32")
    adapter = _near_tie(graph, tmp_path / "adapter")
    with pytest.raises(AssertionError, match=r"parity AMBIGUOUS[\s\S]*1 near-ties flipped: layer 1 token 31"):
        assert_parity(graph, tmp_path / "strict", adapter=adapter)
    result = assert_parity(graph, tmp_path / "lenient", adapter=adapter, allow_ambiguous=True)
    assert result.description.parity.verdict == "AMBIGUOUS"


def _near_tie(graph, folder):
    """Makes config.json's epsilon a little wrong, and a router of layer 1 that this turns on one token."""
    config_file = graph.parent / "config.json"
    config = json.loads(config_file.read_text())
    opened, feed = open_foreign_graph(graph), parity_cases(config["vocab_size"], routed=True)[0].feeds[0]
    streams = []
    for epsilon in (config["rms_norm_eps"], config["rms_norm_eps"] * 1.5):
        with open_reference(config | {"rms_norm_eps": epsilon}, opened.tensors) as runner:
            runner.reset(1)
            result = runner.step(feed.input_ids, feed.attention_mask, feed.position_ids, hidden_states=True)
        streams.append(result.hidden_states[0][0, -1].astype(np.float64))
    config_file.write_text(json.dumps(config | {"rms_norm_eps": config["rms_norm_eps"] * 1.5}))
    # A plane between the two streams, at right angles to their difference.
    difference, middle = streams[0] - streams[1], (streams[0] + streams[1]) / 2
    router = difference - (difference @ middle) / (middle @ middle) * middle
    router = (router / np.linalg.norm(router)).astype(np.float32)[np.newaxis]
    tensors = {"model.routers.1.weight": ArrayTensor(router)}
    save_adapter(DloAdapter("mlp", (False, True, False), injected_layers=(), tensors=tensors), folder)
    return folder


def test_assert_parity_raises_when_parity_cannot_run(tmp_path):
    graph = save_foreign_graph(tmp_path / "foreign", "bf16")
    adapter = save_routed_adapter(graph, tmp_path / "adapter")
    with pytest.raises(AssertionError, match=r"parity NOT RUN: .*does not implement bfloat16"):
        assert_parity(graph, tmp_path / "out", adapter=adapter, allow_ambiguous=True)
