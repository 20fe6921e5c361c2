from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from dlo_export.checkpoints.interface import INPUT_IDS, KV_LENGTHS
from dlo_export.runtimes.artefact.description import FILE_NAME
from dlo_export.runtimes.errors import ModelInterfaceError, ModelLoadError, StepError
from dlo_export.runtimes.tensorrt.engines import load_engines
from dlo_export.runtimes.tensorrt.shapes import choose_profile, plan_buffers, profiles_of
from tests.runtimes.engine_records import DECODE, MAX_BATCH, MAX_SEQUENCE, PREFILL, interface, record, save_artefact
from tests.runtimes.static_cache_graphs import HEAD_DIM, KV_HEADS, MAX_CACHE, VOCAB


def test_engines_are_read_as_they_were_described(tmp_path: Path) -> None:
    written = record(tmp_path)
    (engine,) = load_engines(save_artefact(tmp_path, written))
    assert engine == written
    assert (engine.static_cache.max_cache, engine.static_cache.num_layers) == (MAX_CACHE, 2)


def test_engines_are_refused_by_name_when_they_were_changed(tmp_path: Path) -> None:
    save_artefact(tmp_path, record(tmp_path, "prefill"), record(tmp_path, "decode"))
    (tmp_path / "engines/prefill.engine").write_bytes(b"an engine")
    (tmp_path / "engines/decode.engine").unlink()
    with pytest.raises(ModelLoadError) as info:
        load_engines(tmp_path)
    assert "prefill.engine: was changed: its sha256 is" in str(info.value)
    assert "decode.engine: does not exist" in str(info.value)
    assert "hint: " in str(info.value)


def test_engines_are_refused_when_their_cache_grows(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"has a growing cache.*\s+hint: .*--trt-cache static"):
        load_engines(save_artefact(tmp_path, record(tmp_path, cache="growing")))


def test_artefact_is_refused_when_it_has_no_engines(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="has no engines"):
        load_engines(save_artefact(tmp_path))
    with pytest.raises(ModelLoadError, match=r"has no dlo_artifact\.json"):
        load_engines(tmp_path / "elsewhere")


def test_engine_outside_of_the_artefact_is_refused(tmp_path: Path) -> None:
    folder = save_artefact(tmp_path / "artefact", record(tmp_path / "artefact"))
    values = json.loads((folder / FILE_NAME).read_text())
    values["engines"][0]["file"] = "../model.engine"
    (folder / FILE_NAME).write_text(json.dumps(values))
    with pytest.raises(ModelLoadError, match=r"engines\[0\]\.file is '\.\./model\.engine', expected a file inside"):
        load_engines(folder)


def test_engine_is_refused_when_its_interface_is_another_one(tmp_path: Path) -> None:
    inputs = tuple(dataclasses.replace(s, dtype="int32") for s in interface().inputs if s.name != KV_LENGTHS)
    with pytest.raises(ModelInterfaceError) as info:
        load_engines(save_artefact(tmp_path, record(tmp_path, interface=interface(inputs=inputs))))
    assert "inputs ['kv_lengths'] are missing" in str(info.value)
    assert "input_ids is int32, expected int64" in str(info.value)
    assert "past_key_values.0.key is int32, expected float or float16 or bfloat16" in str(info.value)


def test_profile_is_the_tightest_when_several_cover_a_step(tmp_path: Path) -> None:
    profiles = profiles_of([record(tmp_path)])
    assert [choose_profile(profiles, 2, sequence, "engine").profile.name for sequence in (1, 2, MAX_SEQUENCE)] == [
        "decode",
        "prefill",
        "prefill",
    ]
    with pytest.raises(StepError) as info:
        choose_profile(profiles, 1, MAX_SEQUENCE + 1, "engine")
    assert "[batch, sequence] = [1, 17]; the engine has prefill [1, 1] to [4, 16], decode [1, 1] to [4, 1]" in str(
        info.value
    )
    assert "--trt-max-sequence 17" in str(info.value)


def test_profiles_are_of_both_engines_when_prefill_and_decode_are_split(tmp_path: Path) -> None:
    engines = record(tmp_path, "prefill", profiles=(PREFILL,)), record(tmp_path, "decode", profiles=(DECODE,))
    profiles = profiles_of(load_engines(save_artefact(tmp_path, *engines)))
    chosen = [choose_profile(profiles, 1, sequence, "engine") for sequence in (5, 1)]
    assert [(choice.engine, choice.index) for choice in chosen] == [(0, 0), (1, 0)]


def test_buffers_are_planned_once_when_shapes_vary(tmp_path: Path) -> None:
    engine = record(tmp_path)
    plan = plan_buffers(engine.static_cache, engine.max_batch, engine.max_sequence)
    assert plan.keys() == {*engine.static_cache.inputs, *engine.static_cache.outputs}
    assert plan[INPUT_IDS].bytes == MAX_BATCH * MAX_SEQUENCE * 8
    assert plan[KV_LENGTHS].bytes == MAX_BATCH * 8
    assert plan["logits"].bytes == MAX_BATCH * MAX_SEQUENCE * VOCAB * 2
    past, present = plan["past_key_values.1.value"], plan["present.1.value"]
    assert (past.bytes, past.alias_of) == (MAX_BATCH * KV_HEADS * MAX_CACHE * HEAD_DIM * 2, None)
    assert (present.bytes, present.alias_of) == (0, "past_key_values.1.value")


def test_buffers_cannot_be_planned_when_a_size_is_unknown(tmp_path: Path) -> None:
    logits, *cache = interface().outputs
    odd = interface(outputs=(dataclasses.replace(logits, shape=("batch", "tokens", VOCAB)), *cache))
    with pytest.raises(ModelInterfaceError, match=r"logits has shape \['batch', 'tokens', 37\]"):
        plan_buffers(record(tmp_path, interface=odd).static_cache, 1, 1)
