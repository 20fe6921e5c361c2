from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GenerationConfig, LlamaForCausalLM

from dlo_export.checkpoints.errors import CheckpointError, InputError
from dlo_export.checkpoints.opening import open_checkpoint
from tests.checkpoints.rewriting import WEIGHTS, rewrite_json, rewrite_tensors
from tests.tiny_models import BYTE_VOCABULARY, save_tiny_llama

REFERENCES = Path(__file__).parents[1] / "data"
INDEX = "model.safetensors.index.json"
NORM = "model.norm.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny_llama(tmp_path / "tiny")


def safetensors_bytes(header: Any, data: bytes = b"") -> bytes:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + data


# -- what is read


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"dtype": "float16", "tie": True},
        {"dtype": "bfloat16", "shards": 3, "head_dim": 16, "rope": "llama3"},
        {"shards": 2, "tie": True, "kv_heads": 1, "attention_bias": True, "mlp_bias": True, "legacy_keys": True},
    ],
    ids=str,
)
def test_tensors_equal_transformers_when_opened(tmp_path: Path, shape: dict[str, Any]) -> None:
    folder = save_tiny_llama(tmp_path, **shape)
    reference = dict(LlamaForCausalLM.from_pretrained(folder, dtype="auto").named_parameters())
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.stored_dtype == checkpoint.config.dtype == shape.get("dtype", "float32")
        assert list(checkpoint.tensors) == list(checkpoint.config.tensor_shapes())
        assert set(checkpoint.tensors) == set(reference)
        for name, tensor in checkpoint.tensors.items():
            array = tensor.numpy()
            assert (tensor.shape, tensor.dtype, tensor.nbytes) == (array.shape, array.dtype, array.nbytes)
            assert tensor.dtype.name == checkpoint.stored_dtype
            np.testing.assert_array_equal(array.astype(np.float32), reference[name].detach().float().numpy())


@pytest.mark.parametrize("kind", ["mlp", "layer"])
def test_tensors_are_the_files_when_the_authors_code_saved_them(kind: str) -> None:
    folder = REFERENCES / f"reference_{kind}_routed"
    stored = load_file(folder / WEIGHTS)
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.config.routing is not None
        assert checkpoint.config.routing.kind == kind
        assert set(checkpoint.tensors) == set(stored)
        for name, tensor in checkpoint.tensors.items():
            np.testing.assert_array_equal(tensor.numpy(), stored[name].numpy())


def test_tensor_is_a_read_only_view_when_stored_as_bf16(tmp_path: Path) -> None:
    tensor = open_checkpoint(save_tiny_llama(tmp_path, dtype="bfloat16")).tensors[NORM]
    first, second = tensor.numpy(), tensor.numpy()
    assert first.dtype == ml_dtypes.bfloat16
    assert np.shares_memory(first, second)
    assert not first.flags.writeable


def test_rows_are_a_part_of_the_tensor_when_asked_for(folder: Path) -> None:
    tensor = open_checkpoint(folder).tensors["model.layers.1.mlp.down_proj.weight"]
    np.testing.assert_array_equal(tensor.rows(3, 9), tensor.numpy()[3:9])


