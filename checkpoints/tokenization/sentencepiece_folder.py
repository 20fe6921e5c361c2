"""A folder's tokenizer.model, and what the JSON files beside it add, as tokenizer.json."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from dlo_export.checkpoints.errors import CheckpointError
from dlo_export.checkpoints.files.json_file import read_json, save_json
from dlo_export.checkpoints.tokenization.errors import UnknownTokenizerError
from dlo_export.checkpoints.tokenization.sentencepiece_file import read_sentencepiece
from dlo_export.checkpoints.tokenization.special_tokens import add_boundary_tokens

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


@dataclass(frozen=True)
class ConvertedTokenizer:
    """What tokenizer.json and tokenizer_config.json are made of.

    Attributes:
        backend: The tokenizer.
        settings: tokenizer_config.json.
        inexact: Why some texts may become other tokens than before; None where none can.
    """

    backend: Tokenizer
    settings: Mapping[str, Any]
    inexact: str | None

    def save(self, folder: Path) -> None:
        """Writes both files into an existing folder."""
        self.backend.save(str(folder / "tokenizer.json"))
        save_json(folder / "tokenizer_config.json", self.settings)


def convert_sentencepiece(file: Callable[[str], Path | None]) -> ConvertedTokenizer:
    """Converts a folder's tokenizer.model as transformers would.

    Args:
        file: The path of a file of the folder by its name, None if it has none such; must have "tokenizer.model".

    Raises:
        UnknownTokenizerError: The tokenizer is of a kind that tokenizer.json cannot express.
        CheckpointError: A JSON file beside it is damaged.
    """
    model_path = file("tokenizer.model")
    if model_path is None:
        raise ValueError("a folder without tokenizer.model was given: please report")

    def read(name: str) -> dict[str, Any]:
        path = file(name)
        return {} if path is None else read_json(path, CheckpointError)

    config, special_map, added_ids = (
        read("tokenizer_config.json"),
        read("special_tokens_map.json"),
        read("added_tokens.json"),
    )
    model = read_sentencepiece(model_path, legacy=config.get("legacy") is not False)
    try:
        backend = model.vocabulary.tokenizer()
    except Exception as err:  # tokenizers raises nothing more specific
        raise UnknownTokenizerError(f"{model_path}: makes no tokenizer ({err})") from err
    folder = model_path.parent
    special = {
        name: text
        for name in SPECIAL_TOKENS
        for text in [
            _content(config.get(name), folder / "tokenizer_config.json")
            or _content(special_map.get(name), folder / "special_tokens_map.json")
            or model.special_tokens.get(name)
        ]
        if text
    }
    _add_tokens(backend, _added_tokens(config, added_ids, folder), model_path)
    backend.add_special_tokens(list(special.values()))
    add_boundary_tokens(
        backend,
        special.get("bos_token") if config.get("add_bos_token") is not False else None,
        special.get("eos_token") if config.get("add_eos_token") is True else None,
    )
    settings = {
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        **config,
        **special,
        # The class that takes tokenizer.json as it is; LlamaTokenizer builds its own from it.
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    return ConvertedTokenizer(backend, settings, model.vocabulary.inexact())


def _content(token: Any, path: Path) -> str | None:
    """A special token's text: JSON files have it alone, or as one field of several."""
    text = token.get("content") if isinstance(token, Mapping) else token
    if not isinstance(text, str):
        return None
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as err:
        raise _damaged(path, f"{text!r} is no text ({err.reason})") from err
    return text


def _added_tokens(config: Mapping[str, Any], ids: Mapping[str, Any], folder: Path) -> dict[int, AddedToken]:
    """Tokens that were added to the vocabulary, or are never cut, by id."""
    added = {}
    for token, index in ids.items():
        if type(index) is not int:
            raise _damaged(folder / "added_tokens.json", f"{token!r} is {index!r}, expected an id")
        added[index] = AddedToken(_content(token, folder / "added_tokens.json"), normalized=False)
    decoder, said_in = config.get("added_tokens_decoder") or {}, folder / "tokenizer_config.json"
    if not isinstance(decoder, Mapping):
        raise _damaged(said_in, "added_tokens_decoder is not an object")
    for index, fields in decoder.items():
        text = _content(fields, said_in)
        if not re.fullmatch("[0-9]{1,9}", index) or text is None or not isinstance(fields, Mapping):
            raise _damaged(said_in, f"added_tokens_decoder has no token under {index!r}")
        flags = {name: fields.get(name) is True for name in ("lstrip", "rstrip", "single_word", "special")}
        added[int(index)] = AddedToken(text, normalized=False, **flags)
    return dict(sorted(added.items()))


def _add_tokens(backend: Tokenizer, added: Mapping[int, AddedToken], path: Path) -> None:
    for index, token in added.items():
        expected = backend.token_to_id(token.content)
        if expected is None:
            expected = backend.get_vocab_size()  # the id it would get
        if expected != index:
            raise UnknownTokenizerError(f"{path}: {token.content!r} is added with id {index}, but would get {expected}")
        (backend.add_special_tokens if token.special else backend.add_tokens)([token])


def _damaged(path: Path, text: str) -> CheckpointError:
    return CheckpointError(f"{path}: {text}", hint="save the tokenizer again, with transformers")
