"""tokenizer.model as tokenizer.json, compared with SentencePiece itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from dlo_export.checkpoints.errors import CheckpointError
from dlo_export.checkpoints.opening import open_checkpoint
from dlo_export.checkpoints.tokenization.sentencepiece import SentencePieceVocabulary
from tests.tiny_models import save_tiny_llama
from tests.tiny_sentencepiece import VOCABULARY, many_texts, sentencepiece_of, train_sentencepiece


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny_llama(tmp_path / "tiny", layers=1, vocab=VOCABULARY + 10)


def saved(folder: Path) -> Path:
    """What an export writes beside the graph."""
    target = folder.parent / "artefact"
    target.mkdir()
    with open_checkpoint(folder) as checkpoint:
        assert not checkpoint.warnings
        checkpoint.save_companions(target)
    return target


def save_json(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"byte_fallback": False},
        {"remove_extra_whitespaces": True},
        {"add_dummy_prefix": False},
        {"add_dummy_prefix": False, "remove_extra_whitespaces": True},
    ],
    ids=str,
)
def test_converted_tokenizer_gives_sentencepiece_ids_when_it_is_bpe(folder: Path, options: dict[str, Any]) -> None:
    model = train_sentencepiece(folder, **options)
    tokenizer = Tokenizer.from_file(str(saved(folder) / "tokenizer.json"))
    for text in many_texts():
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert ids == model.encode(text), text
        if model.unk_id() not in ids:
            assert tokenizer.decode(ids) == model.decode(ids), text


@pytest.mark.parametrize("options", [{"algorithm": "unigram"}, {"normalization_rule_name": "nmt_nfkc"}], ids=str)
def test_converted_tokenizer_is_close_and_warned_of_when_it_cannot_be_exact(
    folder: Path, options: dict[str, Any]
) -> None:
    model = train_sentencepiece(folder, **options)
    checkpoint = open_checkpoint(folder)
    (warning,) = checkpoint.warnings
    assert "tokenizer.model: some texts may become other tokens" in warning
    checkpoint.save_companions(folder.parent)
    tokenizer = Tokenizer.from_file(str(folder.parent / "tokenizer.json"))
    texts = many_texts()
    different = [text for text in texts if tokenizer.encode(text, add_special_tokens=False).ids != model.encode(text)]
    assert len(different) < 0.01 * len(texts)


@pytest.mark.parametrize(
    ("pieces", "scores", "text", "reason"),
    [
        # llama2.c's files score all runs of spaces alike.
        (["▁", "▁▁", "▁▁▁", "▁▁▁▁", "x"], [-9.0] * 4 + [-10.0], " " * 9 + "x", None),
        (["▁", "a", "b", "c", "ab", "bc"], [-9.0] * 4 + [-1.0, -2.0], "abcbcab", None),
        (["▁", "a", "b", "ab", "ba"], [-9.0] * 5, None, "share their scores"),
        (["▁", "a", "ab"], [-9.0, -9.0, -1.0], None, "contain letters that are no tokens"),
    ],
)
def test_merges_follow_sentencepiece_or_say_why_not_when_scores_are_unusual(
    pieces: list[str], scores: list[float], text: str | None, reason: str | None
) -> None:
    pieces, scores, kinds = ["<unk>", *pieces], [0.0, *scores], [2, *[1] * len(pieces)]
    vocabulary = SentencePieceVocabulary(pieces, scores, kinds, "<unk>")
    if reason is not None:
        assert reason in str(vocabulary.inexact())
    else:
        assert vocabulary.inexact() is None
        assert vocabulary.tokenizer().encode(text).ids == sentencepiece_of(pieces, scores, kinds).encode(text)


def test_control_and_user_defined_pieces_stay_whole_when_text_holds_them(folder: Path) -> None:
    model = train_sentencepiece(folder, user_defined_symbols=["<sep>"], control_symbols=["<ctl>"])
    tokenizer = Tokenizer.from_file(str(saved(folder) / "tokenizer.json"))
    ids = tokenizer.encode("a<sep>b<ctl></s>").ids
    tokens = [model.id_to_piece(index) for index in ids]
    assert tokens == ["<s>", "▁a", "<sep>", "▁b", "<ctl>", "</s>"]
    assert tokenizer.decode(ids) == "a<sep> b"


@pytest.mark.parametrize(
    ("settings", "tokens"),
    [
        ({}, ["<s>", "▁a", "</s>", "▁a"]),
        ({"legacy": False}, ["<s>", "▁a", "</s>", "a"]),
        ({"add_bos_token": False, "add_eos_token": True}, ["▁a", "</s>", "▁a", "</s>"]),
        (
            {"bos_token": {"content": "<bos>"}, "added_tokens_decoder": {"N": {"content": "<bos>", "special": True}}},
            None,
        ),
    ],
    ids=str,
)
def test_tokenizer_config_is_obeyed_when_a_folder_is_converted(
    folder: Path, settings: dict[str, Any], tokens: list[str] | None
) -> None:
    size = train_sentencepiece(folder).get_piece_size()
    decoder = settings.get("added_tokens_decoder", {})
    settings = settings | {"added_tokens_decoder": {str(size): fields for fields in decoder.values()}}
    save_json(
        folder / "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer", "model_max_length": 77, **settings}
    )
    target = saved(folder)
    tokenizer = AutoTokenizer.from_pretrained(target)
    encoded = tokenizer("a</s>a")
    assert tokenizer.convert_ids_to_tokens(encoded.input_ids) == (tokens or ["<bos>", "▁a", "</s>", "▁a"])
    assert set(encoded) == {"input_ids", "attention_mask"}
    assert tokenizer.model_max_length == 77
    assert len(tokenizer) == size + len(decoder)
    assert (target / "tokenizer.model").read_bytes() == (folder / "tokenizer.model").read_bytes()


def test_added_tokens_get_their_ids_when_a_folder_is_converted(folder: Path) -> None:
    size = train_sentencepiece(folder).get_piece_size()
    save_json(folder / "added_tokens.json", {"<|im_end|>": size + 1, "<|im_start|>": size})
    save_json(folder / "special_tokens_map.json", {"eos_token": "<|im_end|>"})
    target = saved(folder)
    tokenizer = AutoTokenizer.from_pretrained(target)
    assert tokenizer.eos_token_id == size + 1
    assert tokenizer("<|im_start|>a<|im_end|>", add_special_tokens=False).input_ids[::2] == [size, size + 1]


def test_tokenizer_json_is_taken_as_it_is_when_both_are_there(folder: Path) -> None:
    train_sentencepiece(folder)
    (folder / "tokenizer.json").write_text("{}")
    assert (saved(folder) / "tokenizer.json").read_text() == "{}"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"IQ== 0\nIg== 1\n", "not a readable SentencePiece model"),  # tiktoken's form, as Meta's Llama 3 has it
        (b"version https://git-lfs.github.com/spec/v1\n", "not a readable SentencePiece model"),
        (b"", "it has no pieces"),
        (b"\x0a\xff\xff\xff\xff\x0f", "not a readable SentencePiece model"),
    ],
)
def test_tokenizer_model_is_copied_and_warned_of_when_it_is_of_another_kind(
    folder: Path, content: bytes, reason: str
) -> None:
    (folder / "tokenizer.model").write_bytes(content)
    checkpoint = open_checkpoint(folder)
    (warning,) = checkpoint.warnings
    assert reason in warning
    assert "onnxruntime-genai" in warning
    target = folder.parent / "artefact"
    target.mkdir()
    checkpoint.save_companions(target)
    assert (target / "tokenizer.model").read_bytes() == content
    assert not (target / "tokenizer.json").exists()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"algorithm": "char"}, "its model_type is 4, expected 1 (unigram) or 2 (BPE)"),
        ({"treat_whitespace_as_suffix": True}, "it marks spaces in a way of its own"),
    ],
    ids=str,
)
def test_tokenizer_is_left_out_with_a_warning_when_tokenizer_json_cannot_say_it(
    folder: Path, options: dict[str, Any], reason: str
) -> None:
    train_sentencepiece(folder, **options)
    (warning,) = open_checkpoint(folder).warnings
    assert reason in warning


def test_tokenizer_is_left_out_with_a_warning_when_tokenizer_model_is_cut_anywhere(folder: Path) -> None:
    train_sentencepiece(folder)
    content = (folder / "tokenizer.model").read_bytes()
    for kept in range(1, len(content), 97):
        (folder / "tokenizer.model").write_bytes(content[:kept])
        (warning,) = open_checkpoint(folder).warnings
        assert "not a readable SentencePiece model" in warning


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("added_tokens.json", {"<x>": "9"}, r"added_tokens\.json: '<x>' is '9', expected an id"),
        ("tokenizer_config.json", {"added_tokens_decoder": []}, None),
        ("tokenizer_config.json", {"added_tokens_decoder": [1]}, "added_tokens_decoder is not an object"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {}}}, "added_tokens_decoder has no token under 'x'"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"9" * 5000: {"content": "x"}}}, "has no token under '9"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"1": {"content": "\ud800"}}}, "is no text"),
        ("tokenizer_config.json", {"bos_token": "\ud800"}, r"tokenizer_config\.json: '\\ud800' is no text"),
        ("special_tokens_map.json", {"eos_token": {"content": "\ud800"}}, r"special_tokens_map\.json: '\\ud800'"),
        ("added_tokens.json", {"\ud800": 9}, r"added_tokens\.json: '\\ud800' is no text"),
        ("tokenizer_config.json", [], "holds a JSON list, expected an object"),
    ],
)
def test_folder_is_refused_by_name_when_the_files_beside_tokenizer_model_are_damaged(
    folder: Path, name: str, values: Any, message: str | None
) -> None:
    train_sentencepiece(folder)
    save_json(folder / name, values)
    if message is None:
        assert not open_checkpoint(folder).warnings
        return
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)


def test_tokenizer_is_left_out_with_a_warning_when_added_ids_leave_gaps(folder: Path) -> None:
    size = train_sentencepiece(folder).get_piece_size()
    save_json(folder / "added_tokens.json", {"<x>": size + 1})
    (warning,) = open_checkpoint(folder).warnings
    assert f"'<x>' is added with id {size + 1}, but would get {size}" in warning