def test_tensor_reads_the_same_when_released(folder: Path) -> None:
    tensor = open_checkpoint(folder).tensors["lm_head.weight"]
    view = tensor.numpy()
    before = view.copy()
    tensor.release()
    np.testing.assert_array_equal(view, before)
    np.testing.assert_array_equal(tensor.numpy(), before)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_given_back_when_a_tensor_is_released(tmp_path: Path) -> None:
    def mapped_bytes() -> int:
        (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssFile")]
        return int(line.split()[1]) * 1024

    with open_checkpoint(save_tiny_llama(tmp_path, vocab=200_000, tie=True)) as checkpoint:
        tensor = checkpoint.tensors["model.embed_tokens.weight"]
        before = mapped_bytes()
        tensor.numpy().sum()
        assert mapped_bytes() - before >= 0.9 * tensor.nbytes
        tensor.release()
        assert mapped_bytes() - before <= 0.1 * tensor.nbytes


def test_tensors_are_out_of_reach_and_arrays_are_not_when_closed(folder: Path) -> None:
    with open_checkpoint(folder) as checkpoint:
        tensor = checkpoint.tensors[NORM]
        array = tensor.numpy()
        copy = array.copy()
    np.testing.assert_array_equal(array, copy)
    tensor.release()
    with pytest.raises(ValueError, match="closed"):
        tensor.numpy()


def test_no_deep_learning_framework_is_imported_when_a_checkpoint_is_opened(folder: Path) -> None:
    code = (
        "import sys; from dlo_export.checkpoints.opening import open_checkpoint; "
        f"[t.numpy().sum() for t in open_checkpoint({str(folder)!r}).tensors.values()]; "
        "print({'torch', 'transformers', 'gguf', 'tokenizers'} & set(sys.modules))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    assert result.stdout == "set()\n"


# -- damaged files


@pytest.mark.parametrize("kept", [0, 7, 8, 500, 0.5, -1])
def test_file_is_refused_by_name_when_truncated(folder: Path, kept: float) -> None:
    content = (folder / WEIGHTS).read_bytes()
    length = int(kept * len(content)) if isinstance(kept, float) else kept
    (folder / WEIGHTS).write_bytes(content[:length])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: .*(\n.*)*hint: "):
        open_checkpoint(folder)


def entry(start: int = 0, stop: int = 8, dtype: Any = "F32", shape: Any = (2,)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"nonsense", "the header is not valid JSON"),
        (b"\xff\xff", "the header is not valid JSON"),
        (b"[1, 2]", "the header is a JSON list"),
        (b'{"a": {}, "a": {}}', "duplicated: a"),
        ({"a": 1}, "a: is 1, expected an object"),
        ({"a": entry(dtype="F4")}, "a: dtype is 'F4', expected one of"),
        ({"a": entry(dtype=["F32"])}, "a: dtype is"),
        ({"a": entry(shape=[-2])}, r"a: shape is \[-2\], expected a list of sizes"),
        ({"a": entry(shape=[True, 2])}, "a: shape is"),
        ({"a": entry(shape=None)}, "a: shape is None"),
        ({"a": entry(shape=[2**63])}, "a: shape is"),
        ({"a": entry(shape=[1] * 33)}, "a: shape has 33 entries, expected at most 32"),
        ({"a": entry(shape=[2**62] * 100_000)}, "a: shape has 100000 entries, expected at most 32"),
        ({"a": entry() | {"data_offsets": [0]}}, "a: data_offsets are"),
        ({"a": entry(stop=7)}, "a: takes 7 bytes, expected 8"),
        ({"a": entry(8, 0)}, "a: takes -8 bytes, expected 8"),
        ({"a": entry(1 << 62, (1 << 62) + 8)}, "a: ends at byte 4611686018427388"),
        ({"a": entry(), "b": entry()}, r"b: starts at byte \d+, expected \d+ \(an overlap or a hole\)"),
        ({"a": entry(4, 12), "b": entry(12, 16, shape=[1])}, r"a: starts at byte \d+, expected"),
        ({"a": entry()}, r"the tensors end at byte \d+, but the file has"),
    ],
)
def test_file_is_refused_with_the_reason_when_its_header_is_corrupt(folder: Path, header: Any, message: str) -> None:
    (folder / WEIGHTS).write_bytes(safetensors_bytes(header, bytes(16)))
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(folder)
    assert str(folder / WEIGHTS) in str(caught.value)


def test_file_is_refused_when_its_header_length_is_absurd(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    with pytest.raises(CheckpointError, match="is not a safetensors file"):
        open_checkpoint(folder)


def test_nothing_but_a_named_error_is_raised_when_header_bytes_are_random(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    header_end = 8 + int.from_bytes(content[:8], "little")
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(200):
        damaged = bytearray(content)
        damaged[rng.integers(header_end)] = rng.integers(256)
        (folder / WEIGHTS).write_bytes(damaged)
        try:
            checkpoint = open_checkpoint(folder)
        except CheckpointError:
            refused += 1
        else:
            for tensor in checkpoint.tensors.values():
                tensor.numpy()
    assert refused > 100


# -- shards


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return save_tiny_llama(tmp_path / "sharded", shards=3)


def test_shards_are_all_named_when_several_are_missing_or_damaged(sharded: Path) -> None:
    first, second, third = sorted(sharded.glob("*.safetensors"))
    first.unlink()
    third.write_bytes(third.read_bytes()[:-1])
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(sharded)
    text = str(caught.value)
    assert f"{first}: no such file" in text
    assert f"{third}: the header is not consistent" in text
    assert second.name not in text
    assert text.count("hint: ") == 1


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/hostname", "a/../../model.safetensors"])
def test_index_is_refused_when_it_leaves_the_folder(sharded: Path, name: str) -> None:
    shutil.copy(next(sharded.glob("*.safetensors")), sharded.parent / WEIGHTS)
    index = json.loads((sharded / INDEX).read_text())
    rewrite_json(sharded / INDEX, weight_map=index["weight_map"] | {NORM: name})
    with pytest.raises(CheckpointError, match="outside its folder"):
        open_checkpoint(sharded)


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000, "\ud800", "", ".", "missing.safetensors", "config.json/x"])
def test_index_is_refused_when_a_name_is_no_files(sharded: Path, name: str) -> None:
    index = json.loads((sharded / INDEX).read_text())
    rewrite_json(sharded / INDEX, weight_map=index["weight_map"] | {NORM: name})
    with pytest.raises(CheckpointError, match=r"index\.json: the shards are not what the index says\n  "):
        open_checkpoint(sharded)


