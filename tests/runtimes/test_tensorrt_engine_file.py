from __future__ import annotations

import json
from pathlib import Path

import pytest
from dlo_export.runtimes.tensorrt.engine_file import load_engine_files

from dlo_export.runtimes.errors import ModelInterfaceError, ModelLoadError, StepError
from dlo_export.runtimes.tensorrt.shapes import choose_profile, plan_buffers, profiles_of
from tests.runtimes.engine_records import MAX_BATCH, MAX_SEQUENCE, interface, record, save_artefact
from tests.runtimes.static_cache_graphs import HEAD_DIM, KV_HEADS, MAX_CACHE, VOCAB


def test_engines_are_read_when_the_artefact_describes_them(tmp_path: Path) -> None:
    (engine,) = load_engine_files(save_artefact(tmp_path, record(seconds=3.5, unknown_field=1)))
    assert (engine.backend, engine.module, engine.targets) == ("rtx", "tensorrt_rtx", ("sm89",))
    assert engine.path == tmp_path / "engines/model.engine"
    assert engine.profiles[1].shapes["input_ids"] == ((1, 1), (1, 1), (MAX_BATCH, 1))
    assert (engine.interface.max_cache, engine.interface.num_layers) == (MAX_CACHE, 2)


def test_engines_are_refused_with_all_problems_when_records_are_wrong(tmp_path: Path) -> None:
    bad = [
        record(backend="onnx", cache="growing"),
        record(file="../model.engine"),
        record(sha256="0" * 64, graph="engines/other.onnx"),
        {"file": "engines/model.engine"},
    ]
    folder = save_artefact(tmp_path / "artefact", *bad)
    (folder / "engines/other.onnx").unlink()
    with pytest.raises(ModelLoadError) as info:
        load_engine_files(folder)
    for expected in (
        "engines[0]: backend is 'onnx', expected one of ['rtx', 'tensorrt']",
        "engines[0]: cache is 'growing', expected 'static'",
        "engines[1]: file ../model.engine is outside of the artefact",
        "engines[2]: graph engines/other.onnx does not exist",
        "engines[2]: engines/model.engine was changed: its sha256 is",
        "engines[3]: fields ['graph', 'backend',",
        "hint: export the model again with --trt",
    ):
        assert expected in str(info.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [('{"engines": []}', "names no engines"), ("{", "is not a JSON object"), ("[]", "is not a JSON object")],
)
def test_artefact_is_refused_when_it_has_no_engines(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "dlo_artifact.json").write_text(content)
    with pytest.raises(ModelLoadError, match=message):
        load_engine_files(tmp_path)
    with pytest.raises(ModelLoadError, match=r"has no dlo_artifact\.json"):
        load_engine_files(tmp_path / "elsewhere")


def test_engine_is_refused_when_its_interface_is_another_one(tmp_path: Path) -> None:
    wrong = interface()
    wrong["inputs"] = [value | {"dtype": "int32"} for value in wrong["inputs"] if value["name"] != "kv_lengths"]
    with pytest.raises(ModelInterfaceError) as info:
        load_engine_files(save_artefact(tmp_path, record(interface=wrong)))
    assert "inputs ['kv_lengths'] are missing" in str(info.value)
    assert "input_ids is int32, expected int64" in str(info.value)
    assert "past_key_values.0.key is int32, expected float or float16 or bfloat16" in str(info.value)


def test_profile_is_the_tightest_when_several_cover_a_step(tmp_path: Path) -> None:
    profiles = profiles_of(load_engine_files(save_artefact(tmp_path, record())))
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
    prefill, decode = record()["profiles"]
    folder = save_artefact(
        tmp_path,
        record(file="engines/prefill.engine", profiles=[prefill]),
        record(file="engines/decode.engine", profiles=[decode]),
    )
    profiles = profiles_of(load_engine_files(folder))
    chosen = [choose_profile(profiles, 1, sequence, "engine") for sequence in (5, 1)]
    assert [(choice.engine, choice.index) for choice in chosen] == [(0, 0), (1, 0)]


def test_buffers_are_planned_once_when_shapes_vary(tmp_path: Path) -> None:
    (engine,) = load_engine_files(save_artefact(tmp_path, record()))
    plan = plan_buffers(engine.interface, engine.max_batch, engine.max_sequence)
    assert plan.keys() == {*engine.interface.inputs, *engine.interface.outputs}
    assert plan["input_ids"].bytes == MAX_BATCH * MAX_SEQUENCE * 8
    assert plan["kv_lengths"].bytes == MAX_BATCH * 8
    assert plan["logits"].bytes == MAX_BATCH * MAX_SEQUENCE * VOCAB * 2
    past, present = plan["past_key_values.1.value"], plan["present.1.value"]
    assert (past.bytes, past.alias_of) == (MAX_BATCH * KV_HEADS * MAX_CACHE * HEAD_DIM * 2, None)
    assert (present.bytes, present.alias_of) == (0, "past_key_values.1.value")


def test_buffers_cannot_be_planned_when_a_size_is_unknown(tmp_path: Path) -> None:
    odd = interface()
    odd["outputs"][0]["shape"] = ["batch", "tokens", VOCAB]
    (engine,) = load_engine_files(save_artefact(tmp_path, json.loads(json.dumps(record(interface=odd)))))
    with pytest.raises(ModelInterfaceError, match=r"logits has shape \['batch', 'tokens', 37\]"):
        plan_buffers(engine.interface, 1, 1)
