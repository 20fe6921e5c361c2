"""A decoder's interface, read from sessions and from an artefact's description."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest

from dlo_export.checkpoints.dtypes import FLOAT32
from dlo_export.checkpoints.interface import KV_LENGTHS, parse_past
from dlo_export.exporter.export import ExportRequest, export_model
from dlo_export.exporter.progress import Reporter
from dlo_export.runtimes.decoder_interface import DecoderInterface, TensorSpec
from dlo_export.runtimes.errors import ModelInterfaceError
from dlo_export.runtimes.onnxruntime.session import DecoderSession
from tests.runtimes.engine_records import interface
from tests.runtimes.graphs import Builds
from tests.runtimes.static_cache_graphs import HEAD_DIM, KV_HEADS, LAYERS, MAX_CACHE, decoder
from tests.tiny_models import save_tiny_llama


def _described(inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> DecoderInterface:
    return DecoderInterface.of(inputs, outputs, "described", cache="static")


def test_interface_is_the_same_when_read_from_session_and_description(tmp_path: Path) -> None:
    checkpoint = save_tiny_llama(tmp_path / "model", routed=[True, False, True])
    result = export_model(ExportRequest(str(checkpoint), tmp_path / "out", parity=False), Reporter())
    said = result.description.interface
    described = DecoderInterface.of(said.inputs, said.outputs, "described", cache="growing")
    found = DecoderSession(tmp_path / "out" / "model.onnx", "session", "growing", {}).interface
    # ONNX Runtime infers shapes of outputs of its own.
    assert dataclasses.replace(found, outputs={}) == dataclasses.replace(described, outputs={})
    assert {name: spec.dtype for name, spec in found.outputs.items()} == {
        name: spec.dtype for name, spec in described.outputs.items()
    }


def test_growing_interface_tells_what_to_feed_when_a_parity_build_is_read(builds: Builds) -> None:
    session = DecoderSession(builds.forced, "forced", "growing", {"weights_folder": builds.folder})
    found = session.interface
    assert (found.num_layers, found.routed_layers, found.forcing, found.max_cache) == (4, (0, 1, 3), "required", 0)
    assert found.step_inputs == ("input_ids", "attention_mask", "position_ids")
    assert found.present_of["past_key_values.3.value"] == "present.3.value"
    assert found.observed(hidden_states=True) == ("logits", *(f"router_scores.{layer}" for layer in (0, 1, 3)))
    shapes = found.state_shapes(5)
    assert len(shapes) == 8
    assert {(shape[0], shape[2]) for shape in shapes.values()} == {(5, 0)}
    assert found.element_type("past_key_values.0.key") == FLOAT32


def test_static_interface_tells_its_slots_when_it_is_read() -> None:
    found = DecoderSession(decoder("static", last_logits=True), "static", "static", {}).interface
    assert (found.num_layers, found.max_cache, found.forcing, found.last_logits) == (
        LAYERS,
        MAX_CACHE,
        "impossible",
        True,
    )
    assert found.step_inputs == ("input_ids", "position_ids", "write_indices", "kv_lengths")
    assert set(found.state_shapes(3).values()) == {(3, KV_HEADS, MAX_CACHE, HEAD_DIM)}
    assert "hidden.1" in found.observed(hidden_states=True)
    assert "hidden.1" not in found.observed(hidden_states=False)
    assert not _described(interface().inputs, interface().outputs).last_logits


def test_interface_names_all_problems_when_much_is_wrong() -> None:
    replace = dataclasses.replace
    inputs = [replace(spec, dtype="int32") for spec in interface().inputs if spec.name != KV_LENGTHS]
    inputs[-1] = replace(inputs[-1], shape=("batch", KV_HEADS, "slots", HEAD_DIM))
    inputs.append(TensorSpec("past_active.0", "bool", ("batch", MAX_CACHE)))
    outputs = [spec for spec in interface().outputs if spec.name != "present.1.key"]
    outputs.append(TensorSpec("temperature", "float", (1,)))
    with pytest.raises(ModelInterfaceError) as info:
        _described(inputs, outputs)
    for part in (
        "described: is not a decoder with a static KV cache",
        "inputs ['kv_lengths'] are missing",
        "outputs ['present.1.key', 'present_active.0'] are missing",
        "past_active.0 is bool, expected float or float16 or bfloat16",
        f"input past_active.0 has shape ['batch', {MAX_CACHE}], expected [batch, 1, ",
        "outputs ['temperature'] are unknown",
        "input_ids is int32, expected int64",
        "past_key_values.0.key is int32, expected float or float16 or bfloat16",
        f"the cache's lengths are ['{MAX_CACHE}', 'slots'], expected one number for all layers",
        "hint: expected input_ids, position_ids, write_indices",
    ):
        assert part in str(info.value)


def test_batch_is_refused_when_the_graph_has_another_fixed_one() -> None:
    inputs = [
        dataclasses.replace(spec, shape=(2, *spec.shape[1:])) if parse_past(spec.name) else spec
        for spec in interface().inputs
    ]
    described = _described(inputs, interface().outputs)
    assert len(described.state_shapes(2)) == 2 * LAYERS
    with pytest.raises(ModelInterfaceError, match=r"has a fixed batch of 2, expected 3\s+hint:"):
        described.state_shapes(3)