def check_read_as_transformers_does(folder: Path) -> None:
    model, report = LlamaForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not report["missing_keys"]
    reference = dict(model.named_parameters())
    with open_checkpoint(folder) as checkpoint:
        assert set(checkpoint.tensors) == set(reference)
        for name, tensor in checkpoint.tensors.items():
            np.testing.assert_array_equal(tensor.numpy(), reference[name].detach().numpy(), err_msg=name)


@pytest.mark.parametrize("place", ["another shard", "nowhere", "a name that no shard has"])
def test_tensors_equal_transformers_when_the_index_says_they_are_elsewhere(sharded: Path, place: str) -> None:
    first, *_ = sorted(sharded.glob("*.safetensors"))
    weight_map = json.loads((sharded / INDEX).read_text())["weight_map"]
    if place == "nowhere":
        del weight_map[NORM]
    else:
        weight_map[NORM if place == "another shard" else "model.ghost.weight"] = first.name
    rewrite_json(sharded / INDEX, weight_map=weight_map)
    check_read_as_transformers_does(sharded)


def test_tensor_without_a_place_is_left_out_with_a_warning_when_the_index_does_not_name_it(sharded: Path) -> None:
    first, *_ = sorted(sharded.glob("*.safetensors"))
    save_file(load_file(first) | {"value_head.weight": torch.ones(3)}, first)
    check_read_as_transformers_does(sharded)
    (warning,) = open_checkpoint(sharded).warnings
    assert "does not name value_head.weight" in warning
    weight_map = json.loads((sharded / INDEX).read_text())["weight_map"]
    rewrite_json(sharded / INDEX, weight_map=weight_map | {"value_head.weight": first.name})
    with pytest.raises(CheckpointError, match=r"value_head\.weight: \[3\] in .* has no place in this model"):
        open_checkpoint(sharded)


def test_tensor_is_read_once_when_two_shards_hold_it_equal(sharded: Path) -> None:
    first, *_, last = sorted(sharded.glob("*.safetensors"))
    save_file(load_file(first) | {NORM: load_file(last)[NORM]}, first)
    check_read_as_transformers_does(sharded)


@pytest.mark.parametrize("copy", [torch.ones(32), torch.ones(31), torch.ones(32, dtype=torch.float16)], ids=str)
def test_tensor_is_refused_with_both_files_when_two_shards_hold_different_ones(
    sharded: Path, copy: torch.Tensor
) -> None:
    first, *_, last = sorted(sharded.glob("*.safetensors"))
    save_file(load_file(first) | {NORM: copy}, first)
    with pytest.raises(CheckpointError, match=rf"{NORM} in {first.name} and {NORM} in {last.name}: are not equal"):
        open_checkpoint(sharded)


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("prefixes", ["none", "some", "two"])
def test_tensors_equal_transformers_when_names_have_other_prefixes(tmp_path: Path, tie: bool, prefixes: str) -> None:
    folder = save_tiny_llama(tmp_path, tie=tie)
    tensors = load_file(folder / WEIGHTS)
    for index, name in enumerate(list(tensors)):
        if prefixes == "two":
            tensors[f"model.{name}"] = tensors.pop(name)
        elif prefixes == "none" or index % 2:
            tensors[name.removeprefix("model.")] = tensors.pop(name)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    check_read_as_transformers_does(folder)


def test_routers_are_found_when_names_have_no_prefix(tmp_path: Path) -> None:
    folder = save_tiny_llama(tmp_path, routed=[True, False, True])
    tensors = load_file(folder / WEIGHTS)
    save_file({name.removeprefix("model."): tensor for name, tensor in tensors.items()}, folder / WEIGHTS)
    assert set(open_checkpoint(folder).tensors) == set(tensors)


@pytest.mark.parametrize("name", ["lm_head.weight", "model.lm_head.weight"])
def test_tensors_equal_transformers_when_a_tied_matrix_is_stored_as_the_head_alone(tmp_path: Path, name: str) -> None:
    folder = save_tiny_llama(tmp_path, tie=True)
    tensors = load_file(folder / WEIGHTS)
    tensors[name] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    check_read_as_transformers_does(folder)


