from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, normalizers

from dlo_export.runtimes.generation.tokenizer import Tokenizer, TokenizerError
from tests.tiny_models import BYTE_VOCABULARY, save_byte_tokenizer

TEXT = "naïve 🦙 déjà-vu, 深度学习!"


@pytest.fixture(scope="module")
def bytes_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bytes")
    save_byte_tokenizer(folder, BYTE_VOCABULARY)
    return folder


@pytest.fixture(scope="module")
def words_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Llama 2's kind: ▁ for spaces, the first one dropped, bytes for what the vocabulary lacks."""
    folder = tmp_path_factory.mktemp("words")
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁deep", "▁layers", "s", "!"]
    letters = sorted(set("deeplayers") - {"s"})
    tokenizer = RawTokenizer(
        models.BPE(
            {word: index for index, word in enumerate([*words, *letters])}, [], unk_token="<unk>", byte_fallback=True
        )
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder


@pytest.mark.parametrize("folder", ["bytes_folder", "words_folder"])
def test_stream_gives_whole_characters_when_tokens_are_bytes(folder: str, request: pytest.FixtureRequest) -> None:
    tokenizer = Tokenizer(request.getfixturevalue(folder))
    ids = tokenizer.encode(TEXT)
    assert len(ids) > len(TEXT)
    stream = tokenizer.stream()
    pieces = [stream.add(token) for token in ids]
    assert "".join(pieces) + stream.finish() == TEXT
    assert not any("\ufffd" in piece for piece in pieces)
    assert pieces.count("🦙") == 1


def test_stream_keeps_spaces_between_words_when_the_tokenizer_drops_leading_ones(words_folder: Path) -> None:
    tokenizer = Tokenizer(words_folder)
    stream = tokenizer.stream()
    deep, layers = (tokenizer._tokenizer.convert_tokens_to_ids(word) for word in ("▁deep", "▁layers"))
    assert [stream.add(token) for token in (deep, layers, deep)] == ["deep", " layers", " deep"]


def test_stream_shows_broken_bytes_when_it_finishes(bytes_folder: Path) -> None:
    tokenizer = Tokenizer(bytes_folder)
    stream = tokenizer.stream()
    llama = tokenizer.encode("🦙")
    assert [stream.add(token) for token in llama[:2]] == ["", ""]
    assert stream.finish() == "\ufffd"
    assert stream.finish() == ""


def test_stream_leaves_special_tokens_out_when_they_come(bytes_folder: Path) -> None:
    tokenizer = Tokenizer(bytes_folder)
    stream = tokenizer.stream()
    assert [stream.add(token) for token in (1, *tokenizer.encode("a"), 2)] == ["", "a", ""]
    assert stream.finish() == ""


def test_chat_is_encoded_when_the_tokenizer_has_a_template(bytes_folder: Path, words_folder: Path) -> None:
    tokenizer = Tokenizer(bytes_folder)
    assert tokenizer.has_chat_template
    ids = tokenizer.encode_chat([{"role": "user", "content": "hi"}])
    assert (ids[0], ids[-1]) == (1, 2)
    assert tokenizer.decode(ids) == "hi"
    with pytest.raises(TokenizerError, match="chat template"):
        Tokenizer(words_folder).encode_chat([{"role": "user", "content": "hi"}])


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('alternate') }}", "{% for %}", "{{ messages[9].content }}", "{{ 1 / 0 }}"]
)
def test_chat_is_refused_when_the_template_fails(tmp_path: Path, template: str) -> None:
    save_byte_tokenizer(tmp_path, BYTE_VOCABULARY)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    with pytest.raises(TokenizerError, match=r"the chat template failed[\s\S]*hint: .*--raw"):
        Tokenizer(tmp_path).encode_chat([{"role": "user", "content": "hi"}])


def test_text_is_refused_when_it_is_not_unicode(bytes_folder: Path) -> None:
    tokenizer = Tokenizer(bytes_folder)
    # Places are the prompt's, not those of what a chat template makes of it.
    for text, place in (("\udcff", 0), ("half \ud800 pair", 5)):
        with pytest.raises(TokenizerError, match=f"character {place} is .*not Unicode text"):
            tokenizer.encode(text)
        with pytest.raises(TokenizerError, match=f"character {place} is .*not Unicode text"):
            tokenizer.encode_chat([{"role": "user", "content": text}])


def test_empty_text_becomes_the_first_token_when_there_is_one(bytes_folder: Path) -> None:
    assert Tokenizer(bytes_folder).encode("") == [1]


def test_tokenizer_loads_when_config_json_is_of_a_type_transformers_does_not_know(tmp_path: Path) -> None:
    save_byte_tokenizer(tmp_path, BYTE_VOCABULARY)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama_dlo_exattn"}))
    assert Tokenizer(tmp_path).decode(Tokenizer(tmp_path).encode("deep")) == "deep"
    (tmp_path / "tokenizer_config.json").unlink()
    assert Tokenizer(tmp_path).decode(Tokenizer(tmp_path).encode("deep")) == "deep"


def test_tokenizer_runs_no_code_of_its_folder_and_says_so_when_it_has_some(tmp_path: Path) -> None:
    save_byte_tokenizer(tmp_path, BYTE_VOCABULARY)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    own = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | own))
    (tmp_path / "own.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(TokenizerError, match=r"custom code[\s\S]*hint: no code of a folder is run: remove auto_map"):
        Tokenizer(tmp_path)


def test_tokenizer_raises_when_files_are_missing_or_damaged(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"has no tokenizer.*tokenizer\.json"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerError, match="cannot read"):
        Tokenizer(tmp_path)