def test_head_is_missing_when_an_untied_model_has_the_embedding_alone(folder: Path) -> None:
    rewrite_tensors(folder, {"lm_head.weight": None})
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: missing"):
        open_checkpoint(folder)


def test_two_names_of_one_tensor_are_both_named_when_their_values_differ(folder: Path) -> None:
    rewrite_tensors(folder, {"norm.weight": torch.zeros(32)})
    with pytest.raises(CheckpointError, match=r"norm\.weight in model\.safetensors and .*norm\.weight in .*not equal"):
        open_checkpoint(folder)


@pytest.mark.parametrize("weight_map", [None, [], {"a": 1}])
def test_index_is_refused_when_it_maps_nothing_to_files(sharded: Path, weight_map: Any) -> None:
    rewrite_json(sharded / INDEX, weight_map=weight_map)
    with pytest.raises(CheckpointError, match="weight_map is not an object"):
        open_checkpoint(sharded)


# -- folders and names


def test_folder_is_refused_with_a_hint_when_it_holds_pickles_only(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"only pytorch_model\.bin, which are Python pickles(.*\n)+hint: convert"):
        open_checkpoint(folder)


def test_folder_is_refused_with_a_hint_when_it_holds_a_graph_only(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "model.onnx")
    with pytest.raises(
        CheckpointError, match=rf"has neither {WEIGHTS}(.*\n)+hint: give the graph itself: .*/model\.onnx"
    ):
        open_checkpoint(folder)


def test_folder_is_refused_with_a_hint_when_it_only_holds_a_gguf_file(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    with pytest.raises(CheckpointError, match=r"has no config\.json\n\nhint: give the GGUF file itself"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["config.json", WEIGHTS])
def test_folder_is_refused_when_a_file_links_outside(folder: Path, name: str) -> None:
    outside = folder.parent / "outside"
    (folder / name).rename(outside)
    (folder / name).symlink_to(outside)
    with pytest.raises(CheckpointError, match=f"{name}: leads to .*outside, outside its folder"):
        open_checkpoint(folder)


@pytest.mark.parametrize("name", ["missing/folder", "missing.gguf", "/no/such/path", "../..missing", "a--b..c", "x y"])
def test_name_is_refused_when_nothing_is_there(name: str) -> None:
    with pytest.raises(InputError, match="no such file or folder"):
        open_checkpoint(name)


def test_file_is_refused_with_a_hint_when_it_is_not_a_checkpoint(folder: Path) -> None:
    with pytest.raises(InputError, match=r"hint: for a \.safetensors file, give the folder"):
        open_checkpoint(folder / WEIGHTS)


def test_hub_id_opens_its_snapshot_when_it_is_in_the_cache(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "hub" / "models--someone--tiny"
    snapshot = repository / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(snapshot.name)
    for path in folder.iterdir():
        path.rename(repository / "blobs" / path.name)
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with open_checkpoint("someone/tiny") as checkpoint:
        assert checkpoint.path == snapshot
        assert checkpoint.tensors[NORM].numpy().shape == (32,)
        checkpoint.save_companions(tmp_path)
    assert not (tmp_path / "generation_config.json").is_symlink()


@pytest.mark.parametrize("name", ["config.json", WEIGHTS, "tokenizer.json"])
def test_folder_is_refused_when_a_file_links_to_itself(folder: Path, name: str) -> None:
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(name)
    with pytest.raises(CheckpointError, match="hint: "):
        open_checkpoint(folder)


# -- companions


def rewrite_tokenizer(folder: Path, largest: int) -> None:
    """Adds a token of this id to the tokenizer of single bytes."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append(tokenizer["added_tokens"][0] | {"id": largest, "content": "<last>"})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def test_tokenizer_is_refused_when_it_has_tokens_that_the_model_has_not(tmp_path: Path) -> None:
    folder = save_tiny_llama(tmp_path, vocab=BYTE_VOCABULARY, tokenizer=True)
    rewrite_tokenizer(folder, BYTE_VOCABULARY)  # a padding token that the embedding has no row for
    open_checkpoint(folder).close()
    rewrite_tokenizer(folder, BYTE_VOCABULARY + 1)
    with pytest.raises(CheckpointError, match=r"\.json: has tokens up to id 260, the model has vocab_size 259"):
        open_checkpoint(folder)
    unigram = {"model": {"type": "Unigram", "vocab": [["x", 0.0]] * (BYTE_VOCABULARY + 2)}, "added_tokens": None}
    (folder / "tokenizer.json").write_text(json.dumps(unigram))
    with pytest.raises(CheckpointError, match="has tokens up to id 260"):
        open_checkpoint(folder)


def quantisation(algorithm: object, **others: object) -> dict[str, object]:
    """hf_quant_config.json as ModelOpt writes it."""
    return {
        "producer": {"name": "modelopt", "version": "0.33.0"},
        "quantization": {"quant_algo": algorithm, "exclude_modules": ["lm_head"], **others},
    }


@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize(
    ("name", "values", "said"),
    [
        ("hf_quant_config.json", quantisation("FP8"), "quantization.quant_algo is 'FP8'"),
        ("hf_quant_config.json", quantisation("NVFP4", group_size=16), "quantization.quant_algo is 'NVFP4'"),
        ("hf_quant_config.json", quantisation(["FP8"]), r"quantization.quant_algo is \['FP8'\]"),
        ("hf_quant_config.json", {"quantization": "FP8"}, "quantization is set"),
        ("quantize_config.json", {"bits": 4, "group_size": 128, "desc_act": False}, "bits is 4"),
        ("quant_config.json", {"w_bit": 4, "q_group_size": 128, "version": "GEMM"}, "w_bit is 4"),
    ],
    ids=["fp8", "nvfp4", "list", "text", "gptq", "awq"],
)
def test_quantisation_is_refused_by_what_it_says_when_a_file_beside_config_json_says_so(
    folder: Path, name: str, values: dict[str, object], said: str, weights: bool
) -> None:
    (folder / name).write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=rf"{name}: {said}, expected unquantised weights") as error:
        open_checkpoint(folder, weights=weights)
    assert (error.value.exit_code, "it was quantised from" in str(error.value)) == (2, True)


@pytest.mark.parametrize(
    "values", [{}, quantisation(None), quantisation("NO_QUANT"), quantisation(None, kv_cache_quant_algo="FP8")], ids=str
)
def test_checkpoint_is_opened_when_the_file_says_that_its_weights_are_plain(
    folder: Path, values: dict[str, object]
) -> None:
    (folder / "hf_quant_config.json").write_text(json.dumps(values))
    open_checkpoint(folder).close()


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_quantisation_is_refused_by_name_when_its_file_is_damaged(folder: Path, content: str) -> None:
    (folder / "hf_quant_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"hf_quant_config\.json: "):
        open_checkpoint(folder)


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_tokenizer_is_refused_by_name_when_it_is_damaged(folder: Path, content: str) -> None:
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: "):
        open_checkpoint(folder)


def test_companions_load_in_transformers_when_saved(tmp_path: Path) -> None:
    folder = save_tiny_llama(tmp_path / "tiny", vocab=BYTE_VOCABULARY, tokenizer=True)
    target = tmp_path / "artefact"
    target.mkdir()
    open_checkpoint(folder).save_companions(target)
    assert {path.name for path in target.iterdir()} == {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    text = "Grüße, 123!"
    saved, original = AutoTokenizer.from_pretrained(target), AutoTokenizer.from_pretrained(folder)
    assert saved(text).input_ids == original(text).input_ids
    assert (target / "generation_config.json").read_bytes() == (folder / "generation_config.json").read_bytes()


def test_config_keeps_unknown_keys_and_drops_switches_when_saved(folder: Path, tmp_path: Path) -> None:
    rewrite_json(folder / "config.json", use_cache=False, auto_map={"AutoConfig": "evil.Config"}, note="odd \ud800")
    open_checkpoint(folder).save_companions(tmp_path, {"num_hidden_layers": 5})
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["use_cache"] is True
    assert "auto_map" not in saved
    assert saved["note"] == "odd \ud800"
    assert saved["num_hidden_layers"] == 5


def test_generation_config_has_the_models_tokens_when_there_was_none(folder: Path, tmp_path: Path) -> None:
    (folder / "generation_config.json").unlink()
    rewrite_json(folder / "config.json", eos_token_id=[2, 3])
    open_checkpoint(folder).save_companions(tmp_path)
    generation = GenerationConfig.from_pretrained(tmp_path)
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (1, [2, 3], None)


def test_companion_is_refused_when_it_links_outside(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("{}")
    (folder / "tokenizer.json").symlink_to(tmp_path / "secret")
    target = tmp_path / "artefact"
    target.mkdir()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: leads to .*secret, outside its folder"):
        open_checkpoint(folder).save_companions(target)
    assert not (target / "tokenizer.json").exists()
